"""The bidirectional Mamba-3 mixer: inputs of two tokens a step, and a state that turns."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.ops  # noqa: F401, registers torch.ops.vim

from .float32_parameters import Float32Parameters
from .mamba2 import draw_heads

__all__ = ["BidirectionalMamba3"]


class BidirectionalMamba3(Float32Parameters):
    """Mix tokens by Mamba-3's state space model in both directions: (B, L, dim) -> (B, L, dim).

    One input projection gives x, the gate z and, for each direction, B, C, angles and, for each
    head, dt, A and the share; there is no convolution::

        dt    = softplus(dt + dt_bias)              share = sigmoid(share)
        A     = -f(A), -A_floor at most             f(a)  = 1 + a (a >= 0), 1 / (1 - a) (a < 0)
        B, C  = rms_norm(B) B_weight + B_bias, rms_norm(C) C_weight + C_bias
        phi_t = sum_{s <= t} dt_s pi tanh(angle_s)
        y     = ssd_trapezoidal(x, dt, A, share, R(phi) B, R(phi) C) + D x

    and ``out_proj((y_forward + y_backward) / 2 * silu(z))``. R turns pairs of neighbouring states
    by an angle each, the first `rope_fraction` of the states. The two directions are as in Vim.

    Source: Lahoti et al. 2026, arXiv:2603.15569 (trapezoidal rule, complex state as a rotation of
    B and C, their norm and bias, no convolution; of one input and one output, "SISO"), and what the
    paper leaves open by the authors' code, state-spaces/mamba, mamba_ssm/modules/mamba3.py.

    Weights and biases of B and C, `D` and `dt_bias` stay float32 when the model is cast to a lower
    precision.

    Args:
        dim: features of the tokens.
        d_state: N, even.
        expand: d_inner = expand * dim.
        head_dim: P, features of a head; it divides d_inner.
        rope_fraction: share of the states that turn, greater than 0.
        chunk_size: see `vim.ops.ssd_trapezoidal`.
        bias: whether the input and output projections have one.
        A_floor: least |A|.
        dt_min, dt_max, dt_init_floor: the step sizes start log-uniform in [dt_min, dt_max], and
            not under the floor.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        expand: float = 2,
        head_dim: int = 64,
        rope_fraction: float = 0.5,
        chunk_size: int = 64,
        bias: bool = False,
        A_floor: float = 1e-4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        d_inner = int(expand * dim)
        angles = int(d_state * rope_fraction) // 2
        if d_inner % head_dim:
            raise ValueError(f"head_dim must divide expand * dim = {d_inner}, got {head_dim}")
        if d_state % 2 or not 0 < angles <= d_state // 2:
            raise ValueError(
                "d_state must be even and rope_fraction in (0, 1], with a pair of states to turn, "
                f"got {d_state} and {rope_fraction}"
            )
        dd = {"device": device, "dtype": dtype}
        fp32 = {"device": device, "dtype": torch.float32}
        heads = d_inner // head_dim
        self.head_dim = head_dim
        self.angles = angles
        self.chunk_size = chunk_size
        self.A_floor = A_floor
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.in_sizes = [d_inner, d_inner, 4 * d_state, 6 * heads, 2 * angles]
        self.in_proj = nn.Linear(dim, sum(self.in_sizes), bias=bias, **dd)
        self.B_weight = nn.Parameter(torch.empty(d_state, **fp32))
        self.C_weight = nn.Parameter(torch.empty(d_state, **fp32))
        self.B_bias = nn.Parameter(torch.empty(2, heads, d_state, **fp32))
        self.C_bias = nn.Parameter(torch.empty(2, heads, d_state, **fp32))
        self.dt_bias = nn.Parameter(torch.empty(2, heads, **fp32))
        self.D = nn.Parameter(torch.empty(2, heads, **fp32))
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_heads(self.dt_bias, torch.empty_like(self.dt_bias), self.D, self.dt_range)
        for parameter in (self.B_weight, self.C_weight, self.B_bias, self.C_bias):
            nn.init.ones_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        z, x, BC, gates, angles = self.in_proj(tokens).split(self.in_sizes, dim=-1)
        # Both directions are one batch, the second half of it flipped.
        x = torch.cat([x, x.flip(1)]).unflatten(-1, (-1, self.head_dim))
        BC = BC.to(self.dt_bias.dtype).unflatten(-1, (2, 2, -1))  # (B, L, 2, 2, N)
        B = F.rms_norm(BC[:, :, :, 0], self.B_weight.shape, self.B_weight, 1e-5)
        C = F.rms_norm(BC[:, :, :, 1], self.C_weight.shape, self.C_weight, 1e-5)
        B = self._directions(B.unsqueeze(3) + self.B_bias)  # (2 B, L, H, N)
        C = self._directions(C.unsqueeze(3) + self.C_bias)
        gates = gates.to(self.dt_bias.dtype).unflatten(-1, (2, 3, -1))  # (B, L, 2, 3, H)
        dt = self._directions(F.softplus(gates[:, :, :, 0] + self.dt_bias))  # (2 B, L, H)
        A = self._directions(gates[:, :, :, 1])
        A = torch.where(A < 0, 1 / (1 - A.clamp(max=0)), 1 + A).neg().clamp(max=-self.A_floor)
        share = self._directions(gates[:, :, :, 2]).sigmoid()
        angles = math.pi * angles.to(dt.dtype).tanh().unflatten(-1, (2, -1))  # (B, L, 2, S)
        phi = (self._directions(angles).unsqueeze(2) * dt.unsqueeze(-1)).cumsum(1)
        cos, sin = phi.cos(), phi.sin()
        B, C = self._turn(B, cos, sin).to(x.dtype), self._turn(C, cos, sin).to(x.dtype)

        y = torch.ops.vim.ssd_trapezoidal(x, dt, A, share, B, C, self.chunk_size)
        x, y = x.unflatten(0, (2, -1)), y.unflatten(0, (2, -1))  # (2, B, L, H, P)
        y = y + self.D[:, None, None, :, None].to(y.dtype) * x
        y_f, y_b = y.flatten(-2).unbind(0)
        y = 0.5 * (y_f + y_b.flip(1))
        return self.out_proj(y * F.silu(z))

    def _directions(self, tensor: Tensor) -> Tensor:
        """(B, L, 2, ...) -> (2 B, L, ...), the second direction flipped."""
        return torch.cat([tensor[:, :, 0], tensor[:, :, 1].flip(1)])

    def _turn(self, tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the first pairs of states: (..., N), (..., S), (..., S) -> (..., N)."""
        pairs = tensor[..., : 2 * self.angles].unflatten(-1, (-1, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        return torch.cat([turned, tensor[..., 2 * self.angles :]], dim=-1)
