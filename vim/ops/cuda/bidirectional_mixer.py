"""The inside of Vim's mixer on CUDA: both directions in each launch.

Of many tokens in 16 bits, one kernel convolves and projects; another takes what follows the scans
in the backward. Other sizes go through the convolution's kernels and products.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank, P = R rounded
up to a multiple of eight, M = P + 2 N.
"""

import functools
import math

import torch
from torch import Tensor

from . import causal_conv1d, selective_scan
from ._compile import DTYPES, get_kernel, shared_memory, unavailable
from ._launch import Repeated, bmm, contiguous, differs_each_time, launch, make
from ._sums import sum_kernel, sum_partials

__all__ = [
    "Repeated",
    "backward",
    "forward",
    "instantiations",
    "make",
    "saved_specs",
    "unavailable",
]

LENDS_Y = True
"""See `vim.ops.bidirectional_mixer._lends_y`."""

# Of mixer_tiles.cuh, mixer_projection.cu and mixer_gradients.cu.
_CHANNELS, _THREADS, _PITCH = 64, 256, 72
_TOKENS = 64
_PROJECTED_TOKENS = 16384  # fewer leave multiprocessors idle
_MOST_SUMS = 96  # rows of its two sums over tokens; more take too many registers
_SEGMENT = 64  # tokens, at least


class _Weights:
    """Both directions' tensors, stacked, as the products and the scan take them; see `_inputs`.

    Attributes:
        conv: weight and bias of the forward convolution, then of the reverse one, as given.
        x_proj: (2, M, D) and dt_proj: (2, D, P) in the dtype of the products, zeros beyond R.
        A: (2, D, N) = -exp(A_log). D, dt_bias: (2, D). All float32.
        given: the dtype in which the kernel reads x_proj and dt_proj.
        values: how many values the kernel writes, about.
        arguments: `MixerWeights` of mixer_weights.cuh but for its last.
    """

    def __init__(self, forward_branch: list[Tensor], backward_branch: list[Tensor], dtype) -> None:
        self.conv = (*forward_branch[:2], *backward_branch[:2])
        x_proj, dt_proj, _, A_log, _ = forward_branch[2:]
        channels, self.rank = dt_proj.shape
        self.states = A_log.shape[1]
        self.padded_rank = _rounded_up(self.rank, 8)
        width = self.padded_rank + 2 * self.states
        self.x_proj = x_proj.new_empty(2, width, channels, dtype=dtype)
        self.dt_proj = x_proj.new_empty(2, channels, self.padded_rank, dtype=dtype)
        self.A = x_proj.new_empty(2, channels, self.states, dtype=torch.float32)
        self.D = x_proj.new_empty(2, channels, dtype=torch.float32)
        self.dt_bias = x_proj.new_empty(2, channels, dtype=torch.float32)
        pairs = list(zip(forward_branch[2:], backward_branch[2:], strict=True))
        products, scan = [*pairs[0], *pairs[1]], [*pairs[3], *pairs[4], *pairs[2]]
        self.given = products[0].dtype
        if self.given != dtype or any(x.dtype != self.given for x in products):
            self.given = torch.float32
        self.values = self.x_proj.numel() + self.dt_proj.numel()
        self.arguments = (
            *(contiguous(x, self.given) for x in products),
            *(contiguous(x, torch.float32) for x in scan),
            *(self.x_proj, self.dt_proj, self.A, self.D, self.dt_bias),
            *(channels, self.states, self.rank, self.padded_rank),
        )

    def scan_inputs(self, u: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
        """Return u, dt (2, B, L, P) before dt_proj, A, B, C, D of both scans.

        dt, B and C are views of x_proj's result.
        """
        dt, B, C = projected.split([self.padded_rank, self.states, self.states], dim=-1)
        return u, dt, self.A, B, C, self.D


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _inputs(weights: _Weights, x: Tensor, u: Tensor | None = None) -> Tensor:
    """Fill in the weights; return both convolutions of x, (2, B, L, D), or `u` as it is."""
    convolve = u is None
    if u is None:
        u = x.new_empty(2, *x.shape)
    branches = [weights.conv[:2], weights.conv[2:]]
    types, (columns, rows, _), arguments = causal_conv1d.forward_launch(x, branches, u)
    rows, block_values = (rows, 512) if convolve else (0, 128)
    weight_rows = -(-weights.values // (columns * block_values))
    launch(
        get_kernel("mixer_inputs", _inputs_kernel(*types, weights.given), x.device.index),
        (columns, rows + weight_rows, 1),
        causal_conv1d.BLOCK,
        0,
        *arguments,
        *weights.arguments,
        weight_rows,
    )
    return u


@functools.cache
def _inputs_kernel(dtype, conv_dtype, width: int, vector: int, given) -> str:
    types = ", ".join(DTYPES[t] for t in (dtype, conv_dtype, given))
    return f"mixer_inputs_kernel<{types}, {width}, {vector}>"


def _projected(weights: _Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Fill in the weights; return both convolutions u (2, B, L, D) and x_proj's results."""
    if not _projects_at_once(weights, x):
        u = _inputs(weights, x)
        return u, _product(u, weights.x_proj)
    batch, length, channels = x.shape
    width, rank = weights.x_proj.shape[1], weights.rank
    u = x.new_empty(2, batch, length, channels)
    if weights.given == x.dtype:
        x_proj = weights.arguments[:2]
        weight_blocks = -(-weights.values // 512)
    else:
        _inputs(weights, x, u)
        x_proj, rank, weight_blocks = weights.x_proj.unbind(), weights.padded_rank, 0
    projected = x.new_empty(2, batch, length, width)
    (weight, bias), (weight_2, bias_2) = causal_conv1d.same_weights(
        [weights.conv[:2], weights.conv[2:]], x.dtype
    )
    name, shared = _projection_kernel(x.dtype, weight.dtype, weight.shape[1], width)
    launch(
        get_kernel("mixer_projection", name, x.device.index),
        (-(-batch * length // _TOKENS) + weight_blocks, 1, 1),
        (_THREADS, 1, 1),
        shared,
        *(x, weight, weight_2, bias, bias_2, *x_proj, u, projected),
        *(batch * length, length, channels, x.stride(1), rank, weights.padded_rank, weight_blocks),
        *weights.arguments,
        0,
    )
    return u, projected


def _projects_at_once(weights: _Weights, x: Tensor) -> bool:
    """Whether mixer_projection.cu serves these sizes, in less time than one by one."""
    batch, length, channels = x.shape
    width, row = weights.x_proj.shape[1], x.data_ptr() | 2 * x.stride(1)
    return (
        x.dtype.itemsize == 2
        and batch * length >= _PROJECTED_TOKENS
        and weights.conv[0].shape[1] in (2, 4)
        and channels % _CHANNELS == 0
        and width % 8 == 0
        and width <= _MOST_SUMS
        and row % 16 == 0
        and x.stride(2) == 1
        and (batch == 1 or x.stride(0) == length * x.stride(1))
        and all(t.data_ptr() % 16 == 0 for t in (*weights.conv, *weights.arguments[:4]))
    )


@functools.cache
def _projection_kernel(dtype, conv_dtype, taps: int, width: int) -> tuple[str, int]:
    """Return the kernel's name, and its bytes of shared memory: `ProjectionMemory` there."""
    rows = _TOKENS + 2 * (taps - 1) + 2 * width
    step = 2 * rows * _PITCH + conv_dtype.itemsize * 2 * _CHANNELS * (taps + 1)
    shared = 2 * step + 2 * 2 * _TOKENS * _PITCH
    types = f"{DTYPES[dtype]}, {DTYPES[conv_dtype]}"
    return f"mixer_projection_kernel<{types}, {taps}, {width}, {shared}>", shared


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(2, B, L, I) and (2, O, I) -> (2, B, L, O)."""
    return bmm(x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])


def _kept_specs(xz: Tensor, branch: list[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of `Kept`, if states can be kept."""
    batch, length, width = xz.shape
    return selective_scan.kept_specs(batch, length, width // 2, branch[5].shape[1], xz.dtype)


def keeps_states(xz: Tensor, branch: list[Tensor]) -> bool:
    """Whether `forward` has states to keep of such inputs."""
    return bool(_kept_specs(xz, branch))


def saved_specs(
    xz: Tensor, branch: list[Tensor], keep_states: bool = False
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what `forward` saves: the results of x_proj, and with
    `keep_states` both convolutions of x and `Kept`."""
    batch, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    width = _rounded_up(branch[3].shape[1], 8) + 2 * branch[5].shape[1]
    specs = [((2, batch, length, width), xz.dtype)]
    if keep_states:
        specs += [((2, batch, length, channels), xz.dtype), *_kept_specs(xz, branch)]
    return specs


def forward(
    xz, forward_branch, backward_branch, merge_scale, save, transient=False, keep_states=False
):
    """Return (y, saved); the signature of `MixerComposition.forward`.

    Args:
        transient: whether y is soon let go, so that it may be part of more memory.
        keep_states: whether to save what spares the backward convolutions and a scan, for inputs
            of which `keeps_states` says so.
    """
    x, z = xz.chunk(2, dim=-1)
    weights = _Weights(forward_branch, backward_branch, x.dtype)
    u, projected = _projected(weights, x)
    specs = _kept_specs(xz, forward_branch) if save and keep_states else []
    kept = [x.new_empty(shape, dtype=dtype) for shape, dtype in specs]
    y = selective_scan.forward_bidirectional(
        *(*weights.scan_inputs(u, projected), z, weights.dt_bias, merge_scale),
        dt_proj=weights.dt_proj,
        overwrite_u=transient,
        kept=selective_scan.Kept(*kept) if kept else None,
    )
    saved = [projected, u, *kept] if kept else [projected]
    return y, saved if save else []


def backward(dy, xz, forward_branch, backward_branch, saved, merge_scale, take_y=None):
    """Return the gradients in one list; the signature of `MixerComposition.backward`.

    Args:
        take_y: is called with what `forward` returned, (B, L, D), which may then be let go; not
            where states were kept.
    """
    projected, u, *kept = saved if len(saved) > 1 else [*saved, None]
    projected = projected.contiguous()
    x, z = xz.chunk(2, dim=-1)
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    weights = _Weights(forward_branch, backward_branch, x.dtype)
    u = _inputs(weights, x, u)
    padded = weights.padded_rank
    _, dt, *inputs = weights.scan_inputs(u, projected)
    dt = _product(dt, weights.dt_proj)
    dprojected = torch.empty_like(projected)
    du, ddt, dA, _, _, dD, _, ddt_bias = selective_scan.backward_bidirectional(
        *(dy.to(xz.dtype), u, dt, *inputs, z, weights.dt_bias, merge_scale),
        dz=dz,
        take_y=take_y,
        overwrite_dt=True,
        dBC=dprojected[..., padded:],
        kept=selective_scan.Kept(*kept) if kept else None,
    )
    ddt_rank = dprojected.flatten(1, 2)[..., :padded]
    bmm(ddt.flatten(1, 2), weights.dt_proj, out=ddt_rank)
    products = (x, u, du, ddt, dprojected, projected)
    finish = _gradients_at_once if _finishes_at_once(weights, x) else _gradients_one_by_one
    gradients = finish(weights, dx, *products)
    dA_log = make(torch.mul, weights.A, dA)  # A is its own derivative by A_log
    return [dxz, *gradients, ddt_bias, dA_log, dD]


def _gradients_one_by_one(weights: _Weights, dx, x, u, du, ddt, dprojected, projected):
    """Write dx; return the gradients of convolutions (weight, bias), x_proj and dt_proj.

    Args:
        du: (2, B, L, D) by the scans alone, which is overwritten.
        ddt: (2, B, L, D) of what dt_proj returns.
        dprojected, projected: (2, B, L, M).
    """
    differs_each_time()
    rank, padded = weights.rank, weights.padded_rank
    rows = dprojected.flatten(1, 2)
    ddt_proj = torch.bmm(ddt.flatten(1, 2).mT, projected[..., :padded].flatten(1, 2))
    dx_proj = torch.bmm(rows.mT, u.flatten(1, 2))
    if padded != rank:
        ddt_proj = ddt_proj[..., :rank]
        dx_proj = torch.cat([dx_proj[:, :rank], dx_proj[:, padded:]], dim=1)
    du.flatten(1, 2).baddbmm_(rows, weights.x_proj)
    _, dconv, dconv_bias = causal_conv1d.backward_bidirectional(du, x, *weights.conv, dx=dx)
    return dconv, dconv_bias, dx_proj, ddt_proj


def _finishes_at_once(weights: _Weights, x: Tensor) -> bool:
    """Whether mixer_gradients.cu serves these sizes, in less time than one by one."""
    width = weights.x_proj.shape[1]
    row = x.data_ptr() | 2 * x.stride(0) | 2 * x.stride(1)
    return (
        x.dtype.itemsize == 2
        and x.numel() > 0
        and weights.conv[0].shape[1] in (2, 3, 4)
        and x.shape[2] % _CHANNELS == 0
        and width % 8 == 0
        and _rounded_up(width, 16) + _rounded_up(weights.padded_rank, 16) <= _MOST_SUMS
        and row % 16 == 0
        and x.stride(2) == 1
    )


def _gradients_at_once(weights: _Weights, dx, x, u, du, ddt, dprojected, projected):
    """`_gradients_one_by_one`, by one kernel that works u out again and leaves du as it is."""
    batch, length, channels = x.shape
    conv = [contiguous(t, torch.float32) for t in weights.conv]
    width, taps = weights.x_proj.shape[1], conv[0].shape[1]
    rank, padded = weights.rank, weights.padded_rank
    limit = shared_memory(x.device.index)
    name, shared = _gradients_kernel(x.dtype, taps, width, padded, limit)
    kernel = get_kernel("mixer_gradients", name, x.device.index)
    columns = channels // _CHANNELS
    wanted = max(1, kernel.resident_blocks(_THREADS, shared) // columns)
    segments = max(1, min(wanted // batch, length // _SEGMENT))
    tokens = -(-length // segments)
    segments = -(-length // tokens)
    block_segments = -(-batch * segments // wanted)
    rows = -(-batch * segments // block_segments)
    shapes = [(channels, taps), (channels,), (rank + width - padded, channels), (channels, rank)]
    partials = x.new_empty(rows, 2, sum(map(math.prod, shapes)), dtype=torch.float32)
    launch(
        kernel,
        (columns, rows, 1),
        (_THREADS, 1, 1),
        shared,
        *(x, du, ddt, dprojected, projected, weights.x_proj, conv[0], conv[2], conv[1], conv[3]),
        *(dx, partials, batch, length, channels, rank, partials.shape[2]),
        *(x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), tokens, segments, block_segments),
    )
    return sum_partials("mixer_gradients", partials, shapes, torch.float32)


@functools.cache
def _gradients_kernel(
    dtype, taps: int, width: int, padded: int, limit: int = 1 << 20
) -> tuple[str, int]:
    """Return the kernel's name, and its bytes of shared memory: `SharedMemory` in the source."""
    for tokens in (32, 16):
        row = 2 * _PITCH + _rounded_up(width, 16) + 8 + _rounded_up(padded, 16) + 8
        tile = 2 * tokens * row + (tokens + taps - 1) * _PITCH
        shared = 2 * (2 * tile + 2 * _rounded_up(width, 16) * _PITCH)
        shared += 4 * 2 * _CHANNELS * (tokens + taps - 1 + taps + 1)
        if shared <= limit:
            break
    arguments = f"{DTYPES[dtype]}, {taps}, {width}, {padded}, {tokens}, {shared}"
    return f"mixer_gradients_kernel<{arguments}>", shared


def instantiations() -> list[tuple[str, str]]:
    """Return (source, kernel name) for CI to compile."""
    half, full = torch.bfloat16, torch.float32
    kinds = [(full, full, 4, 4, full), (half, full, 4, 4, full), (half, half, 4, 4, half)]
    kinds += [(torch.float16, full, 4, 4, full), (half, full, 4, 1, half)]
    kernels = [("mixer_inputs", _inputs_kernel(*kind)) for kind in kinds]
    kernels += [
        ("mixer_projection", _projection_kernel(*kind)[0])
        for kind in ((half, full, 4, 48), (half, half, 4, 56), (half, half, 4, 80))
    ]
    sizes = [(half, 4, 48, 16), (half, 4, 56, 24), (torch.float16, 4, 56, 24), (half, 2, 24, 8)]
    sizes.append((half, 4, 56, 24, 99 * 1024))  # of GPUs with less shared memory
    kernels += [("mixer_gradients", _gradients_kernel(*size)[0]) for size in sizes]
    kernels.append(("mixer_gradients", sum_kernel(full)))
    return kernels
