"""Hooks that say how training goes: progress, metrics.jsonl, curves, what was run and where.

All of them work in the first process alone and exchange nothing with others: losses are those of
its own batches, images a second are its own times the number of processes.
"""

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from tqdm import tqdm

import vim
from vim.doctor import environment

from .inference import atomic_write
from .plots import curves_figure

__all__ = [
    "CurvesHook",
    "Meter",
    "MetricsHook",
    "ProgressHook",
    "RunInfoHook",
    "read_metrics",
    "run_info",
]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STATE_KEY = "metrics_hook"
"""Where a checkpoint keeps the sums of the logging interval that it was saved in."""
VARIABLES = ("CUDA_", "CUBLAS_", "NCCL_", "TORCH", "PYTORCH_", "OMP_", "MKL_", "VIM_", "SLURM_")
VARIABLES += ("MASTER_", "WORLD_SIZE", "RANK", "LOCAL_")
"""Starts of the environment variables that run.json records; others may hold secrets."""


class Meter:
    """Images a second and the share of time spent waiting for data, over the training steps.

    From `start` to the first batch, and from a step's end to the next batch, is waiting. Validation
    and the writing of checkpoints lie outside. On a GPU, work goes on during such a wait: what
    counts there is for how long it has nothing to do, see `device_wait`.

    Args:
        on_gpu: whether to measure that as well.

    Attributes:
        device_wait: share of time, as of the last `take`, that the GPU had finished a step and the
            next batch had not arrived; None without a GPU. Waits for the device.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        self._on_gpu = on_gpu
        self._ended: torch.cuda.Event | None = None
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.device_wait: float | None = None
        self._images = 0
        self._seconds = 0.0
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Begin an epoch: the time since the last step doesn't count."""
        self._outside = False
        self._ended = None
        self._mark = time.perf_counter()

    def leave(self) -> None:
        """Do something else than training: the time up to the next batch doesn't count."""
        self._outside = True

    def arrived(self) -> None:
        """A batch has been read."""
        if self._outside:
            self.start()
        self._waited += self._lap()
        if self._ended is not None:
            self._idle.append((self._ended, self._event()))

    def done(self, images: int) -> None:
        """A training step with this many images has ended."""
        self._lap()
        self._images += images
        if self._on_gpu:
            self._ended = self._event()

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[float, float]:
        """Return images a second and the share of waiting, 0 to 1, since the last call."""
        seconds = max(self._seconds, 1e-9)
        rates = self._images / seconds, self._waited / seconds
        if self._on_gpu:
            torch.cuda.synchronize()
            idle = sum(before.elapsed_time(after) for before, after in self._idle) / 1000
            self.device_wait = idle / seconds
            self._idle.clear()
        self._images, self._seconds, self._waited = 0, 0.0, 0.0
        return rates

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._mark = now - self._mark, now
        self._seconds += lap
        return lap


def _learning_rate(runner: Runner) -> float:
    """Return the largest over the parameter groups: layer decay lowers it in most of them."""
    return max(runner.optim_wrapper.get_lr()["lr"])


def _scalars(values: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the single numbers among the values."""
    single = {}
    for name, value in (values or {}).items():
        if isinstance(value, (int, float, np.number)) or (
            isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1
        ):
            single[name] = float(value)
    return single


def _times(runner: Runner) -> dict[str, float]:
    """Return the seconds of training so far, which a runner of mmengine does not tell."""
    return {"seconds": runner.seconds} if hasattr(runner, "seconds") else {}


class _TrainingHook(Hook):
    """What progress and metrics share: the meter, and a report every `interval` iterations.

    Args:
        interval: iterations between two reports; the last iteration has one too.

    Raises:
        ValueError: interval below 1.
    """

    def __init__(self, interval: int = 50) -> None:
        if interval < 1:
            raise ValueError(f"interval must be 1 or more iterations, got {interval}")
        self.interval = interval
        self._meter = Meter()

    @master_only
    def before_train_epoch(self, runner: Runner) -> None:
        self._meter.start()

    @master_only
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._meter.arrived()

    @master_only
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._meter.leave()

    def _is_due(self, runner: Runner) -> bool:
        done = runner.iter + 1
        return done % self.interval == 0 or done == runner.max_iters

    def _step_done(self, data_batch: Mapping[str, Tensor]) -> None:
        self._meter.done(len(data_batch["images"]) * get_world_size())


@HOOKS.register_module(name="VimProgressHook")
class ProgressHook(_TrainingHook):
    """Shows how far training and validation are.

    On a terminal it is a bar; elsewhere a line every `interval` iterations. Both say the loss of
    that iteration, images a second, the share of time spent waiting for data and the time that
    remains, validations and checkpoints included.

    Args:
        interval: iterations between two lines, or between two figures beside the bar.
    """

    # Before schedulers change the learning rate.
    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 50) -> None:
        super().__init__(interval)
        self._bar: tqdm | None = None
        self._evaluation: tqdm | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        self._start = (time.perf_counter(), runner.iter)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=runner.max_iters, initial=runner.iter, unit="it", dynamic_ncols=True
            )

    def before_train_epoch(self, runner: Runner) -> None:
        super().before_train_epoch(runner)
        if self._bar is not None:
            self._bar.set_description(f"epoch {runner.epoch + 1}/{runner.max_epochs}")

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        due = self._is_due(runner)
        # Reading the loss waits for the device, so it comes before the clock is read.
        loss = outputs["loss"].item() if due else None
        self._step_done(data_batch)
        if self._bar is not None:
            self._bar.update()
        if not due:
            return
        speed, wait = self._meter.take()
        figures = f"loss {loss:.4f}, {speed:,.0f} images/s, {wait:.0%} waiting for data"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            return
        done = runner.iter + 1
        moment, first = self._start
        remaining = (time.perf_counter() - moment) / (done - first) * (runner.max_iters - done)
        runner.logger.info(
            f"epoch {runner.epoch + 1}/{runner.max_epochs}, iteration {done}/{runner.max_iters}: "
            f"{figures}, lr {_learning_rate(runner):.3e}, {tqdm.format_interval(remaining)} to go"
        )

    @master_only
    def after_train(self, runner: Runner) -> None:
        # A validation that a signal ended leaves its bar behind.
        for bar in (self._evaluation, self._bar):
            if bar is not None:
                bar.close()
        self._evaluation = self._bar = None

    def before_val_epoch(self, runner: Runner) -> None:
        self._begin("validation", runner.val_dataloader)

    def before_test_epoch(self, runner: Runner) -> None:
        self._begin("test", runner.test_dataloader)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.update()

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._finish(runner, f"validation after epoch {runner.epoch}", metrics)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._finish(runner, "test", metrics)

    @master_only
    def _begin(self, name: str, batches: Any) -> None:
        if sys.stderr.isatty():
            # Some data sets of shards have no length.
            total = len(batches) if hasattr(batches, "__len__") else None
            self._evaluation = tqdm(total=total, desc=name, unit="batch", leave=False)

    @master_only
    def _finish(self, runner: Runner, name: str, metrics: Mapping[str, Any] | None) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
        figures = ", ".join(f"{key} {value:.4g}" for key, value in _scalars(metrics).items())
        with tqdm.external_write_mode():  # the line takes the bar's place, which moves on below it
            runner.logger.info(f"{name}: {figures}")


@HOOKS.register_module(name="VimMetricsHook")
class MetricsHook(_TrainingHook):
    """Writes metrics.jsonl in the work folder, and the same to TensorBoard where it is installed.

    A line every `interval` iterations has stage "train", `iteration` (done so far) and `epoch`
    (counted from 1); then means over the iterations since the line before of whatever the model
    returns (`loss`, ...), and the present `lr` (largest of the groups), `images_per_second`,
    `data_wait` (share of time, 0 to 1, that this process waits for a batch), `seconds` (of training
    so far, see `VimTrainLoop`), on a GPU `gpu_wait` (share of time that the GPU has nothing to do
    until a batch arrives) and `memory_gib` (the most its tensors took so far), and where there are
    such `grad_norm` (of the last clipping) and `loss_scale`. A line after each validation has stage
    "val", `iteration`, `epoch`, `seconds` and the metrics. What is not finite is null.

    Going on with a run drops the lines of what an earlier attempt did after that checkpoint, which
    also keeps the sums of an unfinished interval: the lines are those of a run never interrupted.
    A run that begins anew renames an earlier file to metrics.old.jsonl.

    Args:
        interval: iterations between two lines.
        tensorboard: write TensorBoard's files, to `tensorboard/`.
    """

    # Before schedulers change the learning rate, and before checkpoints are saved: a line must not
    # be missing from what is gone on with.
    priority = "BELOW_NORMAL"

    def __init__(self, interval: int = 50, tensorboard: bool = True) -> None:
        super().__init__(interval)
        self._tensorboard = tensorboard
        self._path: Path | None = None
        self._writer = None
        self._state: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._count = 0
        self._sums: dict[str, float | Tensor] = {}

    @master_only
    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._state = checkpoint.get(STATE_KEY, {})

    @master_only
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        super().before_save_checkpoint(runner, checkpoint)
        sums = {name: float(value) for name, value in self._sums.items()}
        checkpoint[STATE_KEY] = {"iteration": self._done, "count": self._count, "sums": sums}

    @master_only
    def before_train(self, runner: Runner) -> None:
        self._path = Path(runner.work_dir) / METRICS_FILE
        self._done = self._resumed = runner.iter
        self._forget()
        self._device = next(runner.model.parameters()).device
        self._meter = Meter(on_gpu=self._device.type == "cuda")
        # Weights to begin with may come from another run, whose sums are none of ours.
        if runner.iter and self._state.get("iteration") == runner.iter:
            self._count, self._sums = self._state["count"], dict(self._state["sums"])
        if self._path.exists() and not runner.iter:
            os.replace(self._path, self._path.with_name("metrics.old.jsonl"))
        self._keep(lambda line: line["iteration"] <= runner.iter)
        if self._tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            folder = self._path.with_name("tensorboard")
            self._writer = SummaryWriter(folder, purge_step=runner.iter + 1)

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._done = runner.iter + 1
        self._count += 1
        for name, value in outputs.items():
            value = value.detach().double() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
        if not self._is_due(runner):
            self._step_done(data_batch)
            return
        # Reading the sums waits for the device, so it comes before the clock is read.
        line = {name: float(value) / self._count for name, value in self._sums.items()}
        self._step_done(data_batch)
        self._forget()
        line["lr"] = _learning_rate(runner)
        line["images_per_second"], line["data_wait"] = self._meter.take()
        if self._device.type == "cuda":
            line["gpu_wait"] = self._meter.device_wait
            line["memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        norm = getattr(runner.optim_wrapper, "grad_norm", None)
        if norm is not None:
            line["grad_norm"] = float(norm)
        scaler = getattr(runner.optim_wrapper, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            line["loss_scale"] = scaler.get_scale()
        self._append("train", self._done, runner.epoch + 1, _times(runner) | line)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        if self._path is None:  # a validation without training
            return
        if runner.iter == self._resumed:
            # Killed between this validation and the next checkpoint, a run validates once more.
            self._keep(lambda line: line["stage"] != "val" or line["iteration"] < runner.iter)
            self._resumed = None
        self._append("val", runner.iter, runner.epoch, _times(runner) | _scalars(metrics))

    @master_only
    def after_train(self, runner: Runner) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self, stage: str, iteration: int, epoch: int, figures: dict[str, float]) -> None:
        line = {"stage": stage, "iteration": iteration, "epoch": epoch}
        line |= {name: x if math.isfinite(x) else None for name, x in figures.items()}
        # One write and no buffer left behind: killed at any moment, the file has whole lines.
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{stage}/{name}", value, iteration)
            self._writer.flush()

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        lines = [json.dumps(line) + "\n" for line in read_metrics(self._path) if wanted(line)]
        with atomic_write(self._path) as path:
            path.write_text("".join(lines), "utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none where there is no file.

    A line that isn't whole, as a machine that lost power leaves behind, is passed over with a
    warning.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s, line %d: not a whole line of JSON, passed over", path, number)
    return lines


@HOOKS.register_module(name="VimCurvesHook")
class CurvesHook(Hook):
    """Draws curves.png in the work folder from metrics.jsonl, after validations and at the end.

    It shows losses, accuracies, learning rate and images a second; "VimMetricsHook" must be there.

    Args:
        seconds: how long after a drawing the next validation has none, since the training waits.
    """

    priority = "LOW"

    def __init__(self, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._drawn = -math.inf

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        if time.monotonic() - self._drawn >= self._seconds:
            self._draw(runner)
            self._drawn = time.monotonic()

    @master_only
    def after_train(self, runner: Runner) -> None:
        self._draw(runner)

    def _draw(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        records = read_metrics(folder / METRICS_FILE)
        if records:
            with atomic_write(folder / "curves.png") as path:
                curves_figure(records).savefig(path, format="png", dpi=100)


@HOOKS.register_module(name="VimRunInfoHook")
class RunInfoHook(Hook):
    """Writes what is run to the work folder as training starts.

    `config.py` is the configuration with all that it builds on. `run.json` has an entry for each
    start of the run, the first and those that went on: see `run_info`.
    """

    priority = "VERY_HIGH"

    @master_only
    def before_train(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        with atomic_write(folder / "config.py") as path:
            path.write_text(runner.cfg.pretty_text, "utf-8")
        device = next(runner.model.parameters()).device
        entry = {"iteration": runner.iter, "seed": runner.seed, **run_info(device)}
        file = folder / "run.json"
        starts = json.loads(file.read_text("utf-8")) if file.exists() else []
        with atomic_write(file) as path:
            path.write_text(json.dumps([*starts, entry], indent=1) + "\n", "utf-8")


def run_info(device: torch.device) -> dict[str, Any]:
    """Return what figures depend on.

    Returns:
        time, host, command, commit (with "+" where files differ from it, None outside a checkout),
        processes, device, environment (versions and devices, as `python -m vim.doctor` shows them)
        and variables (of the environment, those that steer libraries).
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    packages = {}
    for package in ("mmengine", "torchmetrics", "tensorboard", "pillow"):
        if importlib.util.find_spec("PIL" if package == "pillow" else package):
            packages[package] = importlib.metadata.version(package)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "commit": _commit(),
        "processes": get_world_size(),
        "device": f"{device}, {name or platform.machine()}",
        "environment": environment() | packages,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def _commit() -> str | None:
    folder = Path(vim.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    # An installed copy may lie inside the checkout of another project, whose commit isn't ours.
    if shutil.which("git") is None or not git("ls-files", "__init__.py"):
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
