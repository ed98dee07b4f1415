"""The encoders of dense prediction: maps of a Vim, or of any other backbone of timm's."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from timm.models import is_model, model_entrypoint
from torch import nn

from vim.models import VisionMamba, VisionMambaMaps

from .classifier import build_backbone

__all__ = ["build_maps", "build_pyramid"]


def build_pyramid(config: Mapping[str, Any]) -> nn.Module:
    """Return image to maps of several strides, of a config's `model.backbone`.

    A Vim makes a pyramid of four blocks, see `vim.models.VisionMambaPyramid`. So does another
    backbone of one stride, such as DeiT, see `vim.heads.plain_maps`; `out_indices` are its blocks,
    `norm` says whether its final norm is applied. One of several strides gives its last four maps.
    """
    if _is_vim(config):
        return build_backbone({"features_only": True, **config})
    options = _plain_options(config)
    choice = {key: options.pop(key) for key in ("out_indices", "norm") if key in options}
    return build_backbone(options, wrap=partial(_plain_pyramid, **choice))


def _plain_pyramid(model: nn.Module, **choice: Any) -> nn.Module:
    from vim.heads.plain_maps import PlainMaps, PlainPyramid

    maps = PlainMaps(model, **choice)
    return PlainPyramid(maps) if len(set(maps.feature_info.reduction())) == 1 else maps


def build_maps(config: Mapping[str, Any]) -> nn.Module:
    """Return image to a list of the last map alone, of a config's `model.backbone`.

    Of a Vim, `norm` and `class_token` are those of `vim.models.VisionMambaMaps`; of another
    backbone, `norm` says whether its final norm is applied.
    """
    options = dict(config) if _is_vim(config) else _plain_options(config)
    keys = ("norm", "class_token") if _is_vim(config) else ("norm",)
    choice = {key: options.pop(key) for key in keys if key in options}
    return build_backbone(options, wrap=partial(_last_map, **choice))


def _last_map(model: nn.Module, **choice: Any) -> nn.Module:
    if isinstance(model, VisionMamba):
        return VisionMambaMaps(model, **choice)
    from vim.heads.plain_maps import PlainMaps

    return PlainMaps(model, out_indices=[-1], **choice)


def _plain_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of another backbone; the convolutional stem is that for images of any size."""
    options = dict(config)
    if options.get("embed_layer") == "conv" and options.get("dynamic_img_size"):
        from vim.heads.plain_maps import ConvStemOfAnySize

        options["embed_layer"] = ConvStemOfAnySize
    return options


def _is_vim(config: Mapping[str, Any]) -> bool:
    """Whether the backbone is one of this package's, whose entries take options of dense ones."""
    name = timm.models.parse_model_name(config.get("name", ""))[1].partition(".")[0]
    return is_model(name) and model_entrypoint(name).__module__.startswith("vim.")
