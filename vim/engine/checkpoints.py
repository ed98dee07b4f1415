"""Training checkpoints: written whole or not at all, checked when read, plain data only.

A file is what torch.save writes, a zip archive whose entries carry checksums. It is written under
a temporary name, flushed to the disk, read back against its checksums and then renamed, so that a
process killed at any moment leaves either the file before or the file after. Nothing that would
need more than torch's safe loading (tensors, numbers, strings, lists, dicts) can be put in.
"""

import logging
import os
import pickle
import re
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "CheckpointError",
    "best_path",
    "iteration_path",
    "iterations",
    "latest",
    "load",
    "rotate",
    "save",
    "set_aside",
]

logger = logging.getLogger("vim.checkpoints")

_LEAVES = (
    *(torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype),
    *(bool, int, float, complex, str, bytes, type(None)),
)
_ITERATION_NAME = re.compile(r"^iter_(\d{8,})\.pth$")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is damaged or refused; the message says what to do."""


def iteration_path(folder: str | os.PathLike, iteration: int) -> Path:
    """Where the checkpoint made after `iteration` iterations stands."""
    return Path(folder) / f"iter_{iteration:08d}.pth"


def best_path(folder: str | os.PathLike, metric: str) -> Path:
    """Where the checkpoint with the best `metric` stands."""
    return Path(folder) / f"best_{re.sub(r'[^A-Za-z0-9.-]+', '_', metric)}.pth"


def iterations(folder: str | os.PathLike) -> dict[int, Path]:
    """The checkpoints in `folder` by iteration, the newest first, damaged ones included."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("iter_*.pth")
        if (match := _ITERATION_NAME.match(path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def save(state: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Write `state` to `path`; whatever happens, `path` is the old file or the whole new one.

    Args:
        state: tensors, numbers, strings, None, and lists, tuples and dicts of those.
        path: the folder is made where it is missing.

    Raises:
        TypeError: `state` holds something else, which could not be loaded safely.
        CheckpointError: the disk is full or failed; what stood at `path` is untouched.
    """
    path = Path(path)
    _check_plain(state, "state")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _verify(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's writer hides the system's error behind one of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        temporary.unlink(missing_ok=True)  # before asking what is free
        raise CheckpointError(_cannot_write(state, path, cause)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Any]:
    """Return what `save` wrote, on the CPU; nothing but tensors and plain data is unpickled.

    Args:
        path: the file.
        mmap: whether tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, or asks to unpickle more, which can run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    _verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused, because it asks to unpickle more than tensors and plain data, "
            f"which can run code: {error}. If you trust it, load it with "
            "torch.load(weights_only=False) and save its weights as safetensors"
        ) from error
    except Exception as error:  # damage may lead the reader anywhere
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict")
    return state


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in `folder` that loads; those passed over are named in a warning.

    Returns:
        None where the folder has no checkpoint at all.

    Raises:
        CheckpointError: it has some, and none loads.
    """
    found = iterations(folder)
    for path in found.values():
        try:
            load(path, mmap=True)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
        else:
            return path
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} loads (see the warnings above): "
            "move them away to start anew, or take one from a backup"
        )
    return None


def rotate(folder: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints by iteration, and what killed writes left."""
    for path in list(iterations(folder).values())[keep:]:
        path.unlink()
    for left in Path(folder).glob(".*.pth.tmp"):
        left.unlink()


def set_aside(folder: str | os.PathLike, after: int) -> list[Path]:
    """Rename checkpoints newer than iteration `after` to `*.superseded`; return their new names.

    A run that goes on from `after` would otherwise, when resumed again, go on from them.
    """
    moved = []
    for iteration, path in iterations(folder).items():
        if iteration > after:
            moved.append(path.with_name(path.name + ".superseded"))
            os.replace(path, moved[-1])
    return moved


def _verify(path: Path) -> None:
    """Raise CheckpointError unless the file is a whole archive whose checksums agree."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # damage may lead the reader anywhere
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken} does not agree")


def _check_plain(value: Any, where: str) -> None:
    """Raise TypeError, naming the place, unless `value` is made of tensors and plain data."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
        kinds: tuple = (dict, OrderedDict, Counter)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
        kinds = (list, tuple)
    else:
        kinds = _LEAVES
    if type(value) not in kinds:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds "
            "only tensors, numbers, strings, None, and lists, tuples and dicts of those; convert "
            "it before saving"
        )


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entries, so that a rename outlives a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(state: Mapping[str, Any], path: Path, cause: BaseException) -> str:
    """Return what went wrong in writing, how much space is needed and what is left to go on from.

    The space is that of the tensors: storages are written once, however many tensors share them.
    """
    storages = {s.data_ptr(): s.nbytes() for s in _storages(state)}
    needed = sum(storages.values()) / 2**20
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free"
    except OSError as error:
        free = f"its disk cannot be asked ({error})"
    good = next((p for p in iterations(path.parent).values() if _is_whole(p)), None)
    return f"could not write {path}: {cause}. It needs about {needed:.1f} MiB and {free}. " + (
        f"The last good checkpoint, {good}, is intact: make room and resume"
        if good
        else "There is no earlier checkpoint: make room and start again"
    )


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        return [value.untyped_storage()]
    items = value.values() if isinstance(value, Mapping) else value
    nested = isinstance(value, (Mapping, list, tuple))
    return [s for item in items for s in _storages(item)] if nested else []


def _is_whole(path: Path) -> bool:
    try:
        _verify(path)
    except CheckpointError:
        return False
    return True
