"""From a loader's batch to a model's input, on the device: normalising, erasing, mixing."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["Preprocessor"]


@MODELS.register_module(name="VimPreprocessor")
class Preprocessor(BaseDataPreprocessor):
    """Images (B, 3, H, W) uint8 to normalised float32 on the device; targets to what a loss takes.

    x = (image - 255 mean) / (255 std), in float32 whatever the model's dtype. In training, some
    images are erased in part (Zhong et al. 2017, arXiv:1708.04896), then all are mixed with the
    batch in reverse: all of x (mixup, Zhang et al. 2018, arXiv:1710.09412) or a box of it (CutMix,
    Yun et al. 2019, arXiv:1905.04899). The draws come from the global generators, which the
    training loop seeds (`vim.engine.seeding.seed_everything_at`).

    Args:
        mean, std: of each channel, in 0..1.
        channels_last: the memory format of the images.
        re_prob: share of images that are erased.
        re_mode: what an erased box shows: "const" 0, "rand" one random colour, "pixel" noise.
        re_count: at most so many boxes an image.
        mixup, cutmix: alpha of the Beta distribution of lambda; 0 turns it off.
        cutmix_minmax: instead of cutmix, the least and greatest side of a box, as shares.
        mixup_prob: share of batches (or elements) that are mixed.
        mixup_switch_prob: of these, the share with cutmix, where both are on.
        mixup_mode: one lambda for the "batch", for each "pair" or for each "elem" of it.
        mixup_until: share of the training after which images are mixed no more.
        label_smoothing: this much of each target is spread evenly over the classes.
        num_classes: needed where targets become soft.

    Raises:
        ValueError: an argument out of its range, or `num_classes` missing.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        channels_last: bool = False,
        re_prob: float = 0.0,
        re_mode: Literal["const", "rand", "pixel"] = "const",
        re_count: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        cutmix_minmax: tuple[float, float] | None = None,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        mixup_mode: Literal["batch", "pair", "elem"] = "batch",
        mixup_until: float = 1.0,
        label_smoothing: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(non_blocking=True)
        shares = {
            "re_prob": re_prob,
            "mixup_prob": mixup_prob,
            "mixup_switch_prob": mixup_switch_prob,
            "mixup_until": mixup_until,
            "label_smoothing": label_smoothing,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must be 3 numbers, std above 0; got {mean} and {std}")
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"mixup and cutmix must be at least 0, got {mixup} and {cutmix}")
        choices = {"re_mode": ("const", "rand", "pixel"), "mixup_mode": ("batch", "pair", "elem")}
        for (name, allowed), value in zip(choices.items(), (re_mode, mixup_mode), strict=True):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        mixes = mixup > 0 or cutmix > 0 or cutmix_minmax is not None
        if (mixes or label_smoothing) and num_classes is None:
            raise ValueError("mixup, cutmix and label_smoothing need num_classes for soft targets")
        # No buffers: these stay float32 in a model cast to bfloat16, and out of checkpoints.
        self._mean = torch.tensor([255 * value for value in mean]).view(1, 3, 1, 1)
        self._std = torch.tensor([255 * value for value in std]).view(1, 3, 1, 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.mixup_until = mixup_until
        self.progress = 0.0  # of the training, from 0 to 1; the training loop sets it
        self.erasing = None
        if re_prob > 0:
            self.erasing = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu")
        self.mixing = None
        if mixes:
            self.mixing = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                cutmix_minmax=cutmix_minmax,
                prob=mixup_prob,
                switch_prob=mixup_switch_prob,
                mode=mixup_mode,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Tensor]:
        """Prepare a batch of the loader.

        Args:
            data: images (B, 3, H, W) uint8 and targets (B,) int64; other entries are left out.
            training: erase, mix and smooth, as configured.

        Returns:
            images (B, 3, H, W) float32 and targets: (B,) int64 class indices, or in training
            (B, num_classes) float32 where they are mixed or smoothed.

        Raises:
            TypeError: images of another dtype.
            ValueError: a batch that cannot be mixed in pairs.
        """
        images = data["images"].to(self.device, non_blocking=True)
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in 0..255, got {images.dtype}")
        targets = data["targets"].to(self.device, non_blocking=True)
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)
        images = images.to(torch.float32, memory_format=self.memory_format)
        images = images.sub_(self._mean).div_(self._std)
        if not training:
            return {"images": images, "targets": targets}
        if self.erasing is not None:
            self.erasing.device = images.device
            images = self.erasing(images)
        if self.mixing is not None:
            self._check_even(len(images))
            self.mixing.mixup_enabled = self.progress < self.mixup_until
            images, targets = self.mixing(images, targets)
        elif self.label_smoothing:
            targets = mixup_target(targets, self.num_classes, smoothing=self.label_smoothing)
        return {"images": images, "targets": targets}

    def check_loader(self, loader: DataLoader) -> None:
        """Raise before training what would else fail at its first, or an epoch's last, batch.

        Args:
            loader: of training, whose data set may be read by index or not.

        Raises:
            ValueError: a batch of the loader cannot be mixed in pairs.
        """
        if self.mixing is None:
            return
        self._check_even(loader.batch_size)
        if not loader.drop_last:
            samples = loader.sampler if hasattr(loader.sampler, "__len__") else loader.dataset
            self._check_even(len(samples) % loader.batch_size)

    def _check_even(self, batch_size: int) -> None:
        if batch_size % 2:
            raise ValueError(
                f"mixup and cutmix mix a batch in pairs: it must be even, got {batch_size} images; "
                "give the dataloader an even batch_size and drop_last=True"
            )
