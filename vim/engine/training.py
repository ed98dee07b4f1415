"""Everything that training configs name: importing this registers it with mmengine."""

from . import (
    classifier,
    detection,
    detection_metrics,
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
    "detection",
    "detection_metrics",
    "hooks",
    "metrics",
    "optimization",
    "preprocessing",
    "reporting",
    "runner",
    "segmentation",
    "segmentation_metrics",
]
