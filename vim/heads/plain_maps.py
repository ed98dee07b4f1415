"""Maps of any timm backbone, so that others can stand where a Vim does."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.models import VisionTransformer
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vim.layers import ConvStem
from vim.models import pass_on_classification_weights
from vim.models.pyramid import STRIDES, rescaling

__all__ = ["ConvStemOfAnySize", "PlainMaps", "PlainPyramid"]

_BLOCK = re.compile(r"^blocks\.(\d+)\.")


class ConvStemOfAnySize(ConvStem):
    """Image to patch features: (B, C, H, W) -> (B, H', W', D), for `dynamic_img_size` of timm.

    There, a vision transformer asks its `embed_layer` for a map instead of a list of patches.

    Args:
        arguments, options: see `vim.layers.ConvStem`.
        output_fmt: "NHWC".
    """

    def __init__(self, *arguments: Any, output_fmt: Literal["NHWC"] = "NHWC", **options: Any):
        if output_fmt != "NHWC":
            raise ValueError(f"output_fmt must be 'NHWC', got {output_fmt!r}")
        super().__init__(*arguments, **options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(1, self.dynamic_feat_size(tuple(x.shape[2:])))


class PlainMaps(FeatureGetterNet):
    """Image to maps of some blocks of a timm model: (B, 3, H, W) -> list of (B, D, H', W').

    What `vim.models.VisionMambaMaps` is for a Vim. `load_state_dict` takes the state dict of a
    vision transformer's classifier, too: patches and position embeddings are resampled; the
    classifier, and blocks and norms that no map needs, are left out.

    Args:
        model: a timm model with `forward_intermediates`, such as a DeiT; it is pruned.
        out_indices: of the maps among the model's `feature_info`, negative ones from the last;
            None takes four: the last ones, or of a model of one stride evenly spaced ones.
        norm: whether the model's final norm is applied to the maps.

    Raises:
        ValueError: the model gives no maps.
    """

    def __init__(
        self, model: nn.Module, out_indices: Sequence[int] | None = None, norm: bool = False
    ) -> None:
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(
                f"{type(model).__name__} has no forward_intermediates, so it gives no maps: choose "
                "another timm model, such as deit_tiny_patch16_224 or resnet50"
            )
        if out_indices is None:
            count = len(model.feature_info)
            plain = len({info["reduction"] for info in model.feature_info}) == 1
            out_indices = (
                [math.ceil(count * n / 4) - 1 for n in (1, 2, 3, 4)]
                if plain
                else range(max(0, count - 4), count)
            )
        super().__init__(model, list(out_indices), norm=norm)
        self.register_load_state_dict_pre_hook(_load_classification_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Choose whether a training step recomputes the blocks' insides to save memory."""
        self.model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}


def _load_classification_weights(
    module: PlainMaps, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Fit a vision transformer's weights, where `state_dict` has them, to the pruned model."""
    weights = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not isinstance(module.model, VisionTransformer) or not any(map(_BLOCK.match, weights)):
        return
    for name in weights:
        del state_dict[prefix + name]
    for name, value in checkpoint_filter_fn(weights, module.model).items():
        block = _BLOCK.match(name)
        pruned = (
            name.startswith(("head.", "head_dist.", "fc_norm."))
            or (name.startswith("norm.") and not module.norm)
            or (block is not None and int(block[1]) >= len(module.model.blocks))
        )
        if not pruned:
            state_dict[f"{prefix}model.{name}"] = value


class PlainPyramid(nn.Module):
    """Image to maps of strides 4, 8, 16 and 32: (B, 3, H, W) -> list of (B, D, H / s, W / s).

    What `vim.models.VisionMambaPyramid` is for a Vim: four maps of one stride are rescaled by
    transposed convolutions and max pooling. Sizes are rounded up.

    Args:
        maps: image to four maps of one stride, a power of two.

    Raises:
        ValueError: other maps.
    """

    def __init__(self, maps: PlainMaps) -> None:
        super().__init__()
        strides, widths = maps.feature_info.reduction(), maps.feature_info.channels()
        own = strides[0]
        if len(strides) != len(STRIDES) or set(strides) != {own} or own & (own - 1):
            raise ValueError(
                f"a pyramid is made of {len(STRIDES)} maps of one stride, a power of two; got maps "
                f"of the strides {list(strides)}: give out_indices of as many blocks"
            )
        self.maps = maps
        self.levels = nn.ModuleList(
            rescaling(dim, own, stride) for dim, stride in zip(widths, STRIDES, strict=True)
        )
        info = [
            {"module": f"levels.{i}", "num_chs": dim, "reduction": stride, "index": i}
            for i, (dim, stride) in enumerate(zip(widths, STRIDES, strict=True))
        ]
        self.feature_info = FeatureInfo(info, tuple(range(len(STRIDES))))
        self.register_load_state_dict_pre_hook(_hand_to_maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Choose whether a training step recomputes the blocks' insides to save memory."""
        self.maps.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        return {f"maps.{name}" for name in self.maps.no_weight_decay()}

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        return [
            # Patches may reach beyond the image.
            level(y)[:, :, : math.ceil(height / stride), : math.ceil(width / stride)]
            for level, stride, y in zip(self.levels, STRIDES, self.maps(x), strict=True)
        ]


def _hand_to_maps(
    module: PlainPyramid, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    pass_on_classification_weights(module, state_dict, prefix, "maps")
