"""ViTDet's simple feature pyramid: one map of a plain backbone to maps of several strides."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vim.models import pass_on_classification_weights

__all__ = ["SimpleFeaturePyramid"]


class SimpleFeaturePyramid(nn.Module):
    """Image to maps of equal width: (B, C, H, W) -> OrderedDict of (B, out_channels, H/s, W/s).

    The backbone's last map is brought to each stride on its own, by transposed convolutions or
    max pooling, and then goes through a 1 x 1 and a 3 x 3 convolution, each with a LayerNorm over
    channels. Strides beyond twice that of the map subsample the level before. Sizes are rounded up.
    The names "0", "1", ... and the attribute `out_channels` are what torchvision's detectors ask
    of a backbone.

    Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection",
    arXiv:2203.16527, section 3, and the appendix on implementation.

    Args:
        backbone: image to a list of maps, the last of which is taken; with timm's `feature_info`.
            A `vim.models.VisionMambaMaps`, or what `timm.create_model(..., features_only=True)`
            makes of a plain backbone. A classifier's state dict that `load_state_dict` is given
            goes to it.
        out_channels: channels of every map.
        strides: of the maps, each the double of the one before.

    Raises:
        ValueError: strides that are not consecutive powers of two, or that start too coarse.
    """

    def __init__(
        self,
        backbone: nn.Module,
        out_channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
    ) -> None:
        super().__init__()
        dim, own = backbone.feature_info.channels()[-1], backbone.feature_info.reduction()[-1]
        first = strides[0] if strides else 0
        doubling = [first * 2**i for i in range(len(strides))]
        if first < 1 or first & (first - 1) or list(strides) != doubling or first > 2 * own:
            raise ValueError(
                "strides must be powers of two, each the double of the one before, and start at "
                f"{2 * own} or less, twice that of the backbone's map, got {tuple(strides)}"
            )
        if own & (own - 1):
            raise ValueError(
                f"the stride of the backbone's map must be a power of two, got {own}: use patches "
                "of 8, 16 or 32"
            )
        self.backbone = backbone
        self.out_channels = out_channels
        self.strides = tuple(strides)
        self.levels = nn.ModuleList(
            _level(dim, out_channels, own, s) if s <= 2 * own else nn.MaxPool2d(1, stride=2)
            for s in strides
        )
        # On the map, or on the level before.
        self.from_map = [s <= 2 * own for s in strides]
        self.register_load_state_dict_pre_hook(_hand_to_backbone)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        height, width = x.shape[2:]
        weight = next(self.levels[0].parameters())
        features = self.backbone(x)[-1].to(weight.dtype)  # a residual stream may be wider
        out = OrderedDict()
        y = features
        for i, level in enumerate(self.levels):
            y = level(features if self.from_map[i] else y)
            # Patches may reach beyond the image.
            stride = self.strides[i]
            y = y[:, :, : math.ceil(height / stride), : math.ceil(width / stride)]
            out[str(i)] = y
        return out


def _hand_to_backbone(
    module: SimpleFeaturePyramid, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    pass_on_classification_weights(module, state_dict, prefix, "backbone")


def _level(dim: int, out_channels: int, own: int, stride: int) -> nn.Sequential:
    """From a map of stride `own` to one of `stride`: (B, dim, ...) -> (B, out_channels, ...)."""
    layers: list[nn.Module] = []
    if stride > own:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    for _ in range(int(math.log2(own / stride))):
        if layers:
            layers += [LayerNorm2d(dim), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2))
        dim //= 2
    return nn.Sequential(
        *layers,
        nn.Conv2d(dim, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )
