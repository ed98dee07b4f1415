"""Numerical ops, channels-last: (B, L, D) in, (B, L, D) out."""

from ._dispatch import BACKENDS, SlowBackendWarning
from .add_norm import add_norm, add_norm_reference
from .bidirectional_mixer import bidirectional_mixer, bidirectional_mixer_reference
from .causal_conv1d import causal_conv1d, causal_conv1d_reference, causal_conv1d_update
from .gated_rms_norm import gated_rms_norm, gated_rms_norm_reference
from .selective_scan import selective_scan, selective_scan_reference, selective_state_update
from .ssd import ssd, ssd_reference
from .ssd_trapezoidal import ssd_trapezoidal, ssd_trapezoidal_reference

from . import _flops  # noqa: F401, isort: skip; the ops must be registered first

__all__ = [
    "BACKENDS",
    "SlowBackendWarning",
    "add_norm",
    "add_norm_reference",
    "bidirectional_mixer",
    "bidirectional_mixer_reference",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_update",
    "gated_rms_norm",
    "gated_rms_norm_reference",
    "selective_scan",
    "selective_scan_reference",
    "selective_state_update",
    "ssd",
    "ssd_reference",
    "ssd_trapezoidal",
    "ssd_trapezoidal_reference",
]
