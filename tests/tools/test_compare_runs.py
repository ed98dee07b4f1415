"""tools/compare_runs.py, as a user calls it."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

PATH = Path(__file__).parents[2] / "tools" / "compare_runs.py"
CONFIG = """
model = dict(backbone=dict(name="{name}_tiny_patch16_224", img_size=32, depth=1, num_classes=10))
train_dataloader = dict(batch_size=8)
randomness = dict(seed={seed})
"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_runs", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(folder, name, seed, accuracies):
    folder.mkdir()
    (folder / "config.py").write_text(CONFIG.format(name=name, seed=seed))
    lines = []
    for i, top1 in enumerate(accuracies, 1):
        common = {"iteration": 5 * i, "epoch": i, "seconds": 10.0 * i}
        lines.append({"stage": "train", **common, "images_per_second": 100.0 * i, "loss": 2.0})
        lines.append({"stage": "val", **common, "top1": top1})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(folder)


def test_table_and_plot(tool, tmp_path, capsys):
    runs = [
        make_run(tmp_path / "a", "vim", 1, [20.0, 40.0]),
        make_run(tmp_path / "b", "vim", 0, [30.0, 50.0]),
        make_run(tmp_path / "c", "s4d", 0, [30.0, 60.0, 70.0]),
    ]
    assert tool.main([*runs, "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "comparison.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["s4d", "vim"]  # the best first
    assert rows[1][2:7] == ["45.0", "50.0, 40.0", "20", "80", "150"]
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.width > 1000


def test_no_run(tool, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main([str(tmp_path)])
    assert exit_.value.code == 2
    assert "no folder of a run that has been validated" in capsys.readouterr().err
