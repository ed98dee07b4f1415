"""What the ops share in tying their backward to autograd.

An op can return tensors but not None, so an absent input has an empty gradient inside the op.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def needs_grad(tensors: list[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of `tensors`."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110, since TorchScript has no generator expressions
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def pack_gradients(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return each gradient in its input's dtype, empty where the input is absent."""
    device = next(x.device for x in inputs if x is not None)
    return [
        torch.empty(0, device=device) if x is None else g.to(x.dtype)
        for g, x in zip(gradients, inputs, strict=True)
    ]


def fake_gradients(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return what `pack_gradients` returns, without values."""
    device = next(x.device for x in inputs if x is not None)
    return [torch.empty(0, device=device) if x is None else x.new_empty(x.shape) for x in inputs]


def unpack_gradients(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Undo `pack_gradients`' stand-ins: None where the input is absent."""
    return [None if x is None else g for g, x in zip(gradients, inputs, strict=True)]
