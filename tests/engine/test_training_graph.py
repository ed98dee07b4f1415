import copy

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401, registers the models
from vim.engine.training_graph import TrainingGraph


def test_without_a_gpu_it_is_the_module():
    module = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(TrainingGraph(module)(x), module(x))


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
