"""The short causal depthwise convolution as a module."""

import math

import torch
from torch import Tensor, nn

import vim.ops  # noqa: F401, registers torch.ops.vim

__all__ = ["CausalConv1d"]


class CausalConv1d(nn.Module):
    """Convolve each channel with its past, then activate: (B, L, D) -> (B, L, D).

    Args:
        dim: D channels.
        width: K taps.
        reverse: whether the past of a token is what comes after it.
        activation: "silu", or None for none.
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        reverse: bool = False,
        activation: str | None = "silu",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(dim, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])  # as nn.Conv1d with one channel a group
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.vim.causal_conv1d(
            x, self.weight, self.bias, None, self.activation, self.reverse, "auto"
        )[0]

    def extra_repr(self) -> str:
        dim, width = self.weight.shape
        return f"{dim}, width={width}, reverse={self.reverse}, activation={self.activation!r}"
