"""Validation of a classifier: what is kept of each image, and the numbers and files made of it."""

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
)

from .inference import atomic_write
from .plots import calibration_figure, confusion_figure

__all__ = ["CalibrationBin", "ClassResult", "ClassificationMetric", "EvaluationReport", "evaluate"]

logger = logging.getLogger(__name__)

TOP = 5
CALIBRATION_BINS = 15
WORST = 10
"""Classes and confusions that table.md shows."""
CELLS = 200
"""Most cells a side of confusion.png; of more classes, neighbours share a cell."""


class ClassResult(NamedTuple):
    """How one class fared.

    Args:
        index: of the class.
        name: of the class.
        images: of the class.
        correct: of them, those predicted right.
        predicted: images, of whatever class, predicted to be of this one.
        mistaken_for: name of the class that most of its images were mistaken for, "" for none.
        mistakes: how many were mistaken for that.
    """

    index: int
    name: str
    images: int
    correct: int
    predicted: int
    mistaken_for: str
    mistakes: int

    @property
    def accuracy(self) -> float | None:
        """Percent of its images predicted right; None where there are none."""
        return 100 * self.correct / self.images if self.images else None


class CalibrationBin(NamedTuple):
    """The images whose confidence is between two bounds.

    Args:
        low: lowest confidence in the bin.
        high: highest.
        images: in the bin.
        confidence: their mean confidence, 0 where there are none.
        accuracy: share of them predicted right, 0 where there are none.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


class Confusion(NamedTuple):
    """How many images of one class were predicted to be of another."""

    target: int
    prediction: int
    images: int


@dataclass
class EvaluationReport:
    """What a classifier predicted for N images of C classes, and the figures that follow.

    Args:
        top: (N, K) int64, the K = min(5, C) likeliest classes, the likeliest first.
        confidence: (N,) float32, probability of the likeliest, 0 to 1.
        targets: (N,) int64, classes that are right.
        losses: (N,) float32, cross-entropy of each image, in nats.
        class_names: C names.
        facts: what the figures depend on (model, weights, data, device, ...), for metrics.json and
            the table.

    Raises:
        ValueError: no image, a target that is no class, or outputs that are not finite.
    """

    top: Tensor
    confidence: Tensor
    targets: Tensor
    losses: Tensor
    class_names: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        if not len(self.targets):
            raise ValueError("no image was evaluated: is the data's folder or split empty?")
        if self.targets.min() < 0 or self.targets.max() >= classes:
            raise ValueError(
                f"targets must be classes 0 to {classes - 1} of the model, got "
                f"{self.targets.min()} to {self.targets.max()}: give num_classes of the data, or "
                f"a class_map that leads to the model's classes"
            )
        broken = len(self.losses) - int(self.losses.isfinite().sum())
        if broken:
            raise ValueError(
                f"the model's outputs for {broken} of {len(self.losses)} images are not finite: "
                f"the weights are broken, or float16 overflows (evaluate in bfloat16 or float32)"
            )

    @property
    def predictions(self) -> Tensor:
        """(N,) int64, the likeliest class of each image."""
        return self.top[:, 0]

    @cached_property
    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) images of each class, those predicted right, and predictions of it."""
        right = self.targets[self.predictions == self.targets]
        classes = len(self.class_names)
        return tuple(
            torch.bincount(x, minlength=classes) for x in (self.targets, right, self.predictions)
        )

    def scalars(self) -> dict[str, float]:
        """Return the figures for a log.

        Returns:
            top1, top5: percent of images whose class is the likeliest, or among the five likeliest.
            mean_class_accuracy: mean over the classes that have images of their percent right.
            loss: mean cross-entropy in nats.
            ece: expected calibration error over 15 bins in percent: the mean distance between
                confidence and accuracy (Guo et al. 2017, arXiv:1706.04599, eq. 3).
        """
        images, correct, _ = self._counts
        per_class = correct[images > 0].double() / images[images > 0]
        right = self.predictions == self.targets
        error = binary_calibration_error(self._confidence, right.long(), n_bins=CALIBRATION_BINS)
        return {
            "top1": 100 * right.double().mean().item(),
            "top5": 100 * (self.top == self.targets[:, None]).any(1).double().mean().item(),
            "mean_class_accuracy": 100 * per_class.mean().item(),
            "loss": self.losses.double().mean().item(),
            "ece": 100 * error.item(),
        }

    @property
    def _confidence(self) -> Tensor:
        # torchmetrics gives a confidence of exactly 1 a bin of its own beyond the last.
        return self.confidence.double().clamp(max=1 - 2**-30)

    def calibration(self) -> list[CalibrationBin]:
        """Return the bins of equal width that the calibration error is a sum over."""
        bounds = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
        bins = torch.bucketize(self._confidence, bounds, right=True) - 1
        right = (self.predictions == self.targets).double()
        images = torch.bincount(bins, minlength=CALIBRATION_BINS)
        confidence, accuracy = (
            torch.bincount(bins, x, CALIBRATION_BINS) / images.clamp(min=1)
            for x in (self._confidence, right)
        )
        columns = (bounds[:-1], bounds[1:], images, confidence, accuracy)
        return [CalibrationBin(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]

    @cached_property
    def confusions(self) -> list[Confusion]:
        """Pairs of classes that were confused, the most frequent first."""
        wrong = self.predictions != self.targets
        pairs = torch.stack([self.targets[wrong], self.predictions[wrong]], 1)
        pairs, counts = pairs.unique(dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        rows = torch.cat([pairs, counts[:, None]], 1)[order].tolist()
        return [Confusion(*row) for row in rows]

    def confusion_matrix(self, most: int | None = None) -> Tensor:
        """Return (G, G) int64 how many images of a class (row) were predicted to be another's.

        Args:
            most: largest G allowed. With more classes, ceil(C / most) neighbours make a group, and
                rows and columns are groups; None gives a row a class.
        """
        classes = len(self.class_names)
        group = 1 if most is None else math.ceil(classes / most)
        # One class alone is counted as one of two.
        count = max(2, math.ceil(classes / group))
        matrix = multiclass_confusion_matrix(
            self.predictions // group, self.targets // group, num_classes=count
        )
        return matrix if classes > 1 else matrix[:1, :1]

    def per_class(self) -> list[ClassResult]:
        """Return how each class fared, in the order of the classes."""
        mistakes: dict[int, Confusion] = {}
        for confusion in self.confusions:
            mistakes.setdefault(confusion.target, confusion)
        counts = zip(*(count.tolist() for count in self._counts), strict=True)
        results = []
        for index, (name, row) in enumerate(zip(self.class_names, counts, strict=True)):
            mistake = mistakes.get(index)
            other = (self.class_names[mistake.prediction], mistake.images) if mistake else ("", 0)
            results.append(ClassResult(index, name, *row, *other))
        return results

    def table(self) -> str:
        """Return the figures, the worst classes and the worst confusions as Markdown."""
        figures = self.scalars()
        facts = {key: value for key, value in self.facts.items() if not isinstance(value, dict)}
        rows = [[str(key), _text(value)] for key, value in facts.items()]
        rows += [
            ["images", f"{len(self.targets):,}"],
            ["classes", f"{len(self.class_names):,}"],
            ["top-1", f"{figures['top1']:.2f} %"],
            ["top-5", f"{figures['top5']:.2f} %"],
            ["mean class accuracy", f"{figures['mean_class_accuracy']:.2f} %"],
            ["loss", f"{figures['loss']:.4f}"],
            ["calibration error", f"{figures['ece']:.2f} %"],
        ]
        parts = [markdown(["evaluation", ""], rows)]
        classes = [result for result in self.per_class() if result.images > result.correct]
        classes.sort(key=lambda result: result.correct / result.images)
        if classes:
            header = ["worst classes", "images", "accuracy", "most often taken for"]
            rows = [
                [c.name, str(c.images), f"{c.accuracy:.1f} %", f"{c.mistaken_for} ({c.mistakes})"]
                for c in classes[:WORST]
            ]
            parts.append(markdown(header, rows))
        return "\n".join(parts)

    def write(self, folder: Path) -> None:
        """Write metrics.json, per_class.csv, confusion.png, calibration.png and table.md.

        Args:
            folder: made if it isn't there; files of these names are replaced, each as a whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"images": len(self.targets), "classes": len(self.class_names), **self.scalars()}
        record = {**self.facts, **figures, "calibration": [b._asdict() for b in self.calibration()]}
        with atomic_write(folder / "metrics.json") as path:
            path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        with (
            atomic_write(folder / "per_class.csv") as path,
            open(path, "w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow([*ClassResult._fields, "accuracy"])
            for result in self.per_class():
                accuracy = "" if result.accuracy is None else f"{result.accuracy:.4f}"
                writer.writerow([*result, accuracy])
        matrix = self.confusion_matrix(CELLS).numpy()
        names = self.class_names
        worst = [(names[c.target], names[c.prediction], c.images) for c in self.confusions]
        pictures = {
            "confusion.png": confusion_figure(matrix, names, worst),
            "calibration.png": calibration_figure(self.calibration(), self.scalars()["ece"]),
        }
        for name, figure in pictures.items():
            with atomic_write(folder / name) as path:
                figure.savefig(path, format="png", dpi=120)
        with atomic_write(folder / "table.md") as path:
            path.write_text(self.table(), "utf-8")


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned as plain text too."""
    table = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *table]) for i in range(len(header))]
    ruler = ["-" * max(width, 3) for width in widths]
    lines = [
        "| " + " | ".join(cell.ljust(len(dashes)) for cell, dashes in zip(row, ruler, strict=True))
        for row in (header, ruler, *table)
    ]
    return "".join(f"{line} |\n" for line in lines)


class _Kept(NamedTuple):
    """What is kept of one batch; see `EvaluationReport`."""

    top: Tensor
    confidence: Tensor
    targets: Tensor
    losses: Tensor
    classes: int


@METRICS.register_module(name="VimClassificationMetric")
class ClassificationMetric(BaseMetric):
    """The figures of `EvaluationReport.scalars` over all images of all processes.

    `process` takes the model's output for a batch, a dict of logits (B, C) and targets (B,), or a
    sequence of such; mmengine's Evaluator iterates over what it is given, so it wants a list:
    `evaluator.process([outputs])`. Nothing waits for the device before `evaluate`, which leaves
    the same report in `report` on every process. A handful of numbers is kept for each image.

    Args:
        class_names: a name for each class; by default `dataset_meta["classes"]` if it has as many,
            else "class 0", "class 1", ...
        prefix: set before the names of the figures, with a slash.

    Raises:
        TypeError: output that is no dict of logits and targets.
        ValueError: shapes that don't fit, or what `EvaluationReport` refuses.
    """

    default_prefix = ""

    def __init__(self, class_names: Sequence[str] | None = None, prefix: str | None = None) -> None:
        super().__init__(prefix=prefix)
        self.class_names = class_names
        self.report: EvaluationReport | None = None

    def process(self, data_batch: Any, data_samples: Mapping | Sequence[Mapping]) -> None:
        if isinstance(data_samples, Mapping):
            data_samples = [data_samples]
        for sample in data_samples:
            if not isinstance(sample, Mapping) or not {"logits", "targets"} <= sample.keys():
                raise TypeError(
                    f"the metric takes dicts of logits and targets, got {sample!r:.80}: hand "
                    f"[outputs], a list, to Evaluator.process"
                )
            self.results.append(_keep(sample["logits"], sample["targets"]))

    def compute_metrics(self, results: Sequence[_Kept]) -> dict[str, float]:
        classes = {kept.classes for kept in results}
        if len(classes) > 1:
            raise ValueError(f"all logits must have the same classes, got {sorted(classes)}")
        self.report = None
        if not results:
            raise ValueError("no image was evaluated: is the data's folder or split empty?")
        columns = [torch.cat(column).cpu() for column in list(zip(*results, strict=True))[:-1]]
        self.report = EvaluationReport(*columns, class_names=names_of(self, classes.pop()))
        return self.report.scalars()

    def evaluate(self, size: int) -> dict[str, float]:
        """Return the figures over what all processes have processed, and forget it.

        Args:
            size: images that there should be; another number is warned of.
        """
        # mmengine's own way writes pickles to a folder that all processes would have to share.
        mine = [_Kept(*(x.cpu() for x in kept[:-1]), kept.classes) for kept in self.results]
        self.results.clear()
        figures = self.compute_metrics([kept for part in all_gather_object(mine) for kept in part])
        images = len(self.report.targets)
        if images != size:
            logger.warning("evaluated %d images of a dataset of %d", images, size)
        return {f"{self.prefix}/{k}" if self.prefix else k: v for k, v in figures.items()}


def names_of(metric: BaseMetric, classes: int) -> Sequence[str]:
    """Return a name for each class: a metric's `class_names`, or those of its `dataset_meta`.

    Raises:
        ValueError: `class_names` of another number of classes.
    """
    names = metric.class_names
    if names is not None and len(names) != classes:
        raise ValueError(f"class_names must be of the {classes} classes, got {len(names)}")
    if names is None:
        names = (metric.dataset_meta or {}).get("classes") or ()
    # A model may know more classes than the data have.
    return names if len(names) == classes else [f"class {index}" for index in range(classes)]


@torch.no_grad()
def _keep(logits: Tensor, targets: Tensor) -> _Kept:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"logits must be (B, C) and targets (B,) integers, got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)} {targets.dtype}"
        )
    classes = logits.shape[1]
    log_probabilities = logits.float().log_softmax(1)
    best = log_probabilities.topk(min(TOP, classes))
    # A target that is no class is refused later, in words; here the device would stop the process.
    index = targets.long().clamp(0, classes - 1)[:, None]
    losses = -log_probabilities.gather(1, index)[:, 0]
    return _Kept(best.indices, best.values[:, 0].exp(), targets.long(), losses, classes)


def evaluate(
    predict: Callable[[Mapping[str, Any]], Tensor],
    batches: Iterable[Mapping[str, Any]],
    metric: ClassificationMetric,
) -> EvaluationReport:
    """Return the report over batches in this process, without mmengine's Runner.

    Args:
        predict: from a batch to logits (B, C).
        batches: dicts of targets (B,) and whatever `predict` needs.
        metric: collects the outputs.
    """
    images = 0
    with torch.inference_mode():
        for batch in batches:
            logits = predict(batch)
            metric.process(batch, {"logits": logits, "targets": batch["targets"].to(logits.device)})
            images += len(logits)
    metric.evaluate(images)
    return metric.report
