"""The runner: mmengine's, with training that survives whatever stops it.

A run goes on after `kill -9` from its newest whole checkpoint and draws the same curve as one that
was never stopped, because all that is random in an iteration depends on (seed, rank, iteration)
and a checkpoint holds all the rest. See `vim.engine.checkpoints` for the files.
"""

import difflib
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import mmengine
import timm
import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

import vim
from vim.engine import checkpoints
from vim.engine.checkpoints import CheckpointError
from vim.engine.loops import VimTestLoop, VimTrainLoop, VimValLoop
from vim.engine.training_graph import BUCKET_CAP_MB
from vim.models import read_checkpoint

__all__ = ["NonFiniteError", "VimRunner", "VimTestLoop", "VimTrainLoop", "VimValLoop"]

_FORMAT = "vim training checkpoint 1"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOGGED_VALUES = 10_000  # kept of each logged scalar, for what averages over a window

_DEFAULT_HOOKS = {
    "runtime_info": {"type": "VimRuntimeInfoHook"},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "finite": {"type": "VimFiniteHook"},
    "checkpoint": {"type": "VimCheckpointHook"},
}


class NonFiniteError(FloatingPointError):
    """A loss, gradient or weight became NaN or infinite; the message says where and what to do."""


@HOOKS.register_module()
class VimRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's, but for the losses of each iteration: reading them would wait for the device.

    VimMetricsHook writes them, and reads them as seldom as it writes.
    """

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


@RUNNERS.register_module()
class VimRunner(Runner):
    """mmengine's Runner over our checkpoints, loops and hooks, on one process or many.

    Beyond mmengine's keys the config has:
        parallel: "ddp" (default) or "fsdp", which shards each block of `model.backbone.blocks`;
            one process needs neither.
        device: such as "cpu"; by default the GPU of this process where there is one.
        compile: True, or the arguments of torch.compile, for `model.backbone`.
        resume_with_changes: True lets a run go on with another number of processes, batch size,
            accumulation or seed, as long as an epoch has as many iterations.
    A seed that is not given is 0. Every process must see the same `work_dir`.
    """

    def __init__(self, *args, launcher: str = "none", **kwargs) -> None:
        if launcher == "none" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            launcher = "pytorch"  # started by torchrun: never as many single runs in one folder
        self.ema = None  # VimEMAHook puts itself here
        self.is_training = False  # also while a validation is part of it
        super().__init__(*args, launcher=launcher, **kwargs)

    def setup_env(self, env_cfg: dict) -> None:
        """Start the processes' communication: NCCL, or gloo where there is no GPU."""
        on_cpu = not torch.cuda.is_available() or self.device_type == "cpu"
        if self.distributed and self.launcher == "pytorch" and on_cpu and not dist.is_initialized():
            dist.init_process_group("gloo")
        super().setup_env(env_cfg)
        # Small agreements go over the CPU: they wait for no kernel.
        self.cpu_group = dist.new_group(backend="gloo") if self.distributed else None

    @property
    def device_type(self) -> str:
        """Kind of device that the model runs on: "cuda", "cpu", ..."""
        return torch.device(self.cfg.get("device") or get_device()).type

    def set_randomness(
        self, seed: int | None = None, diff_rank_seed: bool = False, deterministic: bool = False
    ) -> None:
        """Seed the generators, with 0 where no seed is given; see mmengine's Runner."""
        super().set_randomness(0 if seed is None else seed, diff_rank_seed, deterministic)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Return the model on its device, as `parallel` says where there are several processes."""
        parallel = self.cfg.get("parallel", "ddp")
        if parallel not in ("ddp", "fsdp"):
            raise ValueError(f'parallel must be "ddp" or "fsdp", got {parallel!r}')
        model = model.to(self.cfg.get("device") or get_device())
        if not self.distributed:
            return model
        if parallel == "fsdp":
            if model_wrapper_cfg:
                raise ValueError('model_wrapper_cfg is for parallel="ddp"; leave it out')
            return self._shard(model)
        on_gpu = self.device_type != "cpu"
        options = {
            "device_ids": [int(os.environ["LOCAL_RANK"])] if on_gpu else None,
            # Running statistics of norms, where there are some: those of rank 0 serve all.
            "broadcast_buffers": any(True for _ in model.buffers()),
            "find_unused_parameters": self.cfg.get("find_unused_parameters", False),
            # Gradients stay where the processes add them up: no copies, and less memory.
            "gradient_as_bucket_view": True,
            "bucket_cap_mb": BUCKET_CAP_MB if getattr(model, "cuda_graph", False) else None,
            **(model_wrapper_cfg or {}),
        }
        if self.device_type != "cuda":
            return MMDistributedDataParallel(module=model, **options)
        # DDP keeps what adds gradients up, and that belongs to the stream of now. If it were the
        # default one, no graph of the model's backward could be captured.
        now, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):
            model = MMDistributedDataParallel(module=model, **options)
        now.wait_stream(side)
        return model

    def _shard(self, model: nn.Module) -> nn.Module:
        """Shard parameters, gradients and optimizer states over all processes, block by block."""
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        mesh = dist.init_device_mesh(self.device_type, (self.world_size,))
        for block in getattr(getattr(model, "backbone", model), "blocks", ()):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def _init_model_weights(self) -> None:
        """Do nothing: timm's models initialise themselves, and mmengine would undo `pretrained`."""

    def build_visualizer(self, visualizer: Visualizer | dict | None = None) -> Visualizer:
        """Return a visualizer that writes nothing unless one is given: VimMetricsHook does."""
        return super().build_visualizer(visualizer or {"type": "Visualizer", "vis_backends": []})

    def dump_config(self) -> None:
        """Do nothing: VimRunInfoHook writes the config, and checkpoints hold it."""

    def _maybe_compile(self, target: str) -> None:
        """Compile the backbone; mmengine would compile the optimizer's step with it."""
        options = self.cfg.get("compile", False)
        if options:
            self.unwrapped_model.backbone.compile(**({} if options is True else options))

    def register_default_hooks(self, hooks: dict[str, Hook | dict | None] | None = None) -> None:
        """Register the default hooks, those in `hooks` in their places; None leaves one out."""
        for hook in {**_DEFAULT_HOOKS, **(hooks or {})}.values():
            if hook is not None:
                self.register_hook(dict(hook) if isinstance(hook, dict) else hook)

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without the wrapper of DDP."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    @property
    def sharded(self) -> bool:
        """Whether the model's weights are spread over the processes."""
        return isinstance(self.model, FSDPModule)

    @property
    def _built_loop(self) -> BaseLoop | None:
        """The training's loop; mmengine would build it, and open its data, to say where it is."""
        return self._train_loop if isinstance(self._train_loop, BaseLoop) else None

    @property
    def epoch(self) -> int:
        """Epochs trained, 0 where nothing is being trained."""
        return getattr(self._built_loop, "epoch", 0)

    @property
    def iter(self) -> int:
        """Iterations trained, 0 where nothing is being trained."""
        return getattr(self._built_loop, "iter", 0)

    @property
    def max_epochs(self) -> int:
        """Epochs to train, 0 where nothing is being trained."""
        return getattr(self._built_loop, "max_epochs", 0)

    @property
    def max_iters(self) -> int:
        """Iterations to train, 0 where nothing is being trained."""
        return getattr(self._built_loop, "max_iters", 0)

    @property
    def seconds(self) -> float:
        """Seconds trained, 0 where nothing is being trained."""
        return getattr(self._built_loop, "seconds", 0.0)

    @property
    def stopped_by(self) -> str | None:
        """The signal that ended training early, such as "SIGTERM"; None where none did."""
        return getattr(self._built_loop, "stopped_by", None)

    def model_state(self) -> dict[str, Tensor]:
        """The model's weights, whole and copied to the CPU; of a sharded model on rank 0 only."""
        if self.sharded:
            return get_model_state_dict(self.model, options=_FULL)
        state = self.unwrapped_model.state_dict()
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Load whole weights, the same on every process; every name must match."""
        if self.sharded:
            set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True))
        else:
            self.unwrapped_model.load_state_dict(state)

    def highest(self, number: int) -> int:
        """The highest of all processes' numbers; every process must ask."""
        if not self.distributed:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.cpu_group)
        return int(highest)

    def train(self) -> nn.Module:
        """Train to the end, or until a signal stops it: see `stopped_by`; return the model.

        Raises:
            FileExistsError: work_dir has checkpoints of an earlier run, and resume is not asked.
            CheckpointError: a checkpoint cannot be read or written.
            NonFiniteError: the loss or the weights are not finite.
        """
        earlier = checkpoints.iterations(self.work_dir)
        if earlier and not self._resume and not self._has_loaded:
            raise FileExistsError(
                f"{self.work_dir} holds the checkpoints of an earlier run, up to iteration "
                f"{max(earlier)}: resume=True (--resume) goes on with it; to start anew give "
                "another work_dir (--work-dir) or move these files away"
            )
        self.is_training = True
        try:
            return super().train()
        finally:
            self.is_training = False
            self._end_workers()

    def val(self) -> dict[str, float]:
        """Validate and return the metrics."""
        try:
            return super().val()
        finally:
            self._end_workers()

    def test(self) -> dict[str, float]:
        """Test and return the metrics."""
        try:
            return super().test()
        finally:
            self._end_workers()

    def _end_workers(self) -> None:
        """End workers that wait for another epoch: the garbage collector takes 5 s for each."""
        for loop in (self._train_loop, self._val_loop, self._test_loop):
            loader = getattr(loop, "dataloader", None)
            if getattr(loader, "_iterator", None) is not None:
                loader._iterator._shutdown_workers()
                loader._iterator = None

    def load_or_resume(self) -> None:
        """Do what `resume` and `load_from` say, once.

        resume with load_from goes on from that file; resume alone from the newest checkpoint in
        work_dir that loads, and starts anew where there is none; load_from alone takes weights.
        Validation and tests take weights, the averaged ones where there are some.
        """
        if self._has_loaded:
            return
        self._has_loaded = True
        path = self._load_from
        if self._resume and path is None:
            path = self._newest()
            if path is None:
                self.logger.info(f"no checkpoint in {self.work_dir} to resume from: starting anew")
        if path is None:
            return
        if self._resume and self.is_training:
            self.resume(path)
        else:
            self.load_checkpoint(path)

    def _newest(self) -> str | None:
        """The newest checkpoint in work_dir that loads, as rank 0 sees it."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                path = checkpoints.latest(self.work_dir)
                answer = [None if path is None else str(path), None]
            except CheckpointError as error:
                answer = [None, str(error)]
        path, error = self._from_rank_0(answer)
        if error is not None:
            raise CheckpointError(error)
        return path

    def _from_rank_0(self, answer: list[Any]) -> list[Any]:
        if self.distributed:
            dist.broadcast_object_list(answer, src=0, group=self.cpu_group)
        return answer

    def save_checkpoint(self, path: str | os.PathLike, iteration: int) -> Path:
        """Write all that training needs to go on after `iteration` iterations; all ranks call.

        Hooks add what is theirs in `before_save_checkpoint(runner, checkpoint)`.

        Raises:
            CheckpointError: rank 0 could not write.
            NonFiniteError: the weights are not finite, so the file would be of no use.
        """
        state = {
            "format": _FORMAT,
            "iteration": iteration,
            "epoch": iteration // self.train_loop.epoch_length,
            "validated_epoch": self.train_loop.validated_epoch,
            "seconds": self.train_loop.seconds,
            "model": self.model_state(),
            "optimizer": self._optimizer_state(),
            "param_schedulers": [s.state_dict() for s in self.param_schedulers or []],
            "logs": self._logs(),
            "setup": self._setup(),
            "config": self._config_text,
            "versions": {m.__name__: str(m.__version__) for m in (vim, torch, timm, mmengine)},
        }
        self.call_hook("before_save_checkpoint", checkpoint=state)
        failure: Exception | None = None
        if self.rank == 0:
            try:
                self._refuse_non_finite(state["model"], iteration)
                checkpoints.save(state, path)
            except (CheckpointError, NonFiniteError) as error:
                failure = error
        (message,) = self._from_rank_0([failure and str(failure)])
        if failure is not None:
            raise failure
        if message is not None:
            raise CheckpointError(f"rank 0: {message}")
        return Path(path)

    @cached_property
    def _config_text(self) -> str:
        return self.cfg.pretty_text  # formatting it takes a tenth of a second

    def _refuse_non_finite(self, weights: dict[str, Tensor], iteration: int) -> None:
        broken = [
            name
            for name, tensor in weights.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        if broken:
            raise NonFiniteError(
                f"after iteration {iteration} the weights are not finite in "
                f"{', '.join(broken[:4])}{' and others' if len(broken) > 4 else ''}, though the "
                f"loss was: its gradient was not. {self.last_good()}. Lower the learning rate, "
                "clip gradients (optim_wrapper.clip_grad) or take dtype float32"
            )

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint that loads."""
        try:
            path = checkpoints.latest(self.work_dir)
        except CheckpointError as error:
            return str(error)
        return f"The last good checkpoint is {path}" if path else "There is no checkpoint yet"

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optim_wrapper.state_dict()
        if self.sharded:
            # The wrapper's own entries, such as the scaler's, stay; the optimizer's are gathered.
            optimizer = self.optim_wrapper.optimizer
            state.update(get_optimizer_state_dict(self.model, optimizer, options=_FULL))
        return state

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        if self.sharded:
            optimizer = self.optim_wrapper.optimizer
            whole = {name: state.pop(name) for name in ("state", "param_groups")}
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, whole, options=options)
            state = {**state, **optimizer.state_dict()}
        self.optim_wrapper.load_state_dict(state)

    def _logs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The latest values and counts of each scalar that was logged."""
        return {
            name: tuple(
                torch.as_tensor(array[-_LOGGED_VALUES:], dtype=torch.float64).clone()
                for array in buffer.data
            )
            for name, buffer in self.message_hub.log_scalars.items()
        }

    def _load_logs(self, logs: dict[str, tuple[Tensor, Tensor]]) -> None:
        scalars = {name: HistoryBuffer(v.numpy(), n.numpy()) for name, (v, n) in logs.items()}
        kept = dict.fromkeys(scalars, True)
        self.message_hub.load_state_dict(
            {"log_scalars": scalars, "runtime_info": {}, "resumed_keys": kept}
        )

    def _setup(self) -> dict[str, int]:
        """What must not change in the middle of a run."""
        return {
            "epoch_length": self.train_loop.epoch_length,
            "processes": self.world_size,
            "batch_size": self.train_loop.batch_size,
            "accumulative_counts": self.train_loop.accumulation,
            "seed": self.seed,
        }

    def resume(self, filename: str | os.PathLike) -> None:
        """Go on from a training checkpoint; see `save_checkpoint`.

        Newer checkpoints in work_dir, of an attempt that is given up hereby, are renamed to
        `*.superseded`.

        Raises:
            CheckpointError: the file is damaged, refused, or no training checkpoint.
            ValueError: the run is set up in another way than the one that wrote it.
        """
        state = checkpoints.load(filename)
        if state.get("format") != _FORMAT:
            raise CheckpointError(
                f"{filename} is no training checkpoint of this engine (it holds: "
                f"{', '.join(map(str, state))[:300]}): to start from its weights, give it as "
                "load_from without resume"
            )
        self._check_setup(filename, state["setup"])
        self._tell_changes(state["config"])
        schedulers = self.param_schedulers or []
        if len(schedulers) != len(state["param_schedulers"]):
            raise ValueError(
                f"the config has {len(schedulers)} parameter schedulers, {filename} has "
                f"{len(state['param_schedulers'])}: resume with the config the run was started with"
            )
        self.load_model_state(state["model"])
        self._load_optimizer_state(state["optimizer"])
        for scheduler, saved in zip(schedulers, state["param_schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self._load_logs(state["logs"])
        self.train_loop.start_at(
            state["iteration"], state["validated_epoch"], state.get("seconds", 0.0)
        )
        self.call_hook("after_load_checkpoint", checkpoint=state)
        if self.rank == 0:
            for path in checkpoints.set_aside(self.work_dir, after=state["iteration"]):
                self.logger.warning(f"newer than what this run goes on from, so renamed: {path}")
        self.logger.info(f"resumed from {filename}, after iteration {state['iteration']}")

    def _check_setup(self, filename: str | os.PathLike, saved: dict[str, int]) -> None:
        now = self._setup()
        changes = {name: (saved[name], now[name]) for name in now if saved[name] != now[name]}
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
        if "epoch_length" in changes:
            raise ValueError(
                f"{filename} was written by another set-up ({listed}), in which an epoch has "
                "another number of iterations: neither the place in the data nor the schedule can "
                "be carried over. Keep the data and processes x batch_size as they were, or start "
                "a new run from its weights: load_from without resume"
            )
        if changes and not self.cfg.get("resume_with_changes", False):
            raise ValueError(
                f"{filename} was written by another set-up ({listed}), so the run would not go on "
                "as it would have: batches, random numbers or step sizes differ. Restore it, or "
                "accept that with resume_with_changes=True"
            )
        if changes:
            self.logger.warning(f"resumed with changes: {listed}")

    def _tell_changes(self, config: str) -> None:
        """Warn of lines of the config that are not as they were."""
        volatile = ("resume", "load_from", "work_dir", "launcher", "experiment_name")
        old, new = (
            [line for line in text.splitlines() if not line.startswith(volatile)]
            for text in (config, self._config_text)
        )
        changed = [x for x in difflib.unified_diff(old, new, n=0, lineterm="") if x[:2] != "@@"]
        if changed:
            self.logger.warning(
                "the config differs from the one that the run was started with:\n"
                + "\n".join(changed[2:])
            )

    def load_checkpoint(self, filename: str | os.PathLike) -> None:
        """Load weights alone: of a training checkpoint (averaged ones where there are some), or of
        any file that `vim.models.read_checkpoint` takes, for the whole model or its backbone.

        Raises:
            FileNotFoundError, ValueError: see `vim.models.read_checkpoint`.
            RuntimeError: names or shapes that do not match.
        """
        weights = read_weights(filename)
        model = self.unwrapped_model
        of_backbone = hasattr(model, "backbone") and not any(
            name.startswith("backbone.") for name in weights
        )
        if not of_backbone:
            self.load_model_state(weights)
        elif not self.sharded:
            model.backbone.load_state_dict(weights)
        else:
            weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
            differing = weights.keys() ^ {
                k for k in model.state_dict() if k.startswith("backbone.")
            }
            if differing:
                raise RuntimeError(
                    f"{filename} does not fit the sharded model; names that only one of them has: "
                    f"{', '.join(sorted(differing)[:8])}. Weights in another layout are adapted "
                    'with parallel="ddp" or by vim.models.to_native'
                )
            partial = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(model, weights, options=partial)
        self.call_hook("after_load_checkpoint", checkpoint={"model": weights})
        self.logger.info(f"loaded weights from {filename}")


def read_weights(filename: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a file of ours, the averaged ones where it has them, or in any other."""
    if zipfile.is_zipfile(filename):
        try:
            state = checkpoints.load(filename, mmap=True)
        except CheckpointError:
            state = {}  # read_checkpoint takes more, and says what is wrong with the rest
        if state.get("format") == _FORMAT:
            return state.get("model_ema", state["model"])
    return read_checkpoint(filename)
