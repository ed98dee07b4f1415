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


def check_saved(saved: Sequence[Tensor], expected: Sequence[Sequence[int]]) -> None:
    """Raise where a forward did not save what the backward's backend will read."""
    given = [tuple(tensor.shape) for tensor in saved]
    if given != [tuple(shape) for shape in expected]:
        raise RuntimeError(
            f"the forward saved tensors of shapes {given}, this backend's backward needs "
            f"{list(expected)}: let one backend serve both (VIM_BACKEND must not change in "
            "between), and have the forward save states"
        )


def pack_gradients(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return each gradient contiguous and in its input's dtype, empty where that is absent."""
    device = next(x.device for x in inputs if x is not None)
    return [
        torch.empty(0, device=device) if x is None else g.to(x.dtype).contiguous()
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
