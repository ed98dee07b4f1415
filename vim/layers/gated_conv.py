"""The gated convolution of MambaOut: Vim's mixer without its state space model."""

import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv1d import CausalConv1d

__all__ = ["GatedConv"]


class GatedConv(nn.Module):
    """Mix neighbouring tokens by a gated depthwise convolution: (B, L, dim) -> (B, L, dim).

    ::

        x, z = in_proj(tokens)
        y    = out_proj(conv1d(x) * silu(z))

    Source: Yu & Wang 2025, "MambaOut", arXiv:2405.07992, eq. 5 and 6, there with a convolution of
    7 x 7 over the grid. Here it is one over the sequence, as Mamba's own is, but centred: what is
    compared is the same block with and without the scan.

    Args:
        dim: features of the tokens.
        d_conv: K, width of the convolution, odd.
        expand: D = d_inner = expand * dim.
        bias: whether the input and output projections have one.
    """

    def __init__(
        self,
        dim: int,
        d_conv: int = 7,
        expand: float = 2,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, so that the convolution is centred: {d_conv}")
        dd = {"device": device, "dtype": dtype}
        d_inner = int(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=bias, **dd)
        self.conv1d = CausalConv1d(d_inner, d_conv, activation=None, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        # A causal convolution is the centred one of tokens that came before.
        shift = self.conv1d.weight.shape[1] // 2
        y = self.conv1d(F.pad(x, (0, 0, 0, shift)))[:, shift:]
        return self.out_proj(y * F.silu(z))
