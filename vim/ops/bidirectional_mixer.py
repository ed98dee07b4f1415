"""What follows the input projection of Vim's mixer, in one op: both convolutions and scans.

Size letters: B batch, L tokens, D channels (d_inner), N state (d_state), R dt_rank, K d_conv, E
features of the tokens.
"""

import torch
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
from ._mixer_composition import MixerComposition
from .causal_conv1d import _REFERENCE as _CONV_REFERENCE
from .causal_conv1d import causal_conv1d_reference
from .selective_scan import _REFERENCE as _SCAN_REFERENCE
from .selective_scan import selective_scan_reference

__all__ = ["bidirectional_mixer", "bidirectional_mixer_reference"]

torch.fx.wrap("needs_grad")  # symbolic tracing keeps the call, whose answer depends on the tensors

BRANCH = ("conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_bias", "A_log", "D")
"""The tensors of one direction, in the order in which the op takes them."""


def bidirectional_mixer(
    xz: Tensor,
    forward_branch: list[Tensor],
    backward_branch: list[Tensor],
    merge_scale: float = 0.5,
    backend: str = "auto",
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    keep_states: bool = False,
) -> Tensor:
    """Return the gated, merged output of a scan in each direction.

    For each direction, the backward one from the last token to the first::

        u        = silu(causal_conv1d(x, conv_weight, conv_bias))
        dt, B, C = u @ x_proj_weight^T, split
        y        = selective_scan(u, dt @ dt_proj_weight^T, -exp(A_log), B, C, D, dt_bias=dt_bias)

    and ``merge_scale * (y_forward + y_backward) * silu(z)``, which `out_weight` projects, if given.

    Source: Zhu et al. 2024, arXiv:2401.09417, algorithm 1, lines 4 to 17.

    Differentiable in every tensor. For the backward, `xz` and the result of x_proj are kept, and on
    backends other than CUDA the states at the starts of chunks, and what `out_weight` projects;
    all else is computed again. State, sums and softplus are float32 (float64 where `xz` is); in
    bf16 on CUDA, what some sums over the states add up is rounded to tf32. The products are in the
    dtype of `xz`, weights of another dtype are cast to it. Results are deterministic.

    Args:
        xz: (B, L, 2 D) result of the input projection: x, then the gate z.
        forward_branch, backward_branch: the tensors of each direction, in the order of `BRANCH`:
            conv_weight (D, K), conv_bias (D,), x_proj_weight (R + 2 N, D), dt_proj_weight (D, R),
            dt_bias (D,), A_log (D, N), D (D,).
        merge_scale: 0.5 for the mean of the two directions, 1 for their sum.
        backend: "auto" takes the fastest one that can serve; any name of `vim.ops.BACKENDS`
            forces one.
        out_weight: (E, D), the output projection: inside the op its input need not be kept.
        out_bias: (E,), added to what `out_weight` gives.
        keep_states: whether the backward may find the states that it needs in memory, u of both
            directions, and the output of the scans before and after its gate, instead of scanning
            forwards again. Faster, for N + 8 bytes more a token and channel; on CUDA, in 16 bits,
            up to 32 states (N rounded up to a power of two). Elsewhere it changes nothing.

    Returns:
        (B, L, D), or (B, L, E) with `out_weight`, in the dtype of `xz`.

    Raises:
        ValueError: shapes that do not fit together; the message says which and what is allowed.
        TypeError: a tensor that is not floating point.
        RuntimeError: `backend` names a backend that cannot serve; the message says why.
    """
    tensors: list[Tensor | None] = [xz]
    for tensor in forward_branch + backward_branch:
        tensors.append(tensor)  # one by one, since TorchScript cannot extend by another type
    tensors += [out_weight, out_bias]
    out, _ = torch.ops.vim.bidirectional_mixer(
        xz,
        forward_branch,
        backward_branch,
        out_weight,
        out_bias,
        merge_scale,
        needs_grad(tensors),
        keep_states,
        backend,
    )
    return out


def bidirectional_mixer_reference(
    xz: Tensor,
    forward_branch: list[Tensor],
    backward_branch: list[Tensor],
    merge_scale: float = 0.5,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
) -> Tensor:
    """Return `bidirectional_mixer` by its equations, from the references of its parts.

    This is the definition that every backend is tested against: plain PyTorch, differentiable by
    autograd, on any device, in the precision of `xz` (float32 at least).
    """
    dtype = torch.promote_types(xz.dtype, torch.float32)
    x, z = xz.to(dtype).chunk(2, dim=-1)
    total = torch.zeros_like(x)
    for branch, reverse in ((forward_branch, False), (backward_branch, True)):
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = (t.to(dtype) for t in branch)
        u, _ = causal_conv1d_reference(
            x, conv_weight, conv_bias, activation="silu", reverse=reverse
        )
        rank, state = dt_proj.shape[1], A_log.shape[1]
        dt, B, C = F.linear(u, x_proj).split([rank, state, state], dim=-1)
        y, _ = selective_scan_reference(
            u, F.linear(dt, dt_proj), -A_log.exp(), B, C, D, None, dt_bias, reverse=reverse
        )
        total = total + y
    y = merge_scale * total * F.silu(z)
    if out_weight is not None:
        y = F.linear(y, out_weight.to(dtype), None if out_bias is None else out_bias.to(dtype))
    return y.to(xz.dtype)


_REFERENCE = MixerComposition(_CONV_REFERENCE, _SCAN_REFERENCE)


def _check(xz, forward_branch, backward_branch, out_weight=None, out_bias=None):
    """Raise where the arguments of `bidirectional_mixer` do not fit together."""
    if not xz.is_floating_point():
        raise TypeError(f"xz must be a real floating-point tensor, got {xz.dtype}")
    if xz.dim() != 3 or xz.shape[1] == 0 or xz.shape[2] == 0 or xz.shape[2] % 2:
        raise ValueError(f"xz must be (B, L, 2 D) with L at least 1, got {tuple(xz.shape)}")
    channels, device = xz.shape[2] // 2, xz.device

    def check(name, tensor, shape):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of xz, {device}, got {tensor.device}")

    for direction, branch in (("forward", forward_branch), ("backward", backward_branch)):
        if len(branch) != len(BRANCH):
            raise ValueError(
                f"{direction}_branch must hold {', '.join(BRANCH)}, got {len(branch)} tensors"
            )
        conv_weight, _, _, dt_proj_weight, _, A_log, _ = branch
        rank, state = dt_proj_weight.shape[-1], A_log.shape[-1]
        expected = (
            (channels, conv_weight.shape[-1]),
            (channels,),
            (rank + 2 * state, channels),
            (channels, rank),
            (channels,),
            (channels, state),
            (channels,),
        )
        for name, tensor, shape in zip(BRANCH, branch, expected, strict=True):
            check(f"{name} of the {direction} branch", tensor, shape)
    if out_weight is not None:
        check("out_weight", out_weight, (out_weight.shape[0], channels))
    elif out_bias is not None:
        raise ValueError("out_bias needs out_weight, got None")
    if out_bias is not None:
        check("out_bias", out_bias, (out_weight.shape[0],))


def _resolve(backend: str, xz: Tensor):
    return resolve_backend("bidirectional_mixer", backend, xz.device, xz.dtype, _REFERENCE)


def _saved_specs(
    backend, xz: Tensor, branch: list[Tensor], out_weight: Tensor | None, keeps: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of all that the op saves, the input of `out_weight` last."""
    specs = backend.saved_specs(xz, branch, **_keeping(keeps))
    if out_weight is not None and not _lends_y(backend, keeps):
        specs = [*specs, (_shape_of_y(xz), xz.dtype)]
    return specs


def _keeps_states(backend, keep_states: bool, xz: Tensor, branch: list[Tensor]) -> bool:
    """Whether a backend's `forward` and `saved_specs` have an argument `keep_states`, for inputs
    such as these, and shall be given it."""
    return keep_states and hasattr(backend, "keeps_states") and backend.keeps_states(xz, branch)


def _keeping(keeps: bool) -> dict[str, bool]:
    return {"keep_states": True} if keeps else {}


def _lends_y(backend, keeps: bool) -> bool:
    """Whether a backend need not keep y: its `forward` has an argument `transient`, for a y that is
    soon let go, and its `backward` an argument `take_y`, which it calls with y made again. Where it
    keeps states it does not make y again."""
    return getattr(backend, "LENDS_Y", False) and not keeps


def _shape_of_y(xz: Tensor) -> tuple[int, ...]:
    return xz.shape[0], xz.shape[1], xz.shape[2] // 2


@operator("bidirectional_mixer")
def _bidirectional_mixer(
    xz: Tensor,
    forward_branch: list[Tensor],
    backward_branch: list[Tensor],
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    merge_scale: float,
    save: bool,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """Return (out, saved): with `save`, `saved` is what the backward needs."""
    _check(xz, forward_branch, backward_branch, out_weight, out_bias)
    backend_ = _resolve(backend, xz)
    keeps = save and _keeps_states(backend_, keep_states, xz, forward_branch)
    with torch.autocast(xz.device.type, enabled=False):  # products are in the dtype of xz
        arguments = (xz, forward_branch, backward_branch, merge_scale, save)
        if out_weight is None:
            return backend_.forward(*arguments, **_keeping(keeps))
        if _lends_y(backend_, keeps):
            y, saved = backend_.forward(*arguments, transient=True)
        else:
            y, saved = backend_.forward(*arguments, **_keeping(keeps))
            saved = [*saved, y] if save else []
        bias = None if out_bias is None else out_bias.to(y.dtype)
        return F.linear(y, out_weight.to(y.dtype), bias), saved


@_bidirectional_mixer.register_fake
def _(
    xz,
    forward_branch,
    backward_branch,
    out_weight,
    out_bias,
    merge_scale,
    save,
    keep_states,
    backend,
):
    _check(xz, forward_branch, backward_branch, out_weight, out_bias)
    shape = _shape_of_y(xz)
    out = xz.new_empty(shape if out_weight is None else (*shape[:2], out_weight.shape[0]))
    if not save:
        return out, []
    backend_ = _resolve(backend, xz)
    keeps = _keeps_states(backend_, keep_states, xz, forward_branch)
    specs = _saved_specs(backend_, xz, forward_branch, out_weight, keeps)
    return out, [xz.new_empty(shape, dtype=dtype) for shape, dtype in specs]


@operator("bidirectional_mixer_bwd")
def _bidirectional_mixer_bwd(
    dout: Tensor,
    xz: Tensor,
    forward_branch: list[Tensor],
    backward_branch: list[Tensor],
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    saved: list[Tensor],
    merge_scale: float,
    keep_states: bool,
    backend: str,
) -> list[Tensor]:
    """Return the gradient of xz, that of each of `BRANCH` with a row a direction, then those of
    `out_weight` and `out_bias`."""
    backend_ = _resolve(backend, xz)
    keeps = _keeps_states(backend_, keep_states, xz, forward_branch)
    specs = _saved_specs(backend_, xz, forward_branch, out_weight, keeps)
    check_saved(saved, [shape for shape, _ in specs])
    inputs = (xz, *forward_branch, out_weight, out_bias)
    with torch.autocast(xz.device.type, enabled=False):
        arguments = (xz, forward_branch, backward_branch)
        if out_weight is None:
            gradients = backend_.backward(dout, *arguments, saved, merge_scale)
            return pack_gradients([*gradients, None, None], inputs)
        dy = torch.matmul(dout, out_weight.to(dout.dtype))
        rows, dweights = dout.flatten(0, 1), []

        def take_y(y):
            dweights.append(_weight_gradient(rows, y.flatten(0, 1), out_weight.dtype))

        if _lends_y(backend_, keeps):
            gradients = backend_.backward(dy, *arguments, saved, merge_scale, take_y=take_y)
        else:
            *saved, y = saved
            take_y(y)
            gradients = backend_.backward(dy, *arguments, saved, merge_scale)
        (dweight,) = dweights
        dbias = None if out_bias is None else rows.sum(0)
    return pack_gradients([*gradients, dweight, dbias], inputs)


def _weight_gradient(dout: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, E), (rows, D) -> (E, D), in the weight's `dtype` at once where cuBLAS can."""
    if torch.version.cuda and y.is_cuda and y.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(dout.mT, y, out_dtype=torch.float32)
    return (y.mT @ dout).mT  # the order of autograd's own


@_bidirectional_mixer_bwd.register_fake
def _(
    dout,
    xz,
    forward_branch,
    backward_branch,
    out_weight,
    out_bias,
    saved,
    merge_scale,
    keep_states,
    backend,
):
    dxz, *others = fake_gradients((xz, out_weight, out_bias))
    return [dxz, *(x.new_empty((2, *x.shape)) for x in forward_branch), *others]


def _setup_context(ctx, inputs, output):
    xz, *branches, out_weight, out_bias, ctx.merge_scale, _, ctx.keep_states, ctx.backend = inputs
    ctx.save_for_backward(xz, *branches[0], *branches[1], out_weight, out_bias, *output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dsaved):
    count = len(BRANCH)
    if dout is None:
        return None, [None] * count, [None] * count, *[None] * 6
    xz, *rest = ctx.saved_tensors
    branches, rest = (rest[:count], rest[count : 2 * count]), rest[2 * count :]
    out_weight, out_bias, *saved = rest
    dxz, *pairs, dweight, dbias = torch.ops.vim.bidirectional_mixer_bwd(
        *(dout, xz, *branches, out_weight, out_bias, saved),
        *(ctx.merge_scale, ctx.keep_states, ctx.backend),
    )
    forward_gradients = [pair[0] for pair in pairs]
    backward_gradients = [pair[1].to(x.dtype) for pair, x in zip(pairs, branches[1], strict=True)]
    out_gradients = unpack_gradients((dweight, dbias), (out_weight, out_bias))
    return dxz, forward_gradients, backward_gradients, *out_gradients, *[None] * 4


_bidirectional_mixer.register_autograd(_autograd, setup_context=_setup_context)
