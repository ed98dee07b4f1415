"""The Mamba-2 mixer of language models: one direction, and a state that can be carried on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.ops  # noqa: F401, registers torch.ops.vim

from .causal_conv1d import CausalConv1d
from .float32_parameters import Float32Parameters
from .mamba2 import GatedRMSNorm, draw_heads
from .padded_linear import PaddedLinear

__all__ = ["Mamba2"]


class Mamba2(Float32Parameters):
    """Mix tokens by state space duality in one direction: (B, L, dim) -> (B, L, dim).

    ::

        z, [x, B, C], dt = in_proj(tokens)
        x, B, C          = silu(conv1d([x, B, C]))
        y                = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x
        out              = out_proj(rms_norm(y * silu(z)))

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.1 and figure 6.

    A token sees those before it alone, so that a sequence can be read in chunks, or token by
    token, with a state of constant size: `scan` and `step`, as of `Mamba`.

    `A_log`, `D` and `dt_bias` stay float32 when the model is cast to a lower precision.

    Args:
        dim: features of the tokens.
        d_state: N.
        d_conv: K, width of the short convolution.
        expand: D = d_inner = expand * dim.
        head_dim: P, features of a head; it divides d_inner, which has H = d_inner / P heads.
        chunk_size: see `vim.ops.ssd`.
        reverse: whether to scan from the last token to the first. Chunks and tokens then come in
            that order, too.
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
        reverse: bool = False,
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
        self.reverse = reverse
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.conv_sizes = [d_inner, d_state, d_state]
        self.in_sizes = [d_inner, sum(self.conv_sizes), heads]
        self.in_proj = PaddedLinear(dim, sum(self.in_sizes), bias=bias, **dd)
        self.in_sizes.append(self.in_proj.padding)
        self.conv1d = CausalConv1d(sum(self.conv_sizes), d_conv, reverse, **dd)
        self.dt_bias = nn.Parameter(torch.empty(heads, **fp32))
        self.A_log = nn.Parameter(torch.empty(heads, **fp32))
        self.D = nn.Parameter(torch.empty(heads, **fp32))
        self.norm = GatedRMSNorm(d_inner, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_heads(self.dt_bias, self.A_log, self.D, self.dt_range)

    def forward(self, x: Tensor) -> Tensor:
        return self.scan(x)[0]

    def scan(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output of a chunk of a sequence, and the state after it.

        Differentiable in the state, too, so that gradients pass from chunk to chunk.

        Args:
            x: (B, L, dim).
            state: (B, K - 1, D + 2 N) inputs of the convolution, oldest first, and (B, H, P, N)
                state of the scan before the chunk; None at the start of a sequence.

        Returns:
            (B, L, dim), and the state in the form of `state`, the second part float32 at least.
        """
        conv_state: Tensor | None = None
        ssm_state: Tensor | None = None
        if state is not None:
            conv_state, ssm_state = state
        z, xBC, dt, _ = self.in_proj(x).split(self.in_sizes, dim=-1)
        xBC, conv_state = torch.ops.vim.causal_conv1d(
            xBC, self.conv1d.weight, self.conv1d.bias, conv_state, "silu", self.reverse, "auto"
        )
        u, B, C = xBC.split(self.conv_sizes, dim=-1)
        u = u.unflatten(-1, (-1, self.head_dim))  # (B, L, H, P)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        A = -torch.exp(self.A_log)
        y, ssm_state = torch.ops.vim.ssd(
            u, dt, A, B, C, ssm_state, self.chunk_size, self.reverse, self.D
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), (conv_state, ssm_state)

    @torch.jit.ignore
    def step(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output of one token and the state after it: `scan` of (B, dim), L = 1."""
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state
