"""Experts: each token's output, places in line, what is dropped, and the loss of the balance."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from vim.layers import MixtureOfExperts, load_balance_loss

DIM = 8
every_k = pytest.mark.parametrize("top_k", [1, 2, 4], ids="k{}".format)


def make(**kwargs):
    return MixtureOfExperts(DIM, **({"num_experts": 4, "ratio": 2.0} | kwargs)).double()


def tokens(batch=3, length=13):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def by_hand(moe, x):
    """Return the output, the load and the dropped choices, one token after another."""
    y = torch.zeros_like(x)
    load, dropped, loss = [0] * moe.num_experts, 0, 0
    for b, image in enumerate(x):
        p = (image @ moe.router.weight.T).softmax(-1)
        order = p.argsort(-1, descending=True)
        places = [0] * moe.num_experts
        for rank in range(moe.top_k):
            for t in range(len(image)):
                e = int(order[t, rank])
                chosen = p[t, order[t, : moe.top_k]]
                gate = p[t, e] if moe.top_k == 1 else p[t, e] / chosen.sum()
                places[e] += 1
                if places[e] > moe.places(len(image)):
                    dropped += 1
                    continue
                load[e] += 1
                hidden = F.gelu(image[t] @ moe.fc1.weight[e].T + moe.fc1.bias[e, 0])
                y[b, t] += gate * (hidden @ moe.fc2.weight[e].T + moe.fc2.bias[e, 0])
        first = F.one_hot(order[:, 0], moe.num_experts).double()
        loss += moe.num_experts * (first.mean(0) * p.mean(0)).sum() / len(x)
    return y, load, dropped, loss


@every_k
@pytest.mark.parametrize("factor", [0.3, 1.0, 10.0], ids="factor{}".format)
@pytest.mark.parametrize("length", [1, 13], ids="L{}".format)
def test_by_its_equations(top_k, factor, length):
    moe, x = make(top_k=top_k, capacity_factor=factor), tokens(length=length)
    y, load, dropped, loss = by_hand(moe, x)
    torch.testing.assert_close(moe(x), y)
    assert moe.load.tolist() == load
    assert moe.dropped == dropped
    assert moe.load.sum() + moe.dropped == 3 * length * top_k
    torch.testing.assert_close(moe.aux_loss, loss)
    assert factor < 10 or dropped == 0


def test_places():
    moe = make(top_k=2, capacity_factor=1.0, eval_capacity_factor=2.0)
    assert moe.places(13) == math.ceil(2 * 13 / 4)
    assert moe.eval().places(13) == 13  # no more than there are tokens
    assert make().places(1) == 1


def test_later_tokens_are_dropped():
    moe, x = make(capacity_factor=1.0), tokens(1, 1).expand(1, 8, DIM)
    y = moe(x)
    assert (y[0, :2] != 0).all()
    assert (y[0, 2:] == 0).all()
    assert sorted(moe.load.tolist()) == [0, 0, 0, 2]
    assert moe.dropped == 6


def test_balance_is_one_where_the_load_is_even_and_larger_where_it_is_not():
    moe = make()
    with torch.no_grad():
        moe.router.weight.copy_(100 * torch.eye(4, DIM))
    even = torch.eye(4, DIM, dtype=torch.float64).repeat(1, 4, 1)
    moe(even)
    assert moe.aux_loss.item() == pytest.approx(1)
    assert moe.load.tolist() == [4] * 4
    assert moe.dropped == 0
    moe(even[:, :1].expand(1, 16, DIM))
    assert moe.aux_loss.item() == pytest.approx(4)


def test_random_tokens_are_nearly_balanced():
    moe = make(num_experts=8, capacity_factor=2.0)
    moe(tokens(16, 197))
    assert moe.dropped < 0.1 * 16 * 197
    assert 0.95 < moe.aux_loss < 1.3


@every_k
def test_processes_that_share_a_batch_agree_with_one(top_k):
    """Each computes its images; gradients and losses are averaged, as DDP does."""
    moe, x = make(top_k=top_k, capacity_factor=0.8), tokens(4)

    def step(images):
        moe.zero_grad()
        y = moe(images)
        (y.square().mean() + 0.01 * moe.aux_loss).backward()
        gradients = torch.cat([p.grad.flatten() for p in moe.parameters()])
        return y.detach(), gradients, moe.aux_loss.detach(), moe.load, moe.dropped

    whole = step(x)
    halves = [step(half) for half in x.chunk(2)]
    y, gradients, loss, load, dropped = zip(*halves, strict=True)
    torch.testing.assert_close(torch.cat(y), whole[0])
    torch.testing.assert_close(sum(gradients) / 2, whole[1])
    torch.testing.assert_close(sum(loss) / 2, whole[2])
    assert torch.equal(sum(load), whole[3])
    assert sum(dropped) == whole[4]


def test_the_router_learns_from_output_and_loss():
    moe = make()
    moe(tokens()).square().sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0
    moe.zero_grad()
    moe(tokens())
    load_balance_loss(moe).backward()
    assert moe.router.weight.grad.abs().sum() > 0
    assert moe.fc1.weight.grad is None


def test_a_pass_is_no_obstacle_to_copies():
    moe = make()
    moe(tokens())
    assert copy.deepcopy(moe).aux_loss == 0
    assert pickle.loads(pickle.dumps(moe)).dropped == 0
    assert moe.aux_loss > 0


def test_compiled_and_checkpointed_losses():
    moe, x = make(), tokens()
    y = moe(x)
    expected = torch.autograd.grad(y.sum() + moe.aux_loss, list(moe.parameters()))
    load, loss = moe.load, moe.aux_loss
    torch.compile(moe, fullgraph=True, backend="aot_eager")(x)
    actual = torch.compile(moe, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(moe.aux_loss, loss)
    assert torch.equal(moe.load, load)
    gradients = torch.autograd.grad(actual.sum() + moe.aux_loss, list(moe.parameters()))
    torch.testing.assert_close(gradients, expected)
    y = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
    gradients = torch.autograd.grad(y.sum() + moe.aux_loss, list(moe.parameters()))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k must be from 1 to num_experts = 4, got 5"),
        ({"capacity_factor": 0}, "capacity_factor must be positive, got 0"),
        ({"eval_capacity_factor": -1}, "eval_capacity_factor must be positive, got -1"),
    ],
    ids=["top_k", "capacity", "eval_capacity"],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
