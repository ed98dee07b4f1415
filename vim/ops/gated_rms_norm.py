"""The norm of Mamba-2, of what a gate lets through.

Size letters: D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import (
    composite,
    differentiable_gradients,
    operator,
    pack_gradients,
    without_autocast,
)
from ._dispatch import resolve_fused

__all__ = ["gated_rms_norm", "gated_rms_norm_reference"]


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    other: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Return the RMS norm of a gated sum::

        g = (y + other) * silu(z)
        g / sqrt(mean(g^2) + eps) * weight

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.1 and figure 6 (the norm after the gate, as
    NormFormer has one); `other` is the other direction of a bidirectional mixer.

    Differentiable in every tensor. The kernels compute in float32, the composition in the dtype of
    `y`; autocast does not change that. Results are deterministic.

    Args:
        y: (..., D).
        z: (..., D) gate.
        weight: (D,).
        other: (..., D).
        eps: added to the mean square.
        backend: "auto", "triton", or "reference" for the composition; see `ssd`.

    Returns:
        (..., D) in the dtype of `y`.

    Raises:
        ValueError: shapes that do not fit together.
        RuntimeError: `backend` names a backend that cannot serve; the message says why.
    """
    return torch.ops.vim.gated_rms_norm(y, z, weight, other, eps, backend)


def gated_rms_norm_reference(
    y: Tensor, z: Tensor, weight: Tensor, *, other: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return `gated_rms_norm` by its equations, in the precision of `y` (float32 at least)."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    g = y.to(dtype) if other is None else y.to(dtype) + other.to(dtype)
    z = z.to(dtype)
    g = g * z * torch.sigmoid(z)
    return (g * torch.rsqrt(g.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)).to(y.dtype)


@composite("gated_rms_norm")
def _gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    other: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    for name, tensor, shape in (
        ("z", z, y.shape),
        ("other", other, y.shape),
        ("weight", weight, y.shape[-1:]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if resolve_fused("gated_rms_norm", backend, y.device, y.dtype) is None:
        return _composition(y, z, weight, other, eps)
    return torch.ops.vim.gated_rms_norm_fused(y, z, weight, other, eps)


def _composition(y, z, weight, other, eps) -> Tensor:
    with without_autocast(y.device):
        g = y if other is None else y + other
        g = g * F.silu(z.to(y.dtype))
        return F.rms_norm(g, weight.shape, weight.to(y.dtype), eps)


@operator("gated_rms_norm_fused")
def _gated_rms_norm_fused(
    y: Tensor, z: Tensor, weight: Tensor, other: Tensor | None, eps: float
) -> Tensor:
    kernels = resolve_fused("gated_rms_norm", "triton", y.device, y.dtype)
    return kernels.forward(y, z, weight, other, eps)


@_gated_rms_norm_fused.register_fake
def _(y, z, weight, other, eps):
    return y.new_empty(y.shape)


@operator("gated_rms_norm_fused_bwd")
def _gated_rms_norm_fused_bwd(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, other: Tensor | None, eps: float
) -> list[Tensor]:
    """Return the gradients of y (and of `other`), z and the weight."""
    kernels = resolve_fused("gated_rms_norm", "triton", y.device, y.dtype)
    return pack_gradients(kernels.backward(dout, y, z, weight, other, eps), (y, z, weight))


@_gated_rms_norm_fused_bwd.register_fake
def _(dout, y, z, weight, other, eps):
    return [tensor.new_empty(tensor.shape) for tensor in (y, z, weight)]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dout):
    other = ctx.saved_tensors[3]
    gradients = torch.ops.vim.gated_rms_norm_fused_bwd(dout, *ctx.saved_tensors, ctx.eps)
    return *gradients, None if other is None else gradients[0].to(other.dtype), None


def _autograd_twice(ctx, dout):
    """The same by the composition, whose gradients have gradients."""

    def composition(*inputs):
        return _composition(*inputs, ctx.eps)

    return *differentiable_gradients(composition, ctx.saved_tensors, (dout,)), None


_gated_rms_norm_fused.register_autograd(
    _autograd, setup_context=_setup_context, twice=_autograd_twice
)
