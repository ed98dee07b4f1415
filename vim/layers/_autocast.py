"""Computing what must not lose precision, whatever autocast is on."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["no_autocast"]


def no_autocast(device_type: str) -> AbstractContextManager:
    """Return a context in which products are computed in the dtype of their inputs."""
    if torch.amp.is_autocast_available(device_type):  # not on "meta"
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
