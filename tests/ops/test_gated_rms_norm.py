"""The gated norm against its equations."""

import pytest
import torch

from vim.ops import gated_rms_norm, gated_rms_norm_reference

SHAPES = [(1, 1), (2, 7, 5), (3, 2, 2, 16)]


def make(shape, dtype=torch.float64, other=True):
    y, z, o = torch.randn(3, *shape).to(dtype)
    return [t.requires_grad_() for t in (y, z, torch.rand(shape[-1]).to(dtype), *([o] * other))]


def call(op, y, z, weight, other=None):
    return op(y, z, weight, other=other, eps=1e-3)


@pytest.mark.parametrize("other", [False, True], ids=["one", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, other):
    tensors, results = make(shape, other=other), []
    for op in (gated_rms_norm, gated_rms_norm_reference):
        out = call(op, *tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.testing.assert_close(*results)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *t: call(gated_rms_norm, *t), make((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_and_autocast(dtype):
    tensors = make((5, 33), dtype)
    truth = call(gated_rms_norm_reference, *(t.double() for t in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        out = call(gated_rms_norm, *tensors)
    assert out.dtype == dtype
    assert (out - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    torch.library.opcheck(torch.ops.vim.gated_rms_norm.default, (*make((2, 3, 4)), 1e-5))


def test_wrong_shapes():
    y, z, weight, other = make((2, 3))
    with pytest.raises(ValueError, match=r"z must be \(2, 3\), got \(2, 2\)"):
        gated_rms_norm(y, z[:, :2], weight)
    with pytest.raises(ValueError, match=r"weight must be \(3,\), got \(2,\)"):
        gated_rms_norm(y, z, weight[:2])
    with pytest.raises(ValueError, match=r"other must be \(2, 3\), got \(1, 3\)"):
        gated_rms_norm(y, z, weight, other=other[:1])
