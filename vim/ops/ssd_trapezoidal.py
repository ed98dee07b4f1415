"""The scan of Mamba-3: a state space model by the trapezoidal rule, in products of matrices.

Size letters: B batch, L tokens, H heads, P features of a head, N state, Q tokens of a chunk, Z
chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import composite
from .ssd import _segment_sums

__all__ = ["ssd_trapezoidal", "ssd_trapezoidal_reference"]


def ssd_trapezoidal(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    share: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
) -> Tensor:
    """Return the output of a state space model whose inputs enter at both ends of a step.

    For each batch item and head, with h_0 = 0 and x_0 = 0::

        h_t = a_t h_{t-1} + (1 - share_t) dt_t a_t x_{t-1} B_{t-1}^T + share_t dt_t x_t B_t^T
        y_t = h_t C_t                              a_t = exp(dt_t A_t)

    With share = 1 it is `ssd`. A state that turns is one whose B_t and C_t have been turned by the
    sum of the angles up to t.

    Source: Lahoti et al. 2026, "Mamba-3", arXiv:2603.15569, the exponential-trapezoidal rule, as in
    the reference that the authors test their kernels against (state-spaces/mamba,
    tests/ops/triton/test_mamba3_siso.py, `mamba3_siso_step_ref`). In a chunk both inputs of a token
    are one, of size share_t dt_t + (1 - share_{t+1}) dt_{t+1}, but for the token itself, which
    has seen the first part alone.

    Plain PyTorch, differentiable in every tensor. Products are in the dtype of `x`; decays and sums
    over chunks are float32 (float64 where `x` is). Autocast does not change that.

    Args:
        x: (B, L, H, P) input.
        dt: (B, L, H) step size, positive.
        A: (B, L, H), negative.
        share: (B, L, H) of a step that its own end has, 0 to 1; 1/2 is the trapezoidal rule.
        B: (B, L, H, N) input matrix.
        C: shaped as `B`, output matrix.
        chunk_size: Q at most.

    Returns:
        (B, L, H, P) in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    return torch.ops.vim.ssd_trapezoidal(x, dt, A, share, B, C, chunk_size)


def ssd_trapezoidal_reference(
    x: Tensor, dt: Tensor, A: Tensor, share: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """Return y of `ssd_trapezoidal` by its equations, one token after another.

    This is the definition that `ssd_trapezoidal` is tested against, in the precision of `x`
    (float32 at least).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_, dt, A, share, B, C = (tensor.to(dtype) for tensor in (x, dt, A, share, B, C))
    decay = torch.exp(dt * A)
    inputs = x_.unsqueeze(-1) * B.unsqueeze(-2)  # (B, L, H, P, N)
    h = torch.zeros_like(inputs[:, 0])
    before, y = h, []
    for t in range(x.shape[1]):
        a, first, second = (
            factor[..., None, None]
            for factor in (decay[:, t], (1 - share[:, t]) * dt[:, t], share[:, t] * dt[:, t])
        )
        h = a * h + first * a * before + second * inputs[:, t]
        y.append((h * C[:, t, :, None]).sum(-1))
        before = inputs[:, t]
    return torch.stack(y, dim=1).to(x.dtype)


@composite("ssd_trapezoidal")
def _ssd_trapezoidal(
    x: Tensor, dt: Tensor, A: Tensor, share: Tensor, B: Tensor, C: Tensor, chunk_size: int
) -> Tensor:
    _check(x, dt, A, share, B, C, chunk_size)
    if x.device.type == "meta":  # which has no autocast
        return _chunked(x, dt, A, share, B, C, chunk_size)
    with torch.autocast(x.device.type, enabled=False):
        return _chunked(x, dt, A, share, B, C, chunk_size)


def _check(x, dt, A, share, B, C, chunk_size):
    """Raise where the arguments of `ssd_trapezoidal` do not fit together."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must be (B, L, H, P) with a token at least, got {tuple(x.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for name, tensor, shape in (
        ("dt", dt, x.shape[:3]),
        ("A", A, x.shape[:3]),
        ("share", share, x.shape[:3]),
        ("B", B, (*x.shape[:3], B.shape[-1])),
        ("C", C, (*x.shape[:3], B.shape[-1])),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")


def _chunked(x, dt, A, share, B, C, chunk_size) -> Tensor:
    length = x.shape[1]
    dtype, sums = x.dtype, torch.promote_types(x.dtype, torch.float32)
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)
    size = min(-(-size // 8) * 8, max(chunk_size, size))  # tensor cores take multiples of 8
    pad = chunks * size - length  # tokens with dt = 0, which change no state

    dt, share = dt.to(sums), share.to(sums)
    now = share * dt
    both = now + F.pad(((1 - share) * dt)[:, 1:], (0, 0, 0, 1))

    def of_tokens(tensor: Tensor) -> Tensor:
        """(B, L, H) -> (B, H, Z, Q)"""
        return F.pad(tensor, (0, 0, 0, pad)).unflatten(1, (chunks, size)).permute(0, 3, 1, 2)

    def of_features(tensor: Tensor) -> Tensor:
        """(B, L, H, N) -> (B, H, Z, Q, N)"""
        tensor = F.pad(tensor.to(dtype), (0, 0, 0, 0, 0, pad))
        return tensor.unflatten(1, (chunks, size)).permute(0, 3, 1, 2, 4)

    total = of_tokens(dt * A.to(sums)).cumsum(-1)
    now, both = of_tokens(now), of_tokens(both)
    x, B, C = of_features(x), of_features(B), of_features(C)

    # Inside the chunks.
    ones = torch.ones(size, size, dtype=torch.bool, device=x.device)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(ones.triu(1), -torch.inf).exp()
    itself = torch.eye(size, dtype=torch.bool, device=x.device)
    factor = torch.where(itself, now.unsqueeze(-1), decay * both.unsqueeze(-2))
    y = ((C @ B.mT) * factor).to(dtype) @ x  # (B, H, Z, Q, P)

    # What each chunk adds to the state, and the states before each chunk.
    to_end = torch.exp(total[..., -1:] - total) * both
    added = (B * to_end.unsqueeze(-1)).to(dtype).mT @ x  # (B, H, Z, N, P)
    passed = _segment_sums(total[..., -1]).exp()[..., :-1, 1:]  # (B, H, Z, Z)
    before = (passed @ added.to(sums).flatten(3)).unflatten(3, added.shape[3:]).to(dtype)
    y = y + (C @ before) * total.exp().unsqueeze(-1)
    return y.to(dtype).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
