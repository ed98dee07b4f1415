"""The ops of blocks that follow one another, for less of the host's time."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autograd import without_autocast
from .add_norm import _check as _check_norm
from .add_norm import _residual_dtype
from .add_norm import _resolve as _resolve_norm
from .bidirectional_mixer import BRANCH, _keeping, _keeps_states, _lends_y, _weight_gradient
from .bidirectional_mixer import _check as _check_mixer
from .bidirectional_mixer import _resolve as _resolve_mixer

__all__ = ["BlockSequence", "TrainingSequence"]


class _Sequence:
    """Calls of what the ops do, which are noted once and repeated: see `Repeated`.

    Args:
        x: the tokens that the first block gets.
    """

    def __init__(self, x: Tensor) -> None:
        self._backend = _resolve_mixer("auto", x)

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether a backend that can repeat itself has such tokens, and nobody looks on."""
        looked_on = torch._C._len_torch_dispatch_stack() > 0
        if type(x) is not Tensor or looked_on or torch._C._are_functorch_transforms_active():
            return False
        backends = _resolve_mixer("auto", x), _resolve_norm("auto", x, x.dtype)
        return all(hasattr(backend, "Repeated") for backend in backends)

    def _call(self, key: Hashable, function: Callable[..., tuple], *tensors, **options) -> tuple:
        """Return function(*tensors), perhaps by repeating it.

        Args:
            key: all that `function` depends on beside the tensors.
            options: of `Repeated`, always the same with a key.
        """
        return _repeated(self._backend.Repeated, key, **options)(function, *tensors)


@functools.lru_cache(maxsize=64)
def _repeated(kind: type, key: Hashable, **options):
    """Return what calls the function of this key; one for all models, since it keeps no tensor."""
    return kind(**options)


class BlockSequence(_Sequence):
    """`add_norm` and `bidirectional_mixer` of blocks in a row, in one pass without gradients.

    The first block does what the ops do. Those after it that have the same sizes, in this pass and
    in later ones, start the same kernels with weights of their own, and leave the ops' checks and
    choices out: the results are the same, for less than half of the host's time. `serves` says
    where this can be.

    Args:
        x: the tokens that the first block gets.
    """

    _keeps = False

    def keep(self) -> None:
        """Leave the tensors that the next `add_norm` takes as they are: somebody may have them."""
        self._keeps = True

    def add_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kind: str,
    ) -> tuple[Tensor, Tensor]:
        """Return what the op does, perhaps in the memory of `x` and of `residual`; see `keep`."""

        def function(*tensors):
            return _add_norm(*tensors, eps, kind)[:2]

        tensors = x, residual, weight, bias
        if self._keeps:
            self._keeps = False
            return function(*tensors)
        return self._call(("add_norm", eps, kind), function, *tensors, in_place=((0, 0), (1, 1)))

    def bidirectional_mixer(
        self,
        xz: Tensor,
        forward_branch: list[Tensor],
        backward_branch: list[Tensor],
        merge_scale: float,
    ) -> Tensor:
        """Return what the op does without an output projection."""

        def function(xz, *branches):
            halves = _halves(branches)
            _check_mixer(xz, *halves)
            return (self._backend.forward(xz, *halves, merge_scale, False, transient=True)[0],)

        key = "bidirectional_mixer", merge_scale
        with _products_as_given(xz):
            return self._call(key, function, xz, *forward_branch, *backward_branch)[0]

    def project(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output projection as the op does it, once nobody needs the op's input."""
        return _project(y, weight, bias)


class TrainingSequence(_Sequence):
    """Blocks in a row with gradients: norm, projections and mixer of each as one step of autograd.

    As in `BlockSequence` the first block does what the ops do, forwards and backwards, and those of
    the same sizes start again what it started: the same results, for less of the host's time. Under
    autocast the gradients of the projections' weights are summed up in the weights' precision.

    Args:
        x: the tokens that the first block gets.
    """

    def block(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: tuple[Tensor, Tensor | None],
        in_proj: tuple[Tensor, Tensor | None],
        forward_branch: list[Tensor],
        backward_branch: list[Tensor],
        out_proj: tuple[Tensor, Tensor | None],
        *,
        eps: float,
        kind: str,
        merge_scale: float,
        keep_states: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return (tokens, stream) after `add_norm`, a projection and `bidirectional_mixer`.

        Args:
            x, residual: as for `add_norm`, with `norm` (weight, bias), `eps` and `kind`.
            in_proj, out_proj: (weight, bias) of the projections before and after the mixer.
            forward_branch, backward_branch, merge_scale, keep_states: as for `bidirectional_mixer`.
        """
        device, dtype = x.device.type, None
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        options = _Options(eps, kind, merge_scale, keep_states, dtype)
        branches = *forward_branch, *backward_branch
        return _Block.apply(self, options, x, residual, *norm, *in_proj, *out_proj, *branches)


class _Options(NamedTuple):
    """What a block in training depends on beside its tensors."""

    eps: float
    kind: str
    merge_scale: float
    keep_states: bool
    dtype: torch.dtype | None
    """In which autocast computes products."""


class _Block(torch.autograd.Function):
    """(sequence, options, x, residual, weight and bias of the norm and of the projections before
    and after the mixer, tensors of both directions) -> (tokens, stream)."""

    @staticmethod
    def forward(ctx, sequence, options, *tensors):
        backend = sequence._backend

        def function(x, residual, weight, bias, in_weight, in_bias, out_weight, out_bias, *rest):
            halves = _halves(rest)
            normed, stream, rstd = _add_norm(x, residual, weight, bias, options.eps, options.kind)
            if options.dtype is not None:
                normed, in_weight, in_bias = (
                    _converted(backend, t, options.dtype) for t in (normed, in_weight, in_bias)
                )
            xz = backend.make(F.linear, normed, in_weight, in_bias)
            _check_mixer(xz, *halves, out_weight, out_bias)
            keeps = _keeps_states(backend, options.keep_states, xz, halves[0])
            lends = {"transient": True} if _lends_y(backend, keeps) else _keeping(keeps)
            y, saved = backend.forward(xz, *halves, options.merge_scale, True, **lends)
            out_weight, out_bias = (_converted(backend, t, y.dtype) for t in (out_weight, out_bias))
            out = backend.make(F.linear, y, out_weight, out_bias)
            return (out, stream, rstd, normed, xz, *saved, *([y] if keeps else []))

        x, residual, *parameters = tensors
        with _products_as_given(x):
            out, stream, *saved = sequence._call(options, function, *tensors, apart=True)
        ctx.save_for_backward(stream, *saved, *parameters)
        ctx.sequence, ctx.options, ctx.x_dtype = sequence, options, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.keeps, ctx.count = len(saved) > 4, len(parameters)
        ctx.set_materialize_grads(False)
        return out, stream

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dstream):
        if dout is None and dstream is None:
            return (None,) * (4 + ctx.count)
        sequence, options, x_dtype = ctx.sequence, ctx.options, ctx.x_dtype
        backend = sequence._backend
        stream, rstd, normed, xz, *saved = ctx.saved_tensors
        saved, parameters = saved[: -ctx.count], saved[-ctx.count :]
        weight, bias, in_weight, in_bias, out_weight, out_bias, *branches = parameters
        has_bias = tuple(t is not None for t in (bias, in_bias, out_bias))

        def mixer_backward(*tensors):
            return _mixer_backward(backend, options, ctx.keeps, has_bias[1:], *tensors)

        def norm_backward(dnormed, *tensors):
            dnormed = _converted(backend, dnormed, x_dtype)
            backward = _resolve_norm("auto", stream, x_dtype).backward
            return backward(dnormed, *tensors, x_dtype, options.kind, has_bias[0])

        key = options, ctx.keeps, has_bias
        with _products_as_given(xz):
            if dout is None:
                dnormed, *gradients = [torch.zeros_like(stream)] + [None] * (4 + len(BRANCH))
            else:
                tensors = dout, normed, xz, in_weight, out_weight, *branches, *saved
                dnormed, *gradients = sequence._call(
                    key, mixer_backward, *tensors, apart=True, late=True
                )
            key = "add_norm", *key, x_dtype
            tensors = dnormed, dstream, stream, rstd, weight
            dx, dresidual, dweight, dbias = sequence._call(key, norm_backward, *tensors, apart=True)
        if ctx.residual_dtype is None:
            dresidual = None
        else:
            dresidual = (dx if dresidual is None else dresidual).to(ctx.residual_dtype)
        gradients, pairs = [dweight, dbias, *gradients[:4]], gradients[4:]
        for direction in (0, 1):
            gradients += [None if pair is None else pair[direction] for pair in pairs]
        gradients = [
            g if g is None or p is None or g.dtype == p.dtype else g.to(p.dtype)
            for g, p in zip(gradients, parameters, strict=True)
        ]
        return None, None, dx, dresidual, *gradients


def _mixer_backward(
    backend,
    options: _Options,
    keeps: bool,
    has_bias: tuple[bool, bool],
    dout: Tensor,
    normed: Tensor,
    xz: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    *rest: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the mixer's input, of weight and bias of its projections, and of each
    of `BRANCH` with a row a direction.

    Args:
        keeps: whether the forward has kept states.
        has_bias: which of the projections have one.
        rest: the tensors of both directions, then what the forward saved.
    """
    halves, saved = _halves(rest[: 2 * len(BRANCH)]), list(rest[2 * len(BRANCH) :])
    rows, dweights = dout.flatten(0, 1), []
    dy = backend.make(torch.matmul, dout, _converted(backend, out_weight, dout.dtype))

    def take_y(y):
        arguments = rows, y.flatten(0, 1), out_weight.dtype
        dweights.append(backend.make(_weight_gradient, *arguments))

    lends = {"take_y": take_y}
    if keeps:
        take_y(saved.pop())
        lends = {}
    dxz, *pairs = backend.backward(dy, xz, *halves, saved, options.merge_scale, **lends)
    columns = dxz.flatten(0, 1)
    arguments = columns, normed.flatten(0, 1), in_weight.dtype
    gradients = [backend.make(_weight_gradient, *arguments)]
    gradients.append(backend.make(torch.sum, columns, 0) if has_bias[0] else None)
    gradients += dweights
    gradients.append(backend.make(torch.sum, rows, 0) if has_bias[1] else None)
    dnormed = backend.make(torch.matmul, dxz, _converted(backend, in_weight, dxz.dtype))
    return dnormed, *gradients, *pairs


def _converted(backend, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return `x` in another precision, in a way that is repeated."""
    return x if x is None or x.dtype == dtype else backend.make(Tensor.to, x, dtype)


def _add_norm(x, residual, weight, bias, eps: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (normed, new_residual, rstd) as the op does."""
    _check_norm(x, residual, weight, bias, eps, kind, torch.float32)
    forward = _resolve_norm("auto", x, x.dtype).forward
    return forward(x, residual, weight, bias, eps, kind, _residual_dtype(x, torch.float32))


def _halves(branches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of each direction."""
    return list(branches[: len(BRANCH)]), list(branches[len(BRANCH) :])


def _project(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the output projection as the op does it."""
    with _products_as_given(y):
        return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))


def _products_as_given(x: Tensor) -> contextlib.AbstractContextManager:
    """Keep autocast away from products, if it is on."""
    mixed = torch.is_autocast_enabled(x.device.type)
    return without_autocast(x.device) if mixed else contextlib.nullcontext()
