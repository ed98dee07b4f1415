"""Feed-forward layers, each of one size of hidden layer by its ratio to the tokens' features."""

from timm.layers import Mlp, SwiGLU

__all__ = ["mlp", "swiglu"]


def mlp(
    dim: int, ratio: float = 4.0, drop: float = 0.0, bias: bool = True, device=None, dtype=None
) -> Mlp:
    """Return timm's `Mlp`, linear - GELU - linear: (B, L, dim) -> (B, L, dim).

    Args:
        dim: features of the tokens.
        ratio: of the hidden features to `dim`.
        drop: rate of dropout after each linear layer.
        bias: whether the linear layers have one.
    """
    return Mlp(dim, int(ratio * dim), bias=bias, drop=drop, device=device, dtype=dtype)


def swiglu(
    dim: int, ratio: float = 8 / 3, drop: float = 0.0, bias: bool = True, device=None, dtype=None
) -> SwiGLU:
    """Return timm's `SwiGLU`, fc2(silu(fc1_g(x)) * fc1_x(x)): (B, L, dim) -> (B, L, dim).

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.

    Args:
        dim: features of the tokens.
        ratio: of the hidden features to `dim`, which are then rounded up to a multiple of 8; by
            default as many parameters as an MLP of ratio 4.
        drop: rate of dropout after the product and the last linear layer.
        bias: whether the linear layers have one.
    """
    hidden = int(ratio * dim)
    return SwiGLU(dim, hidden, bias=bias, drop=drop, align_to=8, device=device, dtype=dtype)
