"""Computing what must not lose precision, whatever autocast is on."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["no_autocast"]


def no_autocast(device_type: str) -> AbstractContextManager:
    """Return a context in which products are computed in the dtype of their inputs."""
    # Not `is_autocast_available`, which torch.compile of PyTorch 2.11 does not follow.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
