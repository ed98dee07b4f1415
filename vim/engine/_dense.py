"""What segmentation and detection have in common: keys of their data, libraries of an extra."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ._keys import check_keys, given_keys

__all__ = ["LOADER_KEYS", "dataset_config", "loader_config", "optional_libraries"]

LOADER_KEYS = {
    "task",
    "dataset",
    "batch_size",
    "num_workers",
    "crop_size",
    "augmentation",
    "mean",
    "drop_last",
    "persistent_workers",
    "multiprocessing_context",
}


def loader_config(
    cfg: Mapping[str, Any], allowed: set[str], augmentation: set[str], is_training: bool
) -> dict[str, Any]:
    """Return what the config of a dataloader says, checked; None is a key that is left out.

    Args:
        cfg: of the dataloader.
        allowed: keys of it.
        augmentation: keys of its `augmentation`.
        is_training: else evaluation.

    Raises:
        ValueError: a key that is unknown, missing, or for training alone.
    """
    needed = ("dataset", "batch_size", *(("crop_size",) if is_training else ()))
    cfg = {"augmentation": {}, **given_keys("dataloader", cfg, allowed, needed)}
    check_keys("augmentation", cfg["augmentation"], augmentation)
    for key in () if is_training else ("crop_size", "augmentation", "drop_last"):
        if cfg.get(key):
            raise ValueError(f"{key} is for training: an evaluation takes every image whole")
    return cfg


def dataset_config(
    cfg: Mapping[str, Any], allowed: set[str], of_files: set[str], is_training: bool
) -> dict[str, Any]:
    """Return what the config of a data set says, checked, with `name` and `on_corrupt`.

    Args:
        cfg: of the data set.
        allowed: keys of it.
        of_files: those that mean nothing to made-up images.
        is_training: chooses the default of on_corrupt.

    Raises:
        ValueError: a key that is unknown or has no effect, or another name.
    """
    on_corrupt = "skip" if is_training else "error"
    cfg = {"name": "", "on_corrupt": on_corrupt, **given_keys("dataset", cfg, allowed)}
    if cfg["name"] not in ("", "made-up"):
        raise ValueError(
            f"dataset.name must be '' (files in root) or 'made-up', got {cfg['name']!r}"
        )
    if cfg["name"] == "made-up":
        for key in sorted(of_files & cfg.keys()):
            raise ValueError(f"dataset.{key} has no effect on name='made-up': remove it")
    elif "img_size" in cfg:
        raise ValueError("dataset.img_size is for name='made-up': remove it")
    return cfg


@contextmanager
def optional_libraries(task: str) -> Iterator[None]:
    """Within, a library that cannot be imported is one of the extra `dense`, and said to be."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{task} needs {error.name}, which is not installed: pip install "vim-mamba[dense]"'
        ) from error
