"""The inside of Vim's mixer on the CPU: this backend's convolution and scan.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank.
"""

import torch

from vim.ops._mixer_composition import MixerComposition

from . import causal_conv1d, selective_scan
from ._library import unavailable

__all__ = ["backward", "forward", "saved_specs", "unavailable"]

_composition = MixerComposition(causal_conv1d, selective_scan)
backward = _composition.backward
saved_specs = _composition.saved_specs


def forward(xz, forward_branch, backward_branch, merge_scale, save):
    """Return (y, saved); the signature of `MixerComposition.forward`.

    Memory that is new costs more to touch than the convolution takes, so both directions work in
    the same three buffers; the second scan adds the first one's output to its own and gates once.
    """
    batch, length, _ = xz.shape
    x, z = xz.chunk(2, dim=-1)
    u, dt, y = (torch.empty(x.shape, dtype=x.dtype) for _ in range(3))
    saved = []
    for branch, reverse in ((forward_branch, False), (backward_branch, True)):
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = branch
        rank, state = dt_proj.shape[1], A_log.shape[1]
        causal_conv1d.forward(x, conv_weight, conv_bias, None, "silu", reverse, out=u)
        projected = torch.mm(u.flatten(0, 1), x_proj.to(u.dtype).t())  # (B * L, R + 2 N)
        torch.mm(projected[:, :rank], dt_proj.to(u.dtype).t(), out=dt.flatten(0, 1))
        projected = projected.unflatten(0, (batch, length))
        _, B, C = projected.split([rank, state, state], dim=-1)
        merged = {"addend": y, "scale": merge_scale} if reverse else {}
        _, _, states = selective_scan.forward(
            u,
            dt,
            -torch.exp(A_log.float()),
            B,
            C,
            D,
            z if reverse else None,
            dt_bias,
            None,
            True,
            reverse,
            save,
            out=y,
            **merged,
        )
        saved += [projected, states]
    return y, saved if save else []
