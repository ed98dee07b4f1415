"""State space duality in Triton: products of matrices inside chunks, a state between them.

The forward walks the chunks of a head with the state [N, P] in float32 registers. Where that leaves
a GPU idle, since a sequence is long and heads are few, a smaller kernel first walks the chunks for
their states alone, and the chunks are computed at once.

The backward walks twice for states alone: forward for those before each chunk, which are thus not
kept in between, and backward for the gradients of those after each. Then chunks are independent,
and a program computes one for all heads, which share B and C: their gradients are sums in
registers, in an order that does not change. The derivation is in `ssd_bwd_kernel`.

States and sums are float32; products take operands in the dtype of x, as do the states that chunks
read and that lie in memory.

Size letters: B batch, L tokens, H heads, P features of a head, N state, Q tokens of a chunk
(CHUNK), Z chunks.
"""

import torch
import triton
import triton.language as tl

from vim.ops.triton import LOG2_E, first_token, launching_on, unavailable

__all__ = ["MAX_STATES", "backward", "forward", "unavailable"]

MAX_STATES = 128
"""States of a call at most, for which there are registers; y is a sum over parts of the states."""


@triton.jit
def _rows(first, step, position, last, lanes, stride, mask):
    """[CHUNK, lanes] of tokens at positions in the order scanned; those from `last` on are zero."""
    at = first + position[:, None] * step + lanes[None, :] * stride
    return tl.load(at, mask=(position < last)[:, None] & mask[None, :], other=0.0)


@triton.jit
def _step_sizes(first, step, position, last):
    return tl.load(first + position * step, mask=position < last, other=0.0).to(tl.float32)


@triton.jit
def _state(tensor, n, p, stride_n, stride_p):
    """Addresses [BLOCK_N, BLOCK_P] of a state."""
    return tensor + (n[:, None] * stride_n + p[None, :] * stride_p)


@triton.jit
def _part(part, features, BLOCK_P: tl.constexpr):
    """Head, and features [BLOCK_P] of it, of one part of the heads."""
    blocks = tl.cdiv(features, BLOCK_P)
    head = (part // blocks).to(tl.int64)
    return head, (part % blocks) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)


@triton.jit
def _logarithms(dt_q, A_log2, EXACT: tl.constexpr):
    """Binary logarithms of the decays of tokens, summed up to each [CHUNK], and all of them.

    Decays between tokens are exp2 of differences of such sums. A sum of large logarithms in float32
    would leave the difference of two neighbours few digits.
    """
    steps = dt_q * A_log2
    if EXACT:
        steps = steps.to(tl.float64)
    return tl.cumsum(steps, axis=0), tl.sum(steps, axis=0)


@triton.jit
def _exp2(logarithm):
    return tl.exp2(logarithm.to(tl.float32))


@triton.jit
def _decays(total, CHUNK: tl.constexpr):
    """exp of the sums of logarithms from token j to i, at [i, j]; zero where j is the later."""
    i = tl.arange(0, CHUNK)
    between = tl.where(i[:, None] >= i[None, :], total[:, None] - total[None, :], float("-inf"))
    return _exp2(between)


START = {"HAS_START": lambda args: args["start"] is not None}
HAS_D = {"HAS_D": lambda args: args["D"] is not None}
UNSPECIALIZED = ["length", "chunks"]


@triton.heuristics({**START, **HAS_D})
@triton.jit(do_not_specialize=UNSPECIALIZED)
def ssd_fwd_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    start,
    y,
    end,
    length,
    chunks,
    heads,
    features,
    states,
    x_b,
    x_l,
    x_h,
    x_p,
    dt_b,
    dt_l,
    dt_h,
    A_b,
    A_h,
    B_b,
    B_l,
    B_n,
    C_b,
    C_l,
    C_n,
    start_b,
    start_h,
    start_z,
    start_p,
    start_n,
    HAS_START: tl.constexpr,
    HAS_D: tl.constexpr,
    REVERSE: tl.constexpr,
    WALK: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """All chunks of a head, the state handed on, if WALK; else one, from its state in `start`."""
    parts = heads * tl.cdiv(features, BLOCK_P)
    program = tl.program_id(0)
    head, p = _part(program % parts, features, BLOCK_P)
    item = (program // parts).to(tl.int64)
    first = 0
    count = chunks
    if not WALK:
        first = (item % chunks).to(tl.int32)
        item = item // chunks
        count = 1
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n, mask_p = n < states, p < features
    mask = mask_n[:, None] & mask_p[None, :]  # [BLOCK_N, BLOCK_P]

    wide_features = tl.cast(features, tl.int64)
    y_l = heads * wide_features
    x_row, x_step = first_token(x + head * x_h, item, x_b, x_l, length, REVERSE)
    dt_row, dt_step = first_token(dt + head * dt_h, item, dt_b, dt_l, length, REVERSE)
    B_row, B_step = first_token(B, item, B_b, B_l, length, REVERSE)
    C_row, C_step = first_token(C, item, C_b, C_l, length, REVERSE)
    y_row, y_step = first_token(y + head * features, item, length * y_l, y_l, length, REVERSE)

    A_log2 = tl.load(A + item * A_b + head * A_h).to(tl.float32) * LOG2_E
    skip = 0.0
    if HAS_D:
        skip = tl.load(D + head).to(tl.float32)
    h = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_START:
        first_state = start + item * start_b + head * start_h + first * tl.cast(start_z, tl.int64)
        states_at = _state(first_state, n, p, start_n, start_p)
        h = tl.load(states_at, mask=mask, other=0.0).to(tl.float32)

    i = tl.arange(0, CHUNK)
    for chunk in range(first, first + count):
        q = chunk * CHUNK + i
        x_q = _rows(x_row, x_step, q, length, p, x_p, mask_p)  # [CHUNK, BLOCK_P]
        B_q = _rows(B_row, B_step, q, length, n, B_n, mask_n).to(x_q.dtype)  # [CHUNK, BLOCK_N]
        C_q = _rows(C_row, C_step, q, length, n, C_n, mask_n).to(x_q.dtype)  # [CHUNK, BLOCK_N]
        dt_q = _step_sizes(dt_row, dt_step, q, length)  # [CHUNK]
        total, end_total = _logarithms(dt_q, A_log2, x.dtype.element_ty == tl.float32)

        scores = tl.dot(C_q, tl.trans(B_q), input_precision=PRECISION)  # [CHUNK, CHUNK]
        weights = scores * _decays(total, CHUNK) * dt_q[None, :]
        if HAS_D:
            weights += tl.where(i[:, None] == i[None, :], skip, 0.0)
        out = tl.dot(C_q, h.to(x_q.dtype), input_precision=PRECISION)  # [CHUNK, BLOCK_P]
        out *= _exp2(total)[:, None]
        out = tl.dot(weights.to(x_q.dtype), x_q, out, input_precision=PRECISION)
        at = y_row + q[:, None] * y_step + p[None, :]
        tl.store(at, out, mask=(q < length)[:, None] & mask_p[None, :])

        if WALK:
            to_end = dt_q * _exp2(end_total - total)
            drive = (x_q.to(tl.float32) * to_end[:, None]).to(x_q.dtype)
            h = tl.dot(tl.trans(B_q), drive, h * _exp2(end_total), input_precision=PRECISION)

    if WALK:
        last_state = end + (item * heads + head) * wide_features * states
        tl.store(_state(last_state, n, p, 1, tl.cast(states, tl.int64)), h, mask=mask)


@triton.heuristics({**START, "HAS_END": lambda args: args["end"] is not None})
@triton.jit(do_not_specialize=UNSPECIALIZED)
def ssd_states_kernel(
    x,
    dt,
    A,
    W,
    start,
    saved,
    end,
    length,
    chunks,
    heads,
    features,
    states,
    x_b,
    x_l,
    x_h,
    x_p,
    dt_b,
    dt_l,
    dt_h,
    A_b,
    A_h,
    W_b,
    W_l,
    W_n,
    start_b,
    start_h,
    start_p,
    start_n,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """States before each chunk, saved (B, H, Z, N, P), and the one after the last.

    The forward has W = B. Its adjoint has x = dy and W = C, walks from the last chunk to the first,
    and saves the gradients of the states after each chunk, and of the initial state.
    """
    parts = heads * tl.cdiv(features, BLOCK_P)
    program = tl.program_id(0)
    head, p = _part(program % parts, features, BLOCK_P)
    item = (program // parts).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n, mask_p = n < states, p < features
    mask = mask_n[:, None] & mask_p[None, :]  # [BLOCK_N, BLOCK_P]

    x_row, x_step = first_token(x + head * x_h, item, x_b, x_l, length, REVERSE)
    dt_row, dt_step = first_token(dt + head * dt_h, item, dt_b, dt_l, length, REVERSE)
    W_row, W_step = first_token(W, item, W_b, W_l, length, REVERSE)
    A_log2 = tl.load(A + item * A_b + head * A_h).to(tl.float32) * LOG2_E
    h = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_START:
        at = _state(start + item * start_b + head * start_h, n, p, start_n, start_p)
        h = tl.load(at, mask=mask, other=0.0).to(tl.float32)

    size = tl.cast(features, tl.int64) * states
    saved += (item * heads + head) * chunks * size
    for k in range(chunks):
        chunk = chunks - 1 - k if ADJOINT else k
        q = chunk * CHUNK + tl.arange(0, CHUNK)
        x_q = _rows(x_row, x_step, q, length, p, x_p, mask_p)  # [CHUNK, BLOCK_P]
        W_q = _rows(W_row, W_step, q, length, n, W_n, mask_n).to(x_q.dtype)  # [CHUNK, BLOCK_N]
        dt_q = _step_sizes(dt_row, dt_step, q, length)  # [CHUNK]
        total, end_total = _logarithms(dt_q, A_log2, x.dtype.element_ty == tl.float32)
        tl.store(_state(saved + chunk * size, n, p, features, 1), h, mask=mask)
        weights = _exp2(total) if ADJOINT else dt_q * _exp2(end_total - total)
        drive = (x_q.to(tl.float32) * weights[:, None]).to(x_q.dtype)
        h = tl.dot(tl.trans(W_q), drive, h * _exp2(end_total), input_precision=PRECISION)

    if HAS_END:
        last_state = end + (item * heads + head) * size
        tl.store(_state(last_state, n, p, 1, tl.cast(states, tl.int64)), h, mask=mask)


@triton.heuristics(HAS_D)
@triton.jit(do_not_specialize=[*UNSPECIALIZED, "groups"])
def ssd_bwd_kernel(
    dy,
    x,
    dt,
    A,
    B,
    C,
    D,
    before,
    dafter,
    dx,
    ddt,
    dA,
    dB,
    dC,
    dD,
    batch,
    length,
    chunks,
    groups,
    heads,
    features,
    states,
    dy_b,
    dy_l,
    dy_h,
    dy_p,
    x_b,
    x_l,
    x_h,
    x_p,
    dt_b,
    dt_l,
    dt_h,
    A_b,
    A_h,
    B_b,
    B_l,
    B_n,
    C_b,
    C_l,
    C_n,
    HAS_D: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One chunk of one group of heads, one head after another; sums in float32.

    With a_i = dt_i A, s_i their sums over the chunk up to i, s_end that of all, h the state before
    the chunk and dh the gradient of the one after it::

        y_i   = sum_{j <= i} exp(s_i - s_j) (C_i B_j) dt_j x_j + exp(s_i) C_i h
        after = exp(s_end) h + sum_j exp(s_end - s_j) dt_j x_j B_j^T

    x_j, B_j and C_i have their gradients from these products. Of the exponents, a_t stands in those
    of every pair i >= t > j, in those of y_i and h for i >= t, of x_j and `after` for j < t, and of
    h and `after`. So da_t is a sum over i >= t of (all pairs in row i, less all pairs in column i,
    the pairs of a token with itself left out) and over j < t. BLOCK_P features of a head of more
    are a head of its own with parts of the sums ddt, dA and dD; a group of heads has parts of dB
    and dC.
    """
    program = tl.program_id(0)
    group = program % groups
    chunk = (program // groups) % chunks
    item = (program // (groups * chunks)).to(tl.int64)
    parts = heads * tl.cdiv(features, BLOCK_P)
    per_group = tl.cdiv(parts, groups)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = n < states
    i = tl.arange(0, CHUNK)
    q = chunk * CHUNK + i
    inside = q < length

    B_row, B_step = first_token(B, item, B_b, B_l, length, REVERSE)
    C_row, C_step = first_token(C, item, C_b, C_l, length, REVERSE)
    dtype = x.dtype.element_ty
    B_q = _rows(B_row, B_step, q, length, n, B_n, mask_n).to(dtype)  # [CHUNK, BLOCK_N]
    C_q = _rows(C_row, C_step, q, length, n, C_n, mask_n).to(dtype)  # [CHUNK, BLOCK_N]
    # Always so. A product that comes from a branch begins no chain of products, for which the
    # compiler would have half of the warps repeat what the others do; so with the choice in dx_q.
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    if chunk < chunks:
        scores = tl.dot(C_q, tl.trans(B_q), input_precision=PRECISION)
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    dB_q = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    dC_q = tl.zeros([CHUNK, BLOCK_N], tl.float32)

    wide_parts = tl.cast(parts, tl.int64)
    for part in range(group * per_group, tl.minimum((group + 1) * per_group, parts)):
        head, p = _part(part, features, BLOCK_P)
        mask_p = p < features
        mask = mask_n[:, None] & mask_p[None, :]  # [BLOCK_N, BLOCK_P]
        dy_row, dy_step = first_token(dy + head * dy_h, item, dy_b, dy_l, length, REVERSE)
        x_row, x_step = first_token(x + head * x_h, item, x_b, x_l, length, REVERSE)
        dt_row, dt_step = first_token(dt + head * dt_h, item, dt_b, dt_l, length, REVERSE)
        dy_q = _rows(dy_row, dy_step, q, length, p, dy_p, mask_p).to(dtype)  # [CHUNK, BLOCK_P]
        x_q = _rows(x_row, x_step, q, length, p, x_p, mask_p)  # [CHUNK, BLOCK_P]
        state = ((item * heads + head) * chunks + chunk) * features * states
        at = _state(before + state, n, p, features, 1)
        h = tl.load(at, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_P]
        dh = tl.load(_state(dafter + state, n, p, features, 1), mask=mask, other=0.0)

        A_head = tl.load(A + item * A_b + head * A_h).to(tl.float32)
        dt_q = _step_sizes(dt_row, dt_step, q, length)  # [CHUNK]
        total, end_total = _logarithms(dt_q, A_head * LOG2_E, dtype == tl.float32)
        from_start = _exp2(total)
        to_end = _exp2(end_total - total)

        # What the chunk adds to the state.
        Bdh = tl.dot(B_q, dh, input_precision=PRECISION)  # [CHUNK, BLOCK_P]
        added = to_end * tl.sum(x_q.to(tl.float32) * Bdh, axis=1)  # [CHUNK]
        dB_q += tl.dot(x_q, tl.trans(dh), input_precision=PRECISION) * (dt_q * to_end)[:, None]

        # What it reads of the state.
        dyh = tl.dot(dy_q, tl.trans(h), input_precision=PRECISION) * from_start[:, None]
        dC_q += dyh
        from_i_on = tl.sum(dyh * C_q.to(tl.float32), axis=1)  # [CHUNK]
        passed = tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), axis=1), axis=0)

        # Pairs of its tokens; D stands on the diagonal.
        decays = _decays(total, CHUNK)  # [CHUNK, CHUNK]
        weights = scores * decays * dt_q[None, :]
        if HAS_D:
            weights += tl.where(i[:, None] == i[None, :], tl.load(D + head).to(tl.float32), 0.0)
        dx_q = tl.dot(tl.trans(weights.to(dtype)), dy_q, input_precision=PRECISION)
        dx_q = tl.where(inside[:, None], dx_q, 0.0) + Bdh * (dt_q * to_end)[:, None]
        pairs = tl.dot(dy_q, tl.trans(x_q), input_precision=PRECISION)
        if HAS_D:
            skipped = dy_q.to(tl.float32) * x_q.to(tl.float32)
            dD_part = tl.sum(tl.sum(skipped, axis=1), axis=0)
        pairs *= decays
        dscores += pairs * dt_q[None, :]
        pairs *= scores
        ddt_q = tl.sum(pairs, axis=0) + added  # [CHUNK]
        pairs = tl.where(i[:, None] > i[None, :], pairs * dt_q[None, :], 0.0)
        from_i_on += tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)

        terms = tl.where(i[:, None] >= i[None, :], from_i_on[:, None], (added * dt_q)[:, None])
        da = tl.sum(terms, axis=0) + passed * _exp2(end_total)  # [CHUNK]
        ddt_row, ddt_step = first_token(
            ddt + part, item, length * wide_parts, parts, length, REVERSE
        )
        tl.store(ddt_row + q * ddt_step, ddt_q + A_head * da, mask=inside)
        sums = (item * chunks + chunk) * wide_parts + part
        tl.store(dA + sums, tl.sum(da * dt_q, axis=0))
        if HAS_D:
            tl.store(dD + sums, dD_part)
        dx_l = tl.cast(features, tl.int64) * heads
        dx_row, dx_step = first_token(
            dx + head * features, item, length * dx_l, dx_l, length, REVERSE
        )
        at = dx_row + q[:, None] * dx_step + p[None, :]
        tl.store(at, dx_q, mask=inside[:, None] & mask_p[None, :])

    dscores = dscores.to(dtype)
    dC_q = tl.dot(dscores, B_q, dC_q, input_precision=PRECISION)
    dB_q = tl.dot(tl.trans(dscores), C_q, dB_q, input_precision=PRECISION)
    row = (group * tl.cast(batch, tl.int64) + item) * length
    mask = inside[:, None] & mask_n[None, :]
    dB_row, step = first_token(dB, row, states, states, length, REVERSE)
    tl.store(dB_row + q[:, None] * step + n[None, :], dB_q, mask=mask)
    dC_row, step = first_token(dC, row, states, states, length, REVERSE)
    tl.store(dC_row + q[:, None] * step + n[None, :], dC_q, mask=mask)


def forward(x, dt, A, B, C, D, initial_state, reverse):
    batch, length, heads, features = x.shape
    states = B.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    end = torch.empty(batch, heads, features, states, dtype=torch.float32, device=x.device)
    blocks = _blocks(x, states)
    chunks = triton.cdiv(length, blocks["CHUNK"])
    programs = batch * heads * triton.cdiv(features, blocks["BLOCK_P"])
    walk = not _at_once(x, programs, chunks)
    with launching_on(x):
        if walk:
            start = initial_state
            start_strides = (0,) * 5 if start is None else _with_chunks(start.stride())
        else:
            start = _states(x, dt, A, B, initial_state, end, blocks, reverse, adjoint=False)
            b, h, z, n, p = start.stride()
            start_strides = (b, h, z, p, n)
        ssd_fwd_kernel[(programs if walk else programs * chunks,)](
            *(x, dt, A, B, C, _contiguous(D), start, y, end),
            *(length, chunks, heads, features, states),
            *(*x.stride(), *dt.stride(), *_of_items(A), *B.stride(), *C.stride(), *start_strides),
            REVERSE=reverse,
            WALK=walk,
            **blocks,
            **_options(x, _FORWARD),
        )
    return y, end


def backward(dy, dend, x, dt, A, B, C, D, initial_state, reverse):
    batch, length, heads, features = x.shape
    states = B.shape[-1]
    blocks = _blocks(x, states)
    chunks = triton.cdiv(length, blocks["CHUNK"])
    parts = heads * triton.cdiv(features, blocks["BLOCK_P"])
    groups = _groups(x, batch * chunks, parts)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx = empty(*x.shape, dtype=x.dtype)
    ddt = empty(batch, length, parts)
    dA = empty(batch, chunks, parts)
    dD = None if D is None else torch.empty_like(dA)
    # A sum of one part is no sum: it may be in the dtype asked for.
    dB = empty(groups, *B.shape, dtype=B.dtype if groups == 1 else torch.float32)
    dC = empty(groups, *C.shape, dtype=C.dtype if groups == 1 else torch.float32)
    dinitial_state = None
    if initial_state is not None:
        dinitial_state = empty(batch, heads, features, states)
    with launching_on(x):
        before = _states(x, dt, A, B, initial_state, None, blocks, reverse, adjoint=False)
        dafter = _states(dy, dt, A, C, dend, dinitial_state, blocks, reverse, adjoint=True)
        ssd_bwd_kernel[(batch * chunks * groups,)](
            *(dy, x, dt, A, B, C, _contiguous(D), before, dafter),
            *(dx, ddt, dA, dB, dC, dD),
            *(batch, length, chunks, groups, heads, features, states),
            *(*dy.stride(), *x.stride(), *dt.stride(), *_of_items(A), *B.stride(), *C.stride()),
            REVERSE=reverse,
            **blocks,
            **_options(x, _BACKWARD),
        )

    def of_heads(sums):
        return sums if parts == heads else sums.unflatten(-1, (heads, -1)).sum(-1)

    ddt, dA = of_heads(ddt), of_heads(dA.sum(1))
    dA = dA.sum(0) if A.dim() == 1 else dA
    dD = None if dD is None else of_heads(dD.sum((0, 1)))
    dB, dC = (d[0] if groups == 1 else d.sum(0) for d in (dB, dC))
    return dx, ddt, dA, dB, dC, dD, dinitial_state


def _states(x, dt, A, W, start, end, blocks, reverse, adjoint):
    """Return the states before each chunk or, if adjoint, the gradients of those after each.

    Args:
        x, W: x and B, or dy and C.
        start: (B, H, P, N) initial state, or the gradient of the final one.
        end: (B, H, P, N), which the final state is written to, or the gradient of the initial one.
    """
    batch, length, heads, features = x.shape
    states = W.shape[-1]
    chunks = triton.cdiv(length, blocks["CHUNK"])
    saved = torch.empty(batch, heads, chunks, states, features, dtype=x.dtype, device=x.device)
    programs = batch * heads * triton.cdiv(features, blocks["BLOCK_P"])
    while blocks["BLOCK_P"] > 16 and _idle(x, programs):
        blocks = blocks | {"BLOCK_P": blocks["BLOCK_P"] // 2}
        programs = batch * heads * triton.cdiv(features, blocks["BLOCK_P"])
    ssd_states_kernel[(programs,)](
        *(x, dt, A, W, start, saved, end),
        *(length, chunks, heads, features, states),
        *(*x.stride(), *dt.stride(), *_of_items(A), *W.stride()),
        *((0,) * 4 if start is None else start.stride()),
        REVERSE=reverse,
        ADJOINT=adjoint,
        **blocks,
        **_options(x, _STATES),
    )
    return saved


_FORWARD = {"num_warps": 4, "num_stages": 2}
_STATES = {"num_warps": 4, "num_stages": 3}
_BACKWARD = {"num_warps": 8, "num_stages": 2}


def _options(x, options: dict) -> dict:
    """How a kernel is compiled; products of float32 keep tensor cores out and registers full."""
    return {"num_warps": 8, "num_stages": 1} if x.dtype == torch.float32 else options


def _blocks(x, states: int) -> dict:
    """Sizes of the tiles, 16 at least, as products need."""
    _, length, _, features = x.shape
    exact = x.dtype == torch.float32
    most = 32 if exact and states > 64 else 64
    return {
        "CHUNK": 16 if exact else min(64, max(16, triton.next_power_of_2(length))),
        "BLOCK_N": max(16, triton.next_power_of_2(states)),
        "BLOCK_P": max(16, min(most, triton.next_power_of_2(features))),
        "PRECISION": "ieee",
    }


def _at_once(x, programs: int, chunks: int) -> bool:
    """Whether the forward computes the chunks of a head at once, from states found before."""
    return chunks > 4 and _idle(x, programs)


def _idle(x, programs: int) -> bool:
    """Whether so many programs leave much of the GPU idle."""
    return programs < 2 * _multiprocessors(x)


def _groups(x, programs: int, parts: int) -> int:
    """Into how many groups the heads are cut: programs for every multiprocessor, but no more."""
    groups = min(parts, max(1, 2 * _multiprocessors(x) // programs))
    return triton.cdiv(parts, triton.cdiv(parts, groups))


def _multiprocessors(x) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0


def _contiguous(x):
    return None if x is None else x.contiguous()


def _of_items(A) -> tuple[int, int]:
    """Strides of A (B, H), or of (H,) for all items."""
    return (0, A.stride(0)) if A.dim() == 1 else A.stride()


def _with_chunks(strides) -> tuple[int, ...]:
    """Strides of a state (B, H, P, N), with one of chunks."""
    b, h, p, n = strides
    return b, h, 0, p, n
