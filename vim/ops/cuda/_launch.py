"""Start kernels, and repeat what a function has started for other tensors of the same kind."""

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._compile import Kernel

_ALIGNMENT = 256  # of what a function makes, in bytes
_this_thread = threading.local()  # `.noted`: what `Repeated` lets a function note, while it does


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    *arguments: Tensor | int | float | None,
) -> None:
    """Start `kernel` on PyTorch's current stream of its device; an empty grid starts nothing.

    Works under CUDA graph capture once the kernel has been launched before. The caller sees to it
    that tensors live on the kernel's device and, on side streams, as long as the kernel runs:
    what PyTorch asks of any op.

    Args:
        shared_bytes: dynamic shared memory a block; above 48 KB the limit is raised.
        arguments: eight bytes each; see the docstring of `_compile`.
    """
    if 0 in grid:
        return
    kernel.start(grid, block, shared_bytes, _words(arguments))
    noted = getattr(_this_thread, "noted", None)
    if noted is not None:
        noted.append((functools.partial(kernel.start, grid, block, shared_bytes), arguments))


def _words(arguments: Sequence[Tensor | int | float | None]) -> list[int | float]:
    """Return the eight bytes of each argument."""
    return [
        a
        if a.__class__ is int
        else a.data_ptr()
        if a.__class__ is Tensor
        else 0
        if a is None
        else _word(a)
        for a in arguments
    ]


def _word(argument: Tensor | float | bool) -> int | float:
    """The eight bytes of an argument of a class that `_words` does not look for first."""
    if isinstance(argument, Tensor):  # a subclass, such as a parameter
        return argument.data_ptr()
    return argument if isinstance(argument, float) else int(argument)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Return torch.bmm(a, b); `Repeated` repeats it where both are its function's own tensors."""
    product = torch.bmm(a, b)
    noted = getattr(_this_thread, "noted", None)
    if noted is not None:
        noted.append((torch.bmm, (a, b, product)))
    return product


class _View(NamedTuple):
    """A tensor that a function made, by where it lies in the memory of all that it made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # in bytes

    def of(self, memory: Tensor) -> Tensor:
        typed = memory.view(self.dtype)
        return typed.as_strided(self.shape, self.stride, self.offset // self.dtype.itemsize)


class _Plan(NamedTuple):
    """What `Repeated` does instead of calling its function."""

    size: int
    """Bytes of all that the function makes."""
    steps: list[tuple]
    """(start, words, places): the kernel's arguments, and which of them are (at, argument, offset)
    addresses; or (torch.bmm, views of factors and product, nothing)."""
    results: list[_View | int]
    """Where each is, or the argument whose memory it takes."""


class Repeated:
    """A function of tensors that launches kernels, for many calls with tensors of one kind.

    Where tensors have the shapes, strides, dtypes, device and alignment of those before, what the
    function did for them is started again on the new ones, which takes the host a fraction of the
    function's time. What the function makes is one piece of memory then, which lives as long as a
    result.

    Args:
        function: (tensors or None) -> tuple of tensors, of any values, by `launch` and `bmm` alone.
            What it does may depend on the tensors' kinds only; if something else touches a tensor,
            such as a conversion, nothing is repeated and the function is called each time.
        in_place: by the index of a result, that of the argument whose memory it may take.
    """

    def __init__(self, function: Callable[..., tuple], in_place: Mapping[int, int]) -> None:
        self._function = function
        self._in_place = in_place
        self._kinds: list | None = None  # of what can be repeated
        self._refused: list | None = None  # of what cannot
        self._plan: _Plan | None = None

    def __call__(self, *tensors: Tensor | None) -> tuple:
        kinds = [x if x is None else _kind(x) for x in tensors]
        if kinds != self._kinds:
            if kinds == self._refused:
                return self._function(*tensors)
            return self._first(tensors, kinds)
        size, steps, results = self._plan
        memory = tensors[0].new_empty(size, dtype=torch.uint8)
        addresses = [0 if x is None else x.data_ptr() for x in (*tensors, memory)]
        for start, words, places in steps:
            if start is torch.bmm:
                a, b, product = (view.of(memory) for view in words)
                torch.bmm(a, b, out=product)
                continue
            for at, index, offset in places:
                words[at] = addresses[index] + offset
            start(words)
        return tuple(tensors[x] if type(x) is int else x.of(memory) for x in results)

    def _first(self, tensors: tuple, kinds: list) -> tuple:
        """Call the function, and note what it starts."""
        self._kinds, self._refused = None, kinds
        _this_thread.noted = noted = []
        try:
            results = self._function(*tensors)
        finally:
            _this_thread.noted = None
        plan = _plan(tensors, noted, results, self._in_place)
        if plan is not None:
            self._kinds, self._refused, self._plan = kinds, None, plan
        return results


def _plan(
    tensors: Sequence[Tensor | None],
    noted: Sequence[tuple[Callable, tuple]],
    results: tuple[Tensor, ...],
    in_place: Mapping[int, int],
) -> _Plan | None:
    """Return how to do again what was noted, or None where that would not be the same.

    Args:
        tensors, results: of the function.
        noted: (what was called, its arguments).
        in_place: see `Repeated`.
    """
    touched = [x for _, arguments in noted for x in arguments if isinstance(x, Tensor)]
    spans = sorted((*_span(x), i, 0) for i, x in enumerate(tensors) if x is not None)
    used = {place[0] for place in (_place(x, spans) for x in touched) if place}
    apart = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    if not apart or used != {i for *_, i, _ in spans}:
        return None  # two arguments share memory, or something else has read one
    for result, argument in in_place.items():
        over = tensors[argument]
        if over is None or _kind(over)[:-1] != _kind(results[result])[:-1]:
            return None
        spans.append((*_span(results[result]), argument, 0))

    # What the function made, side by side in one piece of memory, counts as an argument after them.
    own, size = len(tensors), 0
    made = (x.untyped_storage() for x in (*touched, *results) if _place(x, spans) is None)
    for begin, length in dict.fromkeys((x.data_ptr(), x.nbytes()) for x in made):
        spans.append((begin, begin + length, own, size))
        size += -(-length // _ALIGNMENT) * _ALIGNMENT

    def view_of(x: Tensor) -> _View | None:
        index, offset = _place(x, spans)
        return _View(x.shape, x.stride(), x.dtype, offset) if index == own else None

    steps: list[tuple] = []
    for start, arguments in noted:
        if start is torch.bmm:
            steps.append((start, [view_of(x) for x in arguments], []))
            if None in steps[-1][1]:
                return None
        else:
            found = ((at, x) for at, x in enumerate(arguments) if isinstance(x, Tensor))
            places = [(at, *_place(x, spans)) for at, x in found]
            steps.append((start, _words(arguments), places))
    views = [in_place[i] if i in in_place else view_of(x) for i, x in enumerate(results)]
    return None if None in views else _Plan(size, steps, views)


def _kind(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _span(x: Tensor) -> tuple[int, int]:
    """Return where the memory of `x` begins and ends."""
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


def _place(x: Tensor, spans: list[tuple[int, int, int, int]]) -> tuple[int, int] | None:
    """Return in which argument, or the function's own memory after them, `x` begins, and where."""
    for begin, end, index, offset in spans:
        if begin <= x.data_ptr() < end:
            return index, x.data_ptr() - begin + offset
    return None
