"""Everything that training configs name: importing this registers it with mmengine."""

from . import (
    classifier,
    hooks,
    metrics,
    optimization,
    preprocessing,
    reporting,
    runner,
    segmentation,
    segmentation_metrics,
)

__all__ = [
    "classifier",
    "hooks",
    "metrics",
    "optimization",
    "preprocessing",
    "reporting",
    "runner",
    "segmentation",
    "segmentation_metrics",
]
