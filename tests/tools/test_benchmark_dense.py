"""What benchmarks/dense.py times on a GPU runs, and its attention is PyTorch's."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("benchmark_dense", FOLDER / "dense.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_rehearsal_times_both_tasks(tool, tmp_path, capsys):
    file = tmp_path / "dense.json"
    arguments = ["--tiny", "--backbones", "vim-tiny", "deit-windows-tiny", "--json", str(file)]
    assert tool.main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["task"], row["backbone"], row["batch"]) for row in rows] == [
        ("detection", "vim-tiny", 1),
        ("detection", "deit-windows-tiny", 1),
        ("segmentation", "vim-tiny", 2),
        ("segmentation", "deit-windows-tiny", 2),
    ]
    for row in rows:
        assert row["eager_forward_ms"] > 0, row
        assert row["eager_train_ms"] > 0, row
    assert "deit-windows-tiny" in capsys.readouterr().out


def test_what_fails_is_a_row_of_its_own(tool, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("No available kernel.\nMore of it")

    monkeypatch.setattr(tool, "of_case", fail)
    file = tmp_path / "dense.json"
    arguments = ["--tiny", "--tasks", "detection", "--backbones", "vim-tiny", "--json", str(file)]
    assert tool.main(arguments) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert row["failed"] == "RuntimeError: No available kernel."


def test_attention_without_a_dimension_of_heads_is_the_same(tool):
    q, k, v = torch.randn(3, 6, 10, 8)
    own = F.scaled_dot_product_attention
    expected = own(q, k, v)
    with tool.flash_attention(torch.device("cpu")):
        assert F.scaled_dot_product_attention is not own
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)
    assert F.scaled_dot_product_attention is own


@pytest.mark.parametrize("pyramid", [False, True])
def test_windows_have_the_maps_and_weights_of_deit(tool, pyramid):
    x = torch.randn(1, 3, 64, 96)
    shapes, blocks = [], []
    for backbone in ("deit-tiny", "deit-windows-tiny"):
        model = tool.encoder(backbone, (64, 96), pyramid).eval()
        with torch.no_grad():
            shapes.append([y.shape for y in model(x)])
        vit = (model.maps if pyramid else model).model
        blocks.append(sum(p.numel() for p in vit.blocks.parameters()))
    assert shapes[0] == shapes[1]
    assert blocks[0] == blocks[1]
