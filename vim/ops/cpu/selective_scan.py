"""Selective scan by the C++ kernels."""

import torch
from torch import Tensor

from ._library import activation, call, parameter, pointer, sequence, unavailable

__all__ = ["backward", "forward", "saved_shape", "unavailable"]

CHUNK = 32
"""Tokens between saved states, as in kernels/cpu/selective_scan.cpp."""

BACKWARD_BLOCK = 64
"""Channels whose dB and dC the backward sums at once, as in kernels/cpu/selective_scan.cpp."""


def saved_shape(batch: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    """Return the shape of the states before each chunk, which the backward starts from."""
    return (batch, -(-length // CHUNK), state, channels)


def forward(
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
):
    u, dt, B, C, z = (activation(x) for x in (u, dt, B, C, z))
    A, D, dt_bias, initial_state = (parameter(x) for x in (A, D, dt_bias, initial_state))
    y = torch.empty(*u.shape, dtype=u.dtype)
    final_state = torch.empty(u.shape[0], *A.shape)
    saved = torch.empty(*(saved_shape(*u.shape, A.shape[1]) if save_states else (0,)))
    call(
        "selective_scan_fwd",
        *_inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse),
        *sequence(y),
        pointer(initial_state),
        pointer(final_state),
        pointer(saved) if save_states else 0,
        *sequence(None),  # addend and scale, which only the mixer has
        1.0,
    )
    return y, final_state, saved


def backward(dy, dstate, u, dt, A, B, C, D, z, dt_bias, initial_state, saved, dt_softplus, reverse):
    dy, u, dt, B, C, z = (activation(x) for x in (dy, u, dt, B, C, z))
    A, D, dt_bias, dstate = (parameter(x) for x in (A, D, dt_bias, dstate))
    batch, length, channels = u.shape
    state, groups = A.shape[1], _groups(B)
    blocks = -(-channels // groups // BACKWARD_BLOCK)
    du, ddt, dz = (None if x is None else torch.empty(*x.shape, dtype=x.dtype) for x in (u, dt, z))
    dA, dB, dC = (torch.empty(*x.shape) for x in (A, B, C))
    dD, ddt_bias = (None if x is None else torch.empty(channels) for x in (D, dt_bias))
    dinitial = None if initial_state is None else torch.empty(*initial_state.shape)
    partial_parameters = torch.empty(batch, state + 2, channels)
    partial_matrices = torch.empty(2, blocks, batch, length, groups, state) if blocks > 1 else None
    call(
        "selective_scan_bwd",
        *_inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse),
        *sequence(dy),
        *sequence(du),
        *sequence(ddt),
        *sequence(dz),
        pointer(dstate),
        pointer(saved),
        pointer(dA),
        pointer(dB),
        pointer(dC),
        pointer(dD),
        pointer(ddt_bias),
        pointer(dinitial),
        pointer(partial_parameters),
        pointer(partial_matrices),
    )
    return du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial


def _inputs(u, dt, A, B, C, D, z, dt_bias, dt_softplus, reverse) -> tuple[int, ...]:
    """Return the fields of ScanInputs."""
    return (
        *u.shape,
        A.shape[1],
        _groups(B),
        dt_softplus,
        reverse,
        torch.get_num_threads(),
        *sequence(u),
        *sequence(dt),
        *sequence(z),
        *sequence(B),
        *sequence(C),
        pointer(A),
        pointer(D),
        pointer(dt_bias),
    )


def _groups(B: Tensor) -> int:
    return B.shape[2] if B.dim() == 4 else 1
