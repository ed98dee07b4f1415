"""The selective scan in Triton: a program owns a few channels and walks the tokens.

The state of a program is a tile [BLOCK_N, BLOCK_D] of float32 registers. The compiler derives how
it lies in registers from the loads and stores of whole tiles, and any two that differ would cost a
conversion at every token. So in memory all of them have the channels contiguous, and the channels
are numbered such that the compiler sees two neighbours at a time in the scan, four in its backward.
With 64 channels a warp of the scan owns these whole, two a lane, and the sum over the state needs
no other lane. The backward sums over channels, too, and has a lane hold 4 states of 4 channels.

Where a sequence is long and channels are few, it is cut into segments along the tokens: one pass
finds what each segment alone leaves of the state, which is carried over, and another scans them all
at once. Channels of a program share their group of B and C. Figures and what was tried:
benchmarks/NOTES.md.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), G groups of B and C.
"""

import torch
import triton
import triton.language as tl

from vim.ops.triton import LOG2_E, first_token, launching_on, sigmoid, unavailable

__all__ = ["backward", "forward", "forward_bidirectional", "saved_shape", "unavailable"]

CHUNK = 64
"""Tokens between two states that the forward saves for the backward."""

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to a few ulps wherever x lies."""
    # log(1 + e) by a polynomial whose relative error is 3e-8 for 0 <= e <= 1: see softplus in
    # kernels/cuda/selective_scan.cuh. Taking the logarithm of 1 + e would lose a small e, and costs
    # more; so does a quotient.
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = -0.0295041464 + e * 0.00523242168
    p = 0.191059351 + e * (-0.136630952 + e * (0.0782241747 + e * p))
    p = -0.499994934 + e * (0.333190948 + e * (-0.248429641 + e * p))
    return tl.maximum(x, 0.0) + e * (0.99999994 + e * p)


@triton.jit
def _exp2(x, EXACT: tl.constexpr):
    """2^x; right to half an ulp and without bias if EXACT."""
    # The GPU's own instruction is 2e-8 too small on average, which a state that decays slowly
    # multiplies up over the tokens it remembers.
    if EXACT:
        whole = tl.floor(x + 0.5)
        f = x - whole
        p = 0.00134004322 + f * 0.00015467365
        p = 0.0555032721 + f * (0.00961803596 + f * p)
        p = 1.0 + f * (0.693147207 + f * (0.240226511 + f * p))
        return p * tl.exp2(whole)
    return tl.exp2(x + 2.9e-8)


@triton.jit
def _lanes(BLOCK_D: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """0, 1, .., of which the compiler sees only that NEIGHBOURS at a time are neighbours."""
    i = tl.arange(0, BLOCK_D)
    return i // NEIGHBOURS * NEIGHBOURS + i % NEIGHBOURS


@triton.jit
def _program(
    channels,
    groups,
    state,
    length,
    segments,
    segment,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    FROM: tl.constexpr = 0,
):
    """What this program owns, and masks, where `segments` are scanned from number FROM on.

    Returns batch item, segment of the tokens, group, channels [BLOCK_D], states [BLOCK_N], whether
    these exist, and the first and one past the last token, in the order scanned.
    """
    group_channels = channels // groups
    blocks = tl.cdiv(group_channels, BLOCK_D)
    program = tl.program_id(0)
    group = (program // blocks) % groups
    item_and_part = (program // (blocks * groups)).to(tl.int64)
    item, part = item_and_part // segments, item_and_part % segments + FROM
    in_group = (program % blocks) * BLOCK_D + _lanes(BLOCK_D, NEIGHBOURS)
    d = (group * group_channels + in_group).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    first = part * segment
    last = tl.minimum(first + segment, length)
    return item, part, group, d, n, in_group < group_channels, n < state, first, last


@triton.jit
def _load(row, lanes, step, left, mask, TOKENS: tl.constexpr):
    """TOKENS rows; those from the row `left` on are zero."""
    tokens = ()
    for i in tl.static_range(TOKENS):
        tokens += (tl.load(row + i * step + lanes, mask=mask & (i < left), other=0.0),)
    return tokens


@triton.jit
def _float32(tokens, TOKENS: tl.constexpr, WHICH: tl.constexpr = 0):
    """TOKENS rows of tensor number WHICH, of those in `tokens`, one tensor's after another's."""
    converted = ()
    for i in tl.static_range(TOKENS):
        converted += (tokens[WHICH * TOKENS + i].to(tl.float32),)
    return converted


@triton.jit
def _load_all(rows, lanes, steps, left, masks, TOKENS: tl.constexpr):
    """`_load` of several tensors: one tensor's rows after another's."""
    tokens = ()
    for k in tl.static_range(len(rows)):
        tokens += _load(rows[k], lanes[k], steps[k], left, masks[k], TOKENS)
    return tokens


@triton.jit
def _further(rows, steps, TOKENS: tl.constexpr):
    further = ()
    for k in tl.static_range(len(rows)):
        further += (rows[k] + TOKENS * steps[k],)
    return further


# Row by row: a store of the whole tile, whose state is contiguous here, would have the compiler
# lay the tile out likewise.
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


@triton.jit
def _tile_of_states(tensor, index, n, d, state, channels):
    """Addresses [BLOCK_N, BLOCK_D] of one state of a tensor (.., N, D)."""
    rows = index * state + n  # [BLOCK_N]
    return tensor + (rows[:, None] * tl.cast(channels, tl.int64) + d[None, :])


FLAGS = {
    "HAS_D": lambda args: args["D"] is not None,
    "HAS_Z": lambda args: args["z"] is not None,
    "HAS_DT_BIAS": lambda args: args["dt_bias"] is not None,
}
HAS_START = {"HAS_START": lambda args: args["start"] is not None}
UNSPECIALIZED = ["length", "segment", "segments"]


@triton.heuristics({**FLAGS, **HAS_START})
@triton.jit(do_not_specialize=UNSPECIALIZED)
def selective_scan_fwd_kernel(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    start,
    y,
    end,
    saved,
    length,
    segment,
    segments,
    channels,
    groups,
    state,
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
    scale,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    ADD: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scan a segment, TOKENS tokens at a time, whose loads overlap; state and sums in float32.

    Rows are asked for STAGES - 1 times TOKENS tokens ahead, through shared memory; or, if STAGES is
    1, which suits short segments, TOKENS tokens ahead, into registers. If ADD, what y holds is
    added, and the sum scaled, before the gate.
    """
    item, part, group, d, n, mask_d, mask_n, first, last = _program(
        channels, groups, state, length, segments, segment, BLOCK_N, BLOCK_D, 2
    )
    mask = mask_n[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]

    u_rows, u_step = first_token(u, item, u_b, u_l, length, REVERSE)
    dt_rows, dt_step = first_token(dt, item, dt_b, dt_l, length, REVERSE)
    B_rows, B_step = first_token(B + group * B_g, item, B_b, B_l, length, REVERSE)
    C_rows, C_step = first_token(C + group * C_g, item, C_b, C_l, length, REVERSE)
    wide_channels = tl.cast(channels, tl.int64)
    y_rows, y_step = first_token(y, item, length * wide_channels, channels, length, REVERSE)
    u_rows += first * u_step
    dt_rows += first * dt_step
    B_rows += first * B_step
    C_rows += first * C_step
    y_rows += first * y_step
    if HAS_Z:
        z_rows, z_step = first_token(z, item, z_b, z_l, length, REVERSE)
        z_rows += first * z_step

    A_tile = _tile_of_states(A, 0, n, d, state, channels)
    A_log2 = tl.load(A_tile, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DT_BIAS:
        bias = tl.load(dt_bias + d, mask=mask_d, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_START:
        at = _tile_of_states(start, item * segments + part, n, d, state, channels)
        h = tl.load(at, mask=mask, other=0.0).to(tl.float32)

    chunk = item * tl.cdiv(length, CHUNK) + first // CHUNK
    saved_tile = _tile_of_states(saved, chunk, n, d, state, channels)
    rows, steps = (u_rows, dt_rows, B_rows, C_rows), (u_step, dt_step, B_step, C_step)
    lanes, masks = (d * u_d, d * dt_d, n * B_n, n * C_n), (mask_d, mask_d, mask_n, mask_n)
    if HAS_Z:
        rows += (z_rows,)
        steps += (z_step,)
        lanes += (d * z_d,)
        masks += (mask_d,)
    if ADD:
        rows += (y_rows,)
        steps += (y_step,)
        lanes += (d,)
        masks += (mask_d,)
    tokens = (last - first).to(tl.int32)
    if STAGES == 1:
        loaded = _load_all(rows, lanes, steps, tokens, masks, TOKENS)
    for t in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        if SAVE_STATES:  # noqa: SIM102, since one of the two is decided when compiling
            if t % CHUNK == 0:
                tl.store(saved_tile, h, mask=mask)
                saved_tile += state * wide_channels
        left = tokens - t
        if STAGES > 1:
            loaded = _load_all(rows, lanes, steps, left, masks, TOKENS)
        us, dts = _float32(loaded, TOKENS, 0), _float32(loaded, TOKENS, 1)
        Bs, Cs = _float32(loaded, TOKENS, 2), _float32(loaded, TOKENS, 3)
        if HAS_Z:
            zs = _float32(loaded, TOKENS, 4)
        if ADD:
            ys = _float32(loaded, TOKENS, 4 + HAS_Z)
        rows = _further(rows, steps, TOKENS)
        if STAGES == 1:
            loaded = _load_all(rows, lanes, steps, left - TOKENS, masks, TOKENS)
        deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
        for i in tl.static_range(TOKENS):
            decay = _exp2(deltas[i][None, :] * A_log2, EXACT)
            h = decay * h + (deltas[i] * us[i])[None, :] * Bs[i][:, None]
            out = tl.sum(h * Cs[i][:, None], axis=0) + skip * us[i]
            if ADD:
                out = (out + ys[i]) * scale
            if HAS_Z:
                out *= zs[i] * sigmoid(zs[i])
            tl.store(y_rows + i * y_step + d, out, mask=mask_d & (i < left))
        y_rows += TOKENS * y_step

    if part == segments - 1:
        _store_tile(end + (item * channels + d) * state, 1, h, n, state, mask_d)


@triton.heuristics({"HAS_Z": FLAGS["HAS_Z"], "HAS_DT_BIAS": FLAGS["HAS_DT_BIAS"]})
@triton.jit(do_not_specialize=UNSPECIALIZED)
def selective_scan_local_kernel(
    x,
    dt,
    A,
    W,
    z,
    dt_bias,
    end,
    delta_sum,
    length,
    segment,
    segments,
    channels,
    groups,
    state,
    x_b,
    x_l,
    x_d,
    dt_b,
    dt_l,
    dt_d,
    W_b,
    W_l,
    W_g,
    W_n,
    z_b,
    z_l,
    z_d,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What each segment alone leaves of the state, from zero, and the sum of its step sizes.

    The scan has x = u and W = B, and no z; its last segment, from which no other starts, is left
    out of `segments`. Its adjoint (ADJOINT) has x = dy, W = C and the gate, walks the tokens from
    the last scanned to the first, and leaves out the first segment.
    """
    item, part, group, d, n, mask_d, mask_n, first, last = _program(
        channels, groups, state, length, segments, segment, BLOCK_N, BLOCK_D, 2, ADJOINT
    )
    mask = mask_n[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]
    x_rows, x_step = first_token(x, item, x_b, x_l, length, REVERSE)
    dt_rows, dt_step = first_token(dt, item, dt_b, dt_l, length, REVERSE)
    W_rows, W_step = first_token(W + group * W_g, item, W_b, W_l, length, REVERSE)
    if HAS_Z:
        z_rows, z_step = first_token(z, item, z_b, z_l, length, REVERSE)
        z_rows += (last - 1) * z_step
        z_step = -z_step
    if ADJOINT:
        x_rows += (last - 1) * x_step
        dt_rows += (last - 1) * dt_step
        W_rows += (last - 1) * W_step
        x_step, dt_step, W_step = -x_step, -dt_step, -W_step
    else:
        x_rows += first * x_step
        dt_rows += first * dt_step
        W_rows += first * W_step

    A_tile = _tile_of_states(A, 0, n, d, state, channels)
    A_log2 = tl.load(A_tile, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DT_BIAS:
        bias = tl.load(dt_bias + d, mask=mask_d, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    rows, steps = (x_rows, dt_rows, W_rows), (x_step, dt_step, W_step)
    lanes, masks = (d * x_d, d * dt_d, n * W_n), (mask_d, mask_d, mask_n)
    if HAS_Z:
        rows += (z_rows,)
        steps += (z_step,)
        lanes += (d * z_d,)
        masks += (mask_d,)
    tokens = (last - first).to(tl.int32)
    if STAGES == 1:
        loaded = _load_all(rows, lanes, steps, tokens, masks, TOKENS)
    for t in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        left = tokens - t
        if STAGES > 1:
            loaded = _load_all(rows, lanes, steps, left, masks, TOKENS)
        xs, dts = _float32(loaded, TOKENS, 0), _float32(loaded, TOKENS, 1)
        Ws = _float32(loaded, TOKENS, 2)
        if HAS_Z:
            zs = _float32(loaded, TOKENS, 3)
        rows = _further(rows, steps, TOKENS)
        if STAGES == 1:
            loaded = _load_all(rows, lanes, steps, left - TOKENS, masks, TOKENS)
        deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
        for i in tl.static_range(TOKENS):
            decay = _exp2(deltas[i][None, :] * A_log2, EXACT)
            if ADJOINT:
                x_t = xs[i]
                if HAS_Z:
                    x_t *= zs[i] * sigmoid(zs[i])
                h = decay * (h + x_t[None, :] * Ws[i][:, None])
            else:
                h = decay * h + (deltas[i] * xs[i])[None, :] * Ws[i][:, None]
            total += deltas[i]
    at = item * segments + part - ADJOINT
    tl.store(_tile_of_states(end, at, n, d, state, channels), h, mask=mask)
    tl.store(delta_sum + at * channels + d, total, mask=mask_d)


@triton.heuristics(HAS_START)
@triton.jit(do_not_specialize=["segments"])
def selective_scan_carry_kernel(
    A,
    start,
    end,
    delta_sum,
    starts,
    segments,
    channels,
    state,
    HAS_START: tl.constexpr,
    ADJOINT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry the ends of the segments over: what state each one starts from."""
    item = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < channels * state
    d = i % channels
    A_log2 = tl.load(A + i, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        h = tl.load(start + item * channels * state + i, mask=mask, other=0.0).to(tl.float32)
    for step in tl.range(0, segments, num_stages=4):
        part = segments - 1 - step if ADJOINT else step
        tl.store(starts + (item * segments + part) * channels * state + i, h, mask=mask)
        # Of the first segment, or the last, no end is needed, nor is there one.
        row = (item * (segments - 1) + part - ADJOINT) * channels
        there = mask & (step < segments - 1)
        total = tl.load(delta_sum + row + d, mask=there, other=0.0)
        own = tl.load(end + row * state + i, mask=there, other=0.0)
        h = _exp2(total * A_log2, True) * h + own


@triton.heuristics(
    {
        **FLAGS,
        **HAS_START,
        "HAS_DINITIAL_STATE": lambda args: args["dinitial_state"] is not None,
    }
)
@triton.jit(do_not_specialize=UNSPECIALIZED)
def selective_scan_bwd_kernel(
    dy,
    start,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
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
    segment,
    segments,
    channels,
    groups,
    state,
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
    HAS_START: tl.constexpr,
    HAS_DINITIAL_STATE: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Walk the chunks of a segment from the last to the first; gradients and sums in float32.

    Of a chunk, first the state before every TOKENS tokens is computed again, into `scratch`; then,
    from the last of them, the states and decays of TOKENS tokens, which stay in registers. What is
    summed over channels (dB, dC) or the batch (dA, dD, ddt_bias) leaves as partial sums, one of
    each program.
    """
    item, part, group, d, n, mask_d, mask_n, first, last = _program(
        channels, groups, state, length, segments, segment, BLOCK_N, BLOCK_D, 4
    )
    mask = mask_n[:, None] & mask_d[None, :]  # [BLOCK_N, BLOCK_D]
    dy_rows, dy_step = first_token(dy, item, dy_b, dy_l, length, REVERSE)
    u_rows, u_step = first_token(u, item, u_b, u_l, length, REVERSE)
    dt_rows, dt_step = first_token(dt, item, dt_b, dt_l, length, REVERSE)
    B_rows, B_step = first_token(B + group * B_g, item, B_b, B_l, length, REVERSE)
    C_rows, C_step = first_token(C + group * C_g, item, C_b, C_l, length, REVERSE)
    row = length * tl.cast(channels, tl.int64)
    du_rows, out_step = first_token(du, item, row, channels, length, REVERSE)
    ddt_rows, _ = first_token(ddt, item, row, channels, length, REVERSE)
    if HAS_Z:
        z_rows, z_step = first_token(z, item, z_b, z_l, length, REVERSE)
        dz_rows, _ = first_token(dz, item, row, channels, length, REVERSE)

    # dB and dC are (blocks of channels, B, L, G, N).
    blocks = tl.cdiv(channels // groups, BLOCK_D)
    block = (tl.program_id(0) % blocks).to(tl.int64) * batch + item
    group_step = tl.cast(groups, tl.int64) * state
    at = group * state
    dB_rows, sum_step = first_token(
        dB + at, block, length * group_step, group_step, length, REVERSE
    )
    dC_rows, _ = first_token(dC + at, block, length * group_step, group_step, length, REVERSE)

    A_tile = _tile_of_states(A, 0, n, d, state, channels)
    A_log2 = tl.load(A_tile, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DT_BIAS:
        bias = tl.load(dt_bias + d, mask=mask_d, other=0.0).to(tl.float32)
    dh = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_START:
        at = _tile_of_states(start, item * segments + part, n, d, state, channels)
        dh = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    dA_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dD_sum = tl.zeros([BLOCK_D], tl.float32)
    dbias_sum = tl.zeros([BLOCK_D], tl.float32)

    size: tl.constexpr = BLOCK_N * BLOCK_D
    scratch += tl.program_id(0).to(tl.int64) * (CHUNK // TOKENS * size)
    lane = _lanes(BLOCK_D, 4)
    scratch_tile = scratch + tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + lane[None, :]

    chunks = tl.cdiv(length, CHUNK)
    for back in range(tl.cdiv(last - first, CHUNK)):
        chunk = tl.cdiv(last, CHUNK) - 1 - back
        t = chunk * CHUNK
        tokens = tl.minimum(last - t, CHUNK).to(tl.int32)
        saved_tile = _tile_of_states(saved, item * chunks + chunk, n, d, state, channels)
        h = tl.load(saved_tile, mask=mask, other=0.0)
        u_row, dt_row, B_row = u_rows + t * u_step, dt_rows + t * dt_step, B_rows + t * B_step
        # The rows of the next TOKENS tokens are under way while these are computed.
        next_u = _load(u_row, d * u_d, u_step, tokens, mask_d, TOKENS)  # [BLOCK_D] each
        next_dt = _load(dt_row, d * dt_d, dt_step, tokens, mask_d, TOKENS)  # [BLOCK_D] each
        next_B = _load(B_row, n * B_n, B_step, tokens, mask_n, TOKENS)  # [BLOCK_N] each
        for done in range(0, tokens, TOKENS):
            tl.store(scratch_tile + done // TOKENS * size, h)
            left = tokens - done
            us, dts = _float32(next_u, TOKENS), _float32(next_dt, TOKENS)
            Bs = _float32(next_B, TOKENS)
            u_row += TOKENS * u_step
            dt_row += TOKENS * dt_step
            B_row += TOKENS * B_step
            next_u = _load(u_row, d * u_d, u_step, left - TOKENS, mask_d, TOKENS)
            next_dt = _load(dt_row, d * dt_d, dt_step, left - TOKENS, mask_d, TOKENS)
            next_B = _load(B_row, n * B_n, B_step, left - TOKENS, mask_n, TOKENS)
            deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
            for i in tl.static_range(TOKENS):
                decay = _exp2(deltas[i][None, :] * A_log2, EXACT)
                h = decay * h + (deltas[i] * us[i])[None, :] * Bs[i][:, None]
        tl.debug_barrier()

        steps = tl.cdiv(tokens, TOKENS)
        t += (steps - 1) * TOKENS
        left = tokens - (steps - 1) * TOKENS
        u_row, dt_row, dy_row = u_rows + t * u_step, dt_rows + t * dt_step, dy_rows + t * dy_step
        B_row, C_row = B_rows + t * B_step, C_rows + t * C_step
        du_row, ddt_row = du_rows + t * out_step, ddt_rows + t * out_step
        dB_row, dC_row = dB_rows + t * sum_step, dC_rows + t * sum_step
        if HAS_Z:
            z_row, dz_row = z_rows + t * z_step, dz_rows + t * out_step
        for step in range(steps):
            h = tl.load(scratch_tile + (steps - 1 - step) * size)
            us = _load(u_row, d * u_d, u_step, left, mask_d, TOKENS)  # [BLOCK_D] each
            dts = _load(dt_row, d * dt_d, dt_step, left, mask_d, TOKENS)  # [BLOCK_D] each
            dys = _load(dy_row, d * dy_d, dy_step, left, mask_d, TOKENS)  # [BLOCK_D] each
            Bs = _load(B_row, n * B_n, B_step, left, mask_n, TOKENS)  # [BLOCK_N] each
            Cs = _load(C_row, n * C_n, C_step, left, mask_n, TOKENS)  # [BLOCK_N] each
            if HAS_Z:
                zs = _load(z_row, d * z_d, z_step, left, mask_d, TOKENS)  # [BLOCK_D] each
                zs = _float32(zs, TOKENS)
            us, dts, dys = _float32(us, TOKENS), _float32(dts, TOKENS), _float32(dys, TOKENS)
            Bs, Cs = _float32(Bs, TOKENS), _float32(Cs, TOKENS)
            deltas = _step_sizes(dts, bias, left, DT_SOFTPLUS, TOKENS)
            decays, states = (), (h,)
            for i in tl.static_range(TOKENS):
                decay = _exp2(deltas[i][None, :] * A_log2, EXACT)
                h = decay * h + (deltas[i] * us[i])[None, :] * Bs[i][:, None]
                decays += (decay,)
                states += (h,)
            for i in tl.static_range(TOKENS - 1, -1, -1):
                u_t, dy_t, delta = us[i], dys[i], deltas[i]
                B_t, C_t = Bs[i][:, None], Cs[i][:, None]
                inside = i < left
                if HAS_Z:
                    gate = sigmoid(zs[i])
                    ungated = tl.sum(states[i + 1] * C_t, axis=0) + skip * u_t
                    dz_t = dy_t * ungated * gate * (1.0 + zs[i] * (1.0 - gate))
                    tl.store(dz_row + i * out_step + d, dz_t, mask=mask_d & inside)
                    dy_t = dy_t * zs[i] * gate
                dh += dy_t[None, :] * C_t
                dC_t = tl.sum(dy_t[None, :] * states[i + 1], axis=1)
                tl.store(dC_row + i * sum_step + n, dC_t, mask=mask_n & inside)
                dB_t = tl.sum((delta * u_t)[None, :] * dh, axis=1)
                tl.store(dB_row + i * sum_step + n, dB_t, mask=mask_n & inside)
                ddrive = tl.sum(dh * B_t, axis=0)
                du_t = ddrive * delta + dy_t * skip
                tl.store(du_row + i * out_step + d, du_t, mask=mask_d & inside)
                dh = dh * decays[i]
                dexponent = dh * states[i]
                ddt_t = ddrive * u_t + tl.sum(dexponent * A_log2, axis=0) * LN_2
                if DT_SOFTPLUS:
                    ddt_t *= sigmoid(dts[i] + bias)
                tl.store(ddt_row + i * out_step + d, ddt_t, mask=mask_d & inside)
                dA_sum += dexponent * delta[None, :]
                dD_sum += dy_t * u_t
                dbias_sum += tl.where(inside, ddt_t, 0.0)
            u_row -= TOKENS * u_step
            dt_row -= TOKENS * dt_step
            dy_row -= TOKENS * dy_step
            B_row -= TOKENS * B_step
            C_row -= TOKENS * C_step
            du_row -= TOKENS * out_step
            ddt_row -= TOKENS * out_step
            dB_row -= TOKENS * sum_step
            dC_row -= TOKENS * sum_step
            if HAS_Z:
                z_row -= TOKENS * z_step
                dz_row -= TOKENS * out_step
            left = TOKENS
        tl.debug_barrier()

    sums = item * segments + part
    tl.store(_tile_of_states(dA, sums, n, d, state, channels), dA_sum, mask=mask)
    if HAS_D:
        tl.store(dD + sums * channels + d, dD_sum, mask=mask_d)
    if HAS_DT_BIAS:
        tl.store(ddt_bias + sums * channels + d, dbias_sum, mask=mask_d)
    if HAS_DINITIAL_STATE:
        tile = _tile_of_states(dinitial_state, item, n, d, state, channels)
        tl.store(tile, dh, mask=mask & (part == 0))


def forward(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states):
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    final_state, saved = _scan_into(y, *inputs, dt_softplus, reverse, save_states)
    return y, final_state, saved


def forward_bidirectional(sides, z, scale: float, save_states: bool):
    """Scan in both directions: (y_forward + y_backward) * scale * silu(z).

    Args:
        sides: u, dt, A, B, C, D and dt_bias of the scan forward, then of that in reverse.
        z: (B, L, D).

    Returns:
        y: (B, L, D), and what `forward` saves, of either direction.
    """
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    (*inputs, dt_bias), (*reverse_inputs, reverse_dt_bias) = sides
    _, saved = _scan_into(y, *inputs, None, dt_bias, None, True, False, save_states)
    inputs = (*reverse_inputs, z, reverse_dt_bias, None)
    _, reverse_saved = _scan_into(y, *inputs, True, True, save_states, add=True, scale=scale)
    return y, [saved, reverse_saved]


def _scan_into(
    y,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    dt_softplus,
    reverse,
    save_states,
    add=False,
    scale=1.0,
):
    """Write y, or add to it and scale before the gate; return the final state and `saved`."""
    batch, length, channels = u.shape
    state = A.shape[1]
    B, C = _grouped(B), _grouped(C)
    shape = saved_shape(batch, length, channels, state) if save_states else (0,)
    saved = torch.empty(shape, dtype=torch.float32, device=u.device)
    A, D, dt_bias = _transposed(A), _contiguous(D), _contiguous(dt_bias)
    groups = B.shape[2]
    blocks = _scan_blocks(state, channels // groups)
    # States are saved where the chunks begin.
    multiple = CHUNK if save_states else 8
    programs = _grid(u, groups, 1, blocks)[0]
    # Where states are saved, registers are short.
    limits = {} if save_states else _register_limits(u, blocks)
    segment, segments = _segments(u, programs, blocks, 16 if limits else 12, multiple)
    final_state = torch.empty(batch, channels, state, dtype=torch.float32, device=u.device)
    start = _transposed(initial_state)
    if segments == 1:
        blocks = _forward_blocks(u, state, groups) | {"STAGES": 1}
    else:
        pipelined = _pipelined(blocks) and not (save_states and state <= 16)
        blocks |= {"STAGES": 4 if pipelined else 1} | limits
    with launching_on(u):
        if segments > 1:
            # B and C in float32 once, rather than in every program; where their rows are short, the
            # first pass is the faster as they are.
            if _pipelined(blocks):
                B, C = _float32_pair(B, C)
            start = _starts(
                *(u, dt, A, B, None, dt_bias, start, segment, dt_softplus, reverse), adjoint=False
            )
            B, C = B.float(), C.float()
        selective_scan_fwd_kernel[_grid(u, groups, segments, blocks)](
            *(u, dt, A, B, C, D, z, dt_bias, start, y, final_state, saved),
            *(length, segment, segments, channels, groups, state),
            *(*u.stride(), *dt.stride(), *B.stride(), *C.stride(), *_strides(z), scale),
            ADD=add,
            DT_SOFTPLUS=dt_softplus,
            REVERSE=reverse,
            EXACT=_exact(u),
            SAVE_STATES=save_states,
            CHUNK=CHUNK,
            **blocks,
        )
    return final_state, saved


def _starts(x, dt, A, W, z, dt_bias, start, segment, dt_softplus, reverse, adjoint):
    """Return the states from which the segments start: (B, segments, N, D)."""
    batch, length, channels = x.shape
    state, groups = A.shape[0], W.shape[2]
    segments = triton.cdiv(length, segment)
    blocks = _scan_blocks(state, channels // groups)
    if _pipelined(blocks):
        blocks |= {"TOKENS": 2, "STAGES": 3} | _register_limits(x, blocks)
    else:
        blocks |= {"STAGES": 1}

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    starts = empty(batch, segments, state, channels)
    end = empty(batch, segments - 1, state, channels)
    delta_sum = empty(batch, segments - 1, channels)
    selective_scan_local_kernel[_grid(x, groups, segments - 1, blocks)](
        *(x, dt, A, W, z, dt_bias, end, delta_sum),
        *(length, segment, segments - 1, channels, groups, state),
        *(*x.stride(), *dt.stride(), *W.stride(), *_strides(z)),
        DT_SOFTPLUS=dt_softplus,
        REVERSE=reverse,
        EXACT=_exact(x),
        ADJOINT=adjoint,
        **blocks,
    )
    block = 64
    selective_scan_carry_kernel[(batch, triton.cdiv(channels * state, block))](
        *(A, start, end, delta_sum, starts, segments, channels, state),
        ADJOINT=adjoint,
        BLOCK=block,
        num_warps=2,
    )
    return starts


def backward(
    dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, initial_state, saved, dt_softplus, reverse
):
    batch, length, channels = u.shape
    state = A.shape[1]
    B_, C_ = _grouped(B), _grouped(C)
    groups = B_.shape[2]

    def empty(present, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device) if present else None

    A, D, dt_bias = _transposed(A), _contiguous(D), _contiguous(dt_bias)
    du, ddt = empty(True, *u.shape, dtype=u.dtype), empty(True, *dt.shape, dtype=dt.dtype)
    dz = None if z is None else empty(True, *z.shape, dtype=z.dtype)
    blocks = _backward_blocks(state, channels // groups)
    programs = _grid(u, groups, 1, blocks)[0]
    segment, segments = _segments(u, programs, blocks, warps=8, multiple=CHUNK)
    grid = _grid(u, groups, segments, blocks)
    scratch = empty(True, grid[0], CHUNK // blocks["TOKENS"], blocks["BLOCK_N"], blocks["BLOCK_D"])
    parts = triton.cdiv(channels // groups, blocks["BLOCK_D"])
    dA = empty(True, batch * segments, state, channels)
    dB = empty(True, parts, batch, length, groups, state)
    dC = torch.empty_like(dB)
    dD = empty(D is not None, batch * segments, channels)
    ddt_bias = empty(dt_bias is not None, batch * segments, channels)
    dinitial_state = empty(initial_state is not None, batch, state, channels)
    start = _transposed(dfinal_state)
    with launching_on(u):
        if segments > 1:
            W = C_.float() if _pipelined(_scan_blocks(state, channels // groups)) else C_
            start = _starts(
                *(dy, dt, A, W, z, dt_bias, start, segment, dt_softplus, reverse), adjoint=True
            )
        selective_scan_bwd_kernel[grid](
            *(dy, start, u, dt, A, B_, C_, D, z, dt_bias, saved, scratch),
            *(du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state),
            *(batch, length, segment, segments, channels, groups, state),
            *(*dy.stride(), *u.stride(), *dt.stride(), *B_.stride(), *C_.stride(), *_strides(z)),
            DT_SOFTPLUS=dt_softplus,
            REVERSE=reverse,
            EXACT=_exact(u),
            CHUNK=CHUNK,
            **blocks,
        )

    def total(parts):
        return None if parts is None else parts.sum(0)

    dA, dinitial_state = _transposed(total(dA)), _transposed(dinitial_state)
    dB, dC = total(dB).view(B.shape), total(dC).view(C.shape)
    return du, ddt, dA, dB, dC, total(dD), dz, total(ddt_bias), dinitial_state


def saved_shape(batch: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    """Shape of the states before each chunk, channels contiguous."""
    return batch, (length + CHUNK - 1) // CHUNK, state, channels


def _scan_blocks(state: int, channels: int) -> dict[str, int]:
    """How the scan from the first token to the last is shared out, where programs are many."""
    block_n = triton.next_power_of_2(state)
    block_d = min(64, max(8, 1024 // block_n), triton.next_power_of_2(channels))
    return _blocks(block_n, block_d)


def _blocks(block_n: int, block_d: int) -> dict[str, int]:
    """A warp for every 1,024 values of the state; fewer values leave registers for more tokens."""
    tile = block_n * block_d
    tokens = 8 if tile <= 128 else 2 if tile < 1024 else 1
    warps = min(8, max(1, tile // 1024))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "TOKENS": tokens, "num_warps": warps}


def _forward_blocks(u, state: int, groups: int) -> dict[str, int]:
    """The same with fewer channels a program, where that would leave the GPU's schedulers idle."""
    batch, _, channels = u.shape
    blocks = _scan_blocks(state, channels // groups)
    block_d, least, wanted = blocks["BLOCK_D"], 4, 8 * _multiprocessors(u)
    while block_d > least and batch * channels < block_d * wanted:
        block_d //= 2
    return _blocks(blocks["BLOCK_N"], block_d)


def _backward_blocks(state: int, channels: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(state)
    block_d = max(8, min(32, 512 // block_n, triton.next_power_of_2(channels)))
    warps = min(8, max(1, block_n * block_d // 512))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "TOKENS": 2, "num_warps": warps}


def _segments(
    u, programs: int, blocks: dict[str, int], warps: int, multiple: int
) -> tuple[int, int]:
    """Into segments of how many tokens to cut a sequence, and how many these are.

    Args:
        programs: how many there are if nothing is cut; so few that most of the GPU idles are cut,
            into as many as it holds at once.
        warps: how many a multiprocessor holds, by their registers.
        multiple: of how many tokens segments are.
    """
    length = u.shape[1]
    segments = _multiprocessors(u) * max(1, warps // blocks["num_warps"]) // max(1, programs)
    if length < 1024 or segments < 3:
        return triton.cdiv(length, CHUNK) * CHUNK, 1
    segment = triton.cdiv(triton.cdiv(length, segments), multiple) * multiple
    segment = max(CHUNK, segment)
    return segment, triton.cdiv(length, segment)


def _pipelined(blocks: dict[str, int]) -> bool:
    """Whether a scan in segments asks for its rows through shared memory, in float32.

    That takes fewer registers, and pays where a row of B or C is long.
    """
    return blocks["BLOCK_N"] * blocks["BLOCK_D"] >= 1024


def _register_limits(u, blocks: dict[str, int]) -> dict[str, int]:
    """Options for so few registers that a multiprocessor holds 16 warps of a pipelined scan.

    None where the compiler would have to spill, or does not know the option.
    """
    limited = _pipelined(blocks) and not _exact(u) and torch.version.hip is None
    return {"maxnreg": 128} if limited else {}


def _exact(u) -> bool:
    return u.dtype == torch.float32


def _multiprocessors(u) -> int:
    return torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 0


def _grid(u, groups: int, segments: int, blocks: dict[str, int]) -> tuple[int]:
    batch, _, channels = u.shape
    return (batch * segments * groups * triton.cdiv(channels // groups, blocks["BLOCK_D"]),)


def _grouped(x):
    """(B, L, N) or (B, L, G, N) -> (B, L, G, N)."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _float32_pair(B, C):
    """B and C in float32, by one kernel if they lie side by side, as projections leave them."""
    states = B.shape[3]
    side_by_side = (
        B.untyped_storage().data_ptr() == C.untyped_storage().data_ptr()
        and C.storage_offset() == B.storage_offset() + states
        and B.stride() == C.stride()
        and B.stride(3) == 1
    )
    if not side_by_side:
        return B.float(), C.float()
    return B.as_strided((*B.shape[:3], 2 * states), B.stride()).float().split(states, -1)


def _contiguous(x):
    return None if x is None else x.contiguous()


def _transposed(x):
    """(.., D, N) <-> (.., N, D); the kernels read states with the channels contiguous."""
    return None if x is None else x.mT.contiguous()


def _strides(x) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
