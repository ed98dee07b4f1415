"""What the ops cost, for `torch.utils.flop_counter`: a multiplication and an addition are two.

Element by element work is counted only where it is the op's own: the scan's recurrence and the
convolution's taps, as PyTorch counts products and convolutions but not activations and norms. A
backward counts twice its forward, and not what a kernel chooses to compute again.

Size letters: B batch, L tokens, D channels, N state, R dt_rank, K width of the convolution.
"""

from math import log2, prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

__all__: list[str] = []


def _scan(u_shape, states: int) -> int:
    """9 B L D N: exp(delta A) 3, delta u B 2, the state 2, <C, state> 2."""
    return 9 * prod(u_shape) * states


def _conv(x_shape, width: int) -> int:
    return 2 * prod(x_shape) * width


def _mixer(xz_shape, branch_shapes, out_weight_shape) -> int:
    batch, length, channels = xz_shape[0], xz_shape[1], xz_shape[2] // 2
    u = (batch, length, channels)
    conv_weight, _, x_proj, dt_proj, _, A_log, _ = branch_shapes
    products = 2 * batch * length * (prod(x_proj) + prod(dt_proj))
    out = 0 if out_weight_shape is None else 2 * batch * length * prod(out_weight_shape)
    return 2 * (_conv(u, conv_weight[1]) + products + _scan(u, A_log[1])) + out


@register_flop_formula(torch.ops.vim.selective_scan)
def _(u, dt, A, *others, out_shape=None, **kwargs) -> int:
    return _scan(u, A[1])


@register_flop_formula(torch.ops.vim.selective_scan_bwd)
def _(dy, dfinal_state, u, dt, A, *others, out_shape=None, **kwargs) -> int:
    return 2 * _scan(u, A[1])


@register_flop_formula(torch.ops.vim.causal_conv1d)
def _(x, weight, *others, out_shape=None, **kwargs) -> int:
    return _conv(x, weight[1])


@register_flop_formula(torch.ops.vim.causal_conv1d_bwd)
def _(dy, dfinal_state, x, weight, *others, out_shape=None, **kwargs) -> int:
    return 2 * _conv(x, weight[1])


def _dual(x_shape, states: int) -> int:
    """Products inside chunks of 64 tokens, and those that write and read the state."""
    batch, length, heads, features = x_shape
    inside = 2 * batch * length * min(length, 64) * (states + heads * features)
    return inside + 4 * prod(x_shape) * states


@register_flop_formula(torch.ops.vim.ssd_fused)
def _(x, dt, A, B, *others, out_shape=None, **kwargs) -> int:
    return _dual(x, B[2])


@register_flop_formula(torch.ops.vim.ssd_fused_bwd)
def _(dy, dfinal_state, x, dt, A, B, *others, out_shape=None, **kwargs) -> int:
    return 2 * _dual(x, B[2])


@register_flop_formula(torch.ops.vim.bidirectional_mixer)
def _(xz, forward_branch, _, out_weight, *others, out_shape=None, **kwargs) -> int:
    return _mixer(xz, forward_branch, out_weight)


@register_flop_formula(torch.ops.vim.bidirectional_mixer_bwd)
def _(dout, xz, forward_branch, _, out_weight, *others, out_shape=None, **kwargs) -> int:
    return 2 * _mixer(xz, forward_branch, out_weight)


def _fft(shape, length: int) -> int:
    """2.5 n log2(n) for a real transform of n numbers: half of a complex one of split radix 2."""
    return round(2.5 * prod(shape) * log2(max(length, 2)))


# Real FFTs are PyTorch's own ops, which its counter passes over.
if torch.ops.aten._fft_r2c not in flop_registry:

    @register_flop_formula(torch.ops.aten._fft_r2c)
    def _(x, dim, *others, out_shape=None, **kwargs) -> int:
        return _fft(x, prod(x[d] for d in dim))


if torch.ops.aten._fft_c2r not in flop_registry:

    @register_flop_formula(torch.ops.aten._fft_c2r)
    def _(x, dim, *others, out_shape=None, **kwargs) -> int:
        return _fft(out_shape, prod(out_shape[d] for d in dim))
