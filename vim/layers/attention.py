"""Multi-head self-attention as a mixer."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention"]


class Attention(nn.Module):
    """Mix tokens by multi-head self-attention: (B, L, dim) -> (B, L, dim).

    For each head ``softmax(q k^T / sqrt(head_dim)) v``, computed by
    `torch.nn.functional.scaled_dot_product_attention`, which is FlashAttention where the device
    and the dtype have it.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Dao et al. 2022, arXiv:2205.14135.

    Args:
        dim: features of the tokens.
        head_dim: features of a head; it divides `dim`.
        qkv_bias: whether the input projection has a bias.
        bias: whether the output projection has one.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        qkv_bias: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"head_dim must divide dim = {dim}, got {head_dim}")
        dd = {"device": device, "dtype": dtype}
        self.head_dim = head_dim
        self.in_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.in_proj(x).unflatten(-1, (3, -1, self.head_dim))  # (B, L, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))
