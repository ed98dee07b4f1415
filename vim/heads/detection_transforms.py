"""Images with boxes and masks to what a detector trains on."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from .segmentation_transforms import PHOTOMETRIC

__all__ = ["DetectionTransform"]


class DetectionTransform:
    """A crop of an image at a random scale, its boxes and masks: large-scale jitter.

    Scale, crop, flip, and on request distort colours. The image at a scale of 1 is the largest
    that fits into the crop; what the crop shows beyond it, at the right and the bottom as in
    evaluation, has the colour `mean`. Objects of which the crop shows nothing are left out. All
    draws come from torch's CPU generator.

    Source: Ghiasi et al. 2020, "Simple Copy-Paste", arXiv:2012.07177, section 3, whose scales of
    0.1 to 2 ViTDet has, too.

    Args:
        crop_size: (h, w) of the crop.
        scale: the least and the greatest factor.
        hflip: share of images that are mirrored.
        photometric: probability of each of brightness, contrast, saturation and hue to be changed.
        tight_boxes: boxes are made anew around what the crop shows of the masks, where there are
            masks; else boxes are cut off at the crop.
        min_box: side in pixels under which a box is left out.
        mean: colour beyond the image, in 0..1.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        *,
        scale: Sequence[float] = (0.1, 2.0),
        hflip: float = 0.5,
        photometric: float = 0.0,
        tight_boxes: bool = True,
        min_box: float = 1.0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
    ) -> None:
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(f"crop_size must be (height, width) in pixels, got {crop_size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (least, greatest), both above 0, got {scale}")
        for name, value in {"hflip": hflip, "photometric": photometric}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        if min_box <= 0:
            raise ValueError(f"min_box must be above 0 pixels, got {min_box}")
        self.fill = [round(255 * value) for value in mean]
        self.crop_size, self.scale = tuple(crop_size), tuple(scale)
        self.crop = v2.RandomCrop(list(crop_size))
        self.flip = v2.RandomHorizontalFlip(hflip)
        self.distort = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(**{name: bounds})], photometric)
                for name, bounds in PHOTOMETRIC.items()
            ]
        )
        self.tight_boxes = tight_boxes
        self.min_box = min_box

    def __call__(
        self, image: Image.Image, boxes: Tensor, labels: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the crop (3, h, w) uint8 and its target.

        Args:
            image: in RGB.
            boxes: (N, 4) float32 of left, top, right and bottom in pixels.
            labels: (N,) int64.
            masks: (N, H, W) uint8, or None where there are none.

        Returns:
            The crop, and a dict of `boxes`, `labels` and, where there are such, `masks`.
        """
        size = (image.height, image.width)
        sample = {
            "image": F.to_image(image),
            "boxes": BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=size),
        }
        if masks is not None:
            sample["masks"] = Mask(masks)
        low, high = self.scale
        factor = low + (high - low) * torch.rand(()).item()
        # v2.ScaleJitter takes height for width where the crop isn't square.
        factor *= min(c / s for c, s in zip(self.crop_size, size, strict=True))
        scaled = [max(1, round(factor * side)) for side in size]
        sample = {name: F.resize(x, scaled, antialias=True) for name, x in sample.items()}
        sample = self.crop(self._padded(self.flip(sample), scaled))
        boxes = sample["boxes"].as_subclass(Tensor)
        target = {"labels": labels}
        if masks is not None:
            target["masks"] = sample["masks"].as_subclass(Tensor)
            keep = target["masks"].flatten(1).bool().any(1)
            if self.tight_boxes:
                boxes = torch.zeros_like(boxes)
                # The last row and column belong to the object.
                rims = torch.tensor([0, 0, 1, 1])
                boxes[keep] = (masks_to_boxes(target["masks"][keep]) + rims).to(boxes.dtype)
        else:
            keep = torch.ones(len(boxes), dtype=torch.bool)
        keep &= ((boxes[:, 2:] - boxes[:, :2]) >= self.min_box).all(1)
        target = {name: value[keep] for name, value in {"boxes": boxes, **target}.items()}
        return self.distort(sample["image"]).as_subclass(Tensor), target

    def _padded(self, sample: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
        """Make a sample of a `size` of (height, width) at least as large as the crop."""
        bottom, right = (max(0, c - s) for c, s in zip(self.crop_size, size, strict=True))
        return {
            name: F.pad(x, [0, 0, right, bottom], fill=self.fill if name == "image" else 0)
            for name, x in sample.items()
        }
