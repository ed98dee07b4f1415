"""The gated norm of Mamba-2 in Triton: a program holds whole rows in registers.

Size letters: D features; R rows, every dimension before the last together.
"""

import torch
import triton
import triton.language as tl

from vim.ops.triton import launching_on, sigmoid, unavailable

__all__ = ["backward", "forward", "unavailable"]

PROGRAMS = 1024
"""Programs of the backward at most, each with a partial sum of dweight; a constant, so that the
order of summation is the same on every GPU."""


@triton.jit
def _gated(y, other, z, r, d, mask, y_r, y_d, other_r, other_d, z_r, z_d, HAS_OTHER: tl.constexpr):
    """The sum before the gate, the gate's argument and its sigmoid: [BLOCK_R, BLOCK_D]."""
    r, d = r[:, None], d[None, :]
    total = tl.load(y + r * y_r + d * y_d, mask=mask, other=0.0).to(tl.float32)
    if HAS_OTHER:
        from_other = tl.load(other + r * other_r + d * other_d, mask=mask, other=0.0)
        total += from_other.to(tl.float32)
    gate = tl.load(z + r * z_r + d * z_d, mask=mask, other=0.0).to(tl.float32)
    return total, gate, sigmoid(gate)


HAS_OTHER = {"HAS_OTHER": lambda args: args["other"] is not None}


@triton.heuristics(HAS_OTHER)
@triton.jit(do_not_specialize=["rows", "eps"])
def gated_rms_norm_fwd_kernel(
    y,
    z,
    weight,
    other,
    out,
    rows,
    features,
    eps,
    y_r,
    y_d,
    z_r,
    z_d,
    other_r,
    other_d,
    HAS_OTHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums in float32."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (r < rows)[:, None] & (d < features)[None, :]  # [BLOCK_R, BLOCK_D]
    total, gate, opened = _gated(
        y, other, z, r, d, mask, y_r, y_d, other_r, other_d, z_r, z_d, HAS_OTHER
    )
    g = total * gate * opened
    scale = 1.0 / tl.sqrt(tl.sum(g * g, axis=1) / features + eps)  # [BLOCK_R]
    w = tl.load(weight + d, mask=d < features, other=0.0).to(tl.float32)  # [BLOCK_D]
    at = out + r[:, None] * features + d[None, :]
    tl.store(at, g * scale[:, None] * w[None, :], mask=mask)


@triton.heuristics(HAS_OTHER)
@triton.jit(do_not_specialize=["rows", "eps"])
def gated_rms_norm_bwd_kernel(
    dout,
    y,
    z,
    weight,
    other,
    dy,
    dz,
    dweight,
    rows,
    features,
    eps,
    dout_r,
    dout_d,
    y_r,
    y_d,
    z_r,
    z_d,
    other_r,
    other_d,
    HAS_OTHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums in float32; dweight (programs, D) are partial sums over a program's rows.

    The gated sum and its norm are computed again.
    """
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = d < features
    w = tl.load(weight + d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    dweight_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        r = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & mask_d[None, :]  # [BLOCK_R, BLOCK_D]
        total, gate, opened = _gated(
            y, other, z, r, d, mask, y_r, y_d, other_r, other_d, z_r, z_d, HAS_OTHER
        )
        silu = gate * opened
        g = total * silu
        scale = 1.0 / tl.sqrt(tl.sum(g * g, axis=1) / features + eps)[:, None]
        unit = g * scale
        from_out = dout + r[:, None] * dout_r + d[None, :] * dout_d
        d_out = tl.load(from_out, mask=mask, other=0.0).to(tl.float32)
        dweight_sum += d_out * unit
        dunit = d_out * w[None, :]
        dg = (dunit - unit * (tl.sum(dunit * unit, axis=1) / features)[:, None]) * scale
        at = r[:, None] * features + d[None, :]
        tl.store(dy + at, dg * silu, mask=mask)
        dgate = dg * total * opened * (1.0 + gate * (1.0 - opened))
        tl.store(dz + at, dgate, mask=mask)
    part = tl.program_id(0).to(tl.int64) * features + d
    tl.store(dweight + part, tl.sum(dweight_sum, axis=0), mask=mask_d)


def forward(y, z, weight, other, eps):
    y_rows, z_rows, other_rows = _rows(y), _rows(z), _rows(other)
    rows, features = y_rows.shape
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    blocks = _blocks(features)
    with launching_on(y):
        gated_rms_norm_fwd_kernel[(triton.cdiv(rows, blocks["BLOCK_R"]),)](
            *(y_rows, z_rows, weight.contiguous(), other_rows, out, rows, features, eps),
            *(*y_rows.stride(), *z_rows.stride(), *_strides(other_rows)),
            **blocks,
        )
    return out


def backward(dout, y, z, weight, other, eps):
    dout_rows, y_rows, z_rows, other_rows = _rows(dout), _rows(y), _rows(z), _rows(other)
    rows, features = y_rows.shape
    blocks = _blocks(features)
    programs = min(PROGRAMS, triton.cdiv(rows, blocks["BLOCK_R"]))
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dz = torch.empty(z.shape, dtype=z.dtype, device=y.device)
    dweight = torch.empty(programs, features, dtype=torch.float32, device=y.device)
    with launching_on(y):
        gated_rms_norm_bwd_kernel[(programs,)](
            *(dout_rows, y_rows, z_rows, weight.contiguous(), other_rows, dy, dz, dweight),
            *(rows, features, eps),
            *(*dout_rows.stride(), *y_rows.stride(), *z_rows.stride(), *_strides(other_rows)),
            **blocks,
        )
    return dy, dz, dweight.sum(0)


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
