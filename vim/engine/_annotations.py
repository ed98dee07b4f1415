"""Annotations of objects: reading them, and naming those that are broken."""

import json
import logging
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from ._files import Files

__all__ = ["Annotations", "Fault", "check", "mask_of", "read_coco", "read_voc"]

logger = logging.getLogger("vim.data")

TOLERANCE = 1.0
"""Pixels by which a box may lie outside its image: annotators and formats round."""
LEFT_OUT, CUT = "left out", "cut off at the image's edge"
SHOWN = 20
"""Faults that the log names; `Annotations.faults` has all."""

# http://host.robots.ox.ac.uk/pascal/VOC/voc2012
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


class Fault(NamedTuple):
    """What is wrong with an annotation, and what was done about it.

    Args:
        kind: "missing image", "unknown image", "unknown class", "box outside", "zero area",
            "broken mask", "mask size", "missing annotations" or "broken annotations".
        where: the file, and the annotation in it.
        reason: in words.
        action: "left out" or "cut off at the image's edge".
    """

    kind: str
    where: str
    reason: str
    action: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}, {self.reason}; {self.action}"


@dataclass
class Annotations:
    """Images and the objects in them, as COCO's format has them.

    Args:
        images: dicts with id, file_name, width and height.
        objects: of each image, dicts with id, image_id, category_id, bbox (left, top, width,
            height), area, iscrowd and perhaps segmentation.
        categories: dicts with id and name, in the order of the classes.
        faults: what was found to be broken.
    """

    images: list[dict[str, Any]]
    objects: list[list[dict[str, Any]]]
    categories: list[dict[str, Any]]
    faults: list[Fault] = field(default_factory=list)


def read_coco(files: Files, name: str, classes: Sequence[str] | None) -> Annotations:
    """Read a file of COCO's format, https://cocodataset.org/#format-data, as it is.

    Args:
        files: where it is.
        name: of the JSON file.
        classes: names of the classes, in order; by default the file's, by their ids.

    Raises:
        ValueError: no such file, or not of that format.
    """
    try:
        data = json.loads(files.read(name))
    except FileNotFoundError:
        raise ValueError(
            f"there is no {files.label(name)}: correct dataset.root or dataset.annotations"
        ) from None
    except ValueError as error:  # of JSON or of its encoding
        raise ValueError(f"{files.label(name)} is no JSON: {error}") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise ValueError(
            f"{files.label(name)} is not in COCO's format: it must have the lists {', '.join(keys)}"
        )
    categories = sorted(data["categories"], key=lambda category: category["id"])
    if classes is not None:
        by_name = {category["name"]: category for category in categories}
        unknown = [each for each in classes if each not in by_name]
        if unknown:
            raise ValueError(
                f"{files.label(name)} has no category {', '.join(unknown)}; it has "
                f"{', '.join(sorted(by_name))}"
            )
        categories = [by_name[each] for each in classes]
    found = Annotations(data["images"], [[] for _ in data["images"]], categories)
    places = {image["id"]: place for place, image in enumerate(data["images"])}
    if len(places) < len(data["images"]):
        raise ValueError(f"{files.label(name)}: several images have the same id")
    for each in data["annotations"]:
        place = places.get(each.get("image_id"))
        if place is None:
            where = f"{files.label(name)}, annotation {each.get('id')}"
            reason = f"there is no image with the id {each.get('image_id')}"
            found.faults.append(Fault("unknown image", where, reason, LEFT_OUT))
        else:
            found.objects[place].append(each)
    return found


def read_voc(files: Files, split: str, classes: Sequence[str] | None) -> Annotations:
    """Read the boxes of Pascal VOC's layout: ImageSets/Main/SPLIT.txt and Annotations/X.xml.

    Objects marked as difficult become COCO's crowds: they neither train nor count.

    Args:
        files: where they are.
        split: such as "train".
        classes: names of the classes, in order; by default VOC's twenty.

    Raises:
        ValueError: no such split.
    """
    names = list(classes or VOC_CLASSES)
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    ids = {category["name"]: category["id"] for category in categories}
    try:
        lines = files.read(f"ImageSets/Main/{split}.txt").decode().splitlines()
    except FileNotFoundError:
        there = [x for x in files.below("ImageSets/Main") if x.endswith(".txt")]
        raise ValueError(
            f"there is no {files.label(f'ImageSets/Main/{split}.txt')}: correct dataset.root or "
            f"dataset.split; there are {', '.join(there[:10]) or 'no splits'}"
        ) from None
    found = Annotations([], [], categories)
    for stem in (line.split()[0] for line in lines if line.strip()):
        name = f"Annotations/{stem}.xml"
        try:
            image, objects = _voc_image(ET.fromstring(files.read(name)), stem, ids)
        except FileNotFoundError:
            fault = ("missing annotations", files.label(name), "there is no such file")
            found.faults.append(Fault(*fault, LEFT_OUT))
        except (ET.ParseError, ValueError, TypeError, AttributeError) as error:
            fault = ("broken annotations", files.label(name), str(error))
            found.faults.append(Fault(*fault, LEFT_OUT))
        else:
            image["id"] = len(found.images) + 1
            for each in objects:
                each["image_id"] = image["id"]
            found.images.append(image)
            found.objects.append(objects)
    for number, each in enumerate(chain.from_iterable(found.objects), start=1):
        each["id"] = number
    return found


def _voc_image(
    root: ET.Element, stem: str, ids: Mapping[str, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    image = {
        "file_name": root.findtext("filename") or f"{stem}.jpg",
        "width": int(root.findtext("size/width", "")),
        "height": int(root.findtext("size/height", "")),
    }
    objects = []
    for each in root.iter("object"):
        left, top, right, bottom = (
            float(each.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        # Pixels are counted from 1, and the last one belongs to the box.
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        name = (each.findtext("name") or "").strip()
        crowd = int(each.findtext("difficult", "0") or 0)
        objects.append({"category_id": ids.get(name, name), "bbox": box, "iscrowd": crowd})
    return image, objects


def check(
    found: Annotations,
    files: Files,
    folder: str,
    on_fault: Literal["repair", "drop", "error"],
    masks: bool,
) -> Annotations:
    """Return what is whole, or can be made so; the rest is in `faults`, and in the log.

    Every object of it has `label`, from 1 in the order of the categories, and `area`.

    Args:
        found: as it was read.
        files: the images.
        folder: of them, below which their names lie.
        on_fault: "repair" cuts boxes off at the image's edge and leaves out what can't be
            repaired; "drop" leaves out all that is broken; "error" stops.
        masks: whether every object needs a mask.

    Raises:
        ValueError: something is broken under "error", or no image is left.
    """
    there = set(files.below(folder))
    labels = {category["id"]: i for i, category in enumerate(found.categories, start=1)}
    checked = Annotations([], [], found.categories, list(found.faults))
    for image, objects in zip(found.images, found.objects, strict=True):
        name = f"{folder}/{image.get('file_name')}".lstrip("/")
        where = files.label(name)
        if name not in there:
            reason = f"there is no such file; it has {len(objects)} annotations"
            checked.faults.append(Fault("missing image", where, reason, LEFT_OUT))
            continue
        size = image.get("width"), image.get("height")
        if not all(isinstance(side, int) and side > 0 for side in size):
            reason = f"its width and height are {size}"
            checked.faults.append(Fault("broken annotations", where, reason, LEFT_OUT))
            continue
        whole = []
        for number, each in enumerate(objects):
            each, spot = dict(each), f"{where}, annotation {each.get('id', number)}"
            fault = _fault(each, size, labels)
            outside = fault is not None and fault[0] == "box outside"
            if outside and on_fault == "repair" and _cut(each, size):
                checked.faults.append(Fault(*_placed(fault, spot), CUT))
                fault = None
            if fault is None and masks:
                fault = _mask_fault(each.get("segmentation"), size)
            if fault is not None:
                checked.faults.append(Fault(*_placed(fault, spot), LEFT_OUT))
                continue
            each["label"] = labels[each["category_id"]]
            each["iscrowd"] = int(each.get("iscrowd", 0) or 0)
            each.setdefault("area", each["bbox"][2] * each["bbox"][3])
            whole.append(each)
        checked.images.append({**image, "name": name})
        checked.objects.append(whole)
    _report(checked.faults, on_fault)
    if not checked.images:
        raise ValueError(
            f"none of the {len(found.images)} images can be used: correct dataset.root, images or "
            "annotations"
        )
    return checked


def _placed(fault: tuple[str, str], where: str) -> tuple[str, str, str]:
    kind, reason = fault
    return kind, where, reason


def _report(faults: Sequence[Fault], on_fault: str) -> None:
    if not faults:
        return
    counts = ", ".join(f"{n} of {kind!r}" for kind, n in Counter(f.kind for f in faults).items())
    listed = "\n".join(map(str, faults[:SHOWN]))
    more = f"\nand {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    if on_fault == "error":
        raise ValueError(
            f"{len(faults)} annotations are broken, {counts}:\n{listed}{more}\nCorrect them, or "
            "set dataset.on_fault='repair' or 'drop', which leave out what can't be used"
        )
    logger.warning("%d annotations are broken, %s:\n%s%s", len(faults), counts, listed, more)


def _fault(
    each: Mapping[str, Any], size: tuple[int, int], labels: Mapping[Any, int]
) -> tuple[str, str] | None:
    """The kind and the reason of the first thing that is wrong with a class or a box."""
    width, height = size
    if each.get("category_id") not in labels:
        known = f"there are {len(labels)} classes"
        return "unknown class", f"its category is {each.get('category_id')!r}, {known}"
    box = each.get("bbox")
    if not _is_box(box):
        return "broken annotations", f"its bbox must be 4 finite numbers, got {box!r}"
    left, top, w, h = box
    if w <= 0 or h <= 0:
        return "zero area", f"its box has {w:g} x {h:g} pixels"
    beyond = max(-left, -top, left + w - width, top + h - height)
    if beyond > TOLERANCE:
        sides = f"from {left:g}, {top:g} to {left + w:g}, {top + h:g}"
        return "box outside", f"its box goes {sides} in an image of {width} x {height} pixels"
    return None


def _is_box(box: Any) -> bool:
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return False
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)


def _mask_fault(mask: Any, size: tuple[int, int]) -> tuple[str, str] | None:
    width, height = size
    if isinstance(mask, dict):  # run lengths
        if list(mask.get("size", ())) != [height, width]:
            given = " x ".join(map(str, reversed(mask.get("size", ()))))
            return "mask size", f"its mask has {given} pixels, its image {width} x {height}"
        counts = mask.get("counts")
        if isinstance(counts, list) and sum(counts) != width * height:
            return "broken mask", f"its run lengths are of {sum(counts)} pixels"
        return None if counts else ("broken mask", "its run lengths are missing")
    if not mask or not isinstance(mask, list):
        return "broken mask", "it has no mask"
    for polygon in mask:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "broken mask", "a polygon must have three points or more, each of x and y"
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in polygon):
            return "broken mask", "a polygon's points must be finite numbers"
    return None


def _cut(each: dict[str, Any], size: tuple[int, int]) -> bool:
    """Cut a box off at the image's edge; whether something is left of it."""
    left, top, w, h = each["bbox"]
    right, bottom = min(left + w, size[0]), min(top + h, size[1])
    left, top = max(left, 0), max(top, 0)
    if right <= left or bottom <= top:
        return False
    each["bbox"] = [left, top, right - left, bottom - top]
    if "segmentation" not in each:
        each["area"] = (right - left) * (bottom - top)
    return True


def mask_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the mask (height, width) uint8 of COCO's polygons or run lengths."""
    from faster_coco_eval import mask  # of the extra dense

    runs = mask.segmToRle(segmentation, width, height)
    return mask.decode(runs)
