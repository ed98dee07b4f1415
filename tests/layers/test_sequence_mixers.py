"""The mixers beside Vim's by their papers' equations, in float64; and the state of those of one
direction."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vim.layers import (
    GRU,
    LSTM,
    RNN,
    S4D,
    Attention,
    BidirectionalMamba2,
    GatedConv,
    Mamba,
    Mamba2,
)
from vim.layers.s4d import S4DConvolution, s4d_kernels
from vim.ops import ssd_reference

DIM = 8
every_length = pytest.mark.parametrize("length", [1, 2, 7, 37], ids="L{}".format)


def perturbed(layer):
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


def tokens(length, batch=2):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@every_length
def test_attention(length):
    layer, x = perturbed(Attention(DIM, head_dim=4)), tokens(length)
    q, k, v = (x @ layer.in_proj.weight.T + layer.in_proj.bias).split(DIM, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = q[..., h] @ k[..., h].mT / math.sqrt(4)
        heads.append(scores.softmax(-1) @ v[..., h])
    expected = torch.cat(heads, -1) @ layer.out_proj.weight.T + layer.out_proj.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("window", [1, 3, 4, 7, 50], ids="window{}".format)
@every_length
def test_attention_in_windows_is_masked_attention(length, window):
    layer, x = perturbed(Attention(DIM, head_dim=4, window_size=window)), tokens(length)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in layer.in_proj(x).split(DIM, dim=-1))
    place = torch.arange(length) // window
    scores = (q @ k.mT / math.sqrt(4)).masked_fill(place[:, None] != place, -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out_proj(y))


def test_weights_do_not_depend_on_windows():
    whole, windows = Attention(DIM, 4), Attention(DIM, 4, window_size=5)
    windows.load_state_dict(whole.state_dict())
    x = tokens(5).float()
    torch.testing.assert_close(windows(x), whole(x))


def step_of(kind, gates_x, gates_h, h, c):
    """Return the state after a token, from W x + b and U h + b'."""
    if kind is RNN:
        return torch.tanh(gates_x + gates_h), c
    if kind is LSTM:
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (r, z, n), (hr, hz, hn) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
    n = torch.tanh(n + (r + hr).sigmoid() * hn)
    z = (z + hz).sigmoid()
    return (1 - z) * n + z * h, c


@pytest.mark.parametrize("kind", [LSTM, GRU, RNN], ids=["lstm", "gru", "rnn"])
@every_length
def test_recurrent(kind, length):
    layer, x = perturbed(kind(DIM, hidden_size=3)), tokens(length)
    outputs = []
    for suffix, order in (("", range(length)), ("_reverse", reversed(range(length)))):
        W, U, b, b_h = (
            getattr(layer.rnn, f"{name}_l0{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, c = x.new_zeros(2, 2, 3)
        y = [h] * length
        for t in order:
            h, c = step_of(kind, x[:, t] @ W.T + b, h @ U.T + b_h, h, c)
            y[t] = h
        outputs.append(torch.stack(y, 1))
    torch.testing.assert_close(layer(x), torch.cat(outputs, -1) @ layer.out_proj.weight.T)


def test_hidden_size_is_half_the_features_by_default():
    assert LSTM(DIM).rnn.hidden_size == DIM // 2


@every_length
def test_gated_conv(length):
    layer, x = perturbed(GatedConv(DIM, d_conv=5)), tokens(length)
    u, z = (x @ layer.in_proj.weight.T).chunk(2, -1)
    y = torch.zeros_like(u) + layer.conv1d.bias
    for t in range(length):
        for k in range(5):
            if 0 <= t + k - 2 < length:
                y[:, t] += layer.conv1d.weight[:, k] * u[:, t + k - 2]
    expected = (y * z * z.sigmoid()) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), expected)


@every_length
@pytest.mark.parametrize("init", ["lin", "inv", "real"])
def test_s4d(init, length):
    """By its recurrence, discretised by zero-order hold, in either direction."""
    layer, x = perturbed(S4D(DIM, d_state=6, init=init)), tokens(length)
    ssm = layer.s4d
    u, z = (x @ layer.in_proj.weight.T).chunk(2, -1)
    eigenvalues = torch.complex(-ssm.A_log.exp(), ssm.A_imag)
    A = torch.exp(ssm.log_dt.exp()[:, None] * eigenvalues)
    B = (A - 1) / eigenvalues
    y = ssm.D * u
    for C, order in zip(ssm.C, (range(length), reversed(range(length))), strict=True):
        h = torch.zeros(2, 2 * DIM, 3, dtype=torch.complex128)
        for t in order:
            h = A * h + B * u[:, t, :, None]
            y[:, t] += 2 * (torch.view_as_complex(C) * h).sum(-1).real
    expected = (y * F.silu(z)) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 100, 197])
def test_s4d_kernel(length):
    ssm = S4DConvolution(4, 6).double()
    kernels = s4d_kernels(length, ssm.log_dt, ssm.A_log, ssm.A_imag, ssm.C)
    eigenvalues = torch.complex(-ssm.A_log.exp(), ssm.A_imag)
    steps = ssm.log_dt.exp()[:, None] * eigenvalues
    powers = torch.exp(steps[..., None] * torch.arange(length))
    C = torch.view_as_complex(ssm.C) * (torch.exp(steps) - 1) / eigenvalues
    torch.testing.assert_close(kernels, 2 * (C[..., None] * powers).sum(-2).real)


def test_s4d_initial_values():
    modes = torch.arange(32)
    expected = {
        "lin": (torch.full((32,), -0.5), math.pi * modes),
        "inv": (torch.full((32,), -0.5), 64 / math.pi * (64 / (2 * modes + 1) - 1)),
        "real": (-(modes + 1.0), torch.zeros(32)),
    }
    for init, (real, imag) in expected.items():
        ssm = S4DConvolution(3, 64, init)
        torch.testing.assert_close(-ssm.A_log.exp(), real.expand(3, 32))
        torch.testing.assert_close(ssm.A_imag, imag.expand(3, 32))
        assert 1e-3 <= ssm.log_dt.exp().min() <= ssm.log_dt.exp().max() <= 1e-1


@every_length
def test_mamba2(length):
    layer = perturbed(BidirectionalMamba2(DIM, d_state=3, head_dim=4, chunk_size=8))
    x = tokens(length)
    parts = (x @ layer.in_proj.weight.T).split([16, 16, 6, 6, 4, 4], dim=-1)
    z, u, total = parts[0], parts[1], 0
    for i, conv in enumerate((layer.forward_conv1d, layer.backward_conv1d)):
        uBC, dt = conv(torch.cat([u, parts[2 + i]], -1)), parts[4 + i]
        dt = F.softplus(dt + layer.dt_bias[i])
        tensors = [t.flip(1) if i else t for t in (dt, *uBC.split([16, 3, 3], dim=-1))]
        dt, v, B, C = tensors
        v = v.unflatten(-1, (4, 4))
        y = ssd_reference(v, dt, -layer.A_log[i].exp(), B, C)[0] + layer.D[i][:, None] * v
        total = total + (y.flip(1) if i else y).flatten(2) / 2
    y = total * F.silu(z)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
    torch.testing.assert_close(layer(x), y @ layer.out_proj.weight.T)


@every_length
def test_causal_mamba2(length):
    layer = perturbed(Mamba2(DIM, d_state=3, head_dim=4, chunk_size=8))
    x = tokens(length)
    z, uBC, dt = (x @ layer.in_proj.weight.T).split([16, 22, 4], dim=-1)
    padded = F.pad(uBC, (0, 0, 3, 0))
    conv = sum(layer.conv1d.weight[:, k] * padded[:, k : k + length] for k in range(4))
    u, B, C = F.silu(conv + layer.conv1d.bias).split([16, 3, 3], dim=-1)
    u = u.unflatten(-1, (4, 4))
    y, _ = ssd_reference(u, F.softplus(dt + layer.dt_bias), -layer.A_log.exp(), B, C)
    y = (y + layer.D[:, None] * u).flatten(2) * F.silu(z)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
    torch.testing.assert_close(layer(x), y @ layer.out_proj.weight.T)


@pytest.mark.parametrize("kind", [BidirectionalMamba2, Mamba2], ids=["both", "one"])
def test_mamba2_initial_values(kind):
    layer = kind(512)
    assert 1 <= layer.A_log.exp().min() <= layer.A_log.exp().max() <= 16
    dt = F.softplus(layer.dt_bias)
    assert 1e-3 * 0.999 < dt.min() <= dt.max() < 1e-1 * 1.001
    assert (layer.D == 1).all()


@pytest.mark.parametrize(
    "layer",
    [BidirectionalMamba2(64), Mamba2(64), S4D(16)],
    ids=["mamba2", "causal_mamba2", "s4d"],
)
def test_parameters_in_exponents_stay_float32(layer):
    layer = layer.bfloat16()
    kept = {n.rpartition(".")[2] for n, p in layer.named_parameters() if p.dtype == torch.float32}
    assert kept >= {"A_log", "D"}
    assert layer.in_proj.weight.dtype == torch.bfloat16


# Mixers of one direction, with their state

CAUSAL = {
    "mamba": partial(Mamba, DIM, d_state=3),
    "causal_mamba2": partial(Mamba2, DIM, d_state=3, head_dim=4, chunk_size=4),
}
every_causal = pytest.mark.parametrize("kind", CAUSAL)


@every_length
def test_mamba_by_its_branch(length):
    layer, x = perturbed(CAUSAL["mamba"]()), tokens(length)
    u, z = (x @ layer.in_proj.weight.T).chunk(2, -1)
    torch.testing.assert_close(layer(x), layer.branch(u, z) @ layer.out_proj.weight.T)


@every_causal
@every_length
@pytest.mark.parametrize("d_conv", [1, 2, 4], ids="K{}".format)
def test_token_by_token_equals_the_sequence(kind, length, d_conv):
    layer, x = perturbed(CAUSAL[kind](d_conv=d_conv)), tokens(length)
    state, outputs = None, []
    for t in range(length):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(x))
    torch.testing.assert_close(state, layer.scan(x)[1])


@every_causal
@pytest.mark.parametrize("cuts", [[1], [6], [2, 3, 9]], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_chunks_equal_the_sequence_and_pass_gradients(kind, cuts, reverse):
    layer, x = perturbed(CAUSAL[kind](reverse=reverse)), tokens(13).requires_grad_()
    chunks = list(x.tensor_split(cuts, dim=1))
    state, outputs = None, []
    for chunk in reversed(chunks) if reverse else chunks:
        y, state = layer.scan(chunk, state)
        outputs.append(y)
    y = torch.cat(outputs[::-1] if reverse else outputs, 1)
    torch.testing.assert_close(y, layer(x))
    wanted = [x, *layer.parameters()]
    weights = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weights).sum(), wanted),
        torch.autograd.grad((layer(x) * weights).sum(), wanted),
    )


@every_causal
def test_gradcheck_of_the_state(kind):
    layer, x = perturbed(CAUSAL[kind]()), tokens(3, batch=1).requires_grad_()
    conv, ssm = (torch.randn_like(t).requires_grad_() for t in layer.scan(x)[1])

    def function(x, conv, ssm):
        y, state = layer.scan(x, (conv, ssm))
        return y, *state

    assert torch.autograd.gradcheck(function, (x, conv, ssm), fast_mode=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(DIM, head_dim=3), "head_dim must divide dim = 8, got 3"),
        (lambda: Attention(DIM, 4, window_size=0), "window_size must be at least 1, got 0"),
        (lambda: GatedConv(DIM, d_conv=4), "d_conv must be odd"),
        (lambda: S4D(DIM, d_state=3), "d_state must be even and positive, got 3"),
        (lambda: S4D(DIM, init="legs"), "init must be 'lin', 'inv' or 'real', got 'legs'"),
        (lambda: BidirectionalMamba2(DIM, head_dim=5), "head_dim must divide expand .* = 16"),
        (lambda: Mamba2(DIM, head_dim=5), "head_dim must divide expand .* = 16"),
    ],
    ids=["attention", "windows", "gated_conv", "s4d_state", "s4d_init", "mamba2", "causal_mamba2"],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
