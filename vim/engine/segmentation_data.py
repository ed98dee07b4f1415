"""Images with masks of classes, for training and evaluating segmenters.

Samplers, seeds and loaders are those of `vim.engine.data`: what is random about a sample is a
function of (seed, epoch, position in the epoch).
"""

import inspect
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor

from vim.heads.segmentation_transforms import VOID, EvaluationTransform, TrainingTransform

from . import _dense
from ._files import Files, open_files
from ._image_sources import TRAIN, decode, image_extensions
from .data import ImageDataset, Loader, make_loader
from .images import FORMATS
from .seeding import Stream, seeded

__all__ = ["LAYOUTS", "SegmentationDataset", "SegmentationSample", "build_dataset", "build_loader"]

logger = logging.getLogger("vim.data")

DATASET_KEYS = {
    "name",
    "root",
    "layout",
    "split",
    "classes",
    "num_classes",
    "reduce_zero_label",
    "num_samples",
    "on_corrupt",
    "img_size",
}
AUGMENTATION = set(inspect.signature(TrainingTransform).parameters) - {"crop_size", "mean"}
AUGMENTATION -= {"short_side"}  # of evaluation, too
LOADER_KEYS = _dense.LOADER_KEYS | {"short_side"}
MASK_MODES = ("1", "L", "P", "I", "I;16")
UNKNOWN = -1

# https://github.com/mcordts/cityscapesScripts, helpers/labels.py: the classes that are evaluated.
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps images and masks, and what is in the masks.

    Args:
        images, masks: folders, with {split} in them; below them both are laid out alike.
        image_tail, mask_tail: what follows the common part of the names; "" for an image's
            extension alone.
        splits: names of the splits of training and evaluation.
        reduce_zero_label: whether 0 is void, and k the class k - 1.
        ids: in the masks, the id of each class; the other ids below 34 are void. Empty: an id is
            the class.
        classes: names.
    """

    images: str = "images/{split}"
    masks: str = "masks/{split}"
    image_tail: str = ""
    mask_tail: str = ".png"
    splits: tuple[str, str] = ("train", "val")
    reduce_zero_label: bool = False
    ids: tuple[int, ...] = ()
    classes: tuple[str, ...] = field(default=(), repr=False)


LAYOUTS = {
    "folders": Layout(),
    "ade20k": Layout(
        masks="annotations/{split}", splits=("training", "validation"), reduce_zero_label=True
    ),
    "cityscapes": Layout(
        "leftImg8bit/{split}",
        "gtFine/{split}",
        "_leftImg8bit",
        "_gtFine_labelIds.png",
        ids=tuple(CITYSCAPES),
        classes=tuple(CITYSCAPES.values()),
    ),
}


class SegmentationSample(NamedTuple):
    """An image (3, h, w) uint8, its mask (H, W) uint8, and the (file, reason) of each replaced."""

    image: Tensor
    target: Tensor
    corrupt: tuple[tuple[str, str], ...] = ()


class SegmentationDataset(ImageDataset):
    """Transformed images and masks by (epoch, position, index), as `EpochSampler` yields them.

    An `ImageDataset` whose source gives masks (H, W) uint8 instead of classes and whose transform
    takes both. A missing or broken mask makes the sample unreadable, like a broken image.
    """

    def __getitem__(self, key: tuple[int, int, int]) -> SegmentationSample:
        epoch, position, index = key
        image, mask, corrupt = self._load(epoch, position, index)
        with seeded(self.seed, Stream.SAMPLE, epoch, position):
            return SegmentationSample(*self.transform(image, mask), corrupt)


class _MaskSource:
    """Pairs of files; what `ImageDataset` reads.

    Args:
        files: where they are.
        pairs: names of image and mask.
        table: (256,) int16 class of each id in the masks, or `UNKNOWN`.
        class_names: of the classes.
    """

    def __init__(
        self,
        files: Files,
        pairs: Sequence[tuple[str, str]],
        table: np.ndarray,
        class_names: list[str],
    ) -> None:
        self.files = files
        self.pairs = pairs
        self.table = table
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image_name, mask_name = self.pairs[index]
        image = decode(self.files.read(image_name))
        try:
            mask = self._mask(self.files.read(mask_name))
            if mask.shape != image.size[::-1]:
                raise ValueError(
                    f"it has {mask.shape[1]} x {mask.shape[0]} pixels, its image "
                    f"{image.width} x {image.height}"
                )
        except Exception as error:  # a broken file may lead a decoder to any exception
            label = self.files.label(mask_name)
            reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
            raise ValueError(f"mask {label}: {reason or type(error).__name__}") from error
        return image, mask

    def _mask(self, data: bytes) -> np.ndarray:
        Image.init()
        try:
            image = Image.open(io.BytesIO(data), formats=sorted(FORMATS & Image.OPEN.keys()))
        except UnidentifiedImageError as error:
            raise ValueError("not an image") from error
        with image:
            if image.mode not in MASK_MODES:
                raise ValueError(f"its pixels are {image.mode}, a mask's are class ids (grey)")
            ids = np.asarray(image).astype(np.int64)
        inside = (ids >= 0) & (ids < len(self.table))
        mask = np.where(inside, self.table[np.where(inside, ids, 0)], UNKNOWN)
        if (mask == UNKNOWN).any():
            unknown = np.unique(ids[mask == UNKNOWN])
            raise ValueError(
                f"unknown class ids {', '.join(map(str, unknown[:5]))}; there are "
                f"{len(self.class_names)} classes, and {VOID} for void"
            )
        return mask.astype(np.uint8)

    def name(self, index: int) -> str:
        return self.files.label(self.pairs[index][0])


class _MadeUpSource:
    """Noise in rectangles tinted by class, so that a model can learn it, and a void border."""

    def __init__(self, num_samples: int, num_classes: int, img_size: int, split: str) -> None:
        self.num_samples = num_samples
        self.img_size = img_size
        self.split = split
        self.class_names = [str(index) for index in range(num_classes)]

    def __len__(self) -> int:
        return self.num_samples

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        classes, size = len(self.class_names), self.img_size
        rng = np.random.default_rng([index, self.split in TRAIN])
        grid = rng.integers(classes, size=(4, 4), dtype=np.uint8)
        place = np.arange(size) * 4 // size
        mask = grid[place][:, place]
        tints = np.random.default_rng(0).integers(256, size=(classes, 3))
        pixels = (rng.integers(256, size=(size, size, 3)) + 3 * tints[mask]) // 4
        mask[0], mask[:, 0] = VOID, VOID
        return Image.fromarray(pixels.astype(np.uint8)), mask

    def name(self, index: int) -> str:
        return f"made-up image {index}"


def build_dataset(
    cfg: Mapping[str, Any],
    transform: TrainingTransform | EvaluationTransform,
    is_training: bool,
    *,
    seed: int = 0,
) -> SegmentationDataset:
    """The data set that a config names.

    Args:
        cfg: these keys, all optional but `root` where data are read from there:
            name: "" for files, or "made-up".
            root: folder, or uncompressed tar of such.
            layout: "folders" (default; images/SPLIT/X.jpg, masks/SPLIT/X.png), "ade20k" or
                "cityscapes", see `LAYOUTS`. A mask's pixels are class ids; 255 is void.
            split: of the layout's names; that of training or of evaluation unless given.
            classes: names, in order; by default the layout's, or those in root/classes.json.
            num_classes: where classes have no names, and else checked.
            reduce_zero_label: whether 0 is void and k the class k - 1; by default as the layout.
            num_samples: so many images, evenly spaced; of "made-up" ones 256 unless given.
            on_corrupt: of an image or mask that cannot be used (missing, of another size, with
                unknown ids): "skip" puts another sample in its place and names it (default in
                training), "error" stops (default in evaluation). Masks without image are named,
                and "error" stops at them.
            img_size: of "made-up" images, 64 unless given.
        transform: of image and mask.
        is_training: chooses the defaults.
        seed: of the run.

    Raises:
        ValueError: unknown keys, data that are not there or not what the config says.
    """
    of_files = {"root", "layout", "classes", "reduce_zero_label"}
    cfg = _dense.dataset_config(cfg, DATASET_KEYS, of_files, is_training)
    num_samples = cfg.get("num_samples")
    if cfg["name"] == "made-up":
        source = _MadeUpSource(
            num_samples or 256,
            cfg.get("num_classes", 4),
            cfg.get("img_size", 64),
            cfg.get("split", "train" if is_training else "val"),
        )
        num_samples = None
    else:
        source = _file_source(cfg, is_training)
    return SegmentationDataset(
        source, transform, on_corrupt=cfg["on_corrupt"], num_samples=num_samples, seed=seed
    )


def _file_source(cfg: Mapping[str, Any], is_training: bool) -> _MaskSource:
    layout_name, root = cfg.get("layout", "folders"), str(cfg.get("root", ""))
    if layout_name not in LAYOUTS:
        raise ValueError(f"dataset.layout must be one of {', '.join(LAYOUTS)}, got {layout_name!r}")
    layout = LAYOUTS[layout_name]
    if not root or not os.path.exists(root):
        raise ValueError(
            f"dataset.root={root!r} does not exist: give a folder with {layout.images} and "
            f"{layout.masks}, or a .tar of such; name='made-up' needs no files"
        )
    files = open_files(root)
    split = cfg.get("split", layout.splits[0 if is_training else 1])
    images, masks = (folder.format(split=split) for folder in (layout.images, layout.masks))
    extensions = tuple(image_extensions())
    pairs = []
    for image in files.below(images):
        stem, extension = os.path.splitext(image)
        if extension.lower() in extensions and stem.endswith(layout.image_tail):
            common = stem.removesuffix(layout.image_tail).removeprefix(images)
            pairs.append((image, masks + common + layout.mask_tail))
    if not pairs:
        raise ValueError(
            f"dataset.root={root!r} has no images in {images} (layout {layout_name!r}): correct "
            "root, layout or split"
        )
    known = {mask for _, mask in pairs}
    lone = [m for m in files.below(masks) if m.endswith(layout.mask_tail) and m not in known]
    if lone:
        message = f"{len(lone)} masks have no image, the first {files.label(lone[0])}"
        if cfg["on_corrupt"] == "error":
            raise ValueError(f"{message}: remove them, or set dataset.on_corrupt='skip'")
        logger.warning("%s: they are not used", message)
    names = _class_names(cfg, files, layout)
    return _MaskSource(files, pairs, _table(cfg, layout, len(names)), names)


def _class_names(cfg: Mapping[str, Any], files: Files, layout: Layout) -> list[str]:
    names = list(cfg.get("classes", layout.classes))
    if not names:
        try:
            names = [str(name) for name in json.loads(files.read("classes.json"))]
        except FileNotFoundError:
            if "num_classes" not in cfg:
                raise ValueError(
                    "the data set names no classes: give dataset.classes or num_classes, or put "
                    "a list of names in classes.json"
                ) from None
            names = [f"class {index}" for index in range(cfg["num_classes"])]
    if len(names) != cfg.get("num_classes", len(names)) or not 0 < len(names) < VOID:
        raise ValueError(
            f"num_classes={cfg.get('num_classes')}, but {len(names)} classes are named; there may "
            f"be 1 to {VOID - 1}"
        )
    return names


def _table(cfg: Mapping[str, Any], layout: Layout, classes: int) -> np.ndarray:
    table = np.full(VOID + 1, UNKNOWN, dtype=np.int16)
    table[VOID] = VOID
    if layout.ids:
        if cfg.get("reduce_zero_label"):
            raise ValueError("dataset.reduce_zero_label has no effect on this layout: remove it")
        table[: max(layout.ids) + 1] = VOID
        table[list(layout.ids)] = np.arange(len(layout.ids))
    elif cfg.get("reduce_zero_label", layout.reduce_zero_label):
        table[0] = VOID
        table[1 : classes + 1] = np.arange(classes)
    else:
        table[:classes] = np.arange(classes)
    return table


def collate(samples: Sequence[SegmentationSample]) -> dict[str, Any]:
    """Batch samples: images (B, 3, h, w) and targets (B, H, W) uint8, corrupt [(file, reason)].

    Raises:
        ValueError: images of several sizes.
    """
    sizes = {(tuple(s.image.shape[1:]), tuple(s.target.shape)) for s in samples}
    if len(sizes) > 1:
        listed = " and ".join(f"{h} x {w}" for (h, w), _ in sorted(sizes))
        raise ValueError(f"images of one batch have several sizes, {listed}: set batch_size=1")
    return {
        "images": torch.stack([sample.image for sample in samples]),
        "targets": torch.stack([sample.target for sample in samples]),
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
    comes once on one rank, whole, with its mask at its own size.

    Args:
        cfg: these keys, of which `dataset` and `batch_size` are needed:
            task: "segmentation".
            dataset: see `build_dataset`.
            batch_size: of each process; 1 in an evaluation of images of several sizes.
            num_workers: reading processes, 0 (default) reads in this one.
            crop_size: in training, needed: (height, width).
            short_side: pixels to which the shorter side is resized, in training before the random
                scale; the size is kept unless given.
            augmentation: in training, further arguments of
                `vim.heads.segmentation_transforms.TrainingTransform`.
            mean: of the images in 0..1, the colour beyond them.
            drop_last: leave out the last, smaller batch: default in training, refused otherwise.
            persistent_workers, multiprocessing_context: see `vim.engine.data.build_loader`.
        seed: of the run.
        rank, world_size: of this process.
        is_training: else evaluation.

    Raises:
        ValueError: unknown or contradictory keys, data that are not there, not one whole batch.
    """
    cfg = _dense.loader_config(cfg, LOADER_KEYS, AUGMENTATION, is_training)
    if is_training:
        transform = TrainingTransform(
            cfg["crop_size"],
            short_side=cfg.get("short_side"),
            mean=cfg.get("mean", IMAGENET_DEFAULT_MEAN),
            **cfg["augmentation"],
        )
    else:
        transform = EvaluationTransform(cfg.get("short_side"))
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
