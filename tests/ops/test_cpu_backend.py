"""The C++ kernels against the float64 reference, on every instruction set of this processor."""

import contextlib
import multiprocessing
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from vim.ops import (
    add_norm,
    add_norm_reference,
    bidirectional_mixer,
    bidirectional_mixer_reference,
    causal_conv1d,
    causal_conv1d_reference,
    selective_scan,
    selective_scan_reference,
)
from vim.ops.cpu import _library

LIBRARY, REASON = _library.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"{REASON}")

DTYPES = [pytest.param(torch.float32, id="f32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name):
    """Run on the kernels of this instruction set; yields whether the processor has it."""
    before = LIBRARY.vim_cpu_isa()
    yield bool(LIBRARY.vim_cpu_set_isa(_library.ISAS.index(name)))
    LIBRARY.vim_cpu_set_isa(before)


@pytest.fixture(params=_library.ISAS)
def isa(request):
    with instruction_set(request.param) as present:
        if not present:
            pytest.skip(f"this processor lacks {request.param}")
        yield request.param


def check(got, expected, float32, label):
    """Assert that `got` is as near to `expected` (float64) as the float32 reference, or nearly.

    Allowed: 3 times the error of the same reference in float32, and 4 ulps of the output's dtype,
    both relative to the norm.
    """
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = (got.double() - expected).norm()
    allowance = 3 * (float32.double() - expected).norm()
    allowance += 4 * torch.finfo(got.dtype).eps * expected.norm() + 1e-30
    assert error <= allowance, f"{label}: {error:.3e} of {expected.norm():.3e}, {allowance:.3e}"


def run(function, arguments, gradients_of, options, seed):
    """Return the outputs of `function` and the gradients of a fixed weighting of them."""
    leaves = {
        name: None if value is None else value.detach().clone().requires_grad_(name in gradients_of)
        for name, value in arguments.items()
    }
    outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    # Weights are rounded to bfloat16 so that every dtype gets the same ones.
    weights = [w.bfloat16().to(y.dtype) for w, y in zip(weights, outputs, strict=True)]
    names = [name for name, value in leaves.items() if value is not None and name in gradients_of]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], weights)
    return dict(zip(["y", "state"], outputs, strict=True)) | {
        f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


def compare(op, reference, arguments, options):
    """Check outputs and gradients of `op` on `arguments`, on every instruction set."""
    names = tuple(arguments)
    cast = {
        dtype: {name: None if x is None else x.to(dtype) for name, x in arguments.items()}
        for dtype in (torch.float64, torch.float32)
    }
    expected = run(reference, cast[torch.float64], names, options, 1)
    float32 = run(reference, cast[torch.float32], names, options, 1)
    for isa in _library.ISAS:
        with instruction_set(isa) as present:
            got = run(op, arguments, names, options, 1) if present else {}
        for name, value in got.items():
            check(value, expected[name], float32[name].to(value.dtype), f"{name} with {isa}")


def scan_inputs(batch, length, channels, state, dtype, *, groups=0, strided=False, **absent):
    """Random arguments of the scan. With `strided`, slices of projections, as a mixer has them."""
    generator = torch.Generator().manual_seed(batch + length + channels + state)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    if strided:
        u, z = draw(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
        _, B, C = draw(batch, length, 3 + 2 * state).to(dtype).split([3, state, state], dim=-1)
    else:
        u, z = (draw(batch, length, channels).to(dtype) for _ in range(2))
        shape = (batch, length, groups, state) if groups else (batch, length, state)
        B, C = (draw(*shape).to(dtype) for _ in range(2))
    arguments = {
        "u": u,
        "dt": draw(batch, length, channels).to(dtype),
        "A": -torch.exp(draw(channels, state)),
        "B": B,
        "C": C,
        "D": draw(channels),
        "z": z,
        "dt_bias": draw(channels) - 2,
        "initial_state": draw(batch, channels, state),
    }
    return arguments | {name: None for name, present in absent.items() if not present}


def scan(**arguments):
    return selective_scan(**arguments, return_final_state=True, backend="cpu")


SCANS = [
    # batch, length, channels, state, options of the inputs, options of the op
    pytest.param(1, 1, 1, 1, {}, {}, id="B1-L1-D1-N1"),
    pytest.param(2, 17, 37, 5, {}, {"reverse": True}, id="B2-L17-D37-N5-reverse"),
    pytest.param(1, 33, 16, 8, {"z": False}, {}, id="B1-L33-D16-N8-no_z"),
    pytest.param(2, 31, 65, 16, {"strided": True}, {}, id="B2-L31-D65-N16-strided"),
    pytest.param(1, 64, 96, 16, {"strided": True}, {"reverse": True}, id="B1-L64-D96-N16-reverse"),
    pytest.param(1, 197, 19, 16, {"initial_state": False}, {}, id="B1-L197-D19-N16"),
    pytest.param(1, 19, 13, 33, {"D": False, "dt_bias": False}, {}, id="B1-L19-D13-N33-no_D"),
    pytest.param(1, 18, 33, 64, {}, {"reverse": True}, id="B1-L18-D33-N64-reverse"),
    pytest.param(1, 35, 9, 256, {}, {}, id="B1-L35-D9-N256"),
    pytest.param(2, 21, 39, 16, {"groups": 3}, {}, id="B2-L21-D39-N16-G3"),
    pytest.param(1, 21, 136, 8, {"groups": 1}, {"reverse": True}, id="B1-L21-D136-N8-G1-reverse"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "channels", "state", "inputs", "options"), SCANS)
def test_scan(batch, length, channels, state, inputs, options, dtype):
    arguments = scan_inputs(batch, length, channels, state, dtype, **inputs)
    compare(scan, selective_scan_reference, arguments, options)


def test_scan_long():
    compare(scan, selective_scan_reference, scan_inputs(1, 1000, 7, 4, torch.float32), {})


def test_scan_mixed_dtypes():
    arguments = scan_inputs(2, 9, 20, 4, torch.float32)
    for name in ("u", "B", "z"):
        arguments[name] = arguments[name].bfloat16()
    compare(scan, selective_scan_reference, arguments, {})


def test_scan_any_strides():
    arguments = scan_inputs(2, 9, 20, 4, torch.float32)
    for name in ("u", "dt", "B", "C", "z"):
        arguments[name] = arguments[name].mT.contiguous().mT
    arguments["A"] = arguments["A"].mT.contiguous().mT
    arguments["u"] = arguments["u"][:1].expand(2, -1, -1)
    compare(scan, selective_scan_reference, arguments, {})


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4], ids="A{}".format)
@pytest.mark.parametrize("step", [1e-6, 1e-3, 50.0], ids="dt{}".format)
def test_scan_extreme_steps(step, scale):
    arguments = scan_inputs(1, 40, 17, 5, torch.float32)
    arguments |= {"dt": torch.full((1, 40, 17), step), "dt_bias": None}
    arguments["A"] = arguments["A"].clamp(-2, -0.5) * scale
    compare(scan, selective_scan_reference, arguments, {"dt_softplus": False})


@pytest.mark.parametrize("scale", [1e-30, 1e15], ids="u{}".format)
def test_scan_extreme_inputs(scale):
    arguments = scan_inputs(1, 20, 17, 5, torch.float32)
    arguments["u"], arguments["D"] = arguments["u"] * scale, None
    arguments["initial_state"] = None
    compare(scan, selective_scan_reference, arguments, {})


def test_scan_far_gates_and_steps():
    arguments = scan_inputs(1, 8, 17, 5, torch.float32)
    values = torch.tensor([-1e30, -200.0, -90.0, -30.0, 0.0, 20.5, 90.0, 1e4])
    arguments["z"] = values.view(1, 8, 1).expand(1, 8, 17)
    arguments["dt"] = values.clamp(-1e30, 60).flip(0).view(1, 8, 1).expand(1, 8, 17)
    compare(scan, selective_scan_reference, arguments, {})


def test_scan_overflow_is_infinite_not_nan(isa):
    u, B = torch.ones(1, 3, 4), torch.ones(1, 3, 2)
    arguments = {"u": u, "dt": 200 * u, "A": torch.ones(4, 2), "B": B, "C": B}
    arguments |= {"initial_state": torch.ones(1, 4, 2), "dt_softplus": False}
    assert selective_scan(**arguments, backend="cpu").isposinf().all()
    assert selective_scan_reference(**arguments)[0].isposinf().all()


def test_scan_sums_exactly_without_decay(isa):
    u = torch.randint(-8, 8, (1, 100, 5)).float()
    ones = torch.ones(1, 100, 1)
    y = selective_scan(
        u, torch.ones_like(u), torch.zeros(5, 1), ones, ones, dt_softplus=False, backend="cpu"
    )
    assert torch.equal(y, u.cumsum(1))


def conv_inputs(batch, length, channels, width, dtype, *, bias=True, initial_state=True):
    generator = torch.Generator().manual_seed(batch + length + channels + width)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "x": draw(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)[1],
        "weight": draw(channels, width),
        "bias": draw(channels) if bias else None,
        "initial_state": draw(batch, width - 1, channels).to(dtype) if initial_state else None,
    }


def conv(**arguments):
    return causal_conv1d(**arguments, return_final_state=True, backend="cpu")


CONVS = [
    pytest.param(1, 1, 1, 4, {}, {}, id="B1-L1-D1-K4"),
    pytest.param(2, 2, 19, 4, {}, {"reverse": True}, id="B2-L2-D19-K4-reverse"),
    pytest.param(2, 64, 37, 4, {"bias": False}, {"activation": "silu"}, id="B2-L64-D37-K4"),
    pytest.param(1, 65, 16, 3, {}, {"activation": "silu", "reverse": True}, id="B1-L65-D16-K3"),
    pytest.param(1, 197, 48, 4, {"initial_state": False}, {"activation": "silu"}, id="L197-D48-K4"),
    pytest.param(2, 130, 33, 2, {}, {"activation": "silu", "reverse": True}, id="L130-D33-K2"),
    pytest.param(1, 9, 5, 1, {"initial_state": False}, {}, id="L9-D5-K1"),
    pytest.param(1, 70, 5, 9, {}, {"activation": "silu"}, id="L70-D5-K9"),
    pytest.param(1, 5, 5, 9, {}, {"reverse": True}, id="L5-D5-K9-reverse"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "channels", "width", "inputs", "options"), CONVS)
def test_conv(batch, length, channels, width, inputs, options, dtype):
    arguments = conv_inputs(batch, length, channels, width, dtype, **inputs)
    compare(conv, causal_conv1d_reference, arguments, options)


def mixer_inputs(batch, length, channels, state, rank, width, dtype):
    """Return xz and the tensors of both directions, the projections as rounded to `dtype`."""
    generator = torch.Generator().manual_seed(batch + length + channels + state)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    arguments = {"xz": draw(batch, length, 2 * channels).to(dtype)}
    for way in ("forward", "backward"):
        arguments |= {
            f"{way} conv_weight": draw(channels, width, scale=width**-0.5),
            f"{way} conv_bias": draw(channels),
            f"{way} x_proj": draw(rank + 2 * state, channels, scale=channels**-0.5).to(dtype),
            f"{way} dt_proj": draw(channels, rank, scale=rank**-0.5).to(dtype),
            f"{way} dt_bias": draw(channels) - 3,
            f"{way} A_log": draw(channels, state),
            f"{way} D": draw(channels),
        }
    return arguments


def mixer(function=bidirectional_mixer, **arguments):
    xz, *branches = arguments.values()
    options = {} if function is bidirectional_mixer_reference else {"backend": "cpu"}
    return (function(xz, branches[:7], branches[7:], **options),)


MIXERS = [
    # batch, length, channels, state, rank, width
    pytest.param(1, 1, 1, 1, 1, 2, id="B1-L1-D1-N1-R1-K2"),
    pytest.param(3, 37, 40, 16, 3, 4, id="B3-L37-D40-N16-R3-K4"),
    pytest.param(2, 70, 19, 5, 17, 3, id="B2-L70-D19-N5-R17-K3"),
    pytest.param(1, 33, 130, 40, 9, 5, id="B1-L33-D130-N40-R9-K5"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "channels", "state", "rank", "width"), MIXERS)
def test_mixer(batch, length, channels, state, rank, width, dtype):
    arguments = mixer_inputs(batch, length, channels, state, rank, width, dtype)
    with torch.no_grad():
        truth, float32 = (
            mixer(bidirectional_mixer_reference, **{n: x.to(d) for n, x in arguments.items()})[0]
            for d in (torch.float64, torch.float32)
        )
        for isa in _library.ISAS:
            with instruction_set(isa) as present:
                if not present:
                    continue
                # How batch items are shared out depends on the number of threads.
                results = []
                for threads in (1, 2, 4):
                    torch.set_num_threads(threads)
                    results.append(mixer(**arguments)[0])
            check(results[0], truth, float32.to(dtype), f"y with {isa}")
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


NORMS = [
    pytest.param((3, 1), {}, id="3x1"),
    pytest.param((2, 17, 37), {}, id="2x17x37"),
    pytest.param((2, 40, 192), {"residual": False}, id="2x40x192-no_residual"),
    pytest.param((1, 5, 100), {"bias": True}, id="1x5x100-bias"),
    pytest.param((64,), {"bias": True}, id="64-bias"),
]


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("shape", "inputs"), NORMS)
def test_norm(shape, inputs, kind, dtype, residual_dtype):
    generator = torch.Generator().manual_seed(len(shape))
    arguments = {
        "x": torch.randn(shape, generator=generator).to(dtype),
        "residual": torch.randn(shape, generator=generator).to(residual_dtype),
        "weight": torch.randn(shape[-1], generator=generator),
        "bias": torch.randn(shape[-1], generator=generator) if inputs.get("bias") else None,
    }
    if inputs.get("residual") is False:
        arguments["residual"] = None
    options = {"eps": 1e-5, "kind": kind, "residual_dtype": residual_dtype}
    if kind == "layer" and shape[-1] == 1:
        pytest.skip("the layer norm of one feature is its bias, whatever the input")
    compare(
        lambda **named: add_norm(**named, backend="cpu"),
        add_norm_reference,
        arguments,
        options,
    )


def test_norm_strided_rows(isa):
    x = torch.randn(2, 9, 30)[..., 5:25]
    for value in (x, x.transpose(0, 1), x.mT):
        weight = torch.ones(value.shape[-1])
        got = add_norm(value, value, weight, eps=1e-5, backend="cpu")
        expected = add_norm_reference(value, value, weight, eps=1e-5)
        torch.testing.assert_close(got, expected)


def run_mixer(arguments):
    """Return the output of the mixer and the gradient of every tensor."""
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    (y,) = mixer(**leaves)
    gradients = torch.autograd.grad(y.square().sum(), leaves.values())
    return {"y": y} | dict(zip(leaves, gradients, strict=True))


def outputs_of_every_op():
    arguments = scan_inputs(2, 70, 200, 16, torch.float32, strided=True)
    results = run(scan, arguments, tuple(arguments), {}, 0)
    arguments = conv_inputs(2, 70, 200, 4, torch.float32)
    results |= {f"conv {k}": v for k, v in run(conv, arguments, tuple(arguments), {}, 0).items()}
    arguments = {"x": arguments["x"], "residual": arguments["x"], "weight": arguments["bias"]}
    norm = run(
        lambda **named: add_norm(**named, eps=1e-5, backend="cpu"),
        arguments,
        tuple(arguments),
        {},
        0,
    )
    arguments = mixer_inputs(3, 70, 40, 16, 3, 4, torch.float32)
    results |= {f"mixer {k}": v for k, v in run_mixer(arguments).items()}
    return results | {f"norm {name}": value for name, value in norm.items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_same_for_any_threads(first, second):
    """The kernels' results bit for bit; the mixer's gradients come of products of PyTorch's, too,
    whose rounding depends on the number of threads on some processors."""
    products = {name for name in first if name.startswith("mixer") and name != "mixer y"}
    assert_same_bits(
        *({name: x for name, x in r.items() if name not in products} for r in (first, second))
    )
    for name in products:
        largest = float(first[name].abs().max())
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=2e-6 * largest)


def test_results_do_not_depend_on_threads(isa):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outputs_of_every_op())
    assert_same_for_any_threads(results[0], results[1])
    assert_same_for_any_threads(results[0], results[2])


@pytest.fixture
def own_threads():
    """The library's pool in place of PyTorch's OpenMP threads."""
    LIBRARY.vim_cpu_use_openmp(None)
    yield
    LIBRARY.vim_cpu_use_openmp(_library._openmp_entry())


def test_own_threads(own_threads):
    torch.set_num_threads(3)
    results = outputs_of_every_op()
    torch.set_num_threads(1)
    assert_same_for_any_threads(results, outputs_of_every_op())


@pytest.mark.parametrize("threads", ["openmp", "own"])
def test_calls_from_several_python_threads(threads, request):
    if threads == "own":
        request.getfixturevalue("own_threads")
    expected = outputs_of_every_op()
    results = SimpleNamespace(found=[])

    def work():
        for _ in range(3):
            results.found.append(outputs_of_every_op())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results.found) == 9
    for found in results.found:
        assert_same_bits(expected, found)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", ["openmp", "own"])
def test_a_forked_child_can_call(threads, request):
    if threads == "own":
        request.getfixturevalue("own_threads")
    arguments = scan_inputs(2, 70, 200, 16, torch.float32)
    torch.set_num_threads(2)
    expected = scan(**arguments)[0]  # the parent's threads run before the fork
    child = multiprocessing.get_context("fork").Process(
        target=_exit_with_whether_equal, args=(arguments, expected)
    )
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0


def _exit_with_whether_equal(arguments, expected):
    os._exit(0 if torch.equal(scan(**arguments)[0], expected) else 1)


def test_what_is_not_served_is_refused_with_a_reason():
    cpu = torch.device("cpu")
    assert _library.unavailable(cpu, torch.float32) is None
    assert "float16" in _library.unavailable(cpu, torch.float16)
    assert "float64" in _library.unavailable(cpu, torch.float64)
    assert "meta" in _library.unavailable(torch.device("meta"), torch.float32)
