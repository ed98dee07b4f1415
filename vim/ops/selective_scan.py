"""The selective scan of Mamba, channels-last: contract, reference and registration.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), G groups of B and C.
"""

from types import SimpleNamespace

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from ._autograd import (
    check_saved,
    fake_gradients,
    needs_grad,
    operator,
    pack_gradients,
    unpack_gradients,
)
from ._dispatch import resolve_backend

__all__ = ["selective_scan", "selective_scan_reference", "selective_state_update"]

torch.fx.wrap("needs_grad")  # symbolic tracing keeps the call, whose answer depends on the tensors


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the output of a selective state space model, scanned over the tokens.

    For each batch item and channel d, with h_0 = initial_state (zero by default)::

        delta_t = softplus(dt_t + dt_bias)            (without softplus: dt_t + dt_bias)
        h_t     = exp(delta_t * A) * h_{t-1} + delta_t * B_t * u_t
        y_t     = (<C_t, h_t> + D * u_t) * silu(z_t)

    Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2 and algorithm 2, with the simplified Euler
    discretisation of B that the authors' code uses.

    Differentiable in every tensor, the initial and the final state included. The state, every sum
    and the softplus are float32 (float64 where `u` is), whatever the dtype of the inputs. Any
    strides are accepted; channels that are contiguous (stride 1 in D) are the fast layout. Nothing
    is mutated and results are deterministic.

    Args:
        u: (B, L, D) input.
        dt: (B, L, D) step size before bias and softplus.
        A: (D, N) real, negative in a stable model.
        B: (B, L, N), or (B, L, G, N) where channels come in G equal groups, input matrix.
        C: shaped as `B`, output matrix.
        D: (D,) skip connection.
        z: (B, L, D) gate before silu.
        dt_bias: (D,) added to `dt`.
        dt_softplus: whether softplus is applied to the step size.
        reverse: whether to scan from the last token to the first. Tokens keep their places:
            this equals flipping every input and the output along L.
        initial_state: (B, D, N) state before the token scanned first.
        return_final_state: whether to return the state after the token scanned last, too.
        backend: "auto" takes the fastest one that can serve; any name of `vim.ops.BACKENDS`
            forces one.

    Returns:
        y: (B, L, D) in the dtype of `u`, and, with `return_final_state`, the final state
        (B, D, N) in float32 (float64 where `u` is).

    Raises:
        ValueError: shapes that do not fit together; the message says which and what is allowed.
        TypeError: a tensor that is not floating point.
        RuntimeError: `backend` names a backend that cannot serve; the message says why.
    """
    y, final_state = scriptable_selective_scan(
        u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, backend
    )
    if return_final_state:
        return y, final_state
    return y


def scriptable_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    dt_softplus: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (y, final_state) of `selective_scan`, in a signature that torch.jit.script takes."""
    save_states = needs_grad([u, dt, A, B, C, D, z, dt_bias, initial_state])
    y, final_state, _ = torch.ops.vim.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states, backend
    )
    return y, final_state


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output of one token and the state after it: `selective_scan` with L = 1.

    Args:
        state: (B, D, N) state before the token; not mutated.
        u, dt, z: (B, D).
        B, C: (B, N) or (B, G, N).
        A, D, dt_bias, dt_softplus, backend: as in `selective_scan`.

    Returns:
        y: (B, D) in the dtype of `u`, and the new state (B, D, N).
    """
    y, state = selective_scan(
        u.unsqueeze(1),
        dt.unsqueeze(1),
        A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        D,
        None if z is None else z.unsqueeze(1),
        dt_bias,
        dt_softplus=dt_softplus,
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    return y.squeeze(1), state


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    reverse: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final_state) of `selective_scan` by its equations, one token after another.

    This is the definition that every backend is tested against: plain PyTorch, differentiable by
    autograd, on any device, in the precision of `u` (float32 at least).
    """
    terms = _Terms(u, dt, A, B, C, dt_bias, dt_softplus)
    h = _initial_state(terms, initial_state)
    y = [u] * u.shape[1]
    for t in _scan_order(u.shape[1], reverse):
        h = terms.decay(t) * h + terms.drive(t)
        y[t] = (h * terms.C_at(t)).sum(-1)
    out = torch.stack(y, 1)
    if D is not None:
        out = out + D.to(terms.dtype) * terms.u
    if z is not None:
        out = out * F.silu(z.to(terms.dtype))
    return out.to(u.dtype), h


class _Terms:
    """The inputs of the recurrence in the precision it is computed in, token by token."""

    def __init__(self, u, dt, A, B, C, dt_bias, dt_softplus):
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.u, self.A = u.to(self.dtype), A.to(self.dtype)
        self.B, self.C = _grouped(B).to(self.dtype), _grouped(C).to(self.dtype)
        self.dt = dt.to(self.dtype)
        if dt_bias is not None:
            self.dt = self.dt + dt_bias.to(self.dtype)
        self.delta = F.softplus(self.dt) if dt_softplus else self.dt

    def decay(self, t: int) -> Tensor:
        return torch.exp(self.delta[:, t, :, None] * self.A)  # (B, D, N)

    def drive(self, t: int) -> Tensor:
        return (self.delta[:, t] * self.u[:, t]).unsqueeze(-1) * self.B_at(t)  # (B, D, N)

    def B_at(self, t: int) -> Tensor:
        return self._per_channel(self.B[:, t])

    def C_at(self, t: int) -> Tensor:
        return self._per_channel(self.C[:, t])

    def _per_channel(self, x: Tensor) -> Tensor:  # (B, G, N) -> (B, D, N)
        return x.repeat_interleave(self.A.shape[0] // x.shape[1], dim=1)


def _grouped(x: Tensor) -> Tensor:
    """(B, L, N) or (B, L, G, N) -> (B, L, G, N)."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _scan_order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def _initial_state(terms: _Terms, initial_state: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state.to(terms.dtype)
    return terms.u.new_zeros(terms.u.shape[0], *terms.A.shape)


def _forward(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states):
    y, state = selective_scan_reference(
        u,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus=dt_softplus,
        reverse=reverse,
        initial_state=initial_state,
    )
    return y.contiguous(), state.contiguous(), state.new_empty(0)


def _backward(
    dy, dstate, u, dt, A, B, C, D, z, dt_bias, initial_state, saved, dt_softplus, reverse
):
    """Gradients of the reference, written out: autograd is off inside an op.

    The states are computed again and kept, (L, B, D, N) in all.
    """
    terms = _Terms(u, dt, A, B, C, dt_bias, dt_softplus)
    states = [_initial_state(terms, initial_state)]
    order = _scan_order(u.shape[1], reverse)
    for t in order:
        states.append(terms.decay(t) * states[-1] + terms.drive(t))

    dy = dy.to(terms.dtype)
    dz = None
    if z is not None:
        z_ = z.to(terms.dtype)
        gate = torch.sigmoid(z_)
        ungated = torch.zeros_like(terms.u)
        for t, h in zip(order, states[1:], strict=True):
            ungated[:, t] = (h * terms.C_at(t)).sum(-1)
        if D is not None:
            ungated += D.to(terms.dtype) * terms.u
        dz = dy * ungated * gate * (1 + z_ * (1 - gate))
        dy = dy * z_ * gate

    groups = terms.B.shape[2]
    du, ddelta = torch.zeros_like(terms.u), torch.zeros_like(terms.u)
    dA = torch.zeros_like(terms.A)
    dB, dC = torch.zeros_like(terms.B), torch.zeros_like(terms.C)
    dh = states[0].new_zeros(states[0].shape) if dstate is None else dstate.to(terms.dtype)
    for t, h, h_next in zip(reversed(order), states[-2::-1], states[:0:-1], strict=True):
        dh = dh + dy[:, t].unsqueeze(-1) * terms.C_at(t)
        dC[:, t] = (dy[:, t].unsqueeze(-1) * h_next).unflatten(1, (groups, -1)).sum(2)
        delta, u_t = terms.delta[:, t], terms.u[:, t]
        dB[:, t] = (dh * (delta * u_t).unsqueeze(-1)).unflatten(1, (groups, -1)).sum(2)
        ddrive = (dh * terms.B_at(t)).sum(-1)
        du[:, t] = ddrive * delta
        dexponent = dh * h * terms.decay(t)
        ddelta[:, t] = ddrive * u_t + (dexponent * terms.A).sum(-1)
        dA += (dexponent * delta.unsqueeze(-1)).sum(0)
        dh = dh * terms.decay(t)

    dD = None
    if D is not None:
        du += dy * D.to(terms.dtype)
        dD = (dy * terms.u).sum((0, 1))
    ddt = ddelta * torch.sigmoid(terms.dt) if dt_softplus else ddelta
    ddt_bias = None if dt_bias is None else ddt.sum((0, 1))
    dinitial = None if initial_state is None else dh
    return du, ddt, dA, dB.view(B.shape), dC.view(C.shape), dD, dz, ddt_bias, dinitial


def _saved_shape(batch: int, length: int, channels: int, state: int) -> tuple[int, ...]:
    return (0,)


_REFERENCE = SimpleNamespace(forward=_forward, backward=_backward, saved_shape=_saved_shape)


def _check(u, dt, A, B, C, D, z, dt_bias, initial_state):
    """Raise where the arguments of `selective_scan` do not fit together."""
    named = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    named["initial_state"] = initial_state
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}")
        if tensor is not None and tensor.device != u.device:
            raise ValueError(f"{name} must be on the device of u, {u.device}, got {tensor.device}")
    if u.dim() != 3:
        raise ValueError(f"u must be (B, L, D), got {tuple(u.shape)}")
    batch, length, channels = u.shape
    if length == 0:
        raise ValueError(f"u must hold at least one token, got (B, L, D) = {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (D, N) = ({channels}, N), got {tuple(A.shape)}")
    state = A.shape[1]

    def expect(name, letters, shape):
        tensor = named[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {letters} = {shape}, got {tuple(tensor.shape)}")

    expect("dt", "(B, L, D)", (batch, length, channels))
    expect("z", "(B, L, D)", (batch, length, channels))
    expect("D", "(D,)", (channels,))
    expect("dt_bias", "(D,)", (channels,))
    expect("initial_state", "(B, D, N)", (batch, channels, state))
    if B.dim() == 4:
        groups = B.shape[2]
        if groups == 0 or channels % groups:
            raise ValueError(
                f"the groups of B must divide the channels of u, got {groups} groups for "
                f"{channels} channels"
            )
        expect("B", "(B, L, G, N)", (batch, length, groups, state))
        expect("C", "the shape of B", tuple(B.shape))
    else:
        expect("B", "(B, L, N) or (B, L, G, N)", (batch, length, state))
        expect("C", "the shape of B", (batch, length, state))


def _resolve(backend: str, u: Tensor):
    return resolve_backend("selective_scan", backend, u.device, u.dtype, _REFERENCE)


@operator("selective_scan")
def _selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    save_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, final_state, saved): with `save_states`, `saved` is what the backward needs."""
    _check(u, dt, A, B, C, D, z, dt_bias, initial_state)
    return _resolve(backend, u).forward(
        u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states
    )


@_selective_scan.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, reverse, save_states, backend):
    _check(u, dt, A, B, C, D, z, dt_bias, initial_state)
    batch, length, channels = u.shape
    state = A.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    shape = (0,)
    if save_states:
        shape = _resolve(backend, u).saved_shape(batch, length, channels, state)
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, channels, state), dtype=dtype),
        u.new_empty(shape, dtype=dtype),
    )


@operator("selective_scan_bwd")
def _selective_scan_bwd(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    saved: Tensor,
    dt_softplus: bool,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of the nine tensors; where a tensor is absent, an empty one."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    backend_ = _resolve(backend, u)
    check_saved([saved], [backend_.saved_shape(*u.shape, A.shape[1])])
    if dy is None:
        dy = torch.zeros_like(u)
    gradients = backend_.backward(dy, dfinal_state, *inputs, saved, dt_softplus, reverse)
    return pack_gradients(gradients, inputs)


@_selective_scan_bwd.register_fake
def _(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, initial_state, saved, *options):
    return fake_gradients((u, dt, A, B, C, D, z, dt_bias, initial_state))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dt_softplus, ctx.reverse, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dfinal_state, dsaved):
    if dy is None and dfinal_state is None:
        return (None,) * 13
    *inputs, saved = ctx.saved_tensors
    gradients = torch.ops.vim.selective_scan_bwd(
        dy, dfinal_state, *inputs, saved, ctx.dt_softplus, ctx.reverse, ctx.backend
    )
    return *unpack_gradients(gradients, inputs), None, None, None, None


_selective_scan.register_autograd(_autograd, setup_context=_setup_context)
