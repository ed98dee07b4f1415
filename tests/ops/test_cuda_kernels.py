"""What only the CUDA kernels of the convolution and of add + norm have: sizes, streams, graphs.

That they compute what the reference does, over shapes, layouts and options, is in
test_causal_conv1d.py and test_add_norm.py, which run on every backend.
"""

import threading

import pytest
import torch

from vim.ops import (
    add_norm,
    add_norm_reference,
    bidirectional_mixer,
    causal_conv1d,
    causal_conv1d_reference,
)

from .cases import as_float64, assert_close_to_truth, check_op, values_and_gradients

pytestmark = pytest.mark.gpu

DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
LENGTHS = pytest.mark.parametrize("length", [1, 197, 6085], ids=lambda length: f"L{length}")


class Cuda:
    name, device = "cuda", torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cuda_backend():
    from vim.ops import _dispatch

    _, reason = _dispatch.probe("causal_conv1d", "cuda", Cuda.device, torch.float32)
    if reason is not None:
        pytest.skip(reason)


def conv(**arguments):
    return causal_conv1d(**arguments, return_final_state=True)


def conv_inputs(batch, length, channels, dtype, width=4):
    return {
        "x": torch.randn(batch, length, channels).to(dtype),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "initial_state": torch.randn(batch, width - 1, channels).to(dtype),
    }


@LENGTHS
@pytest.mark.parametrize("channels", [384, 100, 33], ids=lambda channels: f"D{channels}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_convolution(length, channels, dtype, reverse):
    inputs = conv_inputs(2, length, channels, dtype)
    cotangents = {
        "y": torch.randn(2, length, channels).to(dtype),
        "final_state": torch.randn(2, 3, channels).to(dtype),
    }
    check_op(
        conv,
        causal_conv1d_reference,
        inputs,
        cotangents,
        Cuda,
        activation="silu",
        reverse=reverse,
    )


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [1, 2, 3, 4], ids=lambda length: f"L{length}")
@pytest.mark.parametrize("has_state", [False, True], ids=["no_state", "state"])
def test_fewer_tokens_than_taps(length, reverse, has_state):
    inputs = conv_inputs(2, length, 8, torch.float32)
    if not has_state:
        inputs["initial_state"] = None
    cotangents = {"y": torch.randn(2, length, 8), "final_state": torch.randn(2, 3, 8)}
    check_op(conv, causal_conv1d_reference, inputs, cotangents, Cuda, reverse=reverse)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 16], ids=lambda width: f"K{width}")
def test_convolution_of_any_width(width):
    inputs = conv_inputs(2, 37, 24, torch.bfloat16, width)
    cotangents = {
        "y": torch.randn(2, 37, 24).bfloat16(),
        "final_state": torch.randn(2, width - 1, 24).bfloat16(),
    }
    if width == 1:  # there is no state
        inputs["initial_state"] = cotangents["final_state"] = None
    check_op(conv, causal_conv1d_reference, inputs, cotangents, Cuda, activation="silu")


def test_a_wider_convolution_is_refused():
    inputs = {k: v.cuda() for k, v in conv_inputs(1, 3, 8, torch.float32, 17).items()}
    with pytest.raises(RuntimeError, match="K up to 16, got 17"):
        causal_conv1d(**inputs, backend="cuda")


def both_references(x, weight, bias, weight_reverse, bias_reverse):
    forward, _ = causal_conv1d_reference(x, weight, bias, activation="silu")
    reverse, _ = causal_conv1d_reference(
        x, weight_reverse, bias_reverse, activation="silu", reverse=True
    )
    return (torch.stack([forward, reverse]),)


@LENGTHS
@pytest.mark.parametrize("channels", [384, 33], ids=lambda channels: f"D{channels}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_directions_at_once(length, channels, dtype):
    """x is half of a projection, and its gradient is written to half of that of the projection."""
    from vim.ops.cuda import causal_conv1d as kernels

    inputs = conv_inputs(2, length, channels, dtype)
    del inputs["initial_state"]
    inputs["weight_reverse"] = torch.randn(channels, 4)
    inputs["bias_reverse"] = torch.randn(channels)
    dy = {"y": torch.randn(2, 2, length, channels).to(dtype)}
    truth = values_and_gradients(both_references, as_float64(inputs), as_float64(dy))
    baseline = values_and_gradients(both_references, inputs, dy)

    on_gpu = {k: v.cuda() for k, v in inputs.items()}
    on_gpu["x"] = torch.cat([on_gpu["x"]] * 2, -1)[..., :channels]
    y = kernels.forward_bidirectional(*on_gpu.values())
    dxz = torch.ones(2, length, 2 * channels, dtype=dtype, device="cuda")
    dx = dxz[..., :channels]
    _, dweight, dbias = kernels.backward_bidirectional(dy["y"].cuda(), *on_gpu.values(), dx=dx)
    assert (dxz[..., channels:] == 1).all()
    gradients = (dx, dweight[0], dbias[0], dweight[1], dbias[1])
    actual = dict(zip(truth, (y, *gradients), strict=True))
    assert_close_to_truth(actual, truth, baseline)

    twice = dx.clone()
    kernels.backward_bidirectional(dy["y"].cuda(), *on_gpu.values(), dx=twice, accumulate=True)
    torch.testing.assert_close(twice, 2 * dx)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [192, 384, 768, 1024, 1536, 2048, 4100, 33])
def test_norm(features, dtype, kind):
    inputs = {
        "x": torch.randn(3, 197, features).to(dtype),
        "residual": torch.randn(3, 197, features),
        "weight": torch.randn(features),
        "bias": torch.randn(features),
    }
    cotangents = {
        "normed": torch.randn(3, 197, features).to(dtype),
        "new_residual": torch.randn(3, 197, features),
    }
    check_op(add_norm, add_norm_reference, inputs, cotangents, Cuda, eps=1e-5, kind=kind)


def training_step(x, residual, weight, bias, norm_weight):
    y = causal_conv1d(x, weight, bias, activation="silu", backend="cuda")
    normed, new_residual = add_norm(y, residual, norm_weight, eps=1e-5, backend="cuda")
    return normed, new_residual


def step_inputs(length=197, channels=192):
    x = torch.randn(4, length, channels, device="cuda").bfloat16()
    residual = torch.randn(4, length, channels, device="cuda")
    weights = [torch.randn(s, device="cuda") for s in ((channels, 4), (channels,), (channels,))]
    return [t.requires_grad_() for t in (x, residual, *weights)]


def results(step, inputs):
    """Return outputs and gradients, without their graph, which would tie them to a stream."""
    outputs = step(*inputs)
    gradients = torch.autograd.grad([o.float().square().sum() for o in outputs], inputs)
    return [*(output.detach() for output in outputs), *gradients]


def assert_identical(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_repeats_are_bit_for_bit_the_same():
    inputs = step_inputs(length=1000, channels=768)
    first = results(training_step, inputs)
    for _ in range(5):
        assert_identical(results(training_step, inputs), first)


def test_capture_in_a_cuda_graph():
    inputs = step_inputs()
    expected = results(training_step, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(training_step, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(training_step, inputs)
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    assert_identical(captured, expected)


def test_on_a_side_stream():
    """The kernels wait for what their stream waits for: inputs written after a long delay."""
    inputs = step_inputs()
    expected = results(training_step, inputs)
    sources = [t.detach().clone() for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        for t in inputs:
            t.fill_(float("nan"))
        torch.cuda._sleep(50_000_000)
        for t, source in zip(inputs, sources, strict=True):
            t.copy_(source)
        with torch.enable_grad():
            actual = results(training_step, inputs)
    torch.cuda.synchronize()
    assert_identical(actual, expected)


def test_in_a_fresh_thread():
    inputs = step_inputs()
    expected = results(training_step, inputs)
    found = []
    thread = threading.Thread(target=lambda: found.extend(results(training_step, inputs)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert_identical(found, expected)


def test_compiled():
    inputs = step_inputs()
    compiled = torch.compile(training_step, fullgraph=True, backend="aot_eager")
    assert_identical(results(compiled, inputs), results(training_step, inputs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current():
    inputs = step_inputs()
    expected = results(training_step, inputs)
    others = [t.detach().to("cuda:1").requires_grad_() for t in inputs]
    actual = results(training_step, others)
    assert torch.cuda.current_device() == 0
    assert_identical([t.to("cuda:0") for t in actual], expected)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """The last batch item of a huge input gives what it gives by itself."""
    batch, length, channels = 3, 1 << 20, 768
    if torch.cuda.mem_get_info()[0] < 8 * batch * length * channels * 2:
        pytest.skip("needs 40 GB of free GPU memory")
    x = torch.empty(batch, length, channels, dtype=torch.bfloat16, device="cuda").normal_()
    weight, bias = torch.randn(channels, 4, device="cuda"), torch.randn(channels, device="cuda")
    y = causal_conv1d(x, weight, bias, activation="silu", backend="cuda")
    alone = causal_conv1d(x[-1:], weight, bias, activation="silu", backend="cuda")
    assert torch.equal(y[-1:], alone)
    normed, residual = add_norm(x, None, bias, eps=1e-5, residual_dtype=x.dtype, backend="cuda")
    alone = add_norm(x[-1:], None, bias, eps=1e-5, residual_dtype=x.dtype, backend="cuda")
    assert torch.equal(normed[-1:], alone[0])
    assert torch.equal(residual[-1:], alone[1])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "rank", "states"), [(384, 12, 16), (96, 24, 16), (7, 1, 3), (33, 8, 1)]
)
def test_weights_of_a_mixer(channels, rank, states, dtype, given):
    """mixer_inputs.cu leaves what the same operations of PyTorch would, exactly but for exp."""
    from vim.ops.cuda import bidirectional_mixer as mixer
    from vim.ops.cuda import causal_conv1d as conv

    def branch():
        sizes = ((channels, 4), (channels,), (rank + 2 * states, channels), (channels, rank))
        products = [torch.randn(size, device="cuda").to(given) for size in sizes]
        scan = [torch.randn(size, device="cuda") for size in ((channels,), (channels, states))]
        return [*products, *scan, torch.randn(channels, device="cuda")]

    branches = branch(), branch()
    x = torch.randn(2, 19, channels, device="cuda").to(dtype)
    weights = mixer._Weights(*branches, x.dtype)
    u = mixer._inputs(weights, x)
    padded = -(-rank // 8) * 8
    for i, (_, _, x_proj, dt_proj, dt_bias, A_log, D) in enumerate(branches):
        rows = [*range(rank), *range(padded, padded + 2 * states)]
        assert torch.equal(weights.x_proj[i, rows], x_proj.to(dtype))
        assert not weights.x_proj[i, rank:padded].any()
        assert torch.equal(weights.dt_proj[i, :, :rank], dt_proj.to(dtype))
        assert not weights.dt_proj[i, :, rank:].any()
        torch.testing.assert_close(weights.A[i], -A_log.exp(), rtol=1e-6, atol=0)
        assert torch.equal(weights.D[i], D)
        assert torch.equal(weights.dt_bias[i], dt_bias)
        alone, _ = conv.forward(x, *branches[i][:2], None, "silu", i == 1)
        assert torch.equal(u[i], alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    from .test_bidirectional_mixer import SHAPES, make

    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float32)
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaves = [x.to(device).requires_grad_() for x in (xz, *branches[0], *branches[1])]
        y = bidirectional_mixer(leaves[0], leaves[1:8], leaves[8:], backend="cuda")
        assert y.device == leaves[0].device
        normed, stream = add_norm(y, None, y.new_ones(y.shape[-1]), eps=1e-5, backend="cuda")
        gradients = torch.autograd.grad((normed + stream).square().sum(), leaves)
        results.append([x.cpu() for x in (normed, stream, *gradients)])
    assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
