"""What benchmarks/mixers.py times gives the same results, on whatever machine."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vim.layers import MIXERS

PATH = Path(__file__).parents[2] / "benchmarks" / "mixers.py"
spec = importlib.util.spec_from_file_location("benchmark_mixers", PATH)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.mark.parametrize("name", tool.PLAIN)
def test_composition_and_mixer_agree(name):
    assert tool.check(name) < 1e-4


@pytest.mark.parametrize("name", ["mamba2", "s4d", "moe"])
def test_gradients_agree(name):
    module = tool.make(name, 64)
    x = torch.randn(2, 70, 64, requires_grad=True)
    gradients = []
    for run in (module, lambda x: tool.PLAIN[name](module, x)):
        inputs = [x, *module.parameters()]
        gradients.append(torch.autograd.grad(run(x).square().sum(), inputs))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_experts_and_composition_drop_the_same_tokens():
    moe, x = tool.make("moe", 64), torch.randn(2, 101, 64)
    dropped, plain = ((y == 0).all(-1) for y in (moe(x), tool.PLAIN["moe"](moe, x)))
    assert dropped.equal(plain)
    assert int(dropped.sum()) == int(moe.dropped) > 0


def test_every_mixer_has_a_composition():
    of_plain_ops = {"causal_mamba2", "mamba3"}  # themselves
    assert set(MIXERS) - of_plain_ops <= set(tool.PLAIN)
