"""Evaluate a classifier, a segmenter or a detector: in total, of each class, and what is confused.

It is that of a training config, with a checkpoint or the folder of its run; or any timm model, a
classifier, on a folder of images. Writes metrics.json, per_class.csv, confusions, table.md, and a
calibration diagram or overlays to a folder; the table goes to stdout. Exit code: 0 if all went
well, 2 for arguments that cannot be met.
"""

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from timm.data import ImageNetInfo

from vim.engine import checkpoints
from vim.engine.config import build_runner, load_config
from vim.engine.data import build_loader
from vim.engine.detection_metrics import DetectionMetric, DetectionReport
from vim.engine.inference import (
    DTYPES,
    ParseKwargs,
    build_model,
    class_names,
    positive_int,
    progress,
    resolve_data_config,
    select_device,
)
from vim.engine.metrics import ClassificationMetric, EvaluationReport, evaluate
from vim.engine.prediction import find_weights
from vim.engine.preprocessing import Preprocessor
from vim.engine.reporting import run_info
from vim.engine.segmentation_metrics import SegmentationMetric, SegmentationReport

logger = logging.getLogger("test")

_DATA = ("name", "root", "split", "annotations")
"""Keys of a data set's config that say which it is."""


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, help="of training, unless --model is given")
    parser.add_argument("--checkpoint", type=Path, help="weights, or the folder of a run")
    parser.add_argument("--work-dir", type=Path, help="folder to write to; beside the checkpoint")
    parser.add_argument("--cfg-options", nargs="*", default=[], metavar="K=V", help="of the config")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:INDEX")
    group = parser.add_argument_group("instead of a config")
    group.add_argument("--model", help="timm name, hf-hub:REPO or local-dir:DIR")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V")
    group.add_argument("--pretrained", action="store_true", help="load the published weights")
    group.add_argument("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    group.add_argument("--data", type=Path, help="folder or tar of class folders")
    group.add_argument("--split", default="validation", help="subfolder of the data, if there")
    group.add_argument("--class-map", type=Path, help="the model's class folders in order, a line")
    group.add_argument("--labels", type=Path, help="class names, one a line or as JSON")
    group.add_argument("--batch-size", type=positive_int, default=64)
    workers = min(8, os.cpu_count() or 1)
    group.add_argument("--workers", type=int, default=workers, help="reading processes")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation")
    arguments = parser.parse_args(argv)
    if (arguments.config is None) == (arguments.model is None):
        parser.error("give either CONFIG or --model NAME --data ROOT")
    if arguments.model is not None and arguments.data is None:
        parser.error("--model needs --data: a folder or tar of class folders")
    if arguments.model is not None and arguments.cfg_options:
        parser.error("--cfg-options are of a CONFIG")
    return parser, arguments


def of_config(
    args: argparse.Namespace, checkpoint: Path | None, folder: Path
) -> EvaluationReport | SegmentationReport | DetectionReport | None:
    """Return the report on the config's test data, or, where it has none, its validation data.

    Of a detector only the first process has it; elsewhere it is None.
    """
    config = load_config(args.config, args.cfg_options, work_dir=folder)
    for key in ("dataloader", "evaluator"):
        config.setdefault(f"test_{key}", config.get(f"val_{key}"))
    if not config.get("test_dataloader") or not config.get("test_evaluator"):
        raise ValueError(f"{args.config} has neither test_ nor val_ dataloader and evaluator")
    config.setdefault("test_cfg", {**(config.get("val_cfg") or {}), "type": "VimTestLoop"})
    config.load_from, config.resume = checkpoint and str(checkpoint), False
    config.log_level = "WARNING"
    if args.device != "auto":
        config.device = str(select_device(args.device))
    if checkpoint is None:
        logger.warning("the weights are those that training would start from: give --checkpoint")
    runner = build_runner(config)
    loader, metrics = runner.test_dataloader, runner.test_loop.evaluator.metrics
    known = (ClassificationMetric, SegmentationMetric, DetectionMetric)
    metric = next((m for m in metrics if isinstance(m, known)), None)
    if metric is None:
        raise ValueError(
            f"{args.config}: the evaluator must have a VimClassificationMetric, "
            "VimSegmentationMetric or VimDetectionMetric"
        )
    metric.dataset_meta = {"classes": described(getattr(loader.dataset, "class_names", None))}
    if isinstance(metric, DetectionMetric):
        metric.dataset_meta["category_ids"] = [c["id"] for c in loader.dataset.categories]
        metric.dataset_meta["faults"] = loader.dataset.faults
    runner.test()
    if metric.report is None:
        return None
    dataset = config.test_dataloader.dataset
    metric.report.facts = {
        "config": str(args.config),
        "model": config.model.backbone.name,
        "data": " ".join(str(dataset[k]) for k in _DATA if dataset.get(k)),
        "dtype": config.test_cfg.get("dtype", "float32"),
    }
    return metric.report


def of_model(args: argparse.Namespace, checkpoint: Path | None) -> EvaluationReport:
    """Return the report on a timm model over a folder of images."""
    device, dtype = select_device(args.device), DTYPES[args.dtype]
    model = build_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=checkpoint,
        use_ema=args.use_ema,
        model_kwargs=args.model_kwargs,
    ).to(device)
    data = resolve_data_config(model)
    dataset = {"root": str(args.data), "split": args.split}
    if args.class_map:
        dataset["class_map"] = str(args.class_map)
    loader = build_loader(
        {
            "dataset": dataset,
            "batch_size": args.batch_size,
            "num_workers": args.workers,
            "input_size": tuple(data["input_size"][1:]),
            "crop_pct": data["crop_pct"],
            "mean": data["mean"],
            "std": data["std"],
            "augmentation": {k: data[k] for k in ("interpolation", "crop_mode")},
        },
        is_training=False,
    )
    prepare = Preprocessor(mean=data["mean"], std=data["std"]).to(device)
    names = class_names(model, args.labels)
    found = described(loader.dataset.class_names)
    if args.labels is None and found and len(found) == len(names):
        names = found

    def predict(batch):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(prepare(batch)["images"])

    report = evaluate(predict, progress(loader, len(loader), "batch"), ClassificationMetric(names))
    report.facts = {
        "model": args.model,
        "data": f"{args.data} {args.split}",
        "input size": "x".join(map(str, data["input_size"][1:])),
        "dtype": args.dtype,
    }
    return report


def described(names: Sequence[str] | None) -> Sequence[str] | None:
    """Return the names with WordNet's synsets, by which ImageNet's folders are called, in words."""
    if not names or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    return [ImageNetInfo().label_name_to_description(name) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, args = parse_args(argv)
    start = time.perf_counter()
    try:
        checkpoint = find_weights(args.checkpoint)
        default = checkpoint.parent / "test" if checkpoint else Path("runs", "test")
        folder = args.work_dir or default
        report = of_model(args, checkpoint) if args.model else of_config(args, checkpoint, folder)
    except (ValueError, OSError, checkpoints.CheckpointError) as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    device = select_device(args.device)
    weights = str(checkpoint) if checkpoint else "published" if args.pretrained else "none"
    if is_main_process():
        report.facts = {**report.facts, "weights": weights, "run": run_info(device)}
        report.write(folder)
        sys.stdout.write(report.table())
        logger.info("%.1f s; the report is in %s", seconds, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
