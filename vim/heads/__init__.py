"""What dense prediction adds to a backbone."""

from .feature_pyramid import SimpleFeaturePyramid
from .registration import register_backbones

__all__ = ["SimpleFeaturePyramid", "register_backbones"]
