"""Runs beside one another: what each model reached, in which time, with how many parameters."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config

from .classifier import build_backbone
from .reporting import METRICS_FILE, read_metrics

__all__ = ["Run", "group_runs", "read_run", "to_markdown"]


@dataclass(frozen=True)
class Run:
    """A run of a classifier.

    Args:
        model: its name with timm.
        seed: of the run.
        parameters: of the model.
        curve: (seconds, top-1 accuracy in percent) of each validation.
        images: that it was trained with, each time counted.
        images_per_second: of training, the median over the logged intervals.
        memory_gib: peak memory of the GPU; None on a CPU.
    """

    model: str
    seed: int
    parameters: int
    curve: tuple[tuple[float, float], ...]
    images: int
    images_per_second: float
    memory_gib: float | None

    @property
    def top1(self) -> float:
        """Top-1 accuracy of the last validation, in percent."""
        return self.curve[-1][1]


def read_run(folder: Path) -> Run:
    """Return what a run has left in its work folder.

    Raises:
        ValueError: there is no config, or no validation yet.
    """
    lines = read_metrics(folder / METRICS_FILE)
    train, val = ([line for line in lines if line["stage"] == s] for s in ("train", "val"))
    if not (folder / "config.py").exists() or not train or not val:
        raise ValueError(f"{folder} is no folder of a run that has been validated")
    config = Config.fromfile(folder / "config.py")
    backbone = {k: v for k, v in config.model.backbone.items() if k != "checkpoint"}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_backbone(backbone).parameters())
    return Run(
        model=backbone["name"],
        seed=config.get("randomness", {}).get("seed") or 0,
        parameters=parameters,
        curve=tuple((line["seconds"], line["top1"]) for line in val),
        images=lines[-1]["iteration"] * config.train_dataloader.batch_size,
        images_per_second=statistics.median(line["images_per_second"] for line in train),
        memory_gib=max(
            (line["memory_gib"] for line in train if "memory_gib" in line), default=None
        ),
    )


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each model by its name, less what ends all names; the best model first."""
    words = [name.split("_") for name in {run.model for run in runs}]
    common = 0
    if len(words) > 1:
        pairs = zip(*(reversed(parts[1:]) for parts in words))  # noqa: B905, some are shorter
        common = len(list(itertools.takewhile(lambda same: len(set(same)) == 1, pairs)))
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        name = run.model.rsplit("_", common)[0] if common else run.model
        groups.setdefault(name, []).append(run)
    best = sorted(groups.items(), key=lambda item: -statistics.mean(run.top1 for run in item[1]))
    return dict(best)


def to_markdown(groups: Mapping[str, Sequence[Run]]) -> str:
    """Return a table with a row for each model, the seeds' accuracies beside their mean."""
    lines = [
        "| model | M parameters | top-1, % | by seed | seconds | images seen | images/s | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups.items():
        memory = [run.memory_gib for run in runs if run.memory_gib is not None]
        cells = [
            name,
            f"{runs[0].parameters / 1e6:.2f}",
            f"{statistics.mean(run.top1 for run in runs):.1f}",
            ", ".join(f"{run.top1:.1f}" for run in runs),
            f"{statistics.mean(run.curve[-1][0] for run in runs):.0f}",
            f"{statistics.mean(run.images for run in runs):,.0f}",
            f"{statistics.mean(run.images_per_second for run in runs):,.0f}",
            f"{max(memory):.1f}" if memory else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
