"""How the ops are registered with PyTorch, and what they share in tying a backward to autograd.

An op can return tensors but not None, so an absent input has an empty gradient inside the op.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("vim", "FRAGMENT")


class Operator:
    """An op of `torch.ops.vim`: what `torch.library.custom_op` makes, but cheaper.

    A call that autograd follows costs 20 us here and 80 to 140 there (torch 2.14), as much as three
    kernels take, because the arguments are walked once instead of many times.

    Args:
        implementation: the op, with annotations that give its schema; lists of tensors are allowed
            among its arguments and its results. No result may share memory with another tensor.
    """

    def __init__(self, name: str, implementation: Callable) -> None:
        schema = torch.library.infer_schema(implementation, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        self.name = f"vim::{name}"
        self._overload = getattr(torch.ops.vim, name).default

    def register_fake(self, fake: Callable) -> None:
        """Say which tensors the op returns, without values."""
        torch.library.register_fake(self.name, fake, lib=_LIBRARY)

    def register_autograd(
        self, backward: Callable, *, setup_context: Callable, twice: Callable | None = None
    ) -> None:
        """Tie a backward to the op, as `torch.library.register_autograd` does.

        Args:
            backward: (ctx, *gradients of the results) -> gradients of the arguments.
            setup_context: (ctx, arguments, results) -> None.
            twice: as `backward`, but differentiable; it serves where someone may differentiate the
                gradients (`create_graph`), which raises without it.
        """
        overload = self._overload
        below_autograd = torch._C._after_autograd_keyset

        class Tied(torch.autograd.Function):
            @staticmethod
            def forward(ctx, keyset, sizes, result_sizes, *flat):
                arguments = _unflatten(flat, sizes)
                with torch._C._AutoDispatchBelowAutograd():
                    results = overload.redispatch(keyset & below_autograd, *arguments)
                setup_context(ctx, arguments, results)
                flat_results, found = _flatten(_as_tuple(results))
                result_sizes += found
                ctx.result_sizes = found
                return tuple(flat_results)

            @staticmethod
            def backward(ctx, *flat):
                results = _unflatten(flat, ctx.result_sizes)
                if twice is not None and torch.is_grad_enabled():
                    return None, None, None, *_flatten(twice(ctx, *results))[0]
                with torch.no_grad():
                    gradients = backward(ctx, *results)
                flat_gradients, _ = _flatten(gradients)
                if torch.is_grad_enabled():  # create_graph: someone may differentiate these
                    flat_gradients = _undifferentiable(flat_gradients, self.name)
                return None, None, None, *flat_gradients

        def differentiable(keyset, *arguments):
            flat, sizes = _flatten(arguments)
            if torch.is_grad_enabled() and any(
                isinstance(x, Tensor) and x.requires_grad for x in flat
            ):
                result_sizes: list[int | None] = []
                flat = Tied.apply(keyset, sizes, result_sizes, *flat)
                results = _unflatten(flat, result_sizes)
                return results if len(results) > 1 else results[0]
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & below_autograd, *arguments)

        _LIBRARY.impl(self._overload, differentiable, "Autograd", with_keyset=True)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Return a decorator that makes an `Operator` of a function."""
    return lambda implementation: Operator(name, implementation)


def composite(name: str) -> Callable[[Callable], Callable]:
    """Return a decorator that makes an op of `torch.ops.vim` of a function of PyTorch's own ops.

    Autograd, compilers and counters see the ops inside; `torch.jit.script` and `torch.fx` keep the
    call, so that a model can be saved whose function they could not follow. Like the other ops it
    is there once `vim` is imported, which a program that loads the saved model must do.
    """

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
        return function

    return register


def differentiable_gradients(
    function: Callable,
    inputs: Sequence[Tensor | None],
    output_gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return gradients of `function(*inputs)`, a composition of PyTorch's ops, that have gradients.

    Args:
        output_gradients: one for each result, None where the loss does not depend on it.
    """
    # One tensor may stand for several inputs, each of which has a gradient.
    inputs = [None if x is None else x.view_as(x) for x in inputs]
    results = _as_tuple(function(*inputs))
    used = [(y, g) for y, g in zip(results, output_gradients, strict=True) if g is not None]
    asked = [x is not None and x.requires_grad for x in inputs]
    gradients = iter(
        torch.autograd.grad(
            [y for y, _ in used],
            [x for x, wanted in zip(inputs, asked, strict=True) if wanted],
            [g for _, g in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(gradients) if wanted else None for wanted in asked]


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Keep the dtypes that a composition of PyTorch's ops chooses."""
    if device.type == "meta":  # which has no autocast
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _undifferentiable(gradients: list[Tensor | None], name: str) -> list[Tensor | None]:
    """Return `gradients` such that differentiating them raises: they are no constants."""
    message = f"{name} cannot be differentiated twice: its backward has no derivative"
    refuse = torch._C._functions.DelayedError(message.encode(), len(gradients))
    return list(refuse(*(g if g is None else g.detach().requires_grad_() for g in gradients)))


def _as_tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def _flatten(values: Iterable) -> tuple[list, list[int | None]]:
    """Return the values with lists laid end to end, and the lists' lengths; None for no list."""
    flat, sizes = [], []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat += value
            sizes.append(len(value))
        else:
            flat.append(value)
            sizes.append(None)
    return flat, sizes


def _unflatten(flat: Sequence, sizes: Sequence[int | None]) -> tuple:
    """Undo `_flatten`."""
    values = iter(flat)
    return tuple(
        next(values) if size is None else [next(values) for _ in range(size)] for size in sizes
    )


def needs_grad(tensors: list[Tensor | None]) -> bool:
    """Whether autograd will ask for a gradient of any of `tensors`."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110, since TorchScript has no generator expressions
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def check_saved(saved: Sequence[Tensor], expected: Sequence[Sequence[int]]) -> None:
    """Raise where a forward did not save what the backward's backend will read."""
    given = [tuple(tensor.shape) for tensor in saved]
    if given != [tuple(shape) for shape in expected]:
        raise RuntimeError(
            f"the forward saved tensors of shapes {given}, this backend's backward needs "
            f"{list(expected)}: let one backend serve both (VIM_BACKEND must not change in "
            "between), and have the forward save states"
        )


def pack_gradients(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return each gradient contiguous and in its input's dtype, empty where that is absent."""
    device = next(x.device for x in inputs if x is not None)
    return [
        torch.empty(0, device=device) if x is None else g.to(x.dtype).contiguous()
        for g, x in zip(gradients, inputs, strict=True)
    ]


def fake_gradients(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return what `pack_gradients` returns, without values."""
    device = next(x.device for x in inputs if x is not None)
    return [torch.empty(0, device=device) if x is None else x.new_empty(x.shape) for x in inputs]


def unpack_gradients(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Undo `pack_gradients`' stand-ins: None where the input is absent."""
    return [None if x is None else g for g, x in zip(gradients, inputs, strict=True)]
