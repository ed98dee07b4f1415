"""The residual block of Vim."""

from timm.layers import DropPath
from torch import Tensor, nn

from .add_norm import AddNorm

__all__ = ["VimBlock"]


class VimBlock(nn.Module):
    """Add, normalise, mix: (B, L, D), (B, L, D) -> (B, L, D), (B, L, D).

    The residual stream travels beside the tokens, and what a block computes joins it at the start
    of the next one, so that addition and norm are one op. The stream after a block is therefore
    the sum of the block's two outputs.

    Args:
        norm: adds to the stream and normalises it.
        mixer: (B, L, D) -> (B, L, D).
        drop_path: rate at which the incoming tokens, the output of the block before, are dropped.
    """

    def __init__(self, norm: AddNorm, mixer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(self.drop_path(x), residual)
        return self.mixer(x), residual
