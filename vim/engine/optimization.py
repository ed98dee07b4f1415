"""Optimizer, mixed precision and learning-rate schedule of a training run."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from mmengine.optim import OptimWrapper, _ParamScheduler
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, PARAM_SCHEDULERS
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

__all__ = ["VimCosineLR", "VimOptimWrapper", "VimOptimizerConstructor"]

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@OPTIM_WRAPPERS.register_module()
class VimOptimWrapper(OptimWrapper):
    """An optimizer with autocast, a gradient scaler for float16, clipping and accumulation.

    mmengine's `AmpOptimWrapper` asks for a GPU; this one serves every device.

    Args:
        optimizer: of the model.
        dtype: "bfloat16" (default), "float16" or "float32" of what autocast computes in.
        device_type: "cuda", "cpu", ... of the model's parameters; by default theirs.
        init_scale: the first scale of float16's loss.
        accumulative_counts: batches whose gradients make one step.
        clip_grad: arguments of `torch.nn.utils.clip_grad_norm_`, such as max_norm.

    Attributes:
        grad_norm: of the last clipping, a tensor of the device; None before.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        device_type: str | None = None,
        init_scale: float = 2.0**16,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
    ) -> None:
        clip = dict(clip_grad) if clip_grad else None
        super().__init__(optimizer, accumulative_counts, clip)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.dtype = DTYPES[dtype]
        self.grad_norm: Tensor | None = None
        self.device_type = device_type or optimizer.param_groups[0]["params"][0].device.type
        self.scaler = torch.amp.GradScaler(
            self.device_type, init_scale=init_scale, enabled=dtype == "float16"
        )

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def _clip_grad(self) -> None:
        """Clip, and keep the norm; mmengine's would wait for the device to log it."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if parameters:
            self.grad_norm = self.clip_func(parameters, **self.clip_grad_kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with (
            super().optim_context(model),
            torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None),
        ):
            yield

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        scaler = state_dict.pop("scaler", {})
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class VimOptimizerConstructor:
    """Make the optimizer by `timm.optim.create_optimizer_v2`, over the model's `backbone`.

    Args:
        optim_wrapper_cfg: arguments of `VimOptimWrapper` but for the optimizer, and `optimizer`:
            arguments of create_optimizer_v2: opt, lr, weight_decay, momentum, layer_decay,
            filter_bias_and_bn and so on, and those of the optimizer itself (betas, eps, fused).
            Parameters of one dimension, and those that the model's `no_weight_decay` names, are
            not decayed; official Vim decays A_log, which its authors did not mean to.
        paramwise_cfg: None; timm's arguments say it all.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg:
            raise ValueError(
                "paramwise_cfg is mmengine's; say it by optim_wrapper.optimizer.layer_decay, "
                "weight_decay and filter_bias_and_bn instead"
            )
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))
        self.wrapper.pop("type", None)

    def __call__(self, model: nn.Module) -> VimOptimWrapper:
        model = getattr(model, "module", model)
        backbone = getattr(model, "backbone", model)
        optimizer = create_optimizer_v2(backbone, **self.optimizer)
        for group in optimizer.param_groups:
            # timm's schedulers multiply by this; mmengine's start from the group's own rate.
            group["lr"] *= group.pop("lr_scale", 1.0)
            group["initial_lr"] = group["lr"]
        return VimOptimWrapper(optimizer, **self.wrapper)


@PARAM_SCHEDULERS.register_module()
class VimCosineLR(_ParamScheduler):
    """Linear warm-up, then the cosine that has been running since the start.

    The schedule of timm's `CosineLRScheduler` with its default `warmup_prefix=False`, by which DeiT
    and Vim were trained: at step t of T, with a rate `lr` of the optimizer,

        warmup_lr + t (lr - warmup_lr) / warmup                 (t < warmup)
        min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2          (else)

    In groups whose rate layer decay scales, `warmup_lr` and `min_lr` are scaled alike. Where a
    training has a budget of seconds (`train_cfg.max_seconds`), t is the share of it that has
    passed, times T.

    Args:
        optimizer: whose groups are scheduled.
        total: T, steps or epochs; `end` for short.
        warmup: steps or epochs of warm-up.
        warmup_lr: the rate at the start of it.
        min_lr: the rate at the end.
        begin, end, last_step, by_epoch, verbose: see mmengine's param schedulers.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | OptimWrapper,
        total: int,
        warmup: int = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        begin: int = 0,
        end: int | None = None,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f"warmup must be from 0 to below total = {total}, got {warmup}")
        self.total, self.warmup, self.warmup_lr, self.min_lr = total, warmup, warmup_lr, min_lr
        self._progress: Callable[[], float] | None = None
        super().__init__(
            optimizer, "lr", begin, total if end is None else end, last_step, by_epoch, verbose
        )

    @classmethod
    def build_iter_from_epoch(
        cls, *args: Any, epoch_length: int, by_epoch: bool = True, **kwargs: Any
    ) -> "VimCosineLR":
        """Return the schedule, stated in epochs, that changes the rate at every iteration."""
        if not by_epoch:
            raise ValueError("only a schedule stated in epochs can be converted")
        for key in ("total", "warmup", "begin", "end"):
            if kwargs.get(key) is not None:
                kwargs[key] = kwargs[key] * epoch_length
        return cls(*args, by_epoch=False, **kwargs)

    def follow(self, progress: Callable[[], float]) -> None:
        """From now on, let t be T times what `progress` returns, from 0 to 1."""
        self._progress = progress
        self.end = sys.maxsize  # how many steps there are, only the clock knows
        for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
            group["lr"] = value

    def state_dict(self) -> dict[str, Any]:
        return {key: x for key, x in super().state_dict().items() if key != "_progress"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the place in the schedule; the schedule stays the config's, so that a run which
        is resumed for more epochs follows the longer one from there."""
        self._global_step = state_dict["_global_step"]
        self.last_step = min(self._global_step, self.end - 1) - self.begin
        if self.last_step >= 0:
            for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
                group["lr"] = value
        self._last_value = [group["lr"] for group in self.optimizer.param_groups]

    def _get_value(self) -> list[float]:
        t = min(self.last_step, self.total)
        if self._progress is not None:
            t = self.total * self._progress()
        values = []
        largest = max(self.base_values)
        for base in self.base_values:
            scale = base / largest if largest else 1.0
            low, start = self.min_lr * scale, self.warmup_lr * scale
            if t < self.warmup:
                values.append(start + t * (base - start) / self.warmup)
            else:
                cosine = 0.5 * (1 + math.cos(math.pi * t / self.total))
                values.append(low + (base - low) * cosine)
        return values
