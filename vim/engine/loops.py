"""The loops of training, validation and testing; they stop and go on between any two iterations."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from mmengine.evaluator import Evaluator
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop
from torch import nn
from torch.utils.data import IterableDataset

from vim.engine import checkpoints
from vim.engine.data import loader_builder
from vim.engine.seeding import seed_everything_at

if TYPE_CHECKING:
    from vim.engine.runner import VimRunner

__all__ = ["VimTestLoop", "VimTrainLoop", "VimValLoop"]


@LOOPS.register_module()
class VimTrainLoop(BaseLoop):
    """Training by epochs that can stop, and go on, between any two iterations.

    SIGTERM and SIGINT stop it after the update that is under way: it saves a checkpoint, says so,
    and `run` returns; a second SIGINT, a second or more later, stops at once. All processes stop
    after the same iteration.

    Args:
        runner: the runner.
        dataloader: see `vim.engine.data.loader_builder`, or a loader; its `set_epoch(epoch,
            start)`, or its sampler's, goes to a place in the data.
        max_epochs: epochs to train.
        val_interval: epochs from one validation to the next; the last epoch has one, too.
        val_begin: the first epoch to validate after.
        checkpoint_interval: iterations from one checkpoint to the next; None means an epoch.
        max_seconds: seconds to train, validations and checkpoints included: training ends with the
            update in which they are over, if `max_epochs` have not passed before; one validation
            follows. The first iteration does not count, since it compiles kernels and waits for
            workers to start.
            Schedules follow the share of the seconds or of the epochs that has passed, whichever
            is larger, so that runs of different speed can be compared at equal cost. Such a run
            depends on the clock: the same seed does not give the same curve.
    """

    def __init__(
        self,
        runner: "VimRunner",
        dataloader: Any,
        max_epochs: int,
        val_interval: int = 1,
        val_begin: int = 1,
        checkpoint_interval: int | None = None,
        max_seconds: float | None = None,
    ) -> None:
        super().__init__(runner, _loader(runner, dataloader, is_training=True))
        preprocessor = getattr(runner.unwrapped_model, "data_preprocessor", None)
        if hasattr(preprocessor, "check_loader"):  # before training, not at the last batch
            preprocessor.check_loader(self.dataloader)
        self.epoch_length = len(self.dataloader)
        self.max_epochs = max_epochs
        self.val_interval = val_interval
        self.val_begin = val_begin
        self.checkpoint_interval = (
            self.epoch_length if checkpoint_interval is None else checkpoint_interval
        )
        for name in ("max_epochs", "val_interval", "val_begin", "checkpoint_interval"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"max_seconds must be more than 0, got {max_seconds!r}")
        self.max_seconds = max_seconds
        self.max_iters = max_epochs * self.epoch_length
        self._before = 0.0  # seconds of earlier parts of the run
        self._start: float | None = None
        self.progress = 0.0
        self.epoch = 0
        self.iter = 0
        self.validated_epoch = 0
        self.stop_training = False  # mmengine's EarlyStoppingHook sets it
        self.stopped_by: str | None = None
        self._signal = 0

    @property
    def batch_size(self) -> int:
        """Samples of a batch on each process."""
        return self.dataloader.batch_size

    @property
    def accumulation(self) -> int:
        """Iterations to an update of the weights."""
        return getattr(self.runner.optim_wrapper, "_accumulative_counts", 1)

    @property
    def seconds(self) -> float:
        """Seconds since the first iteration, those before a resumption included."""
        return self._before + (0.0 if self._start is None else time.perf_counter() - self._start)

    def _advance(self, iterations: int) -> None:
        """Set `progress`, from 0 to 1 and the same on all processes, as of so many iterations."""
        self.progress = iterations / self.max_iters
        if self.max_seconds is not None:
            share = self.runner.highest(int(1e6 * self.seconds / self.max_seconds)) / 1e6
            self.progress = min(max(self.progress, share), 1.0)

    @property
    def _spent(self) -> bool:
        """Whether the seconds are over."""
        return self.max_seconds is not None and self.progress >= 1

    @property
    def _over(self) -> bool:
        return self.epoch >= self.max_epochs or self._spent

    def start_at(self, iteration: int, validated_epoch: int, seconds: float = 0.0) -> None:
        """Go on after `iteration` iterations and `seconds`, the last validation having followed an
        epoch."""
        self._before = seconds
        self.iter = iteration
        self.epoch = iteration // self.epoch_length
        self.validated_epoch = validated_epoch

    def run(self) -> nn.Module:
        """Train to the end or until stopped; return the model."""
        if self.accumulation > 1:
            # Updates are rarer than a schedule's steps, of which mmengine would warn.
            self.runner.optim_wrapper._global_step = 0
        self._advance(self.iter)
        if self.max_seconds is not None:
            self._lead_schedules()
        with self._signals_caught():
            self.runner.call_hook("before_train")
            self._validate_if_due()  # stopped between an epoch's end and its validation's
            while not self._over and not self.stop_training and not self.stopped_by:
                self._run_epoch()
                if not self.stopped_by:
                    self._validate_if_due()
            if self.stopped_by:
                path = checkpoints.iteration_path(self.runner.work_dir, self.iter)
                self.runner.save_checkpoint(path, self.iter)
                self.runner.logger.warning(
                    f"stopped by {self.stopped_by} at iteration {self.iter}; go on with --resume"
                )
            self.runner.call_hook("after_train")
        return self.runner.model

    def _lead_schedules(self) -> None:
        for schedule in self.runner.param_schedulers or []:
            if not hasattr(schedule, "follow"):
                raise ValueError(
                    f"train_cfg.max_seconds needs schedules that follow progress: VimCosineLR, not "
                    f"{type(schedule).__name__}"
                )
            schedule.follow(lambda: self.progress)

    def should_stop(self) -> bool:
        """Whether a signal has reached any process; all of them must ask.

        Not while gradients are accumulated in part, which no checkpoint holds.
        """
        if not self.runner.optim_wrapper.should_update():
            return False
        number = self.runner.highest(self._signal)
        if number:
            self.stopped_by = signal.Signals(number).name
        return bool(number)

    def _run_epoch(self) -> None:
        start = self.iter % self.epoch_length
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for batch_idx, batch in enumerate(self._batches(start), start):
            self._run_iter(batch_idx, batch)
            if self.should_stop():
                break
            if self._spent and self.runner.optim_wrapper.should_update():
                break
        if self.iter % self.epoch_length == 0:
            self.runner.call_hook("after_train_epoch")
            self.epoch += 1

    def _batches(self, start: int) -> Iterator[Any]:
        """The batches of the epoch from the one numbered `start`; an iterable set begins anew
        until there are enough."""
        loader = self.dataloader
        goer = loader if hasattr(loader, "set_epoch") else loader.sampler
        goer.set_epoch(self.epoch, start * self.batch_size)
        number = start
        while number < self.epoch_length:
            before = number
            for batch in loader:
                yield batch
                number += 1
                if number == self.epoch_length:
                    return
            if number == before or not isinstance(loader.dataset, IterableDataset):
                raise RuntimeError(
                    f"the data ended after {number} of {self.epoch_length} batches of epoch "
                    f"{self.epoch + 1}: was the data set changed while training?"
                )

    def _run_iter(self, batch_idx: int, data_batch: Any) -> None:
        runner = self.runner
        seed_everything_at(runner.seed, runner.rank, self.iter)
        runner.unwrapped_model.data_preprocessor.progress = self.progress
        runner.call_hook("before_train_iter", batch_idx=batch_idx, data_batch=data_batch)
        if runner.sharded:
            runner.model.set_requires_gradient_sync(runner.optim_wrapper.should_sync())
        outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        if self._start is None:
            self._start = time.perf_counter()
        self._advance(self.iter + 1)  # schedules are hooks
        runner.call_hook(
            "after_train_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs
        )
        self.iter += 1

    def _validate_if_due(self) -> None:
        epoch = -(-self.iter // self.epoch_length)  # counted from 1, perhaps begun only
        due = (
            self.runner.val_loop is not None
            and (epoch == self.epoch or self._spent)
            and epoch >= self.val_begin
            and (epoch % self.val_interval == 0 or self._over)
            and self.validated_epoch < epoch
        )
        if due:
            self.runner.val_loop.run()
            if not self.stopped_by:
                self.validated_epoch = epoch

    @contextmanager
    def _signals_caught(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT ask the loop to stop; only the main thread can catch them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner, first = os.getpid(), 0.0

        def catch(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if os.getpid() != owner:  # a forked process inherits the handler, not the loop
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            # torchrun passes on the SIGINT that the terminal sent to all, so it comes twice.
            elif self._signal and number == signal.SIGINT and time.monotonic() - first > 1:
                raise KeyboardInterrupt
            elif not self._signal:
                self._signal, first = number, time.monotonic()

        caught = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, catch) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _EvaluationLoop(BaseLoop):
    """What validation and testing share: each sample counts once, on one process.

    Args:
        runner: the runner.
        dataloader: see `vim.engine.data.loader_builder`, or a loader.
        evaluator: metrics, built or their configs; they are given what the model's `val_step` or
            `test_step` returns as it is.
        dtype: of autocast.
    """

    stage: Literal["val", "test"]

    def __init__(
        self,
        runner: "VimRunner",
        dataloader: Any,
        evaluator: Evaluator | dict | list,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__(runner, _loader(runner, dataloader, is_training=False))
        self.evaluator = runner.build_evaluator(evaluator)
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        self.dtype = getattr(torch, dtype)

    def run(self) -> dict[str, float]:
        """Evaluate and return the metrics: of the averaged weights where there are some, and then,
        if VimEMAHook has `validate_raw`, under `raw/` those of the weights that train.

        A signal to stop training ends a validation early: it returns nothing, calls no
        `after_val_epoch`, and is done again when the run is resumed.
        """
        runner, ema = self.runner, self.runner.ema
        runner.call_hook(f"before_{self.stage}")
        runner.call_hook(f"before_{self.stage}_epoch")
        runner.model.eval()
        metrics: dict[str, float] = {}
        if ema is not None and ema.validate_raw:
            raw = self._evaluate()
            if raw is None:
                return {}
            metrics = {f"raw/{name}": value for name, value in raw.items()}
        # The averaged weights come last, so that what metrics keep for a report is theirs.
        with ema.swapped() if ema is not None else nullcontext():
            found = self._evaluate()
        if found is None:
            return {}
        metrics = {**found, **metrics}
        runner.call_hook(f"after_{self.stage}_epoch", metrics=metrics)
        runner.call_hook(f"after_{self.stage}")
        return metrics

    @torch.no_grad()  # not inference_mode, whose tensors a sharded model could not train with
    def _evaluate(self) -> dict[str, float] | None:
        """Return the metrics of the weights as they are; None if stopped."""
        runner = self.runner
        training = runner.train_loop if runner.is_training else None
        step = getattr(runner.model, f"{self.stage}_step")
        autocast = torch.autocast(runner.device_type, self.dtype, self.dtype != torch.float32)
        # Processes may have one batch more or less than others, and agree only on common ones.
        batches = len(self.dataloader)
        common, longest = -runner.highest(-batches), runner.highest(batches)
        if runner.sharded and not common:
            raise ValueError(
                f"a process has none of the {longest} batches to evaluate, and a sharded model "
                "needs all processes: make batch_size smaller"
            )
        if runner.distributed:
            # A norm's statistics are each process's own in training; checkpoints hold the first's.
            for buffer in runner.unwrapped_model.buffers():
                dist.broadcast(buffer, src=0)
        for metric in self.evaluator.metrics:
            metric.results.clear()
        for batch_idx, batch in enumerate(self.dataloader):
            if training is not None and batch_idx < common and training.should_stop():
                return None
            runner.call_hook(f"before_{self.stage}_iter", batch_idx=batch_idx, data_batch=batch)
            with autocast:
                outputs = step(batch)
            for metric in self.evaluator.metrics:
                metric.process(batch, outputs)
            runner.call_hook(
                f"after_{self.stage}_iter", batch_idx=batch_idx, data_batch=batch, outputs=outputs
            )
        if runner.sharded:
            for _ in range(longest - batches):  # gathers weights for those still at work
                with autocast:
                    step(batch)
        return self.evaluator.evaluate(len(self.dataloader.dataset))


@LOOPS.register_module()
class VimValLoop(_EvaluationLoop):
    __doc__ = "Validation. " + _EvaluationLoop.__doc__
    stage = "val"


@LOOPS.register_module()
class VimTestLoop(_EvaluationLoop):
    __doc__ = "Testing. " + _EvaluationLoop.__doc__
    stage = "test"


def _loader(runner: "VimRunner", dataloader: Any, *, is_training: bool) -> Any:
    """Return the loader that a config's keys name, or the loader that is given."""
    if not isinstance(dataloader, dict):
        return dataloader
    return loader_builder(dataloader)(
        dataloader,
        seed=runner.seed,
        rank=runner.rank,
        world_size=runner.world_size,
        is_training=is_training,
    )
