"""Where prefix tokens stand among the patches, by the definition in words of `TokenOrder`."""

import pytest
import torch

from vim.layers import TokenOrder

PATCHES = [1, 2, 3, 4, 7, 8, 9]
ORDERS = {
    "none": {"cls_token_position": "none"},
    "first": {"cls_token_position": "first"},
    "middle": {"cls_token_position": "middle"},
    "last": {"cls_token_position": "last"},
    "both_ends": {"cls_token_position": "both_ends"},
    "one_register": {"cls_token_position": "none", "reg_tokens": 1},
    "middle_and_3_even": {"reg_tokens": 3},
    "middle_and_4_even": {"reg_tokens": 4},
    "middle_and_2_middle": {"reg_tokens": 2, "reg_token_position": "middle"},
    "both_ends_and_12_even": {"cls_token_position": "both_ends", "reg_tokens": 12},
    "last_and_2_middle": {
        "cls_token_position": "last",
        "reg_tokens": 2,
        "reg_token_position": "middle",
    },
}


def scanned(order, count):
    """Return the scan's order of tokens: prefix tokens as -1, -2, ..., patches as 0, 1, ..."""
    prefix = -1.0 - torch.arange(order.num_prefix_tokens)
    patches = torch.arange(count).float()
    return order.interleave(prefix[None, :, None], patches[None, :, None]).flatten().int().tolist()


@pytest.mark.parametrize(
    ("options", "count", "expected"),
    [
        ({"cls_token_position": "none"}, 3, [0, 1, 2]),
        ({"cls_token_position": "first"}, 3, [-1, 0, 1, 2]),
        ({"cls_token_position": "last"}, 3, [0, 1, 2, -1]),
        ({"cls_token_position": "both_ends"}, 3, [-1, 0, 1, 2, -2]),
        ({"cls_token_position": "middle"}, 1, [-1, 0]),
        ({"cls_token_position": "middle"}, 4, [0, 1, -1, 2, 3]),
        ({"cls_token_position": "middle"}, 5, [0, 1, -1, 2, 3, 4]),
        ({"cls_token_position": "none", "reg_tokens": 2}, 6, [0, 1, -1, 2, 3, -2, 4, 5]),
        ({"cls_token_position": "none", "reg_tokens": 2}, 7, [0, 1, -1, 2, 3, -2, 4, 5, 6]),
        ({"reg_tokens": 1}, 4, [0, 1, -1, -2, 2, 3]),
        ({"reg_tokens": 2, "reg_token_position": "middle"}, 4, [0, 1, -1, -2, -3, 2, 3]),
        ({"reg_tokens": 2, "reg_token_position": "middle"}, 5, [0, 1, -1, -2, -3, 2, 3, 4]),
        ({"cls_token_position": "both_ends", "reg_tokens": 1}, 4, [-1, 0, 1, -3, 2, 3, -2]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_order_of_the_scan(options, count, expected):
    assert scanned(TokenOrder(**options), count) == expected


def test_class_token_of_vim_is_token_98_of_197():
    assert scanned(TokenOrder("middle"), 196).index(-1) == 98


@pytest.mark.parametrize("count", PATCHES)
@pytest.mark.parametrize("name", ORDERS)
def test_every_token_is_there_once_and_patches_keep_their_order(name, count):
    order = TokenOrder(**ORDERS[name])
    tokens = scanned(order, count)
    assert [t for t in tokens if t >= 0] == list(range(count))
    assert sorted(t for t in tokens if t < 0) == list(range(-order.num_prefix_tokens, 0))


@pytest.mark.parametrize("count", PATCHES)
@pytest.mark.parametrize("name", ORDERS)
def test_separate_undoes_interleave(name, count):
    order = TokenOrder(**ORDERS[name])
    prefix = torch.randn(2, order.num_prefix_tokens, 3)
    patches = torch.randn(2, count, 3)
    separated = order.separate(order.interleave(prefix, patches))
    assert torch.equal(separated, torch.cat([prefix, patches], dim=1))


@pytest.mark.parametrize("count", PATCHES)
@pytest.mark.parametrize("name", ORDERS)
def test_interleave_undoes_separate(name, count):
    order = TokenOrder(**ORDERS[name])
    tokens = torch.randn(2, order.num_prefix_tokens + count, 3)
    separated = order.separate(tokens)
    prefix, patches = separated.tensor_split([order.num_prefix_tokens], dim=1)
    assert torch.equal(order.interleave(prefix, patches), tokens)


class _ThereAndBack(torch.nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, prefix, patches):
        tokens = self.order.interleave(prefix, patches)
        return tokens, self.order.separate(tokens)


@pytest.mark.parametrize("name", ORDERS)
def test_scripted(name):
    module = _ThereAndBack(TokenOrder(**ORDERS[name]))
    tokens = torch.randn(2, module.order.num_prefix_tokens, 3), torch.randn(2, 5, 3)
    for scripted, eager in zip(torch.jit.script(module)(*tokens), module(*tokens), strict=True):
        assert torch.equal(scripted, eager)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cls_token_position": "center"}, "one of none, first, middle, last, both_ends, got 'cen"),
        ({"reg_tokens": -1}, "reg_tokens must not be negative, got -1"),
        ({"reg_tokens": 1, "reg_token_position": "odd"}, "'even' or 'middle', got 'odd'"),
    ],
    ids=["cls_token_position", "reg_tokens", "reg_token_position"],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TokenOrder(**options)
