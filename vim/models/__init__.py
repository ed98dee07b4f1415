"""Whole backbones, registered with timm when imported."""

from . import sequence_models  # noqa: F401, registers its presets
from ._checkpoint import (
    backbone_weights,
    is_official,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    to_native,
    to_official,
)
from ._flops import flops
from .outputs import MambaCache, VisionMambaOutput
from .pyramid import VisionMambaMaps, VisionMambaPyramid, pass_on_classification_weights
from .vision_mamba import VisionMamba
from .visual_tokens import visual_maps, visual_tokens

__all__ = [
    "MambaCache",
    "VisionMamba",
    "VisionMambaMaps",
    "VisionMambaOutput",
    "VisionMambaPyramid",
    "backbone_weights",
    "flops",
    "is_official",
    "load_checkpoint",
    "pass_on_classification_weights",
    "read_checkpoint",
    "save_checkpoint",
    "to_native",
    "to_official",
    "visual_maps",
    "visual_tokens",
]
