"""A linear layer whose output has a width that GPUs like."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PaddedLinear"]


class PaddedLinear(nn.Linear):
    """A linear layer, and zeros up to a multiple of eight: (..., in) -> (..., out + padding).

    On a GPU, rows of bfloat16 that do not begin at multiples of 16 bytes keep products of matrices
    from the fast kernels. The weights are those of `nn.Linear`.

    Attributes:
        padding: how many zeros the output ends with.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **dd) -> None:
        super().__init__(in_features, out_features, bias, **dd)
        self.padding = -out_features % 8

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.padding > 0:
            weight = F.pad(weight, (0, 0, 0, self.padding))
            bias = None if bias is None else F.pad(bias, (0, self.padding))
        return F.linear(x, weight, bias)
