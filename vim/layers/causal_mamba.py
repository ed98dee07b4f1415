"""The Mamba mixer of language models: one direction, and a state that can be carried on."""

import math

import torch
from torch import Tensor, nn

from vim.ops.selective_scan import scriptable_selective_scan

from .mamba import MambaBranch

__all__ = ["Mamba"]


class Mamba(nn.Module):
    """Mix tokens by a selective scan in one direction: (B, L, dim) -> (B, L, dim).

    ::

        x, z = in_proj(tokens)
        y    = out_proj(branch(x, z))          (see `MambaBranch`)

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4 and algorithm 2.

    A token sees those before it alone, so that a sequence can be read in chunks, or token by
    token, with a state of constant size: `scan` and `step`. The state is the last K - 1 inputs of
    the convolution and the state of the scan.

    Args:
        dim: features of the tokens.
        d_state: N states a channel.
        d_conv: K, width of the short convolution.
        expand: D = d_inner = expand * dim.
        dt_rank: rank of the step size's projection; "auto" is ceil(dim / 16).
        reverse: whether to scan from the last token to the first. Chunks and tokens then come in
            that order, too.
        bias: whether the input and output projections have one.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        reverse: bool = False,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else int(dt_rank)
        self.reverse = reverse
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=bias, **dd)
        self.branch = MambaBranch(d_inner, d_state, d_conv, rank, reverse=reverse, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.branch(x, z))

    @torch.jit.ignore
    def scan(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output of a chunk of a sequence, and the state after it.

        Differentiable in the state, too, so that gradients pass from chunk to chunk.

        Args:
            x: (B, L, dim).
            state: (B, K - 1, D) inputs of the convolution, oldest first, and (B, D, N) state of
                the scan before the chunk; None at the start of a sequence.

        Returns:
            (B, L, dim), and the state in the form of `state`, the second part float32 at least.
        """
        branch = self.branch
        conv, ssm = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u, conv = torch.ops.vim.causal_conv1d(
            x, branch.conv1d.weight, branch.conv1d.bias, conv, "silu", branch.reverse, "auto"
        )
        dt, B, C = branch.x_proj(u).split(branch.split_sizes, dim=-1)
        A = -torch.exp(branch.A_log)
        dt = branch.dt_proj(dt)
        y, ssm = scriptable_selective_scan(
            u, dt, A, B, C, branch.D, z, branch.dt_bias, ssm, reverse=branch.reverse
        )
        return self.out_proj(y), (conv, ssm)

    @torch.jit.ignore
    def step(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output of one token and the state after it: `scan` of (B, dim), L = 1."""
        y, state = self.scan(x.unsqueeze(1), state)
        return y.squeeze(1), state
