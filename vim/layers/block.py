"""The residual block of Vim."""

from timm.layers import DropPath
from torch import Tensor, nn

from .add_norm import AddNorm

__all__ = ["FeedForward", "VimBlock"]


class FeedForward(nn.Module):
    """Add, normalise, transform: (B, L, D), (B, L, D) -> (B, L, D), (B, L, D).

    Args:
        norm: adds to the stream and normalises it.
        layer: (B, L, D) -> (B, L, D), each token for itself.
        drop_path: rate at which the incoming tokens, the output of the mixer, are dropped.
    """

    def __init__(self, norm: AddNorm, layer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = norm
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(self.drop_path(x), residual)
        return self.layer(x), residual


class _NoFeedForward(nn.Module):
    """Pass on what comes."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x, residual


class VimBlock(nn.Module):
    """Add, normalise, mix: (B, L, D), (B, L, D) -> (B, L, D), (B, L, D).

    The residual stream travels beside the tokens, and what a block computes joins it at the start
    of the next one, so that addition and norm are one op. The stream after a block is therefore
    the sum of the block's two outputs.

    Args:
        norm: adds to the stream and normalises it.
        mixer: (B, L, D) -> (B, L, D).
        drop_path: rate at which the incoming tokens, the output of the block before, are dropped.
        ffn: what follows the mixer in the same way; None for nothing, as in Vim.
    """

    def __init__(
        self,
        norm: AddNorm,
        mixer: nn.Module,
        drop_path: float = 0.0,
        ffn: FeedForward | None = None,
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm = norm
        self.mixer = mixer
        self.ffn = _NoFeedForward() if ffn is None else ffn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(self.drop_path(x), residual)
        return self.ffn(self.mixer(x), residual)
