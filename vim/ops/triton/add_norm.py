"""Residual addition and norm in Triton: a program holds whole rows in registers.

Size letters: D features; R rows, every dimension before the last together.
"""

import torch
import triton
import triton.language as tl

from vim.ops.add_norm import in_dtypes
from vim.ops.triton import launching_on, unavailable

__all__ = ["backward", "forward", "unavailable"]

PROGRAMS = 512
"""Programs of the backward at most, each with a partial sum of dweight; a constant, so that the
order of summation is the same on every GPU."""


@triton.heuristics(
    {
        "HAS_RESIDUAL": lambda args: args["residual"] is not None,
        "HAS_BIAS": lambda args: args["bias"] is not None,
    }
)
@triton.jit(do_not_specialize=["rows", "eps"])
def add_norm_fwd_kernel(
    x,
    residual,
    weight,
    bias,
    normed,
    new_residual,
    rstd,
    rows,
    features,
    eps,
    x_r,
    x_d,
    residual_r,
    residual_d,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums in float32."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (r < rows)[:, None] & (d < features)[None, :]  # [BLOCK_R, BLOCK_D]
    at = r[:, None] * features + d[None, :]

    total = tl.load(x + r[:, None] * x_r + d[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        from_residual = residual + r[:, None] * residual_r + d[None, :] * residual_d
        total += tl.load(from_residual, mask=mask, other=0.0).to(tl.float32)
    stored = total.to(new_residual.dtype.element_ty)
    tl.store(new_residual + at, stored, mask=mask)

    unit = stored.to(tl.float32)
    if LAYER:
        mean = tl.sum(unit, axis=1) / features  # [BLOCK_R]
        unit = tl.where(mask, unit - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(unit * unit, axis=1) / features + eps)  # [BLOCK_R]
    tl.store(rstd + r, scale, mask=r < rows)
    out = unit * scale[:, None]
    out *= tl.load(weight + d, mask=d < features, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + d, mask=d < features, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + at, out, mask=mask)


@triton.heuristics({"HAS_DRESIDUAL": lambda args: args["dresidual"] is not None})
@triton.jit(do_not_specialize=["rows"])
def add_norm_bwd_kernel(
    dnormed,
    dresidual,
    new_residual,
    rstd,
    weight,
    dsum,
    dweight,
    dbias,
    rows,
    features,
    dnormed_r,
    dnormed_d,
    dresidual_r,
    dresidual_d,
    HAS_DRESIDUAL: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums in float32; dweight and dbias (programs, D) are partial sums over a program's rows."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = d < features
    scale_d = tl.load(weight + d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    dweight_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dbias_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        r = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & mask_d[None, :]  # [BLOCK_R, BLOCK_D]
        at = r[:, None] * features + d[None, :]
        unit = tl.load(new_residual + at, mask=mask, other=0.0).to(tl.float32)
        if LAYER:
            mean = tl.sum(unit, axis=1) / features  # [BLOCK_R]
            unit = tl.where(mask, unit - mean[:, None], 0.0)
        scale = tl.load(rstd + r, mask=r < rows, other=0.0)  # [BLOCK_R]
        unit *= scale[:, None]
        from_normed = dnormed + r[:, None] * dnormed_r + d[None, :] * dnormed_d
        dout = tl.load(from_normed, mask=mask, other=0.0).to(tl.float32)
        dweight_sum += dout * unit
        dbias_sum += dout
        dunit = dout * scale_d[None, :]
        dr = dunit - unit * (tl.sum(dunit * unit, axis=1) / features)[:, None]
        if LAYER:
            dr -= (tl.sum(dunit, axis=1) / features)[:, None]
        dr *= scale[:, None]
        if HAS_DRESIDUAL:
            from_residual = dresidual + r[:, None] * dresidual_r + d[None, :] * dresidual_d
            dr += tl.load(from_residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(dsum + at, dr, mask=mask)
    part = tl.program_id(0).to(tl.int64) * features + d
    tl.store(dweight + part, tl.sum(dweight_sum, axis=0), mask=mask_d)
    tl.store(dbias + part, tl.sum(dbias_sum, axis=0), mask=mask_d)


def forward(x, residual, weight, bias, eps, kind, residual_dtype):
    x_rows, residual_rows = _rows(x), _rows(residual)
    rows, features = x_rows.shape
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    blocks = _blocks(features)
    with launching_on(x):
        add_norm_fwd_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]),)](
            x_rows,
            residual_rows,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            normed,
            new_residual,
            rstd,
            rows,
            features,
            eps,
            *x_rows.stride(),
            *_strides(residual_rows),
            LAYER=kind == "layer",
            **blocks,
        )
    return normed, new_residual, rstd


def backward(dnormed, dresidual, new_residual, rstd, weight, x_dtype, kind, has_bias):
    dnormed_rows, dresidual_rows = _rows(dnormed), _rows(dresidual)
    rows, features = dnormed_rows.shape
    blocks = _blocks(features)
    programs = min(PROGRAMS, triton.cdiv(rows, blocks["BLOCK_R"]))
    # The wider of the two dtypes in which the gradient is asked for.
    dtype = torch.promote_types(dnormed.dtype, new_residual.dtype)
    dsum = torch.empty(new_residual.shape, dtype=dtype, device=dnormed.device)
    dweight = torch.empty(programs, features, dtype=torch.float32, device=dnormed.device)
    dbias = torch.empty_like(dweight)
    with launching_on(dnormed):
        add_norm_bwd_kernel[(programs,)](
            dnormed_rows,
            dresidual_rows,
            new_residual,
            rstd,
            weight.contiguous(),
            dsum,
            dweight,
            dbias,
            rows,
            features,
            *dnormed_rows.stride(),
            *_strides(dresidual_rows),
            LAYER=kind == "layer",
            **blocks,
        )
    return *in_dtypes(dsum, x_dtype, new_residual.dtype), dweight.sum(0), dbias.sum(0)


def _blocks(features: int) -> dict[str, int]:
    """Some 16 values a thread, more where a row is long."""
    block_d = triton.next_power_of_2(features)
    block_r = max(1, 2048 // block_d)
    warps = min(16, max(4, block_d // 512))
    return {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": warps}


def _rows(x):
    """(..., D) -> (R, D), without a copy where the strides allow it."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def _strides(x) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()
