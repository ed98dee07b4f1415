import pytest
import torch
from torch import nn

from vim.layers.padded_linear import PaddedLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [5, 16])
def test_it_is_a_linear_layer_and_zeros(out, bias):
    layer = PaddedLinear(3, out, bias)
    plain = nn.Linear(3, out, bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 3)
    y, zeros = layer(x).split([out, layer.padding], dim=-1)
    assert torch.equal(y, plain(x))
    assert zeros.shape[-1] == -out % 8
    assert not zeros.any()
    for ours, expected in zip(
        torch.autograd.grad(y.square().sum(), layer.parameters()),
        torch.autograd.grad(plain(x).square().sum(), plain.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
