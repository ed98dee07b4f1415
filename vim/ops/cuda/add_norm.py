"""The CUDA backend of `vim.ops.add_norm`; kernels in kernels/cuda/add_norm.cu.

Size letters: D features; rows are every dimension before it.
"""

import functools

import torch
from torch import Tensor

from ._compile import DTYPES, get_kernel, unavailable
from ._launch import Repeated, contiguous, launch
from ._sums import sum_kernel, sum_partials

__all__ = ["Repeated", "backward", "forward", "instantiations", "unavailable"]

_SOURCE = "add_norm"
_WARPS = 4
_ANY_THREADS = 256


def forward(x, residual, weight, bias, eps, kind, residual_dtype):
    """Return (normed, new_residual, rstd); the signature of the reference's `_op_forward`."""
    if residual_dtype not in DTYPES:
        raise RuntimeError(
            f"backend 'cuda' cannot keep a residual of {residual_dtype}; ask for "
            "backend='reference'"
        )
    shape, device = x.shape, x.device
    features = shape[-1]
    normed, new_residual = x.new_empty(shape), x.new_empty(shape, dtype=residual_dtype)
    rstd = x.new_empty(shape[:-1], dtype=torch.float32)
    x = _rows(x)
    residual_in = residual_dtype
    if residual is not None:
        residual = _rows(residual if residual.dtype in DTYPES else residual.float())
        residual_in = residual.dtype
    weight, bias = _same_dtype(weight, bias, x.dtype)
    vector, vectors = _vectors(2048, features, x, residual, weight, bias)
    dtypes = (x.dtype, residual_in, residual_dtype, weight.dtype)
    rows = rstd.numel()
    if vectors:
        blocks, block = -(-rows // _WARPS), (32, _WARPS, 1)
    else:
        blocks, block = rows, (_ANY_THREADS, 1, 1)
    launch(
        get_kernel(_SOURCE, _fwd_name(dtypes, vector, vectors, kind), device.index),
        (blocks, 1, 1),
        block,
        0,
        x,
        residual,
        weight,
        bias,
        normed,
        new_residual,
        rstd,
        rows,
        features,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        float(eps),
    )
    return normed, new_residual, rstd


def backward(dnormed, dnew_residual, new_residual, rstd, weight, x_dtype, kind, has_bias):
    """Return (dx, dresidual, dweight, dbias); the signature of the reference's `_backward`.

    One kernel writes dx and dresidual side by side.
    """
    shape, device = new_residual.shape, new_residual.device
    features, rows = shape[-1], rstd.numel()
    residual_dtype = new_residual.dtype
    dx, dresidual = new_residual.new_empty(shape, dtype=x_dtype), None
    if x_dtype != residual_dtype:
        dresidual = new_residual.new_empty(shape)
    dnormed = dnormed.to(x_dtype)
    if dnew_residual is not None:
        dnew_residual = _rows(dnew_residual.to(residual_dtype))
    dnormed, new_residual = _rows(dnormed), _rows(new_residual)
    weight, _ = _same_dtype(weight, None, dnormed.dtype)
    vector, vectors = _vectors(1024, features, dnormed, dnew_residual, new_residual, weight)
    dtypes = (dnormed.dtype, residual_dtype, weight.dtype)
    index = device.index
    columns = features * (1 + has_bias)
    mean = None
    kernel = get_kernel(_SOURCE, _bwd_name(dtypes, vector, vectors, kind, has_bias), index)
    if vectors:
        chunks = min(-(-rows // _WARPS), kernel.resident_blocks(32 * _WARPS))
        grid, block = (chunks, 1, 1), (32, _WARPS, 1)
    else:
        chunks = min(rows, 256)
        grid, block = (rows, 1, 1), (_ANY_THREADS, 1, 1)
        mean = rstd.new_empty(rows) if kind == "layer" else None
    partials = rstd.new_empty(chunks, 1, columns)
    arguments = (
        dnormed,
        dnew_residual,
        new_residual,
        rstd,
        weight,
        dx,
        dresidual,
        partials,
        mean,
        rows,
        features,
        dnormed.stride(0),
        0 if dnew_residual is None else dnew_residual.stride(0),
        new_residual.stride(0),
    )
    launch(kernel, grid, block, 0, *arguments)
    if not vectors:
        name = _columns_name(dtypes, kind, has_bias)
        grid = (-(-features // _ANY_THREADS), chunks, 1)
        launch(get_kernel(_SOURCE, name, index), grid, block, 0, *arguments)
    sums = sum_partials(_SOURCE, partials, [(features,)] * (1 + has_bias), torch.float32)
    dweight, dbias = sums[0][0], sums[1][0] if has_bias else None
    return dx, dresidual, dweight, dbias


def _rows(x: Tensor) -> Tensor:
    """Return `x` as (rows, D) with features that lie side by side; rows may have any stride."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else contiguous(x, x.dtype)


def _same_dtype(weight, bias, dtype):
    """Return weight and bias in one dtype, float32 or that of x, contiguous."""
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        dtype = torch.float32
    return contiguous(weight, dtype), None if bias is None else contiguous(bias, dtype)


def _vectors(most: int, features: int, *tensors: Tensor | None) -> tuple[int, int]:
    """Return (features a vector, vectors a lane) of a warp's row, or (1, 0): it cannot have one.

    `most` features fit in a warp's registers.
    """
    vector = 4 if features <= 1024 else 8
    if features % vector or features > most:
        return 1, 0
    for x in tensors:
        if x is not None:
            access = min(16, vector * x.element_size())
            step = x.stride(0) * x.element_size() if x.dim() == 2 else 0
            if (x.data_ptr() | step) % access:
                return 1, 0
    return vector, -(-features // (32 * vector))


@functools.cache
def _fwd_name(dtypes, vector, vectors, kind) -> str:
    types, layer = ", ".join(DTYPES[t] for t in dtypes), str(kind == "layer").lower()
    if vectors:
        return f"add_norm_fwd_kernel<{types}, {vector}, {vectors}, {layer}>"
    return f"add_norm_fwd_any_kernel<{types}, {layer}>"


@functools.cache
def _bwd_name(dtypes, vector, vectors, kind, has_bias) -> str:
    types, layer = ", ".join(DTYPES[t] for t in dtypes), str(kind == "layer").lower()
    if vectors:
        bias = str(has_bias).lower()
        return f"add_norm_bwd_kernel<{types}, {vector}, {vectors}, {layer}, {bias}>"
    return f"add_norm_bwd_any_kernel<{types}, {layer}>"


@functools.cache
def _columns_name(dtypes, kind, has_bias) -> str:
    types, layer = ", ".join(DTYPES[t] for t in dtypes[:2]), str(kind == "layer").lower()
    return f"add_norm_bwd_any_columns_kernel<{types}, {layer}, {str(has_bias).lower()}>"


def instantiations() -> list[tuple[str, str]]:
    """Return (source, name) of the kernels that the models use and of each kind of special case."""
    half, full = torch.bfloat16, torch.float32
    names = []
    for vectors in (2, 3, 6, 8):  # D = 192, 384, 768, 1024
        names += [
            _fwd_name((half, full, full, full), 4, vectors, "rms"),
            _bwd_name((half, full, full), 4, vectors, "rms", False),
            _bwd_name((half, full, full), 4, vectors, "layer", True),
        ]
    for dtype in (full, torch.float16):
        names += [
            _fwd_name((dtype, full, full, full), 4, 3, "layer"),
            _bwd_name((dtype, full, full), 4, 3, "rms", False),
        ]
    names.append(_fwd_name((half, half, half, half), 8, 8, "layer"))
    for kind in ("rms", "layer"):
        names += [
            _fwd_name((half, full, full, full), 1, 0, kind),
            _bwd_name((half, full, full), 1, 0, kind, True),
            _columns_name((half, full, full), kind, True),
        ]
    names.append(sum_kernel(torch.float32))
    return [(_SOURCE, name) for name in names]
