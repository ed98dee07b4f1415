"""The forks' names: against the forks' mathematics in float64, in their layout, with flips."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vim.layers import compat
from vim.layers.compat import Mamba

BATCH, LENGTH, DIM, STATE, RANK, WIDTH = 2, 12, 6, 4, 2, 4


def naive_scan(u, delta, A, B, C, D=None, z=None, bias=None, softplus=False):
    """(B, D, L) in, (B, D, L) and (B, D, N) out; B, C (B, D, N, L)."""
    if bias is not None:
        delta = delta + bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype)
    ys = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t, None]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def naive_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, A, D, dt_bias):
    x, z = xz.chunk(2, dim=1)
    padded = F.pad(x, (conv_weight.shape[-1] - 1, 0))
    u = F.silu(F.conv1d(padded, conv_weight, conv_bias, groups=x.shape[1]))
    rank, state = dt_proj.shape[1], A.shape[1]
    dt, B, C = (x_proj @ u).split([rank, state, state], dim=1)
    B, C = (m[:, None].expand(-1, x.shape[1], -1, -1) for m in (B, C))
    return naive_scan(u, dt_proj @ dt, A, B, C, D, z, dt_bias, True)[0]


def randn(*size):
    return torch.randn(*size, dtype=torch.float64)


def inner_weights():
    return [
        randn(DIM, 1, WIDTH),
        randn(DIM),
        randn(RANK + 2 * STATE, DIM),
        randn(DIM, RANK),
    ]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["variable", "grouped", "constant", "mixed"])
def test_selective_scan_fn(kind):
    u, delta, z = (randn(BATCH, DIM, LENGTH).requires_grad_() for _ in range(3))
    A, D, bias = -torch.rand(DIM, STATE, dtype=torch.float64), randn(DIM), randn(DIM)
    shapes = {
        "variable": [(BATCH, STATE, LENGTH)] * 2,
        "grouped": [(BATCH, 2, STATE, LENGTH)] * 2,
        "constant": [(DIM, STATE)] * 2,
        "mixed": [(DIM, STATE), (BATCH, STATE, LENGTH)],
    }[kind]
    B, C = (randn(*shape) for shape in shapes)

    def whole(x):
        if x.dim() == 2:
            return x[None, :, :, None].expand(BATCH, -1, -1, LENGTH)
        x = x[:, None] if x.dim() == 3 else x
        return x.repeat_interleave(DIM // x.shape[1], dim=1)

    y, state = compat.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    expected, expected_state = naive_scan(u, delta, A, whole(B), whole(C), D, z, bias, True)
    assert_same(y, expected)
    assert_same(state, expected_state)
    assert_same(
        torch.autograd.grad(y.sum(), (u, delta, z)),
        torch.autograd.grad(expected.sum(), (u, delta, z)),
    )


def test_selective_scan_fn_refuses_complex_states():
    u = torch.randn(1, 2, 3)
    with pytest.raises(TypeError, match="A must be real"):
        compat.selective_scan_fn(u, u, torch.randn(2, 2) * 1j, u, u)


def test_inner_functions():
    xz, weights = randn(BATCH, 2 * DIM, LENGTH), inner_weights()
    A, A_b = (-torch.rand(DIM, STATE, dtype=torch.float64) for _ in range(2))
    D, bias, out = randn(DIM), randn(DIM), randn(3, DIM)
    options = {"D": D, "delta_bias": bias}
    y = compat.mamba_inner_fn_no_out_proj(xz, *weights, A, **options)
    expected = naive_inner(xz, *weights, A, D, bias)
    assert_same(y, expected)
    y = compat.mamba_inner_fn(xz, *weights, out, None, A, **options)
    assert_same(y, expected.transpose(1, 2) @ out.T)
    y = compat.bimamba_inner_fn(xz, *weights, out, None, A, A_b, **options)

    x, z = xz.chunk(2, dim=1)
    u = F.silu(F.conv1d(F.pad(x, (WIDTH - 1, 0)), weights[0], weights[1], groups=DIM))
    dt, B, C = (weights[2] @ u).split([RANK, STATE, STATE], dim=1)
    B, C = (m[:, None].expand(-1, DIM, -1, -1) for m in (B, C))
    args = u, weights[3] @ dt, B, C, z
    forward = naive_scan(args[0], args[1], A, args[2], args[3], D, z, bias, True)[0]
    u, dt, B, C, z = (a.flip(-1) for a in args)
    backward = naive_scan(u, dt, A_b, B, C, D, z, bias, True)[0].flip(-1)
    assert_same(y, (forward + backward).transpose(1, 2) @ out.T)


def test_causal_conv1d_fn_by_every_signature():
    x, weight, bias = randn(BATCH, DIM, LENGTH), randn(DIM, WIDTH), randn(DIM)
    padded = F.pad(x, (WIDTH - 1, 0))
    expected = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=DIM))
    assert_same(compat.causal_conv1d_fn(x, weight, bias, activation="silu"), expected)
    assert_same(compat.causal_conv1d_fn(x, weight, bias, "swish"), expected)
    first, state = compat.causal_conv1d_fn(
        x[..., :5], weight, bias, return_final_states=True, activation="silu"
    )
    rest = compat.causal_conv1d_fn(
        x[..., 5:], weight, bias, initial_states=state, activation="silu"
    )
    assert_same(torch.cat([first, rest], -1), expected)
    with pytest.raises(ValueError, match="seq_idx must be None"):
        compat.causal_conv1d_fn(x, weight, bias, torch.zeros(2, 12))


def randomised(**options):
    module = Mamba(DIM // 2, STATE, WIDTH, dt_rank=RANK, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def naive_direction(m, xz, suffix):
    conv, dt_proj = getattr(m, f"conv1d{suffix}"), getattr(m, f"dt_proj{suffix}")
    return naive_inner(
        xz,
        conv.weight,
        conv.bias,
        getattr(m, f"x_proj{suffix}").weight,
        dt_proj.weight,
        -getattr(m, f"A{suffix}_log").exp(),
        getattr(m, f"D{suffix}"),
        dt_proj.bias,
    )


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"bimamba_type": "none"}, 1),
        ({"bimamba_type": "v2"}, 1),
        ({"bimamba_type": "v2", "if_divide_out": True}, 0.5),
        ({"bimamba_type": "v2", "if_devide_out": True, "conv_bias": False}, 0.5),
        ({"bimamba": True}, 1),
        ({"bimamba_type": "v3", "nslices": 3}, 1),
        ({"bimamba_type": "v2", "init_layer_scale": 0.1, "bias": True}, 1),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_mixer_of_the_forks(options, scale):
    m = randomised(**options)
    h = randn(BATCH, LENGTH, DIM // 2).requires_grad_()
    xz = m.in_proj(h).transpose(1, 2)
    y = naive_direction(m, xz, "")
    if m.bimamba_type != "none":
        y = y + naive_direction(m, xz.flip(-1), "_b").flip(-1)
    if m.bimamba_type == "v3":
        order = torch.stack(torch.arange(LENGTH).chunk(m.nslices), -1).flatten()
        y = y + naive_direction(m, xz[..., order], "_s")[..., order.argsort()]
    expected = m.out_proj(scale * y.transpose(1, 2))
    expected = expected if m.gamma is None else expected * m.gamma
    out = m(h)
    assert_same(out, expected)
    tensors = [h, *m.parameters()]
    assert_same(
        torch.autograd.grad(out.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
    )


def test_parameter_names_are_the_forks():
    names = {n for n, _ in Mamba(8, bimamba_type="v2").named_parameters()}
    directions = {
        f"{n.format(b=b)}"
        for b in ("", "_b")
        for n in (
            "A{b}_log",
            "D{b}",
            "conv1d{b}.weight",
            "conv1d{b}.bias",
            "x_proj{b}.weight",
            "dt_proj{b}.weight",
            "dt_proj{b}.bias",
        )
    }
    assert names == {"in_proj.weight", "out_proj.weight"} | directions
    assert "A_b_log" in dict(Mamba(8, bimamba_type="v1").named_parameters())


def test_stepping_equals_the_whole():
    m = randomised(layer_idx=0)
    h = randn(BATCH, LENGTH, DIM // 2)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    m_out = m(h)
    parts = [m(chunk, inference_params=params) for chunk in h.split([5, 1, 6], dim=1)]
    # The cached state is float32, as in mamba_ssm.
    torch.testing.assert_close(torch.cat(parts, 1), m_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["v1", "v2", "v3"])
def test_two_directions_are_never_stepped(kind):
    m = Mamba(8, bimamba_type=kind, layer_idx=0)
    params = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    with pytest.raises(ValueError, match="cannot be stepped"):
        m(torch.randn(1, 5, 8), inference_params=params)
    with pytest.raises(ValueError, match="cannot be stepped"):
        m.step(torch.randn(1, 1, 8), None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bimamba_type": "v4"}, "bimamba_type must be one of none, v1, v2, v3"),
        ({"dt_init": "zero"}, "dt_init must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba(8, **options)


def test_slices_must_divide_the_tokens():
    with pytest.raises(ValueError, match="multiple of nslices = 5, got 7"):
        Mamba(8, bimamba_type="v3")(torch.randn(1, 7, 8))
