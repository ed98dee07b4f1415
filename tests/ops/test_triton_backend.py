"""The Triton backend against the float64 reference, forward and every gradient.

Without a GPU the same tests run in Triton's interpreter, on smaller shapes and in a process of
their own, since Triton decides at its import whether to interpret. Casts to bfloat16, which the
interpreter truncates instead of rounding, are for the GPU alone.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vim.ops import (
    add_norm,
    add_norm_reference,
    causal_conv1d,
    causal_conv1d_reference,
    gated_rms_norm,
    gated_rms_norm_reference,
    selective_scan,
    selective_scan_reference,
    ssd,
    ssd_reference,
)

pytest.importorskip("triton", reason="Triton is not installed")

from vim.ops import triton as triton_backend
from vim.ops.triton import selective_scan as scan_in_triton
from vim.ops.triton import ssd as ssd_in_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_device = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="Triton's kernels need a GPU"
    ),
]


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if "InterpreterError: TypeError('only 0-dimensional arrays" in run.stdout:
        pytest.skip("the interpreter of this Triton (3.6 is one) fails with NumPy 2.4")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter serves the CPU")
@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.float64, "not torch.float64"), (torch.float32, "run on a GPU")]
)
def test_what_cannot_be_served_says_why(dtype, message):
    x = torch.zeros(1, 2, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        causal_conv1d(x, torch.zeros(3, 2), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a GPU to launch kernels on")
def test_why_nothing_can_be_launched():
    assert "install a C compiler" in triton_backend._no_launcher()


def rand(*shape, dtype=torch.float32, layout="contiguous"):
    """Return normal values of a shape, laid out as named."""
    if layout == "transposed":  # what a (B, D, L) tensor is to a channels-last op
        return torch.randn(*shape[:-2], shape[-1], shape[-2], device=DEVICE).to(dtype).mT
    if layout == "sliced":  # what one of several chunks of a projection is
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, device=DEVICE).to(dtype)[..., 1::2]
    if layout == "expanded":
        return (
            torch.randn(*shape[:1], *[1] * (len(shape) - 1), device=DEVICE).to(dtype).expand(shape)
        )
    return torch.randn(shape, device=DEVICE).to(dtype)


def differentiate(function, tensors, output_gradients, cast=None):
    """Return the outputs of a function and the gradients of its tensors, by name."""
    leaves = {}
    for name, tensor in tensors.items():
        leaf = tensor.detach() if cast is None else tensor.detach().to(cast)
        leaves[name] = leaf.requires_grad_()
    outputs = function(**leaves)
    torch.autograd.backward(
        outputs, [g.to(y.dtype) for g, y in zip(output_gradients, outputs, strict=True)]
    )
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def check(op, reference, tensors, output_gradients, products=torch.float32):
    """Assert that outputs and gradients are as near the truth as a float32 reference's.

    Args:
        products: dtype of the factors of products of matrices, whose rounding is allowed, too.
    """
    results = differentiate(op, tensors, output_gradients)
    truth = differentiate(reference, tensors, output_gradients, torch.float64)
    baseline = differentiate(reference, tensors, output_gradients, torch.float32)
    for name, result in results.items():
        expected = truth[name]
        rounded = baseline[name].to(result.dtype).double()
        ulp = max(torch.finfo(dtype).eps for dtype in (result.dtype, products))
        for norm in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            if expected.numel() == 0:
                continue
            allowed = 3 * norm(rounded - expected) + 4 * ulp * norm(expected)
            error = norm(result.double() - expected)
            assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}"

    again = differentiate(op, tensors, output_gradients)
    for name, result in results.items():
        assert torch.equal(result, again[name]), f"{name} differs when computed again"


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# B, L, D, N, groups (0: no such dimension), dtype, reverse, optional tensors, layout
SCANS = (
    [
        (3, 1, 5, 1, 0, F32, False, True, "contiguous"),
        (2, 5, 6, 3, 2, F32, True, True, "transposed"),
        (1, 7, 10, 16, 0, F16, False, True, "sliced"),
        (2, 4, 33, 5, 1, F16, True, False, "expanded"),
        (1, 67, 4, 2, 0, F32, True, True, "contiguous"),
        (1, 3, 9, 70, 0, F32, False, True, "contiguous"),
    ]
    if INTERPRETED
    else [
        (2, 1, 35, 1, 0, F32, False, True, "contiguous"),
        (2, 197, 192, 16, 0, BF16, False, True, "contiguous"),
        (2, 197, 192, 16, 0, BF16, True, True, "contiguous"),
        (2, 197, 192, 16, 0, F32, True, True, "contiguous"),
        (2, 197, 192, 16, 0, F32, False, False, "contiguous"),
        (2, 197, 64, 16, 4, F16, True, True, "transposed"),
        (3, 63, 35, 8, 0, BF16, False, True, "sliced"),
        (3, 65, 35, 16, 5, F32, True, False, "expanded"),
        (1, 1000, 37, 33, 0, F32, False, True, "contiguous"),
        (2, 129, 19, 64, 0, F16, True, True, "contiguous"),
        (1, 66, 24, 256, 0, F32, False, True, "contiguous"),
    ]
)


@pytest.mark.parametrize("case", SCANS, ids=lambda case: "-".join(map(str, case)))
class TestSelectiveScan:
    pytestmark = on_device

    def test_matches_the_reference(self, case):
        batch, length, channels, state, groups, dtype, reverse, optional, layout = case
        torch.manual_seed(0)
        big = (batch, length, channels)
        grouped = (batch, length, state) if groups == 0 else (batch, length, groups, state)
        tensors = {
            "u": rand(*big, dtype=dtype, layout=layout),
            "dt": rand(*big, dtype=dtype, layout=layout),
            "A": -rand(channels, state).exp(),
            "B": rand(*grouped, dtype=dtype, layout=layout),
            "C": rand(*grouped, dtype=dtype, layout=layout),
        }
        if optional:
            tensors["D"] = rand(channels)
            tensors["z"] = rand(*big, dtype=dtype, layout=layout)
            tensors["dt_bias"] = rand(channels) - 4
            tensors["initial_state"] = rand(batch, channels, state, layout=layout)
        options = {"reverse": reverse, "dt_softplus": optional or length == 1}
        if not options["dt_softplus"]:
            tensors["dt"] = tensors["dt"].abs() / 10

        check(
            lambda **t: selective_scan(**t, **options, return_final_state=True, backend="triton"),
            lambda **t: selective_scan_reference(**t, **options),
            tensors,
            [rand(*big, dtype=dtype, layout=layout), rand(batch, channels, state)],
        )


@pytest.fixture
def shortest_segments(monkeypatch):
    """Sequences cut along the tokens, as a GPU with many idle processors has them."""

    def cut(u, programs, blocks, warps, multiple):
        return multiple, -(-u.shape[1] // multiple)

    monkeypatch.setattr(scan_in_triton, "_segments", cut)


@pytest.mark.usefixtures("shortest_segments")
class TestSelectiveScanInSegments(TestSelectiveScan):
    pass


@pytest.mark.parametrize("shape", [(2, 5, 6, 3), (1, 67, 33, 16)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
class TestBothScans:
    pytestmark = on_device

    def test_sum_scaled_and_gated(self, shape, dtype):
        batch, length, channels, state = shape
        torch.manual_seed(0)
        big, small = (batch, length, channels), (batch, length, state)
        sides = []
        for _ in range(2):
            rows = [rand(*size, dtype=dtype) for size in (big, big, small, small)]
            u, dt, B, C = rows
            A = -rand(channels, state).exp()
            sides.append([u, dt, A, B, C, rand(channels), rand(channels) - 4])
        z = rand(*big, dtype=dtype, layout="sliced")

        def exact(kind):
            y = 0
            for side, reverse in zip(sides, (False, True), strict=True):
                *inputs, dt_bias = (x.to(kind) for x in side)
                y = y + selective_scan_reference(*inputs, dt_bias=dt_bias, reverse=reverse)[0]
            return 0.5 * y * torch.nn.functional.silu(z.to(kind))

        y, _ = scan_in_triton.forward_bidirectional(sides, z, 0.5, False)
        truth = exact(torch.float64)
        error = torch.linalg.vector_norm(y.double() - truth)
        rounded = torch.linalg.vector_norm(exact(F32).to(dtype).double() - truth)
        assert error <= 3 * rounded + 4 * torch.finfo(dtype).eps * torch.linalg.vector_norm(truth)


@pytest.mark.usefixtures("shortest_segments")
class TestBothScansInSegments(TestBothScans):
    pass


def test_segments_share_the_work_out(monkeypatch):
    monkeypatch.setattr(scan_in_triton, "_multiprocessors", lambda u: 132)
    u, blocks = torch.empty(1, 6085, 1, device="meta"), {"num_warps": 1}
    assert scan_in_triton._segments(u, 96, blocks, 12, 64) == (384, 16)
    assert scan_in_triton._segments(u, 96, blocks, 12, 8) == (384, 16)
    assert scan_in_triton._segments(u[:, :1025], 192, blocks, 12, 64) == (192, 6)
    assert scan_in_triton._segments(u[:, :1025], 192, blocks, 12, 8) == (136, 8)
    assert scan_in_triton._segments(u[:, :1000], 192, blocks, 12, 8) == (1024, 1)
    assert scan_in_triton._segments(u, 1000, blocks, 12, 8) == (6144, 1)
    assert scan_in_triton._segments(u[:, :1025], 192, blocks, 16, 8) == (96, 11)


@pytest.mark.parametrize("groups", [1, 3])
def test_pair_in_float32(groups):
    projected = torch.randn(2, 5, groups, 4 + 2 * 16).to(torch.bfloat16)
    _, B, C = projected.split([4, 16, 16], -1)
    for pair in ((B, C), (C, B), (B, C.clone()), (B.mT.clone().mT, C.mT.clone().mT)):
        result = scan_in_triton._float32_pair(*pair)
        for x, y in zip(pair, result, strict=True):
            torch.testing.assert_close(y, x.float(), rtol=0, atol=0)


# B, L, H, P, N, dtype, reverse, optional tensors, layout
DUALS = (
    [
        (2, 1, 1, 1, 1, F32, False, True, "contiguous"),
        (1, 7, 2, 3, 5, F32, True, True, "transposed"),
        (1, 9, 2, 3, 5, F16, True, True, "sliced"),
        (2, 16, 3, 16, 16, F16, False, False, "contiguous"),
        (2, 67, 3, 8, 16, F32, True, True, "sliced"),
        (1, 33, 2, 20, 33, F32, False, True, "expanded"),
        (1, 130, 2, 16, 20, F16, True, True, "contiguous"),
        (1, 35, 1, 70, 130, F32, False, True, "contiguous"),
    ]
    if INTERPRETED
    else [
        (2, 1, 2, 64, 64, F32, False, True, "contiguous"),
        (2, 197, 3, 64, 64, BF16, False, True, "contiguous"),
        (2, 197, 3, 64, 64, BF16, True, False, "sliced"),
        (2, 197, 3, 64, 64, F16, True, True, "contiguous"),
        (2, 197, 3, 64, 64, F32, True, True, "contiguous"),
        (1, 1025, 2, 64, 64, BF16, True, True, "contiguous"),
        (1, 1025, 2, 64, 64, F32, False, True, "transposed"),
        (1, 6085, 3, 64, 64, BF16, False, True, "contiguous"),
        (1, 6085, 3, 64, 64, F16, True, False, "contiguous"),
        (1, 6085, 3, 64, 64, F32, True, True, "contiguous"),
        (3, 65, 5, 20, 33, F16, False, True, "expanded"),
        (2, 129, 2, 64, 128, BF16, True, True, "contiguous"),
        (2, 100, 2, 128, 128, F32, False, True, "contiguous"),
        (1, 70, 2, 96, 200, BF16, False, True, "contiguous"),
    ]
)


@pytest.mark.parametrize("case", DUALS, ids=lambda case: "-".join(map(str, case)))
class TestSsd:
    pytestmark = on_device

    def test_matches_the_reference(self, case):
        batch, length, heads, features, states, dtype, reverse, optional, layout = case
        torch.manual_seed(0)
        big, small = (batch, length, heads, features), (batch, length, states)
        end = (batch, heads, features, states)
        tensors = {
            "x": rand(*big, dtype=dtype, layout=layout),
            "dt": rand(batch, length, heads, layout=layout).abs() / 4,
            "A": -rand(batch, heads).exp() if optional else -rand(heads).exp(),
            "B": rand(*small, dtype=dtype, layout=layout),
            "C": rand(*small, dtype=dtype, layout=layout),
        }
        if optional:
            tensors["D"] = rand(heads)
            tensors["initial_state"] = rand(*end, layout=layout)
        options = {"reverse": reverse, "return_final_state": True}

        def reference(x, dt, A, B, C, **optional):
            if reverse:
                x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
            y, state = ssd_reference(x, dt, A, B, C, **optional)
            return y.flip(1) if reverse else y, state

        check(
            lambda **t: ssd(**t, **options, backend="triton"),
            reference,
            tensors,
            [rand(*big, dtype=dtype, layout=layout), rand(*end)],
            products=dtype,
        )


class TestSsdChunksAtOnce(TestSsd):
    """Chunks computed at once and heads in groups, as a GPU with many idle processors has them."""

    @pytest.fixture(autouse=True)
    def idle(self, monkeypatch):
        monkeypatch.setattr(ssd_in_triton, "_multiprocessors", lambda x: 1000)


class TestSsdAsAnOp:
    pytestmark = on_device

    def make(self):
        torch.manual_seed(0)
        x, state = rand(1, 19, 2, 4), rand(1, 2, 4, 3)
        dt, B, C = rand(1, 19, 2).abs(), rand(1, 19, 3), rand(1, 19, 3)
        tensors = (x, dt, -rand(2).exp(), B, C, rand(2), state)
        return [tensor.requires_grad_() for tensor in tensors]

    def call(self, x, dt, A, B, C, D, initial_state, backend="triton"):
        options = {"D": D, "initial_state": initial_state, "return_final_state": True}
        return ssd(x, dt, A, B, C, **options, backend=backend)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_opcheck(self):
        torch.library.opcheck(torch.ops.vim.ssd_fused.default, (*self.make(), True))

    def test_flops(self):
        with FlopCounterMode(display=False) as counter:
            y, _ = self.call(*self.make())
        forward = counter.get_total_flops()
        length, heads, features, states = 19, 2, 4, 3
        inside = 2 * length * length * (states + heads * features)
        assert forward == inside + 2 * 2 * length * heads * features * states
        with counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * forward

    def test_compile(self):
        compiled = torch.compile(self.call, fullgraph=True, backend="aot_eager")
        gradients = []
        for function in (self.call, compiled):
            tensors = self.make()
            y, state = function(*tensors)
            gradients.append(torch.autograd.grad(y.square().sum() + state.sum(), tensors))
        torch.testing.assert_close(*gradients)

    def test_one_result_is_enough(self):
        tensors = self.make()
        for i in range(2):
            ours, plain = (
                torch.autograd.grad(self.call(*tensors, backend)[i].sum(), tensors[:4])
                for backend in ("triton", "reference")
            )
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)

    def test_gradients_have_gradients(self):
        results = []
        for backend in ("triton", "reference"):
            tensors = self.make()
            tensors[4] = tensors[3]
            y, state = self.call(*tensors, backend)
            inputs = [tensors[i] for i in (0, 1, 3)]
            loss = y.square().sum() + state.square().sum()
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
            penalty = sum(g.square().sum() for g in gradients)
            results.append([*gradients, *torch.autograd.grad(penalty, inputs)])
        for ours, plain in zip(*results, strict=True):  # elements are differences of large ones
            assert (ours - plain).norm() <= 1e-5 * plain.norm()


# B, L, D, K, dtype, activation, reverse, optional tensors, layout
CONVOLUTIONS = (
    [
        (1, 1, 3, 4, F32, "silu", False, True, "contiguous"),
        (2, 5, 6, 1, F32, "silu", True, True, "transposed"),
        (2, 40, 5, 4, F16, "silu", True, True, "sliced"),
        (1, 34, 66, 3, F32, None, False, False, "expanded"),
        (1, 7, 4, 2, F32, "silu", False, False, "contiguous"),
    ]
    if INTERPRETED
    else [
        (2, 1, 35, 4, F32, "silu", False, True, "contiguous"),
        (2, 197, 192, 4, BF16, "silu", False, True, "contiguous"),
        (2, 197, 192, 4, BF16, "silu", True, False, "contiguous"),
        (3, 1000, 67, 4, F32, "silu", True, True, "sliced"),
        (3, 63, 64, 3, F16, None, False, False, "transposed"),
        (3, 65, 65, 2, F32, None, True, True, "expanded"),
        (1, 33, 5, 1, F32, "silu", False, False, "contiguous"),
        (1, 33, 5, 7, F32, "silu", False, True, "contiguous"),
    ]
)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: "-".join(map(str, case)))
class TestCausalConv1d:
    pytestmark = on_device

    def test_matches_the_reference(self, case):
        batch, length, channels, width, dtype, activation, reverse, optional, layout = case
        torch.manual_seed(0)
        big, past = (batch, length, channels), (batch, width - 1, channels)
        tensors = {
            "x": rand(*big, dtype=dtype, layout=layout),
            "weight": rand(channels, width, layout=layout),
        }
        if optional:
            tensors["bias"] = rand(channels)
            tensors["initial_state"] = rand(*past, dtype=dtype, layout=layout)
        options = {"activation": activation, "reverse": reverse}

        check(
            lambda **t: causal_conv1d(**t, **options, return_final_state=True, backend="triton"),
            lambda **t: causal_conv1d_reference(**t, **options),
            tensors,
            [rand(*big, dtype=dtype, layout=layout), rand(*past, dtype=dtype)],
        )


# shape, dtype, dtype of the residual, kind, optional tensors, layout
NORMS = (
    [
        ((1, 1), F32, F32, "rms", True, "contiguous"),
        ((2, 3, 33), F32, F32, "layer", True, "transposed"),
        ((3, 2, 64), F16, F32, "rms", True, "sliced"),
        ((2, 600, 5), F32, F32, "layer", False, "expanded"),
        ((2, 5), F16, F16, "rms", False, "contiguous"),
    ]
    if INTERPRETED
    else [
        ((1, 1), F32, F32, "rms", True, "contiguous"),
        ((8, 197, 192), BF16, F32, "rms", True, "contiguous"),
        ((8, 197, 384), BF16, BF16, "rms", False, "contiguous"),
        ((8, 197, 384), F16, F32, "layer", True, "transposed"),
        ((5, 77, 65), F32, F32, "layer", True, "sliced"),
        ((5, 77, 1000), F32, F32, "rms", False, "expanded"),
        ((3, 5000), F32, F32, "layer", True, "contiguous"),
    ]
)


@pytest.mark.parametrize("case", NORMS, ids=lambda case: "-".join(map(str, case)))
class TestAddNorm:
    pytestmark = on_device

    def test_matches_the_reference(self, case):
        shape, dtype, residual_dtype, kind, optional, layout = case
        torch.manual_seed(0)
        tensors = {"x": rand(*shape, dtype=dtype, layout=layout), "weight": rand(shape[-1])}
        tensors["residual"] = None
        if optional:
            tensors["residual"] = rand(*shape, dtype=residual_dtype, layout=layout)
            tensors["bias"] = rand(shape[-1])
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        options = {"eps": 1e-5, "kind": kind, "residual_dtype": residual_dtype}

        def call(op, options, residual=None, **tensors):
            return op(residual=residual, **tensors, **options)

        check(
            lambda **t: call(add_norm, options | {"backend": "triton"}, **t),
            lambda **t: call(add_norm_reference, options, **t),
            tensors,
            [rand(*shape, dtype=dtype, layout=layout), rand(*shape, dtype=residual_dtype)],
        )


# shape, dtype, whether a sum is gated, layout
GATED_NORMS = (
    [
        ((1, 1), F32, True, "contiguous"),
        ((2, 3, 33), F32, True, "transposed"),
        ((3, 2, 64), F16, True, "sliced"),
        ((2, 600, 5), F32, False, "contiguous"),
        ((2, 3, 5), F32, True, "expanded"),
    ]
    if INTERPRETED
    else [
        ((1, 1), F32, True, "contiguous"),
        ((8, 197, 384), BF16, True, "sliced"),
        ((8, 197, 768), F16, False, "contiguous"),
        ((5, 77, 65), F32, True, "transposed"),
        ((3, 5000), F32, True, "expanded"),
    ]
)


@pytest.mark.parametrize("case", GATED_NORMS, ids=lambda case: "-".join(map(str, case)))
class TestGatedRmsNorm:
    pytestmark = on_device

    def make(self, case):
        shape, dtype, summed, layout = case
        torch.manual_seed(0)
        names = ("y", "z", "other") if summed else ("y", "z")
        tensors = {name: rand(*shape, dtype=dtype, layout=layout) for name in names}
        return tensors | {"weight": rand(shape[-1])}, rand(*shape, dtype=dtype, layout=layout)

    def test_matches_the_reference(self, case):
        tensors, dout = self.make(case)
        check(
            lambda **t: (gated_rms_norm(**t, backend="triton"),),
            lambda **t: (gated_rms_norm_reference(**t),),
            tensors,
            [dout],
        )

    def test_gradients_have_gradients(self, case):
        tensors, dout = self.make(case)
        results = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().float().requires_grad_() for t in tensors.values()]
            out = gated_rms_norm(**dict(zip(tensors, leaves, strict=True)), backend=backend)
            gradients = torch.autograd.grad(out, leaves, dout.float(), create_graph=True)
            penalty = sum(g.square().sum() for g in gradients)
            results.append(torch.autograd.grad(penalty, leaves))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
