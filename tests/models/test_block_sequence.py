"""Inference by `vim.ops.block_sequence` gives what the ops give, and spoils nothing."""

import gc

import pytest
import timm
import torch

from tests.ops import cuda_on_cpu
from vim.ops import _dispatch
from vim.ops.block_sequence import BlockSequence
from vim.ops.cuda._launch import Repeated

DTYPES = [torch.float32, torch.bfloat16]
EMULATED = pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=EMULATED, id="emulated"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch, folder):
    """Where the CUDA backend runs: on a CPU that plays a GPU, and on a GPU."""
    if request.param == "cpu":
        cuda_on_cpu.use(monkeypatch, folder)
        _dispatch._resolve.cache_clear()
        yield torch.device("cpu")
        _dispatch._resolve.cache_clear()
    else:
        yield torch.device("cuda")


@pytest.fixture
def noted(monkeypatch):
    """A list that grows with each call that `Repeated` has to work out."""
    calls, first = [], Repeated._first
    monkeypatch.setattr(Repeated, "_first", lambda self, *a: calls.append(self) or first(self, *a))
    return calls


def make(device, dtype=torch.float32, **options):
    options = {"embed_dim": 32, "depth": 5, "img_size": 48, "num_classes": 7} | options
    model = timm.create_model("vim_tiny_patch16_224", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no two blocks alike
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(device, dtype), torch.randn(2, 3, 48, 48).to(device, dtype)


def by_the_ops(model, images):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(BlockSequence, "serves", lambda x: False)
        return model(images)


OPTIONS = {
    "rms": {},
    "layer": {"norm_layer": "layer", "mixer": {"name": "bimamba", "bias": True}},
    "sum": {"merge": "sum", "reg_tokens": 2, "drop_path_rate": 0.1},
    "wide": {"dt_rank": 40, "d_state": 3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_results(options, dtype, device, noted):
    model, images = make(device, dtype, **options)
    expected = by_the_ops(model, images)
    assert not noted
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert len(noted) == 3  # the first block's mixer; its norm, without a stream; the second's norm
    with torch.inference_mode():
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("options", [{"mixer": "gated_conv"}, {"ffn": "mlp"}], ids=str)
def test_other_blocks_in_between(options, device, noted):
    ((kind, other),) = options.items()
    plain = "bimamba" if kind == "mixer" else "none"
    model, images = make(device, depth=7, **{kind: [plain, plain, plain, other, *[plain] * 3]})
    expected = by_the_ops(model, images)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert len(noted) == 3


@pytest.mark.parametrize("ffn", ["none", ["none", "none", "mlp", "none", "none", "none", "none"]])
def test_streams_after_some_blocks(ffn, device, noted):
    model, images = make(device, depth=7, ffn=ffn)
    with torch.enable_grad():
        expected, streams = model.forward_intermediates(images, indices=[1, 3, 4])
    assert not noted
    with torch.no_grad():
        actual, same_streams = model.forward_intermediates(images, indices=[1, 3, 4])
    assert len(noted) == 3
    assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(same_streams, streams, strict=True))


def test_autocast(device):
    model, images = make(device)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        expected = by_the_ops(model, images)
        assert torch.equal(model(images), expected)


def test_weights_of_another_dtype_are_converted_each_time(device, noted):
    model, images = make(device, torch.bfloat16)
    for block in model.blocks:
        block.mixer.forward_branch.A_log.data = block.mixer.forward_branch.A_log.data.bfloat16()
    expected = by_the_ops(model, images)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert len(noted) == 3  # no second time, since that would not help


def test_blocks_that_share_weights(device):
    model, images = make(device)
    for block in model.blocks[:2]:
        block.mixer.backward_branch.D = block.mixer.forward_branch.D
    expected = by_the_ops(model, images)
    with torch.no_grad():
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("path", ["", "norm", "mixer", "mixer.in_proj", "mixer.out_proj"])
def test_what_hooks_keep_stays(path, device):
    model, images = make(device)
    expected, kept = by_the_ops(model, images), []

    def keep(module, inputs, output):
        tensors = (*inputs, *(output if type(output) is tuple else [output]))
        kept.append([(x, x.clone()) for x in tensors if x is not None])

    model.blocks[2].get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    assert len(kept) == 1
    assert all(torch.equal(x, copy) for x, copy in kept[0])


def test_who_lives_while_a_block_works(device, monkeypatch):
    """The stream, and what the mixer, or the projection after it, takes, but nothing else."""
    model, images = make(device)
    found = []

    def living(features):
        shape = (2, 10, features)
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == shape]
        return len({x.untyped_storage().data_ptr() for x in tensors})

    def watch(name, *features):
        function = getattr(BlockSequence, name)

        def watching(*args):
            found.append(tuple(living(f) for f in features))
            return function(*args)

        monkeypatch.setattr(BlockSequence, name, watching)

    watch("bidirectional_mixer", 32, 128)
    watch("project", 32, 64, 128)
    with torch.no_grad():
        model(images)
    assert found == [(1, 1), (1, 1, 0)] * 5


def test_a_change_of_weights_shows(device):
    model, images = make(device)
    with torch.no_grad():
        before = model(images)
        model.blocks[3].mixer.forward_branch.x_proj.weight.mul_(2)
        after = model(images)
    assert not torch.equal(before, after)
    assert torch.equal(after, by_the_ops(model, images))


def test_modes_see_the_ops(device):
    model, images = make(device)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(images)
    assert torch.ops.vim.bidirectional_mixer in counter.get_flop_counts()["Global"]


@pytest.mark.gpu
def test_capture_in_a_cuda_graph():
    model, images = make(torch.device("cuda"), torch.bfloat16)
    expected = by_the_ops(model, images)
    with torch.no_grad():
        model(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(images)
    graph.replay()
    assert torch.equal(result, expected)
