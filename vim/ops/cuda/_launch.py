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
    if getattr(_this_thread, "noted", None) is not None:
        _note(functools.partial(kernel.start, grid, block, shared_bytes), arguments)


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


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return torch.bmm(a, b), in `out` if given; `Repeated` repeats it."""
    product = torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    _note(torch.bmm, (a, b, product))
    return product


def make(function: Callable[..., Tensor], *arguments) -> Tensor:
    """Return function(*arguments), a tensor in new memory; `Repeated` repeats it."""
    made = function(*arguments)
    _note(function, arguments, made)
    return made


def contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` as kernels read small tensors; as it is if it is so already, which is cheap."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    return make(_converted, x, dtype)


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def differs_each_time() -> None:
    """Have `Repeated` call the function that calls this: it does more than can be repeated."""
    _note(None, ())


def _note(start: Callable | None, arguments: tuple, made: Tensor | None = None) -> None:
    noted = getattr(_this_thread, "noted", None)
    if noted is not None:
        noted.append(_Noted(start, arguments, made))


class _Noted(NamedTuple):
    """A call of a function that `Repeated` watches."""

    start: Callable | None
    """A kernel's start, torch.bmm, what `make` calls, or None: what cannot be repeated."""
    arguments: tuple
    made: Tensor | None = None
    """By `make`."""


class _View(NamedTuple):
    """A tensor by where it lies: in one of the function's arguments, or of the pieces it made."""

    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # in bytes
    whole: bool  # whether it is that argument, or piece, as it is

    def of(self, pieces: Sequence[Tensor]) -> Tensor:
        piece = pieces[self.index]
        if self.whole:
            return piece
        if piece.dtype != self.dtype:
            piece = piece.view(self.dtype)
        offset = piece.storage_offset() + self.offset // self.dtype.itemsize
        return piece.as_strided(self.shape, self.stride, offset)


class _Step(NamedTuple):
    """One thing that a function did."""

    start: Callable
    words: list
    """A kernel's arguments; or of a function of PyTorch's, with tensors as `_View`."""
    places: list[tuple[int, int, int]] | None
    """Which words are addresses of what: (at, argument or piece, offset); None for PyTorch's."""
    lets_go: list[int]
    """What `make` made that nothing needs after it."""


class _Plan(NamedTuple):
    """What `Repeated` does instead of calling its function."""

    pieces: list[tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype of the memory that the function makes."""
    steps: list[_Step]
    results: list[_View | int | None]
    """Where each is; or which argument or piece, or behind those which of what `make` made."""


class Repeated:
    """What a function of tensors launches, again for tensors of the same kinds.

    Where tensors have the shapes, strides, dtypes, device and alignment of those of an earlier
    call, what the function did for them is started again on the new ones, which takes the host a
    fraction of the function's time. What the function makes is one piece of memory then, in which
    tensors that do not live at once may lie in the same place. No tensor is kept between calls, and
    threads may call at once.

    Args:
        in_place: (result, argument) pairs: by the index of a result, that of the argument whose
            memory it may take.
        apart: whether results have memory of their own, for those that outlive the others.
        late: whether to note at the second call what the function does, and not at the first:
            meanwhile all that it makes lives on, and the first step of a backward finds the least
            free memory.
    """

    MOST_KINDS = 32
    """Of so many kinds of tensors, the latest worked out, it is known what to start."""

    def __init__(
        self, in_place: tuple[tuple[int, int], ...] = (), apart: bool = False, late: bool = False
    ) -> None:
        self._in_place = dict(in_place)
        self._apart = apart
        self._late = late
        self._plans: dict[tuple, _Plan | None] = {}  # None of what cannot be repeated
        self._met: set[tuple] = set()  # kinds whose first call was too early to note

    def __call__(self, function: Callable[..., tuple], *tensors: Tensor | None) -> tuple:
        """Return function(*tensors).

        Args:
            function: (tensors or None) -> tuple of tensors, of any values, by `launch`, `bmm` and
                `make` alone; the same at each call. What it does may depend on the tensors' kinds
                only; if something else touches an argument, such as a conversion, nothing is
                repeated and the function is called each time.
        """
        kinds = tuple([x if x is None else _kind(x) for x in tensors])
        try:
            plan = self._plans[kinds]
        except KeyError:
            return self._first(function, tensors, kinds)
        if plan is None:
            return function(*tensors)
        first = next(x for x in tensors if x is not None)
        pieces = [*tensors]
        pieces += [first.new_empty(shape, dtype=dtype) for shape, dtype in plan.pieces]
        addresses = [0 if x is None else x.data_ptr() for x in pieces]
        for start, words, places, lets_go in plan.steps:
            if places is not None:
                words = words.copy()
                for at, index, offset in places:
                    words[at] = addresses[index] + offset
                start(words)
            else:
                given = [x.of(pieces) if type(x) is _View else x for x in words]
                if start is torch.bmm:
                    torch.bmm(*given[:2], out=given[2])
                else:
                    pieces.append(start(*given))
                    addresses.append(pieces[-1].data_ptr())
            for index in lets_go:
                pieces[index] = None
        return tuple(
            [
                pieces[x] if type(x) is int else None if x is None else x.of(pieces)
                for x in plan.results
            ]
        )

    def _first(self, function: Callable[..., tuple], tensors: tuple, kinds: tuple) -> tuple:
        """Call the function, and note what it starts."""
        if self._late and kinds not in self._met:
            if len(self._met) >= self.MOST_KINDS:
                self._met.clear()
            self._met.add(kinds)
            return function(*tensors)
        _this_thread.noted = noted = []
        try:
            results = function(*tensors)
        finally:
            _this_thread.noted = None
        if len(self._plans) >= self.MOST_KINDS:
            oldest, *_ = tuple(self._plans)  # at once, since other threads may add some
            self._plans.pop(oldest, None)
        self._plans[kinds] = _plan(tensors, noted, results, self._in_place, self._apart)
        return results


def _plan(
    tensors: Sequence[Tensor | None],
    noted: Sequence[_Noted],
    results: tuple[Tensor | None, ...],
    in_place: Mapping[int, int],
    apart: bool,
) -> _Plan | None:
    """Return how to do again what was noted, or None where that would not be the same.

    Args:
        tensors, results: of the function.
        noted: what it called.
        in_place, apart: see `Repeated`.
    """
    if any(x.start is None for x in noted):
        return None
    touched = [
        (i, x) for i, call in enumerate(noted) for x in call.arguments if isinstance(x, Tensor)
    ]
    spans = sorted((*_span(x), i, 0) for i, x in enumerate(tensors) if x is not None)
    used = {place[0] for place in (_place(x, spans) for _, x in touched) if place}
    disjoint = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    if not disjoint or used != {i for *_, i, _ in spans}:
        return None  # two arguments share memory, or something else has read one
    for result, argument in in_place.items():
        over = tensors[argument]
        if over is None or _kind(over)[:-1] != _kind(results[result])[:-1]:
            return None
        spans.append((*_span(results[result]), argument, 0))

    # What the function made counts as arguments after the given ones: in one piece of memory, but
    # for results that are to be apart.
    made = [call.made for call in noted if call.made is not None]
    made_spans = [_storage(x) for x in made]
    laid = [x for x in results if x is not None and not any(x is m for m in made)]
    end = len(noted)
    uses: dict[tuple[int, int], list[int]] = {}
    for at, x in (*touched, *((end, x) for x in laid)):
        if _place(x, spans) is None and _storage(x) not in made_spans:
            uses.setdefault(_storage(x), []).append(at)
    lives = {span: (min(at), max(at)) for span, at in uses.items()}
    alone = [span for span, (_, last) in lives.items() if apart and last == end]
    offsets, size = _packed({span: life for span, life in lives.items() if span not in alone})
    spans += [(begin, begin + n, len(tensors), at) for (begin, n), at in offsets.items()]
    pieces: list[tuple[tuple[int, ...], torch.dtype]] = [((size,), torch.uint8)]
    for begin, n in alone:
        spans.append((begin, begin + n, len(tensors) + len(pieces), 0))
        pieces.append(((n,), torch.uint8))
    for k, (begin, n) in enumerate(made_spans):
        spans.append((begin, begin + n, len(tensors) + len(pieces) + k, 0))
    for x in laid:  # as it is where it takes all of its piece
        index = _place(x, spans)[0] - len(tensors)
        if 0 < index < len(pieces) and x.is_contiguous() and x.nbytes == _storage(x)[1]:
            pieces[index] = (tuple(x.shape), x.dtype)

    def view_of(x: Tensor) -> _View | None:
        """Return where `x` is, or None if it cannot be found again."""
        index, offset = _place(x, spans) or (None, 0)
        if index is None or (index < len(tensors) and tensors[index].dtype != x.dtype):
            return None
        if index < len(tensors):
            whole = _kind(tensors[index]) == _kind(x)
        elif index < len(tensors) + len(pieces):
            whole = x.is_contiguous() and pieces[index - len(tensors)] == (tuple(x.shape), x.dtype)
        else:
            whole = _kind(made[index - len(tensors) - len(pieces)]) == _kind(x)
        return _View(index, x.shape, x.stride(), x.dtype, offset, whole and offset == 0)

    last = {_storage(x): at for at, call in enumerate(noted) if (x := call.made) is not None}
    for at, x in (*touched, *((end, x) for x in results if x is not None)):
        last[_storage(x)] = at
    steps: list[_Step] = []
    lost = False
    for at, (start, arguments, product) in enumerate(noted):
        lets_go = [
            len(tensors) + len(pieces) + k for k, span in enumerate(made_spans) if last[span] == at
        ]
        if start is torch.bmm or product is not None:
            words = [view_of(x) if isinstance(x, Tensor) else x for x in arguments]
            pairs = zip(words, arguments, strict=True)
            lost |= any(word is None and x is not None for word, x in pairs)
            places = None
        else:
            words = _words(arguments)
            found = ((i, x) for i, x in enumerate(arguments) if isinstance(x, Tensor))
            places = [(i, *_place(x, spans)) for i, x in found]
        steps.append(_Step(start, words, places, lets_go))

    def result(i: int, x: Tensor | None) -> _View | int | None:
        if x is None or i in in_place:
            return in_place.get(i)
        numbers = [k for k, m in enumerate(made) if m is x]
        if numbers:
            return len(tensors) + len(pieces) + numbers[0]
        view = view_of(x)
        return view.index if view is not None and view.whole else view

    found = [result(i, x) for i, x in enumerate(results)]
    lost |= any(x is not None and f is None for x, f in zip(results, found, strict=True))
    return None if lost else _Plan(pieces, steps, found)


def _packed(
    lives: Mapping[tuple[int, int], tuple[int, int]],
) -> tuple[dict[tuple[int, int], int], int]:
    """Return where in one piece of memory each goes, and its size: the largest first.

    Args:
        lives: of (address, bytes), the first and the last step in which it is used.
    """
    placed: list[tuple[int, int, int, int]] = []  # where, up to where, life
    offsets = {}
    for span, (first, last) in sorted(lives.items(), key=lambda item: -item[0][1]):
        length = -(-span[1] // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for begin, end, born, gone in sorted(placed):
            at_once = first <= gone and born <= last
            if at_once and begin < offset + length and offset < end:
                offset = end
        placed.append((offset, offset + length, first, last))
        offsets[span] = offset
    return offsets, max((end for _, end, *_ in placed), default=0)


def _storage(x: Tensor) -> tuple[int, int]:
    """Return where the memory that `x` is part of begins, and its size."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _kind(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _span(x: Tensor) -> tuple[int, int]:
    """Return where the memory of `x` begins and ends."""
    elements = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


def _place(x: Tensor, spans: list[tuple[int, int, int, int]]) -> tuple[int, int] | None:
    """Return in which argument, or the function's own memory after them, `x` begins, and where."""
    address = x.data_ptr()
    for begin, end, index, offset in spans:
        if begin <= address < end:
            return index, address - begin + offset
    return None
