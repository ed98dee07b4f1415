"""The causal convolution, on every backend that can serve here, against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from vim.ops import causal_conv1d, causal_conv1d_reference, causal_conv1d_update

from .cases import (
    DTYPES,
    LAYOUTS,
    Shape,
    assert_no_shared_memory,
    check_op,
    on,
    values_and_gradients,
    with_layouts,
)

OP = "causal_conv1d"
ARGUMENTS = ("x", "weight", "bias", "initial_state")
OPTIONAL = ("bias", "initial_state")
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])

SHAPES = [
    Shape(1, 1, 1, K=2),
    Shape(2, 1, 7, K=4),
    Shape(1, 2, 15, K=4),
    Shape(3, 3, 16, K=4),
    Shape(2, 4, 17, K=4),
    Shape(1, 15, 31, K=3),
    Shape(2, 16, 33, K=4),
    Shape(1, 17, 63, K=4),
    Shape(2, 31, 65, K=2),
    Shape(1, 33, 127, K=4),
    Shape(1, 63, 129, K=4),
    Shape(1, 65, 3, K=4),
    Shape(1, 129, 2, K=4),
    Shape(1, 257, 1, K=3),
    Shape(1, 5, 257, K=4),
    Shape(1, 197, 96, K=4),
]


def conv(**arguments):
    return causal_conv1d(**arguments, return_final_state=True)


def make_inputs(shape, dtype=torch.float32, absent=()):
    """Return the tensors of one convolution; parameters are float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": torch.randn(shape.B, shape.L, shape.D).to(dtype),
        "weight": torch.randn(shape.D, shape.K, dtype=wide),
        "bias": torch.randn(shape.D, dtype=wide),
        "initial_state": torch.randn(shape.B, shape.K - 1, shape.D).to(dtype),
    }
    return {name: None if name in absent else inputs[name] for name in ARGUMENTS}


def make_cotangents(shape, dtype=torch.float32):
    return {
        "y": torch.randn(shape.B, shape.L, shape.D).to(dtype),
        "final_state": torch.randn(shape.B, shape.K - 1, shape.D).to(dtype),
    }


class TestAgainstReference:
    """Outputs and every gradient, over backend, dtype, shape, options and layout."""

    @DIRECTIONS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, backend, shape, dtype, reverse):
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        options = {"activation": "silu", "reverse": reverse}
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend, **options)

    @DIRECTIONS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", [None, "silu"])
    @pytest.mark.parametrize(
        "absent",
        [(), ("bias",), ("initial_state",), OPTIONAL],
        ids=["full", "no_bias", "no_state", "bare"],
    )
    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_options(self, backend, width, absent, activation, dtype, reverse):
        shape = Shape(2, 7, 12, K=width)
        inputs, cotangents = make_inputs(shape, dtype, absent), make_cotangents(shape, dtype)
        options = {"activation": activation, "reverse": reverse}
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend, **options)

    @DIRECTIONS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, backend, layout, dtype, reverse):
        shape = Shape(3, 19, 13, K=4)
        inputs = with_layouts(make_inputs(shape, dtype), layout)
        cotangents = with_layouts(make_cotangents(shape, dtype), layout)
        options = {"activation": "silu", "reverse": reverse}
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend, **options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ARGUMENTS[1:])
    def test_inputs_of_mixed_dtypes(self, backend, name, dtype):
        shape = Shape(2, 9, 12, K=4)
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        inputs[name] = inputs[name].to(torch.float32 if name == "initial_state" else dtype)
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend, activation="silu")

    @pytest.mark.parametrize("unused", ["y", "final_state"])
    def test_gradient_through_one_output(self, backend, unused):
        shape = Shape(2, 7, 12, K=4)
        cotangents = make_cotangents(shape) | {unused: None}
        check_op(conv, causal_conv1d_reference, make_inputs(shape), cotangents, backend)

    def test_without_the_final_state(self, backend):
        inputs = on(backend.device, make_inputs(Shape(2, 7, 12, K=4)))
        y = causal_conv1d(**inputs, backend=backend.name)
        assert isinstance(y, torch.Tensor)
        assert torch.equal(y, conv(**inputs, backend=backend.name)[0])

    @DIRECTIONS
    @pytest.mark.parametrize("width", [1, 5])
    def test_the_reference_serves_any_width(self, width, reverse):
        shape = Shape(2, 7, 12, K=width)
        inputs, cotangents = make_inputs(shape), make_cotangents(shape)
        options = {"activation": "silu", "reverse": reverse}
        expected = values_and_gradients(causal_conv1d_reference, inputs, cotangents, **options)
        actual = values_and_gradients(conv, inputs, cotangents, backend="reference", **options)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])

    def test_an_empty_batch(self, backend):
        shape = Shape(0, 3, 4, K=4)
        inputs, cotangents = make_inputs(shape), make_cotangents(shape)
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend)


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float64], ids=["f64"])
@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [Shape(2, 5, 3, K=4), Shape(1, 2, 2, K=3)], ids=str)
def test_gradcheck(backend, shape, activation, absent, dtype, reverse):
    inputs = on(backend.device, make_inputs(shape, dtype, absent))
    given = {k: x.requires_grad_() for k, x in inputs.items() if x is not None}

    def function(*tensors):
        arguments = inputs | dict(zip(given, tensors, strict=True))
        return conv(**arguments, activation=activation, reverse=reverse, backend=backend.name)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@DIRECTIONS
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
def test_written_out_backward_is_the_derivative_of_the_reference(absent, activation, reverse):
    shape = Shape(2, 6, 12, K=4)
    inputs = make_inputs(shape, torch.float64, absent)
    cotangents = make_cotangents(shape, torch.float64)
    options = {"activation": activation, "reverse": reverse}
    expected = values_and_gradients(causal_conv1d_reference, inputs, cotangents, **options)
    actual = values_and_gradients(conv, inputs, cotangents, backend="reference", **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


class TestProperties:
    """What holds of a causal convolution whatever its numbers."""

    SHAPE = Shape(2, 37, 12, K=4)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("activation", "width"), [(None, 4), ("silu", 2), ("silu", 3), ("silu", 4)]
    )
    def test_equals_conv1d_with_a_group_a_channel(self, backend, activation, width, dtype):
        def grouped_conv1d(x, weight, bias, activation, **absent):
            wide = torch.promote_types(x.dtype, torch.float32)
            padded = F.pad(x.mT.to(wide), (width - 1, 0))
            y = F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2]).mT
            state = padded[..., x.shape[1] :].mT
            return (F.silu(y) if activation else y).to(x.dtype), state.to(x.dtype)

        shape = self.SHAPE._replace(K=width)
        inputs = make_inputs(shape, dtype, absent=("initial_state",))
        cotangents = make_cotangents(shape, dtype)
        check_op(conv, grouped_conv1d, inputs, cotangents, backend, activation=activation)

    @DIRECTIONS
    @pytest.mark.parametrize("length", [1, 16, 36])
    def test_the_future_does_not_reach_the_past(self, backend, reverse, length):
        inputs = on(backend.device, make_inputs(self.SHAPE))
        order = torch.arange(self.SHAPE.L, device=backend.device)
        past = (order.flip(0) if reverse else order) < length
        options = {"reverse": reverse, "activation": "silu", "backend": backend.name}
        expected = causal_conv1d(**inputs, **options)
        inputs["x"] = inputs["x"].where(past[:, None], inputs["x"].new_full((), math.nan))
        actual = causal_conv1d(**inputs, **options)
        assert torch.equal(actual[:, past], expected[:, past])
        assert actual[:, ~past].isnan().all()

    @DIRECTIONS
    def test_the_reach_into_the_past_is_the_width(self, backend, reverse):
        inputs = on(backend.device, make_inputs(self.SHAPE, absent=OPTIONAL))
        inputs["x"][:, 20] = math.nan
        y = causal_conv1d(**inputs, reverse=reverse, backend=backend.name)
        reached = y.isnan().all(-1).all(0).nonzero().flatten().tolist()
        assert reached == ([17, 18, 19, 20] if reverse else [20, 21, 22, 23])
        assert y.isnan().sum() == 4 * 2 * 12

    def test_batch_items_and_channels_are_independent(self, backend):
        inputs = on(backend.device, make_inputs(Shape(3, 37, 12, K=4)))
        options = {"activation": "silu", "backend": backend.name}
        expected = causal_conv1d(**inputs, **options)
        for name in ("x", "initial_state"):
            inputs[name][0] = math.nan
            inputs[name][..., 5] = math.nan
        actual = causal_conv1d(**inputs, **options)
        rest = torch.arange(12, device=backend.device) != 5
        assert torch.equal(actual[1:][..., rest], expected[1:][..., rest])
        assert actual[0].isnan().all()
        assert actual[..., 5].isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_reverse_is_flip_convolve_flip(self, backend, dtype):
        def reverse_conv(**arguments):
            return conv(**arguments, reverse=True)

        def flip_convolve_flip(x, **arguments):
            y, state = causal_conv1d_reference(x.flip(1), **arguments)
            return y.flip(1), state

        inputs, cotangents = make_inputs(self.SHAPE, dtype), make_cotangents(self.SHAPE, dtype)
        options = {"activation": "silu"}
        check_op(reverse_conv, flip_convolve_flip, inputs, cotangents, backend, **options)

    @DIRECTIONS
    @pytest.mark.parametrize("cut", [1, 2, 16, 21, 36])
    def test_two_parts_with_the_state_carried_are_the_whole(self, backend, reverse, cut):
        def in_two_parts(x, weight, bias, initial_state, **options):
            parts, state, ends = [], initial_state, [x[:, :cut], x[:, cut:]]
            for end in reversed(ends) if options["reverse"] else ends:
                y, state = conv(x=end, weight=weight, bias=bias, initial_state=state, **options)
                parts.append(y)
            return torch.cat(parts[::-1] if options["reverse"] else parts, 1), state

        inputs, cotangents = make_inputs(self.SHAPE), make_cotangents(self.SHAPE)
        options = {"activation": "silu", "reverse": reverse}
        check_op(in_two_parts, causal_conv1d_reference, inputs, cotangents, backend, **options)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_token_by_token_is_the_whole(self, backend, dtype):
        def token_by_token(x, weight, bias, initial_state, **options):
            ys, state = [], initial_state
            for t in range(x.shape[1]):
                y, state = causal_conv1d_update(x[:, t], state, weight, bias, **options)
                ys.append(y)
            return torch.stack(ys, 1), state

        shape = Shape(2, 9, 12, K=4)
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        options = {"activation": "silu"}
        check_op(token_by_token, causal_conv1d_reference, inputs, cotangents, backend, **options)

    def test_the_state_is_the_last_inputs_in_the_order_of_the_scan(self, backend):
        inputs = on(backend.device, make_inputs(Shape(2, 5, 3, K=4)))
        x, before = inputs["x"], inputs["initial_state"]
        assert torch.equal(conv(**inputs, backend=backend.name)[1], x[:, 2:])
        _, state = conv(**inputs, backend=backend.name, reverse=True)
        assert torch.equal(state, x[:, :3].flip(1))
        inputs["x"] = x[:, :1]
        _, state = conv(**inputs, backend=backend.name)
        assert torch.equal(state, torch.cat([before[:, 1:], x[:, :1]], 1))

    def test_an_update_leaves_its_state_as_it_is(self, backend):
        inputs = on(backend.device, make_inputs(Shape(2, 1, 12, K=4)))
        state, before = inputs["initial_state"], inputs["initial_state"].clone()
        _, new = causal_conv1d_update(
            inputs["x"][:, 0], state, inputs["weight"], backend=backend.name
        )
        assert torch.equal(state, before)
        assert not torch.equal(new, before)

    @pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
    @pytest.mark.parametrize("length", [1, 3, 7])
    @pytest.mark.parametrize("dtype", DTYPES)
    @DIRECTIONS
    def test_results_have_memory_of_their_own(self, backend, absent, length, dtype, reverse):
        shape = Shape(2, length, 12, K=4)
        inputs, cotangents = make_inputs(shape, dtype, absent), make_cotangents(shape, dtype)
        assert_no_shared_memory(conv, inputs, cotangents, backend, reverse=reverse)

    def test_deterministic(self, backend):
        shape = Shape(2, 197, 36, K=4)
        inputs, cotangents = (
            on(backend.device, x) for x in (make_inputs(shape), make_cotangents(shape))
        )
        first, second = (
            values_and_gradients(conv, inputs, cotangents, backend=backend.name) for _ in range(2)
        )
        for name in first:
            assert torch.equal(first[name], second[name]), name

    @DIRECTIONS
    def test_silu_far_from_zero(self, backend, reverse):
        values = [0, 1e-30, 1, 20, 87, 89, 104, 1e4, 1e30]
        values = torch.tensor(values + [-x for x in values])
        shape = Shape(1, 5, len(values), K=2)
        inputs, cotangents = make_inputs(shape, absent=OPTIONAL), make_cotangents(shape)
        inputs["x"] = values.expand(1, 5, -1)
        inputs["weight"] = torch.tensor([0.5, 1.0]).expand(len(values), -1)
        options = {"activation": "silu", "reverse": reverse}
        expected = values_and_gradients(causal_conv1d_reference, inputs, cotangents, **options)
        assert all(x.isfinite().all() for x in expected.values())
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend, **options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("zeros", [*ARGUMENTS, ARGUMENTS], ids=[*ARGUMENTS, "all"])
    def test_zeros(self, backend, zeros, dtype):
        shape = Shape(2, 5, 6, K=3)
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        for name in zeros if isinstance(zeros, tuple) else (zeros,):
            inputs[name] = torch.zeros_like(inputs[name])
        check_op(conv, causal_conv1d_reference, inputs, cotangents, backend, activation="silu")


class TestRegistration:
    """What torch.library, torch.compile and torch.export ask of an op."""

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
    def test_opcheck(self, backend, absent):
        inputs = on(backend.device, make_inputs(Shape(2, 5, 6, K=3), absent=absent))
        inputs = {k: None if x is None else x.requires_grad_() for k, x in inputs.items()}
        torch.library.opcheck(
            torch.ops.vim.causal_conv1d.default, (*inputs.values(), "silu", False, backend.name)
        )

    @DIRECTIONS
    @pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_schema_and_fake(self, backend, dtype, layout, absent, reverse):
        shape = Shape(2, 5, 6, K=4)
        inputs = on(backend.device, with_layouts(make_inputs(shape, dtype, absent), layout))
        cotangents = on(backend.device, with_layouts(make_cotangents(shape, dtype), layout))
        checks = {"test_utils": ("test_schema", "test_faketensor")}
        options = ("silu", reverse, backend.name)
        tensors = tuple(inputs.values())
        forward = torch.ops.vim.causal_conv1d.default
        backward = torch.ops.vim.causal_conv1d_bwd.default
        torch.library.opcheck(forward, (*tensors, *options), **checks)
        dy, dstate = cotangents.values()
        for given in [(dy, dstate), (dy, None), (None, dstate)]:
            torch.library.opcheck(backward, (*given, *tensors, *options), **checks)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_meta_tensors(self, dtype):
        inputs = with_layouts(make_inputs(Shape(2, 7, 12, K=4), dtype), "transposed")
        y, state = conv(**{k: x.to("meta") for k, x in inputs.items()})
        assert y.is_meta
        assert state.is_meta
        assert (y.shape, y.dtype, y.stride()) == ((2, 7, 12), dtype, (84, 12, 1))
        assert (state.shape, state.dtype, state.stride()) == ((2, 3, 12), dtype, (36, 12, 1))

    def test_compile(self, backend):
        def conv_twice(x, **arguments):
            y, state = conv(x=x, **arguments)
            return y * 2, state

        torch._dynamo.reset()
        compiled = torch.compile(conv_twice, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (7, 9):
            shape = Shape(2, length, 12, K=4)
            inputs = on(backend.device, make_inputs(shape))
            cotangents = on(backend.device, make_cotangents(shape))
            options = {"activation": "silu", "backend": backend.name}
            expected = values_and_gradients(conv_twice, inputs, cotangents, **options)
            actual = values_and_gradients(compiled, inputs, cotangents, **options)
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name])

    def test_export_and_fx(self, backend):
        class Conv(torch.nn.Module):
            def forward(self, x, weight, bias):
                return causal_conv1d(x, weight, bias, activation="silu", backend=backend.name)

        inputs = on(backend.device, make_inputs(Shape(2, 7, 12, K=4)))
        arguments = (inputs["x"], inputs["weight"], inputs["bias"])
        expected = Conv()(*arguments)
        exported = torch.export.export(Conv(), arguments)
        assert torch.equal(exported.module()(*arguments), expected)
        assert torch.equal(torch.fx.symbolic_trace(Conv())(*arguments), expected)


GOOD = Shape(2, 5, 6, K=4)

WRONG_SHAPES = [
    ("x", (5, 6), r"x must be \(B, L, D\) .*, got \(5, 6\)"),
    ("x", (2, 0, 6), r"x must be \(B, L, D\) with L at least 1, got \(2, 0, 6\)"),
    ("weight", (4, 6), r"weight must be \(D, K\) = \(6, K\), got \(4, 6\)"),
    ("weight", (6, 0), r"weight must be \(D, K\) = \(6, K\), got \(6, 0\)"),
    ("weight", (6, 1, 4), r"weight must be \(D, K\) = \(6, K\), got \(6, 1, 4\)"),
    ("bias", (1,), r"bias must be \(D,\) = \(6,\), got \(1,\)"),
    ("initial_state", (2, 4, 6), r"initial_state must be .* = \(2, 3, 6\), got \(2, 4, 6\)"),
    ("initial_state", (2, 6, 3), r"initial_state must be .* = \(2, 3, 6\), got \(2, 6, 3\)"),
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
            causal_conv1d(**{k: x.to(device) for k, x in inputs.items()})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_not_floating_point(self, name, dtype):
        inputs = make_inputs(GOOD)
        inputs[name] = inputs[name].to(dtype)
        with pytest.raises(TypeError, match=f"{name} must be a real floating-point .*{dtype}"):
            causal_conv1d(**inputs)

    @pytest.mark.parametrize("name", ARGUMENTS[1:])
    def test_mixed_devices(self, name):
        inputs = make_inputs(GOOD)
        inputs[name] = inputs[name].to("meta")
        with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, got meta"):
            causal_conv1d(**inputs)

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="activation must be None or 'silu', got 'relu'"):
            causal_conv1d(**make_inputs(GOOD), activation="relu")

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'cudnn'"):
            causal_conv1d(**make_inputs(GOOD), backend="cudnn")

    def test_named_backend_that_cannot_serve(self):
        with pytest.raises(RuntimeError, match=r"'cuda' cannot serve causal_conv1d on cpu: .+"):
            causal_conv1d(**make_inputs(GOOD), backend="cuda")
