"""Residual addition followed by RMSNorm or LayerNorm, in one op.

Size letters: D features; every dimension before the last is batch.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from ._autograd import operator
from ._dispatch import resolve_backend

__all__ = ["add_norm", "add_norm_reference"]


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    residual_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and that sum, which is the new residual.

    ::

        r      = x + residual
        normed = r / sqrt(mean(r^2) + eps) * weight + bias                  (kind "rms")
        normed = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias         (kind "layer")

    Sources: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Ba et al. 2016, arXiv:1607.06450,
    eq. 3. The norm is taken of the new residual as it is stored.

    Differentiable in every tensor, through both outputs. Sums are float32 (float64 where `x` is).
    Any strides are accepted; contiguous features are the fast layout. Nothing is mutated and
    results are deterministic.

    Args:
        x: (..., D) what the previous layer adds to the residual stream.
        residual: shaped as `x`; None where the stream begins.
        weight, bias: (D,).
        eps: added to the mean square or the variance.
        kind: "rms" or "layer".
        residual_dtype: dtype of the new residual; a float64 `x` keeps float64.
        backend: "auto" takes the fastest one that can serve; any name of `vim.ops.BACKENDS`
            forces one.

    Returns:
        normed: (..., D) in the dtype of `x`, and the new residual (..., D).

    Raises:
        ValueError: shapes that do not fit together, an unknown kind, a negative eps.
        TypeError: a tensor or residual_dtype that is not floating point.
        RuntimeError: `backend` names a backend that cannot serve; the message says why.
    """
    normed, new_residual, _ = torch.ops.vim.add_norm(
        x, residual, weight, bias, eps, kind, residual_dtype, backend
    )
    return normed, new_residual


def add_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    residual_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return (normed, new_residual) of `add_norm` by its equations.

    This is the definition that every backend is tested against: plain PyTorch, differentiable by
    autograd, on any device, in the precision of `x` (float32 at least).
    """
    residual_dtype = _residual_dtype(x, residual_dtype)
    normed, new_residual, _ = _forward(x, residual, weight, bias, eps, kind, residual_dtype)
    return normed, new_residual


def _forward(x, residual, weight, bias, eps, kind, residual_dtype):
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    new_residual = total.to(residual_dtype)
    centred, rstd = _centred(new_residual.to(dtype), eps, kind)
    normed = centred * rstd.unsqueeze(-1) * weight.to(dtype)
    if bias is not None:
        normed = normed + bias.to(dtype)
    return normed.to(x.dtype), new_residual, rstd


def _centred(r: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """Return r less what the norm subtracts, (..., D), and 1 / its scale, (...)."""
    if kind == "layer":
        r = r - r.mean(-1, keepdim=True)
    return r, torch.rsqrt(r.square().mean(-1) + eps)


def _residual_dtype(x: Tensor, residual_dtype: torch.dtype) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else residual_dtype


def _op_forward(x, residual, weight, bias, eps, kind, residual_dtype):
    normed, new_residual, rstd = _forward(x, residual, weight, bias, eps, kind, residual_dtype)
    new_residual = new_residual.contiguous()
    if residual is None and new_residual.dtype == x.dtype:
        new_residual = new_residual.clone()  # an op's output must not share memory with its input
    return normed.contiguous(), new_residual, rstd.contiguous()


def in_dtypes(
    dsum: Tensor, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return (dx, dresidual) from their common value; None where dresidual would be dx again."""
    dresidual = None if x_dtype == residual_dtype else dsum.to(residual_dtype)
    return dsum.to(x_dtype), dresidual


def _backward(dnormed, dresidual, new_residual, rstd, weight, x_dtype, kind, has_bias):
    """Return (dx, dresidual, dweight, dbias), written out: autograd is off inside an op.

    dresidual is None where it would be dx again, the dtypes of x and the new residual being the
    same; dbias counts only where there is a bias.
    """
    dtype = torch.promote_types(new_residual.dtype, torch.float32)
    r, rstd = new_residual.to(dtype), rstd.unsqueeze(-1)
    if kind == "layer":
        r = r - r.mean(-1, keepdim=True)
    unit = r * rstd
    dnormed = dnormed.to(dtype)
    features = r.shape[-1]
    dweight = (dnormed * unit).reshape(-1, features).sum(0)
    dbias = dnormed.reshape(-1, features).sum(0)
    dunit = dnormed * weight.to(dtype)
    dr = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
    if kind == "layer":
        dr = dr - dunit.mean(-1, keepdim=True)
    dr = dr * rstd
    if dresidual is not None:
        dr = dr + dresidual.to(dtype)
    return *in_dtypes(dr, x_dtype, new_residual.dtype), dweight, dbias


_REFERENCE = SimpleNamespace(forward=_op_forward, backward=_backward)


def _check(x, residual, weight, bias, eps, kind, residual_dtype):
    """Raise where the arguments of `add_norm` do not fit together."""
    named = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if not residual_dtype.is_floating_point:
        raise TypeError(f"residual_dtype must be floating point, got {residual_dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D at least 1, got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    for name in ("weight", "bias"):
        tensor = named[name]
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"{name} must be (D,) = ({x.shape[-1]},), got {tuple(tensor.shape)}")
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind must be 'rms' or 'layer', got {kind!r}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def _resolve(backend: str, on: Tensor, dtype: torch.dtype):
    return resolve_backend("add_norm", backend, on.device, dtype, _REFERENCE)


@operator("add_norm")
def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    residual_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (normed, new_residual, rstd): `rstd` (...) is 1 / the scale, for the backward."""
    _check(x, residual, weight, bias, eps, kind, residual_dtype)
    forward = _resolve(backend, x, x.dtype).forward
    return forward(x, residual, weight, bias, eps, kind, _residual_dtype(x, residual_dtype))


@_add_norm.register_fake
def _(x, residual, weight, bias, eps, kind, residual_dtype, backend):
    _check(x, residual, weight, bias, eps, kind, residual_dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=_residual_dtype(x, residual_dtype)),
        x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)),
    )


@operator("add_norm_bwd")
def _add_norm_bwd(
    dnormed: Tensor | None,
    dnew_residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    new_residual: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dresidual, dweight, dbias).

    x and residual have one gradient. It comes in both dtypes where these differ; where they are
    the same, the second is empty. So it is where there is no bias.
    """
    if dnormed is None:
        dnormed = torch.zeros_like(new_residual)
    backward = _resolve(backend, new_residual, x_dtype).backward
    dx, dresidual, dweight, dbias = backward(
        dnormed, dnew_residual, new_residual, rstd, weight, x_dtype, kind, bias is not None
    )
    return (
        dx.contiguous(),
        new_residual.new_empty(0) if dresidual is None else dresidual.contiguous(),
        dweight.to(weight.dtype),
        new_residual.new_empty(0) if bias is None else dbias.to(bias.dtype),
    )


@_add_norm_bwd.register_fake
def _(dnormed, dnew_residual, weight, bias, new_residual, rstd, x_dtype, kind, backend):
    same = x_dtype == new_residual.dtype
    return (
        new_residual.new_empty(new_residual.shape, dtype=x_dtype),
        new_residual.new_empty((0,) if same else new_residual.shape),
        weight.new_empty(weight.shape),
        new_residual.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.kind, _, ctx.backend = inputs
    _, new_residual, rstd = output
    ctx.save_for_backward(weight, bias, new_residual, rstd)
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, dnormed, dnew_residual, drstd):
    if dnormed is None and dnew_residual is None:
        return (None,) * 8
    weight, bias, new_residual, rstd = ctx.saved_tensors
    dx, dresidual, dweight, dbias = torch.ops.vim.add_norm_bwd(
        dnormed,
        dnew_residual,
        weight,
        bias,
        new_residual,
        rstd,
        ctx.x_dtype,
        ctx.kind,
        ctx.backend,
    )
    if dresidual.numel() == 0:
        dresidual = dx
    dresidual = None if ctx.residual_dtype is None else dresidual.to(ctx.residual_dtype)
    dbias = None if bias is None else dbias
    return dx, dresidual, dweight, dbias, None, None, None, None


_add_norm.register_autograd(_autograd, setup_context=_setup_context)
