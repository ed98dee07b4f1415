"""Faults, by doing them: runs are killed, signalled, starved of disk and fed NaN, then resumed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vim.engine import checkpoints

DRILL = Path(__file__).with_name("drill.py")
ITERATIONS = 80
INTERVAL = 7

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="kills and forks processes"),
]


class Run:
    """A run under way: the processes `pids`, by rank."""

    def __init__(self, server, **arguments) -> None:
        self.folder = Path(arguments["work_dir"])
        self.server = server
        server.stdin.write(json.dumps({**arguments, "work_dir": str(self.folder)}) + "\n")
        server.stdin.flush()
        self.pids = self._answer("pids")
        self.pid = self.pids[0]

    def _answer(self, what: str) -> list[int]:
        """The next line of the server, which says what it is: a number must not be mistaken."""
        said, *numbers = self.server.stdout.readline().split() or ["nothing"]
        assert said == what, f"the server should have answered {what}, not {said} {numbers}"
        return [int(number) for number in numbers]

    def send(self, number: int, rank: int = 0) -> None:
        """Send a signal to a process of the run, unless it has ended."""
        assert self.pids[rank] > 1, "0 and 1 are not processes of ours"
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def wait(self) -> int:
        """Return its exit code, or minus the signal that killed it."""
        return self._answer("code")[0]

    def wait_for(self, text: str, name: str = "losses.0.jsonl") -> None:
        """Wait until a file of the run has `text`."""
        path = self.folder / name
        deadline = time.monotonic() + 60
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.002)

    @property
    def log(self) -> str:
        return self.folder.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def start():
    """Start runs, one at a time, in processes forked from one that has everything imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(DRILL.parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, str(DRILL)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        yield lambda **arguments: Run(server, **{"interval": INTERVAL, **arguments})
        server.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """A run that nothing happens to."""
    run = start(work_dir=tmp_path_factory.mktemp("undisturbed") / "run")
    assert run.wait() == 0, run.log
    return run.folder


def lines_of(folder: Path, rank: int = 0) -> list[dict]:
    text = (folder / f"losses.{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def curve_of(folder: Path, rank: int = 0) -> dict:
    """Loss, learning rate and metrics by iteration and epoch; what was done twice must agree."""
    curve = {}
    for line in lines_of(folder, rank):
        line.pop("pid")
        key = next(iter(line.items()))
        assert curve.setdefault(key, line) == line
    return curve


def assert_equal(a, b, where="state") -> None:
    """The same to the bit, whatever they hold; but for how long it took."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_as_undisturbed(folder: Path, undisturbed: Path, iterations: int = ITERATIONS) -> None:
    """The curve, and all that the last and the best checkpoint hold, are the same to the bit."""
    assert curve_of(folder) == curve_of(undisturbed)
    (best,) = undisturbed.glob("best_*.pth")
    for name in (f"iter_{iterations:08d}.pth", best.name):
        ours, theirs = (checkpoints.load(f / name) for f in (folder, undisturbed))
        for state in (ours, theirs):
            del state["config"]  # names the folder
        assert_equal(ours, theirs)


@pytest.mark.parametrize("accumulation", [1, 3], ids=["", "accumulated"])
def test_kill_9_at_any_moment(start, undisturbed, tmp_path, accumulation):
    options = {"work_dir": tmp_path / "run", "resume": True, "accumulation": accumulation}
    if accumulation > 1:
        reference = start(**{**options, "work_dir": tmp_path / "reference"})
        assert reference.wait() == 0, reference.log
        undisturbed = reference.folder
    draw = random.Random(accumulation)
    done = kills = 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        before = done
        run = start(**options, model={"seconds": 0.01})
        if kills < 8:
            time.sleep(draw.uniform(0.15, 0.5))
            run.send(signal.SIGKILL)
        code = run.wait()
        kills += code == -signal.SIGKILL
        path = run.folder / "losses.0.jsonl"
        lines = lines_of(run.folder) if path.exists() else []
        own = [line["iteration"] for line in lines if line["pid"] == run.pid and "lr" in line]
        if own:
            # At most one interval is lost, and where gradients are accumulated, their window.
            assert before - (own[0] - 1) < INTERVAL + accumulation, (before, own[0])
            done = max(done, own[-1])
        assert kills <= 8, run.log
    assert code == 0, run.log
    assert kills >= 4
    assert_as_undisturbed(run.folder, undisturbed)


@pytest.mark.parametrize("processes", [1, 2], ids=["", "two processes"])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_kill_9_of_dense_prediction(start, tmp_path, task, processes):
    """Some moment after an iteration, whichever process; its data workers end with it."""
    pytest.importorskip("torchvision" if task == "detection" else "segmentation_models_pytorch")
    if task == "detection":
        pytest.importorskip("faster_coco_eval")
    interval, iterations = 4, 30 // processes
    options = {"task": task, "processes": processes, "interval": interval, "resume": True}
    whole = start(work_dir=tmp_path / "whole", **options)
    assert whole.wait() == 0, whole.log
    draw = random.Random(f"{task} {processes}")
    done = 0
    for kill in [*sorted(draw.sample(range(1, 2 * iterations // 3), 3)), None]:
        run = start(work_dir=tmp_path / "run", **options)
        if kill is not None:
            run.wait_for(f'"iteration": {kill},')
            time.sleep(draw.uniform(0, 0.1))
            run.send(signal.SIGKILL, rank=draw.randrange(processes))
        assert run.wait() == (0 if kill is None else -signal.SIGKILL), run.log
        own = [
            line["iteration"]
            for line in lines_of(run.folder)
            if line["pid"] == run.pid and "lr" in line
        ]
        if own:
            assert done - (own[0] - 1) <= interval, (done, own[0])
            done = own[-1]
    assert_as_undisturbed(run.folder, whole.folder, iterations)
    for rank in range(processes):
        assert curve_of(run.folder, rank) == curve_of(whole.folder, rank)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", ["training", "validation"])
def test_signals_stop_cleanly(start, undisturbed, tmp_path, number, moment):
    text = '"iteration": 30,' if moment == "training" else '"iteration": 40,'
    run = start(work_dir=tmp_path / "run", model={"seconds": 0.02, "validating": 0.3})
    run.wait_for(text)
    if moment == "validation":
        time.sleep(0.2)
    run.send(number)
    sent = time.monotonic()
    assert run.wait() == 0, run.log
    assert time.monotonic() - sent < 5
    last = max(line["iteration"] for line in lines_of(run.folder) if "lr" in line)
    assert last < ITERATIONS
    assert f"stopped by {number.name} at iteration {last}; go on with --resume" in run.log
    assert max(checkpoints.iterations(run.folder)) == last  # nothing is lost
    assert not (run.folder / "weights.safetensors").exists()
    if moment == "validation":
        assert last == 40
        assert "validated" not in (run.folder / "losses.0.jsonl").read_text()
    run = start(work_dir=run.folder, resume=True)
    assert run.wait() == 0, run.log
    assert_as_undisturbed(run.folder, undisturbed)


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    run = start(work_dir=tmp_path / "run", model={"seconds": 5.0})
    time.sleep(1)
    run.send(signal.SIGINT)
    time.sleep(1.2)
    run.send(signal.SIGINT)
    sent = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - sent < 2


def test_a_truncated_newest_checkpoint(start, undisturbed, tmp_path):
    run = start(work_dir=tmp_path / "run", model={"seconds": 0.01})
    run.wait_for('"iteration": 50,')
    run.send(signal.SIGKILL)
    run.wait()
    newest, before, *_ = checkpoints.iterations(run.folder).items()
    newest[1].write_bytes(newest[1].read_bytes()[:-1000])
    run = start(work_dir=run.folder, resume=True)
    assert run.wait() == 0, run.log
    assert f"passed over: {newest[1]} is damaged" in run.log
    assert newest[1].with_name(newest[1].name + ".superseded").exists()
    own = [line for line in lines_of(run.folder) if line["pid"] == run.pid]
    assert own[0]["iteration"] == before[0] + 1
    assert_as_undisturbed(run.folder, undisturbed)


def test_a_full_disk(start, undisturbed, tmp_path):
    """From some iteration on the system refuses to write checkpoints: files over 16 KiB."""
    run = start(work_dir=tmp_path / "run", epochs=4, disk_full_after=24)
    assert run.wait() == 1
    good = checkpoints.iteration_path(run.folder, 21)
    assert "could not write" in run.log
    assert f"The last good checkpoint, {good}, is intact: make room and resume" in run.log
    assert checkpoints.latest(run.folder) == good
    assert not list(run.folder.glob(".*.tmp"))
    run = start(work_dir=run.folder, resume=True)
    assert run.wait() == 0, run.log
    assert_as_undisturbed(run.folder, undisturbed)


def test_nan(start, undisturbed, tmp_path):
    run = start(work_dir=tmp_path / "run", model={"nan_at": 31})
    assert run.wait() == 1
    assert "the loss is not finite at iteration 31 (epoch 2, learning rate 0.001)" in run.log
    assert "the first module with an output that is not finite is backbone.blocks.1 " in run.log
    good = checkpoints.iteration_path(run.folder, 28)
    assert f"The last good checkpoint is {good}" in run.log
    run = start(work_dir=run.folder, resume=True)
    assert run.wait() == 0, run.log
    assert_as_undisturbed(run.folder, undisturbed)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(start, tmp_path, parallel):
    """They train as one does with twice the batch, stop together, and go on to the bit."""
    model = {"dropout": 0.0}
    options = {"processes": 2, "model": model, "parallel": parallel, "accumulation": 2}
    single = start(work_dir=tmp_path / "single", batch_size=8, model=model, accumulation=2)
    assert single.wait() == 0, single.log
    whole = start(work_dir=tmp_path / "whole", **options)
    assert whole.wait() == 0, whole.log
    expected, found = (
        checkpoints.load(run.folder / "iter_00000040.pth") for run in (single, whole)
    )
    for key in ("model", "model_ema"):
        assert found[key].keys() == expected[key].keys()
        for name, tensor in found[key].items():
            torch.testing.assert_close(tensor, expected[key][name], rtol=1e-4, atol=1e-5)
    assert found["best"] == expected["best"]  # the same images, each counted once

    slow = {**options, "model": {**model, "seconds": 0.02}}
    run = start(work_dir=tmp_path / "run", **slow)
    run.wait_for('"iteration": 11,')
    run.send(signal.SIGTERM, rank=1)
    assert run.wait() == 0, run.log
    assert "stopped by SIGTERM at iteration" in run.log
    stopped = max(checkpoints.iterations(run.folder))
    assert stopped % 2 == 0
    run = start(work_dir=run.folder, resume=True, **slow)
    run.wait_for(f'"iteration": {stopped + 12},')
    run.send(signal.SIGKILL, rank=1)
    assert run.wait() == -signal.SIGKILL
    run = start(work_dir=run.folder, resume=True, **options)
    assert run.wait() == 0, run.log
    assert_as_undisturbed(run.folder, whole.folder, iterations=40)
    for rank in range(2):
        assert curve_of(run.folder, rank) == curve_of(whole.folder, rank)

    # What two wrote one goes on with, if told so.
    alone = {"work_dir": tmp_path / "single", "resume": True, "batch_size": 8, "accumulation": 2}
    alone |= {"model": model, "load_from": str(run.folder / "best_top1.pth")}
    run = start(**alone)
    assert run.wait() == 1
    assert "processes 2 -> 1, batch_size 4 -> 8" in run.log
    run = start(**alone, resume_with_changes=True)
    assert run.wait() == 0, run.log


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_nan_in_one_of_two_processes(start, tmp_path, parallel):
    run = start(
        work_dir=tmp_path / "run",
        processes=2,
        parallel=parallel,
        model={"nan_at": 9, "nan_rank": 1},
    )
    assert run.wait() == 1
    assert "the loss is not finite at iteration 9 (epoch 1" in run.log
    assert "rank 1: loss nan" in run.log
    assert "is backbone.blocks.1 " in run.log
    assert "the batch gives finite outputs here. rank 1:" in run.log
