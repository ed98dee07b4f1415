"""The inside of Vim's mixer, on every backend that can serve here, against its definition."""

import pytest
import torch

from vim.ops import bidirectional_mixer, bidirectional_mixer_reference
from vim.ops.bidirectional_mixer import BRANCH

from .cases import DTYPES, assert_close_to_truth

OP = "bidirectional_mixer"
SHAPES = {
    "B1-L1-D1-N1": (1, 1, 1, 1, 1, 2),
    "B2-L5-D6-N3": (2, 5, 6, 3, 2, 3),
    "B2-L33-D40-N16": (2, 33, 40, 16, 3, 4),
    "B1-L65-D48-N8": (1, 65, 48, 8, 3, 4),
}
GPU_SHAPES = {
    "B2-L197-D384-N16": (2, 197, 384, 16, 12, 4),
    "B1-L1000-D64-N16": (1, 1000, 64, 16, 4, 4),
}


def make(shape, dtype, seed=0):
    """Return xz and the two branches, parameters in float32 as a model keeps them."""
    batch, length, channels, state, rank, width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(size, generator=generator) * scale

    def branch():
        return [
            normal(channels, width, scale=width**-0.5),
            normal(channels, scale=0.1),
            normal(rank + 2 * state, channels, scale=channels**-0.5),
            normal(channels, rank, scale=rank**-0.5),
            normal(channels) - 3,
            torch.rand(channels, state, generator=generator) * 2.7,
            normal(channels),
        ]

    return normal(batch, length, 2 * channels).to(dtype), branch(), branch()


def run(function, xz, branches, dy, dtype=None, device="cpu", **options):
    """Return the output and the gradient of every tensor, by name.

    Args:
        branches: the tensors of both directions, and perhaps out_weight and out_bias.
    """
    count = len(BRANCH)
    names = ["xz", *(f"forward_{n}" for n in BRANCH), *(f"backward_{n}" for n in BRANCH)]
    names = [*names, "out_weight", "out_bias"][: 1 + len(branches)]
    leaves = [x.detach().to(device, dtype or x.dtype).requires_grad_() for x in (xz, *branches)]
    options |= dict(zip(names[1 + 2 * count :], leaves[1 + 2 * count :], strict=True))
    y = function(leaves[0], leaves[1 : 1 + count], leaves[1 + count : 1 + 2 * count], **options)
    gradients = torch.autograd.grad(y, leaves, dy.to(device, y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, gradients, strict=True)}


def make_out(shape, bias=True):
    """Return the output projection of a mixer, in float32 as a model keeps it."""
    channels, features = shape[2], shape[2] // 2 + 3
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(features, channels, generator=generator) * channels**-0.5
    return [weight, torch.randn(features, generator=generator)][: 1 + bias]


def check(shape, dtype, backend, out=(), keep_states=False):
    xz, forward_branch, backward_branch = make(shape, dtype)
    branches = [*forward_branch, *backward_branch, *out]
    features = out[0].shape[0] if out else xz.shape[2] // 2
    dy = torch.randn(*xz.shape[:2], features).to(dtype)
    # The definition in the tested precision: what lies between two products is rounded to it.
    rounded = [
        x.to(dtype).float() if x.dim() == 2 and (i % 7 in (2, 3) or i == 14) else x
        for i, x in enumerate(branches)
    ]
    truth = run(bidirectional_mixer_reference, xz, rounded, dy, torch.float64)
    baseline = run(bidirectional_mixer, xz, branches, dy, backend="reference")
    options = {"device": backend.device, "backend": backend.name, "keep_states": keep_states}
    actual = run(bidirectional_mixer, xz, branches, dy, **options)
    assert_close_to_truth(actual, truth, baseline)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_every_gradient(shape, dtype, backend):
    check(shape, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", list(SHAPES.values())[1:], ids=list(SHAPES)[1:])
def test_with_the_output_projection(shape, bias, dtype, backend):
    check(shape, dtype, backend, make_out(shape, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projected", [False, True], ids=["", "projected"])
@pytest.mark.parametrize("shape", list(SHAPES.values())[1:], ids=list(SHAPES)[1:])
def test_states_kept_for_the_backward(shape, projected, dtype, backend):
    check(shape, dtype, backend, make_out(shape) if projected else (), keep_states=True)


def check_compiled_training(backend, keep_states):
    """What is saved has the shapes that the compiler was told."""
    shape = SHAPES["B2-L33-D40-N16"]
    xz, *branches = make(shape, torch.bfloat16)
    branches = [*branches[0], *branches[1], *make_out(shape)]
    dy = torch.randn(2, 33, 23).bfloat16()
    options = {"device": backend.device, "backend": backend.name, "keep_states": keep_states}
    compiled = torch.compile(bidirectional_mixer, fullgraph=True, backend="aot_eager")
    expected, actual = (
        run(function, xz, branches, dy, **options) for function in (bidirectional_mixer, compiled)
    )
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("keep_states", [False, True], ids=["", "keep-states"])
def test_compiled_training(keep_states, backend):
    check_compiled_training(backend, keep_states)


def check_weights_of_half_precision(shape, dtype, backend):
    """Weights in the dtype of xz give what float32 ones of the same values give, bit for bit."""
    xz, *branches = make(shape, dtype)
    halves = [[x.to(dtype) for x in branch] for branch in branches]
    outputs = [
        bidirectional_mixer(
            xz.to(backend.device),
            *([x.to(backend.device, kind) for x in branch] for branch in halves),
            backend=backend.name,
        )
        for kind in (torch.float32, dtype)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_of_half_precision(shape, dtype, backend):
    check_weights_of_half_precision(shape, dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("projected", [False, True], ids=["", "projected"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_output_and_every_gradient_at_size(shape, projected, dtype, backend):
    for keep_states in (False, True):
        check(shape, dtype, backend, make_out(shape) if projected else (), keep_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_images(dtype, backend):
    xz, *branches = make((0, 5, 64, 16, 3, 4), dtype)
    leaves = [x.to(backend.device).requires_grad_() for x in (xz, *branches[0], *branches[1])]
    for keep_states in (False, True):
        options = {"backend": backend.name, "keep_states": keep_states}
        y = bidirectional_mixer(leaves[0], leaves[1:8], leaves[8:], **options)
        assert y.shape == (0, 5, 64)
        for x, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert gradient.shape == x.shape
            assert not gradient.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_tokens(dtype, backend):
    """So many that CUDA convolves and projects in one kernel."""
    shape = (90, 197, 64, 16, 4, 4)
    check(shape, dtype, backend)
    check_weights_of_half_precision(shape, dtype, backend)


@pytest.mark.parametrize("out", [[], make_out(SHAPES["B2-L5-D6-N3"])], ids=["", "projected"])
def test_reference_op_equals_the_definition(out):
    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float64)
    branches = [x.double() for branch in (*branches, out) for x in branch]
    dy = torch.randn(2, 5, 6, dtype=torch.float64)
    truth = run(bidirectional_mixer_reference, xz, branches, dy)
    actual = run(bidirectional_mixer, xz, branches, dy)
    for name, expected in truth.items():
        torch.testing.assert_close(actual[name], expected, msg=name, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    xz, *branches = make((1, 3, 2, 2, 1, 2), torch.float64)
    tensors = [x.double().requires_grad_() for x in (xz, *branches[0], *branches[1])]
    assert torch.autograd.gradcheck(lambda xz, *b: bidirectional_mixer(xz, b[:7], b[7:]), tensors)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
@pytest.mark.parametrize("save", [True, False], ids=["training", "inference"])
def test_opcheck(save):
    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float32)
    tensors = [x.requires_grad_(save) for x in (xz, *branches[0], *branches[1])]
    for out in ((None, None), make_out(SHAPES["B2-L5-D6-N3"])):
        out = [x if x is None else x.requires_grad_(save) for x in out]
        for keep_states in (False, True):
            args = (tensors[0], tensors[1:8], tensors[8:], *out, 0.5, save, keep_states, "auto")
            torch.library.opcheck(torch.ops.vim.bidirectional_mixer.default, args)


def test_nothing_is_saved_where_no_gradient_is_asked():
    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float32)
    for keep_states in (False, True):
        options = (None, None, 0.5, False, keep_states, "auto")
        _, saved = torch.ops.vim.bidirectional_mixer(xz, *branches, *options)
        assert saved == []


def test_autocast_leaves_the_op_alone(backend):
    """What autocast lowers is the projections around it, whose result brings the dtype along."""
    xz, *branches = make(SHAPES["B2-L33-D40-N16"], torch.float32)
    branches = [x for branch in branches for x in branch]
    dy = torch.randn(2, 33, 40)
    expected = run(
        bidirectional_mixer, xz, branches, dy, None, backend.device, backend=backend.name
    )
    with torch.autocast(backend.device.type, torch.bfloat16):
        actual = run(
            bidirectional_mixer, xz, branches, dy, None, backend.device, backend=backend.name
        )
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_compiles_in_one_graph():
    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float32)
    compiled = torch.compile(bidirectional_mixer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(xz, *branches), bidirectional_mixer(xz, *branches))


def test_swapped_branches_read_the_image_backwards(backend):
    xz, *branches = make(SHAPES["B2-L33-D40-N16"], torch.float32)
    xz = xz.to(backend.device)
    first, second = ([x.to(backend.device) for x in branch] for branch in branches)
    y = bidirectional_mixer(xz, first, second, backend=backend.name)
    flipped = bidirectional_mixer(xz.flip(1), second, first, backend=backend.name).flip(1)
    torch.testing.assert_close(y, flipped, rtol=1e-5, atol=1e-5)


def test_sum_is_twice_the_mean(backend):
    xz, *branches = make(SHAPES["B2-L5-D6-N3"], torch.float32)
    xz = xz.to(backend.device)
    branches = [[x.to(backend.device) for x in branch] for branch in branches]
    mean = bidirectional_mixer(xz, *branches, backend=backend.name)
    total = bidirectional_mixer(xz, *branches, merge_scale=1.0, backend=backend.name)
    torch.testing.assert_close(total, 2 * mean)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda xz, f, b: (xz.int(), f, b), TypeError, "xz must be a real floating-point"),
        (lambda xz, f, b: (xz[0], f, b), ValueError, r"xz must be \(B, L, 2 D\)"),
        (lambda xz, f, b: (xz[..., 1:], f, b), ValueError, r"xz must be \(B, L, 2 D\)"),
        (lambda xz, f, b: (xz, f[:-1], b), ValueError, "forward_branch must hold conv_weight"),
        (lambda xz, f, b: (xz, f, [*b[:6], b[6][1:]]), ValueError, "D of the backward branch"),
        (lambda xz, f, b: (xz, f, [*b[:6], b[6].int()]), TypeError, "D of the backward branch"),
        (lambda xz, f, b: (xz, [f[0].to("meta"), *f[1:]], b), ValueError, "device of xz"),
        (
            lambda xz, f, b: (xz, f, b, 0.5, "auto", f[0]),
            ValueError,
            r"out_weight must be \(6, 6\)",
        ),
        (lambda xz, f, b: (xz, f, b, 0.5, "auto", None, f[1]), ValueError, "out_bias needs"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        bidirectional_mixer(*change(*make(SHAPES["B2-L5-D6-N3"], torch.float32)))
