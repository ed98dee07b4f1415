"""Reading a training config, changing it from the command line, and building the run.

A config is a Python file that mmengine reads; see configs/ for those of this project.
"""

import ast
import difflib
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    VISUALIZERS,
)
from mmengine.runner import Runner

__all__ = ["apply_options", "build_runner", "load_config", "parse_options"]

_DICTS = (Mapping, Config)
_REGISTRIES = (HOOKS, LOOPS, METRICS, MODELS, OPTIM_WRAPPERS, PARAM_SCHEDULERS, VISUALIZERS)

_TOP_LEVEL = {
    "auto_scale_lr",
    "compile",
    "device",
    "parallel",
    "resume_with_changes",
} | set(inspect.signature(Runner.__init__).parameters) - {"self", "cfg"}
"""Keys that a config may have, whether or not the one at hand has them."""


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Return {dotted key: value} of arguments such as "train_cfg.max_epochs=3".

    Values are Python literals; what is none is a string.
    """
    parsed = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise ValueError(f"options have the form key.of.the.config=value, got {option!r}")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[key] = text
    return parsed


def load_config(
    path: str | os.PathLike,
    options: Mapping[str, Any] | Sequence[str] = (),
    work_dir: str | os.PathLike | None = None,
) -> Config:
    """Return a config with `options` applied.

    Args:
        path: of the Python file.
        options: {dotted key: value}, or "key=value" strings; see `apply_options`.
        work_dir: where the run writes; by default the config's own, else runs/<name of the file>.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key that the config does not have, with the near misses.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no config at {path}"
            + (f"; {path.parent} has {', '.join(known[:20])}" if known else "")
        )
    importlib.import_module("vim.engine.training")  # registers what configs name
    config = Config.fromfile(path)
    for key in set(config) - _TOP_LEVEL:  # perhaps a variable of the file's own
        if near := difflib.get_close_matches(key, _TOP_LEVEL, cutoff=0.8):
            raise ValueError(f"{path} has the key {key!r}: did you mean {' or '.join(near)}?")
    apply_options(config, options if isinstance(options, Mapping) else parse_options(options))
    if work_dir is not None or not config.get("work_dir"):
        config.work_dir = str(work_dir or Path("runs", path.stem))
    return config


def apply_options(config: Config, options: Mapping[str, Any]) -> None:
    """Set values in `config` by dotted keys; positions in lists are numbers.

    A key must be there already, or be an argument of the component that the dict around it
    describes (by its `type`): mmengine would add a misspelt one in silence.

    Raises:
        ValueError: a key that is neither, with the near misses.
    """
    for dotted, value in options.items():
        parent: Any = config
        *path, last = dotted.split(".")
        for depth, part in enumerate(path):
            parent = _child(parent, part, ".".join(path[:depth]))
        if isinstance(parent, list):
            parent[_position(parent, last, dotted)] = value
            continue
        if not isinstance(parent, _DICTS):
            raise ValueError(f"{'.'.join(path)} is {parent!r}, which has no {last!r}")
        allowed = _allowed(config, parent, path)
        if last not in allowed:
            raise ValueError(f"the config has no key {dotted!r}{_hint(last, allowed)}")
        parent[last] = value


def _child(parent: Any, part: str, where: str) -> Any:
    if isinstance(parent, list):
        return parent[_position(parent, part, where)]
    if not isinstance(parent, _DICTS) or part not in list(parent):
        keys = list(parent) if isinstance(parent, _DICTS) else []
        raise ValueError(f"the config has no {part!r} in {where or 'it'}{_hint(part, keys)}")
    return parent[part]


def _position(values: list, text: str, where: str) -> int:
    if not text.isdecimal() or int(text) >= len(values):
        raise ValueError(f"{where} is a list of {len(values)}: {text!r} is no position in it")
    return int(text)


def _allowed(config: Config, parent: Mapping[str, Any], path: Sequence[str]) -> set[str]:
    """Return the keys that `parent`, the dict at `path` of the config, may have."""
    allowed = set(parent)
    if not path:
        return allowed | _TOP_LEVEL
    if "type" in parent:
        component = next(
            (c for registry in _REGISTRIES if (c := registry.get(parent["type"]))), None
        )
        if component is not None:
            allowed |= set(inspect.signature(component).parameters)
    first = config[path[0]]
    task = first.get("task") if isinstance(first, _DICTS) else None
    return allowed | _arguments_at(tuple(path), task)


def _arguments_at(path: tuple[str, ...], task: str | None) -> set[str]:
    """Return the arguments that go with the dicts of a config which have no `type`.

    Args:
        path: of the dict.
        task: of the dataloader that it is in.
    """
    from timm.data import create_transform
    from timm.optim import create_optimizer_v2

    from vim.models import VisionMamba, VisionMambaPyramid

    from . import classifier, data, detection, segmentation

    def arguments(function) -> set[str]:
        return set(inspect.signature(function).parameters)

    if path[-1] == "backbone":
        own = {"name", "checkpoint", "use_ema", "grad_checkpointing", "pretrained"}
        pyramid = arguments(VisionMambaPyramid) - {"model"}
        return own | arguments(VisionMamba) | pyramid
    if path[-1] == "optimizer":
        return arguments(create_optimizer_v2) | {"betas", "eps", "fused"}
    if path[-1] == "loss":
        return arguments(classifier.build_loss)
    if path[-1] == "inference":
        return segmentation.INFERENCE_KEYS | detection.INFERENCE_KEYS
    if path[-1] == "distillation":
        return arguments(classifier.Distillation)
    loading, augmentation = data, arguments(create_transform) | {"three_augment"}
    if task == "segmentation":
        from . import segmentation_data as loading  # its libraries are optional

        augmentation = loading.AUGMENTATION
    if task == "detection":
        from . import detection_data as loading

        augmentation = loading.AUGMENTATION
    if path[-1] == "augmentation":
        return set(augmentation)
    if path[-1] == "dataset":
        return set(loading.DATASET_KEYS)
    if path[-1].endswith("_dataloader"):
        return set(loading.LOADER_KEYS)
    return set()


def _hint(key: str, allowed: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(key, [str(a) for a in allowed])
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": there are {', '.join(sorted(map(str, allowed)))}" if allowed else ""


def build_runner(config: Config):
    """Return the `VimRunner` of a config, its learning rate scaled where the config asks for it.

    `auto_scale_lr=dict(enable=True, base_batch_size=1024)` multiplies the optimizer's rate by the
    images of a step over those that the config's rate is meant for.
    """
    from .runner import VimRunner

    scaling = config.get("auto_scale_lr") or {}
    if scaling.get("enable"):
        images = (
            config.train_dataloader.batch_size
            * int(os.environ.get("WORLD_SIZE", "1"))
            * config.optim_wrapper.get("accumulative_counts", 1)
        )
        config.optim_wrapper.optimizer.lr *= images / scaling["base_batch_size"]
        scaling["enable"] = (
            False  # done: the config that is kept with the run says what it ran with
        )
    return VimRunner.from_cfg(config)
