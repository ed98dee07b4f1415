"""Hooks that keep a run and its result safe: averaged weights, checkpoints, finite numbers."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vim.engine import checkpoints
from vim.engine.runner import NonFiniteError, VimRunner
from vim.engine.seeding import seed_everything_at
from vim.models import save_checkpoint

__all__ = ["VimCheckpointHook", "VimEMAHook", "VimFiniteHook"]


@HOOKS.register_module()
class VimEMAHook(Hook):
    """Averages the weights over training: timm's ModelEmaV3 over everything in the state dict.

    Validation and tests run on the average. Checkpoints hold it as `model_ema`; the average of a
    sharded model is sharded likewise.

    Args:
        decay: weight of the average against the model, at each update.
        warmup: let the decay after n updates be 1 - (1 + n)^(-2/3), where that is less.
        start: updates of the weights before which the average is the model itself.
        validate_raw: whether the weights that train are validated, too, under `raw/`.
    """

    priority = "NORMAL"

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = False,
        start: int = 0,
        validate_raw: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.start = start
        self.validate_raw = validate_raw

    def before_run(self, runner: VimRunner) -> None:
        """Start the average at the model's weights, once: a test may follow the training."""
        if runner.ema is self:
            return
        runner.ema = self
        self._model = runner.unwrapped_model
        # Making the list takes as long as averaging; only a sharded model replaces its tensors.
        self._kept = None if runner.sharded else self._list()
        self._average = ModelEmaV3(
            self._weights(),
            decay=self.decay,
            use_warmup=self.warmup,
            update_after_step=self.start,
        )

    def _weights(self) -> nn.ParameterList:
        return self._list() if self._kept is None else self._kept

    def _list(self) -> nn.ParameterList:
        """The tensors of the model's state dict, of a sharded one this process's parts; the list
        shares their memory."""
        return nn.ParameterList(
            nn.Parameter(t.to_local() if isinstance(t, DTensor) else t, requires_grad=False)
            for t in self._model.state_dict().values()
        )

    def after_train_iter(
        self,
        runner: VimRunner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Average once for each update of the weights."""
        if runner.optim_wrapper.should_update():
            updates = -(-(runner.iter + 1) // runner.train_loop.accumulation)
            self._average.update(self._weights(), step=updates)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for ours, theirs in zip(self._average.module, self._weights(), strict=True):
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)

    def before_save_checkpoint(self, runner: VimRunner, checkpoint: dict) -> None:
        """Add the average."""
        with self.swapped():
            checkpoint["model_ema"] = runner.model_state()

    def after_load_checkpoint(self, runner: VimRunner, checkpoint: dict) -> None:
        """Take the average from the checkpoint, or start it at the weights that were loaded."""
        if "model_ema" in checkpoint:
            with self.swapped():
                runner.load_model_state(checkpoint["model_ema"])
        else:
            self._average.set(self._weights())


@HOOKS.register_module()
class VimCheckpointHook(Hook):
    """Saves a checkpoint every `checkpoint_interval` iterations of the loop, and the best one.

    `iter_<iterations>.pth` and `best_<metric>.pth` in work_dir hold all that training needs to go
    on; `weights.safetensors`, at the end, the backbone's weights alone, the averaged ones where
    there are some. While gradients are accumulated, a checkpoint waits for the next update.

    Args:
        keep: checkpoints by iteration that are kept, the newest.
        save_best: the metric of the validation that decides; None for no best checkpoint.
        rule: "greater" or "less" is better; None means less for a metric whose name ends in loss,
            error or ece.
        export: whether to write `weights.safetensors`.
    """

    priority = "VERY_LOW"  # after schedulers and averages have made their step

    def __init__(
        self,
        keep: int = 3,
        save_best: str | None = "top1",
        rule: Literal["greater", "less"] | None = None,
        export: bool = True,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        if rule not in ("greater", "less", None):
            raise ValueError(f'rule must be "greater", "less" or None, got {rule!r}')
        self.keep = keep
        self.save_best = save_best
        less = save_best is not None and save_best.endswith(("loss", "error", "ece"))
        self.rule = rule or ("less" if less else "greater")
        self.export = export
        self.best: dict[str, Any] | None = None
        self._due = False

    def after_train_iter(
        self,
        runner: VimRunner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Save if it is time; at the end of an epoch, only when its hooks have run."""
        done = runner.iter + 1
        self._due |= done % runner.train_loop.checkpoint_interval == 0
        if done % runner.train_loop.epoch_length:
            self._save_if_due(runner, done)

    def after_train_epoch(self, runner: VimRunner) -> None:
        """Save if it is time."""
        self._save_if_due(runner, runner.iter)

    def _save_if_due(self, runner: VimRunner, iteration: int) -> None:
        if self._due and runner.optim_wrapper.should_update():
            self._due = False
            self._save(runner, iteration)

    def _save(self, runner: VimRunner, iteration: int) -> None:
        runner.save_checkpoint(checkpoints.iteration_path(runner.work_dir, iteration), iteration)
        if runner.rank == 0:
            checkpoints.rotate(runner.work_dir, self.keep)

    def after_val_epoch(
        self, runner: VimRunner, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Save the best so far, of the validations that are part of training."""
        if not runner.is_training or self.save_best is None:
            return
        metrics = metrics or {}
        if self.save_best not in metrics:
            near = difflib.get_close_matches(self.save_best, metrics)
            raise ValueError(
                f"save_best={self.save_best!r} is none of the validation's metrics: "
                f"{', '.join(metrics)}" + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
        score = float(metrics[self.save_best])
        if self.best is None or self._better(score, self.best["score"]):
            self.best = {"metric": self.save_best, "score": score, "iteration": runner.iter}
            path = checkpoints.best_path(runner.work_dir, self.save_best)
            runner.save_checkpoint(path, runner.iter)
            runner.logger.info(f"best {self.save_best} so far, {score:.4g}: {path}")

    def _better(self, score: float, than: float) -> bool:
        return score > than if self.rule == "greater" else score < than

    def after_train(self, runner: VimRunner) -> None:
        """Save the end, unless a signal stopped the run, which is saved already then."""
        if runner.stopped_by:
            return
        self._save(runner, runner.iter)
        if self.export:
            with runner.ema.swapped() if runner.ema is not None else nullcontext():
                weights = runner.model_state()
            prefix = "backbone." if any(k.startswith("backbone.") for k in weights) else ""
            weights = {
                k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)
            }
            if runner.rank == 0:
                save_checkpoint(weights, Path(runner.work_dir) / "weights.safetensors")

    def before_save_checkpoint(self, runner: VimRunner, checkpoint: dict) -> None:
        """Add the best score."""
        checkpoint["best"] = self.best

    def after_load_checkpoint(self, runner: VimRunner, checkpoint: dict) -> None:
        """Take the best score, if it is of the metric that decides now."""
        best = checkpoint.get("best")
        self.best = best if best and best["metric"] == self.save_best else None


@HOOKS.register_module()
class VimFiniteHook(Hook):
    """Stops when the loss is NaN or infinite, before its gradient reaches the weights.

    It says the iteration, epoch and learning rate, the first module whose output is not finite,
    found by running the batch once more with the same random numbers, and the last good
    checkpoint. Looking at the loss waits for the device; processes agree on it.

    With float16, counts the updates that the gradient scaler skipped.

    Args:
        interval: look at the loss every so many iterations. With more than 1, weights may be
            broken by the time it is found, which is said then.
        max_skipped: stop after so many skipped updates in a row.
    """

    priority = "HIGH"

    def __init__(self, interval: int = 1, max_skipped: int = 50) -> None:
        if interval < 1 or max_skipped < 1:
            raise ValueError(
                f"interval and max_skipped must be 1 or more, got {interval} and {max_skipped}"
            )
        self.interval = interval
        self.max_skipped = max_skipped
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._scale = 0.0
        self._batch: Any = None
        self._searching = False

    def before_train(self, runner: VimRunner) -> None:
        """Begin to look at the losses that the model returns."""
        self._handle = runner.unwrapped_model.register_forward_hook(partial(self._look, runner))

    def after_train(self, runner: VimRunner) -> None:
        """Look no longer."""
        self._handle.remove()
        self._batch = None

    def before_train_iter(self, runner: VimRunner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep what is needed to do the iteration again."""
        self._batch = data_batch
        scaler = self._scaler(runner)
        if scaler is not None:
            self._scale = scaler.get_scale()

    @staticmethod
    def _scaler(runner: VimRunner) -> torch.amp.GradScaler | None:
        scaler = getattr(runner.optim_wrapper, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _look(self, runner: VimRunner, model: nn.Module, inputs: tuple, losses: Any) -> None:
        """Raise NonFiniteError if the losses of a training iteration are not finite anywhere."""
        if self._searching or not model.training or not isinstance(losses, Mapping):
            return
        if runner.iter % self.interval:
            return
        loss, parts = model.parse_losses(losses)
        broken = (~loss.detach().isfinite()).float()
        if runner.distributed:
            dist.all_reduce(broken, dist.ReduceOp.MAX)
        if broken:
            self._searching = True
            values = ", ".join(f"{name} {float(value.detach()):g}" for name, value in parts.items())
            raise NonFiniteError(self._message(runner, model, values))

    def _message(self, runner: VimRunner, model: nn.Module, values: str) -> str:
        findings = [f"{values}; {self._search(runner, model)}"]
        if runner.distributed:
            gathered: list[Any] = [None] * runner.world_size
            dist.all_gather_object(gathered, findings[0], group=runner.cpu_group)
            findings = [f"rank {rank}: {finding}" for rank, finding in enumerate(gathered)]
        rate = runner.optim_wrapper.get_lr()
        rate = max(rate.get("base_lr", rate["lr"]))
        return (
            f"the loss is not finite at iteration {runner.iter + 1} (epoch {runner.epoch + 1}, "
            f"learning rate {rate:g}). {'. '.join(findings)}. {runner.last_good()}. Lower the "
            "learning rate or warm up for longer, clip gradients (optim_wrapper.clip_grad), take "
            'dtype "bfloat16" or "float32" instead of "float16"; then resume'
        )

    def _search(self, runner: VimRunner, model: nn.Module) -> str:
        """Run the batch again and say which module is the first with an output not finite."""
        broken = [name for name, p in model.named_parameters() if not _is_finite(p)]
        found: list[str] = []

        def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            if not _is_finite(output):
                found.append(f"{name} ({type(module).__name__})")

        handles = [
            module.register_forward_hook(partial(note, name))
            for name, module in model.named_modules()
            if name
        ]
        seed_everything_at(runner.seed, runner.rank, runner.iter)
        try:
            # Compiled code would pass over hooks.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                data = model.data_preprocessor(self._batch, True)
                losses = model(**data, mode="loss")
        finally:
            for handle in handles:
                handle.remove()
        if found:
            answer = f"the first module with an output that is not finite is {found[0]}"
        elif not _is_finite(losses):
            answer = "every module's output is finite, so the loss itself is not"
        else:
            answer = "run once more, the batch gives finite outputs here"
        if broken:
            answer += (
                f"; weights are not finite in {', '.join(broken[:4])}"
                f"{' and others' if len(broken) > 4 else ''}, since an earlier gradient was not"
            )
        return answer

    def after_train_iter(
        self,
        runner: VimRunner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Count the updates that the scaler skipped, which it shows by a lower scale."""
        scaler = self._scaler(runner)
        if scaler is None or not runner.optim_wrapper.should_update():
            return
        if scaler.get_scale() >= self._scale:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        runner.message_hub.update_info("skipped_updates", self.skipped)
        if self._skipped_in_a_row >= self.max_skipped:
            raise NonFiniteError(
                f"{self.max_skipped} updates in a row were skipped up to iteration "
                f"{runner.iter + 1}, because float16 gradients overflow at every scale (now "
                f"{scaler.get_scale():g}). {runner.last_good()}. Resume with "
                'optim_wrapper.dtype="bfloat16" or "float32"'
            )

    def before_save_checkpoint(self, runner: VimRunner, checkpoint: dict) -> None:
        """Add the counts."""
        checkpoint["skipped_updates"] = [self.skipped, self._skipped_in_a_row]

    def after_load_checkpoint(self, runner: VimRunner, checkpoint: dict) -> None:
        """Take the counts."""
        self.skipped, self._skipped_in_a_row = checkpoint.get("skipped_updates", [0, 0])


def _is_finite(value: Any) -> bool:
    """Whether all floating-point numbers in tensors, dicts and sequences of those are finite."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(_is_finite, value))
