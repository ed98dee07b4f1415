"""The selective scan in Triton: a program owns a few channels and walks the tokens.

The state of a program is a tile [BLOCK_N, BLOCK_D] of float32 registers, channels along the lanes:
with 32 channels or more a warp, a lane of the forward owns whole channels, so that the sum over the
state needs no other lane. Where channels are few or the state is large the tile is narrower, and
the compiler spreads the state over the lanes instead. Channels of a program share their group of B
and C. Figures and what was tried: benchmarks/NOTES-triton.md.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), G groups of B and C.
"""

import torch
import triton
import triton.language as tl

from vim.ops.triton import LOG2_E, first_token, launching_on, sigmoid, unavailable

__all__ = ["backward", "forward", "saved_shape", "unavailable"]

CHUNK = 64
"""Tokens between two states that the forward saves for the backward."""

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to a few ulps wherever x lies."""
    # log(1 + e) = 2 atanh(s), by a polynomial in s^2 within 4e-9 of it for 0 <= e <= 1. Taking the
    # logarithm of 1 + e would lose a small e, and costs more.
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    s = e / (2.0 + e)
    s2 = s * s
    p = 0.279614188 + s2 * 0.281746573
    p = 2.0 + s2 * (0.666663159 + s2 * (0.400248537 + s2 * p))
    return tl.maximum(x, 0.0) + s * p


@triton.jit
def _program(channels, groups, state, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Batch item, group, channels [BLOCK_D] and states [BLOCK_N] of this program, and masks."""
    group_channels = channels // groups
    blocks = tl.cdiv(group_channels, BLOCK_D)
    program = tl.program_id(0)
    item = (program // (blocks * groups)).to(tl.int64)
    group = (program // blocks) % groups
    in_group = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = (group * group_channels + in_group).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    return item, group, d, n, in_group < group_channels, n < state


@triton.jit
def _load(rows, step, left, mask, TOKENS: tl.constexpr):
    """TOKENS rows; those from the row `left` on are zero."""
    tokens = ()
    for i in tl.static_range(TOKENS):
        tokens += (tl.load(rows + i * step, mask=mask & (i < left), other=0.0),)
    return tokens


@triton.jit
def _float32(tokens, TOKENS: tl.constexpr):
    converted = ()
    for i in tl.static_range(TOKENS):
        converted += (tokens[i].to(tl.float32),)
    return converted


# A tile [BLOCK_N, BLOCK_D] lies in memory with its channels strided, the state contiguous. Going
# row by row keeps the compiler from laying it out in registers likewise, which would spread the
# state of a channel over lanes and cost shuffles at every token.
@triton.jit
def _load_tile(pointers, stride_n, n, state, mask_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for k in range(state):
        row = tl.load(pointers + k * stride_n, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        tile = tl.where(n[:, None] == k, row[None, :], tile)
    return tile


@triton.jit
def _store_tile(pointers, stride_n, tile, n, state, mask_d):
    for k in range(state):
        row = tl.sum(tl.where(n[:, None] == k, tile, 0.0), axis=0)  # [BLOCK_D]
        tl.store(pointers + k * stride_n, row, mask=mask_d)


@triton.jit
def _step_sizes(dt, bias, left, DT_SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr):
    """Step sizes of TOKENS rows; zero from the row `left` on, which leaves the state as it is."""
    deltas = ()
    for i in tl.static_range(TOKENS):
        delta = dt[i] + bias
        if DT_SOFTPLUS:
            delta = _softplus(delta)
        deltas += (tl.where(i < left, delta, 0.0),)
    return deltas


FLAGS = {
    "HAS_D": lambda args: args["D"] is not None,
    "HAS_Z": lambda args: args["z"] is not None,
    "HAS_DT_BIAS": lambda args: args["dt_bias"] is not None,
    "HAS_INITIAL_STATE": lambda args: args["initial_state"] is not None,
}


@triton.heuristics(FLAGS)
@triton.jit(do_not_specialize=["length"])
def selective_scan_fwd_kernel(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    y,
    final_state,
    saved,
    length,
    channels,
    groups,
    state,
    u_b,
    u_l,
    u_d,
    dt_b,
    dt_l,
    dt_d,
    A_d,
    A_n,
    B_b,
    B_l,
    B_g,
    B_n,
    C_b,
    C_l,
    C_g,
    C_n,
    z_b,
    z_l,
    z_d,
    initial_b,
    initial_d,
    initial_n,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Scan TOKENS tokens at a time, whose loads overlap; state and sums in float32."""
    item, group, d, n, mask_d, mask_n = _program(channels, groups, state, BLOCK_N, BLOCK_D)
    mask = mask_n[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]

    u_rows, u_step = first_token(u + d * u_d, item, u_b, u_l, length, REVERSE)
    dt_rows, dt_step = first_token(dt + d * dt_d, item, dt_b, dt_l, length, REVERSE)
    B_rows, B_step = first_token(
        B + group * B_g + n * tl.cast(B_n, tl.int64), item, B_b, B_l, length, REVERSE
    )
    C_rows, C_step = first_token(
        C + group * C_g + n * tl.cast(C_n, tl.int64), item, C_b, C_l, length, REVERSE
    )
    wide_channels = tl.cast(channels, tl.int64)
    y_rows, y_step = first_token(y + d, item, length * wide_channels, channels, length, REVERSE)
    if HAS_Z:
        z_rows, z_step = first_token(z + d * z_d, item, z_b, z_l, length, REVERSE)

    A_log2 = _load_tile(A + d * A_d, A_n, n, state, mask_d, BLOCK_N, BLOCK_D) * LOG2_E
    skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DT_BIAS:
        bias = tl.load(dt_bias + d, mask=mask_d, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_INITIAL_STATE:
        at = item * initial_b + d * initial_d
        h = _load_tile(initial_state + at, initial_n, n, state, mask_d, BLOCK_N, BLOCK_D)

    saved_tile = saved + item * tl.cdiv(length, CHUNK) * state * channels
    saved_tile = saved_tile + n[:, None] * wide_channels + d[None, :]
    # The rows of the next TOKENS tokens are under way while these are computed.
    next_u = _load(u_rows, u_step, length, mask_d, TOKENS)  # [BLOCK_D] each
    next_dt = _load(dt_rows, dt_step, length, mask_d, TOKENS)  # [BLOCK_D] each
    next_B = _load(B_rows, B_step, length, mask_n, TOKENS)  # [BLOCK_N] each
    next_C = _load(C_rows, C_step, length, mask_n, TOKENS)  # [BLOCK_N] each
    next_z = next_u
    if HAS_Z:
        next_z = _load(z_rows, z_step, length, mask_d, TOKENS)  # [BLOCK_D] each
    for t in range(0, length, TOKENS):
        if SAVE_STATES:  # noqa: SIM102, since one of the two is decided when compiling
            if t % CHUNK == 0:
                tl.store(saved_tile, h, mask=mask)
                saved_tile += state * wide_channels
        left = length - t
        us, dts = _float32(next_u, TOKENS), _float32(next_dt, TOKENS)
        Bs, Cs = _float32(next_B, TOKENS), _float32(next_C, TOKENS)
        zs = _float32(next_z, TOKENS)
        u_rows += TOKENS * u_step
        dt_rows += TOKENS * dt_step
        B_rows += TOKENS * B_step
        C_rows += TOKENS * C_step
        next_u = _load(u_rows, u_step, left - TOKENS, mask_d, TOKENS)
        next_dt = _load(dt_rows, dt_step, left - TOKENS, mask_d, TOKENS)
        next_B = _load(B_rows, B_step, left - TOKENS, mask_n, TOKENS)
        next_C = _load(C_rows, C_step, left - TOKENS, mask_n, TOKENS)
        if HAS_Z:
            z_rows += TOKENS * z_step
            next_z = _load(z_rows, z_step, left - TOKENS, mask_d, TOKENS)
        deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
        for i in tl.static_range(TOKENS):
            decay = tl.exp2(deltas[i][None, :] * A_log2)
            h = decay * h + (deltas[i] * us[i])[None, :] * Bs[i][:, None]
            out = tl.sum(h * Cs[i][:, None], axis=0) + skip * us[i]
            if HAS_Z:
                out *= zs[i] * sigmoid(zs[i])
            tl.store(y_rows + i * y_step, out, mask=mask_d & (i < left))
        y_rows += TOKENS * y_step

    _store_tile(final_state + (item * channels + d) * state, 1, h, n, state, mask_d)


@triton.heuristics({**FLAGS, "HAS_DFINAL_STATE": lambda args: args["dfinal_state"] is not None})
@triton.jit(do_not_specialize=["length"])
def selective_scan_bwd_kernel(
    dy,
    dfinal_state,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    saved,
    scratch,
    du,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dz,
    ddt_bias,
    dinitial_state,
    batch,
    length,
    channels,
    groups,
    state,
    scratch_program,
    dy_b,
    dy_l,
    dy_d,
    u_b,
    u_l,
    u_d,
    dt_b,
    dt_l,
    dt_d,
    B_b,
    B_l,
    B_g,
    B_n,
    C_b,
    C_l,
    C_g,
    C_n,
    z_b,
    z_l,
    z_d,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    HAS_DFINAL_STATE: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Walk the chunks from the last token scanned to the first; gradients and sums in float32.

    Of a chunk, first the state before every TOKENS tokens is computed again, into `scratch`; then,
    from the last of them, the states and decays of TOKENS tokens, which stay in registers. What is
    summed over channels (dB, dC) or the batch (dA, dD, ddt_bias) leaves as partial sums, one of
    each program.
    """
    item, group, d, n, mask_d, mask_n = _program(channels, groups, state, BLOCK_N, BLOCK_D)
    mask = mask_n[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]
    tile_at = d[None, :] * state + n[:, None]
    wide_channels = tl.cast(channels, tl.int64)
    row = length * wide_channels

    dy_rows, dy_step = first_token(dy + d * dy_d, item, dy_b, dy_l, length, REVERSE)
    u_rows, u_step = first_token(u + d * u_d, item, u_b, u_l, length, REVERSE)
    dt_rows, dt_step = first_token(dt + d * dt_d, item, dt_b, dt_l, length, REVERSE)
    B_row = B + group * B_g + n * tl.cast(B_n, tl.int64)
    B_rows, B_step = first_token(B_row, item, B_b, B_l, length, REVERSE)
    C_row = C + group * C_g + n * tl.cast(C_n, tl.int64)
    C_rows, C_step = first_token(C_row, item, C_b, C_l, length, REVERSE)
    du_rows, out_step = first_token(du + d, item, row, channels, length, REVERSE)
    ddt_rows, _ = first_token(ddt + d, item, row, channels, length, REVERSE)
    if HAS_Z:
        z_rows, z_step = first_token(z + d * z_d, item, z_b, z_l, length, REVERSE)
        dz_rows, _ = first_token(dz + d, item, row, channels, length, REVERSE)

    # dB and dC are (blocks of channels, B, L, G, N).
    blocks = tl.cdiv(channels // groups, BLOCK_D)
    part = (tl.program_id(0) % blocks).to(tl.int64) * batch + item
    group_step = tl.cast(groups, tl.int64) * state
    part_at = group * state + n
    dB_rows, part_step = first_token(
        dB + part_at, part, length * group_step, group_step, length, REVERSE
    )
    dC_rows, _ = first_token(dC + part_at, part, length * group_step, group_step, length, REVERSE)

    A_log2 = tl.load(A + tile_at, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DT_BIAS:
        bias = tl.load(dt_bias + d, mask=mask_d, other=0.0).to(tl.float32)
    dh = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    state_at = item * channels * state + tile_at
    if HAS_DFINAL_STATE:
        dh = tl.load(dfinal_state + state_at, mask=mask, other=0.0)
    dA_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dD_sum = tl.zeros([BLOCK_D], tl.float32)
    dbias_sum = tl.zeros([BLOCK_D], tl.float32)

    chunks = tl.cdiv(length, CHUNK)
    saved_tile = saved + item * chunks * state * channels
    saved_tile = saved_tile + n[:, None] * wide_channels + d[None, :]
    size: tl.constexpr = BLOCK_N * BLOCK_D
    scratch_tile = scratch + tl.program_id(0).to(tl.int64) * scratch_program
    scratch_tile = scratch_tile + n[:, None] + tl.arange(0, BLOCK_D)[None, :] * BLOCK_N

    for chunk in range(chunks - 1, -1, -1):
        start = tl.cast(chunk, tl.int64) * CHUNK
        end = tl.minimum(start + CHUNK, length)
        h = tl.load(saved_tile + chunk * state * wide_channels, mask=mask, other=0.0)
        left = length - start
        next_u = _load(u_rows + start * u_step, u_step, left, mask_d, TOKENS)  # [BLOCK_D] each
        next_dt = _load(dt_rows + start * dt_step, dt_step, left, mask_d, TOKENS)  # likewise
        next_B = _load(B_rows + start * B_step, B_step, left, mask_n, TOKENS)  # [BLOCK_N] each
        for t in range(start, end, TOKENS):
            left = length - t
            tl.store(scratch_tile + (t - start) // TOKENS * size, h)
            us, dts = _float32(next_u, TOKENS), _float32(next_dt, TOKENS)
            Bs = _float32(next_B, TOKENS)
            ahead = t + TOKENS
            next_u = _load(u_rows + ahead * u_step, u_step, left - TOKENS, mask_d, TOKENS)
            next_dt = _load(dt_rows + ahead * dt_step, dt_step, left - TOKENS, mask_d, TOKENS)
            next_B = _load(B_rows + ahead * B_step, B_step, left - TOKENS, mask_n, TOKENS)
            deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
            for i in tl.static_range(TOKENS):
                decay = tl.exp2(deltas[i][None, :] * A_log2)
                h = decay * h + (deltas[i] * us[i])[None, :] * Bs[i][:, None]
        tl.debug_barrier()

        for back in range(0, tl.cdiv(end - start, TOKENS)):
            step = tl.cdiv(end - start, TOKENS) - 1 - back
            t = start + step * TOKENS
            left = length - t
            h = tl.load(scratch_tile + step * size)
            us = _load(u_rows + t * u_step, u_step, left, mask_d, TOKENS)  # [BLOCK_D] each
            dts = _load(dt_rows + t * dt_step, dt_step, left, mask_d, TOKENS)  # [BLOCK_D] each
            dys = _load(dy_rows + t * dy_step, dy_step, left, mask_d, TOKENS)  # [BLOCK_D] each
            Bs = _load(B_rows + t * B_step, B_step, left, mask_n, TOKENS)  # [BLOCK_N] each
            Cs = _load(C_rows + t * C_step, C_step, left, mask_n, TOKENS)  # [BLOCK_N] each
            if HAS_Z:
                zs = _load(z_rows + t * z_step, z_step, left, mask_d, TOKENS)  # [BLOCK_D] each
                zs = _float32(zs, TOKENS)
            us, dts, dys = _float32(us, TOKENS), _float32(dts, TOKENS), _float32(dys, TOKENS)
            Bs, Cs = _float32(Bs, TOKENS), _float32(Cs, TOKENS)
            deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
            decays = ()
            states = (h,)
            for i in tl.static_range(TOKENS):
                decay = tl.exp2(deltas[i][None, :] * A_log2)
                h = decay * h + (deltas[i] * us[i])[None, :] * Bs[i][:, None]
                decays += (decay,)
                states += (h,)
            for i in tl.static_range(TOKENS - 1, -1, -1):
                u_t, dy_t, delta = us[i], dys[i], deltas[i]
                B_t, C_t = Bs[i][:, None], Cs[i][:, None]
                token = t + i
                inside = i < left
                if HAS_Z:
                    gate = sigmoid(zs[i])
                    ungated = tl.sum(states[i + 1] * C_t, axis=0) + skip * u_t
                    dz_t = dy_t * ungated * gate * (1.0 + zs[i] * (1.0 - gate))
                    tl.store(dz_rows + token * out_step, dz_t, mask=mask_d & inside)
                    dy_t = dy_t * zs[i] * gate
                dh += dy_t[None, :] * C_t
                dC_t = tl.sum(dy_t[None, :] * states[i + 1], axis=1)
                tl.store(dC_rows + token * part_step, dC_t, mask=mask_n & inside)
                dB_t = tl.sum((delta * u_t)[None, :] * dh, axis=1)
                tl.store(dB_rows + token * part_step, dB_t, mask=mask_n & inside)
                ddrive = tl.sum(dh * B_t, axis=0)
                du_t = ddrive * delta + dy_t * skip
                tl.store(du_rows + token * out_step, du_t, mask=mask_d & inside)
                dh = dh * decays[i]
                dexponent = dh * states[i]
                ddt_t = ddrive * u_t + tl.sum(dexponent * A_log2, axis=0) * LN_2
                if DT_SOFTPLUS:
                    ddt_t *= sigmoid(dts[i] + bias)
                tl.store(ddt_rows + token * out_step, ddt_t, mask=mask_d & inside)
                dA_sum += dexponent * delta[None, :]
                dD_sum += dy_t * u_t
                dbias_sum += tl.where(inside, ddt_t, 0.0)
        tl.debug_barrier()

    tl.store(dA + state_at, dA_sum, mask=mask)
    if HAS_D:
        tl.store(dD + item * channels + d, dD_sum, mask=mask_d)
    if HAS_DT_BIAS:
        tl.store(ddt_bias + item * channels + d, dbias_sum, mask=mask_d)
    if HAS_INITIAL_STATE:
        tl.store(dinitial_state + state_at, dh, mask=mask)


def forward(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states):
    batch, length, channels = u.shape
    state = A.shape[1]
    B, C = _grouped(B), _grouped(C)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final_state = torch.empty(batch, channels, state, dtype=torch.float32, device=u.device)
    shape = saved_shape(batch, length, channels, state) if save_states else (0,)
    saved = torch.empty(shape, dtype=torch.float32, device=u.device)
    groups = B.shape[2]
    blocks = _forward_blocks(u, state, groups)
    with launching_on(u):
        selective_scan_fwd_kernel[_grid(batch, channels, groups, blocks)](
            u,
            dt,
            A,
            B,
            C,
            _contiguous(D),
            z,
            _contiguous(dt_bias),
            initial_state,
            y,
            final_state,
            saved,
            length,
            channels,
            groups,
            state,
            *u.stride(),
            *dt.stride(),
            *A.stride(),
            *B.stride(),
            *C.stride(),
            *_strides(z),
            *_strides(initial_state),
            DT_SOFTPLUS=dt_softplus,
            REVERSE=reverse,
            SAVE_STATES=save_states,
            CHUNK=CHUNK,
            **blocks,
        )
    return y, final_state, saved


def backward(
    dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, initial_state, saved, dt_softplus, reverse
):
    batch, length, channels = u.shape
    state = A.shape[1]
    B_, C_ = _grouped(B), _grouped(C)
    groups = B_.shape[2]
    blocks = _backward_blocks(u, state, groups)
    grid = _grid(batch, channels, groups, blocks)

    def like(x):
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def partial(present, *shape):
        return torch.empty(shape, dtype=torch.float32, device=u.device) if present else None

    du, ddt, dz = like(u), like(dt), like(z)
    parts = triton.cdiv(channels // groups, blocks["BLOCK_D"])
    dA = partial(True, batch, channels, state)
    dB = partial(True, parts, batch, length, groups, state)
    dC = torch.empty_like(dB)
    dD = partial(D is not None, batch, channels)
    ddt_bias = partial(dt_bias is not None, batch, channels)
    dinitial_state = partial(initial_state is not None, batch, channels, state)
    tile = blocks["BLOCK_N"] * blocks["BLOCK_D"]
    scratch = partial(True, grid[0], min(CHUNK, length) // blocks["TOKENS"] + 1, tile)
    with launching_on(u):
        selective_scan_bwd_kernel[grid](
            dy,
            _contiguous(dfinal_state),
            u,
            dt,
            A.contiguous(),
            B_,
            C_,
            _contiguous(D),
            z,
            _contiguous(dt_bias),
            initial_state,
            saved,
            scratch,
            du,
            ddt,
            dA,
            dB,
            dC,
            dD,
            dz,
            ddt_bias,
            dinitial_state,
            batch,
            length,
            channels,
            groups,
            state,
            scratch.stride(0),
            *dy.stride(),
            *u.stride(),
            *dt.stride(),
            *B_.stride(),
            *C_.stride(),
            *_strides(z),
            DT_SOFTPLUS=dt_softplus,
            REVERSE=reverse,
            CHUNK=CHUNK,
            **blocks,
        )

    def total(parts):
        return None if parts is None else parts.sum(0)

    dB, dC = total(dB).view(B.shape), total(dC).view(C.shape)
    return du, ddt, total(dA), dB, dC, total(dD), dz, total(ddt_bias), dinitial_state


def saved_shape(batch: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    """Shape of the states before each chunk, channels contiguous."""
    return batch, (length + CHUNK - 1) // CHUNK, state, channels


def _forward_blocks(u, state: int, groups: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(state)
    block_d = _block_d(u, groups, most=min(64, max(8, 1024 // block_n)), least=4)
    warps = min(8, max(1, block_n * block_d // 1024))
    tokens = 8 if block_n * block_d <= 128 else 2
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "TOKENS": tokens, "num_warps": warps}


def _backward_blocks(u, state: int, groups: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(state)
    block_d = _block_d(u, groups, most=min(32, max(8, 512 // block_n)), least=8)
    warps = min(8, max(1, block_n * block_d // 512))
    tokens = 4 if block_n * block_d <= 128 else 2
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "TOKENS": tokens, "num_warps": warps}


def _block_d(u, groups: int, most: int, least: int) -> int:
    """Channels of a program: `most`, or fewer where that leaves the GPU's schedulers idle."""
    batch, _, channels = u.shape
    schedulers = 1
    if u.is_cuda:
        schedulers = 4 * torch.cuda.get_device_properties(u.device).multi_processor_count
    block_d = min(most, triton.next_power_of_2(channels // groups))
    while block_d > least and batch * channels < block_d * schedulers:
        block_d //= 2
    return max(block_d, least)


def _grid(batch: int, channels: int, groups: int, blocks: dict[str, int]) -> tuple[int]:
    return (batch * groups * triton.cdiv(channels // groups, blocks["BLOCK_D"]),)


def _grouped(x):
    """(B, L, N) or (B, L, G, N) -> (B, L, G, N)."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _contiguous(x):
    return None if x is None else x.contiguous()


def _strides(x) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
