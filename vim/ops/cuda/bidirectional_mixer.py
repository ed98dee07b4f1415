"""The inside of Vim's mixer on CUDA: one launch for both convolutions, one for both scans.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank.
"""

import torch
from torch import Tensor

from . import causal_conv1d, selective_scan
from ._compile import unavailable

__all__ = ["backward", "forward", "saved_specs", "unavailable"]


class _Branches:
    """Both directions' tensors in the dtypes that kernels and products take, stacked."""

    def __init__(self, forward_branch: list[Tensor], backward_branch: list[Tensor], dtype) -> None:
        pairs = list(zip(forward_branch, backward_branch, strict=True))
        self.conv = (forward_branch[0], forward_branch[1], backward_branch[0], backward_branch[1])
        x_proj, dt_proj, dt_bias, A_log, D = (torch.stack(pair) for pair in pairs[2:])
        self.x_proj, self.dt_proj = (
            x_proj.to(dtype),
            dt_proj.to(dtype),
        )  # (2, R + 2 N, D), (2, D, R)
        self.dt_bias, self.D = dt_bias, D  # (2, D)
        self.A = -torch.exp(A_log.float())  # (2, D, N)
        self.split_sizes = [dt_proj.shape[2], A_log.shape[2], A_log.shape[2]]

    def scan_inputs(self, u: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
        """Return u, dt, A, B, C, D of both scans; B and C are views of x_proj's result."""
        dt, B, C = projected.split(self.split_sizes, dim=-1)
        return u, _product(dt, self.dt_proj), self.A, B, C, self.D


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(2, B, L, I) and (2, O, I) -> (2, B, L, O)."""
    return torch.bmm(x.flatten(1, 2), weight.mT).unflatten(1, x.shape[1:3])


def saved_specs(xz: Tensor, branch: list[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what `forward` saves: the results of x_proj."""
    return [((2, *xz.shape[:2], branch[2].shape[0]), xz.dtype)]


def forward(xz, forward_branch, backward_branch, merge_scale, save):
    """Return (y, saved); the signature of `MixerComposition.forward`."""
    branches = _Branches(forward_branch, backward_branch, xz.dtype)
    x, z = xz.chunk(2, dim=-1)
    u = causal_conv1d.forward_bidirectional(x, *branches.conv)
    projected = _product(u, branches.x_proj)
    y = selective_scan.forward_bidirectional(
        *branches.scan_inputs(u, projected), z, branches.dt_bias, merge_scale
    )
    return y, [projected] if save else []


def backward(dy, xz, forward_branch, backward_branch, saved, merge_scale):
    """Return the gradients in one list; the signature of `MixerComposition.backward`."""
    branches = _Branches(forward_branch, backward_branch, xz.dtype)
    (projected,) = saved
    x, z = xz.chunk(2, dim=-1)
    u = causal_conv1d.forward_bidirectional(x, *branches.conv)
    du, ddt, dA, dB, dC, dD, dz, ddt_bias = selective_scan.backward_bidirectional(
        dy, *branches.scan_inputs(u, projected), z, branches.dt_bias, merge_scale
    )
    ddt_rank = _product(ddt, branches.dt_proj.mT)
    dprojected = torch.cat([ddt_rank, dB.to(ddt.dtype), dC.to(ddt.dtype)], dim=-1).flatten(1, 2)
    rank = branches.split_sizes[0]
    ddt_proj = torch.bmm(ddt.flatten(1, 2).mT, projected[..., :rank].flatten(1, 2))
    dx_proj = torch.bmm(dprojected.mT, u.flatten(1, 2))
    du = torch.baddbmm(du.flatten(1, 2), dprojected, branches.x_proj).view(u.shape)

    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dxz_gate = dxz.chunk(2, dim=-1)
    dxz_gate.copy_(dz)
    _, dconv, dconv_bias = causal_conv1d.backward_bidirectional(du, x, *branches.conv, dx=dx)
    dA_log = branches.A * dA  # A = -exp(A_log) is its own derivative
    return [dxz, dconv, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA_log, dD]
