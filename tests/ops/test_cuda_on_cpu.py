"""The CUDA backend without a GPU: the cases of its GPU tests that `cuda_on_cpu` can run quickly."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vim.ops import _dispatch

from . import cuda_on_cpu
from . import test_bidirectional_mixer as mixers
from . import test_cuda_kernels as kernels
from . import test_cuda_selective_scan as scans
from .cases import Shape

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())
)
REPOSITORY = Path(__file__).parents[2]
DTYPES = [pytest.param(torch.float32, id="f32"), pytest.param(torch.bfloat16, id="bf16")]


class Emulated:
    name, device = "cuda", torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, folder):
    cuda_on_cpu.use(monkeypatch, folder)
    monkeypatch.setattr(scans, "DEVICE", Emulated.device)
    monkeypatch.setattr(kernels, "Cuda", Emulated)
    _dispatch._resolve.cache_clear()
    yield
    _dispatch._resolve.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape(2, 1, 7, N=16), Shape(1, 33, 72, N=16)], ids=str)
def test_scan(shape, dtype):
    scans.test_shapes(shape, dtype)


@pytest.mark.parametrize(
    "shape", [Shape(1, 31, 65, N=1), Shape(2, 21, 40, N=3), Shape(1, 19, 17, N=64)], ids=str
)
def test_scan_of_other_numbers_of_states(shape):
    scans.test_shapes(shape, torch.bfloat16)


def test_scan_of_groups_and_slices():
    scans.test_groups_and_slices(True, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [Shape(2, 40, 72, N=16), Shape(1, 9, 65, N=16)], ids=str)
def test_scan_of_both_directions(shape, dtype):
    scans.test_both_directions(shape, ("D", "z", "dt_bias"), dtype)


@pytest.mark.parametrize("length", [272, 300])
def test_scan_in_many_chunks(length):
    """More than are carried over together."""
    shape = Shape(1, length, 40, N=16)
    scans.check_both_directions(shape, ("z",), torch.bfloat16, (16, 1, False), chunk=16)


@pytest.mark.parametrize(("states", "length"), [(1, 300), (2, 530)])
def test_scan_of_few_states_in_chunks(states, length):
    scans.test_few_states_in_chunks(states, length, torch.bfloat16)


def test_scan_backward_in_chunks(monkeypatch):
    monkeypatch.setattr(scans.cuda_scan, "_backward_chunk", lambda *_: 64)
    scans.test_both_directions(Shape(1, 129, 40, N=16), (), torch.bfloat16)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_scan_by_so_many_lanes_a_channel(lanes):
    scans.test_every_way_to_share_the_work_out((16, lanes), lanes % 4 == 0, torch.bfloat16)
    scans.test_result_in_the_place_of_u((16, lanes, False), 24, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_scan_by_a_block_for_each_direction(lanes, dtype):
    scans.test_result_in_the_place_of_u((16, lanes, True), 149, dtype)
    scans.check_both_directions(Shape(1, 40, 72, N=16), ("z",), dtype, (16, lanes, True))


def test_scan_in_clusters_where_sequences_are_few_and_long_and_the_gpu_has_them(monkeypatch):
    def is_apart(arguments):
        scan = scans.cuda_scan._Scan(*arguments, True, False, 0.5)
        return scans.cuda_scan._plan(scan)[0].apart

    short, long = (
        scans.on_device(*scans.both_directions(Shape(1, length, 72, N=16), torch.bfloat16))[0]
        for length in (200, 520)
    )
    assert not is_apart(short)
    assert is_apart(long)
    y = scans.cuda_scan.forward_bidirectional(*long)
    monkeypatch.setattr(scans.cuda_scan, "has_clusters", lambda device: False)
    assert not is_apart(long)
    assert torch.equal(y, scans.cuda_scan.forward_bidirectional(*long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("lanes", "apart"), [(1, False), (8, False), (4, True)])
@pytest.mark.parametrize("length", [9, 40])
def test_scan_that_keeps_its_states(length, lanes, apart, dtype):
    scans.test_states_kept_by_the_forward((16, lanes, apart), length, dtype)


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("shape", [Shape(1, 70, 33, N=3), Shape(2, 66, 48, N=16, G=3)], ids=str)
def test_scan_that_keeps_its_states_backward_in_chunks(shape, chunk, monkeypatch):
    scans.test_states_kept_for_a_backward_in_chunks(shape, chunk, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lanes", "apart", "rank"),
    [(1, False, 24), (2, False, 24), (4, True, 24), (8, True, 16), (8, False, 32), (16, True, 8)],
)
def test_scan_with_dt_as_a_product(lanes, apart, rank, dtype):
    scans.test_dt_as_a_product((16, lanes, apart), rank, dtype)


def test_scan_gradient_in_the_place_of_dt(monkeypatch):
    scans.test_gradient_in_the_place_of_dt(Shape(1, 149, 72, N=16), None, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "channels"), [(1, 33), (37, 40)])
def test_convolution(length, channels, dtype):
    kernels.test_convolution(length, channels, dtype, length > 1)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [192, 33])
def test_norm(features, dtype, kind):
    kernels.test_norm(features, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", mixers.SHAPES)
def test_mixer(name, dtype):
    mixers.check(mixers.SHAPES[name], dtype, Emulated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["B2-L5-D6-N3", "B2-L33-D40-N16"])
def test_mixer_with_the_output_projection(name, dtype):
    shape = mixers.SHAPES[name]
    mixers.check(shape, dtype, Emulated, mixers.make_out(shape))
    mixers.check(shape, dtype, Emulated, mixers.make_out(shape), keep_states=True)


def test_mixer_of_a_large_rank_that_keeps_its_states():
    mixers.check((1, 20, 64, 16, 30, 4), torch.bfloat16, Emulated, keep_states=True)


@pytest.mark.parametrize("keep_states", [False, True], ids=["", "keep-states"])
def test_mixer_in_compiled_training(keep_states):
    mixers.check_compiled_training(Emulated, keep_states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 75, 64, 16, 3, 4), (1, 200, 128, 16, 24, 4), (5, 7, 64, 4, 1, 2), (9, 2, 64, 4, 1, 4)],
    ids=str,
)
def test_mixer_by_kernels_of_tiles(shape, dtype, monkeypatch):
    """Tiles across sequences, several segments a sequence and several sequences a block."""
    mixer, used = cuda_on_cpu.bidirectional_mixer, []
    monkeypatch.setattr(mixer, "_PROJECTED_TOKENS", 0)
    kernel = mixer.get_kernel
    monkeypatch.setattr(mixer, "get_kernel", lambda *a: used.append(a[0]) or kernel(*a))
    mixers.check(shape, dtype, Emulated)
    mixers.check(shape, dtype, Emulated, mixers.make_out(shape), keep_states=True)
    assert {"mixer_projection", "mixer_gradients"} <= set(used)
    mixers.check_weights_of_half_precision(shape, dtype, Emulated)


WAITS = {
    "copy": "        if constexpr (HAS_Y) wait_copies<1>();",
    "barrier": "        __syncthreads();\n        write_dBC(step);",
}


@pytest.mark.parametrize("lines", WAITS.values(), ids=WAITS)
def test_a_missing_wait_shows(lines, tmp_path, monkeypatch):
    """The first of these lines is left out of the kernel that has them."""
    whole, wait = cuda_on_cpu.without_ptx, lines.partition("\n")[0]
    sources = [path.read_text() for path in cuda_on_cpu.kernel_sources("cuda").glob("*.cu")]
    assert sum(lines in source for source in sources) == 1

    def without_it(source):
        return whole(source.replace(lines, lines.removeprefix(wait), 1))

    monkeypatch.setattr(cuda_on_cpu, "without_ptx", without_it)
    cuda_on_cpu.use(monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="too far from the truth"):
        scans.test_both_directions(Shape(2, 40, 72, N=16), ("D", "z", "dt_bias"), torch.bfloat16)


OUTSIDE = """
__global__ void store_kernel(float *x, long long at) { x[at] = 1.f; }
"""
STORE = """
import sys, torch
from pathlib import Path
from tests.ops import cuda_on_cpu
from vim.ops.cuda._launch import launch

folder, at = Path(sys.argv[1]), int(sys.argv[2])
kernel = cuda_on_cpu.Kernel(folder, "outside", "store_kernel")
launch(kernel, (1, 1, 1), (1, 1, 1), 0, torch.zeros(8), at)
"""


@pytest.fixture(scope="module")
def sanitized():
    environment = cuda_on_cpu.with_address_sanitizer()
    if environment is None:
        pytest.skip("g++ has no AddressSanitizer here")

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(("at", "code"), [(7, 0), (8, 1)])
def test_a_store_outside_of_a_tensor_stops(at, code, tmp_path, sanitized):
    (tmp_path / "outside.cu").write_text(OUTSIDE)
    done = sanitized("-c", STORE, str(tmp_path), str(at))
    assert done.returncode == code, done.stderr
    assert ("heap-buffer-overflow" in done.stderr) == (code == 1)


def test_kernels_stay_within_their_tensors(sanitized):
    """Odd sizes of scan, convolution and mixer, in a process of their own."""
    names = [
        "B1-L9-D65-N16-torch.bfloat16",
        "37-40-bf16",
        "test_scan_backward_in_chunks",
        "B1-L70-D33-N3-64",
        "projection[B2-L5-D6-N3-bf16",
    ]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-s", "-k", " or ".join(names)]
    done = sanitized("-m", "pytest", *options, __file__)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 passed" in done.stdout


def test_unknown_assembly_is_refused():
    with pytest.raises(ValueError, match=r"nothing stands for 'nanosleep\.u32 32;' on a CPU"):
        cuda_on_cpu.without_ptx('asm volatile("nanosleep.u32 32;");')
