"""A segmenter: a pyramid of maps, UPerNet's decoder, and an auxiliary head while training."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

__all__ = ["Segmenter"]

STRIDES = [4, 8, 16, 32]


class Segmenter(nn.Module):
    """Image to logits of its size: (B, 3, H, W) -> (B, num_classes, H, W), for any H and W.

    The decoder is UPerNet (Xiao et al. 2018, arXiv:1807.10221) as segmentation_models_pytorch
    writes it, which normalises the maps; the auxiliary head is the FCN's of one convolution
    (Long et al. 2015, arXiv:1411.4038). Both together, and their widths, are official Vim's:
    https://github.com/hustvl/Vim, seg/configs.

    Args:
        encoder: image to maps of strides 4, 8, 16 and 32, with timm's `feature_info`, such as
            `timm.create_model("vim_tiny_patch16_224_pyramid", features_only=True)`.
        num_classes: of the logits.
        channels: of the decoder's maps.
        dropout: share of channels left out before each classifier.
        auxiliary_level: index of the map that the auxiliary head reads; None for no such head.
        auxiliary_channels: of it.

    Raises:
        ValueError: maps of other strides, or an index out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        channels: int = 256,
        dropout: float = 0.1,
        auxiliary_level: int | None = 2,
        auxiliary_channels: int = 256,
    ) -> None:
        super().__init__()
        strides, widths = encoder.feature_info.reduction(), encoder.feature_info.channels()
        if list(strides) != STRIDES:
            raise ValueError(
                f"a segmenter needs maps of the strides {STRIDES}, got {list(strides)}: use a "
                "vim_*_pyramid, or another backbone whose features have these"
            )
        if auxiliary_level is not None and not 0 <= auxiliary_level < len(STRIDES):
            raise ValueError(f"auxiliary_level must be 0 to 3 or None, got {auxiliary_level}")
        self.num_classes = num_classes
        self.encoder = encoder
        self.decoder = UPerNetDecoder([0, 0, *widths], len(STRIDES) + 1, channels)
        self.head = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary_level = auxiliary_level
        self.auxiliary = None
        if auxiliary_level is not None:
            self.auxiliary = nn.Sequential(
                nn.Conv2d(widths[auxiliary_level], auxiliary_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(auxiliary_channels),
                nn.ReLU(),
                nn.Dropout2d(dropout),
                nn.Conv2d(auxiliary_channels, num_classes, 1),
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        names = getattr(self.encoder, "no_weight_decay", set)()
        return {f"encoder.{name}" for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers, for layer decay.

        All but the encoder's stem and blocks is of the last layer.
        """
        return {
            "stem": r"^encoder\.(?:maps\.)?model\.(?:cls_token|reg_token|pos_embed|patch_embed)",
            "blocks": r"^encoder\.(?:maps\.)?model\.blocks\.(\d+)",
        }

    def forward(self, x: Tensor, auxiliary: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Return the logits; with `auxiliary` a tuple of them and, if it is there, that head's."""
        maps = self.encoder(x)
        # The decoder takes no notice of two finer maps, which an encoder of smp's would have.
        logits = _resized(self.head(self.decoder([x, x, *maps])), x.shape[2:])
        if not auxiliary:
            return logits
        if self.auxiliary is None:
            return (logits,)
        return logits, _resized(self.auxiliary(maps[self.auxiliary_level]), x.shape[2:])

    def predict(
        self,
        x: Tensor,
        *,
        window: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Return probabilities, the mean over what is asked for: scales, and each mirrored.

        Args:
            x: (B, 3, H, W), normalised.
            window: (h, w): the network sees so much at once, its logits averaged where windows
                overlap; an image that is smaller is padded by 0. None shows it the whole image.
            stride: (h, w) from one window to the next, at most the window; None is the window.
            scales: factors by which the image is resized.
            flip: average over the image and its mirror image.
            size: (H', W') of the answer; that of the image unless given.

        Returns:
            (B, num_classes, H', W') float32.

        Raises:
            ValueError: an argument out of its range.
        """
        if window is not None and (len(window) != 2 or min(window) < 1):
            raise ValueError(f"window must be (height, width) in pixels, got {window}")
        if stride is not None and window is None:
            raise ValueError("stride is that of windows: give window, or leave stride out")
        stride = window if stride is None else stride
        if stride is not None and not all(0 < s <= w for s, w in zip(stride, window, strict=True)):
            raise ValueError(
                f"stride must be from 1 to the window's {tuple(window)}, got {tuple(stride)}"
            )
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be one or more, each above 0, got {scales}")
        size = tuple(x.shape[2:] if size is None else size)
        total = 0
        for scale in scales:
            scaled = x
            if scale != 1:
                sides = [max(1, round(side * scale)) for side in x.shape[2:]]
                scaled = _resized(x, sides, antialias=True)
            for mirrored in (False, True) if flip else (False,):
                y = scaled.flip(3) if mirrored else scaled
                y = self(y).float() if window is None else self._slide(y, window, stride)
                y = y.flip(3) if mirrored else y
                total = total + _resized(y, size).softmax(1)
        return total / (len(scales) * (2 if flip else 1))

    def _slide(self, x: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
        """Logits (B, num_classes, H, W) float32, averaged over the windows that see a pixel."""
        height, width = x.shape[2:]
        x = F.pad(x, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
        total = x.new_zeros((len(x), self.num_classes, *x.shape[2:]), dtype=torch.float32)
        seen = x.new_zeros(x.shape[2:], dtype=torch.float32)
        for top in _starts(x.shape[2], window[0], stride[0]):
            for left in _starts(x.shape[3], window[1], stride[1]):
                at = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                total[at] += self(x[at]).float()
                seen[at] += 1
        return (total / seen)[:, :, :height, :width]


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Where windows begin: every `stride`, the last one so that it ends with the image."""
    yield from range(0, length - window, stride)
    yield length - window


def _resized(x: Tensor, size: Sequence[int], antialias: bool = False) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear, in float32 or what `x` has."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", antialias=antialias)
