"""The ops of blocks that follow one another, for less of the host's time."""

import contextlib
from collections.abc import Callable, Hashable, Sequence

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
    """Functions of tensors that the first block works out, by what they depend on beside tensors.

    Args:
        x: the tokens that the first block gets.
    """

    def __init__(self, x: Tensor) -> None:
        self._repeated = _resolve_mixer("auto", x).Repeated
        self._calls: dict[Hashable, Callable[..., tuple]] = {}

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether a backend that can repeat itself has such tokens, and nobody looks on."""
        looked_on = torch._C._len_torch_dispatch_stack() > 0
        if type(x) is not Tensor or looked_on or torch._C._are_functorch_transforms_active():
            return False
        backends = _resolve_mixer("auto", x), _resolve_norm("auto", x, x.dtype)
        return all(hasattr(backend, "Repeated") for backend in backends)

    def _call(self, key: Hashable, function: Callable, **options) -> Callable[..., tuple]:
        if key not in self._calls:
            self._calls[key] = self._repeated(function, **options)
        return self._calls[key]


class BlockSequence(_Sequence):
    """`add_norm` and `bidirectional_mixer` of blocks in a row, in one pass without gradients.

    The first block does what the ops do. Those after it that have the same sizes start the same
    kernels with weights of their own, and leave the ops' checks and choices out: the results are
    the same, for less than half of the host's time. `serves` says where this can be.

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

        call = self._call(("add_norm", eps, kind), function, in_place={0: 0, 1: 1})
        if self._keeps:
            self._keeps, call = False, function
        return call(x, residual, weight, bias)

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
            forward = _resolve_mixer("auto", xz).forward
            return (forward(xz, *halves, merge_scale, False, transient=True)[0],)

        with _products_as_given(xz):
            call = self._call(("bidirectional_mixer", merge_scale), function)
            return call(xz, *forward_branch, *backward_branch)[0]

    def project(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output projection as the op does it, once nobody needs the op's input."""
        return _project(y, weight, bias)


class TrainingSequence(_Sequence):
    """`add_norm` and `bidirectional_mixer` of blocks in a row, with gradients.

    As in `BlockSequence` the first block does what the ops do, forwards and backwards, and those of
    the same sizes start again what it started: the same results, for less of the host's time.

    Args:
        x: the tokens that the first block gets.
    """

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether that can be, outside of graphs, which have no use for it."""
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        return _Sequence.serves(x) and not capturing

    def add_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kind: str,
    ) -> tuple[Tensor, Tensor]:
        """Return what the op does."""
        return _AddNorm.apply(self, eps, kind, x, residual, weight, bias)

    def bidirectional_mixer(
        self,
        xz: Tensor,
        forward_branch: list[Tensor],
        backward_branch: list[Tensor],
        merge_scale: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        keep_states: bool,
    ) -> Tensor:
        """Return what the op does with an output projection."""
        options = merge_scale, keep_states
        branches = *forward_branch, *backward_branch
        return _Mixer.apply(self, *options, xz, out_weight, out_bias, *branches)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sequence, eps, kind, x, residual, weight, bias):
        def function(*tensors):
            return _add_norm(*tensors, eps, kind)

        call = sequence._call(("add_norm", eps, kind), function, apart=True)
        normed, new_residual, rstd = call(x, residual, weight, bias)
        ctx.save_for_backward(weight, bias, new_residual, rstd)
        ctx.sequence, ctx.kind, ctx.x_dtype = sequence, kind, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return normed, new_residual

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed, dnew_residual):
        if dnormed is None and dnew_residual is None:
            return (None,) * 7
        weight, bias, new_residual, rstd = ctx.saved_tensors
        if dnormed is None:
            dnormed = torch.zeros_like(new_residual)
        kind, x_dtype, has_bias = ctx.kind, ctx.x_dtype, bias is not None

        def function(*tensors):
            backward = _resolve_norm("auto", tensors[2], x_dtype).backward
            return backward(*tensors, x_dtype, kind, has_bias)

        key = "add_norm_bwd", kind, x_dtype, has_bias
        call = ctx.sequence._call(key, function, apart=True)
        dx, dresidual, dweight, dbias = call(dnormed, dnew_residual, new_residual, rstd, weight)
        if ctx.residual_dtype is None:
            dresidual = None
        else:
            dresidual = (dx if dresidual is None else dresidual).to(ctx.residual_dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return None, None, None, dx, dresidual, dweight.to(weight.dtype), dbias


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sequence, merge_scale, keep_states, xz, out_weight, out_bias, *branches):
        def function(xz, *branches):
            halves = _halves(branches)
            _check_mixer(xz, *halves, out_weight, out_bias)
            backend = _resolve_mixer("auto", xz)
            keeps = _keeps_states(backend, keep_states, xz, halves[0])
            lends = {"transient": True} if _lends_y(backend, keeps) else _keeping(keeps)
            y, saved = backend.forward(xz, *halves, merge_scale, True, **lends)
            return (y, *saved)

        with _products_as_given(xz):
            key = "bidirectional_mixer", merge_scale, keep_states
            y, *saved = sequence._call(key, function, apart=True)(xz, *branches)
            ctx.keeps = len(saved) > 1
            if ctx.keeps:
                saved.append(y)
            ctx.save_for_backward(xz, out_weight, out_bias, *branches, *saved)
            ctx.sequence, ctx.merge_scale = sequence, merge_scale
            ctx.set_materialize_grads(False)
            return _project(y, out_weight, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        count = 2 * len(BRANCH)
        if dout is None:
            return (None,) * (6 + count)
        xz, out_weight, out_bias, *rest = ctx.saved_tensors
        branches, saved = rest[:count], rest[count:]
        merge_scale, keeps = ctx.merge_scale, ctx.keeps

        def function(dout, dy, xz, *rest):
            backend = _resolve_mixer("auto", xz)
            halves, saved = _halves(rest[:count]), list(rest[count:])
            rows, dweight = dout.flatten(0, 1), []

            def take_y(y):
                product = backend.make(_weight_gradient, rows, y.flatten(0, 1), out_weight.dtype)
                dweight.append(product)

            if keeps:
                take_y(saved.pop())
                gradients = backend.backward(dy, xz, *halves, saved, merge_scale)
            else:
                gradients = backend.backward(dy, xz, *halves, saved, merge_scale, take_y=take_y)
            return (*dweight, *gradients)

        with _products_as_given(xz):
            dy = torch.matmul(dout, out_weight.to(dout.dtype))
            key = "bidirectional_mixer_bwd", merge_scale, keeps, out_weight.dtype
            call = ctx.sequence._call(key, function, apart=True, late=True)
            dweight, dxz, *pairs = call(dout, dy, xz, *branches, *saved)
            dbias = None if out_bias is None else dout.flatten(0, 1).sum(0).to(out_bias.dtype)
        rows = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        gradients = [g.to(x.dtype) for g, x in zip(rows[0] + rows[1], branches, strict=True)]
        return None, None, None, dxz, dweight.to(out_weight.dtype), dbias, *gradients


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
