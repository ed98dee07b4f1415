import copy
import socket

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import vim  # noqa: F401, registers the models
from vim.engine.training_graph import TrainingGraph
from vim.layers import MixtureOfExperts, load_balance_loss

MIXERS = ("attention", "gated_conv", "gru", "hybrid", "lstm", "mamba", "mamba2", "moe_mamba")
MIXERS += ("mamba3", "mamba_alternating", "rnn", "s4d")


def test_without_a_gpu_it_is_the_module():
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(TrainingGraph(module)(x), module(x))


def test_what_other_processes_take_part_in_has_none(monkeypatch):
    with pytest.raises(ValueError, match=r"set model\.sync_bn=False, or leave out"):
        TrainingGraph(nn.Sequential(nn.SyncBatchNorm(3)))
    monkeypatch.setattr("vim.engine.training_graph.DTensor", nn.Parameter)
    with pytest.raises(ValueError, match=r'leave out model\.cuda_graph=True or parallel="fsdp"'):
        TrainingGraph(nn.Linear(3, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_are_those_of_the_module(dtype):
    """New images, new weights, and images of another shape, three steps of each."""
    model = timm.create_model("vim_tiny_patch16_224", img_size=64, depth=2, num_classes=5).cuda()
    other = copy.deepcopy(model)
    results = []
    for module, run in ((model, TrainingGraph(model)), (other, other)):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses = []
        for batch in (4, 4, 2, 4):
            images = torch.randn(batch, 3, 64, 64, device="cuda")
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                logits = run(images)
            loss = logits.float().square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *(p.detach().clone() for p in module.parameters())])
    for graphed, eager in zip(*results, strict=True):
        assert torch.equal(graphed, eager)
    assert "forward" not in vars(model)


@pytest.mark.gpu
def test_gradients_of_several_batches_add_up():
    model = timm.create_model("vim_tiny_patch16_224", img_size=64, depth=2, num_classes=5).cuda()
    batches = torch.randn(3, 4, 3, 64, 64, device="cuda")
    results = []
    for run in (TrainingGraph(model), model):
        model.zero_grad(set_to_none=True)
        for images in batches:
            run(images).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_evaluation_and_stochastic_depth():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", img_size=64, depth=4, drop_path_rate=0.5)
    model = model.cuda().train()
    run = TrainingGraph(model)
    images = torch.randn(8, 3, 64, 64, device="cuda")
    first, second = run(images).detach().clone(), run(images).detach().clone()
    assert not torch.equal(first, second)
    model.eval()
    with torch.no_grad():
        assert torch.equal(run(images), model(images))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:cuDNN Attention defaults to a non-deterministic")  # PyTorch's
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_a_graph(name):
    """Loss and gradients are those of the module, up to the order of additions."""
    options = {"img_size": 64, "depth": 2, "num_classes": 5}
    model = timm.create_model(f"{name}_tiny_patch16_224", **options).cuda()
    run, results = TrainingGraph(model), []
    for images in torch.randn(2, 4, 3, 64, 64, device="cuda"):
        for call in (run, model):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = call(images).float().square().mean() + 0.1 * load_balance_loss(model)
            loss.backward()
            results.append((loss.detach(), *(p.grad.clone() for p in model.parameters())))
    for graphed, eager in (results[:2], results[2:]):
        torch.testing.assert_close(graphed, eager, rtol=2e-2, atol=2e-2)


class Graphed(nn.Module):
    """What DDP wraps: a model that calls its graph, as `VimClassifier` does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.run = TrainingGraph(model)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.run(images)


def train_on_two(rank: int, port: int, folder: str) -> None:
    """Train with and without a graph on a process's share of the images, by DDP on one GPU."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = []
    for wrap in (Graphed, nn.Sequential):
        torch.manual_seed(0)
        model = timm.create_model("vim_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
        model = model.cuda()
        with torch.cuda.stream(torch.cuda.Stream()):  # as VimRunner does
            run = DistributedDataParallel(wrap(model), device_ids=[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for images in torch.randn(3, 2, 4, 3, 64, 64, device="cuda"):
            run(images[rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().cpu() for p in model.parameters()])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_processes_have_a_graph_each(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_on_two, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for graphed, eager, elsewhere in zip(*ranks[0], ranks[1][0], strict=True):
        torch.testing.assert_close(graphed, eager)
        assert torch.equal(graphed, elsewhere)


@pytest.mark.gpu
def test_counters_of_experts_after_a_replay():
    torch.manual_seed(0)
    options = {"img_size": 64, "depth": 2, "num_classes": 5}
    model = timm.create_model("moe_mamba_tiny_patch16_224", **options).cuda()
    run = TrainingGraph(model)
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    for images in torch.randn(3, 4, 3, 64, 64, device="cuda"):
        with torch.no_grad():
            model(torch.zeros_like(images))  # what a validation between two steps leaves
        run(images)
        counted = [(m.load.clone(), m.dropped.clone()) for m in layers]
        model(images)
        for (load, dropped), layer in zip(counted, layers, strict=True):
            assert torch.equal(load, layer.load)
            assert torch.equal(dropped, layer.dropped)
            assert load.sum() + dropped == 4 * 17
