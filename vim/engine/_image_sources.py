"""Where labelled images come from: folders, archives, libraries, or nowhere."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_in_tar import extract_tarinfos

from .images import FORMATS, to_rgb

TRAIN, EVALUATION = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation")
ITERABLE = ("wds", "hfids", "tfds")
DATASET_KEYS = {
    "name",
    "root",
    "split",
    "class_map",
    "num_classes",
    "num_samples",
    "on_corrupt",
    "img_size",
    "input_key",
    "target_key",
    "download",
    "cache",
}


def image_extensions() -> list[str]:
    """Of the files in a folder or an archive that are taken for images, such as ".webp"."""
    Image.init()
    return sorted(ext for ext, form in Image.registered_extensions().items() if form in FORMATS)


class Source(Protocol):
    """Labelled images by index: what `ImageDataset` reads."""

    class_names: list[str] | None

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image as RGB and its class; any exception means that it cannot be read."""

    def name(self, index: int) -> str:
        """The file, as the user can find it."""


def decode(data: bytes) -> Image.Image:
    """The image in a file's bytes as RGB, upright; any exception means that it is broken."""
    if not data:
        raise ValueError("the file is empty")
    Image.init()  # without, a process's first image finds no formats registered
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(FORMATS & Image.OPEN.keys()))
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image, or none of {', '.join(sorted(FORMATS))}") from error
    with image:
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def class_names_of(class_to_idx: Mapping[Any, int]) -> list[str]:
    """Class names by index; an index that no class has is named by its number."""
    names = {index: str(name) for name, index in class_to_idx.items()}
    return [names.get(index, str(index)) for index in range(max(names, default=-1) + 1)]


class _ReaderSource:
    """A folder of class folders, or a Hugging Face data set, through timm's reader."""

    def __init__(self, reader) -> None:
        self.reader = reader
        self.class_names = class_names_of(reader.class_to_idx) or None

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return decode(file.read()), int(target)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index, absolute=True) or f"image {index}")


class _TarSource:
    """A tar of class folders (or of tars of classes), found by timm and read by offset.

    timm's reader keeps the archive open, and forked workers would share its place in the file; it
    keeps an object for each member, too, where two numbers and the name do.
    """

    def __init__(self, root: str, class_map: str | dict[str, int] | None) -> None:
        class_to_idx = load_class_map(class_map) if class_map else None
        members, self.targets, class_to_idx, _ = extract_tarinfos(
            root, class_to_idx, extensions=image_extensions()
        )
        self.root = root
        self.class_names = class_names_of(class_to_idx)
        # `outer` is the member that is an archive itself and holds the image.
        members = [(info, outer) for info, _, outer in members]
        offsets = [
            info.offset_data + (outer.offset_data if outer else 0) for info, outer in members
        ]
        names = [f"{outer.name}:{info.name}" if outer else info.name for info, outer in members]
        self.offsets = np.array(offsets)
        self.sizes = np.array([info.size for info, _ in members])
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        with open(self.root, "rb") as file:
            file.seek(self.offsets[index])
            data = file.read(self.sizes[index])
        if len(data) < self.sizes[index]:
            raise ValueError(f"the archive ends after {len(data)} of {self.sizes[index]} bytes")
        return decode(data), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.root}:{os.fsdecode(self.names[index])}"


class _TorchSource:
    """One of torchvision's data sets."""

    def __init__(self, dataset, label: str) -> None:
        self.dataset = dataset
        self.label = label
        self.class_names = [str(name) for name in getattr(dataset, "classes", [])] or None

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return to_rgb(image), int(target)

    def name(self, index: int) -> str:
        samples = getattr(self.dataset, "samples", None)
        return str(samples[index][0]) if samples else f"{self.label}[{index}]"


class _MadeUpSource:
    """Noise tinted by class, so that a model can learn it; for tests and debug configs."""

    def __init__(self, num_samples: int, num_classes: int, img_size: int, split: str) -> None:
        self.num_samples = num_samples
        self.img_size = img_size
        self.split = split
        self.class_names = [str(index) for index in range(num_classes)]

    def __len__(self) -> int:
        return self.num_samples

    def load(self, index: int) -> tuple[Image.Image, int]:
        target = index % len(self.class_names)
        tint = np.random.default_rng(target).integers(256, size=3)
        noise = np.random.default_rng([index, self.split in TRAIN])
        pixels = noise.integers(256, size=(self.img_size, self.img_size, 3))
        return Image.fromarray(((pixels + tint) // 2).astype(np.uint8)), target

    def name(self, index: int) -> str:
        return f"made-up image {index}"


class _DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8 x 8; every fifth is of the validation split."""

    def __init__(self, split: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError("name='digits' needs scikit-learn: pip install it") from error

        digits = load_digits()
        validation = np.arange(len(digits.target)) % 5 == 0
        chosen = ~validation if split in TRAIN else validation
        self.pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[chosen]
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.targets[index])

    def name(self, index: int) -> str:
        return f"digit {index}"


class _DecodedSource:
    """Another source's images, decoded once and kept in memory: H W 3 bytes each.

    Workers that are forked share the memory; those that are spawned get a copy each. What cannot
    be read is left to the source, which fails again when it is asked for.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.class_names = source.class_names
        self.samples: list[tuple[np.ndarray, int] | None] = []
        for index in range(len(source)):
            try:
                image, target = source.load(index)
                self.samples.append((np.asarray(image), target))
            except Exception:  # a broken file may lead a decoder to any exception
                self.samples.append(None)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> tuple[Image.Image, int]:
        sample = self.samples[index]
        if sample is None:
            return self.source.load(index)
        return Image.fromarray(sample[0]), sample[1]

    def name(self, index: int) -> str:
        return self.source.name(index)


def prefix_of(name: str) -> str:
    """The library in the name of a data set, such as "hfds"; "" where it has none."""
    return name.partition("/")[0].lower() if "/" in name else ""


def check_applicable(cfg: Mapping[str, Any]) -> None:
    """Raise a ValueError for an unknown name, and for keys that its kind of set would ignore."""
    name, prefix = cfg["name"], prefix_of(cfg["name"])
    in_memory = name in ("made-up", "digits")
    if prefix not in ("hfds", "torch", *ITERABLE) and name and not in_memory:
        raise ValueError(
            f"unknown data set name {name!r}: allowed are '' (a folder of class folders or a tar "
            "of such, in root), 'hfds/NAME', 'torch/NAME', 'wds/NAME', 'hfids/NAME', 'tfds/NAME', "
            "'made-up' and 'digits'"
        )
    applies = {
        "img_size": name == "made-up",
        "root": not in_memory,
        "class_map": prefix != "torch" and not in_memory,
        "input_key": prefix in ("hfds", *ITERABLE),
        "target_key": prefix in ("hfds", *ITERABLE),
        "download": prefix in ("torch", "hfids", "tfds"),
        "cache": prefix not in ITERABLE,
    }
    for key in applies.keys() & cfg.keys():
        if not applies[key]:
            raise ValueError(f"dataset.{key} has no effect on name={name!r}: remove it")
    if in_memory and cfg["split"] not in (*TRAIN, *EVALUATION):
        raise ValueError(f"{name} has the splits train and validation, got {cfg['split']!r}")


def build_source(cfg: Mapping[str, Any]) -> Source:
    """The images by index that a config names, checked by `check_applicable`."""
    cache = cfg.get("cache")
    if cache not in (None, "decoded"):
        raise ValueError(f"dataset.cache must be None or 'decoded', got {cache!r}")
    source = _read_source(cfg)
    return source if cache is None else _DecodedSource(source)


def _read_source(cfg: Mapping[str, Any]) -> Source:
    name, prefix = cfg["name"], prefix_of(cfg["name"])
    if name == "made-up":
        return _MadeUpSource(
            cfg.get("num_samples", 256),
            cfg.get("num_classes", 10),
            cfg.get("img_size", 64),
            cfg["split"],
        )
    if name == "digits":
        return _DigitsSource(cfg["split"])
    if not prefix:
        return _local_source(cfg)
    dataset = create(cfg)
    return _TorchSource(dataset, name) if prefix == "torch" else _ReaderSource(dataset.reader)


def _local_source(cfg: Mapping[str, Any]) -> Source:
    root = str(cfg.get("root", ""))
    if not root or not os.path.exists(root):
        raise ValueError(
            f"dataset.root={root!r} does not exist: give a folder with a folder of images for each "
            "class, or a .tar of such folders; name='digits' and name='made-up' need no files"
        )
    if os.path.isfile(root):
        try:
            return _TarSource(root, cfg.get("class_map"))
        except Exception as error:  # whatever a broken archive leads timm to
            raise ValueError(
                f"dataset.root={root!r} is no .tar of class folders with images: {error}"
            ) from error
    reader = create(cfg, input_key=";".join(image_extensions())).reader
    found = sorted(path.name for path in Path(root).iterdir() if path.name in (*TRAIN, *EVALUATION))
    if Path(reader.root) == Path(root) and found:
        raise ValueError(
            f"dataset.root={root!r} has no folder for the split {cfg['split']!r}, only {found}: "
            "set dataset.split to one of these, or dataset.root to the folder of class folders"
        )
    return _ReaderSource(reader)


def create(cfg: Mapping[str, Any], **options: Any):
    """timm's data set for a config, built with these options beside those in the config."""
    for key in ("class_map", "input_key", "target_key", "download"):
        if key in cfg:
            options[key] = cfg[key]
    try:
        return create_dataset(cfg["name"], root=cfg.get("root"), split=cfg["split"], **options)
    except Exception as error:  # of whichever library reads this kind of data set
        raise ValueError(
            f"cannot open the data set name={cfg['name']!r} root={cfg.get('root')!r} "
            f"split={cfg['split']!r}: {type(error).__name__}: {error}"
        ) from error


def check_classes(class_names: list[str] | None, cfg: Mapping[str, Any]) -> None:
    """Raise a ValueError where the classes that were found are not those of the config."""
    if class_names is None or "num_classes" not in cfg:
        return
    found, given = len(class_names), cfg["num_classes"]
    if found > given or (found < given and "class_map" not in cfg):
        raise ValueError(
            f"num_classes={given}, but there are {found} classes, {', '.join(class_names[:3])} ...:"
            " correct it or give class_map (without, a class is the place of its folder's name in "
            "their order, which one missing folder shifts)"
        )
