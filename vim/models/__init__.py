"""Whole backbones, registered with timm when imported."""

from ._checkpoint import load_checkpoint
from .vision_mamba import VisionMamba

__all__ = ["VisionMamba", "load_checkpoint"]
