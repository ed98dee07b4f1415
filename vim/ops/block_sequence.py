"""The ops of blocks that follow one another at inference, for less of the host's time."""

import contextlib
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import without_autocast
from .add_norm import _check as _check_norm
from .add_norm import _residual_dtype
from .add_norm import _resolve as _resolve_norm
from .bidirectional_mixer import BRANCH
from .bidirectional_mixer import _check as _check_mixer
from .bidirectional_mixer import _resolve as _resolve_mixer

__all__ = ["BlockSequence"]


class BlockSequence:
    """`add_norm` and `bidirectional_mixer` of blocks in a row, in one pass without gradients.

    The first block does what the ops do. Those after it that have the same sizes start the same
    kernels with weights of their own, and leave the ops' checks and choices out: the results are
    the same, for less than half of the host's time. `serves` says where this can be.

    Args:
        x: the tokens that the first block gets.
    """

    def __init__(self, x: Tensor) -> None:
        self._repeated = _resolve_mixer("auto", x).Repeated
        self._calls: dict[Hashable, Callable[..., tuple]] = {}
        self._keeps = False

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether a backend that can repeat itself has such tokens, and nobody looks on."""
        looked_on = torch._C._len_torch_dispatch_stack() > 0
        if type(x) is not Tensor or looked_on or torch._C._are_functorch_transforms_active():
            return False
        backends = _resolve_mixer("auto", x), _resolve_norm("auto", x, x.dtype)
        return all(hasattr(backend, "Repeated") for backend in backends)

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

        def function(x, residual, weight, bias):
            _check_norm(x, residual, weight, bias, eps, kind, torch.float32)
            forward = _resolve_norm("auto", x, x.dtype).forward
            dtype = _residual_dtype(x, torch.float32)
            return forward(x, residual, weight, bias, eps, kind, dtype)[:2]

        call = self._call(("add_norm", eps, kind), function, {0: 0, 1: 1})
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
            halves = list(branches[: len(BRANCH)]), list(branches[len(BRANCH) :])
            _check_mixer(xz, *halves)
            forward = _resolve_mixer("auto", xz).forward
            return (forward(xz, *halves, merge_scale, False, transient=True)[0],)

        with _products_as_given(xz):
            call = self._call(("bidirectional_mixer", merge_scale), function, {})
            return call(xz, *forward_branch, *backward_branch)[0]

    def project(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output projection as the op does it, once nobody needs the op's input."""
        with _products_as_given(y):
            return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))

    def _call(self, key: Hashable, function: Callable, in_place: dict[int, int]) -> Callable:
        if key not in self._calls:
            self._calls[key] = self._repeated(function, in_place)
        return self._calls[key]


def _products_as_given(x: Tensor) -> contextlib.AbstractContextManager:
    """Keep autocast away from products, if it is on."""
    mixed = torch.is_autocast_enabled(x.device.type)
    return without_autocast(x.device) if mixed else contextlib.nullcontext()
