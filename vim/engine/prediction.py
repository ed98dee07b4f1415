"""Segmenting images and finding objects in them, by a training run's config and weights."""

import ast
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from torch import Tensor

from . import checkpoints
from .data import loader_builder
from .detection import VimDetector
from .detection_metrics import SHOWN_SCORE, binary_masks, detections_of
from .drawing import draw_objects, overlay, palette, with_legend
from .images import ImageReadError, read_image
from .inference import READ_AHEAD, atomic_write
from .runner import read_weights
from .segmentation import VimSegmenter
from .segmentation_metrics import VOID
from .video import VideoWriter, frames_per_second, is_video, read_video

__all__ = [
    "Frame",
    "Predictor",
    "Result",
    "ResultWriter",
    "class_names_of",
    "config_of_run",
    "find_weights",
    "read_frames",
    "summary",
]

logger = logging.getLogger(__name__)

VIDEO_LEGEND = 30
"""Classes up to which a video has a legend."""


def find_weights(path: Path | None) -> Path | None:
    """Return the file that is meant: of a run's folder its final weights, else its newest state.

    Raises:
        ValueError: there is none.
    """
    if path is None or path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist")
    final = path / "weights.safetensors"
    found = final if final.is_file() else checkpoints.latest(path)
    if found is None:
        raise ValueError(f"{path} has neither weights.safetensors nor a checkpoint iter_*.pth")
    logger.info("weights: %s", found)
    return found


def config_of_run(path: Path) -> Config:
    """Return the config that a run was trained with; no code in it is run.

    Args:
        path: the run's folder, or a file in it.

    Raises:
        ValueError: there is none.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "config.py").is_file():
        text = (folder / "config.py").read_text("utf-8")
    else:
        file = checkpoints.latest(path) if path.is_dir() else path
        text = ""
        if file is not None and file.suffix == ".pth":
            text = checkpoints.load(file, mmap=True).get("config", "")
    if not text:
        raise ValueError(
            f"{path} says nothing of the model: give the config that it was trained with "
            "(--config), or the folder of its run, which has a config.py"
        )
    try:
        return Config(_literals(text))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the config of {folder} cannot be read: {error}") from error


def _literals(text: str) -> dict[str, Any]:
    """The assignments of a config as mmengine writes it out: literals and calls of `dict`."""

    def value(node: ast.expr) -> Any:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "dict"
        ):
            return {k.arg: value(k.value) for k in node.keywords if k.arg is not None}
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [value(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.Dict):
            return {value(k): value(v) for k, v in zip(node.keys, node.values, strict=True)}
        return ast.literal_eval(node)

    return {
        node.targets[0].id: value(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def class_names_of(config: Config, count: int) -> tuple[list[str], list[int]]:
    """Return the names and the ids of the classes that a config's data have.

    Where the data are not here, "class 0", "class 1", ... and 1, 2, ...
    """
    for key in ("test_dataloader", "val_dataloader"):
        loader = config.get(key)
        if not loader:
            continue
        try:
            dataset = loader_builder(loader)(
                {**loader, "num_workers": 0}, is_training=False
            ).dataset
        except (ValueError, OSError) as error:
            logger.info("the classes' names are not known, for the data cannot be read: %s", error)
            break
        names = list(dataset.class_names or ())
        if len(names) == count:
            categories = getattr(dataset, "categories", ())
            return names, [c["id"] for c in categories] or list(range(1, count + 1))
    return [f"class {index}" for index in range(count)], list(range(1, count + 1))


@dataclass
class Frame:
    """An image of a file, or a frame of a video.

    Args:
        path: of the file; of a frame the video's with the frame's number below it.
        image: in RGB; None where it could not be read.
        video: the file, of a frame.
        error: why it could not be read.
    """

    path: Path
    image: Image.Image | None = None
    video: Path | None = None
    error: str = ""


def read_frames(paths: Sequence[Path], workers: int = 4) -> Iterator[Frame]:
    """Yield the images of files and the frames of videos, in order, images read ahead."""
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for path in paths:
            if is_video(path):
                while pending:
                    yield pending.popleft().result()
                yield from _video_frames(path)
                continue
            pending.append(pool.submit(_image_frame, path))
            if len(pending) > READ_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _image_frame(path: Path) -> Frame:
    try:
        return Frame(path, read_image(path))
    except ImageReadError as error:
        return Frame(path, error=error.reason)


def _video_frames(path: Path) -> Iterator[Frame]:
    try:
        for name, image in read_video(path):
            yield Frame(name, image, video=path)
    except ImageReadError as error:
        yield Frame(path, error=error.reason)


@dataclass
class Result:
    """What was found in a frame.

    Args:
        frame: it.
        classes: (H, W) uint8 of a segmenter, 255 where its output is not finite.
        objects: of a detector, on the CPU: boxes (N, 4), labels (N,) from 1, scores (N,) and
            perhaps masks (N, H, W) bool.
        error: why nothing could be found.
    """

    frame: Frame
    classes: Tensor | None = None
    objects: dict[str, Tensor] | None = None
    error: str = ""


class Predictor:
    """A segmenter or detector with its preprocessing, device and precision.

    Args:
        config: of its training.
        weights: file of its weights; of a training checkpoint the averaged ones, if it has such.
        device: where it runs.
        dtype: of autocast; float32 for none.

    Raises:
        ValueError: a config of another model, or weights that do not fit it.
    """

    def __init__(
        self,
        config: Config,
        weights: Path,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = Config(config.to_dict())
        config.model.backbone.update(checkpoint=None)
        config.model.backbone.pop("pretrained", None)
        model = MODELS.build(config.model)
        if not isinstance(model, (VimSegmenter, VimDetector)):
            raise ValueError(f"{type(model).__name__} neither segments nor detects")
        tensors = read_weights(weights)
        whole = any(name.startswith("backbone.") for name in tensors)
        try:
            (model if whole else model.backbone).load_state_dict(tensors)
        except RuntimeError as error:
            first = str(error).splitlines()[:2]
            raise ValueError(f"{weights} does not fit the config: {' '.join(first)}") from error
        self.model = model.eval().to(device)
        self.device, self.dtype = device, dtype
        self.segments = isinstance(model, VimSegmenter)
        self.num_classes = model.backbone.num_classes
        loader = config.get("test_dataloader") or config.get("val_dataloader") or {}
        self.short_side = loader.get("short_side") if self.segments else None

    def __call__(self, frame: Frame) -> Result:
        """Return what is in a frame."""
        if frame.image is None:
            return Result(frame, error=frame.error)
        pixels = torch.from_numpy(np.array(frame.image)).permute(2, 0, 1).contiguous()
        low = self.dtype != torch.float32
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=low):
                return (
                    self._segment(frame, pixels) if self.segments else self._detect(frame, pixels)
                )
        except (ValueError, torch.OutOfMemoryError) as error:
            return Result(frame, error=str(error))

    def _segment(self, frame: Frame, pixels: Tensor) -> Result:
        size = pixels.shape[1:]
        if self.short_side is not None:
            from vim.heads.segmentation_transforms import EvaluationTransform

            empty = np.zeros(tuple(size), dtype=np.uint8)
            pixels, _ = EvaluationTransform(self.short_side)(frame.image, empty)
        data = {"images": pixels[None], "targets": torch.zeros(1, *size, dtype=torch.uint8)}
        output = self.model(**self.model.data_preprocessor(data), mode="predict")
        classes = output["predictions"][0].to("cpu", torch.uint8)
        if (classes == VOID).all():
            return Result(frame, error="the model's output is not finite")
        return Result(frame, classes=classes)

    def _detect(self, frame: Frame, pixels: Tensor) -> Result:
        data = self.model.data_preprocessor({"images": [pixels]})
        (found,) = self.model(data["images"])
        if "masks" in found:
            found["masks"] = binary_masks(found["masks"])
        return Result(frame, objects={name: value.cpu() for name, value in found.items()})


@dataclass
class ResultWriter:
    """Writes what was found to a folder, laid out as the files were; one writer for a run.

    masks/NAME.png of a segmenter: the class of each pixel, with a palette. predictions.json of a
    detector: COCO's format, images, categories and annotations, the latter with `score`.
    overlays/NAME.png: the image with what was found, and a legend; of a video overlays/NAME.mp4.
    classes.json: the names.

    Args:
        folder: made if it isn't there.
        class_names, category_ids: of the classes.
        paths: all files that there will be, by which names below `folder` are made.
        overlays: whether to draw.
        fps: frames a second of a video that all images make, overlays.mp4; None for no such video.
    """

    folder: Path
    class_names: Sequence[str]
    category_ids: Sequence[int]
    paths: Sequence[Path]
    overlays: bool = True
    fps: float | None = None
    _images: list[dict[str, Any]] = field(default_factory=list)
    _annotations: list[dict[str, Any]] = field(default_factory=list)
    _video: tuple[Path, VideoWriter] | None = None
    _joined: VideoWriter | None = None

    def __post_init__(self) -> None:
        absolute = [os.path.abspath(path) for path in self.paths]
        self._root = os.path.commonpath([os.path.dirname(path) for path in absolute])
        stems = [os.path.splitext(path)[0] for path in absolute]
        # a.jpg and a.png would both be a.png.
        self._twins = {stem for stem, count in Counter(stems).items() if count > 1}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_json("classes.json", list(self.class_names))
        if self.fps is not None and self.overlays:
            self._joined = VideoWriter(self.folder / "overlays.mp4", self.fps)

    def name_of(self, frame: Frame) -> Path:
        """The name below `folder`, without extension."""
        path = os.path.abspath(frame.path)
        stem = path if frame.video else os.path.splitext(path)[0]
        return Path(os.path.relpath(path if stem in self._twins else stem, self._root))

    def add(self, result: Result) -> None:
        """Write what was found in a frame."""
        name = self.name_of(result.frame)
        if result.classes is not None:
            self._save(self._mask(result.classes), self.folder / "masks" / f"{name}.png")
        if result.objects is not None:
            self._add_objects(result)
        if self.overlays:
            self._add_overlay(result, name)

    def _mask(self, classes: Tensor) -> Image.Image:
        image = Image.fromarray(classes.numpy())
        image.putpalette(palette(len(self.class_names)).flatten().tolist())
        return image

    def _add_objects(self, result: Result) -> None:
        frame, number = result.frame, len(self._images) + 1
        name = os.path.relpath(os.path.abspath(frame.path), self._root)
        size = {"width": frame.image.width, "height": frame.image.height}
        self._images.append({"id": number, "file_name": name, **size})
        for each in detections_of(result.objects, number):
            label, box = each.pop("label"), each["bbox"]
            each |= {"id": len(self._annotations) + 1, "category_id": self.category_ids[label - 1]}
            self._annotations.append({**each, "area": round(box[2] * box[3], 2), "iscrowd": 0})

    def _add_overlay(self, result: Result, name: Path) -> None:
        frame = result.frame
        pixels = torch.from_numpy(np.array(frame.image)).permute(2, 0, 1)
        # All frames of a video have one legend, so that they have one size.
        moving = frame.video is not None or self._joined is not None
        classes = len(self.class_names)
        legend = list(range(classes if classes <= VIDEO_LEGEND else 0)) if moving else None
        if result.classes is not None:
            page = overlay(pixels, result.classes, None, self.class_names, legend)
        else:
            shown = result.objects["scores"] >= SHOWN_SCORE
            objects = {key: value[shown] for key, value in result.objects.items()}
            drawn = draw_objects(pixels, class_names=self.class_names, **objects)
            present = (objects["labels"].unique() - 1).tolist()
            page = with_legend([drawn], present if legend is None else legend, self.class_names)
        if self._joined is not None:
            self._joined.add(page)
        if frame.video is None:
            self._save(page, self.folder / "overlays" / f"{name}.png")
            return
        if self._video is None or self._video[0] != frame.video:
            self._end_video()
            path = self.folder / "overlays" / name.parent
            path = path if path.suffix == ".mp4" else path.with_name(f"{path.name}.mp4")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._video = frame.video, VideoWriter(path, frames_per_second(frame.video))
        self._video[1].add(page)

    def _end_video(self, kind: type | None = None) -> None:
        if self._video is not None:
            self._video[1].__exit__(kind)
            self._video = None

    def _save(self, image: Image.Image, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            image.save(temporary, "PNG")

    def _write_json(self, name: str, value: Any) -> None:
        with atomic_write(self.folder / name) as path:
            path.write_text(json.dumps(value, ensure_ascii=False) + "\n", "utf-8")

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._end_video(kind)
        if self._joined is not None:
            self._joined.__exit__(kind)
        if kind is None and self._images:
            categories = [
                {"id": i, "name": n}
                for i, n in zip(self.category_ids, self.class_names, strict=True)
            ]
            found = {"images": self._images, "categories": categories}
            self._write_json("predictions.json", {**found, "annotations": self._annotations})


def summary(result: Result, class_names: Sequence[str]) -> str:
    """Return what was found in a few words: shares of classes, or objects and their best scores."""
    if result.classes is not None:
        counts = torch.bincount(result.classes.flatten().long(), minlength=len(class_names))
        shares = counts[: len(class_names)] / result.classes.numel()
        best = shares.argsort(descending=True)[:5].tolist()
        return ", ".join(f"{class_names[i]} {shares[i]:.1%}" for i in best if shares[i] > 0)
    found: dict[int, list[float]] = {}
    labels, scores = (result.objects[key].tolist() for key in ("labels", "scores"))
    for label, score in zip(labels, scores, strict=True):
        if score >= SHOWN_SCORE:
            found.setdefault(label, []).append(score)
    parts = [f"{len(each)} {class_names[i - 1]} ({max(each):.2f})" for i, each in found.items()]
    return ", ".join(parts) or "nothing"
