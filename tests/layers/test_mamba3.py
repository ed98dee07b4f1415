"""Mamba-3 by its equations, one token after another; directions; what it alone can do."""

import math

import pytest
import torch
import torch.nn.functional as F

from vim.layers import BidirectionalMamba3
from vim.ops import ssd_trapezoidal_reference

DIM, STATES, HEAD, ANGLES = 16, 8, 8, 2


def make(**kwargs):
    options = {"d_state": STATES, "head_dim": HEAD, "chunk_size": 8}
    layer = BidirectionalMamba3(DIM, **(options | kwargs)).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def one_direction(layer, i, x, B, C, gates, angles):
    """Return y of a direction by the equations of the docstring; the input is in its order."""
    dt, A, share = gates.chunk(3, dim=-1)
    dt = F.softplus(dt + layer.dt_bias[i])
    A = -torch.where(A >= 0, 1 + A, 1 / (1 - A))
    B = F.rms_norm(B, (STATES,), layer.B_weight, 1e-5).unsqueeze(2) + layer.B_bias[i]
    C = F.rms_norm(C, (STATES,), layer.C_weight, 1e-5).unsqueeze(2) + layer.C_bias[i]
    phi = torch.cumsum(dt.unsqueeze(-1) * math.pi * torch.tanh(angles).unsqueeze(2), dim=1)
    turn = torch.polar(torch.ones_like(phi), phi)
    count = phi.shape[-1]

    def turned(tensor):
        pairs = torch.view_as_complex(tensor[..., : 2 * count].unflatten(-1, (-1, 2)).contiguous())
        pairs = torch.view_as_real(pairs * turn).flatten(-2)
        return torch.cat([pairs, tensor[..., 2 * count :]], dim=-1)

    x = x.unflatten(-1, (-1, HEAD))
    y = ssd_trapezoidal_reference(x, dt, A, share.sigmoid(), turned(B), turned(C))
    return (y + layer.D[i].unsqueeze(-1) * x).flatten(2)


@pytest.mark.parametrize("fraction", [0.5, 1.0], ids="rope{}".format)
@pytest.mark.parametrize("length", [1, 21], ids="L{}".format)
def test_by_its_equations(fraction, length):
    layer, tokens = make(rope_fraction=fraction), torch.randn(2, length, DIM, dtype=torch.float64)
    heads, angles = 2 * DIM // HEAD, int(STATES * fraction) // 2
    sizes = [2 * DIM, 2 * DIM, *[STATES] * 4, *[3 * heads] * 2, *[angles] * 2]
    z, x, *rest = layer.in_proj(tokens).split(sizes, dim=-1)
    B_f, C_f, B_b, C_b, gates_f, gates_b, angles_f, angles_b = rest
    y = one_direction(layer, 0, x, B_f, C_f, gates_f, angles_f)
    flipped = (t.flip(1) for t in (x, B_b, C_b, gates_b, angles_b))
    y = 0.5 * (y + one_direction(layer, 1, *flipped).flip(1))
    torch.testing.assert_close(layer(tokens), layer.out_proj(y * F.silu(z)))


def test_swapped_directions_see_the_flipped_sequence():
    layer, other = make(), make()
    x = torch.randn(2, 19, DIM, dtype=torch.float64)
    state = layer.state_dict()
    for name in ("B_bias", "C_bias", "D", "dt_bias"):
        state[name] = state[name].flip(0)
    heads = 2 * DIM // HEAD
    sizes = [4 * DIM, *[2 * STATES] * 2, *[3 * heads] * 2, *[ANGLES] * 2]
    zx, first, second, gates, others, angle, another = state["in_proj.weight"].split(sizes)
    state["in_proj.weight"] = torch.cat([zx, second, first, others, gates, another, angle])
    other.load_state_dict(state)
    torch.testing.assert_close(other(x.flip(1)).flip(1), layer(x))
    assert not torch.allclose(layer(x.flip(1)).flip(1), layer(x))


def test_a_state_that_turns_tells_parity():
    """Turned by pi at each one, a state without decay has the sign of the parity of the ones."""
    bits = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 1, 1]], dtype=torch.float64)
    dt = torch.ones(1, 10, 1, dtype=torch.float64)
    phi = torch.pi * bits.cumsum(1).unsqueeze(-1)
    turned = torch.stack([phi.cos(), phi.sin()], dim=-1)
    x = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    x[:, 0] = 1
    share = torch.ones_like(dt)
    y = ssd_trapezoidal_reference(x, dt, -1e-9 * dt, share, turned, turned)
    parity = (bits.cumsum(1) - bits[:, :1]) % 2  # counted from the token that was written
    torch.testing.assert_close(y.flatten(), (1 - 2 * parity).flatten())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "head_dim must divide"),
        ({"d_state": 7}, "d_state must be even"),
        ({"rope_fraction": 0.0}, "rope_fraction in"),
        ({"rope_fraction": 1.5}, "rope_fraction in"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
