"""The selective scan on CUDA: how kernels/cuda/selective_scan*.cu are specialised and launched.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), G groups of B and C.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._compile import DTYPES, get_kernel, has_clusters, multiprocessors, unavailable
from ._launch import bmm, differs_each_time, launch
from ._sums import sum_kernel, sum_partials

__all__ = [
    "backward",
    "backward_bidirectional",
    "forward",
    "forward_bidirectional",
    "instantiations",
    "saved_shape",
    "unavailable",
]

OUTPUT, STATES_ONLY, STATES_AND_DZ, OUTPUT_OVER_U, OUTPUT_AND_STATES = range(5)
"""What the forward kernel writes: `Mode` in selective_scan.cu."""


class Variant(NamedTuple):
    """How the forward kernel shares the work out."""

    states: int
    """NS, states of a channel in a lane's registers."""
    lanes: int
    """S, lanes that share a channel: NS * S is N, rounded up to a power of two."""
    channels: int
    """CPT, channels in a lane's registers."""
    block_channels: int
    """CH, channels of a block."""
    tile: int
    """T, tokens that are staged in shared memory together."""
    together: int
    """U, tokens whose recurrences and sums are worked out together."""
    min_blocks: int
    """Blocks that a multiprocessor must hold, which bounds the registers."""
    apart: bool = False
    """APART, whether each direction has a block of its own, and the two are a cluster."""


def _rounded_states(states: int) -> int:
    return 1 << (states - 1).bit_length()


def _tile(
    states: int, lanes: int, block_channels: int, dtype: torch.dtype, apart: bool, rank: int
) -> int:
    """Return how many tokens to stage: what fits the 48 KB that a block has without asking."""
    matrices = 2 * states + (4 * lanes if lanes > 1 and states // lanes >= 8 else 0)
    floats = matrices + (3 if lanes > 1 else 1) * block_channels + 8
    values = 6 * block_channels
    if lanes > 1 and rank:  # instead of dt
        values += (rank // 8 | 1) * 8 - 2 * block_channels
    token = (1 if apart else 2) * (4 * floats + values * dtype.itemsize)
    # Whole channels need no sums and little staging: small tiles leave room for more blocks.
    most = 64 if lanes > 1 else 16 if states == 16 and dtype.itemsize == 2 else 8
    return min(most, 1 << ((48 * 1024 - 2048) // token).bit_length() - 1)


def _variant(
    states: int,
    lanes: int,
    dtype: torch.dtype,
    tile: int | None = None,
    chunked: bool = False,
    keeps: bool = False,
    apart: bool = False,
    rank: int = 0,
) -> Variant:
    """Return the fastest way, of those measured, to give a channel `lanes` lanes.

    Args:
        tile: where the backward, whose first pass this is then, has chosen it.
        chunked: whether sequences, which are few and long then, are cut.
        keeps: whether states are left for the backward; they are in its first pass.
        apart: whether each direction has a block of its own, of twice the channels where that
            leaves as many threads.
        rank: of the product that is made of dt, if any.
    """
    held = states // lanes
    block_channels = 32 if lanes <= 2 or (lanes == 4 and held == 16) else 16 if lanes == 4 else 8
    leaves_states = (tile is not None or keeps) and held == 16 and dtype.itemsize == 2
    if apart and lanes in (4, 8):
        block_channels *= 2
    # Bound by bytes: longer rows.
    if lanes == 1 and (held < 8 or (leaves_states and not chunked)):
        block_channels = 128 if keeps and leaves_states else 64
    # As many registers as the recurrence needs without spilling, and no more.
    if lanes == 1:
        min_blocks = (8 if dtype.itemsize == 2 or held < 16 else 6) * 32 // block_channels
    elif held < 16 or lanes == 2:
        min_blocks = 1 if lanes == 16 else 3
    else:
        min_blocks = 2 if lanes == 4 and dtype.itemsize == 2 and tile is None else 1
    eight = lanes > 1 or (held == 16 and dtype.itemsize == 2 and tile is None)
    together = 16 if keeps and lanes > 1 and held < 8 else 8 if eight else 4
    tile = tile or _tile(states, lanes, block_channels, dtype, apart, rank)
    together = min(together, tile)
    return Variant(held, lanes, 1, block_channels, tile, together, min_blocks, apart)


def _forward_kernel(
    variant: Variant,
    directions: int,
    mode: int,
    softplus: bool,
    vector: bool,
    dtype,
    steps: int = 0,
) -> str:
    numbers = ", ".join(map(str, (*variant[:6], directions, mode, steps)))
    flags = ", ".join("true" if flag else "false" for flag in (softplus, vector, variant.apart))
    # Addresses and bounds of single elements take registers.
    min_blocks = variant.min_blocks if vector else max(1, variant.min_blocks * 3 // 4)
    return f"selective_scan_fwd_kernel<{DTYPES[dtype]}, {numbers}, {flags}, {min_blocks}>"


class _Scan:
    """The tensors of a scan in one or two directions, as the kernels take them.

    Everything that is done to inputs so that the kernels can read them is done here.

    Args:
        u, dt: (dirs, B, L, D).
        A: (dirs, D, N). D, dt_bias: (dirs, D).
        B, C: (dirs, B, L, N) or (dirs, B, L, G, N).
        z, dy: (B, L, D), shared by the directions.
        dt_proj: (dirs, D, P), by which the forward multiplies dt (dirs, B, L, P) itself; see
            `_multiplies`.
    """

    def __init__(
        self, u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, scale, dy=None, dt_proj=None
    ):
        dtypes = {x.dtype for x in (u, dt, B, C, z, dy) if x is not None}
        # Inputs of several dtypes meet in float32, which loses nothing.
        self.dtype = u.dtype if len(dtypes) == 1 else torch.float32

        def activation(x):
            if x is None:
                return None
            if x.dtype == self.dtype and (x.stride(-1) == 1 or x.shape[-1] == 1):
                return x
            differs_each_time()
            x = x.to(self.dtype)
            return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

        def parameter(x):
            if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
                return x
            differs_each_time()
            return x.float().contiguous()

        self.u, self.dt, self.z, self.dy = map(activation, (u, dt, z, dy))
        self.B, self.C = (activation(x if x.dim() == 5 else x.unsqueeze(3)) for x in (B, C))
        self.A, self.D, self.dt_bias = map(parameter, (A, D, dt_bias))
        self.directions, self.batch, self.length, self.channels = u.shape
        self.rank = 0 if dt_proj is None else dt_proj.shape[2]
        self.groups, self.states = self.B.shape[3:]
        self.softplus, self.reverse, self.scale = dt_softplus, reverse, scale
        self.device = u.device
        group_channels = self.channels // self.groups
        self.dt_proj = dt_proj
        rows = (self.u, self.dt if dt_proj is None else None, self.z, self.dy)
        rows = [x for x in rows if x is not None]
        vector = 16 // self.dtype.itemsize
        self.vector_rows = group_channels % vector == 0 and _aligned(rows, vector)
        self.vector_bc = self.states % 4 == 0 and _aligned((self.B, self.C), 4)

    def chunk_states(self, chunks: int) -> Tensor:
        shape = (self.directions, self.batch, chunks, self.channels, self.states)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def vector_states(self, start: Tensor | None) -> bool:
        return all(_is_vector(x, self.states) for x in (self.A, start))

    def run(
        self,
        variant,
        mode,
        y,
        *,
        chunk,
        start=None,
        end=None,
        sums=None,
        tile_states=None,
        more=None,
    ):
        rows = self.vector_rows and (y is None or _aligned((y,), 16 // self.dtype.itemsize))
        vector = rows and self.vector_bc and self.vector_states(start)
        vector = vector and variant.states * variant.lanes == self.states
        name = _forward_kernel(
            *(variant, self.directions, mode, self.softplus, vector, self.dtype, self.rank // 8)
        )
        chunks = -(-self.length // chunk)
        group_blocks = -(-(self.channels // self.groups) // variant.block_channels)
        blocks = group_blocks * self.groups * chunks * self.batch
        threads = variant.block_channels // variant.channels * variant.lanes
        if variant.apart:
            blocks *= self.directions
        else:
            threads *= self.directions
        launch(
            get_kernel("selective_scan", name, self.device.index),
            (blocks, 1, 1),
            (threads, 1, 1),
            0,
            *self.arguments(chunk, chunks, rows, start, y, more, end, sums, tile_states),
        )

    def arguments(self, chunk, chunks, vector_rows, start, y, *results):
        """ScanParams of selective_scan.cuh."""
        u, dt, z, dy, B, C = self.u, self.dt, self.z, self.dy, self.B, self.C
        strides = (*u.stride()[:3], *dt.stride()[:3])
        strides += (0, 0) if z is None else z.stride()[:2]
        strides += (0, 0) if dy is None else dy.stride()[:2]
        strides += (0, 0) if y is None else y.stride()[:2]
        return (
            *(u, dt, z, dy, B, C, self.A, self.D, self.dt_bias, self.dt_proj),
            *(start, y, *results),
            *(self.batch, self.length, self.channels, self.states, self.groups),
            *(chunk, chunks, self.reverse, vector_rows, self.vector_bc),
            self.vector_states(start),
            *(*strides, *B.stride()[:4], *C.stride()[:4]),
            float(self.scale),
        )


def _is_vector(x: Tensor | None, states: int) -> bool:
    return x is None or (states % 4 == 0 and x.data_ptr() % 16 == 0)


def _aligned(tensors, elements: int) -> bool:
    """Whether every row of `tensors` starts at a multiple of `elements` elements."""
    return all(
        x.data_ptr() % (elements * x.element_size()) == 0
        and all(s % elements == 0 for s in x.stride()[:-1])
        for x in tensors
    )


class Kept(NamedTuple):
    """What a forward of both directions leaves for a backward that need not scan forwards again."""

    states: Tensor
    """States before the backward's tiles: `tile_states` of selective_scan.cuh."""
    ungated: Tensor
    """(B, L, D) y before its gate."""


_KEPT_TOKENS = 8  # between the states: the backward's tile
_MOST_KEPT_STATES = 32


def kept_specs(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the tensors of `Kept`: 16 bits, up to 32 states, or else none."""
    if dtype.itemsize > 2 or states > _MOST_KEPT_STATES:
        return []
    shape = (2, batch, -(-length // _KEPT_TOKENS), channels * _rounded_states(states))
    return [(shape, torch.float32), ((batch, length, channels), dtype)]


def _scan_forward(
    scan: _Scan,
    initial_state=None,
    want_final=False,
    variant=None,
    chunk=None,
    overwrite_u=False,
    kept: Kept | None = None,
):
    """Return (y, final states (dirs, B, D, N) or None); fill in `kept`."""
    if variant is None:
        variant, chunk = _plan(scan, keeps=kept is not None)
    chunk = chunk or scan.length
    mode = OUTPUT_OVER_U if overwrite_u else OUTPUT
    left = {}
    if kept is not None:
        mode, left = OUTPUT_AND_STATES, {"tile_states": kept.states, "more": kept.ungated}
    y = scan.u[0]
    if not overwrite_u:
        shape = (scan.batch, scan.length, scan.channels)
        y = torch.empty(shape, dtype=scan.dtype, device=scan.device)
    if chunk < scan.length:
        start, final = _chunk_starts(scan, variant, chunk, initial_state, want_final)
        scan.run(variant, mode, y, chunk=chunk, start=start, **left)
        return y, final
    end = scan.chunk_states(1) if want_final else None
    scan.run(variant, mode, y, chunk=chunk, start=initial_state, end=end, **left)
    return y, None if end is None else end[:, :, 0]


_SPLITS = [(8, 16), (48, 8), (96, 4), (192, 2)]
"""Up to which share of the sequences a channel of 16 states gets how many lanes."""


def _plan(scan: _Scan, tile: int | None = None, keeps: bool = False) -> tuple[Variant, int]:
    """Return how to share the work out, and into chunks of how many tokens to cut L.

    The fewer lanes share a channel, the fewer instructions an exponential costs, but fewer still
    than the chip holds leave it idle: what is wanted is the most lanes with which every sequence
    is on the chip from the start. Measured on an H100; see benchmarks/NOTES.md.
    """
    states = _rounded_states(scan.states)
    fewest, most = max(1, states // 16), max(1, states // 16, min(states, 16))
    sequences = scan.directions * scan.batch * scan.channels
    processors = multiprocessors(scan.device.index)
    # What a multiprocessor gets, in sequences of 16 states; it holds 384 threads of S > 1.
    share = sequences * fewest / processors
    split = next((lanes for most, lanes in _SPLITS if share <= most), 1)
    # So few sequences that scanning twice, in chunks, beats more lanes, or more than states allow.
    few = share <= 30 and scan.length >= 2048
    few = few or (states < split and scan.length >= min(1024, 256 * states))
    if tile is None and sequences > 0 and few:  # one wave of blocks
        variant = _variant(states, fewest, scan.dtype, chunked=True, keeps=keeps, rank=scan.rank)
        group_blocks = -(-(scan.channels // scan.groups) // variant.block_channels)
        resident = variant.min_blocks * processors * 2 // scan.directions
        chunks = max(1, resident // (group_blocks * scan.groups * scan.batch))
        step = max(variant.tile, 8)
        return variant, min(scan.length, max(64, step * math.ceil(scan.length / chunks / step)))
    lanes = min(fewest * split, most)
    apart = _apart(scan, states, lanes)
    variant = _variant(states, lanes, scan.dtype, tile, keeps=keeps, apart=apart, rank=scan.rank)
    return variant, scan.length


def _apart(scan: _Scan, states: int, lanes: int) -> bool:
    """Whether each direction gets a block of its own; the cluster must pay for itself in time."""
    if scan.directions == 1 or lanes < 4 or states // lanes == 16:
        return False
    return scan.length >= 512 and has_clusters(scan.device.index)


def _chunk_starts(scan: _Scan, variant, chunk, initial_state, want_final):
    """Return the states before each chunk (dirs, B, chunks, D, N), and the final states.

    The chunks are scanned from zero, all at once; then their ends are carried over.
    """
    chunks = -(-scan.length // chunk)
    end, start = scan.chunk_states(chunks), scan.chunk_states(chunks)
    sums = torch.empty(end.shape[:-1], dtype=torch.float32, device=scan.device)
    scan.run(variant, STATES_ONLY, None, chunk=chunk, end=end, sums=sums)
    final = scan.chunk_states(1)[:, :, 0] if want_final else None
    _carry(scan, initial_state, end, sums, start, final, chunks, adjoint=False)
    return start, final


def _carry(scan: _Scan, initial, end, sums, start, final, chunks: int, adjoint: bool) -> None:
    """Write `start` and `final` of the recurrence, or of the adjoint one, from the chunks' ends."""
    rows = scan.directions * scan.batch
    first_reverse_row = scan.batch if scan.directions == 2 else 0 if scan.reverse else rows
    threads = 256
    launch(
        get_kernel("selective_scan", "selective_scan_carry_kernel", scan.device.index),
        (-(-rows * scan.channels * scan.states // threads), 1, 1),
        (threads, 1, 1),
        0,
        *(scan.A, initial, end, sums, start, final),
        *(rows, scan.batch, scan.channels, scan.states, chunks, first_reverse_row, adjoint),
    )


class BackwardVariant(NamedTuple):
    """How the backward kernel shares the work out; letters as in `Variant`."""

    states: int
    lanes: int
    channels: int
    block_channels: int
    tile: int
    kept: int
    """KEPT, tokens whose decays stay in registers instead of being computed again."""
    min_blocks: int


def _backward_variant(states: int, dtype: torch.dtype, dz: bool = False) -> BackwardVariant:
    """Return the fastest way of those measured.

    Args:
        dz: whether the kernel makes the gradient of z.
    """
    tile = 8 if states <= 64 else 512 // states
    if states >= 128:
        return BackwardVariant(states // 32, 32, 1, 8, tile, tile, 1)
    lanes = max(1, states // 4)
    channels = 2 if lanes > 1 else 1
    threads = 64 if lanes <= 2 else 128  # shared memory: below 48 KB
    block_channels = threads * channels // lanes
    kept = (5 if dz else 4) if dtype.itemsize == 2 and states == 16 else 0
    return BackwardVariant(states // lanes, lanes, channels, block_channels, tile, kept, 2)


def _backward_kernel(
    variant: BackwardVariant,
    softplus: bool,
    vector: bool,
    dtype,
    carry: bool = False,
    dz: bool = False,
) -> str:
    numbers = ", ".join(map(str, variant[:6]))
    flags = f"{softplus}, {vector}, {carry}, {dz}".lower()
    return f"selective_scan_bwd_kernel<{DTYPES[dtype]}, {numbers}, {flags}, {variant.min_blocks}>"


def _scan_backward(
    scan: _Scan,
    initial_state=None,
    dend=None,
    variant=None,
    forward_variant=None,
    want_start=None,
    dz=None,
    chunk=None,
    take_y=None,
    overwrite_dt=False,
    dBC=None,
    kept: Kept | None = None,
):
    """Return du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state, with a row a direction.

    Two passes: the forward recurrence again, which leaves the state before each tile and the
    gradient of z; then the adjoint one. Either is cut into chunks where sequences are few and long.
    With what the forward `kept` there is no first pass.
    `dz` is where to write that gradient, if not to new memory; `take_y` gets the output once more.
    With `overwrite_dt` ddt lies where dt was: a block has read a tile before it writes there.
    `dBC` is where to write dB and dC, see `backward_bidirectional`.
    """
    states = _rounded_states(scan.states)
    variant = variant or _backward_variant(states, scan.dtype, dz=kept is not None)
    chunk = chunk or _backward_chunk(scan, variant)
    chunks = -(-scan.length // chunk)
    dirs, batch, length, channels = scan.directions, scan.batch, scan.length, scan.channels

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=scan.device)

    if scan.z is not None and (dz is None or dz.dtype != scan.dtype):
        dz = empty(batch, length, channels, dtype=scan.dtype)
    if kept is None:
        tiles = -(-length // variant.tile)
        tile_states = empty(dirs, batch, tiles, channels * states)
        y = None if take_y is None else empty(batch, length, channels, dtype=scan.dtype)
        start = initial_state
        if chunks > 1:
            fewest = max(1, states // 16)
            forward_variant = _variant(states, fewest, scan.dtype, variant.tile, chunked=True)
            start, _ = _chunk_starts(scan, forward_variant, chunk, initial_state, False)
        forward_variant = forward_variant or _plan(scan, variant.tile)[0]
        mode = STATES_ONLY if dz is None else STATES_AND_DZ
        left = {"tile_states": tile_states, "more": y}
        scan.run(forward_variant, mode, dz, chunk=chunk, start=start, **left)
        if take_y is not None:
            take_y(y)
            del y, left  # before the memory of the second pass is asked for
        dz_to = ungated = None
    else:
        (tile_states, ungated), dz_to = kept, dz

    vector = scan.vector_rows and scan.vector_bc
    if kept is not None:
        vector = vector and _aligned((ungated,), 16 // ungated.itemsize) and _aligned((dz_to,), 2)
    blocks = -(-(channels // scan.groups) // variant.block_channels)

    def adjoint(*gradients, carry=False, sums=None):
        makes_dz = dz_to is not None and not carry
        name = _backward_kernel(variant, scan.softplus, vector, scan.dtype, carry, makes_dz)
        launch(
            get_kernel("selective_scan_bwd", name, scan.device.index),
            (blocks * scan.groups * chunks * batch * dirs, 1, 1),
            (variant.block_channels // variant.channels * variant.lanes, 1, 1),
            0,
            *scan.arguments(chunk, chunks, vector, None, dz_to, ungated, None, sums, tile_states),
            *gradients,
        )

    dstart = empty(dirs, batch, channels, scan.states) if want_start else None
    before = dstart
    if chunks > 1:
        ends, dend_ = scan.chunk_states(chunks), scan.chunk_states(chunks)
        sums = empty(dirs, batch, chunks, channels)
        adjoint(None, ends, None, None, None, None, carry=True, sums=sums)
        _carry(scan, dend, ends, sums, dend_, dstart, chunks, adjoint=True)
        dend, before = dend_, None
    du = empty(dirs, batch, length, channels, dtype=scan.dtype)
    ddt = scan.dt if overwrite_dt and scan.dt.is_contiguous() else torch.empty_like(du)
    partials = empty(blocks, dirs, batch, length, scan.groups * 2 * scan.states)
    dparameters = empty(dirs, batch * chunks, channels * (scan.states + 2))
    adjoint(dend, before, du, ddt, partials, dparameters)
    dBC = empty(*partials.shape[1:]) if dBC is None else dBC
    _sum_dBC(partials, dBC)
    dB, dC = dBC.unflatten(-1, (scan.groups, 2, scan.states)).unbind(-2)
    dA, dD, dbias = sum_partials(
        *("selective_scan_bwd", dparameters.transpose(0, 1)),
        *([(channels, scan.states), (channels,), (channels,)], torch.float32),
    )
    return du, ddt, dA, dB, dC, dD, dz, dbias, dstart


def _sum_dBC(partials: Tensor, dBC: Tensor) -> None:
    """Write the sums over the first dimension of `partials` to the rows of `dBC`."""
    width, threads = dBC.shape[-1], 256
    rows = dBC.numel() // width
    launch(
        get_kernel("selective_scan_bwd", _sum_dBC_kernel(dBC.dtype), dBC.device.index),
        (-(-rows * width // 2 // threads), 1, 1),
        (threads, 1, 1),
        0,
        *(partials, dBC, len(partials), rows, width, dBC.stride(-2)),
    )


def _sum_dBC_kernel(dtype: torch.dtype) -> str:
    return f"sum_dBC_kernel<{DTYPES[dtype]}>"


def _backward_chunk(scan: _Scan, variant: BackwardVariant) -> int:
    """Return into chunks of how many tokens to cut L: one, unless half the chip would be idle.

    Chunks cost the forward recurrence and the adjoint one a second time each.
    """
    groups = -(-(scan.channels // scan.groups) // variant.block_channels) * scan.groups
    blocks = groups * scan.batch * scan.directions
    resident = variant.min_blocks * multiprocessors(scan.device.index)
    most = resident // 2
    if variant.lanes <= 2:  # blocks of few states are small, and wait more than they work
        most, resident = resident, 12 * resident
    if not 0 < blocks <= most:
        return max(scan.length, 1)
    tokens = -(-scan.length // (resident // blocks))
    return min(scan.length, max(64, -(-tokens // variant.tile) * variant.tile))


def forward(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states):
    """Return (y, final_state, saved); signature and contract of the op's reference.

    Nothing is saved: the backward runs the recurrence once more, which costs less than keeping
    the states of every layer.
    """
    scan = _one_direction(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse)
    y, final = _scan_forward(scan, _state(initial_state), want_final=True)
    return y.to(u.dtype), final[0], final.new_empty(0)


def backward(dy, dstate, u, dt, A, B, C, D, z, dt_bias, initial_state, saved, dt_softplus, reverse):
    """Return the gradients of the nine tensors; signature of the op's reference."""
    scan = _one_direction(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, dy)
    du, ddt, dA, dB, dC, dD, dz, dbias, dstart = _scan_backward(
        scan, _state(initial_state), _state(dstate), want_start=initial_state is not None
    )
    # dB and dC lie interleaved in one tensor, and an op's outputs must not share memory.
    dB, dC = (
        g[0].to(x.dtype, copy=True, memory_format=torch.contiguous_format).view(x.shape)
        for g, x in ((dB, B), (dC, C))
    )
    return (
        *(du[0], ddt[0], dA[0], dB, dC),
        *(None if D is None else dD[0], dz, None if dt_bias is None else dbias[0]),
        None if dstart is None else dstart[0],
    )


def _one_direction(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse, dy=None) -> _Scan:
    one = [x if x is None else x.unsqueeze(0) for x in (u, dt, A, B, C, D)]
    bias = None if dt_bias is None else dt_bias.unsqueeze(0)
    return _Scan(*one, z, bias, dt_softplus, reverse, 1.0, dy)


def _state(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def forward_bidirectional(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    scale: float = 0.5,
    dt_softplus: bool = True,
    dt_proj: Tensor | None = None,
    overwrite_u: bool = False,
    kept: Kept | None = None,
) -> Tensor:
    """Return scale * (forward scan + reverse scan) * silu(z): (B, L, D), in one launch.

    Args:
        u, dt: (2, B, L, D), forward's and reverse's; any strides but 1 along D.
        A: (2, D, N). D, dt_bias: (2, D).
        B, C: (2, B, L, N) or (2, B, L, G, N).
        z: (B, L, D), shared by both.
        dt_proj: (2, D, P), contiguous and of the dtype of `u`: then dt is (2, B, L, P), and
            dt @ dt_proj.mT takes its place.
        overwrite_u: whether the result may be a view of `u`, which loses its values; it is for up
            to 16 states, since more leave no registers for it.
        kept: what to leave for the backward, of `kept_specs`; for inputs of one dtype, with z.
    """
    if dt_proj is not None and not _multiplies(
        kept is not None, A.shape[2], dt_proj, u, dt, B, C, z
    ):
        dt = bmm(dt.flatten(1, 2), dt_proj.mT).unflatten(1, dt.shape[1:3])
        dt_proj = None
    scan = _Scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, False, scale, dt_proj=dt_proj)
    overwrite_u = overwrite_u and scan.states <= 16 and kept is None
    return _scan_forward(scan, overwrite_u=overwrite_u, kept=kept)[0].to(u.dtype)


def _multiplies(keeps: bool, states: int, dt_proj: Tensor, *rows: Tensor | None) -> bool:
    """Whether the forward kernel multiplies dt by dt_proj: 16 bits, ranks of eights, no large one.

    That saves memory; time is won where tokens are few, lost at large ranks. It reads 16 bytes at a
    time.

    Args:
        keeps: whether states are left for the backward.
    """
    rank, dtype = dt_proj.shape[2], dt_proj.dtype
    # As much as registers hold, and the shared memory of the wider blocks that leave states.
    most_rank = 24 if keeps else 48 if states <= 16 else 32
    return (
        dtype.itemsize == 2
        and all(x is None or x.dtype == dtype for x in rows)
        and _aligned(rows[1:2], 8)
        and rank % 8 == 0
        and 0 < rank <= most_rank
        and states <= 64
    )


def backward_bidirectional(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    scale: float = 0.5,
    dt_softplus: bool = True,
    dz: Tensor | None = None,
    take_y: Callable[[Tensor], None] | None = None,
    overwrite_dt: bool = False,
    dBC: Tensor | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `forward_bidirectional`'s eight tensors, in their shapes.

    du, ddt and dz have the dtype of `u` (float32 where the inputs are of several dtypes), the
    others are float32.

    Args:
        dy: (B, L, D) gradient of the merged, gated output.
        u, dt, A, B, C, D, z, dt_bias, scale, dt_softplus: as in `forward_bidirectional`.
        dz: (B, L, D) in the dtype of `u`, where to write that gradient.
        take_y: is called with the forward's result, (B, L, D), which the first pass makes once
            more; for inputs of one dtype, and not with `kept`.
        overwrite_dt: whether ddt may be `dt`, which loses its values.
        dBC: (2, B, L, 2 N) in a dtype of the kernels, rows equally far apart: where to write dB
            and dC side by side, of one group, if not to new memory.
        kept: what the forward left, which spares the first pass.
    """
    scan = _Scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, False, scale, dy)
    du, ddt, dA, dB, dC, dD, dz, dbias, _ = _scan_backward(
        scan, dz=dz, take_y=take_y, overwrite_dt=overwrite_dt, dBC=dBC, kept=kept
    )
    return (
        *(du, ddt, dA, dB.view(B.shape), dC.view(C.shape)),
        *(None if D is None else dD, dz, None if dt_bias is None else dbias),
    )


def saved_shape(batch: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    return (0,)


def instantiations() -> list[tuple[str, str]]:
    """Return (source, kernel name) of the specialised kernels, for CI to compile."""
    kernels = [("selective_scan", "selective_scan_carry_kernel")]

    def add(states, lanes, dtype, directions, mode, rank=0, chunked=False, apart=False):
        passes_states = mode in (STATES_ONLY, STATES_AND_DZ)
        tile = _backward_variant(states, dtype).tile if passes_states else None
        keeps = mode == OUTPUT_AND_STATES
        variant = _variant(states, lanes, dtype, tile, chunked, keeps, apart, rank)
        for vector in (True, False):
            name = _forward_kernel(variant, directions, mode, True, vector, dtype, rank // 8)
            kernels.append(("selective_scan", name))

    kernels += [("selective_scan_bwd", _sum_dBC_kernel(dtype)) for dtype in DTYPES]
    kernels.append(("selective_scan_bwd", sum_kernel(torch.float32)))
    for dtype in (torch.float32, torch.bfloat16):  # float16 compiles as bfloat16 does
        for states in (1, 8, 16, 64):
            backward = _backward_variant(states, dtype)
            for carry in (False, True):
                name = _backward_kernel(backward, True, True, dtype, carry)
                kernels.append(("selective_scan_bwd", name))
            fewest = max(1, states // 16)
            add(states, fewest, dtype, 1, OUTPUT)
            add(states, fewest, dtype, 2, OUTPUT)
            add(states, fewest, dtype, 2, STATES_AND_DZ)
        for lanes in (2, 4, 8, 16):
            add(16, lanes, dtype, 2, OUTPUT)
            add(16, lanes, dtype, 2, STATES_AND_DZ)
        add(16, 1, dtype, 2, STATES_ONLY)
        add(16, 1, dtype, 2, STATES_ONLY, chunked=True)
        add(16, 1, dtype, 2, STATES_AND_DZ, chunked=True)
    for lanes in (1, 2, 4, 8, 16):
        add(16, lanes, torch.bfloat16, 2, OUTPUT_OVER_U, rank=16)
        add(16, lanes, torch.bfloat16, 2, OUTPUT_AND_STATES, rank=16)
        add(16, lanes, torch.bfloat16, 2, OUTPUT_AND_STATES)
    for lanes in (4, 8, 16):
        add(16, lanes, torch.float32, 2, OUTPUT, apart=True)
        for mode in (OUTPUT, STATES_AND_DZ, OUTPUT_AND_STATES):
            add(16, lanes, torch.bfloat16, 2, mode, apart=True)
        for rank in (16, 24):
            add(16, lanes, torch.bfloat16, 2, OUTPUT_OVER_U, rank=rank, apart=True)
            add(16, lanes, torch.bfloat16, 2, OUTPUT_AND_STATES, rank=rank, apart=True)
    for states in (1, 8, 16, 32):
        variant = _backward_variant(states, torch.bfloat16, dz=True)
        name = _backward_kernel(variant, True, True, torch.bfloat16, dz=True)
        kernels.append(("selective_scan_bwd", name))
        add(states, max(1, states // 16), torch.bfloat16, 2, OUTPUT_AND_STATES)
    add(16, 1, torch.float32, 2, OUTPUT_OVER_U)
    add(16, 1, torch.bfloat16, 2, OUTPUT_AND_STATES, chunked=True)
    # The most for shared memory to hold.
    add(16, 8, torch.bfloat16, 2, OUTPUT, rank=24)
    add(16, 1, torch.bfloat16, 2, OUTPUT_AND_STATES, rank=24)
    # The largest rank.
    add(16, 1, torch.bfloat16, 2, OUTPUT_OVER_U, rank=48)
    add(16, 4, torch.bfloat16, 2, OUTPUT_OVER_U, rank=48, apart=True)
    return list(dict.fromkeys(kernels))
