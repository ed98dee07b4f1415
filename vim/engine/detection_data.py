"""Images with boxes, classes and perhaps masks, for training and evaluating detectors.

Samplers, seeds and loaders are those of `vim.engine.data`: what is random about a sample is a
function of (seed, epoch, position in the epoch).
"""

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from vim.heads.detection_transforms import DetectionTransform

from ._annotations import Annotations, Fault, check, mask_of, read_coco, read_voc
from ._dense import LOADER_KEYS, dataset_config, loader_config
from ._files import Files, open_files
from ._image_sources import TRAIN, decode
from .data import ImageDataset, Loader, make_loader
from .seeding import Stream, seeded

__all__ = ["DetectionDataset", "DetectionSample", "build_dataset", "build_loader"]

logger = logging.getLogger("vim.data")

LAYOUTS = ("coco", "voc")
DATASET_KEYS = {
    "name",
    "root",
    "layout",
    "annotations",
    "images",
    "split",
    "classes",
    "num_classes",
    "masks",
    "keep_empty",
    "num_samples",
    "on_corrupt",
    "on_fault",
    "img_size",
}
AUGMENTATION = set(inspect.signature(DetectionTransform).parameters) - {"crop_size", "mean"}


class DetectionSample(NamedTuple):
    """An image, what is in it, and the (file, reason) of each that it stands in for.

    Args:
        image: (3, h, w) uint8.
        target: in training boxes (N, 4) float32 of left, top, right and bottom, labels (N,) int64
            from 1, and perhaps masks (N, h, w) uint8; in evaluation image_id, size (height, width),
            file_name and the `annotations` in COCO's format, with `label` from 1.
        corrupt: what was unreadable.
    """

    image: Tensor
    target: dict[str, Any]
    corrupt: tuple[tuple[str, str], ...] = ()


class DetectionDataset(ImageDataset):
    """Images and their objects by (epoch, position, index), as `EpochSampler` yields them.

    An `ImageDataset` whose source gives COCO's annotations instead of classes. With a transform a
    sample is what it makes of image, boxes, labels and masks; without, in evaluation, it is the
    image as it is and its annotations.
    """

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Dicts with the id and the name of each class."""
        return self.source.annotations.categories

    @property
    def faults(self) -> list[Fault]:
        """All annotations that were found to be broken."""
        return self.source.annotations.faults

    def __getitem__(self, key: tuple[int, int, int]) -> DetectionSample:
        epoch, position, index = key
        image, record, corrupt = self._load(epoch, position, index)
        if self.transform is None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            return DetectionSample(pixels.contiguous(), record, corrupt)
        boxes, labels, masks = self._arrays(record)
        with seeded(self.seed, Stream.SAMPLE, epoch, position):
            return DetectionSample(*self.transform(image, boxes, labels, masks), corrupt)

    def _arrays(self, record: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Boxes, labels and masks of what trains: all but crowds."""
        objects = [each for each in record["annotations"] if not each["iscrowd"]]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        height, width = record["size"]
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, ::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        labels = torch.tensor([each["label"] for each in objects], dtype=torch.int64)
        if not self.source.masks:
            return boxes, labels, None
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, each in zip(masks, objects, strict=True):
            mask.copy_(torch.from_numpy(mask_of(each["segmentation"], height, width)))
        return boxes, labels, masks


class _FileSource:
    """Images in files, and their annotations; what `ImageDataset` reads.

    Args:
        files: where the images are.
        annotations: checked ones.
        masks: whether masks are read.
    """

    def __init__(self, files: Files, annotations: Annotations, masks: bool) -> None:
        self.files = files
        self.annotations = annotations
        self.masks = masks
        self.class_names = [category["name"] for category in annotations.categories]

    def __len__(self) -> int:
        return len(self.annotations.images)

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        record = self.annotations.images[index]
        image = decode(self.files.read(record["name"]))
        if image.size != (record["width"], record["height"]):
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, its annotations are for "
                f"{record['width']} x {record['height']}"
            )
        return image, self._target(index)

    def _target(self, index: int) -> dict[str, Any]:
        record = self.annotations.images[index]
        return {
            "image_id": record["id"],
            "size": (record["height"], record["width"]),
            "file_name": record["file_name"],
            "annotations": self.annotations.objects[index],
        }

    def name(self, index: int) -> str:
        return self.files.label(self.annotations.images[index]["name"])


class _MadeUpSource(_FileSource):
    """Noise with tinted rectangles, a tint a class, so that a model can learn them."""

    def __init__(
        self, num_samples: int, num_classes: int, img_size: int, split: str, masks: bool
    ) -> None:
        rng = np.random.default_rng(int(split in TRAIN))
        images, objects = [], []
        for index in range(num_samples):
            images.append(
                {
                    "id": index + 1,
                    "file_name": f"{index}",
                    "width": img_size + 16,  # not square, as photographs
                    "height": img_size,
                }
            )
            objects.append(
                [
                    self._object(rng, index + 1, number, num_classes, img_size)
                    for number in range(rng.integers(1, 4))
                ]
            )
        categories = [{"id": i + 1, "name": f"class {i}"} for i in range(num_classes)]
        super().__init__(None, Annotations(images, objects, categories), masks)

    @staticmethod
    def _object(
        rng: np.random.Generator, image_id: int, number: int, classes: int, size: int
    ) -> dict[str, Any]:
        w, h = (int(x) for x in rng.integers(size // 4, size // 2 + 1, size=2))
        left, top = int(rng.integers(size + 16 - w)), int(rng.integers(size - h))
        right, bottom = left + w, top + h
        label = int(rng.integers(classes)) + 1
        return {
            "id": 10 * image_id + number,
            "image_id": image_id,
            "category_id": label,
            "label": label,
            "bbox": [left, top, w, h],
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        }

    def load(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        target = self._target(index)
        pixels = np.random.default_rng(index).integers(64, size=(*target["size"], 3))
        tints = np.random.default_rng(0).integers(256, size=(len(self.class_names) + 1, 3))
        for each in target["annotations"]:
            left, top, w, h = each["bbox"]
            pixels[top : top + h, left : left + w] //= 4
            pixels[top : top + h, left : left + w] += 3 * tints[each["label"]] // 4
        return Image.fromarray(pixels.astype(np.uint8)), target

    def name(self, index: int) -> str:
        return f"made-up image {index}"


def build_dataset(
    cfg: Mapping[str, Any],
    transform: DetectionTransform | None,
    is_training: bool,
    *,
    seed: int = 0,
) -> DetectionDataset:
    """The data set that a config names.

    Args:
        cfg: these keys, all optional but `root` where data are read from there:
            name: "" for files, or "made-up".
            root: folder, or uncompressed tar of such.
            layout: "coco" (default: a JSON file in COCO's format) or "voc" (boxes of Pascal VOC's
                XML files).
            annotations: of "coco" the JSON file in root, "instances_train.json" or
                "instances_val.json" unless given.
            images: folder of the images in root, "images" for "coco" and "JPEGImages" for "voc".
            split: of "voc", "train" or "val" unless given.
            classes: names, in order; by default those of the file by their ids, or VOC's twenty.
                What has another class is broken.
            num_classes: checked; of "made-up" images, 3 unless given.
            masks: whether objects have masks, which all must have then; False unless given.
            keep_empty: whether images without objects are used; True unless given.
            num_samples: so many images, evenly spaced; of "made-up" ones 64 unless given.
            on_corrupt: of an image that cannot be read, or is of another size than its annotations
                say: "skip" puts another sample in its place and names it (default in training),
                "error" stops (default in evaluation).
            on_fault: of annotations that are broken (image missing, image or class unknown, box
                outside the image, without area, mask missing, broken or of another size): "repair"
                cuts boxes off at the image's edge and leaves out what can't be repaired (default in
                training), "drop" leaves them out, "error" stops (default in evaluation). All are
                counted and named in the log, and listed in the data set's `faults`.
            img_size: of "made-up" images, 64 unless given.
        transform: of image, boxes, labels and masks; None in evaluation.
        is_training: chooses the defaults.
        seed: of the run.

    Raises:
        ValueError: unknown keys, data that are not there or not what the config says.
    """
    of_files = {"root", "layout", "annotations", "images", "classes", "keep_empty", "on_fault"}
    cfg = dataset_config(cfg, DATASET_KEYS, of_files, is_training)
    num_samples = cfg.get("num_samples")
    if cfg["name"] == "made-up":
        source = _MadeUpSource(
            num_samples or 64,
            cfg.get("num_classes", 3),
            cfg.get("img_size", 64),
            cfg.get("split", "train" if is_training else "val"),
            cfg.get("masks", False),
        )
        num_samples = None
    else:
        source = _file_source(cfg, is_training)
    count = len(source.class_names)
    if count != cfg.get("num_classes", count):
        raise ValueError(
            f"num_classes={cfg['num_classes']}, but the data have the {count} classes "
            f"{', '.join(source.class_names[:10])}: correct num_classes or classes"
        )
    return DetectionDataset(
        source, transform, on_corrupt=cfg["on_corrupt"], num_samples=num_samples, seed=seed
    )


def _file_source(cfg: Mapping[str, Any], is_training: bool) -> _FileSource:
    layout, root = cfg.get("layout", "coco"), str(cfg.get("root", ""))
    on_fault = cfg.get("on_fault", "repair" if is_training else "error")
    masks = cfg.get("masks", False)
    if layout not in LAYOUTS:
        raise ValueError(f"dataset.layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if on_fault not in ("repair", "drop", "error"):
        raise ValueError(f"dataset.on_fault must be 'repair', 'drop' or 'error', got {on_fault!r}")
    other = {"coco": "split", "voc": "annotations"}[layout]
    if other in cfg:
        raise ValueError(f"dataset.{other} has no effect on layout={layout!r}: remove it")
    if layout == "voc" and masks:
        raise ValueError(
            "layout='voc' has boxes alone: set dataset.masks=False, or convert to COCO"
        )
    if not root or not os.path.exists(root):
        raise ValueError(
            f"dataset.root={root!r} does not exist: give a folder, or an uncompressed .tar of "
            "such, with images and annotations; name='made-up' needs no files"
        )
    files = open_files(root)
    split = "train" if is_training else "val"
    if layout == "coco":
        name = cfg.get("annotations", f"instances_{split}.json")
        found, folder = read_coco(files, name, cfg.get("classes")), cfg.get("images", "images")
    else:
        found = read_voc(files, cfg.get("split", split), cfg.get("classes"))
        folder = cfg.get("images", "JPEGImages")
    found = check(found, files, folder.strip("/"), on_fault, masks)
    if not cfg.get("keep_empty", True):
        found = _without_empty(found)
    return _FileSource(files, found, masks)


def _without_empty(found: Annotations) -> Annotations:
    kept = [
        (image, objects)
        for image, objects in zip(found.images, found.objects, strict=True)
        if not all(each["iscrowd"] for each in objects)
    ]
    if not kept:
        raise ValueError("no image has an object: set dataset.keep_empty=True, or correct the data")
    logger.info(
        "%d of %d images have no object and are left out (dataset.keep_empty=False)",
        len(found.images) - len(kept),
        len(found.images),
    )
    images, objects = (list(each) for each in zip(*kept, strict=True))
    return Annotations(images, objects, found.categories, found.faults)


def collate(samples: Sequence[DetectionSample]) -> dict[str, Any]:
    """Batch samples: lists of images and of targets, corrupt [(file, reason)]."""
    return {
        "images": [sample.image for sample in samples],
        "targets": [sample.target for sample in samples],
        "corrupt": [entry for sample in samples for entry in sample.corrupt],
    }


def build_loader(
    cfg: Mapping[str, Any],
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    is_training: bool,
) -> Loader:
    """The loader that a config names: batches of images and targets, as `collate` says.

    In training, epochs are shuffled and all ranks have as many batches. In evaluation every image
    comes once on one rank, whole, with its annotations; the detector resizes it.

    Args:
        cfg: these keys, of which `dataset` and `batch_size` are needed:
            task: "detection".
            dataset: see `build_dataset`.
            batch_size: of each process.
            num_workers: reading processes, 0 (default) reads in this one.
            crop_size: in training, needed: (height, width).
            augmentation: in training, further arguments of
                `vim.heads.detection_transforms.DetectionTransform`.
            mean: of the images in 0..1, the colour beyond them.
            drop_last: leave out the last, smaller batch: default in training, refused otherwise.
            persistent_workers, multiprocessing_context: see `vim.engine.data.build_loader`.
        seed: of the run.
        rank, world_size: of this process.
        is_training: else evaluation.

    Raises:
        ValueError: unknown or contradictory keys, data that are not there, not one whole batch.
    """
    cfg = loader_config(cfg, LOADER_KEYS, AUGMENTATION, is_training)
    transform = None
    if is_training:
        mean = cfg.get("mean", IMAGENET_DEFAULT_MEAN)
        transform = DetectionTransform(cfg["crop_size"], mean=mean, **cfg["augmentation"])
    dataset = build_dataset(cfg["dataset"], transform, is_training, seed=seed)
    return make_loader(
        dataset,
        cfg,
        seed=seed,
        rank=rank,
        world_size=world_size,
        is_training=is_training,
        collate_fn=collate,
    )
