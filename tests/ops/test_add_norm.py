"""Residual addition and norm, on every backend that can serve here, against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from vim.ops import add_norm, add_norm_reference

from .cases import (
    DTYPES,
    LAYOUTS,
    check_op,
    on,
    values_and_gradients,
    with_layouts,
)

OP = "add_norm"
ARGUMENTS = ("x", "residual", "weight", "bias")
OPTIONAL = ("residual", "bias")
KINDS = pytest.mark.parametrize("kind", ["rms", "layer"])
EPS = 1e-5

SHAPES = [
    (1,),
    (1, 1),
    (7,),
    (3, 2),
    (1, 1, 15),
    (2, 3, 16),
    (2, 5, 17),
    (1, 7, 31),
    (13, 33),
    (2, 2, 3, 63),
    (1, 3, 65),
    (2, 1, 127),
    (5, 129),
    (1, 3, 255),
    (3, 257),
    (1, 2, 1023),
    (1, 2, 1025),
    (1, 197, 96),
]


def make_inputs(shape, dtype=torch.float32, absent=(), residual_dtype=None):
    """Return the tensors of one norm; parameters are float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": torch.randn(shape).to(dtype),
        "residual": torch.randn(shape).to(residual_dtype or wide),
        "weight": torch.randn(shape[-1:], dtype=wide),
        "bias": torch.randn(shape[-1:], dtype=wide),
    }
    return {name: None if name in absent else inputs[name] for name in ARGUMENTS}


def make_cotangents(shape, dtype=torch.float32, residual_dtype=torch.float32):
    if dtype == torch.float64:
        residual_dtype = dtype
    return {
        "normed": torch.randn(shape).to(dtype),
        "new_residual": torch.randn(shape).to(residual_dtype),
    }


class TestAgainstReference:
    """Outputs and every gradient, over backend, dtype, shape, options and layout."""

    @KINDS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
    def test_shapes(self, backend, shape, dtype, kind):
        inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, eps=EPS, kind=kind)

    @KINDS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "absent",
        [(), ("bias",), ("residual",), OPTIONAL],
        ids=["full", "no_bias", "no_residual", "bare"],
    )
    @pytest.mark.parametrize("low_residual", [False, True], ids=["float32_in", "low_in"])
    @pytest.mark.parametrize("low_stream", [False, True], ids=["float32_out", "low_out"])
    def test_options(self, backend, low_stream, low_residual, absent, dtype, kind):
        shape = (3, 5, 24)
        residual_dtype = dtype if low_stream else torch.float32
        inputs = make_inputs(shape, dtype, absent, dtype if low_residual else torch.float32)
        cotangents = make_cotangents(shape, dtype, residual_dtype)
        options = {"eps": EPS, "kind": kind, "residual_dtype": residual_dtype}
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, **options)

    @KINDS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, backend, layout, dtype, kind):
        shape = (3, 19, 13)
        inputs = with_layouts(make_inputs(shape, dtype), layout)
        cotangents = with_layouts(make_cotangents(shape, dtype), layout)
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, eps=EPS, kind=kind)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_parameters_of_the_dtype_of_x(self, backend, name, dtype):
        inputs, cotangents = make_inputs((3, 24), dtype), make_cotangents((3, 24), dtype)
        inputs[name] = inputs[name].to(dtype)
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, eps=EPS)

    @KINDS
    @pytest.mark.parametrize("unused", ["normed", "new_residual"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradient_through_one_output(self, backend, unused, dtype, kind):
        inputs = make_inputs((3, 24), dtype)
        cotangents = make_cotangents((3, 24), dtype) | {unused: None}
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, eps=EPS, kind=kind)

    def test_an_empty_batch(self, backend):
        inputs, cotangents = make_inputs((0, 3, 4)), make_cotangents((0, 3, 4))
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, eps=EPS)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64], ids=["f64"])
@pytest.mark.parametrize(
    "absent", [(), ("bias",), ("residual",), OPTIONAL], ids=lambda x: "no_" + "_".join(x)
)
def test_gradcheck(backend, absent, dtype, kind):
    inputs = on(backend.device, make_inputs((2, 3, 5), dtype, absent))
    given = {k: x.requires_grad_() for k, x in inputs.items() if x is not None}

    def function(*tensors):
        arguments = inputs | dict(zip(given, tensors, strict=True))
        return add_norm(**arguments, eps=EPS, kind=kind, backend=backend.name)

    assert torch.autograd.gradcheck(function, tuple(given.values()))


@KINDS
@pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
def test_written_out_backward_is_the_derivative_of_the_reference(absent, kind):
    inputs = make_inputs((2, 5, 24), torch.float64, absent)
    cotangents = make_cotangents((2, 5, 24), torch.float64)
    options = {"eps": EPS, "kind": kind}
    expected = values_and_gradients(add_norm_reference, inputs, cotangents, **options)
    actual = values_and_gradients(add_norm, inputs, cotangents, backend="reference", **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


class TestProperties:
    """What holds of the op whatever its numbers."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "first"])
    def test_equals_rms_norm_of_the_sum(self, backend, has_residual, dtype):
        def composed(x, residual, weight, bias, eps):
            wide = torch.promote_types(x.dtype, torch.float32)
            total = x.to(wide) if residual is None else x.to(wide) + residual
            return F.rms_norm(total, total.shape[-1:], weight, eps).to(x.dtype), total

        absent = ("bias",) if has_residual else OPTIONAL
        inputs = make_inputs((3, 5, 24), dtype, absent)
        cotangents = make_cotangents((3, 5, 24), dtype)
        check_op(add_norm, composed, inputs, cotangents, backend, eps=EPS)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "first"])
    def test_equals_layer_norm_of_the_sum(self, backend, has_residual, dtype):
        def composed(x, residual, weight, bias, eps, kind):
            wide = torch.promote_types(x.dtype, torch.float32)
            total = x.to(wide) if residual is None else x.to(wide) + residual
            return F.layer_norm(total, total.shape[-1:], weight, bias, eps).to(x.dtype), total

        inputs = make_inputs((3, 5, 24), dtype, () if has_residual else ("residual",))
        cotangents = make_cotangents((3, 5, 24), dtype)
        check_op(add_norm, composed, inputs, cotangents, backend, eps=EPS, kind="layer")

    def test_the_norm_is_of_the_residual_as_stored(self, backend):
        inputs = on(backend.device, make_inputs((3, 24), torch.bfloat16, OPTIONAL))
        residual = torch.randn(3, 24, device=backend.device) * 1e-3
        options = {"eps": EPS, "backend": backend.name}
        normed, stored = add_norm(
            inputs["x"], residual, inputs["weight"], residual_dtype=torch.bfloat16, **options
        )
        again, _ = add_norm(stored, None, inputs["weight"], **options)
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored, (inputs["x"].float() + residual).bfloat16())
        torch.testing.assert_close(normed, again, rtol=2**-7, atol=0)

    @pytest.mark.parametrize("absent", [(), ("residual",)], ids=["full", "no_residual"])
    def test_float64_stays_float64(self, absent):
        inputs = make_inputs((3, 24), torch.float64, absent)
        normed, new_residual = add_norm(**inputs, eps=EPS, residual_dtype=torch.float32)
        assert (normed.dtype, new_residual.dtype) == (torch.float64, torch.float64)
        total = inputs["x"] if absent else inputs["x"] + inputs["residual"]
        assert torch.equal(new_residual, total)

    @KINDS
    def test_rows_are_independent(self, backend, kind):
        inputs = on(backend.device, make_inputs((3, 5, 24)))
        options = {"eps": EPS, "kind": kind, "backend": backend.name}
        expected = add_norm(**inputs, **options)
        inputs["x"][1, 2] = math.nan
        rest = torch.ones(3, 5, dtype=torch.bool, device=backend.device)
        rest[1, 2] = False
        for got, want in zip(add_norm(**inputs, **options), expected, strict=True):
            assert torch.equal(got[rest], want[rest])
            assert got[1, 2].isnan().all()

    @KINDS
    @pytest.mark.parametrize("absent", [(), ("residual",), OPTIONAL], ids=lambda x: "_".join(x))
    @pytest.mark.parametrize("low_stream", [False, True], ids=["float32_out", "low_out"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_results_have_memory_of_their_own(self, backend, absent, low_stream, dtype, kind):
        residual_dtype = dtype if low_stream else torch.float32
        inputs = make_inputs((3, 24), dtype, absent)
        cotangents = make_cotangents((3, 24), dtype, residual_dtype)
        if absent == ():
            cotangents["normed"] = None  # the residual's gradient then is the given one
        options = {"eps": EPS, "kind": kind, "residual_dtype": residual_dtype}
        inputs, cotangents = on(backend.device, inputs), on(backend.device, cotangents)
        leaves = {k: None if x is None else x.requires_grad_() for k, x in inputs.items()}
        outputs = add_norm(**leaves, backend=backend.name, **options)
        pairs = zip(outputs, cotangents.values(), strict=True)
        sum((y * dy).sum() for y, dy in pairs if dy is not None).backward()
        tensors = {f"output {i}": y for i, y in enumerate(outputs)}
        for name, leaf in leaves.items():
            if leaf is not None:
                tensors |= {name: leaf, f"d{name}": leaf.grad}
        owners = {}
        for name, tensor in tensors.items():
            owner = owners.setdefault(tensor.untyped_storage().data_ptr(), name)
            assert owner == name, f"{name} shares its memory with {owner}"

    @KINDS
    def test_deterministic(self, backend, kind):
        inputs = on(backend.device, make_inputs((2, 197, 48)))
        cotangents = on(backend.device, make_cotangents((2, 197, 48)))
        options = {"eps": EPS, "kind": kind, "backend": backend.name}
        first, second = (
            values_and_gradients(add_norm, inputs, cotangents, **options) for _ in range(2)
        )
        for name in first:
            assert torch.equal(first[name], second[name]), name


class TestExtremes:
    """Nothing overflows, cancels or becomes NaN that would not in float32 by the definition."""

    @KINDS
    @pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e4, 1e15], ids="scale{:g}".format)
    def test_huge_and_tiny(self, backend, scale, kind):
        inputs, cotangents = make_inputs((3, 24)), make_cotangents((3, 24))
        inputs["x"], inputs["residual"] = inputs["x"] * scale, inputs["residual"] * scale
        self.check(inputs, cotangents, backend, eps=EPS, kind=kind)

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float16], ids=["fp16"])
    def test_a_sum_beyond_the_range_of_float16(self, backend, dtype, kind):
        inputs = make_inputs((3, 24), dtype, residual_dtype=dtype)
        cotangents = make_cotangents((3, 24), dtype)
        inputs["x"] = torch.full_like(inputs["x"], 6e4) + inputs["x"] * 500
        inputs["residual"] = torch.full_like(inputs["residual"], 6e4) + inputs["residual"] * 500
        self.check(inputs, cotangents, backend, eps=EPS, kind=kind)

    @pytest.mark.parametrize("width", [24, 192, 1024])
    def test_a_variance_far_below_the_mean(self, backend, width):
        inputs, cotangents = make_inputs((3, width)), make_cotangents((3, width))
        inputs["x"] = inputs["x"] + 1e4
        self.check(inputs, cotangents, backend, eps=EPS, kind="layer")

    @KINDS
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("zeros", [("x", "residual"), ("weight",), ARGUMENTS], ids="_".join)
    def test_zeros(self, backend, zeros, dtype, kind):
        inputs, cotangents = make_inputs((3, 24), dtype), make_cotangents((3, 24), dtype)
        for name in zeros:
            inputs[name] = torch.zeros_like(inputs[name])
        cotangents["normed"] = cotangents["normed"] * 0.01  # eps^-1/2 times it fits float16
        self.check(inputs, cotangents, backend, eps=EPS, kind=kind)

    def test_a_constant_row_has_no_variance(self, backend):
        inputs, cotangents = make_inputs((3, 32)), make_cotangents((3, 32))
        inputs["x"], inputs["residual"] = torch.full((3, 32), 3.0), torch.zeros(3, 32)
        self.check(inputs, cotangents, backend, eps=EPS, kind="layer")

    def test_no_eps(self, backend):
        inputs, cotangents = make_inputs((3, 24)), make_cotangents((3, 24))
        self.check(inputs, cotangents, backend, eps=0.0, kind="rms")

    def check(self, inputs, cotangents, backend, **options):
        baseline = values_and_gradients(add_norm_reference, inputs, cotangents, **options)
        for name, tensor in baseline.items():
            assert tensor.isfinite().all(), f"{name} must be finite in float32 for this to test it"
        check_op(add_norm, add_norm_reference, inputs, cotangents, backend, **options)


class TestRegistration:
    """What torch.library, torch.compile and torch.export ask of an op."""

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
    def test_opcheck(self, backend, absent):
        inputs = on(backend.device, make_inputs((2, 5, 6), absent=absent))
        inputs = {k: None if x is None else x.requires_grad_() for k, x in inputs.items()}
        options = (EPS, "layer", torch.float32, backend.name)
        torch.library.opcheck(torch.ops.vim.add_norm.default, (*inputs.values(), *options))

    @KINDS
    @pytest.mark.parametrize("absent", [(), OPTIONAL], ids=["full", "bare"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("low_stream", [False, True], ids=["float32_out", "low_out"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_schema_and_fake(self, backend, dtype, low_stream, layout, absent, kind):
        shape, residual_dtype = (2, 5, 6), dtype if low_stream else torch.float32
        inputs = on(backend.device, with_layouts(make_inputs(shape, dtype, absent), layout))
        cotangents = make_cotangents(shape, dtype, residual_dtype)
        cotangents = on(backend.device, with_layouts(cotangents, layout))
        checks = {"test_utils": ("test_schema", "test_faketensor")}
        forward = torch.ops.vim.add_norm.default
        backward = torch.ops.vim.add_norm_bwd.default
        arguments = (*inputs.values(), EPS, kind, residual_dtype, backend.name)
        torch.library.opcheck(forward, arguments, **checks)
        _, new_residual, rstd = forward(*arguments)
        saved = (inputs["weight"], inputs["bias"], new_residual, rstd)
        dnormed, dnew = cotangents.values()
        for given in [(dnormed, dnew), (dnormed, None), (None, dnew)]:
            torch.library.opcheck(backward, (*given, *saved, dtype, kind, backend.name), **checks)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_meta_tensors(self, dtype):
        inputs = with_layouts(make_inputs((2, 7, 12), dtype), "transposed")
        results = add_norm(**{k: x.to("meta") for k, x in inputs.items()}, eps=EPS)
        for result, expected in zip(results, (dtype, torch.float32), strict=True):
            assert result.is_meta
            assert (result.shape, result.dtype) == ((2, 7, 12), expected)
            assert result.stride() == (84, 12, 1)

    @KINDS
    def test_compile(self, backend, kind):
        def norm_twice(**arguments):
            normed, residual = add_norm(**arguments)
            return normed * 2, residual

        torch._dynamo.reset()
        compiled = torch.compile(norm_twice, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (7, 9):
            inputs = on(backend.device, make_inputs((2, length, 12)))
            cotangents = on(backend.device, make_cotangents((2, length, 12)))
            options = {"eps": EPS, "kind": kind, "backend": backend.name}
            expected = values_and_gradients(norm_twice, inputs, cotangents, **options)
            actual = values_and_gradients(compiled, inputs, cotangents, **options)
            for name in expected:
                torch.testing.assert_close(actual[name], expected[name])

    def test_export_and_fx(self, backend):
        class Norm(torch.nn.Module):
            def forward(self, x, residual, weight):
                return add_norm(x, residual, weight, eps=EPS, backend=backend.name)

        inputs = on(backend.device, make_inputs((2, 7, 12)))
        arguments = (inputs["x"], inputs["residual"], inputs["weight"])
        expected = Norm()(*arguments)
        exported = torch.export.export(Norm(), arguments).module()
        traced = torch.fx.symbolic_trace(Norm())
        for results in (exported(*arguments), traced(*arguments)):
            for result, want in zip(results, expected, strict=True):
                assert torch.equal(result, want)


WRONG_SHAPES = [
    ("x", (), r"x must be \(\.\.\., D\) with D at least 1, got \(\)"),
    ("x", (2, 0), r"x must be \(\.\.\., D\) with D at least 1, got \(2, 0\)"),
    ("residual", (3, 1, 6), r"residual must have the shape of x, \(2, 5, 6\), got \(3, 1, 6\)"),
    ("residual", (5, 6), r"residual must have the shape of x, \(2, 5, 6\), got \(5, 6\)"),
    ("weight", (1,), r"weight must be \(D,\) = \(6,\), got \(1,\)"),
    ("weight", (5, 6), r"weight must be \(D,\) = \(6,\), got \(5, 6\)"),
    ("bias", (5,), r"bias must be \(D,\) = \(6,\), got \(5,\)"),
]


class TestErrors:
    """Every message says what was given and what is allowed."""

    @pytest.mark.parametrize(
        ("name", "shape", "message"), WRONG_SHAPES, ids=[f"{n}{s}" for n, s, _ in WRONG_SHAPES]
    )
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_wrong_shape(self, device, name, shape, message):
        inputs = make_inputs((2, 5, 6)) | {name: torch.zeros(shape)}
        with pytest.raises(ValueError, match=message):
            add_norm(**{k: x.to(device) for k, x in inputs.items()}, eps=EPS)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    @pytest.mark.parametrize("name", ARGUMENTS)
    def test_not_floating_point(self, name, dtype):
        inputs = make_inputs((2, 5, 6))
        inputs[name] = inputs[name].to(dtype)
        with pytest.raises(TypeError, match=f"{name} must be a real floating-point .*{dtype}"):
            add_norm(**inputs, eps=EPS)

    @pytest.mark.parametrize("name", ARGUMENTS[1:])
    def test_mixed_devices(self, name):
        inputs = make_inputs((2, 5, 6))
        inputs[name] = inputs[name].to("meta")
        with pytest.raises(ValueError, match=f"{name} must be on the device of x, cpu, got meta"):
            add_norm(**inputs, eps=EPS)

    @pytest.mark.parametrize(
        ("error", "message", "options"),
        [
            (ValueError, "kind must be 'rms' or 'layer', got 'batch'", {"kind": "batch"}),
            (ValueError, "eps must not be negative, got -1e-05", {"eps": -1e-5}),
            (TypeError, "residual_dtype must be .*torch.int32", {"residual_dtype": torch.int32}),
            (ValueError, "backend must be one of auto, .*, got 'cudnn'", {"backend": "cudnn"}),
            (RuntimeError, "'cuda' cannot serve add_norm on cpu: .+", {"backend": "cuda"}),
        ],
        ids=["kind", "eps", "residual_dtype", "unknown_backend", "unavailable_backend"],
    )
    def test_wrong_option(self, error, message, options):
        with pytest.raises(error, match=message):
            add_norm(**make_inputs((2, 5, 6)), **({"eps": EPS} | options))
