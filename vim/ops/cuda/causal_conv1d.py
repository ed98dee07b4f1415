"""The CUDA backend of `vim.ops.causal_conv1d`; kernels in kernels/cuda/causal_conv1d.cu.

Size letters: B batch, L tokens, D channels, K width of the kernel.
"""

import functools

import torch
from torch import Tensor

from ._compile import DTYPES, get_kernel, multiprocessors, unavailable
from ._launch import contiguous, launch
from ._sums import sum_kernel, sum_partials

__all__ = [
    "backward",
    "backward_bidirectional",
    "forward",
    "forward_bidirectional",
    "instantiations",
    "unavailable",
]

_SOURCE = "causal_conv1d"
_FORWARD, _REVERSE, _BOTH = 1, 2, 3
_WIDEST = 16
_FWD_VECTOR = 4  # channels a thread, where nothing forbids it
_LANES, _ROWS = 16, 8
BLOCK = (_LANES, _ROWS, 1)
_MOST_ROWS = 60_000  # of blocks; a grid may have 65,535
_FWD_STEPS, _BWD_STEPS = (24, 16, 8), (64, 32, 16, 8)
_THREADS = 320  # a multiprocessor, at least


def forward(x, weight, bias, initial_state, activation, reverse):
    """Return (y, final_state); the signature of the reference's `_forward`."""
    if _is_wider(initial_state, x):
        # The kernels read states in the dtype of x: what is rare here may be slow, but not rounded.
        y, state = forward(x.float(), weight, bias, initial_state, activation, reverse)
        return y.to(x.dtype), state.to(x.dtype)
    directions = _REVERSE if reverse else _FORWARD
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype).contiguous()
    final_state = x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    y = x.new_empty(x.shape)
    _forward(x, [(weight, bias)], activation, directions, y, initial_state, final_state)
    return y, final_state


def forward_bidirectional(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_reverse: Tensor,
    bias_reverse: Tensor | None,
    activation: str | None = "silu",
) -> Tensor:
    """Return both directions' convolutions, (2, B, L, D) contiguous, from one reading of `x`.

    The first is `causal_conv1d` with `weight` and `bias`, the second that with the others and
    ``reverse=True``.
    """
    y = x.new_empty(2, *x.shape)
    branches = [(weight, bias), (weight_reverse, bias_reverse)]
    _forward(x, branches, activation, _BOTH, y, None, None)
    return y


def backward(dy, dfinal_state, x, weight, bias, initial_state, activation, reverse):
    """Return (dx, dweight, dbias, dinitial_state); the signature of the reference's."""
    if _is_wider(initial_state, x):
        x = x.float()
    directions = _REVERSE if reverse else _FORWARD
    dinitial_state = None
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype).contiguous()
        dinitial_state = torch.empty_like(initial_state)
    if dfinal_state is not None:
        dfinal_state = dfinal_state.to(x.dtype).contiguous()
    dy = dy.to(x.dtype)
    dx = x.new_empty(x.shape)
    states = (initial_state, dfinal_state, dinitial_state)
    dweight, dbias = _backward([dy], x, [(weight, bias)], activation, directions, dx, False, states)
    return dx, dweight[0], None if bias is None else dbias[0], dinitial_state


def backward_bidirectional(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_reverse: Tensor,
    bias_reverse: Tensor | None,
    activation: str | None = "silu",
    *,
    dx: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight (2, D, K), dbias (2, D)) of `forward_bidirectional`.

    Args:
        dy: (2, B, L, D) in the dtype of `x`.
        dx: where the gradient of `x` is written, of any batch and token strides, such as one half
            of the gradient of a projection; by default it is made, contiguous.
        accumulate: whether to add to what `dx` holds.
    """
    if dx is None:
        dx, accumulate = x.new_empty(x.shape), False
    branches = [(weight, bias), (weight_reverse, bias_reverse)]
    dweight, dbias = _backward(
        list(dy.unbind()), x, branches, activation, _BOTH, dx, accumulate, (None, None, None)
    )
    return dx, dweight, dbias


def _forward(x, branches, activation, directions, y, initial_state, final_state):
    types, grid, arguments = forward_launch(x, branches, y, initial_state, final_state)
    silu, has_state = activation == "silu", initial_state is not None
    name = _fwd_name(*types, directions, silu, has_state)
    launch(get_kernel(_SOURCE, name, x.device.index), grid, BLOCK, 0, *arguments)


def forward_launch(
    x: Tensor,
    branches: list[tuple[Tensor, Tensor | None]],
    y: Tensor,
    initial_state: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[tuple, tuple[int, int, int], tuple]:
    """Return how to launch a kernel with the forward convolution in it.

    Args:
        branches: weight and bias of each direction.
        y: where to write, (directions, B, L, D).

    Returns:
        The first template arguments (dtype, dtype of weights, K, channels a thread), the grid, of
        which rows may be left out, and the arguments, `ConvForward`.
    """
    batch, length, channels = x.shape
    x = _channels_last(x)
    (weight, bias), (weight_2, bias_2) = same_weights(branches, x.dtype)
    width = weight.shape[1]
    vector = _vector(_FWD_VECTOR, width, channels, x)
    _check_width(width)
    groups = channels // vector
    halo = (width - 1) * len(branches)
    tokens, segments = _segments(batch, length, groups, _FWD_STEPS, halo, x.device.index)
    grid = (-(-groups // _LANES), min(-(-batch * segments // _ROWS), _MOST_ROWS), 1)
    arguments = (
        *(x, weight, weight_2, bias, bias_2, initial_state, y, final_state),
        *(batch, length, channels, x.stride(0), x.stride(1), tokens, segments),
    )
    return (x.dtype, weight.dtype, width, vector), grid, arguments


def _backward(dys, x, branches, activation, directions, dx, accumulate, states):
    """Write `dx` and dinitial_state, and return dweight (directions, D, K), dbias (.., D)."""
    batch, length, channels = x.shape
    x = _channels_last(x)
    dys = [_channels_last(dy) for dy in dys]
    if any(dy.stride() != dys[0].stride() for dy in dys):
        dys = [dy.contiguous() for dy in dys]
    (weight, bias), (weight_2, bias_2) = same_weights(branches, x.dtype)
    width, count = weight.shape[1], len(branches)
    initial_state, dfinal_state, dinitial_state = states
    has_states = initial_state is not None or dfinal_state is not None
    vector = _vector(_bwd_vector(directions), width, channels, x, dx, *dys)
    silu = activation == "silu"
    name = _bwd_name(x.dtype, weight.dtype, width, vector, directions, silu, has_states)
    kernel = get_kernel(_SOURCE, name, x.device.index)
    groups = channels // vector
    tokens, segments = _segments(batch, length, groups, _BWD_STEPS, width - 1, x.device.index)
    blocks = (-(-groups // _LANES), min(-(-batch * segments // _ROWS), 1024), 1)
    partials = x.new_empty(blocks[1], count, channels * (width + 1), dtype=torch.float32)
    launch(
        kernel,
        blocks,
        BLOCK,
        0,
        x,
        weight,
        weight_2,
        bias,
        bias_2,
        dys[0],
        dys[-1],
        initial_state,
        dfinal_state,
        dx,
        dinitial_state,
        partials,
        batch,
        length,
        channels,
        x.stride(0),
        x.stride(1),
        dys[0].stride(0),
        dys[0].stride(1),
        dx.stride(0),
        dx.stride(1),
        tokens,
        segments,
        accumulate,
    )
    shapes = [(channels, width), (channels,)]
    dweight, dbias = sum_partials(_SOURCE, partials, shapes, weight.dtype)
    return dweight, dbias


def _is_wider(state: Tensor | None, x: Tensor) -> bool:
    """Whether values of `state` would be rounded in the dtype of a 16-bit `x`."""
    return state is not None and x.dtype != torch.float32 and state.dtype != x.dtype


def _channels_last(x: Tensor) -> Tensor:
    """Return `x` with channels that lie side by side; batch and tokens keep any strides."""
    return x if x.stride(2) == 1 else contiguous(x, x.dtype)


def same_weights(branches, dtype):
    """Return two pairs (weight, bias) of one dtype, float32 or that of x, contiguous."""
    common = branches[0][0].dtype
    if common != dtype or any(t is not None and t.dtype != common for b in branches for t in b):
        common = torch.float32
    pairs = [
        (contiguous(weight, common), None if bias is None else contiguous(bias, common))
        for weight, bias in branches
    ]
    return pairs[0], pairs[-1]


def _vector(most: int, width: int, channels: int, *tensors: Tensor) -> int:
    """Return how many channels a thread takes: `most` where every access is aligned, else one."""
    if width > 4:
        most = max(most * 4 // (1 << (width - 1).bit_length()), 1)
    size = tensors[0].element_size() * most
    misaligned = channels % most
    for x in tensors:
        step = x.element_size()
        misaligned |= (x.data_ptr() | x.stride(0) * step | x.stride(1) * step) % size
    return 1 if misaligned else most


def _bwd_vector(directions: int) -> int:
    """Channels a thread: gradients of both directions of four would take all its registers."""
    return 2 if directions == _BOTH else 4


@functools.cache
def _segments(
    batch: int, length: int, groups: int, choices: tuple[int, ...], halo: int, device_index: int
) -> tuple[int, int]:
    """Return (tokens a thread, segments a sequence).

    A thread takes `halo` steps besides its tokens, in batches of four, so segments are as long as
    leaves every multiprocessor enough threads, out of `choices` of steps.
    """
    for steps in choices:
        segments = -(-length // max(steps - halo, 1))
        if batch * groups * segments >= multiprocessors(device_index) * _THREADS:
            break
    return -(-length // segments), segments


@functools.cache
def _fwd_name(dtype, weight_dtype, width, vector, directions, silu, states) -> str:
    _check_width(width)
    arguments = f"{DTYPES[dtype]}, {DTYPES[weight_dtype]}, {width}, {vector}, {directions}"
    return f"causal_conv1d_fwd_kernel<{arguments}, {str(silu).lower()}, {str(states).lower()}>"


@functools.cache
def _bwd_name(dtype, weight_dtype, width, vector, directions, silu, states) -> str:
    _check_width(width)
    arguments = f"{DTYPES[dtype]}, {DTYPES[weight_dtype]}, {width}, {vector}, {directions}"
    return f"causal_conv1d_bwd_kernel<{arguments}, {str(silu).lower()}, {str(states).lower()}>"


def _check_width(width: int):
    if width > _WIDEST:
        raise RuntimeError(
            f"backend 'cuda' serves causal_conv1d with K up to {_WIDEST}, got {width}; ask for "
            "backend='reference'"
        )


def instantiations() -> list[tuple[str, str]]:
    """Return (source, name) of the kernels that the models use and of each kind of special case."""
    half, full = torch.bfloat16, torch.float32
    names = []
    for dtype in DTYPES:
        for directions in (_FORWARD, _BOTH):
            names += [
                _fwd_name(dtype, full, 4, 4, directions, True, False),
                _bwd_name(dtype, full, 4, _bwd_vector(directions), directions, True, False),
            ]
    names += [
        _fwd_name(half, half, 4, 4, _REVERSE, True, True),
        _bwd_name(half, half, 4, 4, _REVERSE, True, True),
        _fwd_name(half, full, 4, 1, _REVERSE, False, False),
        _bwd_name(half, full, 4, 1, _FORWARD, False, True),
        _fwd_name(half, full, 8, 2, _FORWARD, True, True),
        _bwd_name(half, full, 8, 2, _REVERSE, True, True),
    ]
    for width in (2, 3):
        names += [
            _fwd_name(half, full, width, 4, _FORWARD, True, False),
            _bwd_name(half, full, width, 4, _FORWARD, True, False),
        ]
    names += [sum_kernel(dtype) for dtype in (full, half)]
    return [(_SOURCE, name) for name in names]
