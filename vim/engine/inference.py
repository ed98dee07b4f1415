"""Running a timm model over image files: building it, reading in parallel, labels, results."""

import argparse
import ast
import csv
import difflib
import json
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from vim.models import VisionMamba, load_checkpoint

from .images import ImageReadError, read_image
from .video import is_video, read_video

__all__ = [
    "Batch",
    "Prediction",
    "Runner",
    "add_arguments",
    "atomic_write",
    "build_model",
    "check_output",
    "chunk",
    "chunks_of",
    "class_names",
    "classify",
    "positive_int",
    "progress",
    "read_batches",
    "read_labels",
    "resolve_data_config",
    "select_device",
    "write_predictions",
]

logger = logging.getLogger(__name__)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
# A centre crop of anything more elongated shows next to nothing of it, and resizing its short side
# to the model's size would take gigabytes.
MAX_ASPECT_RATIO = 100
# Batches that are read while the model works on one.
READ_AHEAD = 2

T = TypeVar("T")


class ParseKwargs(argparse.Action):
    """`key=value ...` to a dict; values are Python literals, else strings."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        kwargs = dict(getattr(namespace, self.dest))
        for item in values:
            key, equals, value = item.partition("=")
            if not equals:
                parser.error(f"{option_string}: {item!r} is not key=value (-- ends the list)")
            try:
                kwargs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                kwargs[key] = value
        setattr(namespace, self.dest, kwargs)


def positive_int(text: str) -> int:
    """The integer in an argument; argparse reports the ValueError of anything below 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def add_arguments(parser: argparse.ArgumentParser, needs_model: bool = True) -> None:
    """Add the arguments that every tool running a model over images takes; see `Runner`.

    Args:
        parser: to add to.
        needs_model: whether `--model` must be given.
    """
    parser.add_argument("images", nargs="+", metavar="PATH", help="files, folders, globs, or -")
    about_model = "timm name, hf-hub:REPO or local-dir:DIR"
    parser.add_argument("--model", required=needs_model, help=about_model)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V")
    parser.add_argument("--pretrained", action="store_true", help="load the published weights")
    parser.add_argument("--checkpoint", type=Path, help="load these weights")
    parser.add_argument("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    parser.add_argument("--batch-size", type=positive_int, default=32)
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=positive_int, default=workers, help="reading threads")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation")


def build_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    use_ema: bool = False,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A timm model in evaluation mode; with neither weights named, random ones from seed 0.

    Args:
        name: name known to `timm.create_model`; `hf-hub:` and `local-dir:` names are too.
        pretrained: load the published weights.
        checkpoint: load these weights.
        use_ema: take the averaged weights of the checkpoint.
        model_kwargs: further arguments of `timm.create_model`.

    Raises:
        ValueError: unknown name, arguments the model does not take, or unusable checkpoint.
    """
    if use_ema and checkpoint is None:
        raise ValueError("--use-ema chooses weights of a checkpoint: give --checkpoint too")
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"checkpoint {checkpoint} does not exist or is no file")
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            model = timm.create_model(name, pretrained=pretrained, **(model_kwargs or {}))
        except Exception as error:  # whatever the model's constructor or the hub's client raises
            raise ValueError(f"cannot build {name} with {model_kwargs or {}}: {error}") from error
    if checkpoint is not None:
        load = load_checkpoint if isinstance(model, VisionMamba) else timm.models.load_checkpoint
        try:
            load(model, str(checkpoint), use_ema=use_ema)
        except Exception as error:  # a file of any content may be given
            raise ValueError(f"cannot load {checkpoint} into {name}: {error}") from error
    elif not pretrained:
        logger.warning("the weights are random: give --pretrained or --checkpoint for real results")
    return model.eval()


def _check_name(name: str) -> None:
    source, architecture = timm.models.parse_model_name(name)
    architecture = architecture.partition(".")[0]
    if source or timm.is_model(architecture):
        return
    # Compared to as many letters, so that "vim_tiny" is near to "vim_tiny_patch16_224".
    starts = {known[: len(architecture)]: known for known in reversed(timm.list_models())}
    near = [starts[start] for start in difflib.get_close_matches(architecture, starts)]
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
    raise ValueError(f"unknown model {name!r}; {hint}")


def resolve_data_config(model: nn.Module) -> dict[str, Any]:
    """How to preprocess images for a model, as `timm.data.create_transform` takes it.

    timm's own answer is the pretrained size, whatever `img_size` the model was built with.
    """
    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    if channels != 3:
        raise ValueError(f"images are read as RGB: in_chans must be 3, got {channels}")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        config["input_size"] = (channels, *size)
    return config


def select_device(name: str) -> torch.device:
    """The device called `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:INDEX`.

    Raises:
        ValueError: another name, or a GPU that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not here: {torch.cuda.device_count()} GPUs found")
    return device


def class_names(model: nn.Module, labels: Path | None = None) -> list[str]:
    """A name for each class of a model.

    From `labels`, else from the model's configuration (`label_names`), else ImageNet-1k's for 1000
    classes, else `class 0`, `class 1`, ...

    Args:
        model: a classifier.
        labels: file with one name a line, or JSON: a list, or an object of index to name.

    Raises:
        ValueError: no classifier, or not as many labels as classes.
    """
    count = model.num_classes
    if not count:
        raise ValueError("the model has no classes (num_classes=0)")
    if labels is not None:
        names = read_labels(labels)
        if len(names) != count:
            raise ValueError(f"{labels} must name {count} classes, got {len(names)}")
        return names
    config = model.pretrained_cfg
    names = config.get("label_names") or ()
    if len(names) == count:
        descriptions = config.get("label_descriptions") or {}
        return [descriptions.get(name, name) for name in names]
    if count == 1000:
        return ImageNetInfo().label_descriptions()
    return [f"class {index}" for index in range(count)]


def read_labels(path: Path) -> list[str]:
    """The names in a file: one a line, or JSON, a list or an object of index to name."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = json.loads(text)
    if isinstance(names, dict):
        if {str(index) for index in range(len(names))} != names.keys():
            raise ValueError(f"{path} must have the keys 0 to {len(names) - 1}")
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{path} must be a list, or an object of index to name")
    return [str(name) for name in names]


@dataclass
class Batch:
    """Consecutive images as one tensor.

    Args:
        paths: all files asked for, read or not; of a video the names of frames.
        images: (B, 3, H, W) those that could be read, in the order of `paths`; B may be 0.
        errors: the reason for each file that could not be read.
    """

    paths: Sequence[Path]
    images: Tensor
    errors: dict[Path, str]


def chunk(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive slices of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def chunks_of(paths: Sequence[Path], size: int) -> list[Sequence[Path]]:
    """What `read_batches` takes: consecutive images, `size` at most, and each video on its own."""
    chunks = []
    for video, group in groupby(paths, is_video):
        chunks += chunk(list(group), 1 if video else size)
    return chunks


def read_batches(
    chunks: Iterable[Sequence[Path]], transform: Callable, *, workers: int, frames: int = 32
) -> Iterator[Batch]:
    """One batch a chunk of paths, in order, read by threads a few batches ahead.

    What a batch holds depends on its chunk alone: a file that cannot be read leaves a gap in its
    own batch and moves no other. A chunk of one video gives batches of `frames` of it.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for paths in chunks:
            if len(paths) == 1 and is_video(paths[0]):
                while pending:
                    yield _collate(*pending.popleft())
                yield from _video_batches(paths[0], transform, pool, frames)
                continue
            pending.append((paths, [pool.submit(_load, path, transform) for path in paths]))
            if len(pending) > READ_AHEAD:
                yield _collate(*pending.popleft())
        while pending:
            yield _collate(*pending.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _video_batches(
    path: Path, transform: Callable, pool: ThreadPoolExecutor, size: int
) -> Iterator[Batch]:
    frames = read_video(path)
    try:
        while group := list(islice(frames, size)):
            futures = [pool.submit(transform, image) for _, image in group]
            yield _collate([name for name, _ in group], futures)
    except ImageReadError as error:
        yield Batch([path], torch.empty(0), {path: error.reason})


def _load(path: Path, transform: Callable) -> Tensor | ImageReadError:
    try:
        image = read_image(path)
    except ImageReadError as error:
        return error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        width, height = image.size
        return ImageReadError(path, f"{width} x {height} pixels are too elongated")
    return transform(image)


def _collate(paths: Sequence[Path], futures: Sequence) -> Batch:
    results = [future.result() for future in futures]
    images = [image for image in results if isinstance(image, Tensor)]
    errors = {error.path: error.reason for error in results if isinstance(error, ImageReadError)}
    return Batch(paths, torch.stack(images) if images else torch.empty(0), errors)


def progress(items: Iterable[T], total: int | None, unit: str) -> Iterable[T]:
    """The items behind a progress bar on stderr; elsewhere than on a terminal only in long work."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    return tqdm(items, total=total, unit=unit, delay=seconds, mininterval=seconds, leave=False)


class Runner:
    """A model with its preprocessing, device and precision, ready for image files.

    Parameters stay float32; in bfloat16 and float16 the model runs under `torch.autocast`.

    Args:
        args: what `add_arguments` parsed.

    Raises:
        ValueError: an argument that cannot be met.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = select_device(args.device)
        self.dtype = DTYPES[args.dtype]
        model = build_model(
            args.model,
            pretrained=args.pretrained,
            checkpoint=args.checkpoint,
            use_ema=args.use_ema,
            model_kwargs=args.model_kwargs,
        )
        self.data_config = resolve_data_config(model)
        self.model = model.to(self.device)
        self.workers, self.batch_size = args.workers, args.batch_size

    def read(self, chunks: Sequence[Sequence[Path]]) -> Iterator[Batch]:
        """One batch on the device for each chunk of paths, behind a progress bar."""
        transform = create_transform(**self.data_config, is_training=False)
        batches = read_batches(chunks, transform, workers=self.workers, frames=self.batch_size)
        for batch in progress(batches, len(chunks), "batch"):
            batch.images = batch.images.to(self.device)
            yield batch

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Within it, the model runs in the chosen dtype and without gradients."""
        low = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=low):
            yield


@dataclass
class Prediction:
    """The likeliest classes of an image, or why there are none.

    Args:
        path: image file.
        classes: (index, label, probability), the likeliest first.
        error: the reason if the image failed.
    """

    path: Path
    classes: list[tuple[int, str, float]] = field(default_factory=list)
    error: str = ""


def classify(
    runner: Runner, chunks: Sequence[Sequence[Path]], labels: Sequence[str], topk: int
) -> Iterator[Prediction]:
    """A prediction for each path, in order: the `topk` classes, or all if there are fewer."""
    for batch in runner.read(chunks):
        rows = iter(())
        if len(batch.images):
            with runner.precision():
                logits = runner.model(batch.images)
            best = logits.float().softmax(dim=-1).topk(min(topk, len(labels)))
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for path in batch.paths:
            if path in batch.errors:
                yield Prediction(path, error=batch.errors[path])
                continue
            indices, values = next(rows)
            if values[0] != values[0]:  # NaN
                yield Prediction(path, error="the model's output is not finite")
                continue
            classes = [(i, labels[i], p) for i, p in zip(indices, values, strict=True)]
            yield Prediction(path, classes)


def check_output(path: Path | None, suffixes: Sequence[str]) -> None:
    """Raise ValueError unless a file of one of the extensions can be written; make its folder."""
    if path is None:
        return
    if path.suffix not in suffixes:
        allowed = ", ".join(suffix or "no extension (a folder)" for suffix in suffixes)
        raise ValueError(f"the extension of {path} must be one of {allowed}")
    if path.is_dir() and path.suffix:
        raise ValueError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, moved into place if all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write JSON lines (one line an image) or CSV (one row a class), told by the extension.

    A JSON line is `{"file", "classes": [{"index", "label", "probability"}, ...]}`, or
    `{"file", "error"}`; the CSV has the columns file, rank, index, label, probability, error.
    """
    write = _write_jsonl if path.suffix == ".jsonl" else _write_csv
    with (
        atomic_write(path) as temporary,
        # File names whose bytes are no UTF-8 come out as the bytes they are.
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        write(predictions, file)


def _write_jsonl(predictions: Sequence[Prediction], file) -> None:
    for prediction in predictions:
        record: dict[str, Any] = {"file": str(prediction.path)}
        if prediction.error:
            record["error"] = prediction.error
        else:
            keys = ("index", "label", "probability")
            record["classes"] = [dict(zip(keys, row, strict=True)) for row in prediction.classes]
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_csv(predictions: Sequence[Prediction], file) -> None:
    writer = csv.writer(file)
    writer.writerow(("file", "rank", "index", "label", "probability", "error"))
    for prediction in predictions:
        if prediction.error:
            writer.writerow((prediction.path, "", "", "", "", prediction.error))
        for rank, row in enumerate(prediction.classes, start=1):
            writer.writerow((prediction.path, rank, *row, ""))
