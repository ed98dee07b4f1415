"""The short causal convolution in Triton: a program computes a tile of tokens and channels.

Positions count in the order of the scan; the inputs before position 0 are the initial state.

Size letters: B batch, L tokens, D channels, K width of the kernel (d_conv).
"""

import torch
import triton
import triton.language as tl

from vim.ops.triton import first_token, launching_on, sigmoid, unavailable

__all__ = ["backward", "forward", "unavailable"]

BLOCK_L, BLOCK_D = 32, 64


@triton.jit
def _program(length, channels, L_BLOCKS, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Batch item, block of tokens, its positions [BLOCK_L], channels [BLOCK_D] and their mask."""
    program = tl.program_id(0)
    d_blocks = tl.cdiv(channels, BLOCK_D)
    item = (program // (d_blocks * L_BLOCKS)).to(tl.int64)
    l_block = (program // d_blocks) % L_BLOCKS
    d = (program % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    position = l_block * BLOCK_L + tl.arange(0, BLOCK_L)
    return item, l_block, position.to(tl.int64), d.to(tl.int64), d < channels


@triton.jit
def _inputs(
    x,
    x_step,
    initial,
    initial_l,
    p,
    mask_d,
    length,
    K: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
):
    """Inputs in float32 at positions p, zero outside of input and initial state."""
    p = p[:, None]
    inside = (p >= 0) & (p < length) & mask_d[None, :]
    values = tl.load(x[None, :] + p * x_step, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL_STATE:
        at = p + (K - 1)
        before = (p < 0) & (at >= 0) & mask_d[None, :]
        past = tl.load(initial[None, :] + at * initial_l, mask=before, other=0.0)
        values += past.to(tl.float32)
    return values  # [BLOCK_L, BLOCK_D]


@triton.jit
def _preactivation(
    x,
    x_step,
    initial,
    initial_l,
    weight,
    weight_k,
    bias,
    p,
    mask_d,
    length,
    K: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    total = tl.zeros([BLOCK_L, BLOCK_D], tl.float32) + bias[None, :]
    for k in tl.static_range(K):
        tap = tl.load(weight + k * weight_k, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        at = p - (K - 1) + k
        total += tap[None, :] * _inputs(
            x, x_step, initial, initial_l, at, mask_d, length, K, HAS_INITIAL_STATE
        )
    return total


FLAGS = {
    "HAS_BIAS": lambda args: args["bias"] is not None,
    "HAS_INITIAL_STATE": lambda args: args["initial_state"] is not None,
}


@triton.heuristics(FLAGS)
@triton.jit(do_not_specialize=["length"])
def causal_conv1d_fwd_kernel(
    x,
    weight,
    bias,
    initial_state,
    y,
    final_state,
    length,
    channels,
    x_b,
    x_l,
    x_d,
    weight_d,
    weight_k,
    initial_b,
    initial_l,
    initial_d,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums in float32. The first program along L also copies the final state."""
    item, l_block, p, d, mask_d = _program(
        length, channels, tl.cdiv(length, BLOCK_L), BLOCK_L, BLOCK_D
    )
    wide_channels = tl.cast(channels, tl.int64)
    x_row, x_step = first_token(x + d * x_d, item, x_b, x_l, length, REVERSE)
    y_row, y_step = first_token(y + d, item, length * wide_channels, channels, length, REVERSE)
    initial = x
    if HAS_INITIAL_STATE:
        initial = initial_state + item * initial_b + d * initial_d
    bias_row = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias_row = tl.load(bias + d, mask=mask_d, other=0.0).to(tl.float32)

    out = _preactivation(
        x_row,
        x_step,
        initial,
        initial_l,
        weight + d * weight_d,
        weight_k,
        bias_row,
        p,
        mask_d,
        length,
        K,
        HAS_INITIAL_STATE,
        BLOCK_L,
        BLOCK_D,
    )
    if SILU:
        out *= sigmoid(out)
    inside = (p < length)[:, None] & mask_d[None, :]
    tl.store(y_row[None, :] + p[:, None] * y_step, out, mask=inside)

    if l_block == 0:
        for k in tl.static_range(K - 1):
            at = length - (K - 1) + k + tl.arange(0, 1).to(tl.int64)
            row = _inputs(
                x_row, x_step, initial, initial_l, at, mask_d, length, K, HAS_INITIAL_STATE
            )
            final_row = final_state + (item * (K - 1) + k) * channels + d
            tl.store(final_row[None, :], row, mask=mask_d[None, :])


@triton.heuristics({**FLAGS, "HAS_DFINAL_STATE": lambda args: args["dfinal_state"] is not None})
@triton.jit(do_not_specialize=["length"])
def causal_conv1d_bwd_kernel(
    dy,
    dfinal_state,
    x,
    weight,
    bias,
    initial_state,
    dx,
    dweight,
    dbias,
    dinitial_state,
    length,
    channels,
    l_blocks,
    dy_b,
    dy_l,
    dy_d,
    x_b,
    x_l,
    x_d,
    weight_d,
    weight_k,
    initial_b,
    initial_l,
    initial_d,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    HAS_DFINAL_STATE: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums in float32; dweight (programs, K, D) and dbias (programs, D) are partial sums.

    With an initial state the positions begin K - 1 earlier, so that its gradient comes out, too.
    The sums before the activation are computed again.
    """
    item, l_block, p, d, mask_d = _program(length, channels, l_blocks, BLOCK_L, BLOCK_D)
    if HAS_INITIAL_STATE:
        p -= K - 1
    wide_channels = tl.cast(channels, tl.int64)
    row = length * wide_channels
    dy_row, dy_step = first_token(dy + d * dy_d, item, dy_b, dy_l, length, REVERSE)
    x_row, x_step = first_token(x + d * x_d, item, x_b, x_l, length, REVERSE)
    dx_row, dx_step = first_token(dx + d, item, row, channels, length, REVERSE)
    initial = x
    if HAS_INITIAL_STATE:
        initial = initial_state + item * initial_b + d * initial_d
    weight_row = weight + d * weight_d
    bias_row = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias_row = tl.load(bias + d, mask=mask_d, other=0.0).to(tl.float32)

    dinput = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    dpre_here = dinput
    for ahead in tl.static_range(K - 1, -1, -1):
        q = p + ahead
        inside = ((q >= 0) & (q < length))[:, None] & mask_d[None, :]
        dpre = tl.load(dy_row[None, :] + q[:, None] * dy_step, mask=inside, other=0.0)
        dpre = dpre.to(tl.float32)
        if SILU:
            pre = _preactivation(
                x_row,
                x_step,
                initial,
                initial_l,
                weight_row,
                weight_k,
                bias_row,
                q,
                mask_d,
                length,
                K,
                HAS_INITIAL_STATE,
                BLOCK_L,
                BLOCK_D,
            )
            gate = sigmoid(pre)
            dpre *= gate * (1.0 + pre * (1.0 - gate))
        tap = tl.load(weight_row + (K - 1 - ahead) * weight_k, mask=mask_d, other=0.0)
        dinput += tap.to(tl.float32)[None, :] * dpre
        dpre_here = dpre

    part = item * l_blocks + l_block
    for k in tl.static_range(K):
        at = p - (K - 1) + k
        values = _inputs(
            x_row, x_step, initial, initial_l, at, mask_d, length, K, HAS_INITIAL_STATE
        )
        tl.store(
            dweight + (part * K + k) * channels + d, tl.sum(dpre_here * values, 0), mask=mask_d
        )
    if HAS_BIAS:
        tl.store(dbias + part * channels + d, tl.sum(dpre_here, 0), mask=mask_d)

    p = p[:, None]
    if HAS_DFINAL_STATE:
        at = p - (length - (K - 1))
        last = (at >= 0) & (p < length) & mask_d[None, :]
        from_state = dfinal_state + (item * (K - 1) + at) * channels + d[None, :]
        dinput += tl.load(from_state, mask=last, other=0.0).to(tl.float32)
    inside = (p >= 0) & (p < length) & mask_d[None, :]
    tl.store(dx_row[None, :] + p * dx_step, dinput, mask=inside)
    if HAS_INITIAL_STATE:
        at = item * (K - 1) + p + (K - 1)
        before = (p < 0) & mask_d[None, :]
        tl.store(dinitial_state + at * channels + d[None, :], dinput, mask=before)


def forward(x, weight, bias, initial_state, activation, reverse):
    batch, length, channels = x.shape
    width = weight.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=x.device)
    grid = (batch * triton.cdiv(length, BLOCK_L) * triton.cdiv(channels, BLOCK_D),)
    with launching_on(x):
        causal_conv1d_fwd_kernel[grid](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            initial_state,
            y,
            final_state,
            length,
            channels,
            *x.stride(),
            *weight.stride(),
            *_strides(initial_state),
            SILU=activation == "silu",
            REVERSE=reverse,
            K=width,
            BLOCK_L=BLOCK_L,
            BLOCK_D=BLOCK_D,
        )
    return y, final_state


def backward(dy, dfinal_state, x, weight, bias, initial_state, activation, reverse):
    batch, length, channels = x.shape
    width = weight.shape[1]
    before = 0 if initial_state is None else width - 1
    l_blocks = triton.cdiv(length + before, BLOCK_L)
    parts = batch * l_blocks

    def partial(*shape):
        return torch.empty(parts, *shape, dtype=torch.float32, device=x.device)

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = partial(width, channels)
    dbias = None if bias is None else partial(channels)
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = torch.empty(
            initial_state.shape, dtype=initial_state.dtype, device=x.device
        )
    with launching_on(x):
        causal_conv1d_bwd_kernel[(parts * triton.cdiv(channels, BLOCK_D),)](
            dy,
            None if dfinal_state is None else dfinal_state.contiguous(),
            x,
            weight,
            None if bias is None else bias.contiguous(),
            initial_state,
            dx,
            dweight,
            dbias,
            dinitial_state,
            length,
            channels,
            l_blocks,
            *dy.stride(),
            *x.stride(),
            *weight.stride(),
            *_strides(initial_state),
            SILU=activation == "silu",
            REVERSE=reverse,
            K=width,
            BLOCK_L=BLOCK_L,
            BLOCK_D=BLOCK_D,
        )
    dweight = dweight.sum(0).t().contiguous()
    return dx, dweight, None if dbias is None else dbias.sum(0), dinitial_state


def _strides(x) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
