"""tools/train.py as a user calls it; the engine behind it is tested in tests/engine."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "configs/vim/vim-debug_1xb4_made-up.py")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tool", ROOT / "tools" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "train"]


def test_ten_steps_and_what_they_leave(tool, tmp_path):
    assert tool.main([DEBUG, "--work-dir", str(tmp_path)]) == 0
    for name in ("weights.safetensors", "curves.png", "config.py", "run.json", "iter_00000010.pth"):
        assert (tmp_path / name).is_file(), name
    assert len(lines(tmp_path)) == 10


def test_resuming_adds_what_is_missing(tool, tmp_path):
    arguments = [DEBUG, "--work-dir"]
    tool.main([*arguments, str(tmp_path / "whole"), "--cfg-options", "train_cfg.max_epochs=2"])
    tool.main([*arguments, str(tmp_path / "parts"), "--cfg-options", "train_cfg.max_epochs=1"])
    options = ["--resume", "--cfg-options", "train_cfg.max_epochs=2"]
    assert tool.main([*arguments, str(tmp_path / "parts"), *options]) == 0
    whole, parts = ([row["loss"] for row in lines(tmp_path / n)] for n in ("whole", "parts"))
    assert len(whole) == 20
    assert parts == whole


def test_scaled_learning_rate(tool, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        f'_base_ = ["{DEBUG}"]\nauto_scale_lr = dict(enable=False, base_batch_size=16)\n'
        'param_scheduler = dict(_delete_=True, type="ConstantLR", factor=1.0)\n'
    )
    assert tool.main([str(config), "--work-dir", str(tmp_path / "run"), "--auto-scale-lr"]) == 0
    assert {row["lr"] for row in lines(tmp_path / "run")} == {1e-3 * 4 / 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "no config at nowhere.py"),
        ([DEBUG, "--cfg-options", "train_cfg.max_epoch=1"], "did you mean max_epochs"),
        ([DEBUG, "--auto-scale-lr"], "no auto_scale_lr.base_batch_size"),
        ([DEBUG, "--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
    ],
)
def test_bad_arguments(tool, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        tool.main([*arguments, "--work-dir", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
