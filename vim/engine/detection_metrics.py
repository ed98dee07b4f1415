"""Validation of a detector: COCO's average precision of boxes and masks, and what is made of it."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import all_gather_object, broadcast_object_list, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from PIL import Image
from torch import Tensor

from .drawing import draw_objects, with_legend
from .inference import atomic_write
from .metrics import markdown, names_of

__all__ = [
    "DetectionMetric",
    "DetectionReport",
    "ObjectClassResult",
    "detections_of",
    "segmentation_of",
]

logger = logging.getLogger(__name__)

FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""In the order of COCO's own summary, https://cocodataset.org/#detection-eval."""
KINDS = {"box": "bbox", "mask": "segm"}
MASK_THRESHOLD = 0.5
SHOWN_SCORE = 0.5
"""Score from which an object is drawn."""


class ObjectClassResult(NamedTuple):
    """How one class fared; average precisions in percent, None where there is nothing to find.

    Args:
        index: of the class, from 0.
        name: of the class.
        objects: to be found; crowds don't count.
        detections: of whatever score.
        box_AP, box_AP50, mask_AP, mask_AP50: the masks' are None where there are none.
    """

    index: int
    name: str
    objects: int
    detections: int
    box_AP: float | None
    box_AP50: float | None
    mask_AP: float | None
    mask_AP50: float | None


class _Shown(NamedTuple):
    """An image (3, H, W) uint8, what was found in it, and what there is, for an overlay."""

    image: Tensor
    found: Mapping[str, Tensor]
    target: Mapping[str, Any]


@dataclass
class DetectionReport:
    """What a detector did on a data set.

    Args:
        targets: of each image image_id, size, file_name and annotations, see
            `vim.engine.detection_data.DetectionSample`.
        detections: dicts with image_id, label from 1, bbox (left, top, width, height), score and
            perhaps segmentation in COCO's run lengths.
        class_names: of the classes.
        category_ids: of the classes in the data's own files; by default 1, 2, ...
        masks: whether masks are evaluated.
        shown: for overlays.
        faults: annotations that were found to be broken.
        facts: what else the files should say.

    Raises:
        ValueError: nothing to be found.
    """

    targets: Sequence[Mapping[str, Any]]
    detections: Sequence[Mapping[str, Any]]
    class_names: Sequence[str]
    category_ids: Sequence[int] = ()
    masks: bool = False
    shown: Sequence[_Shown] = ()
    faults: Sequence[tuple[str, ...]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(target["annotations"] for target in self.targets):
            raise ValueError(
                f"{len(self.targets)} images were evaluated and none has an object: is the "
                "annotations' file the right one?"
            )
        self.category_ids = self.category_ids or range(1, len(self.class_names) + 1)

    @cached_property
    def _evaluations(self) -> dict[str, Any]:
        """COCO's evaluations of boxes and, where there are such, masks."""
        from faster_coco_eval import COCO, COCOeval_faster  # of the extra dense

        def silent(*_: Any) -> None:
            """Print nothing."""

        images = [
            {"id": number, "height": target["size"][0], "width": target["size"][1]}
            for number, target in enumerate(self.targets, start=1)
        ]
        numbers = {t["image_id"]: n for n, t in enumerate(self.targets, start=1)}
        keys = ["bbox", "area", "iscrowd"] + ["segmentation"] * self.masks
        objects = [
            {"image_id": number, "category_id": each["label"], **{k: each[k] for k in keys}}
            for number, target in enumerate(self.targets, start=1)
            for each in target["annotations"]
        ]
        truth = {
            "images": images,
            "annotations": [{"id": i, **each} for i, each in enumerate(objects, start=1)],
            "categories": [{"id": i + 1, "name": n} for i, n in enumerate(self.class_names)],
        }
        evaluations = {}
        for kind in KINDS if self.masks else ("box",):
            # With its box, a detection's area would be the box's where the mask's is meant.
            shape = "bbox" if kind == "box" else "segmentation"
            found = [
                {
                    "image_id": numbers[each["image_id"]],
                    "category_id": each["label"],
                    "score": each["score"],
                    shape: each[shape],
                }
                for each in self.detections
            ]
            if not found:
                continue
            truth_file = COCO(truth, use_deepcopy=True, print_function=silent)
            evaluation = COCOeval_faster(
                truth_file, truth_file.loadRes(found), KINDS[kind], print_function=silent
            )
            evaluation.run()
            evaluations[kind] = evaluation
        return evaluations

    def scalars(self) -> dict[str, float]:
        """Return the figures for a log, in percent.

        Returns:
            Of boxes, and of masks where there are such: box_AP, the mean over classes and IoUs of
            0.50, 0.55, ... 0.95; box_AP50 and box_AP75 at one IoU; box_AP_small, box_AP_medium and
            box_AP_large of objects under 32^2, under 96^2 and above, where there are such.
        """
        figures = {}
        for kind in KINDS if self.masks else ("box",):
            evaluation = self._evaluations.get(kind)
            for place, name in enumerate(FIGURES):
                value = 0.0 if evaluation is None else float(evaluation.stats[place])
                if value >= 0:  # COCO says -1 where there is nothing to find
                    figures[f"{kind}_{name}"] = 100 * value
        return figures

    @cached_property
    def per_class(self) -> list[ObjectClassResult]:
        """How each class fared, in the order of the classes."""
        objects = [0] * (len(self.class_names) + 1)
        detections = list(objects)
        for each in (each for target in self.targets for each in target["annotations"]):
            objects[each["label"]] += not each["iscrowd"]
        for each in self.detections:
            detections[each["label"]] += 1
        results = []
        for index, name in enumerate(self.class_names):
            aps = [self._class_ap(kind, index, iou) for kind in KINDS for iou in (None, 0)]
            if not objects[index + 1]:
                aps = [None] * len(aps)
            counts = objects[index + 1], detections[index + 1]
            results.append(ObjectClassResult(index, name, *counts, *aps))
        return results

    def _class_ap(self, kind: str, index: int, iou: int | None) -> float | None:
        """Of one class, over all IoUs or at one of them, by its place; None without masks."""
        if kind == "mask" and not self.masks:
            return None
        evaluation = self._evaluations.get(kind)
        if evaluation is None:
            return 0.0
        # IoUs, recalls, classes, areas (all of them is the first), most detections an image.
        precision = np.asarray(evaluation.eval["precision"])[:, :, index, 0, -1]
        precision = precision if iou is None else precision[iou]
        return 100 * float(precision.mean()) if (precision >= 0).all() else None

    def table(self) -> str:
        """Return the figures, in total and by class, as Markdown."""
        facts = {key: value for key, value in self.facts.items() if not isinstance(value, dict)}
        rows = [[str(key), str(value)] for key, value in facts.items()]
        objects = sum(result.objects for result in self.per_class)
        rows += [["images", f"{len(self.targets):,}"], ["objects", f"{objects:,}"]]
        rows += [["broken annotations", f"{len(self.faults):,}"]] if self.faults else []
        rows += [[k.replace("_", " "), f"{value:.2f}"] for k, value in self.scalars().items()]
        header = ["class", "objects", "detections", "box AP", "box AP50"]
        header += ["mask AP", "mask AP50"] if self.masks else []
        classes = [
            [r.name, f"{r.objects:,}", f"{r.detections:,}", *map(_shown_ap, r[4 : len(header) + 1])]
            for r in self.per_class
            if r.objects or r.detections
        ]
        return "\n".join([markdown(["evaluation", ""], rows), markdown(header, classes)])

    def write(self, folder: Path) -> None:
        """Write metrics.json, per_class.csv, predictions.json, table.md and overlays/*.png.

        predictions.json is COCO's list of results, with the data's own ids of images and classes;
        faults.csv, if there are such, names the annotations that were broken.

        Args:
            folder: made if it isn't there; files of these names are replaced, each as a whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"images": len(self.targets), "classes": len(self.class_names)}
        figures |= {"broken_annotations": len(self.faults), **self.scalars()}
        _write_json(folder / "metrics.json", {**self.facts, **figures}, indent=1)
        rows = [["" if value is None else value for value in row] for row in self.per_class]
        _write_csv(folder / "per_class.csv", [ObjectClassResult._fields, *rows])
        if self.faults:
            header = ["kind", "where", "reason", "action"]
            _write_csv(folder / "faults.csv", [header, *self.faults])
        results = [
            {
                "category_id": self.category_ids[each["label"] - 1],
                **{key: value for key, value in each.items() if key != "label"},
            }
            for each in self.detections
        ]
        _write_json(folder / "predictions.json", results)
        with atomic_write(folder / "table.md") as path:
            path.write_text(self.table(), "utf-8")
        if self.shown:
            (folder / "overlays").mkdir(exist_ok=True)
        for number, shown in enumerate(self.shown):
            with atomic_write(folder / "overlays" / f"{number:04d}.png") as path:
                self._overlay(shown).save(path, format="png")

    def _overlay(self, shown: _Shown) -> Image.Image:
        """What was found, beside what there is."""
        found = {k: v[shown.found["scores"] >= SHOWN_SCORE] for k, v in shown.found.items()}
        objects = shown.target["annotations"]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([each["label"] for each in objects], dtype=torch.int64)
        masks = None
        if self.masks and objects:
            from ._annotations import mask_of

            runs = [mask_of(each["segmentation"], *shown.target["size"]) for each in objects]
            masks = torch.from_numpy(np.stack(runs)).bool()
        names = self.class_names
        panels = [
            draw_objects(shown.image, class_names=names, **found),
            draw_objects(shown.image, boxes, labels, names, masks=masks),
        ]
        present = torch.cat([found["labels"], labels]).unique() - 1
        return with_legend(panels, present.tolist(), names)


def _shown_ap(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _write_json(file: Path, value: Any, indent: int | None = None) -> None:
    with atomic_write(file) as path:
        path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", "utf-8")


def _write_csv(file: Path, rows: Sequence[Sequence[Any]]) -> None:
    with (
        atomic_write(file) as path,
        open(path, "w", encoding="utf-8", newline="") as stream,
    ):
        csv.writer(stream).writerows(rows)


def segmentation_of(mask: Tensor) -> dict[str, Any]:
    """Return a mask (H, W) bool in COCO's run lengths, with text instead of bytes for JSON."""
    from faster_coco_eval import mask as runs  # of the extra dense

    encoded = runs.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    counts = encoded["counts"]
    return {
        "size": [int(side) for side in encoded["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def detections_of(found: Mapping[str, Tensor], image_id: Any) -> list[dict[str, Any]]:
    """Return what a `Detector` found in an image as COCO's results, but with `label` from 1.

    Args:
        found: boxes (N, 4), labels, scores and perhaps masks (N, 1, H, W) or (N, H, W).
        image_id: of the image.
    """
    boxes = found["boxes"].float().cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    records = [
        {"image_id": image_id, "label": label, "bbox": [round(x, 2) for x in box], "score": score}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in found:
        for record, mask in zip(records, binary_masks(found["masks"]), strict=True):
            record["segmentation"] = segmentation_of(mask)
    return records


def binary_masks(masks: Tensor) -> Tensor:
    """(N, 1, H, W) or (N, H, W), shares or bool, to (N, H, W) bool on the CPU."""
    masks = masks if masks.dtype == torch.bool else masks > MASK_THRESHOLD
    return (masks[:, 0] if masks.dim() == 4 else masks).cpu()


@METRICS.register_module(name="VimDetectionMetric")
class DetectionMetric(BaseMetric):
    """The figures of `DetectionReport.scalars` over all images of all processes.

    `process` takes what `VimDetector` predicts for a batch: a dict of predictions, targets and
    num_classes. `evaluate` leaves the report in `report` on the first process, with the overlays of
    its own images.

    Args:
        class_names: by default `dataset_meta["classes"]`, else "class 0", ...
        overlays: so many images are kept for overlays, the first of the first process.
        prefix: set before the names of the figures, with a slash.

    `dataset_meta` may also have `category_ids`, the ids of the classes in the data's files, and
    `faults`, annotations that were broken.
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
        self.report: DetectionReport | None = None

    @torch.no_grad()
    def process(self, data_batch: Mapping[str, Any], data_samples: Mapping[str, Any]) -> None:
        # self.results is what the loops clear: [targets, detections, classes, masks, overlays].
        if not self.results:
            self.results[:] = [[], [], data_samples["num_classes"], False, []]
        targets, detections, _, _, shown = self.results
        for image, found, target in zip(
            data_batch["images"], data_samples["predictions"], data_samples["targets"], strict=True
        ):
            if "masks" in found:
                found = {**found, "masks": binary_masks(found["masks"])}
                self.results[3] = True
            targets.append(target)
            detections += detections_of(found, target["image_id"])
            if len(shown) < self.overlays:
                found = {name: value.cpu() for name, value in found.items()}
                shown.append(_Shown(image.cpu(), found, target))

    def compute_metrics(self, results: Sequence[Any]) -> dict[str, float]:
        targets, detections, classes, masks, shown = results
        meta = self.dataset_meta or {}
        names = names_of(self, classes)
        highest = max(
            (each["label"] for target in targets for each in target["annotations"]), default=0
        )
        if highest > classes:
            raise ValueError(
                f"the data have {highest} classes or more, the detector {classes}: set "
                "model.num_classes to that of the data"
            )
        if masks and not all("segmentation" in a for t in targets for a in t["annotations"]):
            logger.warning("the data have no masks, so those of the detector are not evaluated")
            masks = False
        ids = meta.get("category_ids") or ()
        self.report = DetectionReport(
            targets, detections, names, ids, masks, shown, meta.get("faults") or ()
        )
        return self.report.scalars()

    def evaluate(self, size: int) -> dict[str, float]:
        """Return the figures over what all processes have processed, and forget it.

        Args:
            size: images that there should be; another number is warned of.

        Raises:
            ValueError: no image, or data that don't go with the detector.
        """
        own = list(self.results) or [[], [], 0, False, []]
        self.results.clear()
        parts = [part for part in all_gather_object(own[:4]) if part[0]]
        answer: list[Any] = [None, None]
        if is_main_process():
            try:
                answer[0] = self._evaluated(parts, own[4], size)
            except ValueError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        figures, error = answer
        if error is not None:
            raise ValueError(error)
        return {f"{self.prefix}/{k}" if self.prefix else k: v for k, v in figures.items()}

    def _evaluated(self, parts: list[list[Any]], shown: list[_Shown], size: int) -> dict:
        if not parts:
            raise ValueError("no image was evaluated: is the data's folder or split empty?")
        targets = [target for part in parts for target in part[0]]
        detections = [each for part in parts for each in part[1]]
        if len(targets) != size:
            logger.warning("evaluated %d images of a dataset of %d", len(targets), size)
        masks = any(part[3] for part in parts)
        return self.compute_metrics([targets, detections, parts[0][2], masks, shown])
