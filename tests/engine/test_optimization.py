"""Optimizer, autocast, scaler and schedule of vim.engine.optimization."""

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from timm.scheduler import CosineLRScheduler
from torch import nn

import vim  # noqa: F401, registers the models
from vim.engine.optimization import VimCosineLR, VimOptimWrapper

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 10}


def wrapper(model, **changes):
    config = {
        "type": "VimOptimWrapper",
        "constructor": "VimOptimizerConstructor",
        "optimizer": {"opt": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        "dtype": "float32",
    }
    return build_optim_wrapper(model, config | changes)


@pytest.fixture
def model():
    return timm.create_model("vim_tiny_patch16_224", **SMALL)


def test_weight_decay_spares_what_it_would_harm(model):
    optimizer = wrapper(model).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {
        names[p] for g in optimizer.param_groups if g["weight_decay"] == 0.1 for p in g["params"]
    }
    assert "blocks.0.mixer.in_proj.weight" in decayed
    assert not [n for n in decayed if n.endswith(("A_log", ".D", "bias"))]
    assert not decayed & {"pos_embed", "cls_token", "norm.weight"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_layer_decay_scales_the_rates_that_schedules_start_from(model):
    options = {"opt": "adamw", "lr": 1e-2, "weight_decay": 0.1, "layer_decay": 0.5}
    optimizer = wrapper(model, optimizer=options).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates["head.weight"] == pytest.approx(1e-2)
    assert rates["blocks.1.mixer.in_proj.weight"] == 2 * rates["blocks.0.mixer.in_proj.weight"]
    assert rates["patch_embed.proj.weight"] == rates["blocks.0.mixer.in_proj.weight"] / 2
    schedule = VimCosineLR(optimizer, total=10, warmup=2, warmup_lr=1e-6, min_lr=1e-4)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    after = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    ratios = {round(after[name] / rates[name], 9) for name in rates}
    assert len(ratios) == 1


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_is_timms(warmup):
    def rates(step_of):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule, step = step_of(optimizer)
        found = []
        for epoch in range(12):
            step(schedule, epoch)
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
        return found

    def timms(optimizer):
        options = {"warmup_t": warmup, "warmup_lr_init": 1e-6, "lr_min": 1e-5}
        return CosineLRScheduler(optimizer, t_initial=12, **options), lambda s, t: s.step(t)

    def ours(optimizer):
        schedule = VimCosineLR(optimizer, total=12, warmup=warmup, warmup_lr=1e-6, min_lr=1e-5)
        return schedule, lambda s, t: s.step() if t else None

    assert rates(ours) == pytest.approx(rates(timms))


def test_the_schedule_by_iterations():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = VimCosineLR.build_iter_from_epoch(
        optimizer, total=4, warmup=1, warmup_lr=0.0, epoch_length=10
    )
    assert (schedule.total, schedule.warmup, schedule.by_epoch) == (40, 10, False)


def test_bad_warmup():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="from 0 to below total = 5"):
        VimCosineLR(optimizer, total=5, warmup=5)


def test_the_schedule_of_a_budget():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = VimCosineLR(optimizer, total=2, warmup=1, warmup_lr=0.0, by_epoch=False)
    progress = 0.0
    schedule.follow(lambda: progress)
    found = []
    for progress in (0.25, 0.5, 0.75, 1.0):  # noqa: B007, the lambda reads it
        optimizer.step()
        schedule.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([0.5, 0.5, 0.1464, 0.0], abs=1e-4)
    assert "_progress" not in schedule.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_in_each_dtype(dtype):
    layer = nn.Linear(4, 4)
    optimizer = VimOptimWrapper(
        torch.optim.SGD(layer.parameters(), lr=0.1), dtype, clip_grad={"max_norm": 1.0}
    )
    before = layer.weight.clone()
    with optimizer.optim_context(layer):
        y = layer(torch.ones(2, 4))
    assert y.dtype == getattr(torch, dtype)
    assert optimizer.grad_norm is None
    optimizer.update_params(y.float().square().mean())
    assert optimizer.grad_norm > 0
    assert not torch.equal(layer.weight, before)
    assert layer.weight.dtype == torch.float32
    state = optimizer.state_dict()
    assert bool(state["scaler"]) == (dtype == "float16")
    optimizer.load_state_dict(state)


def test_float16_skips_a_step_whose_gradients_overflow():
    layer = nn.Linear(2, 1)
    optimizer = VimOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), "float16")
    before, scale = layer.weight.clone(), optimizer.scaler.get_scale()
    optimizer.update_params(layer(torch.full((1, 2), 1e30)).sum() * 1e30)
    assert torch.equal(layer.weight, before)
    assert optimizer.scaler.get_scale() == scale / 2
    other = VimOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), "float16")
    other.load_state_dict(optimizer.state_dict())
    assert other.scaler.get_scale() == scale / 2


def test_accumulated_gradients_are_those_of_one_batch():
    x, results = torch.randn(4, 3), []
    for parts in (1, 2):
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)
        optimizer = VimOptimWrapper(
            torch.optim.SGD(layer.parameters(), lr=0.1), "float32", accumulative_counts=parts
        )
        optimizer.initialize_count_status(layer, 0, parts)
        for part in x.chunk(parts):
            optimizer.update_params(layer(part).square().mean())
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


def test_mistakes(model):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        wrapper(model, dtype="half")
    with pytest.raises(ValueError, match="layer_decay"):
        wrapper(model, paramwise_cfg={"norm_decay_mult": 0.0})
