"""The state space dual form of Mamba-2, by products of matrices, channels-last.

Size letters: B batch, L tokens, H heads, P features of a head, N state, Q tokens of a chunk, Z
chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import (
    composite,
    differentiable_gradients,
    fake_gradients,
    operator,
    pack_gradients,
    unpack_gradients,
    without_autocast,
)
from ._dispatch import resolve_fused

__all__ = ["ssd", "ssd_reference"]

CHUNK_SIZE = 64


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = CHUNK_SIZE,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the output of a state space model whose decay is one number a head and token.

    For each batch item and head, with h_0 = initial_state (zero by default)::

        h_t = exp(dt_t * A) * h_{t-1} + dt_t * x_t B_t^T          (P, N)
        y_t = h_t C_t + D x_t                                     (P,)

    Source: Dao & Gu 2024, arXiv:2405.21060, eq. 16 (the recurrence with scalar times identity)
    and listing 1 (the chunks). Inside a chunk y = (L o C B^T) x, with L_ij the decay from j to i;
    between chunks states are passed on.

    Differentiable in every tensor, the initial and the final state included. Products are in the
    dtype of `x`, as are the states that chunks hand to one another when they are read; decays and
    sums over chunks are float32 (float64 where `x` is). Autocast does not change that. Results are
    deterministic.

    On a GPU that Triton serves, fused kernels keep nothing for the backward but the inputs.
    Anywhere else, and for float64, it is a composition of PyTorch's own ops, which also gives the
    gradients of gradients.

    Args:
        x: (B, L, H, P) input.
        dt: (B, L, H) step size, positive.
        A: (H,), or (B, H), negative in a stable model.
        B: (B, L, N) input matrix, shared by the heads.
        C: shaped as `B`, output matrix.
        D: (H,) skip connection.
        initial_state: (B, H, P, N) state before the token scanned first.
        return_final_state: whether to return the state after the token scanned last, too.
        chunk_size: Q at most in the composition, which shortens chunks where that leaves less
            padding; the kernels have sizes of their own.
        reverse: whether to scan from the last token to the first. Tokens keep their places.
        backend: "triton", "reference" for the composition, or "auto", the first that can serve.

    Returns:
        y: (B, L, H, P) in the dtype of `x`, and, with `return_final_state`, the final state
        (B, H, P, N) in float32 (float64 where `x` is).

    Raises:
        ValueError: shapes that do not fit together; the message says which and what is allowed.
        RuntimeError: `backend` names a backend that cannot serve; the message says why.
    """
    y, state = torch.ops.vim.ssd(x, dt, A, B, C, initial_state, chunk_size, reverse, D, backend)
    return (y, state) if return_final_state else y


@composite("ssd")
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
    reverse: bool,
    D: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check(x, dt, A, B, C, D, initial_state, chunk_size)
    kernels = resolve_fused("ssd", backend, x.device, x.dtype)
    if kernels is None:
        return _composition(x, dt, A, B, C, D, initial_state, chunk_size, reverse)
    y: Tensor | None = None
    states = []
    for first in range(0, B.shape[-1], kernels.MAX_STATES):
        part = slice(first, first + kernels.MAX_STATES)
        start = None if initial_state is None else initial_state[..., part]
        skip = D if first == 0 else None
        y_part, state = torch.ops.vim.ssd_fused(
            x, dt, A, B[..., part], C[..., part], skip, start, reverse
        )
        y = y_part if y is None else y + y_part
        states.append(state)
    return y, states[0] if len(states) == 1 else torch.cat(states, -1)


def _composition(x, dt, A, B, C, D, initial_state, chunk_size, reverse) -> tuple[Tensor, Tensor]:
    if reverse:
        x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
    with without_autocast(x.device):
        y, state = _chunked(x, dt, A, B, C, D, initial_state, chunk_size)
    return (y.flip(1) if reverse else y), state


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final_state) of `ssd` by its equations, one token after another.

    This is the definition that `ssd` is tested against, in the precision of `x` (float32 at
    least).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    batch, length, heads, features = x.shape
    h = x_.new_zeros(batch, heads, features, B.shape[-1])
    if initial_state is not None:
        h = initial_state.to(dtype)
    y = []
    for t in range(length):
        drive = (dt[:, t, :, None] * x_[:, t])[..., None] * B[:, t, None, None, :]
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + drive
        y.append((h * C[:, t, None, None, :]).sum(-1))
    y = torch.stack(y, dim=1)
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x_
    return y.to(x.dtype), h


def _check(x, dt, A, B, C, D, initial_state, chunk_size):
    """Raise where the arguments of `ssd` do not fit together."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x must be (B, L, H, P) with a token at least, got {tuple(x.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    batch, length, heads, features = x.shape
    states = B.shape[-1]
    allowed = {
        "dt": (dt, [(batch, length, heads)]),
        "A": (A, [(heads,), (batch, heads)]),
        "B": (B, [(batch, length, states)]),
        "C": (C, [(batch, length, states)]),
        "D": (D, [(heads,)]),
        "initial_state": (initial_state, [(batch, heads, features, states)]),
    }
    for name, (tensor, shapes) in allowed.items():
        if tensor is None:
            continue
        # Of as many dimensions: a tracer of any size would tie a batch to heads it is compared to.
        if tuple(tensor.shape) not in [shape for shape in shapes if len(shape) == tensor.dim()]:
            says = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must be {says}, got {tuple(tensor.shape)}")


def _chunked(x, dt, A, B, C, D, initial_state, chunk_size) -> tuple[Tensor, Tensor]:
    batch, length, heads, features = x.shape
    states = B.shape[-1]
    dtype, sums = x.dtype, torch.promote_types(x.dtype, torch.float32)
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)
    size = min(-(-size // 8) * 8, max(chunk_size, size))  # tensor cores take multiples of 8
    pad = chunks * size - length  # tokens with dt = 0, which change no state

    dt = dt.to(sums)
    A = A.to(sums).unsqueeze(-2)  # (1, H) or (B, 1, H)
    a = F.pad(dt * A, (0, 0, 0, pad)).unflatten(1, (chunks, size)).transpose(2, 3)  # (B, Z, H, Q)
    skip = None if D is None else D.to(sums).unsqueeze(-1) * x
    x = F.pad((x * dt.unsqueeze(-1)).to(dtype), (0, 0, 0, 0, 0, pad))
    x = x.unflatten(1, (chunks, size))  # (B, Z, Q, H, P)
    B = F.pad(B.to(dtype), (0, 0, 0, pad)).unflatten(1, (chunks, size))  # (B, Z, Q, N)
    C = F.pad(C.to(dtype), (0, 0, 0, pad)).unflatten(1, (chunks, size))

    total = a.cumsum(-1)
    to_end = torch.exp(total[..., -1:] - total).transpose(2, 3).unsqueeze(-1)  # (B, Z, Q, H, 1)
    from_start = torch.exp(total).transpose(2, 3).unsqueeze(-1)

    # Inside the chunks.
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    weights = (decay * (C @ B.mT).unsqueeze(2)).to(dtype)  # (B, Z, H, Q, Q)
    y = (weights @ x.transpose(2, 3)).transpose(2, 3)  # (B, Z, Q, H, P)

    # What each chunk adds to the state, all heads in one product.
    added = B.mT @ (x * to_end).to(dtype).flatten(3)  # (B, Z, N, H P)
    added = added.to(sums).unflatten(3, (heads, features)).permute(0, 3, 1, 4, 2)
    start = added.new_zeros(batch, heads, 1, features, states)
    if initial_state is not None:
        start = initial_state.to(sums).unsqueeze(2)
    added = torch.cat([start, added], dim=2)  # (B, H, Z + 1, P, N)

    # The states before each chunk, and after the last.
    passed = _segment_sums(total[..., -1].transpose(1, 2)).exp()  # (B, H, Z + 1, Z + 1)
    before = (passed @ added.flatten(3)).unflatten(3, (features, states))
    final_state = before[:, :, -1]
    before = before[:, :, :-1].permute(0, 2, 4, 1, 3).flatten(3).to(dtype)  # (B, Z, N, H P)
    y = y + (C @ before).unflatten(3, (heads, features)) * from_start
    y = y.flatten(1, 2)[:, :length]
    return (y if skip is None else y + skip).to(dtype), final_state


def _segment_sums(a: Tensor) -> Tensor:
    """Return sums of a_j ... a_{i-1} at [i, j], -inf where j > i: (..., Z) -> (..., Z + 1, Z + 1).

    Each is summed for itself: differences of long sums would lose the short ones.
    """
    count = a.shape[-1] + 1
    ones = torch.ones(count, count, dtype=torch.bool, device=a.device)
    # Row i of column j adds a_{i-1} where i > j.
    rows = F.pad(a, (1, 0)).unsqueeze(-1).expand(*a.shape[:-1], count, count)
    sums = rows.masked_fill(ones.triu(0), 0).cumsum(-2)
    return sums.masked_fill(ones.triu(1), -torch.inf)


@operator("ssd_fused")
def _ssd_fused(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`ssd` by the kernels, for as many states as they take."""
    kernels = resolve_fused("ssd", "triton", x.device, x.dtype)
    return kernels.forward(x, dt, A, B, C, D, initial_state, reverse)


@_ssd_fused.register_fake
def _(x, dt, A, B, C, D, initial_state, reverse):
    batch, _, heads, features = x.shape
    end = x.new_empty(batch, heads, features, B.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), end


@operator("ssd_fused_bwd")
def _ssd_fused_bwd(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    """Return the gradients of the seven tensors; where a tensor is absent, an empty one."""
    inputs = (x, dt, A, B, C, D, initial_state)
    if dy is None:
        dy = torch.zeros_like(x)
    kernels = resolve_fused("ssd", "triton", x.device, x.dtype)
    return pack_gradients(kernels.backward(dy, dfinal_state, *inputs, reverse), inputs)


@_ssd_fused_bwd.register_fake
def _(dy, dfinal_state, *inputs_and_options):
    return fake_gradients(inputs_and_options[:7])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state):
    if dy is None and dfinal_state is None:
        return (None,) * 8
    inputs = ctx.saved_tensors
    gradients = torch.ops.vim.ssd_fused_bwd(dy, dfinal_state, *inputs, ctx.reverse)
    return *unpack_gradients(gradients, inputs), None


def _autograd_twice(ctx, dy, dfinal_state):
    """The same by the composition, whose gradients have gradients."""

    def composition(*inputs):
        return _composition(*inputs, CHUNK_SIZE, ctx.reverse)

    return *differentiable_gradients(composition, ctx.saved_tensors, (dy, dfinal_state)), None


_ssd_fused.register_autograd(_autograd, setup_context=_setup_context, twice=_autograd_twice)
