"""What is particular to the CUDA selective scan: how it shares work out, and both directions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vim.ops import selective_scan, selective_scan_reference
from vim.ops.cuda import _compile
from vim.ops.cuda import selective_scan as cuda_scan

from .cases import (
    DTYPES,
    Shape,
    as_float64,
    assert_close_to_truth,
    check_op,
    on,
    values_and_gradients,
)
from .test_selective_scan import make_cotangents, make_inputs, scan

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ORDER = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")

SHAPES = [
    Shape(2, 1, 7, N=16),
    Shape(1, 31, 65, N=1),
    Shape(2, 32, 40, N=3),
    Shape(1, 33, 131, N=8),
    Shape(2, 197, 96, N=16),
    Shape(1, 40, 24, N=24),
    Shape(1, 50, 17, N=64),
    Shape(1, 35, 24, N=100),
    Shape(1, 19, 9, N=256),
]


def check_scan(inputs, cotangents, **options):
    """Values and gradients of the CUDA backend against the float64 reference."""
    cuda = SimpleNamespace(name="cuda", device=DEVICE)
    check_op(scan, selective_scan_reference, inputs, cotangents, cuda, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    reverse = shape.L % 2 == 0
    check_scan(make_inputs(shape, dtype), make_cotangents(shape, dtype), reverse=reverse)


@pytest.mark.parametrize("shape", [Shape(1, 1000, 64, N=16), Shape(1, 1001, 33, N=16)], ids=str)
def test_long(shape):
    dtype = torch.bfloat16
    check_scan(make_inputs(shape, dtype), make_cotangents(shape, dtype), reverse=shape.L % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_groups_and_slices(reverse, dtype):
    shape = Shape(2, 37, 48, N=16, G=3)
    inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
    wide = torch.randn(2, 37, 96).to(dtype)
    inputs["u"], inputs["z"] = wide.chunk(2, -1)
    matrices = torch.randn(2, 37, 3, 5 + 32).to(dtype)
    inputs["B"], inputs["C"] = matrices[..., 5:21], matrices[..., 21:]
    check_scan(inputs, cotangents, reverse=reverse)


def test_aligned_slices():
    """The layout of the mixer: x and z halves of one projection, B and C slices of another."""
    shape, dtype = Shape(2, 45, 64, N=16), torch.bfloat16
    inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
    inputs["u"], inputs["z"] = torch.randn(2, 45, 128).to(dtype).chunk(2, -1)
    _, inputs["B"], inputs["C"] = torch.randn(2, 45, 44).to(dtype).split([12, 16, 16], -1)
    check_scan(inputs, cotangents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("range_", ["tiny_dt", "huge_dt", "flat_A", "steep_A", "zeros", "huge_u"])
def test_ranges(range_, dtype):
    shape = Shape(1, 70, 24, N=16)
    inputs, cotangents = make_inputs(shape, dtype), make_cotangents(shape, dtype)
    if range_ == "tiny_dt":
        inputs["dt"], inputs["dt_bias"] = inputs["dt"] * 0 - 13.8, None
    elif range_ == "huge_dt":
        inputs["dt"] = (torch.rand(shape[:3]) * 50).to(dtype)
    elif range_ == "flat_A":
        inputs["A"] = inputs["A"] * 0 - 1e-4
    elif range_ == "steep_A":
        inputs["A"] = inputs["A"] * 0 - 1e4
    elif range_ == "zeros":
        inputs = {k: x * 0 for k, x in inputs.items()}
    elif range_ == "huge_u":
        inputs["u"] = inputs["u"] * 1e3
    check_scan(inputs, cotangents)


WAYS = [(1, 1), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (16, 8), (16, 16)]
WAYS += [(32, 2), (32, 4), (64, 4), (64, 8), (64, 16)]
APART = [way for way in WAYS if way[1] >= 4 and way[0] < 16 * way[1]]


def both_ways(ways):
    """Parameters of (states, lanes, apart): a block for both directions, or a cluster of two."""
    return [
        pytest.param((*way, apart), id=f"N{way[0]}-S{way[1]}{'-apart' if apart else ''}")
        for apart in (False, True)
        for way in ways
        if not apart or way in APART
    ]


def make_variant(way, dtype, **options):
    states, lanes, apart = way
    if apart and DEVICE.type == "cuda" and not _compile.has_clusters(0):
        pytest.skip("this GPU has no clusters of blocks")
    return cuda_scan._variant(states, lanes, dtype, apart=apart, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"N{way[0]}-S{way[1]}")
def test_every_way_to_share_the_work_out(way, reverse, dtype):
    """Small cases would run with many lanes a channel: here go the ways of large ones."""
    states, lanes = way
    inputs = make_inputs(Shape(2, 149, 72, N=states), dtype)
    truth = selective_scan_reference(**as_float64(inputs), reverse=reverse)
    baseline = selective_scan_reference(**inputs, reverse=reverse)
    inputs = on(DEVICE, inputs)
    start = inputs.pop("initial_state")
    for chunk in (None, 64):
        given = cuda_scan._one_direction(**inputs, dt_softplus=True, reverse=reverse)
        variant = cuda_scan._variant(states, lanes, dtype)
        y, final = cuda_scan._scan_forward(given, start, True, variant, chunk)
        actual = {"y": y, "state": final[0]}
        assert_close_to_truth(
            actual,
            dict(zip(actual, truth, strict=True)),
            dict(zip(actual, baseline, strict=True)),
        )


def both_directions(shape, dtype, options=("D", "z", "dt_bias")):
    """Inputs of `forward_bidirectional`, and dy."""
    first, second = make_inputs(shape, dtype), make_inputs(shape, dtype)
    shared = {"z": first["z"]}
    inputs = {
        k: torch.stack([first[k], second[k]]) for k in ("u", "dt", "A", "B", "C", "D", "dt_bias")
    } | shared
    inputs = {k: x if k in (*"uABC", "dt", *options) else None for k, x in inputs.items()}
    return inputs, make_cotangents(shape, dtype)["y"]


def on_device(inputs, dy):
    """Return the arguments of `forward_bidirectional`, and dy, on the GPU."""
    inputs = on(DEVICE, inputs)
    return [inputs[k] for k in ORDER], dy.to(DEVICE)


def merged_reference(u, dt, A, B, C, D, z, dt_bias, dtype):
    """Both directions merged and gated; `dtype` of the sum, the reference's precision."""
    y = 0.0
    for i, reverse in enumerate([False, True]):
        D_i, bias = (None if x is None else x[i] for x in (D, dt_bias))
        given = (x.to(dtype) for x in (u[i], dt[i], A[i], B[i], C[i]))
        y = y + selective_scan_reference(*given, D_i, dt_bias=bias, reverse=reverse)[0]
    return (0.5 * y * (1 if z is None else F.silu(z.to(dtype)))).to(u.dtype)


BOTH = [
    Shape(2, 1, 8, N=16),
    Shape(2, 7, 24, N=16),
    Shape(1, 8, 33, N=16),
    Shape(2, 9, 64, N=4),
    Shape(1, 24, 72, N=8),
    Shape(2, 40, 72, N=16),
    Shape(2, 197, 136, N=16),
    Shape(1, 33, 16, N=64),
    Shape(1, 33, 16, N=1),
    Shape(1, 21, 8, N=256),
]


@pytest.fixture
def backward_in_chunks(monkeypatch):
    """Cut every backward into chunks of 64 tokens, as one of few long sequences is."""
    monkeypatch.setattr(cuda_scan, "_backward_chunk", lambda *_: 64)


CHUNKED = [
    Shape(2, 149, 72, N=16),
    Shape(1, 128, 64, N=16),
    Shape(1, 200, 33, N=3),
    Shape(1, 193, 24, N=64),
    Shape(2, 130, 48, N=16, G=3),
]


@pytest.mark.usefixtures("backward_in_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", CHUNKED, ids=str)
def test_backward_in_chunks(shape, reverse, dtype):
    check_scan(make_inputs(shape, dtype), make_cotangents(shape, dtype), reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [("D", "z", "dt_bias"), ()], ids=["full", "bare"])
@pytest.mark.parametrize("shape", BOTH, ids=str)
def test_both_directions(shape, options, dtype):
    check_both_directions(shape, options, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("states", "length"), [(1, 300), (2, 530), (4, 1030)])
def test_few_states_in_chunks(states, length, dtype):
    """Few states leave a channel few lanes, so that fewer tokens than else are cut into chunks."""
    shape = Shape(1, length, 40, N=states)
    arguments = on_device(*both_directions(shape, dtype))[0]
    scan = cuda_scan._Scan(*arguments, True, False, 0.5)
    variant = cuda_scan._backward_variant(states, dtype)
    assert cuda_scan._plan(scan)[1] < length
    assert cuda_scan._backward_chunk(scan, variant) < length
    check_both_directions(shape, ("D", "z", "dt_bias"), dtype)


def check_both_directions(shape, options, dtype, way=None, chunk=None, keep=False):
    """Check output and gradients.

    Args:
        way: (N, lanes a channel, apart) of the forward, if not as it chooses.
        chunk: tokens that the forward takes at a time, if `way` is given.
        keep: whether the forward leaves for the backward what it needs.
    """
    inputs, dy = both_directions(shape, dtype, options)
    leaves = {k: v for k, v in inputs.items() if v is not None}

    def reference(wide, **tensors):
        def function(**tensors):
            return (merged_reference(**tensors, dtype=wide),)

        cotangents = {"y": dy.to(next(iter(tensors.values())).dtype)}
        return values_and_gradients(function, tensors, cotangents)

    truth = reference(torch.float64, **as_float64(inputs))
    baseline = reference(torch.float32, **inputs)
    arguments, dy = on_device(inputs, dy)
    kept = None
    if keep:
        specs = cuda_scan.kept_specs(*shape[:4], dtype)
        kept = cuda_scan.Kept(*(torch.empty(s, dtype=t, device=DEVICE) for s, t in specs))
    if way is None:
        y = cuda_scan.forward_bidirectional(*arguments, kept=kept)
    else:
        both = cuda_scan._Scan(*arguments, True, False, 0.5)
        variant = make_variant(way, dtype, chunked=chunk is not None, keeps=keep)
        y, _ = cuda_scan._scan_forward(both, None, False, variant, chunk, kept=kept)
    gradients = cuda_scan.backward_bidirectional(dy, *arguments, kept=kept)
    actual = {"y": y}
    gradients = dict(zip(ORDER, gradients, strict=True))
    actual |= {f"d{k}": gradients[k].to(leaves[k].dtype) for k in inputs if k in leaves}
    assert_close_to_truth(actual, truth, baseline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 59, 149])
@pytest.mark.parametrize("way", both_ways([(16, n) for n in (1, 2, 4, 8, 16)] + [(1, 1), (8, 1)]))
def test_states_kept_by_the_forward(way, length, dtype):
    shape = Shape(2, length, 72, N=way[0])
    for chunk in (None, 64):
        check_both_directions(shape, ("D", "z", "dt_bias"), dtype, way, chunk, keep=True)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 197, 136, N=16),
        Shape(1, 70, 33, N=3),
        Shape(2, 66, 48, N=16, G=3),
        Shape(1, 65, 9, N=32),
    ],
    ids=str,
)
def test_states_kept_for_a_backward_in_chunks(shape, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(cuda_scan, "_backward_chunk", lambda *_: chunk)
    check_both_directions(shape, ("z",), torch.bfloat16, keep=True)


def test_no_states_are_kept_of_float32_or_of_many():
    assert len(cuda_scan.kept_specs(1, 5, 8, 32, torch.bfloat16)) == 2
    assert cuda_scan.kept_specs(1, 5, 8, 33, torch.bfloat16) == []
    assert cuda_scan.kept_specs(1, 5, 8, 16, torch.float32) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 24, 48])
@pytest.mark.parametrize("way", both_ways(WAYS))
def test_dt_as_a_product(way, rank, dtype):
    inputs, _ = both_directions(Shape(2, 149, 72, N=way[0]), dtype)
    given = torch.randn(2, 2, 149, rank + 8).to(dtype)[..., :rank]
    weight = (torch.randn(2, 72, rank) * rank**-0.5).to(dtype)
    exact = []
    for tensors, wide in ((as_float64(inputs), torch.float64), (inputs, torch.float32)):
        dt = given.to(wide) @ weight.to(wide).mT.unsqueeze(1)
        exact.append({"y": merged_reference(**tensors | {"dt": dt}, dtype=wide)})
    inputs = on(DEVICE, inputs | {"dt": given})
    inputs |= {"dt_softplus": True, "reverse": False, "scale": 0.5}
    for chunk in (None, 64):
        both = cuda_scan._Scan(**inputs, dt_proj=weight.to(DEVICE))
        variant = make_variant(way, dtype, rank=rank)
        y, _ = cuda_scan._scan_forward(both, None, False, variant, chunk)
        assert_close_to_truth({"y": y}, *exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [7, 8, 16, 24, 149])
@pytest.mark.parametrize("way", both_ways(WAYS[:8]))
def test_result_in_the_place_of_u(way, length, dtype):
    inputs, _ = both_directions(Shape(2, length, 72, N=way[0]), dtype)
    inputs = on(DEVICE, inputs) | {"dt_softplus": True, "reverse": False, "scale": 0.5}
    for chunk in (None, 64):
        results = []
        for overwrite_u in (False, True):
            both = cuda_scan._Scan(**inputs | {"u": inputs["u"].clone()})
            variant = make_variant(way, dtype)
            y, _ = cuda_scan._scan_forward(both, None, False, variant, chunk, overwrite_u)
            assert (y.data_ptr() == both.u.data_ptr()) == overwrite_u
            results.append(y)
        assert torch.equal(*(y.cpu() for y in results))


@pytest.mark.parametrize("rank", [12, 56], ids=str)
def test_dt_as_a_product_made_before(rank):
    """Ranks that the kernel does not take go through a product of PyTorch's."""
    order, _ = on_device(*both_directions(Shape(2, 20, 16, N=16), torch.bfloat16))
    weight = (torch.randn(2, 16, rank, device=DEVICE) * rank**-0.5).bfloat16()
    order[1] = torch.randn(2, 2, 20, rank, device=DEVICE).bfloat16()
    y = cuda_scan.forward_bidirectional(*order, dt_proj=weight)
    order[1] = order[1] @ weight.mT.unsqueeze(1)
    assert torch.equal(y, cuda_scan.forward_bidirectional(*order))


@pytest.mark.usefixtures("backward_in_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape(2, 197, 136, N=16), Shape(1, 129, 33, N=8)], ids=str)
def test_both_directions_backward_in_chunks(shape, dtype):
    test_both_directions(shape, ("D", "z", "dt_bias"), dtype)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("shape", [Shape(2, 149, 72, N=16), Shape(1, 70, 33, N=3)], ids=str)
def test_gradient_in_the_place_of_dt(shape, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(cuda_scan, "_backward_chunk", lambda *_: chunk)
    order, dy = on_device(*both_directions(shape, torch.bfloat16))
    expected = cuda_scan.backward_bidirectional(dy, *order)
    actual = cuda_scan.backward_bidirectional(dy, *order, overwrite_dt=True)
    assert actual[1] is order[1]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [Shape(2, 100, 72, N=16), Shape(2, 100, 71, N=16)], ids=str)
def test_repeats_are_equal_bit_for_bit(shape):
    arguments, dy = on_device(*both_directions(shape, torch.bfloat16))
    first = (
        cuda_scan.forward_bidirectional(*arguments),
        *cuda_scan.backward_bidirectional(dy, *arguments),
    )
    for _ in range(3):
        again = (
            cuda_scan.forward_bidirectional(*arguments),
            *cuda_scan.backward_bidirectional(dy, *arguments),
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_halves_make_a_whole():
    inputs = on(DEVICE, make_inputs(Shape(2, 96, 40, N=16), torch.bfloat16))
    start = inputs.pop("initial_state")
    y, final = scan(**inputs, initial_state=start, backend="cuda")
    along = ("u", "dt", "B", "C", "z")
    halves, state = [], start
    for cut in (slice(0, 41), slice(41, None)):
        part = {k: v[:, cut] if k in along else v for k, v in inputs.items()}
        half, state = scan(**part, initial_state=state, backend="cuda")
        halves.append(half)
    torch.testing.assert_close(torch.cat(halves, 1), y, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_graph_capture_and_side_stream():
    arguments, dy = on_device(*both_directions(Shape(2, 50, 64, N=16), torch.bfloat16))
    expected = cuda_scan.forward_bidirectional(*arguments)
    gradients = cuda_scan.backward_bidirectional(dy, *arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(cuda_scan.forward_bidirectional(*arguments), expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda_scan.forward_bidirectional(*arguments)
        captured = cuda_scan.backward_bidirectional(dy, *arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients, strict=True))


def test_more_than_two_to_the_31_elements():
    shape = Shape(1, 45000, 48000, N=1)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    u = torch.ones(shape[:3], dtype=torch.bfloat16, device=DEVICE)
    A, B = torch.zeros(48000, 1, device=DEVICE), u[:, :, :1].contiguous()
    y = selective_scan(u, u, A, B, B, dt_softplus=False, backend="cuda")
    expected = torch.arange(1, 45001, device=DEVICE).to(torch.bfloat16)
    assert torch.equal(y[0, :, -1], expected)
    assert torch.equal(y[0, :, 0], expected)
