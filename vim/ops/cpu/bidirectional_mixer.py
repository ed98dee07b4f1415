"""The inside of Vim's mixer on the CPU: forward in one kernel, backward composed.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank.
"""

import torch

from vim.ops._mixer_composition import MixerComposition

from . import causal_conv1d, selective_scan
from ._library import activation, call, parameter, pointer, sequence, unavailable

__all__ = ["backward", "forward", "saved_specs", "unavailable"]

_composition = MixerComposition(causal_conv1d, selective_scan)
backward = _composition.backward
saved_specs = _composition.saved_specs


def forward(xz, forward_branch, backward_branch, merge_scale, save):
    """Return (y, saved); the signature of `MixerComposition.forward`."""
    xz = activation(xz)
    batch, length, channels = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    x, z = xz.chunk(2, dim=-1)
    y = torch.empty(batch, length, channels, dtype=xz.dtype)
    saved, branches, alive = [], [], []
    for branch in (forward_branch, backward_branch):
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = branch
        x_proj, dt_proj = x_proj.to(xz.dtype), dt_proj.to(xz.dtype)
        tensors = [
            parameter(x) for x in (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)
        ]
        (outputs, rank), state = (x_proj.shape[0], dt_proj.shape[1]), A_log.shape[1]
        projected = states = None
        if save:
            projected = torch.empty(batch, length, outputs, dtype=xz.dtype)
            states = torch.empty(*selective_scan.saved_shape(batch, length, channels, state))
            saved += [projected, states]
        branches += [*map(pointer, tensors), *sequence(projected), pointer(states)]
        alive.append(tensors)
    width, threads = conv_weight.shape[1], torch.get_num_threads()
    padded, columns = (-(-n // 16) * 16 for n in (channels, outputs))
    packed = torch.empty(2, padded * (width + rank + columns + state + 1))
    intermediate = None
    if batch % threads:
        intermediate = torch.empty(max(2, threads // 2), length, channels + columns)
    call(
        "bidirectional_mixer_fwd",
        *(batch, length, channels, state, rank, width, threads),
        *sequence(x),
        *sequence(z),
        *sequence(y),
        pointer(packed),
        pointer(intermediate),
        *branches,
        float(merge_scale),
    )
    return y, saved
