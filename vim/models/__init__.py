"""Whole backbones, registered with timm when imported."""

from ._checkpoint import (
    is_official,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    to_native,
    to_official,
)
from ._flops import flops
from .pyramid import VisionMambaMaps, VisionMambaPyramid, pass_on_classification_weights
from .vision_mamba import VisionMamba

__all__ = [
    "VisionMamba",
    "VisionMambaMaps",
    "VisionMambaPyramid",
    "flops",
    "is_official",
    "load_checkpoint",
    "pass_on_classification_weights",
    "read_checkpoint",
    "save_checkpoint",
    "to_native",
    "to_official",
]
