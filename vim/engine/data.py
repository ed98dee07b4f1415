"""Labelled images for training and evaluation: sources, samplers, transforms, loaders.

Images leave the loader as uint8; the device does the rest (`vim.engine.preprocessing`). What is
random about a sample is a function of (seed, epoch, position in the epoch), see
`vim.engine.seeding`: neither the number of workers nor a resumed run changes it.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.readers.shared_count import SharedCount
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)

from ._image_sources import (
    DATASET_KEYS,
    ITERABLE,
    Source,
    build_source,
    check_applicable,
    check_classes,
    class_names_of,
    create,
    prefix_of,
)
from ._image_transforms import ResolutionTransform, Transform, build_transform
from ._keys import given_keys
from .seeding import Stream, derived_seed, seeded

__all__ = [
    "EpochSampler",
    "ImageDataset",
    "Loader",
    "ResolutionTransform",
    "Sample",
    "StreamDataset",
    "build_dataset",
    "build_loader",
    "collate",
    "loader_builder",
    "make_loader",
]

logger = logging.getLogger("vim.data")

# Unreadable images in a row after which the storage is at fault rather than single files.
MAX_ATTEMPTS = 10
LOADER_KEYS = {
    "task",
    "dataset",
    "batch_size",
    "num_workers",
    "input_size",
    "augmentation",
    "crop_pct",
    "mean",
    "std",
    "repeats",
    "drop_last",
    "resolutions",
    "mixed_resolutions",
    "persistent_workers",
    "multiprocessing_context",
}


class Sample(NamedTuple):
    """An image (3, H, W) uint8, its class, and the (file, reason) of each it stands in for."""

    image: Tensor
    target: int
    corrupt: tuple[tuple[str, str], ...] = ()


def _transformed(
    transform: Transform | ResolutionTransform, image: Image.Image, epoch: int, position: int
) -> Tensor:
    if isinstance(transform, ResolutionTransform):
        transform = transform.at(epoch, position)
    return transform(image)


class ImageDataset(Dataset):
    """Transformed images by (epoch, position, index), as `EpochSampler` yields them.

    All that is random in the transform is a function of (seed, epoch, position); the process's
    own generators stay as they are. No file is kept open, so workers may be forked or pickled.

    Args:
        source: what to read.
        transform: from a PIL image in RGB to a uint8 tensor (3, H, W).
        on_corrupt: where an image cannot be read, "skip" puts another in its place, drawn by
            (seed, epoch, position), and says so in `Sample.corrupt`; "error" stops.
        num_samples: use so many of the images, evenly spaced; None means all.
        seed: of the run.

    Raises:
        RuntimeError: on reading: an image is unreadable under "error", or 10 are in a row.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | ResolutionTransform,
        *,
        on_corrupt: Literal["skip", "error"] = "error",
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if on_corrupt not in ("skip", "error"):
            raise ValueError(f"on_corrupt must be 'skip' or 'error', got {on_corrupt!r}")
        if num_samples is not None and not 0 < num_samples <= len(source):
            raise ValueError(f"num_samples must be in 1..{len(source)}, got {num_samples}")
        self.source = source
        self.transform = transform
        self.on_corrupt = on_corrupt
        self.num_samples = len(source) if num_samples is None else num_samples
        self.seed = seed

    @property
    def class_names(self) -> list[str] | None:
        """Class names by index, None where the source has none."""
        return self.source.class_names

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, position, index = key
        image, target, corrupt = self._load(epoch, position, index)
        with seeded(self.seed, Stream.SAMPLE, epoch, position):
            return Sample(_transformed(self.transform, image, epoch, position), target, corrupt)

    def _load(self, epoch: int, position: int, index: int):
        corrupt: list[tuple[str, str]] = []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            at = index * len(self.source) // self.num_samples
            try:
                return *self.source.load(at), tuple(corrupt)
            except Exception as error:  # a broken file may lead a decoder to any exception
                name, reason = self.source.name(at), f"{type(error).__name__}: {error}"
                if self.on_corrupt == "error":
                    raise RuntimeError(
                        f"cannot read {name} ({reason}): replace or remove the file, or set "
                        "dataset.on_corrupt='skip' to put other images in the place of such"
                    ) from error
                corrupt.append((name, reason))
            numbers = self.seed, Stream.REPLACEMENT, epoch, position, attempt
            index = derived_seed(*numbers) % self.num_samples
        name, reason = corrupt[-1]
        raise RuntimeError(
            f"{MAX_ATTEMPTS} images in a row cannot be read, the last {name} ({reason}): "
            "check that the data are where they were and complete"
        )


class StreamDataset(IterableDataset):
    """Transformed images in the order of timm's iterable readers: wds, hfids, tfds.

    The transforms draw by (seed, epoch, rank, worker, count). Which images an epoch has depends on
    the world size and the workers, and where it stands cannot be restored: a run resumed in the
    middle of an epoch sees other images for the rest of it. The reader leaves out unreadable
    images itself, with a warning of timm's.

    Args:
        dataset: timm's, without transform; it shards by rank and worker.
        transform: as for `ImageDataset`; its batches are counted in each worker.
    """

    def __init__(
        self,
        dataset: IterableImageDataset,
        transform: Transform | ResolutionTransform,
        *,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.rank = rank
        self.epoch = SharedCount()
        class_to_idx = getattr(dataset.reader, "class_to_idx", None)
        self.class_names = class_names_of(class_to_idx) if class_to_idx else None

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Reach running workers, too: the number is in shared memory."""
        self.epoch.value = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, epoch = info.id if info else 0, self.epoch.value
        for count, (image, target) in enumerate(self.dataset):
            with seeded(self.seed, Stream.SAMPLE, epoch, self.rank, worker, count):
                sample = Sample(_transformed(self.transform, image, epoch, count), int(target))
            yield sample


class EpochSampler(Sampler):
    """Yields (epoch, position, index): this rank's share of an epoch, from wherever it stands.

    The order of an epoch is drawn from (seed, epoch); rank r of w takes the positions r, r + w,
    r + 2 w, ... of it. So the samples of iteration i on all ranks are the same for every world
    size with the same total batch. With repeats=3, each image stands at 3 positions in a row, which
    go to 3 ranks where there are so many, and the epoch is cut to the length it has without:
    a third of the images is seen in it (repeated augmentation, Hoffer et al. 2020,
    arXiv:1901.09335, as in DeiT).

    Args:
        length: of the data set.
        shuffle: else the order is that of the data set.
        seed: of the run.
        rank, world_size: of this process.
        repeats: positions of each image.
        remainder: where world_size does not divide the length, "pad" goes on with the first
            samples of the order and "drop" leaves the last out, so that all ranks have as many;
            "keep" does neither, and some ranks have one more.
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        remainder: Literal["pad", "drop", "keep"] = "pad",
    ) -> None:
        if length < 1:
            raise ValueError(f"a data set must have at least one sample, got length {length}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        ends = {"pad": -(-length // world_size) * world_size, "keep": length}
        ends["drop"] = length // world_size * world_size
        if remainder not in ends:
            raise ValueError(f"remainder must be one of {sorted(ends)}, got {remainder!r}")
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.repeats = repeats
        self.positions = range(rank, ends[remainder], world_size)
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, wherever the current one starts."""
        return len(self.positions)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to an epoch, past the `start` samples of it that this rank has used already."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in 0..{len(self)}, the samples of a rank; got {start}")
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, positions = self.epoch, self.positions[self.start :]
        order = torch.arange(self.length)
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(derived_seed(self.seed, Stream.ORDER, epoch))
            order = torch.randperm(self.length, generator=generator)
        order = order.numpy()
        for position in positions:
            yield epoch, position, int(order[position % self.length // self.repeats])


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Batch samples: images (B, 3, H, W) uint8, targets (B,) int64, corrupt [(file, reason)]."""
    return {
        "images": default_collate([sample.image for sample in samples]),
        "targets": torch.tensor([sample.target for sample in samples]),
        "corrupt": [entry for sample in samples for entry in sample.corrupt],
    }


class Loader(DataLoader):
    """A DataLoader that goes to epochs and keeps account of images that could not be read.

    A batch is a dict of images (B, 3, H, W) uint8, targets (B,) int64, and corrupt: how many
    unreadable images others stand in for in it.

    Attributes:
        corrupt: file -> reason, of all that could not be read so far; each was warned about once.
    """

    corrupt: dict[str, str]

    def __init__(
        self,
        dataset: ImageDataset | StreamDataset,
        *,
        collate_fn: Callable[[Sequence[Any]], dict[str, Any]] = collate,
        **options: Any,
    ) -> None:
        self.corrupt = {}
        self._skip = 0
        super().__init__(dataset, collate_fn=collate_fn, **options)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to an epoch, past the `start` samples of it that this rank has used already.

        An iterable data set cannot: the epoch is shortened by as many batches, and has other
        images than an undisturbed run.
        """
        if isinstance(self.dataset, StreamDataset):
            self.dataset.set_epoch(epoch)
            self._skip = start // self.batch_size
            if start:
                logger.warning(
                    "an iterable data set cannot go on at sample %d of epoch %d: the rest of the "
                    "epoch has other images than an undisturbed run",
                    start,
                    epoch,
                )
        else:
            self.sampler.set_epoch(epoch, start)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._counted(super().__iter__(), len(self) - self._skip if self._skip else None)

    def _counted(self, batches: Iterator[dict[str, Any]], limit: int | None):
        for number, batch in enumerate(batches):
            if number == limit:
                return
            for file, reason in batch["corrupt"]:
                if file not in self.corrupt:
                    self.corrupt[file] = reason
                    logger.warning("cannot read %s (%s): another stands in for it", file, reason)
            yield {**batch, "corrupt": len(batch["corrupt"])}


def build_dataset(
    cfg: Mapping[str, Any],
    transform: Transform | ResolutionTransform,
    is_training: bool,
    *,
    seed: int = 0,
    rank: int = 0,
    batch_size: int = 1,
) -> ImageDataset | StreamDataset:
    """The data set that a config names.

    Args:
        cfg: these keys, all optional but `root` where data are read from there:
            name: "" for a folder of class folders or a tar of such; "hfds/NAME", "torch/NAME",
                "wds/NAME", "hfids/NAME" and "tfds/NAME" as `timm.data.create_dataset` takes them;
                "made-up"; "digits".
            root: file or folder.
            split: "train" in training and "validation" in evaluation unless given.
            class_map: class name -> index, or a text file with a class a line.
            num_classes: checked against what is found; of "made-up" images, 10 unless given.
            num_samples: so many images, evenly spaced; of an iterable set, how many there are; of
                "made-up" images, 256 unless given.
            on_corrupt: "skip" (default in training) or "error" (default in evaluation).
            img_size: of "made-up" images, 64 unless given.
            input_key, target_key: the columns, for hfds, wds, hfids and tfds.
            download: for torch, hfids and tfds.
            cache: "decoded" keeps the images decoded in memory, which takes H W 3 bytes each and
                a pass over the data at the start; not of iterable sets.
        transform: from a PIL image in RGB to a uint8 tensor (3, H, W).
        is_training: chooses the defaults; iterable sets shuffle in training.
        seed, rank: of the run and this process.
        batch_size: with which iterable sets are going to be read.

    Raises:
        ValueError: unknown keys, data that are not there or not what the config says.
    """
    cfg = given_keys("dataset", cfg, DATASET_KEYS)
    cfg.setdefault("name", "")
    cfg.setdefault("split", "train" if is_training else "validation")
    check_applicable(cfg)
    if prefix_of(cfg["name"]) in ITERABLE:
        if cfg.get("on_corrupt", "skip") != "skip":
            raise ValueError(f"{cfg['name']} can only skip unreadable images: remove on_corrupt")
        dataset = create(
            cfg,
            num_samples=cfg.get("num_samples"),
            is_training=is_training,
            batch_size=batch_size,
            seed=seed,
        )
        stream = StreamDataset(dataset, transform, seed=seed, rank=rank)
        check_classes(stream.class_names, cfg)
        return stream
    source = build_source(cfg)
    check_classes(source.class_names, cfg)
    made_up = cfg["name"] == "made-up"
    return ImageDataset(
        source,
        transform,
        on_corrupt=cfg.get("on_corrupt", "skip" if is_training else "error"),
        num_samples=None if made_up else cfg.get("num_samples"),
        seed=seed,
    )


def build_loader(
    cfg: Mapping[str, Any],
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    is_training: bool,
) -> Loader:
    """The loader that a config names; its batches are described at `Loader`.

    In training, epochs are shuffled and all ranks have as many batches. In evaluation every image
    comes once on one rank, so that a rank may have one image more than another.

    Args:
        cfg: these keys, of which `dataset` and `batch_size` are needed, and a size:
            task: "classification", see `loader_builder`.
            dataset: see `build_dataset`.
            batch_size: of each process.
            num_workers: reading processes, 0 (default) reads in this one.
            input_size: image size in pixels, an integer or (height, width).
            resolutions: instead, [(first epoch, size), ...]: the size grows with training.
            mixed_resolutions: instead, sizes of which each batch has one, drawn at random.
            augmentation: arguments of `timm.data.create_transform`, whose defaults hold but for
                interpolation="bicubic"; or three_augment=True, the 3-augment of DeiT III (grey,
                solarise or blur; colour jitter 0.3; Touvron et al. 2022, arXiv:2204.07118), the
                crop being the random resized one unless train_crop_mode says otherwise.
                In evaluation only interpolation, crop_mode and crop_border_pixels.
            crop_pct: in evaluation, the share of the resized image that the crop shows (0.875).
            mean, std: of the images in 0..1; the mean fills what transforms uncover.
            repeats: repeated augmentation, see `EpochSampler`.
            drop_last: leave out the last, smaller batch: default in training, refused otherwise.
            persistent_workers: keep workers from epoch to epoch (default).
            multiprocessing_context: "fork", "forkserver" or "spawn"; None is Python's default.
        seed: of the run.
        rank, world_size: of this process.
        is_training: else evaluation.

    Raises:
        ValueError: unknown or contradictory keys, data that are not there, not one whole batch.
    """
    cfg = given_keys("dataloader", cfg, LOADER_KEYS, needed=("dataset", "batch_size"))
    if not is_training:
        for key in ("repeats", "resolutions", "mixed_resolutions", "drop_last"):
            if cfg.get(key):
                raise ValueError(
                    f"{key}={cfg[key]!r} is for training: an evaluation takes every "
                    "image once, at one size"
                )
    elif "crop_pct" in cfg:
        raise ValueError(
            "crop_pct is for evaluation; in training, augmentation.scale says how "
            "much of an image a crop shows"
        )
    batch_size = cfg["batch_size"]
    # Iterable data sets count in each worker, whose batches are its own.
    iterable = prefix_of(cfg["dataset"].get("name") or "") in ITERABLE
    transform = build_transform(
        cfg, is_training, seed=seed, batch_samples=batch_size * (1 if iterable else world_size)
    )
    dataset = build_dataset(
        cfg["dataset"], transform, is_training, seed=seed, rank=rank, batch_size=batch_size
    )
    return make_loader(
        dataset, cfg, seed=seed, rank=rank, world_size=world_size, is_training=is_training
    )


def loader_builder(cfg: Mapping[str, Any]) -> Callable[..., Loader]:
    """The function that builds the loader of a config, by the key `task` of it.

    "classification", or none: `build_loader`. "segmentation" and "detection": `build_loader` of
    `vim.engine.segmentation_data` and `detection_data`, which need the extra `dense`.

    Raises:
        ValueError: another task.
    """
    task = cfg.get("task", "classification")
    if task == "classification":
        return build_loader
    if task not in ("segmentation", "detection"):
        raise ValueError(
            f"dataloader.task must be 'classification', 'segmentation' or 'detection', got {task!r}"
        )
    from . import detection_data, segmentation_data  # their libraries are optional

    return (segmentation_data if task == "segmentation" else detection_data).build_loader


def make_loader(
    dataset: ImageDataset | StreamDataset,
    cfg: Mapping[str, Any],
    *,
    seed: int,
    rank: int,
    world_size: int,
    is_training: bool,
    collate_fn: Callable[[Sequence[Any]], dict[str, Any]] = collate,
) -> Loader:
    """The loader of a data set that is built; see `build_loader`.

    Args:
        dataset: what to read.
        cfg: of the keys of `build_loader` those that say how: batch_size, num_workers, ...
        collate_fn: from samples to a batch with the entries of `collate`.
    """
    batch_size, num_workers = cfg["batch_size"], cfg.get("num_workers", 0)
    if batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"batch_size must be at least 1 and num_workers at least 0, got "
            f"{batch_size} and {num_workers}"
        )
    drop_last = cfg.get("drop_last", is_training)
    sampler = None
    if isinstance(dataset, StreamDataset):
        num_workers = _prepare_stream(dataset, cfg, is_training, num_workers, world_size)
    else:
        training_remainder = "drop" if drop_last else "pad"
        sampler = EpochSampler(
            len(dataset),
            shuffle=is_training,
            seed=seed,
            rank=rank,
            world_size=world_size,
            repeats=cfg.get("repeats", 1),
            remainder=training_remainder if is_training else "keep",
        )
    # torch draws the workers' own seeds from it, instead of from the global generator.
    generator = torch.Generator()
    generator.manual_seed(derived_seed(seed, Stream.WORKER, rank))
    loader = Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        persistent_workers=num_workers > 0 and cfg.get("persistent_workers", True),
        multiprocessing_context=cfg.get("multiprocessing_context") if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=generator,
        collate_fn=collate_fn,
    )
    if is_training and len(loader) == 0:
        raise ValueError(
            f"{len(dataset)} images do not make one batch of {batch_size} on each of {world_size} "
            "ranks: make batch_size smaller or set drop_last=False"
        )
    return loader


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C, and a SIGTERM to the whole process group, to the main process.

    It stops after saving a checkpoint, for which it may need batches. A SIGTERM from the main
    process itself ends the worker: that is how Python takes its children down.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parents_sigterm, daemon=True).start()


def _await_parents_sigterm() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _prepare_stream(
    dataset: StreamDataset,
    cfg: Mapping[str, Any],
    is_training: bool,
    num_workers: int,
    world_size: int,
) -> int:
    """Tell an iterable data set how it will be read; return the workers it can have."""
    if cfg.get("repeats", 1) > 1:
        raise ValueError(
            "repeated augmentation needs images by index, which an iterable data set has not: "
            "remove repeats"
        )
    if world_size > 1:
        if not is_training:
            raise ValueError(
                "an iterable data set cannot be evaluated exactly on several ranks: evaluate in "
                "one process, or unpack the shards to a folder or a .tar of class folders"
            )
        if not torch.distributed.is_initialized():
            raise ValueError(
                "an iterable data set shards by torch.distributed: initialise the process group "
                "before building the loader"
            )
    if not is_training:
        # Several workers would each end with a smaller batch of their own.
        num_workers = min(num_workers, 1)
    dataset.dataset.set_loader_cfg(num_workers=num_workers)
    return num_workers
