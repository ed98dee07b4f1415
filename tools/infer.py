"""Classify images with a timm model.

The likeliest classes go to stdout as a table, and on request to JSON lines, CSV or a contact sheet.
Exit code: 0 if all went well, 1 if some images failed, 2 for arguments that cannot be met.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vim.engine.images import SheetEntry, contact_sheet, find_images, printable
from vim.engine.inference import (
    Prediction,
    Runner,
    add_arguments,
    atomic_write,
    check_output,
    chunk,
    class_names,
    classify,
    positive_int,
    write_predictions,
)

logger = logging.getLogger("infer")

SHEET_LIMIT = 60


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--labels", type=Path, help="class names, one a line or as JSON")
    parser.add_argument("--topk", type=positive_int, default=5, help="classes shown for an image")
    parser.add_argument("--output", type=Path, help="write FILE.jsonl or FILE.csv")
    parser.add_argument("--save-plot", type=Path, help="write a contact sheet, FILE.png")
    return parser, parser.parse_args(argv)


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


def save_sheet(predictions: Sequence[Prediction], path: Path) -> None:
    if len(predictions) > SHEET_LIMIT:
        logger.info("%s shows the first %d of %d images", path, SHEET_LIMIT, len(predictions))
    entries = [
        SheetEntry(each.path, [(label, value) for _, label, value in each.classes], each.error)
        for each in predictions[:SHEET_LIMIT]
    ]
    with atomic_write(path) as temporary:
        contact_sheet(entries).save(temporary, "PNG")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, args = parse_args(argv)
    try:
        check_output(args.output, (".jsonl", ".csv"))
        check_output(args.save_plot, (".png",))
        paths = find_images(args.images)
        runner = Runner(args)
        labels = class_names(runner.model, args.labels)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    start = time.perf_counter()
    predictions = list(classify(runner, chunk(paths, args.batch_size), labels, args.topk))
    seconds = time.perf_counter() - start

    sys.stdout.write(table(predictions))
    if args.output:
        write_predictions(predictions, args.output)
    if args.save_plot:
        save_sheet(predictions, args.save_plot)
    failed = [prediction for prediction in predictions if prediction.error]
    for prediction in failed:
        logger.error("failed: %s: %s", printable(prediction.path), prediction.error)
    count = len(predictions)
    rate = count / seconds
    logger.info("%d images, %d failed, %.1f s, %.1f images/s", count, len(failed), seconds, rate)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
