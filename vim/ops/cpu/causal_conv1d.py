"""Causal depthwise convolution by the C++ kernels."""

import torch

from ._library import activation, call, parameter, pointer, sequence, unavailable

__all__ = ["backward", "forward", "unavailable"]

CHUNK = 64
"""Tokens of an item of work, as in kernels/cpu/causal_conv1d.cpp."""


def forward(x, weight, bias, initial_state, activation_name, reverse):
    x, initial_state = activation(x), activation(initial_state)
    weight, bias = parameter(weight.t()), parameter(bias)
    y = torch.empty(*x.shape, dtype=x.dtype)
    final_state = torch.empty(x.shape[0], weight.shape[0] - 1, x.shape[2], dtype=x.dtype)
    call(
        "causal_conv1d_fwd",
        *_sizes(x, weight, activation_name, reverse),
        *sequence(x),
        *sequence(initial_state),
        *sequence(y),
        *sequence(final_state),
        pointer(weight),
        pointer(bias),
    )
    return y, final_state


def backward(dy, dstate, x, weight, bias, initial_state, activation_name, reverse):
    dy, dstate, x, initial_state = (activation(s) for s in (dy, dstate, x, initial_state))
    weight, bias = parameter(weight.t()), parameter(bias)
    batch, length, channels = x.shape
    width = weight.shape[0]
    dx = torch.empty(*x.shape, dtype=x.dtype)
    dinitial = None
    if initial_state is not None:
        dinitial = torch.empty(*initial_state.shape, dtype=initial_state.dtype)
    dweight = torch.empty(*weight.shape)
    dbias = None if bias is None else torch.empty(channels)
    partial = torch.empty(batch, -(-length // CHUNK), width + 1, channels)
    call(
        "causal_conv1d_bwd",
        *_sizes(x, weight, activation_name, reverse),
        *sequence(x),
        *sequence(initial_state),
        *sequence(dy),
        *sequence(dstate),
        *sequence(dx),
        *sequence(dinitial),
        pointer(weight),
        pointer(bias),
        pointer(dweight),
        pointer(dbias),
        pointer(partial),
    )
    return dx, dweight.t().contiguous(), dbias, dinitial


def _sizes(x, weight, activation_name, reverse) -> tuple[int, ...]:
    silu = activation_name == "silu"
    return *x.shape, weight.shape[0], silu, reverse, torch.get_num_threads()
