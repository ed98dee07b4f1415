"""The residual stream's modules against the equations, written out here."""

import pytest
import torch

from vim.layers import Add, AddNorm

KINDS = ["rms", "layer"]


@pytest.fixture(params=KINDS)
def norm(request):
    """Return a norm in float64 whose weight and bias are not the initial ones."""
    norm = AddNorm(6, eps=1e-3, kind=request.param, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def expected_norm(norm, total):
    if norm.kind == "layer":
        centred = total - total.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
    return total / torch.sqrt(total.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


@pytest.mark.parametrize("has_residual", [False, True], ids=["first", "later"])
def test_equations(norm, has_residual):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    residual = torch.randn(2, 5, 6, dtype=torch.float64) if has_residual else None
    total = x + residual if has_residual else x
    normed, stream = norm(x, residual)
    torch.testing.assert_close(stream, total, rtol=0, atol=0)
    torch.testing.assert_close(normed, expected_norm(norm, total))


def test_gradients_flow_through_both_outputs(norm):
    x, residual = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in "xr")
    assert torch.autograd.gradcheck(norm, (x, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_stream_is_float32_at_low_precision(dtype):
    normed, stream = AddNorm(6, dtype=dtype)(torch.randn(1, 2, 6, dtype=dtype), None)
    assert (normed.dtype, stream.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters(kind):
    parameters = dict(AddNorm(6, kind=kind).named_parameters())
    assert set(parameters) == ({"weight"} if kind == "rms" else {"weight", "bias"})
    assert (parameters["weight"] == 1).all()
    assert kind == "rms" or (parameters["bias"] == 0).all()


def test_unknown_kind():
    with pytest.raises(ValueError, match="must be 'rms' or 'layer', got 'batch'"):
        AddNorm(6, kind="batch")


@pytest.mark.parametrize("has_residual", [False, True], ids=["first", "later"])
def test_add(has_residual):
    x, residual = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    tokens, stream = Add()(x, residual if has_residual else None)
    assert torch.equal(stream, x + residual if has_residual else x)
    assert torch.equal(tokens, stream)
