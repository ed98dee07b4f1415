"""What the tests of the ops share: shapes, layouts, and the one rule of how far is too far."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")

Tensors = dict[str, Tensor | None]


class Shape(NamedTuple):
    """Sizes of one case; `str` of it is a readable id such as B2-L197-D192-N16."""

    B: int
    L: int
    D: int
    N: int | None = None
    K: int | None = None
    G: int | None = None

    def __str__(self) -> str:
        sizes = self._asdict().items()
        return "-".join(f"{letter}{size}" for letter, size in sizes if size is not None)


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Return `tensor` with other strides; "expanded" repeats its first row, so the values change.

    "sliced" is the second half of a wider tensor, as a `chunk` of a projection is. The half before
    it is NaN, and an odd number of features makes its addresses unaligned.
    """
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "sliced":
        return torch.cat([torch.full_like(tensor, math.nan), tensor], -1)[..., tensor.shape[-1] :]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "transposed":
        return tensor if tensor.dim() == 1 else tensor.mT.contiguous().mT
    raise AssertionError(layout)


def with_layouts(tensors: Tensors, layout: str) -> Tensors:
    return {k: None if x is None else with_layout(x, layout) for k, x in tensors.items()}


def on(device: torch.device, tensors: Tensors) -> Tensors:
    """Return `tensors` on `device` with their strides, those of an expanded tensor included."""
    if device.type == "cpu":
        return tensors
    moved: Tensors = {}
    for name, x in tensors.items():
        moved[name] = x
        if x is not None:
            span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            memory = x.as_strided((span,), (1,)).to(device)
            moved[name] = memory.as_strided(x.shape, x.stride())
    return moved


def as_float64(tensors: Tensors) -> Tensors:
    return {k: None if x is None else x.detach().double().contiguous() for k, x in tensors.items()}


def values_and_gradients(
    function: Callable, inputs: Tensors, cotangents: Tensors, **options
) -> dict[str, Tensor]:
    """Return each output of `function` and the gradient "d" + name of each of its inputs.

    Args:
        inputs: by the name of the argument; None is passed on.
        cotangents: the gradient of each output, by the output's name, in the order in which
            `function` returns them; None where the loss does not depend on that output.
    """
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    outputs = dict(zip(cotangents, function(**leaves, **options), strict=True))
    used = [name for name, x in cotangents.items() if x is not None]
    given = [name for name, x in leaves.items() if x is not None]
    gradients = torch.autograd.grad(
        [outputs[name] for name in used],
        [leaves[name] for name in given],
        [cotangents[name] for name in used],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)}
    return {name: x.detach() for name, x in (outputs | named).items()}


def check_op(
    op: Callable, reference: Callable, inputs: Tensors, cotangents: Tensors, backend, **options
) -> None:
    """Assert that `op` on `backend` gives the outputs and every gradient of `reference`."""
    truth = values_and_gradients(reference, as_float64(inputs), as_float64(cotangents), **options)
    baseline = values_and_gradients(reference, inputs, cotangents, **options)
    inputs, cotangents = on(backend.device, inputs), on(backend.device, cotangents)
    actual = values_and_gradients(op, inputs, cotangents, backend=backend.name, **options)
    assert_close_to_truth(actual, truth, baseline)


FACTOR = 3
ROUNDING_ULPS = 2
ORDER_ULPS = 8


def assert_close_to_truth(
    actual: Tensor | Mapping[str, Tensor],
    truth: Tensor | Mapping[str, Tensor],
    baseline: Tensor | Mapping[str, Tensor],
) -> None:
    """Assert that `actual` is as near to the truth as float32 arithmetic comes, tensor by tensor.

    Args:
        truth: the reference in float64 on the inputs as rounded to the tested dtype.
        baseline: the same reference with float32 state, rounded to the output's dtype; `actual`
            must have its dtype and shape.

    The allowance for an element is FACTOR times the largest error of the baseline, and a few ulps,
    since the baseline can be right by luck: ROUNDING_ULPS of the element in the output's dtype, and
    ORDER_ULPS of the largest element in float32, for sums taken in another order. The same holds of
    the root mean square over the tensor, which sees small errors everywhere. Where float32
    overflows, `actual` must be what the baseline is.
    """
    if isinstance(actual, Tensor):
        actual, truth, baseline = {"result": actual}, {"result": truth}, {"result": baseline}
    assert list(actual) == list(truth) == list(baseline)
    complaints = [_complaint(name, actual[name], truth[name], baseline[name]) for name in actual]
    complaints = [complaint for complaint in complaints if complaint]
    assert not complaints, "\n".join(complaints)


def _complaint(name: str, actual: Tensor, truth: Tensor, baseline: Tensor) -> str | None:
    """Return what is wrong with one tensor, or None."""
    if actual.dtype != baseline.dtype or actual.shape != baseline.shape:
        return (
            f"{name} must be {baseline.dtype} {tuple(baseline.shape)}, "
            f"got {actual.dtype} {tuple(actual.shape)}"
        )
    dtype = actual.dtype
    actual, truth, baseline = (x.detach().cpu().double() for x in (actual, truth, baseline))
    finite = baseline.isfinite()
    same = (actual == baseline) | (actual.isnan() & baseline.isnan())
    if not (same | finite).all():
        return f"{name} must overflow exactly where float32 arithmetic does"
    if not actual[finite].isfinite().all():
        count = int((~actual[finite].isfinite()).sum())
        return f"{name} has {count} of {actual.numel()} elements that should be finite and are not"
    if not finite.any():
        return None
    zero = truth.new_zeros(())
    truth = truth.where(finite, zero)
    error = (actual.where(finite, zero) - truth).abs()
    baseline_error = (baseline.where(finite, zero) - truth).abs()
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    # Hardware may flush subnormal float32 to zero; float16 keeps its subnormals, one step apart.
    step = torch.finfo(torch.float32).smallest_normal
    step += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    ulps = ROUNDING_ULPS * torch.finfo(dtype).eps * truth.abs()
    ulps += ORDER_ULPS * torch.finfo(precision).eps * truth.abs().max() + step
    excess = error - (FACTOR * baseline_error.max() + ulps)
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        return (
            f"{name} is too far from the truth in {int((excess > 0).sum())} of {truth.numel()} "
            f"elements, most at {index}: got {actual.flatten()[worst]:.9g}, "
            f"truth {truth.flatten()[worst]:.9g}, error {error.flatten()[worst]:.3g}; "
            f"the baseline's largest error is {baseline_error.max():.3g}"
        )
    rms, allowed = _rms(error), FACTOR * _rms(baseline_error) + _rms(ulps)
    if rms > allowed:
        return (
            f"{name} is too far from the truth all over: root mean square error {rms:.3g}, "
            f"allowed {allowed:.3g}, the baseline's {_rms(baseline_error):.3g}"
        )
    return None


def _rms(x: Tensor) -> float:
    scale = x.max()  # keeps squares in range
    return float((x / scale).square().mean().sqrt() * scale) if scale > 0 else 0.0


def assert_no_shared_memory(
    op: Callable, inputs: Tensors, cotangents: Tensors, backend, **options
) -> None:
    """Assert that writing into an output or a gradient of `op` changes no other tensor."""
    inputs, cotangents = on(backend.device, inputs), on(backend.device, cotangents)
    results = values_and_gradients(op, inputs, cotangents, backend=backend.name, **options)
    named = inputs | {f"cotangent of {k}": x for k, x in cotangents.items()} | results
    owners: dict[int, str] = {}
    for name, x in named.items():
        if x is None or x.numel() == 0:
            continue
        owner = owners.setdefault(x.untyped_storage().data_ptr(), name)
        assert owner == name, f"{name} shares its memory with {owner}"
