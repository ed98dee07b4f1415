"""What is asked of every mixer: shapes, gradients, directions, precision, ways of running it."""

import io
from functools import partial

import pytest
import torch

from vim.layers import FFNS, MIXERS, build_ffns, build_mixers

DIM = 16
OPTIONS = {
    "attention": {"head_dim": 8},
    "mamba2": {"head_dim": 8, "d_state": 4, "chunk_size": 8},
    "mamba3": {"head_dim": 8, "d_state": 4, "chunk_size": 8},
    "causal_mamba2": {"head_dim": 8, "d_state": 4, "chunk_size": 8},
    "s4d": {"d_state": 6},
    "bimamba": {"d_state": 4},
    "mamba": {"d_state": 4},
    "moe": {"num_experts": 4, "ratio": 2},
}
LAYERS = {
    name: partial(maker, DIM, **OPTIONS.get(name, {}))
    for name, maker in (MIXERS | FFNS).items()
    if name != "none"
}
LAYERS["attention_windows"] = partial(LAYERS["attention"], window_size=4)
LAYERS["mamba_reverse"] = partial(LAYERS["mamba"], reverse=True)
LAYERS["causal_mamba2_reverse"] = partial(LAYERS["causal_mamba2"], reverse=True)
LAYERS["moe_top2"] = partial(LAYERS["moe"], top_k=2)
LAYERS["s4d_inv"] = partial(LAYERS["s4d"], init="inv")
LAYERS["s4d_real"] = partial(LAYERS["s4d"], init="real")
every_layer = pytest.mark.parametrize("name", LAYERS)
EVERY_TOKEN = {"attention", "bimamba", "gru", "lstm", "mamba2", "mamba3", "rnn", "s4d"}


def make(name, dtype=torch.float64, **kwargs):
    """Return a layer whose parameters are not the initial ones."""
    layer = LAYERS[name](**kwargs).to(dtype)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


def tokens(length=7, batch=2, dtype=torch.float64):
    return torch.randn(batch, length, DIM, dtype=dtype)


@every_layer
@pytest.mark.parametrize("length", [1, 2, 9, 31], ids="L{}".format)
def test_forward_and_backward(name, length):
    layer, x = make(name, torch.float32), tokens(length, dtype=torch.float32).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    for parameter, p in layer.named_parameters():
        assert p.grad is not None, parameter
        assert p.grad.isfinite().all(), parameter


@every_layer
def test_every_weight_takes_part(name):
    layer = make(name)
    layer(tokens(33, batch=4)).square().sum().backward()
    for parameter, p in layer.named_parameters():
        assert (p.grad != 0).any(), parameter


@every_layer
def test_gradcheck(name):
    layer, x = make(name), tokens(4, batch=1)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [v.detach().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *values), fast_mode=True)


@every_layer
def test_batch_items_are_independent(name):
    layer, x = make(name), tokens(batch=3)
    torch.testing.assert_close(torch.cat([layer(item) for item in x.split(1)]), layer(x))


@pytest.mark.parametrize("name", MIXERS)
def test_which_tokens_a_token_sees(name):
    layer, x = make(name), tokens(9, batch=1).requires_grad_()
    seen = []
    for t in range(9):
        (gradient,) = torch.autograd.grad(layer(x)[:, t].sum(), x)
        seen.append((gradient.abs().sum(-1) > 0).flatten().nonzero().flatten().tolist())
    if name in EVERY_TOKEN:
        expected = [list(range(9))] * 9
    elif name in ("mamba", "causal_mamba2"):
        expected = [list(range(t + 1)) for t in range(9)]
    else:
        assert name == "gated_conv"
        expected = [list(range(max(t - 3, 0), min(t + 4, 9))) for t in range(9)]
    assert seen == expected


@pytest.mark.parametrize("name", ["mamba", "causal_mamba2"])
def test_the_other_direction_is_the_flipped_sequence(name):
    layer, reverse, x = make(name), make(f"{name}_reverse"), tokens()
    reverse.load_state_dict(layer.state_dict())
    torch.testing.assert_close(reverse(x.flip(1)).flip(1), layer(x))


def swapped(name, key, value):
    """Return the key and value with which a parameter stands in the mixer of swapped directions."""
    if name in ("gru", "lstm", "rnn") and key.startswith("rnn."):
        other = key.removesuffix("_reverse")
        return (other if other != key else f"{key}_reverse"), value
    if name in ("gru", "lstm", "rnn"):
        return key, value.unflatten(1, (2, -1)).flip(1).flatten(1)
    if name == "s4d":
        return key, value.flip(0) if key == "s4d.C" else value
    if name == "mamba2":
        if key in ("A_log", "D", "dt_bias"):
            return key, value.flip(0)
        if key == "in_proj.weight":
            z, x, first, second, dt, other = value.split([32, 32, 8, 8, 4, 4])
            return key, torch.cat([z, x, second, first, other, dt])
        names = {"forward_conv1d": "backward_conv1d", "backward_conv1d": "forward_conv1d"}
        first, _, rest = key.partition(".")
        return f"{names.get(first, first)}.{rest}", value
    assert name in ("attention", "gated_conv")
    return key, value.flip(-1) if key == "conv1d.weight" else value


@pytest.mark.parametrize("name", ["attention", "gated_conv", "gru", "lstm", "mamba2", "rnn", "s4d"])
def test_swapped_directions_see_the_flipped_sequence(name):
    layer, other, x = make(name), make(name), tokens(13)
    other.load_state_dict(dict(swapped(name, k, v) for k, v in layer.state_dict().items()))
    torch.testing.assert_close(other(x.flip(1)).flip(1), layer(x))
    if name != "attention":
        assert not torch.allclose(layer(x.flip(1)).flip(1), layer(x))


@every_layer
@pytest.mark.parametrize("way", ["cast", "constructor"])
def test_bfloat16(name, way):
    """Of the size of the rounding: of the output at least, of the parameters at most."""
    torch.manual_seed(0)
    layer = LAYERS[name]() if way == "cast" else LAYERS[name](dtype=torch.bfloat16)
    layer = layer.bfloat16().eval()
    x = tokens(19, dtype=torch.bfloat16)
    truth = LAYERS[name]().double().eval()
    truth.load_state_dict(layer.state_dict())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = truth(x.double())
    error = (y.double() - expected).norm() / expected.norm()
    assert error < (0.2 if name.startswith("moe") else 0.02)  # a tie may go to another expert


@every_layer
def test_autocast(name):
    layer, x = make(name, torch.float32).eval(), tokens(19, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    error = (y.float() - layer(x)).norm() / layer(x).norm()
    assert error < (0.2 if name.startswith("moe") else 0.03)


@every_layer
def test_compile(name):
    layer, x = make(name), tokens(11)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    y.square().sum().backward()
    actual = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(actual, [p.grad for p in layer.parameters()])


@every_layer
def test_torchscript(name):
    layer, x = make(name), tokens(11).requires_grad_()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x), layer(x))
    actual, expected = (torch.autograd.grad(f(x).square().sum(), x) for f in (loaded, layer))
    torch.testing.assert_close(actual, expected)


# By name


def test_a_choice_for_all_blocks_or_one_for_each():
    mixers = build_mixers("gated_conv", 3, DIM, {})
    assert [type(m) for m in mixers] == [MIXERS["gated_conv"]] * 3
    assert len({id(m) for m in mixers}) == 3
    choices = ["lstm", {"name": "mamba", "reverse": True, "d_state": 3}, lambda dim, **dd: DIM]
    lstm, mamba, own = build_mixers(choices, 3, DIM, {})
    assert isinstance(lstm, MIXERS["lstm"])
    assert mamba.branch.reverse
    assert mamba.branch.A_log.shape[1] == 3
    assert own == DIM


def test_the_models_options_go_to_bimamba():
    first, second = build_mixers(
        ["bimamba", {"name": "bimamba", "d_state": 5}], 2, DIM, {"d_state": 3, "d_conv": 2}
    )
    assert first.forward_branch.A_log.shape[1] == 3
    assert second.forward_branch.A_log.shape[1] == 5
    assert second.forward_branch.conv1d.weight.shape[1] == 2


def test_options_that_nothing_takes():
    with pytest.raises(ValueError, match="d_state of the model go to 'bimamba' alone"):
        build_mixers("mamba", 2, DIM, {"d_state": 8, "d_conv": 4})
    with pytest.raises(TypeError, match="d_stat"):
        build_mixers({"name": "mamba", "d_stat": 8}, 2, DIM, {})


@pytest.mark.parametrize(
    ("build", "choice", "message"),
    [
        (build_ffns, "mpl", "ffn must be one of mlp, moe, none, swiglu, or callable, got 'mpl'"),
        (build_ffns, {"ratio": 3}, "ffn must be one of .* got None"),
        (build_ffns, ["mlp"], "ffn must be one, or a list of depth = 2, got 1"),
        (partial(build_mixers, bimamba={}), "vim", "mixer must be one of attention, .* got 'vim'"),
    ],
)
def test_unknown_choices(build, choice, message):
    with pytest.raises(ValueError, match=message):
        build(choice, depth=2, dim=DIM)


def test_none_is_no_feed_forward():
    first, second = build_ffns(["none", {"name": "swiglu", "ratio": 2.0}], 2, DIM)
    assert first is None
    assert second.fc2.weight.shape == (DIM, 2 * DIM)
