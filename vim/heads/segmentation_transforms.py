"""Images and their masks to what a segmenter trains on, and is evaluated on."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

__all__ = ["VOID", "EvaluationTransform", "TrainingTransform"]

VOID = 255
"""In masks: pixels that neither train nor count."""
CROP_ATTEMPTS = 10
# Of mmsegmentation's PhotoMetricDistortion, each applied or not on its own.
PHOTOMETRIC = {
    "brightness": (1 - 32 / 255, 1 + 32 / 255),
    "contrast": (0.5, 1.5),
    "saturation": (0.5, 1.5),
    "hue": (-0.1, 0.1),
}


class TrainingTransform:
    """A crop of an image and of its mask, at a random scale: to (3, h, w) and (h, w), both uint8.

    The recipe of mmsegmentation: scale, crop, flip, distort colours. What a crop shows beyond the
    image is void. All draws come from torch's CPU generator.

    Args:
        crop_size: (h, w) of the crop.
        short_side: pixels to which a scale of 1 resizes the shorter side; None keeps the size.
        scale: the least and the greatest factor.
        max_class_share: a crop of which one class has this share or more is drawn again, ten times
            at most; 1 takes the first.
        hflip: share of images that are mirrored.
        photometric: probability of each of brightness, contrast, saturation and hue to be changed.
        mean: colour beyond the image, in 0..1.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        *,
        short_side: int | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        hflip: float = 0.5,
        photometric: float = 0.5,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
    ) -> None:
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(f"crop_size must be (height, width) in pixels, got {crop_size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (least, greatest), both above 0, got {scale}")
        shares = {"max_class_share": max_class_share, "hflip": hflip, "photometric": photometric}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        self.short_side = _checked_side(short_side)
        self.scale = tuple(scale)
        self.max_class_share = max_class_share
        fill = {ImageTensor: [round(255 * value) for value in mean], Mask: VOID}
        self.crop = v2.RandomCrop(list(crop_size), pad_if_needed=True, fill=fill)
        self.flip = v2.RandomHorizontalFlip(hflip)
        self.distort = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(**{name: bounds})], photometric)
                for name, bounds in PHOTOMETRIC.items()
            ]
        )

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels, labels = F.to_image(image), Mask(torch.from_numpy(mask))
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        size = _scaled(labels.shape, factor, self.short_side)
        pixels = F.resize(pixels, size, antialias=True)
        labels = F.resize(labels, size)
        for _ in range(CROP_ATTEMPTS):
            cropped = self.crop(pixels, labels)
            if self.max_class_share == 1 or self._is_mixed(cropped[1]):
                break
        pixels, labels = self.flip(*cropped)
        return _plain(self.distort(pixels)), _plain(labels)

    def _is_mixed(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.flatten().long(), minlength=VOID + 1)[:VOID]
        return bool(counts.max() < self.max_class_share * counts.sum())


class EvaluationTransform:
    """A whole image, perhaps resized, and its mask as it is: to (3, h, w) and (H, W), both uint8.

    Args:
        short_side: pixels to which the image's shorter side is resized; None keeps the size.
    """

    def __init__(self, short_side: int | None = None) -> None:
        self.short_side = _checked_side(short_side)

    def __call__(self, image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = F.to_image(image)
        if self.short_side is not None:
            size = _scaled(mask.shape, 1.0, self.short_side)
            pixels = F.resize(pixels, size, antialias=True)
        return _plain(pixels), torch.from_numpy(mask)


def _checked_side(short_side: int | None) -> int | None:
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side must be in pixels, 1 or more, or None, got {short_side}")
    return short_side


def _scaled(size: Sequence[int], factor: float, short_side: int | None) -> list[int]:
    if short_side is not None:
        factor *= short_side / min(size)
    return [max(1, round(side * factor)) for side in size]


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)
