"""The mixer: its directions, their merge, its symmetry, and the precision of its parameters."""

import math

import pytest
import torch
from torch import nn

from vim.layers import BidirectionalMamba, MambaBranch, mamba

DIM = 24
FLOAT32_PARAMETERS = {"A_log", "D", "dt_bias"}


def make_mixer(**kwargs):
    """Return a mixer in float64 whose parameters are not the initial ones."""
    mixer = BidirectionalMamba(DIM, **({"d_state": 4} | kwargs)).double()
    for parameter in mixer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return mixer


def tokens(length=7):
    return torch.randn(2, length, DIM, dtype=torch.float64)


def branches(mixer, x):
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    return mixer.forward_branch(x, z), mixer.backward_branch(x, z)


@pytest.mark.parametrize("length", [1, 2, 7], ids="L{}".format)
def test_branch_by_its_equations(length):
    branch = MambaBranch(6, d_state=4, d_conv=3, dt_rank=2, dtype=torch.float64).double()
    for parameter in branch.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, z = torch.randn(2, 2, length, 6, dtype=torch.float64)
    u = branch.conv1d(x)
    projected = u @ branch.x_proj.weight.T
    dt, B, C = projected[..., :2], projected[..., 2:6], projected[..., 6:]
    delta = torch.log1p(torch.exp(dt @ branch.dt_proj.weight.T + branch.dt_bias))
    A = -branch.A_log.exp()
    h = torch.zeros(2, 6, 4, dtype=torch.float64)
    expected = []
    for t in range(length):
        drive = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        h = torch.exp(delta[:, t, :, None] * A) * h + drive
        y = (h * C[:, t, None, :]).sum(-1) + branch.D * u[:, t]
        expected.append(y * z[:, t] / (1 + torch.exp(-z[:, t])))
    torch.testing.assert_close(branch(x, z), torch.stack(expected, dim=1))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_branch_is_causal(reverse):
    branch = MambaBranch(6, d_state=4, d_conv=4, dt_rank=2, reverse=reverse).double()
    x, z = torch.randn(2, 1, 9, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    differs = (branch(x, z) != branch(changed, z)).any(-1).flatten().nonzero().flatten().tolist()
    assert differs == (list(range(5)) if reverse else list(range(4, 9)))


@pytest.mark.parametrize(("merge", "scale"), [("mean", 0.5), ("sum", 1.0)], ids=["mean", "sum"])
def test_merge(merge, scale):
    mixer, x = make_mixer(merge=merge), tokens()
    forward, backward = branches(mixer, x)
    expected = scale * (forward + backward) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("norm_after_scan", [False, True])
def test_states_are_kept_where_asked(norm_after_scan, monkeypatch):
    asked = []
    mixer = mamba.bidirectional_mixer
    monkeypatch.setattr(
        mamba,
        "bidirectional_mixer",
        lambda *a, keep_states, **k: asked.append(keep_states) or mixer(*a, **k),
    )
    for keep_states in (False, True):
        make_mixer(norm_after_scan=norm_after_scan, keep_states=keep_states)(tokens())
    assert asked == [False, True]


def test_norm_after_scan_stands_between_merge_and_projection():
    mixer, x = make_mixer(norm_after_scan=True), tokens()
    merged = sum(branches(mixer, x)) / 2
    centred = merged - merged.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + mixer.norm.eps)
    expected = (normed * mixer.norm.weight + mixer.norm.bias) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_swapped_branches_see_the_flipped_sequence(merge):
    mixer, swapped, x = make_mixer(merge=merge), make_mixer(merge=merge), tokens()
    names = {"forward_branch": "backward_branch", "backward_branch": "forward_branch"}
    state = {}
    for key, value in mixer.state_dict().items():
        first, _, rest = key.partition(".")
        state[f"{names.get(first, first)}.{rest}"] = value
    swapped.load_state_dict(state)
    torch.testing.assert_close(swapped(x.flip(1)).flip(1), mixer(x))
    assert not torch.allclose(mixer(x.flip(1)).flip(1), mixer(x))


def test_every_token_sees_every_token():
    mixer, x = make_mixer(), tokens(5).requires_grad_()
    for t in range(5):
        (gradient,) = torch.autograd.grad(mixer(x)[:, t].sum(), x)
        assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"in_proj.weight": (96, 24), "forward_branch.dt_proj.weight": (48, 2)}),
        ({"dt_rank": 5}, {"backward_branch.dt_proj.weight": (48, 5)}),
        ({"expand": 1.5}, {"in_proj.weight": (72, 24), "out_proj.weight": (24, 36)}),
        ({"d_state": 3}, {"forward_branch.A_log": (48, 3)}),
        ({"d_conv": 3}, {"backward_branch.conv1d.weight": (48, 3)}),
        ({"bias": True}, {"in_proj.bias": (96,), "out_proj.bias": (24,)}),
    ],
    ids=["default", "dt_rank", "expand", "d_state", "d_conv", "bias"],
)
def test_options_set_shapes(options, shapes):
    mixer = BidirectionalMamba(DIM, **options)
    parameters = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert {name: parameters.get(name) for name in shapes} == shapes
    assert mixer(torch.randn(2, 5, DIM)).shape == (2, 5, DIM)


def test_projections_have_no_bias_where_none_is_asked_for():
    names = [name for name, _ in BidirectionalMamba(DIM).named_parameters()]
    biases = [name for name in names if name.endswith(".bias")]
    assert biases == ["forward_branch.conv1d.bias", "backward_branch.conv1d.bias"]


def test_initial_values():
    torch.manual_seed(0)
    branch = MambaBranch(2000, d_state=16, d_conv=4, dt_rank=9)
    dt = nn.functional.softplus(branch.dt_bias)
    assert 1e-3 * 0.999 < dt.min() < 1.1e-3
    assert 0.09 < dt.max() < 0.1 * 1.001
    middle = torch.tensor(1e-2).log()  # of a log-uniform distribution in [1e-3, 1e-1]
    assert abs(dt.log().mean() - middle) < 3 * math.log(100) / math.sqrt(12 * 2000)
    torch.testing.assert_close(branch.A_log.exp(), torch.arange(1.0, 17.0).expand(2000, 16))
    assert (branch.D == 1).all()
    assert 0.33 < branch.dt_proj.weight.abs().max() <= 1 / 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("way", ["cast", "constructor"])
def test_parameters_in_exponents_stay_float32(way, dtype):
    if way == "cast":
        branch = MambaBranch(6, 4, 4, 2)
        before = {name: p.detach().clone() for name, p in branch.named_parameters()}
        branch = branch.to(dtype)
        for name in FLOAT32_PARAMETERS:
            assert torch.equal(branch.get_parameter(name), before[name])
    else:
        branch = MambaBranch(6, 4, 4, 2, dtype=dtype)
    kept = {name for name, p in branch.named_parameters() if p.dtype == torch.float32}
    assert kept == FLOAT32_PARAMETERS
    assert {p.dtype for p in branch.parameters()} == {torch.float32, dtype}


def test_parameters_follow_to_a_higher_precision_and_another_device():
    branch = MambaBranch(6, 4, 4, 2)
    assert {p.dtype for p in branch.double().parameters()} == {torch.float64}
    assert {p.device.type for p in branch.to("meta").parameters()} == {"meta"}


def test_low_precision_keeps_the_device_of_the_cast():
    branch = MambaBranch(6, 4, 4, 2).to("meta", torch.bfloat16)
    assert {p.device.type for p in branch.parameters()} == {"meta"}
    assert branch.A_log.dtype == torch.float32


def test_unknown_merge():
    with pytest.raises(ValueError, match="merge must be 'mean' or 'sum', got 'max'"):
        BidirectionalMamba(DIM, merge="max")
