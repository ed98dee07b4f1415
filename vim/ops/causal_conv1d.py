"""The short causal depthwise convolution of Mamba, channels-last.

Size letters: B batch, L tokens, D channels, K width of the kernel (d_conv).
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import fake_gradients, operator, pack_gradients, unpack_gradients
from ._dispatch import resolve_backend

__all__ = ["causal_conv1d", "causal_conv1d_reference", "causal_conv1d_update"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the depthwise convolution of each channel with its past.

    With x_t = initial_state for t < 0 (zero by default)::

        y_t = act(bias + sum_k weight[:, k] * x_{t - (K - 1) + k})

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4 (the convolution before the SSM).

    Differentiable in every tensor, the initial and the final state included. Sums are float32
    (float64 where `x` is). Any strides are accepted; channels that are contiguous are the fast
    layout. Nothing is mutated and results are deterministic.

    Args:
        x: (B, L, D) input.
        weight: (D, K), K at least 1; the CUDA kernels serve up to 16.
        bias: (D,).
        activation: None or "silu".
        reverse: whether the past of a token is what comes after it, as for a scan from the end.
            Tokens keep their places: this equals flipping `x` and the output along L.
        initial_state: (B, K - 1, D) the inputs before the token scanned first, in the order of the
            scan: the last one is its neighbour.
        return_final_state: whether to return the last K - 1 inputs, too, laid out as
            `initial_state`, so that they continue the sequence.
        backend: "auto" takes the fastest one that can serve; any name of `vim.ops.BACKENDS`
            forces one.

    Returns:
        y: (B, L, D) in the dtype of `x`, and, with `return_final_state`, the final state
        (B, K - 1, D) in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit together or an unknown activation.
        TypeError: a tensor that is not floating point.
        RuntimeError: `backend` names a backend that cannot serve; the message says why.
    """
    y, final_state = torch.ops.vim.causal_conv1d(
        x, weight, bias, initial_state, activation, reverse, backend
    )
    if return_final_state:
        return y, final_state
    return y


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output of one token and the state after it: `causal_conv1d` with L = 1.

    Args:
        x: (B, D).
        state: (B, K - 1, D) the inputs before `x`, oldest first; not mutated.
        weight, bias, activation, backend: as in `causal_conv1d`.

    Returns:
        y: (B, D), and the new state (B, K - 1, D).
    """
    y, state = causal_conv1d(
        x.unsqueeze(1),
        weight,
        bias,
        activation=activation,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return y.squeeze(1), state


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final_state) of `causal_conv1d` by its equation, one tap after another.

    This is the definition that every backend is tested against: plain PyTorch, differentiable by
    autograd, on any device, in the precision of `x` (float32 at least).
    """
    pre, padded = _preactivation(x, weight, bias, initial_state, reverse)
    y = F.silu(pre) if activation == "silu" else pre
    past = weight.shape[1] - 1
    final_state = padded[:, :past].flip(1) if reverse else padded[:, x.shape[1] :]
    return y.to(x.dtype), final_state.to(x.dtype)


def _preactivation(x, weight, bias, initial_state, reverse) -> tuple[Tensor, Tensor]:
    """Return the sum before the activation, and the input with its past around it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    parts = (x, initial_state.flip(1)) if reverse else (initial_state, x)
    padded = torch.cat([part.to(dtype) for part in parts], dim=1)
    pre = sum(
        weight[:, k].to(dtype) * padded[:, start : start + length]
        for k, start in enumerate(_starts(width, reverse))
    )
    return (pre if bias is None else pre + bias.to(dtype)), padded


def _starts(width: int, reverse: bool) -> range:
    """Where in the padded input each tap's window begins."""
    return range(width - 1, -1, -1) if reverse else range(width)


def _forward(x, weight, bias, initial_state, activation, reverse):
    y, state = causal_conv1d_reference(
        x, weight, bias, activation=activation, reverse=reverse, initial_state=initial_state
    )
    # An op's outputs are contiguous and share memory with nothing.
    return y.contiguous(), state.clone(memory_format=torch.contiguous_format)


def _backward(dy, dstate, x, weight, bias, initial_state, activation, reverse):
    """Gradients of the reference, written out: autograd is off inside an op."""
    pre, padded = _preactivation(x, weight, bias, initial_state, reverse)
    length, width = x.shape[1], weight.shape[1]
    dpre = dy.to(pre.dtype)
    if activation == "silu":
        gate = torch.sigmoid(pre)
        dpre = dpre * gate * (1 + pre * (1 - gate))
    dpadded = torch.zeros_like(padded)
    dweight = []
    for k, start in enumerate(_starts(width, reverse)):
        window = slice(start, start + length)
        dpadded[:, window] += weight[:, k].to(pre.dtype) * dpre
        dweight.append((dpre * padded[:, window]).sum((0, 1)))
    if dstate is not None:
        if reverse:
            dpadded[:, : width - 1] += dstate.to(pre.dtype).flip(1)
        else:
            dpadded[:, length:] += dstate.to(pre.dtype)
    if reverse:
        dx, dinitial = dpadded[:, :length], dpadded[:, length:].flip(1)
    else:
        dinitial, dx = dpadded[:, : width - 1], dpadded[:, width - 1 :]
    dbias = None if bias is None else dpre.sum((0, 1))
    dx, dinitial = (g.clone(memory_format=torch.contiguous_format) for g in (dx, dinitial))
    return dx, torch.stack(dweight, 1), dbias, None if initial_state is None else dinitial


_REFERENCE = SimpleNamespace(forward=_forward, backward=_backward)


def _check(x, weight, bias, initial_state, activation):
    """Raise where the arguments of `causal_conv1d` do not fit together."""
    named = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (B, L, D) with L at least 1, got {tuple(x.shape)}")
    batch, _, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(f"weight must be (D, K) = ({channels}, K), got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be (D,) = ({channels},), got {tuple(bias.shape)}")
    expected = (batch, weight.shape[1] - 1, channels)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must be (B, K - 1, D) = {expected}, got {tuple(initial_state.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")


def _resolve(backend: str, x: Tensor):
    return resolve_backend("causal_conv1d", backend, x.device, x.dtype, _REFERENCE)


@operator("causal_conv1d")
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, initial_state, activation)
    return _resolve(backend, x).forward(x, weight, bias, initial_state, activation, reverse)


@_causal_conv1d.register_fake
def _(x, weight, bias, initial_state, activation, reverse, backend):
    _check(x, weight, bias, initial_state, activation)
    state_shape = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(state_shape)


@operator("causal_conv1d_bwd")
def _causal_conv1d_bwd(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of the four tensors; where a tensor is absent, an empty one."""
    inputs = (x, weight, bias, initial_state)
    if dy is None:
        dy = torch.zeros_like(x)
    gradients = _resolve(backend, x).backward(dy, dfinal_state, *inputs, activation, reverse)
    return pack_gradients(gradients, inputs)


@_causal_conv1d_bwd.register_fake
def _(dy, dfinal_state, x, weight, bias, initial_state, *options):
    return fake_gradients((x, weight, bias, initial_state))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state):
    if dy is None and dfinal_state is None:
        return (None,) * 7
    inputs = ctx.saved_tensors
    gradients = torch.ops.vim.causal_conv1d_bwd(
        dy, dfinal_state, *inputs, ctx.activation, ctx.reverse, ctx.backend
    )
    return *unpack_gradients(gradients, inputs), None, None, None


_causal_conv1d.register_autograd(_autograd, setup_context=_setup_context)
