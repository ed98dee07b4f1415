"""The operations that `vim.flops` counts, against sums by hand."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vim
from vim.ops import causal_conv1d, selective_scan


def by_hand(dim, depth, tokens, patches, rank, states=16, width=4, classes=1000):
    inner = 2 * dim
    products = tokens * (2 * dim * inner + inner * dim)  # in_proj, out_proj
    direction = (
        tokens * inner * (rank + 2 * states + rank + width) * 2 + tokens * 9 * inner * states
    )
    patch_embed = 2 * patches * 3 * 16 * 16 * dim
    return depth * (2 * products + 2 * direction) + patch_embed + 2 * dim * classes


@pytest.mark.parametrize(
    ("name", "dim", "rank"),
    [("vim_tiny_patch16_224", 192, 12), ("vim_small_patch16_224", 384, 24)],
)
def test_a_whole_model(name, dim, rank):
    model = timm.create_model(name)
    assert vim.flops(model) == by_hand(dim, 24, 197, 196, rank)
    assert vim.flops(model, batch_size=3) == 3 * vim.flops(model)


def test_another_size_and_dtype():
    model = timm.create_model("vim_tiny_patch16_224", depth=2, img_size=(64, 96)).bfloat16()
    assert vim.flops(model) == by_hand(192, 2, 25, 24, 12)
    model = timm.create_model("vim_tiny_patch16_224", depth=2, dynamic_img_size=True)
    assert vim.flops(model, (64, 96)) == by_hand(192, 2, 25, 24, 12)
    assert next(model.parameters()).device.type == "cpu"


def test_a_model_of_timm():
    """timm states 1.3 G multiply-accumulates for DeiT-Ti, this counts 2.5 G operations."""
    assert vim.flops(timm.create_model("deit_tiny_patch16_224")) == pytest.approx(2.5e9, rel=0.02)


def test_a_model_that_does_not_tell():
    with pytest.raises(ValueError, match="give img_size"):
        vim.flops(torch.nn.Conv2d(3, 8, 3))
    assert vim.flops(torch.nn.Conv2d(3, 8, 3), 10) == 2 * 3 * 8 * 9 * 64


@pytest.mark.parametrize("shape", [(7, 2, 5), (7, 5)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.nn.LSTM, {}),
        (torch.nn.LSTM, {"proj_size": 3}),
        (torch.nn.GRU, {"batch_first": True}),
        (torch.nn.RNN, {}),
    ],
)
def test_a_recurrent_network_is_counted_as_step_by_step(kind, options, shape):
    shapes = []

    class Network(torch.nn.Module):
        in_chans = 3

        def __init__(self):
            super().__init__()
            self.rnn = kind(5, 4, num_layers=2, bidirectional=True, **options)

        def forward(self, image):
            result, last = self.rnn(image.new_empty(shape), hx=None)
            shapes.append([x.shape for x in (result, *(last if kind is torch.nn.LSTM else [last]))])
            return result

    network = Network().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 8, 8, device="meta"))
    assert vim.flops(network, 8) == counter.get_total_flops() > 0
    assert len(shapes) == 2
    assert shapes[0] == shapes[1]


def test_a_training_step_costs_three_forward_passes():
    model = timm.create_model("vim_tiny_patch16_224", depth=2, img_size=32, num_classes=10)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    assert counter.get_total_flops() == 3 * vim.flops(model)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
def test_ops_alone(backward):
    u, dt, z = torch.randn(3, 2, 7, 6, requires_grad=True).unbind()
    B, C = torch.randn(2, 2, 7, 4).unbind()
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(u, dt, -torch.rand(6, 4), B, C, z=z)
        y = causal_conv1d(y, torch.randn(6, 4))
        if backward:
            y.sum().backward()
    assert counter.get_total_flops() == (3 if backward else 1) * 84 * (9 * 4 + 2 * 4)
