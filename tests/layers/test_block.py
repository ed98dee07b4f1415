"""The residual block: what it adds, in which order, and what it drops."""

import pytest
import torch
from torch import nn

from vim.layers import AddNorm, BidirectionalMamba, FeedForward, VimBlock

DIM = 16


def make_block(**kwargs):
    return VimBlock(AddNorm(DIM), BidirectionalMamba(DIM, d_state=4), **kwargs).double()


def test_first_block_starts_the_stream():
    block = make_block()
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    y, residual, found = block(x)
    assert torch.equal(residual, x)
    assert torch.equal(found, x)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(y, block.mixer(normed))


def test_stream_is_the_sum_of_all_that_blocks_computed():
    blocks = [make_block() for _ in range(3)]
    stream = torch.randn(2, 5, DIM, dtype=torch.float64)
    x, residual = stream, None
    for block in blocks:
        x, residual, found = block(x, residual)
        assert torch.equal(found, residual)
        torch.testing.assert_close(residual, stream)
        normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5)
        stream = stream + block.mixer(normed)
    torch.testing.assert_close(x + residual, stream)


class _Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_drop_path_drops_whole_items_of_the_incoming_tokens():
    block = VimBlock(AddNorm(DIM), _Zero(), drop_path=0.5).double().train()
    x, residual = torch.ones(64, 3, DIM).double(), torch.zeros(64, 3, DIM).double()
    added = block(x, residual)[1].flatten(1)
    assert (added == added[:, :1]).all()
    assert set(added[:, 0].tolist()) == {0.0, 2.0}  # dropped, or kept and scaled up


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_nothing_is_dropped_outside_training(rate):
    block = make_block(drop_path=rate).eval()
    x, residual = torch.randn(2, 4, 3, DIM, dtype=torch.float64)
    assert torch.equal(block(x, residual)[1], x + residual)


def test_a_feed_forward_reads_the_stream_behind_the_mixer():
    ffn = FeedForward(AddNorm(DIM), nn.Linear(DIM, DIM))
    block = VimBlock(AddNorm(DIM), BidirectionalMamba(DIM, d_state=4), ffn=ffn).double()
    stream = torch.randn(2, 5, DIM, dtype=torch.float64)
    x, residual, found = block(stream)
    assert torch.equal(found, stream)
    for layer in (block.mixer, block.ffn.layer):
        expected = stream
        normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-5)
        stream = stream + layer(normed)
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(x + residual, stream)


def test_drop_path_before_the_feed_forward_drops_what_the_mixer_computed():
    ffn = FeedForward(AddNorm(DIM), _Zero(), drop_path=0.5)
    block = VimBlock(AddNorm(DIM), nn.Identity(), ffn=ffn).double().train()
    x = torch.ones(64, 3, DIM).double()
    added = (block(x)[1] - x).flatten(1)
    assert (added == added[:, :1]).all()
    assert len(added[:, 0].unique()) == 2
    assert (added == 0).any()
