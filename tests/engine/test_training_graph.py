import copy

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401, registers the models
from vim.engine.training_graph import TrainingGraph
from vim.layers import MixtureOfExperts, load_balance_loss

MIXERS = ("attention", "gated_conv", "gru", "hybrid", "lstm", "mamba", "mamba2", "moe_mamba")
MIXERS += ("mamba3", "mamba_alternating", "rnn", "s4d")


def test_without_a_gpu_it_is_the_module():
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(TrainingGraph(module)(x), module(x))


def test_several_processes_have_none(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="cuda_graph=True is for one process"):
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
