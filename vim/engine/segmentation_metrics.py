"""Validation of a segmenter: a confusion matrix of pixels, and the numbers and files made of it."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from .drawing import overlay, palette
from .inference import atomic_write
from .metrics import markdown, names_of

__all__ = [
    "VOID",
    "PixelClassResult",
    "SegmentationMetric",
    "SegmentationReport",
    "overlay",
    "palette",
]

logger = logging.getLogger(__name__)

VOID = 255
"""In masks: pixels that neither train nor count."""


class PixelClassResult(NamedTuple):
    """How one class fared; shares in percent, None where there is no pixel to tell.

    Args:
        index: of the class.
        name: of the class.
        pixels: of the class.
        predicted: pixels, of whatever class, predicted to be of this one.
        correct: pixels of it that were predicted right.
        iou: correct over the union of pixels and predicted.
        accuracy: correct over pixels.
    """

    index: int
    name: str
    pixels: int
    predicted: int
    correct: int
    iou: float | None
    accuracy: float | None


class _Shown(NamedTuple):
    """An image (3, h, w), its prediction and its mask (H, W), all uint8, for an overlay."""

    image: Tensor
    prediction: Tensor
    target: Tensor


@dataclass
class SegmentationReport:
    """What a segmenter did on a data set.

    Args:
        confusion: (C, C) int64, pixels of a class (row) by the class that was predicted.
        images: how many.
        class_names: of the C classes.
        shown: for overlays.
        facts: what else the files should say.

    Raises:
        ValueError: no pixel that counts.
    """

    confusion: Tensor
    images: int
    class_names: Sequence[str]
    shown: Sequence[_Shown] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.confusion.sum():
            raise ValueError(
                f"{self.images} images were evaluated and no pixel counts: is the data's folder "
                "empty, or are all masks void?"
            )

    @cached_property
    def per_class(self) -> list[PixelClassResult]:
        """How each class fared, in the order of the classes."""
        correct, pixels = self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist()
        predicted = self.confusion.sum(0).tolist()
        return [
            PixelClassResult(i, name, n, m, k, _percent(k, n + m - k), _percent(k, n))
            for i, (name, n, m, k) in enumerate(
                zip(self.class_names, pixels, predicted, correct, strict=True)
            )
        ]

    def scalars(self) -> dict[str, float]:
        """Return the figures for a log, in percent.

        Returns:
            mIoU: mean intersection over union, of the classes that occur in masks or predictions.
            mean_class_accuracy: mean over the classes that occur in masks of the pixels right.
            pixel_accuracy: pixels right of all.
        """
        ious = [result.iou for result in self.per_class if result.iou is not None]
        accuracies = [result.accuracy for result in self.per_class if result.accuracy is not None]
        right = self.confusion.diagonal().sum().item()
        return {
            "mIoU": sum(ious) / len(ious),
            "mean_class_accuracy": sum(accuracies) / len(accuracies),
            "pixel_accuracy": 100 * right / self.confusion.sum().item(),
        }

    def table(self) -> str:
        """Return the figures, in total and by class, as Markdown."""
        facts = {key: value for key, value in self.facts.items() if not isinstance(value, dict)}
        rows = [[str(key), str(value)] for key, value in facts.items()]
        rows += [["images", f"{self.images:,}"], ["classes", f"{len(self.class_names):,}"]]
        names = {"mIoU": "mIoU", "mean_class_accuracy": "mean class accuracy"}
        names["pixel_accuracy"] = "pixel accuracy"
        rows += [[names[key], f"{value:.2f} %"] for key, value in self.scalars().items()]
        total = self.confusion.sum().item()
        classes = [
            [r.name, *map(_shown_percent, (_percent(r.pixels, total), r.iou, r.accuracy))]
            for r in self.per_class
        ]
        header = ["class", "share of pixels", "IoU", "accuracy"]
        return "\n".join([markdown(["evaluation", ""], rows), markdown(header, classes)])

    def write(self, folder: Path) -> None:
        """Write metrics.json, per_class.csv, confusion.csv, table.md and overlays/*.png.

        Args:
            folder: made if it isn't there; files of these names are replaced, each as a whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"images": self.images, "classes": len(self.class_names), **self.scalars()}
        with atomic_write(folder / "metrics.json") as path:
            text = json.dumps({**self.facts, **figures}, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", "utf-8")
        rows = [["" if value is None else value for value in row] for row in self.per_class]
        _write_csv(folder / "per_class.csv", [PixelClassResult._fields, *rows])
        matrix = zip(self.class_names, self.confusion.tolist(), strict=True)
        header = ["class, and pixels predicted as", *self.class_names]
        _write_csv(folder / "confusion.csv", [header, *([name, *row] for name, row in matrix)])
        with atomic_write(folder / "table.md") as path:
            path.write_text(self.table(), "utf-8")
        if self.shown:
            (folder / "overlays").mkdir(exist_ok=True)
        for number, shown in enumerate(self.shown):
            with atomic_write(folder / "overlays" / f"{number:04d}.png") as path:
                overlay(*shown, self.class_names).save(path, format="png")


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _shown_percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _write_csv(file: Path, rows: Sequence[Sequence[Any]]) -> None:
    with (
        atomic_write(file) as path,
        open(path, "w", encoding="utf-8", newline="") as stream,
    ):
        csv.writer(stream).writerows(rows)


@METRICS.register_module(name="VimSegmentationMetric")
class SegmentationMetric(BaseMetric):
    """The figures of `SegmentationReport.scalars` over all images of all processes.

    `process` takes what `VimSegmenter` predicts for a batch: a dict of predictions and targets
    (B, H, W), and of num_classes C. Pixels are counted where the tensors are. `evaluate` leaves the
    same report in `report` on every process, each with the overlays of its own images.

    Args:
        class_names: by default `dataset_meta["classes"]` if they are C, else "class 0", ...
        overlays: so many images are kept for overlays, the first of each process.
        prefix: set before the names of the figures, with a slash.

    Raises:
        ValueError: predictions, or targets but 255, that are none of the C classes.
    """

    default_prefix = ""

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        overlays: int = 8,
        prefix: str | None = None,
    ) -> None:
        super().__init__(prefix=prefix)
        self.class_names = class_names
        self.overlays = overlays
        self.report: SegmentationReport | None = None

    @torch.no_grad()
    def process(self, data_batch: Mapping[str, Any], data_samples: Mapping[str, Tensor]) -> None:
        # self.results is what the loops clear: [pixel counts, images, overlays], once it is begun.
        predictions, targets = data_samples["predictions"], data_samples["targets"]
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions must be of the size of the targets, got {tuple(predictions.shape)} "
                f"and {tuple(targets.shape)}"
            )
        if not self.results:
            self.results[:] = [0, 0, []]
        # One row and one column more, of whatever is no class; void is left out.
        classes = data_samples["num_classes"]
        valid = targets != VOID
        rows = targets[valid].long().clamp(max=classes)
        columns = predictions[valid].long().clamp(max=classes)
        counts = torch.bincount(rows * (classes + 1) + columns, minlength=(classes + 1) ** 2)
        self.results[0] = self.results[0] + counts.view(classes + 1, classes + 1)
        self.results[1] += len(targets)
        missing = max(0, self.overlays - len(self.results[2]))
        masks = (x[:missing].to("cpu", torch.uint8) for x in (predictions, targets))
        images = data_batch["images"][:missing].cpu()
        self.results[2] += [_Shown(*each) for each in zip(images, *masks, strict=True)]

    def compute_metrics(self, results: Sequence[Any]) -> dict[str, float]:
        counts, images, shown = results
        classes = len(counts) - 1
        for what, broken in (
            ("targets", counts[classes].sum().item()),
            ("predictions", counts[:classes, classes].sum().item()),
        ):
            if broken:
                raise ValueError(
                    f"{broken} pixels of the {what} are none of the {classes} classes: give the "
                    "num_classes of the data, and, if predictions are, look for outputs of the "
                    "model that are not finite (float16 overflows; evaluate in bfloat16 or float32)"
                )
        names = names_of(self, classes)
        self.report = SegmentationReport(counts[:classes, :classes], images, names, shown)
        return self.report.scalars()

    def evaluate(self, size: int) -> dict[str, float]:
        """Return the figures over what all processes have processed, and forget it.

        Args:
            size: images that there should be; another number is warned of.
        """
        # mmengine's own way writes pickles to a folder that all processes would have to share.
        counts, images, shown = self.results or (0, 0, [])
        self.results.clear()
        if images:
            counts = counts.cpu()
        parts = [part for part in all_gather_object((counts, images)) if part[1]]
        if not parts:
            raise ValueError("no image was evaluated: is the data's folder or split empty?")
        counts, images = sum(part[0] for part in parts), sum(part[1] for part in parts)
        figures = self.compute_metrics((counts, images, shown))
        if images != size:
            logger.warning("evaluated %d images of a dataset of %d", images, size)
        return {f"{self.prefix}/{k}" if self.prefix else k: v for k, v in figures.items()}
