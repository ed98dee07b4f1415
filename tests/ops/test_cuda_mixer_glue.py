"""What the CUDA mixer does between its kernels, with their definitions in their place.

Needs no GPU: the kernels themselves are tested in test_cuda_kernels.py and
test_cuda_selective_scan.py, the whole on a GPU in test_bidirectional_mixer.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vim.ops import causal_conv1d_reference, selective_scan_reference
from vim.ops.bidirectional_mixer import _check, bidirectional_mixer_reference
from vim.ops.cuda import bidirectional_mixer as mixer

from .test_bidirectional_mixer import SHAPES, make


def convolve(x, weight, bias, weight_reverse, bias_reverse):
    pairs = ((weight, bias, False), (weight_reverse, bias_reverse, True))
    return torch.stack(
        [causal_conv1d_reference(x, w, b, activation="silu", reverse=r)[0] for w, b, r in pairs]
    )


def scan(u, dt, A, B, C, D, z, dt_bias, scale, dt_proj=None, overwrite_u=False):
    if dt_proj is not None:
        dt = dt @ dt_proj.mT.unsqueeze(1)
    return (
        scale
        * F.silu(z)
        * sum(
            selective_scan_reference(
                u[i], dt[i], A[i], B[i], C[i], D[i], None, dt_bias[i], reverse=bool(i)
            )[0]
            for i in range(2)
        )
    )


def gradients_of(function, cotangent, *inputs):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)


def convolve_backward(dy, x, *weights, dx):
    dx_, dw, db, dw_reverse, db_reverse = gradients_of(convolve, dy, x, *weights)
    dx.copy_(dx_)
    return dx, torch.stack([dw, dw_reverse]), torch.stack([db, db_reverse])


def scan_backward(dy, *inputs_and_scale, dz, y):
    *inputs, scale = inputs_and_scale
    if y is not None:
        y.copy_(scan(*inputs, scale))
    gradients = gradients_of(lambda *x: scan(*x, scale), dy, *inputs)
    dz.copy_(gradients[6])
    return gradients


class Weights(mixer._Weights):
    """What the launch of mixer_inputs.cu leaves, in full precision."""

    def __init__(self, forward_branch, backward_branch, dtype):
        self.conv = (*forward_branch[:2], *backward_branch[:2])
        pairs = zip(forward_branch[2:], backward_branch[2:], strict=True)
        x_proj, dt_proj, self.dt_bias, A_log, self.D = (torch.stack(pair) for pair in pairs)
        self.rank, self.states = dt_proj.shape[2], A_log.shape[2]
        self.padded_rank = -(-self.rank // 8) * 8
        zeros = self.padded_rank - self.rank
        dt_rows, others = x_proj.split([self.rank, 2 * self.states], dim=1)
        self.x_proj = torch.cat([F.pad(dt_rows, (0, 0, 0, zeros)), others], dim=1)
        self.dt_proj, self.A = F.pad(dt_proj, (0, zeros)), -A_log.exp()


def inputs(x, *branches):
    weights = Weights(*branches, x.dtype)
    return weights, convolve(x, *weights.conv)


@pytest.fixture
def definitions(monkeypatch):
    monkeypatch.setattr(mixer, "_inputs", inputs)
    monkeypatch.setattr(
        mixer, "causal_conv1d", SimpleNamespace(backward_bidirectional=convolve_backward)
    )
    monkeypatch.setattr(
        mixer,
        "selective_scan",
        SimpleNamespace(forward_bidirectional=scan, backward_bidirectional=scan_backward),
    )


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_every_gradient(shape, scale, definitions):
    xz, *branches = make(shape, torch.float64)
    branches = [[x.double().requires_grad_() for x in branch] for branch in branches]
    xz.requires_grad_()
    _check(xz, *branches)
    expected = bidirectional_mixer_reference(xz, *branches, scale)
    dy = torch.randn_like(expected)
    leaves = [xz, *branches[0], *branches[1]]
    expected_gradients = torch.autograd.grad(expected, leaves, dy)

    with torch.no_grad():
        y, saved = mixer.forward(xz, *branches, scale, True)
        again = torch.empty_like(y)
        gradients = mixer.backward(dy, xz, *branches, saved, scale, y=again)
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(again, y)
    specs = [(tuple(x.shape), x.dtype) for x in saved]
    assert specs == mixer.saved_specs(xz, branches[0])
    dxz, *pairs = gradients
    unpacked = [dxz, *(p[0] for p in pairs), *(p[1] for p in pairs)]
    for actual, wanted in zip(unpacked, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted)
    # PyTorch refuses an op whose outputs share memory.
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


def test_nothing_is_saved_for_inference(definitions):
    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float32)
    assert mixer.forward(xz, *branches, 0.5, False)[1] == []
