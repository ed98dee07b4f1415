"""Backbones for mmseg and mmdet, by name from a config."""

import os
from typing import Any

import timm
from torch import Tensor, nn

from vim.models import VisionMambaMaps, VisionMambaPyramid, load_checkpoint

from .feature_pyramid import SimpleFeaturePyramid

__all__ = ["SimpleFeaturePyramidBackbone", "register_backbones", "vim_pyramid"]


def vim_pyramid(
    name: str, checkpoint: str | os.PathLike | None = None, **options: Any
) -> VisionMambaPyramid:
    """Return the `VisionMambaPyramid` of a timm model: image to a list of maps.

    Args:
        name: one of timm.list_models("vim*pyramid").
        checkpoint: a classifier's weights to start from, the authors' file or ours.
        options: of the model and of `VisionMambaPyramid`.
    """
    pyramid = timm.create_model(name, features_only=True, **options)
    if checkpoint is not None:
        load_checkpoint(pyramid, checkpoint)
    return pyramid


class SimpleFeaturePyramidBackbone(nn.Module):
    """A Vim with a `SimpleFeaturePyramid`: image to a tuple of maps, the finest first.

    Args:
        name: a Vim of timm's; one of timm.list_models("vim*pyramid") takes images of any size.
        checkpoint: a classifier's weights to start from, the authors' file or ours.
        out_channels, strides: see `SimpleFeaturePyramid`.
        norm, class_token: see `vim.models.VisionMambaMaps`.
        options: of the model.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | os.PathLike | None = None,
        out_channels: int = 256,
        strides: tuple[int, ...] = (4, 8, 16, 32, 64),
        norm: bool = False,
        class_token: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        model = timm.create_model(name, **options)
        maps = VisionMambaMaps(model, norm=norm, class_token=class_token)
        self.pyramid = SimpleFeaturePyramid(maps, out_channels, strides)
        if checkpoint is not None:
            load_checkpoint(self.pyramid, checkpoint)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.pyramid(x).values())


def register_backbones(registry: Any) -> None:
    """Make the two backbones above known as "VimPyramid" and "VimSimpleFeaturePyramid".

    Args:
        registry: mmengine's `MODELS`, which mmseg and mmdet search, too.
    """
    registry.register_module(name="VimPyramid", module=vim_pyramid, force=True)
    registry.register_module(
        name="VimSimpleFeaturePyramid", module=SimpleFeaturePyramidBackbone, force=True
    )
