"""Image transforms in front of a model: timm's, and sizes that change during training."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor

from ._keys import check_keys
from .seeding import Stream, derived_seed

Size = int | tuple[int, int]
Transform = Callable[[Image.Image], Tensor]

# Of timm's create_transform: what the loader itself decides, and what serves another purpose.
NOT_AUGMENTATION = {
    "input_size",
    "is_training",
    "mean",
    "std",
    "crop_pct",
    "tf_preprocessing",
    "use_prefetcher",
    "normalize",
    "separate",
    "naflex",
    "patch_size",
    "max_seq_len",
    "patchify",
    "patchify_channels_last",
    "patchify_flatten",
}
ERASING = {"re_prob", "re_mode", "re_count", "re_num_splits"}
AUGMENTATION = (
    set(inspect.signature(create_transform).parameters) - NOT_AUGMENTATION - ERASING
) | {"three_augment"}
EVALUATION_AUGMENTATION = {"interpolation", "crop_mode", "crop_border_pixels"}


class ResolutionTransform:
    """The transform of a sample where the image size changes with the epoch or the batch.

    Args:
        make: the transform for a size.
        resolutions: (first epoch, size) in rising order from epoch 0.
        mixed: sizes, of which each batch has one, drawn by (seed, epoch, batch) for all ranks.
        batch_samples: samples of a batch on all ranks together.
        seed: of the draw.
    """

    def __init__(
        self,
        make: Callable[[Size], Transform],
        *,
        resolutions: Sequence[tuple[int, Size]] = (),
        mixed: Sequence[Size] = (),
        batch_samples: int = 1,
        seed: int = 0,
    ) -> None:
        if bool(resolutions) == bool(mixed):
            raise ValueError("give either resolutions or mixed_resolutions")
        epochs = [epoch for epoch, _ in resolutions]
        if resolutions and (epochs[0] != 0 or epochs != sorted(set(epochs))):
            raise ValueError(
                "resolutions must be (first epoch, size) with rising epochs from 0, "
                f"such as [(0, 128), (200, 224)]; got {list(resolutions)}"
            )
        self.epochs = epochs
        self.batch_samples = batch_samples
        self.seed = seed
        self.transforms = [make(size) for size in mixed or [size for _, size in resolutions]]

    def at(self, epoch: int, position: int) -> Transform:
        """The transform of the sample at a position, counted over all ranks, of an epoch."""
        if self.epochs:
            return self.transforms[sum(first <= epoch for first in self.epochs) - 1]
        batch = position // self.batch_samples
        draw = derived_seed(self.seed, Stream.RESOLUTION, epoch, batch)
        return self.transforms[draw % len(self.transforms)]


def build_transform(
    cfg: Mapping[str, Any], is_training: bool, *, batch_samples: int, seed: int
) -> Transform | ResolutionTransform:
    """The transform that a loader's config names, see `vim.engine.data.build_loader`.

    Args:
        cfg: of the loader.
        is_training: else evaluation.
        batch_samples, seed: see `ResolutionTransform`.
    """
    augmentation = dict(cfg.get("augmentation", {}))
    for key in ERASING & augmentation.keys():
        raise ValueError(
            f"augmentation.{key}: erasing runs on the device, give {key} to the "
            "data_preprocessor (VimPreprocessor)"
        )
    what = "augmentation" if is_training else "the augmentation of an evaluation"
    check_keys(what, augmentation, AUGMENTATION if is_training else EVALUATION_AUGMENTATION)
    if augmentation.pop("three_augment", False):
        if augmentation.get("auto_augment"):
            raise ValueError("three_augment and auto_augment exclude each other: give one")
        augmentation = {"color_jitter": 0.3, **augmentation, "auto_augment": "3a"}
    augmentation.setdefault("interpolation", "bicubic")

    def make(size: Size) -> Transform:
        transform = create_transform(
            _checked_size(size),
            is_training=is_training,
            mean=tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN)),
            std=tuple(cfg.get("std", IMAGENET_DEFAULT_STD)),
            crop_pct=cfg.get("crop_pct"),
            use_prefetcher=True,
            **augmentation,
        )
        _mend_posterize(transform)
        return transform

    given = [key for key in ("input_size", "resolutions", "mixed_resolutions") if key in cfg]
    if len(given) != 1:
        raise ValueError(
            "a dataloader needs one of input_size, resolutions and mixed_resolutions, "
            f"got {' and '.join(given) or 'none'}"
        )
    if "input_size" in cfg:
        return make(cfg["input_size"])
    return ResolutionTransform(
        make,
        resolutions=cfg.get("resolutions", ()),
        mixed=cfg.get("mixed_resolutions", ()),
        batch_samples=batch_samples,
        seed=seed,
    )


def _checked_size(size: Size) -> Size:
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(sides) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"an image size is an integer or (height, width) in pixels, got {size!r}")
    return size if isinstance(size, int) else sides


def _mend_posterize(transform) -> None:
    """Have timm's operations keep one bit at least: its strongest level asks Pillow for none.

    Pillow raises a ValueError for that, and made the image black in earlier versions.
    """
    for step in transform.transforms:
        policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in (operation for policy in policies for operation in policy):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **options)
