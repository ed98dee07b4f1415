"""Projectors: their equations, written out, the state dicts of Cobra's code, and their errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vim.layers import PROJECTORS, LDPProjector, MLPProjector, build_projector

D, E = 6, 10
every_projector = pytest.mark.parametrize("name", PROJECTORS)
LDP = ("ldpnet", "fused-ldpnet")


class Pool(nn.Module):
    """Tokens of a square grid to 14 x 14 tokens."""

    def forward(self, x):
        side = int(x.shape[1] ** 0.5)
        maps = x.permute(0, 2, 1).reshape(len(x), -1, side, side)
        return nn.AdaptiveAvgPool2d((14, 14))(maps).flatten(2).transpose(1, 2)


class Position(nn.Module):
    """Tokens of a square grid, and what a depthwise convolution sees around each."""

    def __init__(self, dim):
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim))

    def forward(self, x):
        side = int(x.shape[1] ** 0.5)
        maps = x.transpose(1, 2).reshape(len(x), -1, side, side)
        return (self.peg(maps) + maps).flatten(2).transpose(1, 2)


def as_in_cobra(name):
    """Return the layers that Cobra's code has under this name, as its state dicts count them."""
    layers = {
        "linear": lambda: nn.Linear(D, E),
        "gelu-mlp": lambda: nn.Sequential(nn.Linear(D, E), nn.GELU(), nn.Linear(E, E)),
        "fused-gelu-mlp": lambda: nn.Sequential(
            nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, E), nn.GELU(), nn.Linear(E, E)
        ),
        "ldpnet": lambda: nn.Sequential(
            nn.Linear(D, E), nn.GELU(), nn.Linear(E, E), Pool(), Position(E)
        ),
        "fused-ldpnet": lambda: nn.Sequential(
            nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, E), Pool(), Position(E)
        ),
    }[name]()
    return nn.ModuleDict({"projector": layers})


@every_projector
@pytest.mark.parametrize("side", [14, 27])
def test_loads_and_equals_cobras(name, side):
    source = as_in_cobra(name)
    projector = build_projector(name, D, E)
    projector.load_state_dict(source.state_dict())
    x = torch.randn(2, side * side, D)
    actual = projector(x)
    assert actual.shape == (2, 196 if name in LDP else side * side, E)
    torch.testing.assert_close(actual, source["projector"](x))


@every_projector
def test_own_state_dict_loads_inside_another_module(name):
    outer = nn.ModuleDict({"a": build_projector(name, D, E)})
    other = nn.ModuleDict({"a": build_projector(name, D, E)})
    other.load_state_dict(copy.deepcopy(outer.state_dict()))
    x = torch.randn(1, 196, D)
    assert torch.equal(other["a"](x), outer["a"](x))


@every_projector
def test_gradients(name):
    kind, hidden_dims = PROJECTORS[name]
    widths = hidden_dims(3, 2)
    projector = kind(3, 2, widths, **({"out_grid": (2, 1)} if name in LDP else {})).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(projector.parameters())
    assert torch.autograd.gradcheck(
        lambda x, *_: projector(x, (3, 2)), (x, *parameters), fast_mode=True
    )


@every_projector
def test_device_and_dtype(name):
    projector = build_projector(name, D, E, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in projector.parameters()} == {("meta", torch.bfloat16)}
    assert projector(torch.empty(2, 196, D, device="meta", dtype=torch.bfloat16)).shape[2] == E


@every_projector
def test_compiles(name):
    projector = build_projector(name, D, E)
    x = torch.randn(1, 16 * 20, D)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (16, 20)), projector(x, (16, 20)))


@pytest.mark.parametrize(("grid", "out_grid"), [((3, 8), (3, 2)), ((5, 4), (2, 4)), ((7, 1), 1)])
def test_ldp_by_its_equation_on_grids_that_are_not_square(grid, out_grid):
    projector = LDPProjector(D, E, out_grid=out_grid)
    x = torch.randn(2, grid[0] * grid[1], D)
    height, width = projector.out_grid
    maps = F.linear(x, projector.projector.weight, projector.projector.bias)
    maps = maps.reshape(2, *grid, E).permute(0, 3, 1, 2)
    rows = [
        maps[:, :, i * grid[0] // height : -(-(i + 1) * grid[0] // height)] for i in range(height)
    ]
    pooled = torch.stack(
        [
            torch.stack(
                [
                    row[..., j * grid[1] // width : -(-(j + 1) * grid[1] // width)].mean((2, 3))
                    for j in range(width)
                ],
                dim=-1,
            )
            for row in rows
        ],
        dim=-2,
    )
    padded = F.pad(pooled, (1, 1, 1, 1))
    around = projector.position.bias[:, None, None] + sum(
        projector.position.weight[:, 0, i, j, None, None]
        * padded[:, :, i : i + height, j : j + width]
        for i in range(3)
        for j in range(3)
    )
    expected = (pooled + around).permute(0, 2, 3, 1).reshape(2, height * width, E)
    torch.testing.assert_close(projector(x, grid), expected)


def test_widths_of_cobra_3b():
    """DINOv2-L and SigLIP-SO400M into Mamba-2.8B: 2176 -> 8704 -> 2560 -> 2560."""
    projector = build_projector("fused-gelu-mlp", 1024 + 1152, 2560, device="meta")
    shapes = [tuple(p.shape) for p in projector.parameters() if p.dim() == 2]
    assert shapes == [(8704, 2176), (2560, 8704), (2560, 2560)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_projector("mlp", D, E), r"one of linear, gelu-mlp, .*, got 'mlp'"),
        (lambda: MLPProjector(0, E), r"must be positive, got 0, \(\) and 10"),
        (lambda: MLPProjector(D, E, (4, -1)), r"positive, got 6, \(4, -1\)"),
        (lambda: LDPProjector(D, E, out_grid=0), "out_grid must be a positive side .* got 0"),
        (lambda: LDPProjector(D, E, out_grid=(2, 3, 4)), r"out_grid must .* got \(2, 3, 4\)"),
        (lambda: MLPProjector(D, E)(torch.ones(2, 3, 5)), r"\(B, N, 6\), got \(2, 3, 5\): build"),
        (lambda: MLPProjector(D, E)(torch.ones(3, 6)), r"must be \(B, N, 6\), got \(3, 6\)"),
        (lambda: LDPProjector(D, E)(torch.ones(1, 200, D)), "200 tokens are no square: pass"),
        (
            lambda: LDPProjector(D, E)(torch.ones(1, 200, D), (14, 14)),
            r"hold the 200 tokens, got \(14, 14\), which holds 196",
        ),
        (
            lambda: LDPProjector(D, E)(torch.ones(1, 49, D)),
            r"\(7, 7\), is smaller than out_grid=\(14, 14\).*build LDPProjector with a smaller",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
