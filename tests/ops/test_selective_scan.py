"""The selective scan, on every backend that can serve here, against its definition."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vim.ops import selective_scan, selective_scan_reference, selective_state_update
from vim.ops.selective_scan import scriptable_selective_scan

from .cases import (
    DTYPES,
    LAYOUTS,
    Shape,
    as_float64,
    assert_close_to_truth,
    assert_no_shared_memory,
    check_op,
    on,
    values_and_gradients,
    with_layouts,
)

OP = "selective_scan"
ARGUMENTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
ALONG_TOKENS = ("u", "dt", "B", "C", "z")

SHAPES = [
    Shape(1, 1, 1, N=1),
    Shape(1, 2, 3, N=2),
    Shape(3, 5, 7, N=3),
    Shape(2, 7, 15, N=8),
    Shape(1, 15, 16, N=16),
    Shape(2, 16, 17, N=16),
    Shape(1, 17, 31, N=5),
    Shape(2, 31, 33, N=17),
    Shape(1, 33, 63, N=16),
    Shape(1, 63, 65, N=4),
    Shape(2, 64, 4, N=32),
    Shape(1, 65, 127, N=8),
    Shape(1, 129, 2, N=16),
    Shape(1, 3, 257, N=16),
    Shape(1, 197, 48, N=16),
]

VARIANTS = {
    "bare": {"absent": OPTIONAL},
    "bare_reverse": {"absent": OPTIONAL, "reverse": True},
    "no_softplus": {"absent": OPTIONAL, "dt_softplus": False},
    "D": {"absent": ("z", "dt_bias", "initial_state")},
    "z": {"absent": ("D", "dt_bias", "initial_state")},
    "dt_bias": {"absent": ("D", "z", "initial_state")},
    "dt_bias_no_softplus": {"absent": ("D", "z", "initial_state"), "dt_softplus": False},
    "state": {"absent": ("D", "z", "dt_bias")},
    "state_reverse": {"absent": ("D", "z", "dt_bias"), "reverse": True},
    "full": {},
    "full_reverse": {"reverse": True},
    "one_group": {"G": 1},
    "groups": {"G": 2},
    "groups_reverse": {"G": 3, "reverse": True},
    "group_a_channel": {"G": 6, "absent": ("z",)},
}


DEFAULTS = {"dt_softplus": True, "reverse": False}


def scan(**arguments):
    return selective_scan(**arguments, return_final_state=True)


def make_inputs(shape, dtype=torch.float32, absent=(), dt_softplus=True):
    """Return the tensors of one scan; parameters and the state are float32 at least."""
    B, L, D, N, _, G = shape
    wide = torch.promote_types(dtype, torch.float32)
    matrix = (B, L, N) if G is None else (B, L, G, N)
    inputs = {
        "u": torch.randn(B, L, D),
        "dt": torch.randn(B, L, D) - 3 if dt_softplus else torch.rand(B, L, D) * 0.2,
        "A": -torch.arange(1, N + 1) * (0.5 + torch.rand(D, N)),
        "B": torch.randn(matrix),
        "C": torch.randn(matrix),
        "D": torch.randn(D),
        "z": torch.randn(B, L, D),
        "dt_bias": torch.randn(D) * 0.5 if dt_softplus else torch.rand(D) * 0.1,
        "initial_state": torch.randn(B, D, N),
    }
    return {
        name: None if name in absent else tensor.to(dtype if name in ALONG_TOKENS else wide)
        for name, tensor in inputs.items()
    }


def make_cotangents(shape, dtype=torch.float32):
    B, L, D, N, *_ = shape
    wide = torch.promote_types(dtype, torch.float32)
    return {"y": torch.randn(B, L, D).to(dtype), "final_state": torch.randn(B, D, N, dtype=wide)}


def make_variant(name, shape, dtype=torch.float32):
    """Return the inputs and the options of one of VARIANTS at `shape`."""
    variant = VARIANTS[name]
    options = {k: variant.get(k, default) for k, default in DEFAULTS.items()}
    shape = shape._replace(G=variant.get("G"))
    return make_inputs(shape, dtype, variant.get("absent", ()), options["dt_softplus"]), options


def changed_along_tokens(change, inputs):
    return {k: change(x) if k in ALONG_TOKENS and x is not None else x for k, x in inputs.items()}


class TestAgainstReference:
    """Outputs and every gradient, over backend, dtype, shape, options and layout."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, backend, shape, dtype):
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        check_op(scan, selective_scan_reference, inputs, cotangents, backend)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [Shape(2, 5, 6, N=3), Shape(1, 35, 36, N=16)], ids=str)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_options(self, backend, variant, shape, dtype):
        inputs, options = make_variant(variant, shape, dtype)
        cotangents = make_cotangents(shape, dtype)
        check_op(scan, selective_scan_reference, inputs, cotangents, backend, **options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("variant", ["full", "groups_reverse"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, backend, layout, variant, dtype):
        shape = Shape(3, 19, 12, N=5)
        inputs, options = make_variant(variant, shape, dtype)
        inputs = with_layouts(inputs, layout)
        cotangents = with_layouts(make_cotangents(shape, dtype), layout)
        check_op(scan, selective_scan_reference, inputs, cotangents, backend, **options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("name", "other"),
        [("dt", torch.float32), ("A", None), ("D", None), ("B", torch.float32)],
        ids=["float32_dt", "low_A", "low_D", "float32_B"],
    )
    def test_inputs_of_mixed_dtypes(self, backend, name, other, dtype):
        shape = Shape(2, 9, 12, N=4)
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        inputs[name] = inputs[name].to(other or dtype)
        check_op(scan, selective_scan_reference, inputs, cotangents, backend)

    @pytest.mark.parametrize("unused", ["y", "final_state"])
    def test_gradient_through_one_output(self, backend, unused):
        shape = Shape(2, 7, 12, N=4)
        cotangents = make_cotangents(shape) | {unused: None}
        check_op(scan, selective_scan_reference, make_inputs(shape), cotangents, backend)

    @pytest.mark.parametrize("differentiable", ARGUMENTS)
    def test_gradient_of_one_input(self, backend, differentiable):
        shape = Shape(2, 7, 12, N=4)
        inputs, dy = make_inputs(shape), make_cotangents(shape)["y"]

        def gradient(function, inputs, dy):
            leaf = inputs[differentiable].detach().requires_grad_()
            y = function(**inputs | {differentiable: leaf})[0]
            return torch.autograd.grad(y, leaf, dy)[0]

        def on_backend(**inputs):
            return scan(**inputs, backend=backend.name)

        assert_close_to_truth(
            gradient(on_backend, on(backend.device, inputs), dy.to(backend.device)),
            gradient(selective_scan_reference, as_float64(inputs), dy.double()),
            gradient(selective_scan_reference, inputs, dy),
        )

    def test_without_the_final_state(self, backend):
        inputs = on(backend.device, make_inputs(Shape(2, 7, 12, N=4)))
        y = selective_scan(**inputs, backend=backend.name)
        assert isinstance(y, torch.Tensor)
        assert torch.equal(y, scan(**inputs, backend=backend.name)[0])

    def test_an_empty_batch(self, backend):
        shape = Shape(0, 3, 4, N=2)
        inputs, cotangents = make_inputs(shape), make_cotangents(shape)
        check_op(scan, selective_scan_reference, inputs, cotangents, backend)


@pytest.mark.parametrize("dtype", [torch.float64], ids=["f64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(backend, variant, dtype):
    inputs, options = make_variant(variant, Shape(1, 3, 6, N=2), dtype)
    inputs = on(backend.device, inputs)
    given = {k: x.requires_grad_() for k, x in inputs.items() if x is not None}

    def function(*tensors):
        arguments = inputs | dict(zip(given, tensors, strict=True))
        return scan(**arguments, backend=backend.name, **options)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_out_backward_is_the_derivative_of_the_reference(variant):
    shape = Shape(2, 6, 12, N=3)
    inputs, options = make_variant(variant, shape, torch.float64)
    cotangents = make_cotangents(shape, torch.float64)
    expected = values_and_gradients(selective_scan_reference, inputs, cotangents, **options)
    actual = values_and_gradients(scan, inputs, cotangents, backend="reference", **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


class TestProperties:
    """What holds of a scan whatever its numbers."""

    SHAPE = Shape(2, 37, 12, N=4)

    @pytest.mark.parametrize("length", [1, 16, 36])
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_the_future_does_not_reach_the_past(self, backend, reverse, length):
        inputs = on(backend.device, make_inputs(self.SHAPE))
        L = self.SHAPE.L
        past = torch.arange(L) >= L - length if reverse else torch.arange(L) < length
        past = past.to(backend.device)

        def poison(x):
            keep = past.view(-1, *[1] * (x.dim() - 2))
            return x.where(keep, x.new_full((), math.nan))

        poisoned = changed_along_tokens(poison, inputs)
        options = {"reverse": reverse, "backend": backend.name}
        expected, actual = scan(**inputs, **options)[0], scan(**poisoned, **options)[0]
        assert torch.equal(actual[:, past], expected[:, past])
        assert actual[:, ~past].isnan().all()

    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_the_past_has_no_gradient_from_the_future(self, backend, reverse):
        L = self.SHAPE.L
        dy = torch.randn(2, L, self.SHAPE.D)
        read = slice(20, L) if reverse else slice(0, 17)
        later = slice(0, 20) if reverse else slice(17, L)
        dy[:, later] = 0
        gradients = values_and_gradients(
            scan,
            on(backend.device, make_inputs(self.SHAPE)),
            {"y": dy.to(backend.device), "final_state": None},
            reverse=reverse,
            backend=backend.name,
        )
        for name in ALONG_TOKENS:
            assert not gradients[f"d{name}"][:, later].any(), name
            assert gradients[f"d{name}"][:, read].any(), name

    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_batch_items_are_independent(self, backend, reverse):
        inputs = on(backend.device, make_inputs(Shape(3, 37, 12, N=4)))
        options = {"reverse": reverse, "backend": backend.name}
        expected = scan(**inputs, **options)
        poisoned = dict(inputs)
        for name in (*ALONG_TOKENS, "initial_state"):
            poisoned[name] = inputs[name].clone()
            poisoned[name][0] = poisoned[name][2] = math.nan
        for got, want in zip(scan(**poisoned, **options), expected, strict=True):
            assert torch.equal(got[1], want[1])
            assert got[0].isnan().all()

    def test_channels_are_independent(self, backend):
        inputs = on(backend.device, make_inputs(self.SHAPE))
        expected = scan(**inputs, backend=backend.name)[0]
        inputs["u"] = inputs["u"].clone()
        inputs["u"][..., 5] = math.nan
        actual = scan(**inputs, backend=backend.name)[0]
        others = torch.arange(12, device=backend.device) != 5
        assert torch.equal(actual[..., others], expected[..., others])
        assert actual[..., 5].isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_reverse_is_flip_scan_flip(self, backend, dtype):
        def reverse_scan(**arguments):
            return scan(**arguments, reverse=True)

        def flip_scan_flip(**arguments):
            y, state = selective_scan_reference(
                **changed_along_tokens(lambda x: x.flip(1), arguments)
            )
            return y.flip(1), state

        inputs, cotangents = make_inputs(self.SHAPE, dtype), make_cotangents(self.SHAPE, dtype)
        check_op(reverse_scan, flip_scan_flip, inputs, cotangents, backend)

    @pytest.mark.parametrize("cut", [1, 16, 21, 36])
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_two_parts_with_the_state_carried_are_the_whole(self, backend, reverse, cut):
        def in_two_parts(initial_state, reverse, backend, **inputs):
            ends = [
                changed_along_tokens(lambda x: x[:, :cut], inputs),
                changed_along_tokens(lambda x: x[:, cut:], inputs),
            ]
            parts, state = [], initial_state
            for end in reversed(ends) if reverse else ends:
                y, state = scan(**end, initial_state=state, reverse=reverse, backend=backend)
                parts.append(y)
            return torch.cat(parts[::-1] if reverse else parts, 1), state

        inputs, cotangents = make_inputs(self.SHAPE), make_cotangents(self.SHAPE)
        check_op(
            in_two_parts, selective_scan_reference, inputs, cotangents, backend, reverse=reverse
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_token_by_token_is_the_whole(self, backend, dtype):
        shape = Shape(2, 9, 12, N=4, G=2)

        def token_by_token(u, dt, A, B, C, D, z, dt_bias, initial_state, backend):
            ys, state = [], initial_state
            for t in range(u.shape[1]):
                y, state = selective_state_update(
                    *(state, u[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], dt_bias),
                    backend=backend,
                )
                ys.append(y)
            return torch.stack(ys, 1), state

        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        check_op(token_by_token, selective_scan_reference, inputs, cotangents, backend)

    def test_an_update_leaves_its_state_as_it_is(self, backend):
        inputs = on(backend.device, make_inputs(Shape(2, 1, 12, N=4), absent=("D", "z", "dt_bias")))
        state, before = inputs["initial_state"], inputs["initial_state"].clone()
        u, dt, A, B, C = (inputs[k] for k in ("u", "dt", "A", "B", "C"))
        _, new = selective_state_update(
            state, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], backend=backend.name
        )
        assert torch.equal(state, before)
        assert not torch.equal(new, before)

    def test_linear_in_u(self, backend):
        inputs = make_inputs(self.SHAPE, absent=("initial_state",))
        # Multiples of 1/64, so that their sum is not rounded.
        first, second = torch.randint(-64, 65, (2, *inputs["u"].shape)) / 64
        combined = inputs | {"u": 2 * first - 3 * second}
        y1, h1 = selective_scan_reference(**as_float64(inputs | {"u": first}))
        y2, h2 = selective_scan_reference(**as_float64(inputs | {"u": second}))
        actual = scan(**on(backend.device, combined), backend=backend.name)
        baseline = selective_scan_reference(**combined)
        assert_close_to_truth(actual[0], 2 * y1 - 3 * y2, baseline[0])
        assert_close_to_truth(actual[1], 2 * h1 - 3 * h2, baseline[1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_without_decay_the_state_is_a_cumulative_sum(self, backend, dtype):
        def cumulative_sum(u, dt, A, B, C, **absent):
            drive = (F.softplus(dt) * u).unsqueeze(-1) * B.unsqueeze(2)
            states = drive.cumsum(1)
            return (states * C.unsqueeze(2)).sum(-1), states[:, -1]

        inputs = make_inputs(self.SHAPE, dtype, absent=OPTIONAL)
        inputs["A"] = torch.zeros_like(inputs["A"])
        truth = cumulative_sum(**as_float64(inputs))
        baseline = selective_scan_reference(**inputs)
        actual = scan(**on(backend.device, inputs), backend=backend.name)
        for got, true, base in zip(actual, truth, baseline, strict=True):
            assert_close_to_truth(got, true, base)

    def test_one_token_by_hand(self, backend):
        given = {"u": 2.0, "dt": 0.5, "A": -1.0, "B": 3.0, "C": 4.0, "D": 5.0, "z": 1.5}
        shapes = {"A": (1, 1), "D": (1,)}
        inputs = {k: torch.full(shapes.get(k, (1, 1, 1)), x) for k, x in given.items()}
        inputs["dt_bias"] = torch.tensor([0.25])
        inputs["initial_state"] = torch.full((1, 1, 1), 7.0)
        delta = math.log1p(math.exp(0.75))
        h = math.exp(-delta) * 7 + delta * 3 * 2
        y = (4 * h + 5 * 2) * 1.5 / (1 + math.exp(-1.5))
        got = scan(**on(backend.device, inputs), backend=backend.name)
        assert got[0].item() == pytest.approx(y, rel=1e-6)
        assert got[1].item() == pytest.approx(h, rel=1e-6)

    @pytest.mark.parametrize("groups", [1, 2, 12])
    def test_equal_groups_are_no_groups(self, backend, groups):
        def grouped(B, C, **arguments):
            B, C = (x.unsqueeze(2).expand(-1, -1, groups, -1) for x in (B, C))
            return scan(B=B, C=C, **arguments)

        def ungrouped(**arguments):
            return selective_scan_reference(**arguments)

        inputs, cotangents = make_inputs(self.SHAPE), make_cotangents(self.SHAPE)
        check_op(grouped, ungrouped, inputs, cotangents, backend)

    @pytest.mark.parametrize("groups", [2, 3])
    def test_each_group_is_a_scan_of_its_own(self, backend, groups):
        def apart(u, dt, A, B, C, D, z, dt_bias, initial_state):
            width = u.shape[2] // groups
            results = []
            for g in range(groups):
                own = slice(g * width, (g + 1) * width)
                channels = (u[..., own], dt[..., own], A[own], B[:, :, g], C[:, :, g])
                options = (D[own], z[..., own], dt_bias[own])
                state = initial_state[:, own]
                results.append(selective_scan_reference(*channels, *options, initial_state=state))
            ys, states = zip(*results, strict=True)
            return torch.cat(ys, 2), torch.cat(states, 1)

        shape = self.SHAPE._replace(G=groups)
        check_op(scan, apart, make_inputs(shape), make_cotangents(shape), backend)

    @pytest.mark.parametrize("variant", ["bare", "full", "full_reverse"])
    @pytest.mark.parametrize("length", [1, 7])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_results_have_memory_of_their_own(self, backend, variant, length, dtype):
        shape = Shape(2, length, 12, N=4)
        inputs, options = make_variant(variant, shape, dtype)
        assert_no_shared_memory(scan, inputs, make_cotangents(shape, dtype), backend, **options)

    @pytest.mark.parametrize("variant", ["full", "groups_reverse"])
    def test_deterministic(self, backend, variant):
        shape = Shape(2, 65, 36, N=8)
        inputs, options = make_variant(variant, shape)
        inputs, cotangents = (on(backend.device, x) for x in (inputs, make_cotangents(shape)))
        first, second = (
            values_and_gradients(scan, inputs, cotangents, backend=backend.name, **options)
            for _ in range(2)
        )
        for name in first:
            assert torch.equal(first[name], second[name]), name

    def test_a_second_derivative_is_refused(self, backend):
        inputs = on(backend.device, make_inputs(Shape(1, 3, 4, N=2)))
        inputs["u"].requires_grad_()
        inputs["z"].requires_grad_()
        y, _ = scan(**inputs, backend=backend.name)
        (du,) = torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            du.sum().backward()


def reference_in_chunks(u, dt, A, B, C, D, z, dt_bias, initial_state, *, chunk, reverse=False):
    """Return what the reference does, for one sequence of K * chunk tokens, in `chunk` steps.

    The chunks are batch items, scanned from zero for the states that they end with; these are
    carried over; then every chunk is scanned from the state that it starts with.
    """
    length = u.shape[1]
    along = {"u": u, "dt": dt, "B": B, "C": C, "z": z}
    if reverse:
        along = {k: x.flip(1) for k, x in along.items()}
    along = {k: x.reshape(length // chunk, chunk, -1) for k, x in along.items()}
    given = along | {"A": A, "D": D, "dt_bias": dt_bias}
    _, ends = selective_scan_reference(**given)
    step_sizes = F.softplus(along["dt"].to(A.dtype) + dt_bias).sum(1)
    state, starts = initial_state, []
    for end, decay in zip(ends, torch.exp(step_sizes.unsqueeze(-1) * A), strict=True):
        starts.append(state)
        state = decay * state + end
    y, _ = selective_scan_reference(**given, initial_state=torch.cat(starts))
    y = y.reshape(1, length, -1)
    return y.flip(1) if reverse else y, state


class TestLongSequences:
    """Long enough for every backend to cut L into parts, and for sums to lose precision."""

    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_the_chunked_reference_is_the_reference(self, reverse):
        shape = Shape(1, 60, 6, N=4)
        inputs, cotangents = as_float64(make_inputs(shape)), as_float64(make_cotangents(shape))
        options = {"reverse": reverse}
        whole = values_and_gradients(selective_scan_reference, inputs, cotangents, **options)
        parts = values_and_gradients(
            partial(reference_in_chunks, chunk=12), inputs, cotangents, **options
        )
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("shape", "chunk", "reverse"),
        [
            pytest.param(Shape(1, 6085, 20, N=16), 5, False, id="L6085-forward"),
            pytest.param(Shape(1, 6085, 20, N=16), 5, True, id="L6085-reverse"),
            pytest.param(Shape(1, 100_000, 12, N=8), 125, True, id="L100000-reverse"),
        ],
    )
    def test_against_the_reference(self, backend, shape, chunk, reverse, dtype):
        if backend.name == "reference":
            pytest.skip("the reference takes minutes for so many tokens")
        reference = partial(reference_in_chunks, chunk=chunk)
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        check_op(scan, reference, inputs, cotangents, backend, reverse=reverse)


class TestExtremes:
    """Nothing overflows or becomes NaN that would not in float32 by the definition."""

    @pytest.mark.parametrize("length", [1, 12, 70])
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_step_sizes_and_decays(self, backend, length, reverse):
        steps = torch.tensor([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 50.0])
        decays = -torch.logspace(-4, 4, 9)
        shape = Shape(1, length, len(steps), N=len(decays))
        inputs, cotangents = make_inputs(shape), make_cotangents(shape)
        # Equal steps would repeat one decay's rounding error L times, for better or worse.
        inputs["dt"] = steps * torch.rand(1, length, len(steps)).add_(0.5)
        inputs["A"] = decays.expand(len(steps), -1)
        inputs["dt_bias"] = None
        options = {"dt_softplus": False, "reverse": reverse}
        self.check(inputs, cotangents, backend, **options)

    def test_softplus_far_from_zero(self, backend):
        steps = [-1e4, -104, -88, -50, -20, -1, 0, 1, 19.9, 20, 20.1, 50, 88, 89, 104, 1e4]
        shape = Shape(1, 5, len(steps), N=2)
        inputs, cotangents = make_inputs(shape), make_cotangents(shape)
        inputs["dt"] = torch.tensor(steps).expand(1, 5, -1)
        inputs["dt_bias"] = None
        self.check(inputs, cotangents, backend)

    def test_gate_far_from_zero(self, backend):
        gates = [0, 1e-30, 1, 20, 87, 89, 104, 1e4, 1e30]
        gates = torch.tensor(gates + [-x for x in gates])
        shape = Shape(1, 5, len(gates), N=2)
        inputs, cotangents = make_inputs(shape), make_cotangents(shape)
        inputs["z"] = gates.expand(1, 5, -1)
        inputs["D"], cotangents["y"] = inputs["D"] * 1e-3, cotangents["y"] * 1e-3
        self.check(inputs, cotangents, backend)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("zeros", [*ARGUMENTS, ARGUMENTS], ids=[*ARGUMENTS, "all"])
    def test_zeros(self, backend, zeros, dtype):
        shape = Shape(2, 5, 6, N=3)
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        for name in zeros if isinstance(zeros, tuple) else (zeros,):
            inputs[name] = torch.zeros_like(inputs[name])
        self.check(inputs, cotangents, backend)

    @pytest.mark.parametrize(
        "scales",
        [
            {"u": 1e18, "B": 1e15, "C": 1e-30},
            {"u": 1e-30, "C": 1e30},
            {"u": 1e-20, "B": 1e-20, "C": 1e-20},
            {"initial_state": 1e30, "C": 1e-25},
        ],
        ids=["huge", "tiny_u", "tiny", "huge_state"],
    )
    def test_huge_and_tiny_inputs(self, backend, scales):
        shape = Shape(2, 9, 6, N=3)
        inputs, cotangents = make_inputs(shape, absent=("D",)), make_cotangents(shape)
        cotangents["final_state"] = None
        for name, scale in scales.items():
            inputs[name] = inputs[name] * scale
        self.check(inputs, cotangents, backend)

    def check(self, inputs, cotangents, backend, **options):
        baseline = values_and_gradients(selective_scan_reference, inputs, cotangents, **options)
        for name, tensor in baseline.items():
            assert tensor.isfinite().all(), f"{name} must be finite in float32 for this to test it"
        check_op(scan, selective_scan_reference, inputs, cotangents, backend, **options)


class TestRegistration:
    """What torch.library, torch.compile, torch.export, TorchScript and torch.fx ask of an op."""

    @staticmethod
    def arguments(inputs, options, backend, save_states=True):
        switches = (options["dt_softplus"], options["reverse"], save_states, backend.name)
        return (*on(backend.device, inputs).values(), *switches)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("variant", ["bare", "full", "groups_reverse"])
    def test_opcheck(self, backend, variant):
        inputs, options = make_variant(variant, Shape(2, 3, 6, N=2))
        inputs = {k: None if x is None else x.requires_grad_() for k, x in inputs.items()}
        torch.library.opcheck(
            torch.ops.vim.selective_scan.default, self.arguments(inputs, options, backend)
        )

    @pytest.mark.parametrize("save_states", [False, True], ids=["inference", "training"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("variant", ["bare", "full", "groups_reverse"])
    def test_schema_and_fake_of_forward(self, backend, variant, dtype, layout, save_states):
        inputs, options = make_variant(variant, Shape(2, 3, 6, N=2), dtype)
        torch.library.opcheck(
            torch.ops.vim.selective_scan.default,
            self.arguments(with_layouts(inputs, layout), options, backend, save_states),
            test_utils=("test_schema", "test_faketensor"),
        )

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("variant", ["bare", "full", "groups_reverse"])
    def test_schema_and_fake_of_backward(self, backend, variant, dtype, layout):
        shape = Shape(2, 3, 6, N=2)
        inputs, options = make_variant(variant, shape, dtype)
        arguments = self.arguments(with_layouts(inputs, layout), options, backend)
        *_, saved = torch.ops.vim.selective_scan(*arguments)
        cotangents = on(backend.device, with_layouts(make_cotangents(shape, dtype), layout))
        *tensors, dt_softplus, reverse, _, name = arguments
        for dy, dstate in [
            (cotangents["y"], cotangents["final_state"]),
            (cotangents["y"], None),
            (None, cotangents["final_state"]),
        ]:
            torch.library.opcheck(
                torch.ops.vim.selective_scan_bwd.default,
                (dy, dstate, *tensors, saved, dt_softplus, reverse, name),
                test_utils=("test_schema", "test_faketensor"),
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_meta_tensors(self, dtype):
        inputs = make_inputs(Shape(2, 7, 12, N=4), dtype)
        meta = {k: x.to("meta") for k, x in with_layouts(inputs, "transposed").items()}
        y, state = scan(**meta)
        assert y.is_meta
        assert state.is_meta
        assert (y.shape, y.dtype, y.stride()) == ((2, 7, 12), dtype, (84, 12, 1))
        assert (state.shape, state.dtype) == ((2, 12, 4), torch.float32)
        assert state.stride() == (48, 4, 1)

    @pytest.mark.parametrize("variant", ["full", "groups_reverse"])
    def test_compile(self, backend, variant):
        self.check_compiled(variant, backend, "aot_eager")

    @pytest.mark.slow
    def test_compile_with_inductor(self, backend):
        self.check_compiled("full", backend, "inductor")

    def check_compiled(self, variant, backend, compiler):
        def silu_of_scan(**arguments):
            y, state = scan(**arguments)
            return F.silu(y), state * 2

        torch._dynamo.reset()
        compiled = torch.compile(silu_of_scan, fullgraph=True, backend=compiler, dynamic=True)
        for length in (7, 9):
            shape = Shape(2, length, 12, N=4)
            inputs, options = make_variant(variant, shape)
            inputs, cotangents = (on(backend.device, x) for x in (inputs, make_cotangents(shape)))
            options["backend"] = backend.name
            expected = values_and_gradients(silu_of_scan, inputs, cotangents, **options)
            actual = values_and_gradients(compiled, inputs, cotangents, **options)
            for name in expected:
                torch.testing.assert_close(
                    actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}"
                )

    def test_export(self, backend):
        class Scan(torch.nn.Module):
            def forward(self, u, dt, A, B, C):
                return selective_scan(u, dt, A, B, C, backend=backend.name)

        inputs = on(backend.device, make_inputs(Shape(2, 7, 12, N=4), absent=OPTIONAL))
        arguments = tuple(x for x in inputs.values() if x is not None)
        exported = torch.export.export(Scan(), arguments)
        targets = [node.target for node in exported.graph.nodes]
        assert torch.ops.vim.selective_scan.default in targets
        assert torch.equal(exported.module()(*arguments), Scan()(*arguments))

    @pytest.mark.parametrize("variant", ["bare", "full", "groups_reverse"])
    def test_torchscript(self, backend, variant):
        shape = Shape(2, 7, 12, N=4)
        scripted = torch.jit.script(scriptable_selective_scan)
        inputs, options = make_variant(variant, shape)
        inputs, cotangents = (on(backend.device, x) for x in (inputs, make_cotangents(shape)))
        options["backend"] = backend.name
        expected = values_and_gradients(scan, inputs, cotangents, **options)
        actual = values_and_gradients(scripted, inputs, cotangents, **options)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
        with torch.no_grad():
            assert torch.equal(scripted(**inputs, **options)[0], expected["y"])

    def test_fx_symbolic_trace(self, backend):
        class Scan(torch.nn.Module):
            def forward(self, u, dt, A, B, C, D, z):
                return selective_scan(u, dt, A, B, C, D, z, backend=backend.name) * 2

        shape = Shape(2, 7, 12, N=4)
        inputs = make_inputs(shape, absent=("dt_bias", "initial_state"))
        inputs = {k: x for k, x in on(backend.device, inputs).items() if x is not None}
        cotangents = on(backend.device, {"y": make_cotangents(shape)["y"]})
        traced = torch.fx.symbolic_trace(Scan())
        expected = values_and_gradients(lambda **x: (Scan()(**x),), inputs, cotangents)
        actual = values_and_gradients(lambda **x: (traced(**x),), inputs, cotangents)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


GOOD = Shape(2, 5, 6, N=3)

WRONG_SHAPES = [
    ("u", (5, 6), r"u must be \(B, L, D\), got \(5, 6\)"),
    ("u", (2, 0, 6), r"u must hold at least one token, got \(B, L, D\) = \(2, 0, 6\)"),
    ("dt", (2, 5, 7), r"dt must be \(B, L, D\) = \(2, 5, 6\), got \(2, 5, 7\)"),
    ("dt", (2, 5, 1), r"dt must be \(B, L, D\) = \(2, 5, 6\), got \(2, 5, 1\)"),
    ("A", (3, 6), r"A must be \(D, N\) = \(6, N\), got \(3, 6\)"),
    ("A", (6,), r"A must be \(D, N\) = \(6, N\), got \(6,\)"),
    ("B", (2, 5, 4), r"B must be \(B, L, N\) or .* = \(2, 5, 3\), got \(2, 5, 4\)"),
    ("B", (2, 3), r"B must be \(B, L, N\) or .* = \(2, 5, 3\), got \(2, 3\)"),
    ("B", (2, 5, 4, 3), r"groups of B must divide .*4 groups.* 6 channels"),
    ("B", (2, 5, 0, 3), r"groups of B must divide .*0 groups.* 6 channels"),
    ("B", (2, 4, 2, 3), r"B must be \(B, L, G, N\) = \(2, 5, 2, 3\), got \(2, 4, 2, 3\)"),
    ("B", (2, 5, 2, 3), r"C must be the shape of B = \(2, 5, 2, 3\), got \(2, 5, 3\)"),
    ("C", (2, 3, 5), r"C must be the shape of B = \(2, 5, 3\), got \(2, 3, 5\)"),
    ("C", (2, 5, 2, 3), r"C must be the shape of B = \(2, 5, 3\), got \(2, 5, 2, 3\)"),
    ("D", (6, 1), r"D must be \(D,\) = \(6,\), got \(6, 1\)"),
    ("D", (5,), r"D must be \(D,\) = \(6,\), got \(5,\)"),
    ("z", (2, 6, 5), r"z must be \(B, L, D\) = \(2, 5, 6\), got \(2, 6, 5\)"),
    ("dt_bias", (1,), r"dt_bias must be \(D,\) = \(6,\), got \(1,\)"),
    (
        "initial_state",
        (2, 3, 6),
        r"initial_state must be \(B, D, N\) = \(2, 6, 3\), got \(2, 3, 6\)",
    ),
]


class TestErrors:
    """Every message says what was given and what is allowed."""

    @pytest.mark.parametrize(
        ("name", "shape", "message"), WRONG_SHAPES, ids=[f"{n}{s}" for n, s, _ in WRONG_SHAPES]
    )
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_wrong_shape(self, device, name, shape, message):
        inputs = make_inputs(GOOD) | {name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=message):
            selective_scan(**{k: x.to(device) for k, x in inputs.items()})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_not_floating_point(self, name, dtype):
        inputs = make_inputs(GOOD)
        inputs[name] = inputs[name].to(dtype)
        with pytest.raises(TypeError, match=f"{name} must be a real floating-point .*{dtype}"):
            selective_scan(**inputs)

    @pytest.mark.parametrize("name", ARGUMENTS[1:])
    def test_mixed_devices(self, name):
        inputs = make_inputs(GOOD)
        inputs[name] = inputs[name].to("meta")
        message = f"{name} must be on the device of u, cpu, got meta"
        with pytest.raises(ValueError, match=message):
            selective_scan(**inputs)

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'cudnn'"):
            selective_scan(**make_inputs(GOOD), backend="cudnn")

    def test_named_backend_that_cannot_serve(self):
        message = r"backend 'cuda' cannot serve selective_scan on cpu: .+"
        with pytest.raises(RuntimeError, match=message):
            selective_scan(**make_inputs(GOOD), backend="cuda")

    def test_errors_do_not_depend_on_the_backend(self, backend):
        inputs = on(backend.device, make_inputs(GOOD))
        inputs["dt"] = inputs["dt"][:, :4]
        with pytest.raises(ValueError, match=r"dt must be \(B, L, D\)"):
            selective_scan(**inputs, backend=backend.name)

    def test_misspelt_option(self):
        with pytest.raises(TypeError, match="softplus"):
            selective_scan(**make_inputs(GOOD), softplus=True)
