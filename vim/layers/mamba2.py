"""The bidirectional Mamba-2 mixer: heads, and a state as large as products of matrices allow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.ops  # noqa: F401, registers torch.ops.vim

from .causal_conv1d import CausalConv1d
from .float32_parameters import Float32Parameters
from .padded_linear import PaddedLinear

__all__ = ["BidirectionalMamba2", "GatedRMSNorm"]


class GatedRMSNorm(nn.Module):
    """Gate and normalise: (..., D), (..., D) -> (..., D), rms_norm((y + other) * silu(z)) * weight.

    Args:
        dim: D.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor, other: Tensor | None = None) -> Tensor:
        return torch.ops.vim.gated_rms_norm(y, z, self.weight, other, self.eps)


@torch.no_grad()
def draw_heads(
    dt_bias: Tensor, A_log: Tensor, D: Tensor, dt_range: tuple[float, float, float]
) -> None:
    """Fill the parameters of the heads: step sizes log-uniform in a range, A uniform in [1, 16].

    Args:
        dt_bias, A_log, D: of one shape; overwritten.
        dt_range: least and greatest step size, and a floor under them.
    """
    low, high, floor = dt_range
    dt = torch.rand_like(dt_bias) * (math.log(high) - math.log(low)) + math.log(low)
    dt = dt.exp().clamp(min=floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    nn.init.uniform_(A_log, 1, 16)
    A_log.log_()
    nn.init.ones_(D)


class BidirectionalMamba2(Float32Parameters):
    """Mix tokens by state space duality in both directions: (B, L, dim) -> (B, L, dim).

    One input projection gives x, the gate z and, for each direction, B, C and dt::

        x, B, C = silu(conv1d([x, B, C]))
        y       = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x

    and ``out_proj(rms_norm((y_forward + y_backward) / 2 * silu(z)))``.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.1 and figure 6 (parallel projections, heads
    that share B and C, norm before the output projection); the two directions as in Vim.

    `A_log`, `D` and `dt_bias` stay float32 when the model is cast to a lower precision.

    Args:
        dim: features of the tokens.
        d_state: N.
        d_conv: K, width of the short convolution.
        expand: d_inner = expand * dim.
        head_dim: P, features of a head; it divides d_inner.
        chunk_size: see `vim.ops.ssd`.
        bias: whether the input and output projections have one.
        dt_min, dt_max, dt_init_floor: the step sizes start log-uniform in [dt_min, dt_max], and
            not under the floor.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        chunk_size: int = 64,
        bias: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        d_inner = int(expand * dim)
        if d_inner % head_dim:
            raise ValueError(f"head_dim must divide expand * dim = {d_inner}, got {head_dim}")
        dd = {"device": device, "dtype": dtype}
        fp32 = {"device": device, "dtype": torch.float32}
        heads = d_inner // head_dim
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.in_sizes = [d_inner, d_inner, 2 * d_state, 2 * d_state, heads, heads]
        self.conv_sizes = [d_inner, d_state, d_state]
        self.in_proj = PaddedLinear(dim, sum(self.in_sizes), bias=bias, **dd)
        self.in_sizes.append(self.in_proj.padding)
        self.forward_conv1d = CausalConv1d(sum(self.conv_sizes), d_conv, **dd)
        self.backward_conv1d = CausalConv1d(sum(self.conv_sizes), d_conv, reverse=True, **dd)
        self.dt_bias = nn.Parameter(torch.empty(2, heads, **fp32))
        self.A_log = nn.Parameter(torch.empty(2, heads, **fp32))
        self.D = nn.Parameter(torch.empty(2, heads, **fp32))
        # That of the sum is that of the mean, with four times the eps.
        self.norm = GatedRMSNorm(d_inner, eps=4e-5, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_heads(self.dt_bias, self.A_log, self.D, self.dt_range)

    def forward(self, tokens: Tensor) -> Tensor:
        z, x, BC_f, BC_b, dt_f, dt_b, _ = self.in_proj(tokens).split(self.in_sizes, dim=-1)
        weight, bias = self.forward_conv1d.weight, self.forward_conv1d.bias
        y_f = self._one_direction(0, weight, bias, x, BC_f, dt_f)
        weight, bias = self.backward_conv1d.weight, self.backward_conv1d.bias
        y_b = self._one_direction(1, weight, bias, x, BC_b, dt_b)
        return self.out_proj(self.norm(y_f, z, y_b))

    def _one_direction(
        self, i: int, weight: Tensor, bias: Tensor, x: Tensor, BC: Tensor, dt: Tensor
    ) -> Tensor:
        """Convolve and scan, from the first token (i = 0) or the last: (B, L, d_inner)."""
        # x, B and C as they lie in the projection, each with its channels of the convolution.
        reverse, sizes = i == 1, [x.shape[-1], BC.shape[-1]]
        x_weight, BC_weight = weight.split(sizes)
        x_bias, BC_bias = bias.split(sizes)
        x, _ = torch.ops.vim.causal_conv1d(x, x_weight, x_bias, None, "silu", reverse, "auto")
        BC, _ = torch.ops.vim.causal_conv1d(BC, BC_weight, BC_bias, None, "silu", reverse, "auto")
        B, C = BC.chunk(2, dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias[i])
        A, D = -torch.exp(self.A_log[i]), self.D[i]
        y, _ = torch.ops.vim.ssd(x, dt, A, B, C, None, self.chunk_size, reverse, D)
        return y.flatten(-2)
