"""Residual addition and norm as a module."""

import torch
from torch import Tensor, nn

import vim.ops  # noqa: F401, registers torch.ops.vim

__all__ = ["Add", "AddNorm"]


class AddNorm(nn.Module):
    """Add to the residual stream and normalise it: (..., D), (..., D) -> (..., D), (..., D).

    The stream is float32 at least, whatever the dtype of the activations; see
    `vim.ops.add_norm` for the equations.

    Args:
        dim: D features.
        eps: added to the mean square or the variance.
        kind: "rms", a weight and no bias, or "layer", with both.
    """

    def __init__(
        self, dim: int, eps: float = 1e-5, kind: str = "rms", device=None, dtype=None
    ) -> None:
        super().__init__()
        if kind not in ("rms", "layer"):
            raise ValueError(f"the kind of norm must be 'rms' or 'layer', got {kind!r}")
        self.eps = eps
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        bias = torch.empty(dim, device=device, dtype=dtype) if kind == "layer" else None
        self.bias = None if bias is None else nn.Parameter(bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, new_residual, _ = torch.ops.vim.add_norm(
            x, residual, self.weight, self.bias, self.eps, self.kind, torch.float32, "auto"
        )
        return normed, new_residual

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, kind={self.kind!r}"


class Add(nn.Module):
    """Add to the residual stream, in the place of a norm that is not wanted."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x = x + residual
        return x, x
