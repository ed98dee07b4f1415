"""State space duality by chunks, against its recurrence token by token in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vim.ops import selective_scan_reference, ssd, ssd_reference

CASES = [  # B, L, H, P, N, chunk_size
    (2, 1, 1, 1, 1, 64),
    (1, 7, 2, 3, 5, 64),
    (2, 8, 3, 4, 2, 8),
    (2, 9, 1, 4, 3, 8),
    (1, 63, 2, 4, 3, 16),
    (1, 65, 2, 4, 3, 16),
    (1, 13, 2, 3, 4, 1),
    (2, 197, 3, 8, 16, 64),
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "B{}-L{}-H{}-P{}-N{}-Q{}".format(*c)
)


def make(case, dtype=torch.float64, decay=1.0):
    batch, length, heads, features, states, chunk = case
    x = torch.randn(batch, length, heads, features)
    dt = torch.rand(batch, length, heads)
    A = -decay * torch.rand(heads)
    B, C = torch.randn(2, batch, length, states)
    h = torch.randn(batch, heads, features, states)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    at_least = torch.promote_types(dtype, torch.float32)
    return [x, dt.to(at_least), A.to(at_least), B, C], h.to(at_least), chunk


def gradients(function, inputs, h):
    inputs = [t.detach().double().requires_grad_() for t in (*inputs, h)]
    y, state = function(inputs[:5], inputs[5])
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum() + state.square().sum(), inputs)


@every_case
def test_forward_and_gradients(case):
    inputs, h, chunk = make(case)

    def chunked(tensors, state):
        return ssd(*tensors, initial_state=state, return_final_state=True, chunk_size=chunk)

    def reference(tensors, state):
        return ssd_reference(*tensors, initial_state=state)

    torch.testing.assert_close(chunked(inputs, h), reference(inputs, h))
    torch.testing.assert_close(gradients(chunked, inputs, h), gradients(reference, inputs, h))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(case, dtype):
    """Within products' rounding: weights and states are in the tested dtype when multiplied."""
    inputs, h, chunk = make(case, dtype)
    truth, _ = ssd_reference(*(t.double() for t in inputs), initial_state=h.double())
    y = ssd(*inputs, initial_state=h, chunk_size=chunk)
    assert y.dtype == dtype
    # Every rounded factor stands in a sum of terms whose sizes the same sum without signs gives.
    sizes, _ = ssd_reference(
        *(t.double().abs() if i != 2 else t.double() for i, t in enumerate(inputs)),
        initial_state=h.double().abs(),
    )
    assert ((y.double() - truth).abs() <= 4 * torch.finfo(dtype).eps * sizes + 1e-30).all()


def test_gradcheck():
    inputs, h, _ = make((1, 5, 2, 2, 2, 2))
    tensors = [t.requires_grad_() for t in (*inputs, h)]

    def function(*t):
        return ssd(*t[:5], initial_state=t[5], return_final_state=True, chunk_size=2)

    assert torch.autograd.gradcheck(function, tensors)


def test_is_the_selective_scan_with_one_decay_a_head():
    (x, dt, A, B, C), _, _ = make((2, 11, 3, 4, 5, 4))
    y, _ = selective_scan_reference(
        x.flatten(2),
        dt.repeat_interleave(4, dim=2),
        A.repeat_interleave(4)[:, None].expand(-1, 5),
        B,
        C,
        dt_softplus=False,
    )
    torch.testing.assert_close(ssd(x, dt, A, B, C, chunk_size=4).flatten(2), y)


def test_states_carry_over():
    inputs, _, chunk = make((2, 37, 2, 3, 4, 8))
    whole, final = ssd(*inputs, return_final_state=True, chunk_size=chunk)
    first, state = ssd(
        *(t[:, :13] if t.dim() > 1 else t for t in inputs), return_final_state=True, chunk_size=8
    )
    second, state = ssd(
        *(t[:, 13:] if t.dim() > 1 else t for t in inputs),
        initial_state=state,
        return_final_state=True,
        chunk_size=8,
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, final)


def test_is_causal_and_items_are_independent():
    inputs, _, _ = make((2, 19, 2, 3, 4, 8))
    y = ssd(*inputs, chunk_size=8)
    inputs[0][1, 9] += 1
    differs = (ssd(*inputs, chunk_size=8) != y).any(-1).any(-1)
    assert not differs[0].any()
    assert differs[1].nonzero().flatten().tolist() == list(range(9, 19))


def test_without_decay_it_is_a_cumulative_sum():
    x = torch.randn(1, 21, 2, 3, dtype=torch.float64)
    ones = torch.ones(1, 21, 1, dtype=torch.float64)
    y = ssd(x, torch.ones(1, 21, 2).double(), torch.zeros(2).double(), ones, ones, chunk_size=8)
    torch.testing.assert_close(y, x.cumsum(1))


def test_long_sequences_of_strong_decay_keep_short_sums():
    inputs, _, chunk = make((1, 2048, 1, 2, 2, 32), torch.float32, decay=200.0)
    truth, _ = ssd_reference(*(t.double() for t in inputs))
    allowed = torch.finfo(torch.float32).eps * 32 * 200  # the exponents' sum over one chunk
    y = ssd(*inputs, chunk_size=chunk).double()
    torch.testing.assert_close(y, truth, rtol=allowed, atol=allowed)


def test_autocast_changes_nothing():
    inputs, _, chunk = make((2, 19, 2, 3, 4, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ssd(*inputs, chunk_size=chunk)
    assert torch.equal(ssd(*inputs, chunk_size=chunk), y)


@pytest.mark.parametrize("length", [9, 32], ids="L{}".format)
def test_compile(length):
    inputs, _, chunk = make((2, length, 2, 3, 4, 8), torch.float32)
    compiled = torch.compile(ssd, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, chunk_size=chunk), ssd(*inputs, chunk_size=chunk))


def test_flops():
    batch, length, heads, features, states, size = 2, 32, 3, 4, 5, 8
    inputs, _, _ = make((batch, length, heads, features, states, size))
    with FlopCounterMode(display=False) as counter:
        ssd(*inputs, chunk_size=size)
    inside = 2 * length * size * (states + heads * features)
    states_in_and_out = 2 * 2 * length * states * heads * features
    between = 2 * heads * (length // size + 1) ** 2 * states * features
    assert counter.get_total_flops() == batch * (inside + states_in_and_out + between)


@pytest.mark.parametrize(
    ("name", "index", "shape"),
    [("dt", 1, (2, 7)), ("A", 2, (3,)), ("B", 3, (1, 7, 4)), ("C", 4, (2, 7, 5))],
)
def test_wrong_shapes(name, index, shape):
    inputs, _, _ = make((2, 7, 2, 3, 4, 8))
    inputs[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{name} must be \(.*got \({shape[0]}"):
        ssd(*inputs)


def test_no_tokens_or_chunks():
    inputs, _, _ = make((2, 7, 2, 3, 4, 8))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ssd(*inputs, chunk_size=0)
    with pytest.raises(ValueError, match="a token at least"):
        ssd(inputs[0][:, :0], *inputs[1:])


@every_case
def test_the_other_direction_is_the_flipped_sequence(case):
    (x, dt, A, B, C), h, chunk = make(case)
    options = {"initial_state": h, "return_final_state": True, "chunk_size": chunk}
    y, state = ssd(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), **options)
    torch.testing.assert_close(ssd(x, dt, A, B, C, reverse=True, **options), (y.flip(1), state))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_opcheck(reverse):
    inputs, h, chunk = make((2, 9, 2, 3, 4, 8))
    tensors = [t.requires_grad_() for t in (*inputs, h)]
    torch.library.opcheck(torch.ops.vim.ssd.default, (*tensors, chunk, reverse))
