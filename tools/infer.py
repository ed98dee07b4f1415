"""Classify images with a timm model, or segment them or find objects with a trained one.

    python tools/infer.py PATH ... --model NAME --checkpoint FILE
    python tools/infer.py PATH ... --checkpoint RUN [--config CONFIG]

A PATH is an image, a video, a folder of such, or a glob pattern. Of a classifier, the likeliest
classes go to stdout as a table, and on request to JSON lines, CSV or a contact sheet. Without
--model, the config of the run that the checkpoint is from says what the model is; a segmenter
writes masks, a detector COCO's JSON, and both overlays, to a folder. Exit code: 0 if all went well,
1 if some images failed, 2 for arguments that cannot be met.
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vim.engine.images import SheetEntry, contact_sheet, find_images, printable
from vim.engine.inference import (
    DTYPES,
    Prediction,
    Runner,
    add_arguments,
    atomic_write,
    check_output,
    chunks_of,
    class_names,
    classify,
    positive_int,
    progress,
    read_labels,
    select_device,
    write_predictions,
)
from vim.engine.video import VIDEO_EXTENSIONS, is_video, opencv, read_video

if TYPE_CHECKING:
    from mmengine.config import Config

logger = logging.getLogger("infer")

SHEET_LIMIT = 60
OF_MODEL = ("model_kwargs", "pretrained", "use_ema")
OF_CLASSIFIER = ("output", "save_plot")
OF_RUN = ("config", "cfg_options")
OF_DENSE = ("work_dir", "fps")


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, needs_model=False)
    parser.add_argument("--labels", type=Path, help="class names, one a line or as JSON")
    group = parser.add_argument_group("of a classifier")
    group.add_argument("--topk", type=positive_int, default=5, help="classes shown for an image")
    group.add_argument("--output", type=Path, help="write FILE.jsonl or FILE.csv")
    group.add_argument("--save-plot", type=Path, help="write a contact sheet, FILE.png")
    group = parser.add_argument_group("instead of --model: of a training run")
    group.add_argument(
        "--config", type=Path, help="of its training; the checkpoint's own if left out"
    )
    group.add_argument("--cfg-options", nargs="*", default=[], metavar="K=V", help="of the config")
    group = parser.add_argument_group("of a segmenter or detector")
    group.add_argument("--work-dir", type=Path, help="folder to write to; beside the checkpoint")
    group.add_argument(
        "--fps", type=float, help="make a video of all overlays, of so many a second"
    )
    args = parser.parse_args(argv)
    if args.model is None and args.config is None and args.checkpoint is None:
        parser.error(
            "one of these is required: --model NAME; or --checkpoint of a training run, perhaps "
            "with its --config"
        )
    _refuse(parser, args, args.model is None, OF_MODEL, "goes with --model")
    _refuse(parser, args, args.model is not None, OF_RUN, "is of a training run: leave --model out")
    if args.fps is not None and not 0 < args.fps < 1000:
        parser.error(f"--fps must be above 0 and below 1000, got {args.fps:g}")
    return parser, args


def _refuse(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    when: bool,
    names: Sequence[str],
    why: str,
) -> None:
    """End with an error if one of the arguments is given where it has no effect."""
    for name in names:
        if when and getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} {why}")


def find_files(arguments: Sequence[str]) -> list[Path]:
    """Images and videos, as `find_images` finds them."""
    paths = find_images(arguments, VIDEO_EXTENSIONS)
    if any(map(is_video, paths)):
        opencv()
    return paths


def table(predictions: Sequence[Prediction]) -> str:
    """One line a class: the file name on the first, the probability, the label."""
    names = [printable(prediction.path) for prediction in predictions]
    width = max(map(len, names))
    lines = []
    for name, prediction in zip(names, predictions, strict=True):
        rows = [f"{probability:6.1%}  {label}" for _, label, probability in prediction.classes]
        for row in rows or ["failed"]:
            lines.append(f"{name:<{width}}  {row}\n")
            name = ""
    return "".join(lines)


def frames_of(predictions: Sequence[Prediction]) -> dict[Path, Image.Image]:
    """The frames of videos among the predictions' files."""
    wanted = {each.path for each in predictions if is_video(each.path.parent)}
    found = {}
    for video in {path.parent for path in wanted}:
        found |= {name: image for name, image in read_video(video) if name in wanted}
    return found


def save_sheet(predictions: Sequence[Prediction], path: Path) -> None:
    if len(predictions) > SHEET_LIMIT:
        logger.info("%s shows the first %d of %d images", path, SHEET_LIMIT, len(predictions))
    predictions = predictions[:SHEET_LIMIT]
    frames = frames_of(predictions)
    entries = [
        SheetEntry(
            each.path,
            [(label, value) for _, label, value in each.classes],
            each.error,
            frames.get(each.path),
        )
        for each in predictions
    ]
    with atomic_write(path) as temporary:
        contact_sheet(entries).save(temporary, "PNG")


def config_of(args: argparse.Namespace) -> "Config":
    """The config of the run that the checkpoint is from."""
    from vim.engine.config import apply_options, load_config, parse_options
    from vim.engine.prediction import config_of_run

    if args.config is not None:
        return load_config(args.config, args.cfg_options)
    config = config_of_run(args.checkpoint)
    import vim.engine.training  # noqa: F401  registers what it names

    apply_options(config, parse_options(args.cfg_options))
    return config


def classifier_of(args: argparse.Namespace, config: "Config") -> Runner:
    """The classifier of a training run, with the run's preprocessing."""
    from vim.engine.prediction import find_weights

    options = dict(config.model.backbone)
    args.model, args.use_ema = options.pop("name"), False
    for key in ("checkpoint", "use_ema", "grad_checkpointing", "pretrained"):
        options.pop(key, None)
    args.model_kwargs, args.pretrained = options, False
    args.checkpoint = find_weights(args.checkpoint)
    runner = Runner(args)
    preprocessor = config.model.get("data_preprocessor") or {}
    loader = config.get("test_dataloader") or config.get("val_dataloader") or {}
    for key, source in (("mean", preprocessor), ("std", preprocessor), ("crop_pct", loader)):
        if source.get(key) is not None:
            runner.data_config[key] = source[key]
    size = loader.get("input_size")
    if size:
        runner.data_config["input_size"] = (3, *((size, size) if isinstance(size, int) else size))
    return runner


def classify_files(args: argparse.Namespace, config: "Config | None") -> Iterator[tuple[Path, str]]:
    """Yield the path and the error, "" for none, of each image; print and write at the end.

    What cannot be met raises a ValueError or OSError before the first.
    """
    check_output(args.output, (".jsonl", ".csv"))
    check_output(args.save_plot, (".png",))
    paths = find_files(args.images)
    runner = Runner(args) if config is None else classifier_of(args, config)
    labels = class_names(runner.model, args.labels)

    def results() -> Iterator[tuple[Path, str]]:
        chunks = chunks_of(paths, args.batch_size)
        predictions = []
        for each in classify(runner, chunks, labels, args.topk):
            predictions.append(each)
            yield each.path, each.error
        sys.stdout.write(table(predictions))
        if args.output:
            write_predictions(predictions, args.output)
        if args.save_plot:
            save_sheet(predictions, args.save_plot)

    return results()


def predict_files(args: argparse.Namespace, config: "Config") -> Iterator[tuple[Path, str]]:
    """As `classify_files`, of a segmenter or detector."""
    from vim.engine.prediction import (
        Predictor,
        ResultWriter,
        class_names_of,
        find_weights,
        read_frames,
        summary,
    )

    weights = find_weights(args.checkpoint)
    if weights is None:
        raise ValueError("a segmenter or detector needs weights: give --checkpoint")
    paths = find_files(args.images)
    device, dtype = select_device(args.device), DTYPES[args.dtype]
    predict = Predictor(config, weights, device=device, dtype=dtype)
    names, ids = class_names_of(config, predict.num_classes)
    if args.labels is not None:
        names = read_labels(args.labels)
        if len(names) != predict.num_classes:
            raise ValueError(
                f"{args.labels} must name {predict.num_classes} classes, got {len(names)}"
            )
    folder = args.work_dir or weights.parent / "infer"
    writer = ResultWriter(folder, names, ids, paths, fps=args.fps)

    def results() -> Iterator[tuple[Path, str]]:
        with writer:
            for frame in progress(read_frames(paths, args.workers), None, "image"):
                result = predict(frame)
                if not result.error:
                    writer.add(result)
                    sys.stdout.write(f"{printable(frame.path)}  {summary(result, names)}\n")
                yield frame.path, result.error
        logger.info("masks, predictions and overlays are in %s", folder)

    return results()


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, args = parse_args(argv)
    try:
        config = None if args.model is not None else config_of(args)
        classifies = config is None or config.model.type == "VimClassifier"
        _refuse(parser, args, classifies, OF_DENSE, "is for a segmenter or detector")
        _refuse(parser, args, not classifies, OF_CLASSIFIER, "is for a classifier: see --work-dir")
        results = classify_files(args, config) if classifies else predict_files(args, config)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))

    start, count, failed = time.perf_counter(), 0, []
    for path, error in results:
        count += 1
        failed += [(path, error)] if error else []
    seconds = time.perf_counter() - start
    for path, error in failed:
        logger.error("failed: %s: %s", printable(path), error)
    rate = count / seconds
    logger.info("%d images, %d failed, %.1f s, %.1f images/s", count, len(failed), seconds, rate)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
