"""Mamba-3's scan by chunks, against its recurrence token by token in float64."""

import math

import pytest
import torch

from vim.ops import ssd_reference, ssd_trapezoidal, ssd_trapezoidal_reference

CASES = [  # B, L, H, P, N, chunk_size
    (2, 1, 1, 1, 1, 64),
    (1, 7, 2, 3, 5, 64),
    (2, 8, 3, 4, 2, 8),
    (2, 9, 1, 4, 3, 8),
    (1, 65, 2, 4, 3, 16),
    (1, 13, 2, 3, 4, 1),
    (2, 197, 3, 8, 16, 64),
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "B{}-L{}-H{}-P{}-N{}-Q{}".format(*c)
)


def make(case, dtype=torch.float64):
    batch, length, heads, features, states, chunk = case
    x = torch.randn(batch, length, heads, features)
    dt, A, share = torch.rand(3, batch, length, heads)
    B, C = torch.randn(2, batch, length, heads, states)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    at_least = torch.promote_types(dtype, torch.float32)
    return [x, dt.to(at_least), -A.to(at_least), share.to(at_least), B, C], chunk


def gradients(function, inputs):
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), inputs)


@every_case
def test_forward_and_gradients(case):
    inputs, chunk = make(case)

    def chunked(*inputs):
        return ssd_trapezoidal(*inputs, chunk_size=chunk)

    torch.testing.assert_close(chunked(*inputs), ssd_trapezoidal_reference(*inputs))
    torch.testing.assert_close(
        gradients(chunked, inputs), gradients(ssd_trapezoidal_reference, inputs)
    )


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(case, dtype):
    """Within products' rounding: weights and states are in the tested dtype when multiplied."""
    inputs, chunk = make(case, dtype)
    truth = ssd_trapezoidal_reference(*(t.double() for t in inputs))
    y = ssd_trapezoidal(*inputs, chunk_size=chunk)
    assert y.dtype == dtype
    assert (y - truth).norm() <= 3 * torch.finfo(dtype).eps * truth.norm()


def test_the_whole_share_at_the_end_is_ssd():
    (x, dt, _, _, B, C), _ = make((2, 19, 3, 4, 5, 8))
    A = -torch.rand(3, dtype=torch.float64)
    B, C = B[:, :, :1], C[:, :, :1]
    shared = (tensor.expand(-1, -1, 3, -1) for tensor in (B, C))
    y = ssd_trapezoidal(x, dt, A.expand_as(dt), torch.ones_like(dt), *shared)
    torch.testing.assert_close(y, ssd_reference(x, dt, A, B[:, :, 0], C[:, :, 0])[0])


def test_half_the_share_is_of_second_order():
    """Of an input that changes smoothly, halving the step quarters the error of the state."""

    def error(steps):
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        x = torch.sin(3 * t).view(1, -1, 1, 1)
        ones = torch.ones_like(x)
        dt, A = ones[..., 0] / steps, -2 * ones[..., 0]
        y = ssd_trapezoidal(x, dt, A, 0.5 * ones[..., 0], ones, ones)[0, -1, 0, 0]
        # h' = -2 h + sin(3 t), h(0) = 0
        exact = (2 * math.sin(3) - 3 * math.cos(3) + 3 * math.exp(-2)) / 13
        return abs(y.item() - exact)

    assert error(64) < 0.3 * error(32)
    assert error(128) < 0.3 * error(64)


def test_causality_and_decays_that_vanish():
    (x, dt, A, share, B, C), chunk = make((1, 40, 2, 3, 4, 8))
    A = 1000 * A
    x.requires_grad_()
    y = ssd_trapezoidal(x, dt, A, share, B, C, chunk_size=chunk)
    assert y.isfinite().all()
    (gradient,) = torch.autograd.grad(y[:, 20].sum(), x)
    assert (gradient[:, 21:] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("position", "message"),
    [(1, "dt must be"), (2, "A must be"), (3, "share must be"), (4, "B must be"), (5, "C must be")],
)
def test_shapes_that_do_not_fit(position, message):
    inputs, _ = make((2, 9, 3, 4, 5, 8))
    inputs[position] = inputs[position][:, :-1]
    with pytest.raises(ValueError, match=message):
        ssd_trapezoidal(*inputs)
