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
from .vision_mamba import VisionMamba

__all__ = [
    "VisionMamba",
    "flops",
    "is_official",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "to_native",
    "to_official",
]
