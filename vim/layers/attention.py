"""Multi-head self-attention as a mixer."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention"]

torch.fx.wrap("_attend_in_windows")  # symbolic tracing keeps the call, which depends on the length


class _Attend(nn.Module):
    """Attend to all tokens: (B, H, L, P) queries, keys and values -> (B, H, L, P)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class _AttendInWindows(nn.Module):
    """Attend to the tokens of the same window, as `_Attend` does to all."""

    def __init__(self, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_in_windows(q, k, v, self.window_size)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    length = q.shape[2]
    if length <= size:
        return F.scaled_dot_product_attention(q, k, v)
    # Whole windows are items of a batch, and the rest is one of its own: kernels want no mask.
    whole = length - length % size
    windows: list[Tensor] = []
    for x in (q, k, v):
        x = x[:, :, :whole].unflatten(2, (-1, size))  # (B, H, windows, size, P)
        windows.append(x.transpose(1, 2).flatten(0, 1))
    y = F.scaled_dot_product_attention(windows[0], windows[1], windows[2])
    y = y.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    if whole == length:
        return y
    rest = F.scaled_dot_product_attention(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:])
    return torch.cat([y, rest], dim=2)


class Attention(nn.Module):
    """Mix tokens by multi-head self-attention: (B, L, dim) -> (B, L, dim).

    For each head ``softmax(q k^T / sqrt(head_dim)) v``, computed by
    `torch.nn.functional.scaled_dot_product_attention`, which is FlashAttention where the device
    and the dtype have it.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Dao et al. 2022, arXiv:2205.14135; for
    windows Qiu et al. 2019, arXiv:1911.02972: each block of the sequence attends to itself.

    Windows are cut from the sequence as it comes, for a mixer knows no grid: where tokens come row
    by row and without prefix tokens, `window_size` = r W makes bands of r whole rows of W patches
    (not ViTDet's squares), and a class token belongs to the window in which it stands. Nothing
    passes from window to window, so other blocks of the model have to see further.

    Args:
        dim: features of the tokens.
        head_dim: features of a head; it divides `dim`.
        qkv_bias: whether the input projection has a bias.
        bias: whether the output projection has one.
        window_size: tokens of a window, beyond which a token does not see; the last window holds
            what is left. None is no windows.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        qkv_bias: bool = True,
        bias: bool = True,
        window_size: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"head_dim must divide dim = {dim}, got {head_dim}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        dd = {"device": device, "dtype": dtype}
        self.head_dim = head_dim
        self.in_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attend = _Attend() if window_size is None else _AttendInWindows(window_size)
        self.out_proj = nn.Linear(dim, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.in_proj(x).unflatten(-1, (3, -1, self.head_dim))  # (B, L, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attend(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))
