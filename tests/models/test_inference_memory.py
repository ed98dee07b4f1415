"""Inference lets go of what it no longer needs."""

import gc

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401, registers the models
from vim.layers import mamba

SHAPE = (2, 17, 64)


def make(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 64, "embed_dim": 64, "depth": 4, "num_classes": 3} | options
    return timm.create_model("vim_tiny_patch16_224", **options).eval()


def living() -> int:
    """Return how many tensors of a token's features there are, each memory counted once."""
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == SHAPE]
    return len({x.untyped_storage().data_ptr() for x in tensors})


@pytest.fixture
def counts(monkeypatch):
    """Count when a mixer of each block begins its work."""
    found = []

    def counting(*args, **kwargs):
        found.append(living())
        return mixer(*args, **kwargs)

    mixer = mamba.bidirectional_mixer
    monkeypatch.setattr(mamba, "bidirectional_mixer", counting)
    return found


def test_a_mixer_finds_the_residual_stream_alone(counts):
    model, images = make(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        model(images)
    assert counts == [1] * 4


def test_a_hook_is_called_and_keeps_what_it_wants(counts):
    model, images = make(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    seen = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model.blocks[2].mixer.register_forward_hook(lambda module, args, output: seen.append(output))
    counts.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)
    assert [x.shape for x in seen] == [SHAPE] * 2
    assert counts[0] == 1
    assert min(counts[1:]) > 1


def test_a_block_of_another_class_is_called():
    class Doubled(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x, residual=None):
            x, residual, stream = self.block(x, residual)
            return 2 * x, residual, stream

    model, images = make(), torch.randn(2, 3, 64, 64)
    model.blocks[1] = Doubled(model.blocks[1])
    expected = model(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    "options", [{"ffn": "mlp"}, {"mixer": "mamba2"}, {"drop_path_rate": 0.5}], ids=str
)
def test_it_is_what_is_computed_with_gradients(options):
    model, images = make(**options), torch.randn(2, 3, 64, 64)
    expected = model(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)
        torch.manual_seed(1)
        dropped = model.train()(images)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, model(images))
