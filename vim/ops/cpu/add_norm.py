"""Residual addition and norm by the C++ kernels."""

import torch
from torch import Tensor

from vim.ops.add_norm import in_dtypes

from ._library import DTYPES, activation, call, parameter, pointer, sequence, unavailable

__all__ = ["backward", "forward", "unavailable"]

BLOCK = 32
"""Rows of an item of work, as in kernels/cpu/add_norm.cpp."""


def forward(x, residual, weight, bias, eps, kind, residual_dtype):
    shape = x.shape
    x, residual = _rows(x), _rows(residual)
    weight, bias = parameter(weight), parameter(bias)
    normed = torch.empty(*x.shape, dtype=x.dtype)
    stored_dtype = residual_dtype if residual_dtype in DTYPES else torch.float32
    new_residual = torch.empty(*x.shape, dtype=stored_dtype)
    rstd = torch.empty(shape[:-1])
    call(
        "add_norm_fwd",
        *_sizes(x, kind),
        float(eps),
        *sequence(x),
        *sequence(residual),
        *sequence(normed),
        *sequence(new_residual),
        pointer(weight),
        pointer(bias),
        pointer(rstd),
    )
    return normed.view(shape), new_residual.view(shape).to(residual_dtype), rstd


def backward(dnormed, dresidual, new_residual, rstd, weight, x_dtype, kind, has_bias):
    dnormed, dresidual, rows = (_rows(s) for s in (dnormed, dresidual, new_residual))
    weight, rstd = parameter(weight), rstd.contiguous()
    dsum = torch.empty(*rows.shape)
    dweight, dbias = torch.empty(*weight.shape), torch.empty(*weight.shape)
    partial = torch.empty(-(-rows.shape[1] // BLOCK), 2, rows.shape[2])
    call(
        "add_norm_bwd",
        *_sizes(rows, kind),
        *sequence(dnormed),
        *sequence(dresidual),
        *sequence(rows),
        *sequence(dsum),
        pointer(weight),
        pointer(rstd),
        pointer(dweight),
        pointer(dbias),
        pointer(partial),
    )
    dsum = dsum.view(new_residual.shape)
    return *in_dtypes(dsum, x_dtype, new_residual.dtype), dweight, dbias


def _rows(x: Tensor | None) -> Tensor | None:
    """(..., D) -> (1, rows, D), a view wherever one stride steps through the rows."""
    return None if x is None else activation(x.reshape(1, -1, x.shape[-1]))


def _sizes(rows: Tensor, kind: str) -> tuple[int, ...]:
    return rows.shape[1], rows.shape[2], kind == "layer", torch.get_num_threads()
