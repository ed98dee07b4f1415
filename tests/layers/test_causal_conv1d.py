"""The short convolution as a module, against torch.nn.Conv1d with padding on one side."""

import pytest
import torch
import torch.nn.functional as F

from vim.layers import CausalConv1d


def conv(width=4, reverse=False):
    module = CausalConv1d(6, width, reverse, dtype=torch.float64)
    torch.nn.init.normal_(module.weight)
    return module


@pytest.mark.parametrize("length", [1, 3, 4, 9], ids="L{}".format)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5], ids="K{}".format)
def test_against_conv1d(width, length):
    module = conv(width)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    padded = F.pad(x.mT, (width - 1, 0))
    expected = F.silu(F.conv1d(padded, module.weight.unsqueeze(1), module.bias, groups=6)).mT
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_token_sees_itself_and_its_past_only(reverse):
    module = conv(width=3, reverse=reverse)
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    differs = (module(x) != module(changed)).any(-1).squeeze(0).nonzero().flatten().tolist()
    assert differs == ([2, 3, 4] if reverse else [4, 5, 6])


def test_reverse_is_the_flip():
    module, reverse = conv(), conv(reverse=True)
    reverse.load_state_dict(module.state_dict())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(reverse(x), module(x.flip(1)).flip(1))


def test_parameters_start_as_those_of_conv1d():
    parameters = dict(CausalConv1d(1000, 4).named_parameters())
    assert {name: p.shape for name, p in parameters.items()} == {
        "weight": (1000, 4),
        "bias": (1000,),
    }
    for parameter in parameters.values():
        assert 0.49 < parameter.abs().max() <= 0.5  # uniform in +-1 / sqrt(K)
