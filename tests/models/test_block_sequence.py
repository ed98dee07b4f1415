"""Inference and training by `vim.ops.block_sequence` give what the ops give, and spoil nothing."""

import ctypes
import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

from tests.ops import cuda_on_cpu
from vim.ops import _dispatch, block_sequence
from vim.ops.block_sequence import BlockSequence, TrainingSequence
from vim.ops.cuda import _launch
from vim.ops.cuda._launch import Repeated, _packed, launch
from vim.ops.cuda._launch import make as made

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
    block_sequence._repeated.cache_clear()
    if request.param == "cpu":
        cuda_on_cpu.use(monkeypatch, folder)
        _dispatch._resolve.cache_clear()
        yield torch.device("cpu")
        _dispatch._resolve.cache_clear()
        block_sequence._repeated.cache_clear()
    else:
        yield torch.device("cuda")


@pytest.fixture
def noted(monkeypatch):
    """A list that grows with each plan that `Repeated` works out, or None where there is none."""
    plans, work_out = [], _launch._plan

    def plan(*args):
        plans.append(work_out(*args))
        return plans[-1]

    monkeypatch.setattr(_launch, "_plan", plan)
    return plans


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSequence, "serves", lambda x: False)
        expected, streams = model.forward_intermediates(images, indices=[1, 3, 4])
    assert not noted
    for gradients in (False, True):
        noted.clear()
        with torch.set_grad_enabled(gradients):
            actual, same_streams = model.forward_intermediates(images, indices=[1, 3, 4])
        # By turns: the first block as a whole, and the others; three at inference, as above.
        assert len(noted) == (2 if gradients else 3)
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


def training_step(model, images, **autocast):
    """Return the loss and the gradients of a step, those of the images last."""
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bool(autocast)):
        out = model(images)
    loss = (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"images": images.grad}
    model.zero_grad(set_to_none=True)
    return out.detach(), gradients


def step_by_the_ops(model, images, **autocast):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSequence, "serves", lambda x: False)
        return training_step(model, images, **autocast)


def assert_same_step(actual, expected, autocast=False):
    assert torch.equal(actual[0], expected[0])
    for name, gradient in expected[1].items():
        assert (gradient is None) == (actual[1][name] is None), name
        if gradient is None:
            continue
        assert actual[1][name].dtype == gradient.dtype, name
        if autocast and gradient.is_cuda and "in_proj.weight" in name:
            # In float32 at once, where the ops have it in 16 bits first.
            torch.testing.assert_close(actual[1][name], gradient, rtol=2**-7, atol=1e-30)
        else:
            assert torch.equal(actual[1][name], gradient), name


TRAINED = OPTIONS | {
    "keep states": {"keep_states": True},
    "by one kernel": {"embed_dim": 64, "dt_rank": 3},
}


@pytest.mark.parametrize("mode", ["f32", "bf16", "autocast"])
@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_same_gradients(options, mode, device, noted):
    model, images = make(device, torch.bfloat16 if mode == "bf16" else torch.float32, **options)
    model.train()
    model.drop_path = torch.nn.Identity()
    for block in model.blocks:  # which draws
        block.drop_path = torch.nn.Identity()
    autocast = {"autocast": True} if mode == "autocast" else {}
    expected = step_by_the_ops(model, images, **autocast)
    assert not noted
    assert_same_step(training_step(model, images, **autocast), expected, **autocast)
    one_by_one = mode == "f32" or options is OPTIONS["wide"]  # sizes not of mixer_gradients.cu
    assert noted.count(None) == one_by_one, "only the mixer's backward, and only there"
    assert 3 < len(noted) <= 6, "forwards the first block and others, backwards mixers and norms"
    assert_same_step(training_step(model, images, **autocast), expected, **autocast)
    found = len(noted)
    assert_same_step(training_step(model, images, **autocast), expected, **autocast)
    assert len(noted) == found, "a later step finds what is known"


@pytest.mark.parametrize("options", [{"mixer": "gated_conv"}, {"ffn": "mlp"}], ids=str)
def test_gradients_with_other_blocks_in_between(options, device, noted):
    ((kind, other),) = options.items()
    plain = "bimamba" if kind == "mixer" else "none"
    blocks = {kind: [plain, plain, plain, other, *[plain] * 3]}
    model, images = make(device, torch.bfloat16, depth=7, **blocks)
    assert_same_step(training_step(model, images), step_by_the_ops(model, images))
    assert noted


def test_a_loss_of_a_stream_alone(device):
    """The block that finds the stream has a gradient for its sum, and none for its tokens."""

    def gradients(model, images):
        (stream,) = model.forward_intermediates(images, indices=[2], intermediates_only=True)
        stream.square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return stream.detach(), found

    model, images = make(device, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSequence, "serves", lambda x: False)
        expected = gradients(model, images)
    assert expected[1]["blocks.2.norm.weight"] is not None
    assert_same_step(gradients(model, images), expected)


def test_frozen_blocks_and_shared_weights(device):
    model, images = make(device, torch.bfloat16)
    model.blocks[1].requires_grad_(False)
    model.blocks[2].mixer.out_proj.requires_grad_(False)
    branches = model.blocks[3].mixer.forward_branch, model.blocks[3].mixer.backward_branch
    branches[1].D = branches[0].D
    assert_same_step(training_step(model, images), step_by_the_ops(model, images))


@pytest.mark.parametrize("path", ["", "norm", "mixer", "mixer.in_proj", "mixer.out_proj"])
def test_hooks_are_called_in_training(path, device):
    model, images = make(device, torch.bfloat16)
    hooked, calls = model.blocks[2].get_submodule(path), []
    hooked.register_forward_hook(lambda *_: calls.append("forward"))
    hooked.register_full_backward_hook(lambda *_: calls.append("backward"))
    expected = step_by_the_ops(model, images)
    calls.clear()
    assert_same_step(training_step(model, images), expected)
    assert calls == ["forward", "backward"]


def test_checkpointing_takes_the_ops(device, noted):
    model, images = make(device, torch.bfloat16)
    expected = step_by_the_ops(model, images)
    model.set_grad_checkpointing()
    assert_same_step(training_step(model, images), expected)
    assert not noted


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_that_is_checkpointed_as_a_whole(use_reentrant, device, noted):
    model, images = make(device, torch.bfloat16)
    expected, features = step_by_the_ops(model, images), model.forward_features
    model.forward_features = lambda x: checkpoint(features, x, use_reentrant=use_reentrant)
    assert_same_step(training_step(model, images), expected)
    assert noted


def test_saved_tensors_elsewhere(device):
    model, images = make(device, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert_same_step(training_step(model, images), step_by_the_ops(model, images))


def test_two_backwards_of_one_graph(device):
    model, images = make(device, torch.bfloat16)
    loss = model(images).float().square().sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    model(2 * images).float().sum().backward()  # which may take the memory that was let go
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


def test_gradients_have_memory_of_their_own(device):
    """What a parameter keeps as its gradient must not keep what the backward made beside it."""
    model, images = make(device, torch.bfloat16)
    model(images).float().sum().backward()
    for block in model.blocks:
        for name, p in block.named_parameters():
            assert p.grad.untyped_storage().nbytes() <= 2 * 4 * p.numel(), name


def test_second_derivatives_are_refused(device):
    model, images = make(device)
    (gradient,) = torch.autograd.grad(
        model(images).sum(), [model.blocks[0].norm.weight], create_graph=True
    )
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


def test_modes_see_the_ops_in_training(device):
    model, images = make(device)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert torch.ops.vim.bidirectional_mixer in counter.get_flop_counts()["Global"]


def test_what_is_known_keeps_no_tensor(device, noted):
    model, images = make(device, torch.bfloat16)
    for _ in range(3):
        training_step(model, images)
    assert None not in noted
    kept = [weakref.ref(p) for p in model.parameters()]
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in kept + storages)


def test_kinds_that_are_known_are_few(monkeypatch, noted):
    monkeypatch.setattr(Repeated, "MOST_KINDS", 3)
    for late in (False, True):
        double = Repeated(late=late)
        for size in (1, 2, 3, 4, 5, 5, 1, 5) * 2:
            x = torch.full((size,), float(size))
            assert torch.equal(double(lambda x: (made(torch.add, x, x),), x)[0], 2 * x)
            assert len(double._plans) <= 3 >= len(double._met)
    assert len(noted) > 6, "those that were forgotten are worked out again"


class Copying:
    """A kernel that copies, of the source, the target and the bytes; threads take turns in it."""

    def start(self, grid, block, shared_bytes, words):
        time.sleep(1e-4)
        ctypes.memmove(words[1], words[0], words[2])


def test_threads_at_once():
    repeated = Repeated()

    def copied(x):
        y = torch.empty_like(x)
        launch(Copying(), (1, 1, 1), (1, 1, 1), 0, x, y, x.nbytes)
        return (y,)

    def run(i):
        x = torch.full((1000,), float(i))
        return all(torch.equal(repeated(copied, x)[0], x) for _ in range(50))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(4)))
    assert list(repeated._plans.values()) != [None]


def test_memory_is_packed_by_lives():
    lives = {
        (0, 1000): (0, 3),
        (1, 500): (4, 6),
        (2, 300): (2, 5),
        (3, 200): (6, 6),
        (4, 900): (1, 1),
    }
    offsets, size = _packed(lives)
    spans = {k: range(offsets[k], offsets[k] + k[1]) for k in lives}
    for a, (born, gone) in lives.items():
        assert offsets[a] % 256 == 0
        assert spans[a].stop <= size
        for b, (born_b, gone_b) in lives.items():
            if a != b and born <= gone_b and born_b <= gone:
                assert spans[a].stop <= spans[b].start or spans[b].stop <= spans[a].start
    assert size < sum(n for _, n in lives)


@pytest.mark.gpu
def test_training_in_a_cuda_graph():
    model, images = make(torch.device("cuda"), torch.bfloat16)
    expected = step_by_the_ops(model, images)
    training_step(model, images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(model, images)
    for result in (captured[0], *captured[1].values()):
        result.zero_()
    graph.replay()
    assert_same_step(captured, expected)
