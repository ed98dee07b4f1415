"""The rule that the tests of the ops rest on: it lets float32 pass, and nothing coarser."""

import pytest
import torch

from vim.ops import selective_scan_reference

from .cases import DTYPES, LAYOUTS, Shape, assert_close_to_truth, on, with_layout


@pytest.fixture
def scan():
    """Return inputs of a scan and a function that scans them with a state of a given dtype."""
    B, L, D, N = 2, 64, 8, 4
    u, delta = torch.randn(B, L, D), torch.rand(B, L, D) * 0.1
    A, Bt, Ct = -torch.rand(D, N), torch.randn(B, L, N), torch.randn(B, L, N)

    def run(dtype, tokens=L):
        h, y = torch.zeros(B, D, N, dtype=dtype), []
        for t in range(tokens):
            decay = torch.exp(delta[:, t, :, None].to(dtype) * A.to(dtype))
            drive = (delta[:, t] * u[:, t]).to(dtype).unsqueeze(-1) * Bt[:, t].to(dtype)[:, None]
            h = decay * h + drive
            y.append((h * Ct[:, t].to(dtype)[:, None]).flip(-1).sum(-1))
        return torch.nn.functional.pad(torch.stack(y, 1), (0, 0, 0, L - tokens))

    inputs = (u, delta, A, Bt, Ct)
    truth, _ = selective_scan_reference(*(x.double() for x in inputs), dt_softplus=False)
    baseline, _ = selective_scan_reference(*inputs, dt_softplus=False)
    return run, truth, baseline


def test_another_order_of_float32_sums_passes(scan):
    run, truth, baseline = scan
    assert_close_to_truth(run(torch.float32), truth, baseline)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_of_low_precision_fails(scan, dtype):
    run, truth, baseline = scan
    coarse = torch.float16 if dtype == torch.float16 else torch.bfloat16
    with pytest.raises(AssertionError, match="result is too far from the truth"):
        assert_close_to_truth(run(coarse).to(dtype), truth, baseline.to(dtype))


def test_a_small_error_all_over_fails():
    truth = torch.randn(10000).double()
    truth[0] = 1001  # bfloat16 has 1000, so that one element makes the largest error
    baseline = truth.bfloat16()
    assert_close_to_truth(baseline, truth, baseline)
    with pytest.raises(AssertionError, match="too far from the truth all over"):
        assert_close_to_truth((truth + 0.5).bfloat16(), truth, baseline)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_token_fails(scan, dtype):
    run, truth, baseline = scan
    with pytest.raises(AssertionError, match="result is too far from the truth"):
        assert_close_to_truth(run(torch.float32, 63).to(dtype), truth, baseline.to(dtype))


def test_the_complaint_names_the_tensor_and_the_element():
    truth = torch.zeros(2, 3, dtype=torch.float64)
    wrong = torch.zeros(2, 3)
    wrong[1, 2] = 1
    with pytest.raises(AssertionError, match=r"^du is too far .* 1 of 6 .* \(1, 2\): got 1, truth"):
        assert_close_to_truth(
            {"y": torch.zeros(2, 3), "du": wrong},
            {"y": truth, "du": truth},
            {"y": torch.zeros(2, 3), "du": torch.zeros(2, 3)},
        )


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "1 of 2 elements that should be finite"),
        (torch.tensor([1.0, torch.inf]), "1 of 2 elements that should be finite"),
        (torch.ones(2, dtype=torch.bfloat16), r"must be torch.float32 \(2,\), got torch.bfloat16"),
        (torch.ones(1, 2), r"must be torch.float32 \(2,\), got torch.float32 \(1, 2\)"),
    ],
    ids=["nan", "inf", "dtype", "shape"],
)
def test_what_is_not_comparable_fails(actual, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_to_truth(actual, torch.ones(2).double(), torch.ones(2))


def test_overflow_must_be_where_the_baseline_has_it():
    truth, baseline = torch.tensor([1e300]).double(), torch.tensor([torch.inf])
    assert_close_to_truth(torch.tensor([torch.inf]), truth, baseline)
    with pytest.raises(AssertionError, match="overflow exactly where"):
        assert_close_to_truth(torch.tensor([1.0]), truth, baseline)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_are_called_and_survive_a_move(layout):
    tensor = torch.randn(3, 5, 7)
    laid = with_layout(tensor, layout)
    strides = {
        "contiguous": (35, 7, 1),
        "transposed": (35, 1, 5),
        "sliced": (70, 14, 1),
        "expanded": (0, 7, 1),
    }
    assert laid.stride() == strides[layout]
    assert layout == "expanded" or torch.equal(laid, tensor)
    moved = on(torch.device("meta"), {"x": laid})["x"]
    assert moved.shape == laid.shape
    assert moved.stride() == laid.stride()


def test_shapes_read_well():
    assert str(Shape(2, 197, 192, N=16)) == "B2-L197-D192-N16"


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
