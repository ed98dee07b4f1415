"""Checkpoint files: whole or not at all, checked, and nothing but plain data."""

import errno
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from vim.engine import checkpoints
from vim.engine.checkpoints import CheckpointError

STATE = {
    "iteration": 5,
    "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), steps=torch.tensor(3)),
    "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": None}]},
    "config": "model = dict()",
}


def test_round_trip(tmp_path):
    path = checkpoints.save(STATE, tmp_path / "new" / "iter_00000005.pth")
    state = checkpoints.load(path)
    torch.testing.assert_close(state["model"], dict(STATE["model"]), rtol=0, atol=0)
    assert {k: state[k] for k in state if k != "model"} == {
        k: STATE[k] for k in STATE if k != "model"
    }
    assert os.listdir(path.parent) == [path.name]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        checkpoints.load(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float64(1), r"state\['best'\]\['score'\] is a numpy\.float64"),
        ([1, Path("x")], r"state\['best'\]\['score'\]\[1\] is a pathlib"),
        ({Path("x"): 1}, r"a key of state\['best'\]\['score'\] is a pathlib"),
    ],
)
def test_only_plain_data_is_saved(tmp_path, value, where):
    with pytest.raises(TypeError, match=where):
        checkpoints.save({"best": {"score": value}}, tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


class Harmful:
    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(tmp_path, legacy):
    harmful = Harmful()
    harmful.folder = tmp_path / "made"
    torch.save({"model": harmful}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"refused|damaged"):
        checkpoints.load(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(harmful))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(tmp_path / "b.pth")
    assert not harmful.folder.exists()


def test_a_file_that_is_no_dict_is_refused(tmp_path):
    torch.save([1], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        checkpoints.load(tmp_path / "a.pth")


def test_any_damage_is_seen(tmp_path):
    """Every cut, and a flip of any of 500 bytes, either is reported or left the content whole."""
    path = checkpoints.save(STATE, tmp_path / "a.pth")
    whole, content = path.read_bytes(), str(checkpoints.load(path))
    generator = np.random.default_rng(0)
    reported = 0
    for length in generator.integers(0, len(whole), 100):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.load(path)
    for at in generator.integers(0, len(whole), 500):
        broken = bytearray(whole)
        broken[at] ^= 1 << generator.integers(8)
        path.write_bytes(broken)
        try:
            state = checkpoints.load(path)
        except CheckpointError:
            reported += 1
        else:
            assert str(state) == content
    assert reported > 100


def test_latest_passes_over_damaged_files(tmp_path, caplog):
    assert checkpoints.latest(tmp_path) is None
    for iteration in (10, 20, 100_000_000):
        checkpoints.save(STATE, checkpoints.iteration_path(tmp_path, iteration))
    newest = checkpoints.iteration_path(tmp_path, 100_000_000)
    assert checkpoints.latest(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-100])
    assert checkpoints.latest(tmp_path) == checkpoints.iteration_path(tmp_path, 20)
    assert str(newest) in caplog.text
    for path in checkpoints.iterations(tmp_path).values():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        checkpoints.latest(tmp_path)


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for iteration in (1, 2, 3, 10):
        checkpoints.save(STATE, checkpoints.iteration_path(tmp_path, iteration))
    checkpoints.save(STATE, checkpoints.best_path(tmp_path, "raw/top1"))
    (tmp_path / ".iter_00000011.pth.tmp").write_bytes(b"a write that was killed")
    checkpoints.rotate(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == [
        "best_raw_top1.pth",
        "iter_00000003.pth",
        "iter_00000010.pth",
    ]


def test_newer_files_are_set_aside(tmp_path):
    for iteration in (1, 2, 3):
        checkpoints.save(STATE, checkpoints.iteration_path(tmp_path, iteration))
    moved = checkpoints.set_aside(tmp_path, after=2)
    assert [path.name for path in moved] == ["iter_00000003.pth.superseded"]
    assert list(checkpoints.iterations(tmp_path)) == [2, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_write_that_fails_leaves_the_files_as_they_were(tmp_path):
    """The system refuses to write beyond 1 MiB, in the middle of a tensor."""
    import resource

    good = checkpoints.save(STATE, checkpoints.iteration_path(tmp_path, 5))
    target = checkpoints.iteration_path(tmp_path, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoints.save({"model": {"weight": torch.ones(1 << 20)}}, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert "It needs about 4.0 MiB" in str(error.value)
    assert f"The last good checkpoint, {good}, is intact" in str(error.value)
    assert os.listdir(tmp_path) == [good.name]
    checkpoints.load(good)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_any_step(tmp_path, monkeypatch, step):
    path = checkpoints.save(STATE, tmp_path / "best_top1.pth")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, step, full)
    with pytest.raises(CheckpointError, match=r"No space left .* There is no earlier checkpoint"):
        checkpoints.save({"other": 1}, path)
    monkeypatch.undo()
    assert checkpoints.load(path)["iteration"] == 5
    assert os.listdir(tmp_path) == [path.name]
