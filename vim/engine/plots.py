"""Pictures of a run: who was confused with whom, calibration, and the curves of training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, PercentFormatter

__all__ = ["calibration_figure", "comparison_figure", "confusion_figure", "curves_figure"]

NAMED = 40
"""Most classes whose names stand at the axes of a confusion matrix."""
NUMBERED = 20
"""Most classes whose cells have their figure written in."""
LISTED = 20
"""Confusions that are listed beside the matrix."""
NAME_LENGTH = 24


def _short(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1].rstrip() + "…"


def confusion_figure(
    matrix: np.ndarray, names: Sequence[str], worst: Sequence[tuple[str, str, int]]
) -> Figure:
    """Draw which share of the images of each class was predicted to be of which.

    Up to 40 classes are named. Up to 20 have their figures written in; with more, the colours are
    logarithmic, and the worst confusions are listed by name.

    Args:
        matrix: (G, G) images, by class or group of neighbouring classes (rows), and prediction.
        names: of the C classes.
        worst: names of confused classes, what it was and what it was taken for, and how many
            images, the most first.
    """
    cells, group = len(matrix), -(-len(names) // len(matrix))
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    named = group == 1 and cells <= NAMED
    numbered = cells <= NUMBERED
    side = max(4.5, 2 + 0.45 * cells) if numbered else 8.5
    listed = [] if numbered else list(worst[:LISTED])
    figure = Figure(figsize=(side + 1 + (5.5 if listed else 0), side), layout="constrained")
    columns = figure.subplots(1, 2, width_ratios=(side + 1, 5.5)) if listed else [figure.subplots()]
    axes = columns[0]
    scale = {"vmin": 0, "vmax": 100} if numbered else {"norm": LogNorm(0.1, 100, clip=True)}
    # Zero is off the logarithmic scale, and stays white.
    drawn = axes.imshow(np.where(shares > 0, shares, np.nan), cmap="Blues", **scale)
    rows = "the class" if group == 1 else f"the {group} neighbouring classes"
    bar = figure.colorbar(drawn, ax=axes, label=f"% of the images of {rows}", shrink=0.8)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    if named:
        ticks = range(cells)
        labels = [_short(name) for name in names]
        axes.set_xticks(ticks, labels=labels, rotation=90, parse_math=False)
        axes.set_yticks(ticks, labels=labels, parse_math=False)
        axes.set(xlabel="predicted class", ylabel="true class")
    else:
        axes.set(xlabel="index of the predicted class", ylabel="index of the true class")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
            axis.set_major_formatter(lambda value, _: f"{value * group:.0f}")
    share = np.trace(matrix) / max(matrix.sum(), 1)
    axes.set_title(f"{share:.1%} of the images are on the diagonal")
    if numbered:
        _number(axes, shares)
    if listed:
        _list(columns[1], listed)
    return figure


def _number(axes: Axes, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share > 0:
            text = f"{share:.0f}" if share >= 1 else "<1"
            colour = "white" if share > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _list(axes: Axes, worst: Sequence[tuple[str, str, int]]) -> None:
    axes.axis("off")
    axes.set_title("most frequent confusions", loc="left")
    for row, (target, prediction, images) in enumerate(worst):
        y = 1 - (row + 0.7) / LISTED
        place = {"transform": axes.transAxes, "fontsize": 9, "va": "center", "parse_math": False}
        axes.text(0.10, y, f"{images:,}", ha="right", weight="bold", **place)
        axes.text(0.13, y, f"{_short(target)} → {_short(prediction)}", **place)


def calibration_figure(bins: Sequence[Any], error: float) -> Figure:
    """Draw accuracy against confidence, and how many images have which confidence.

    Args:
        bins: of equal width, with `low`, `high`, `images`, `confidence` and `accuracy`, as
            `EvaluationReport.calibration` gives them.
        error: expected calibration error in percent.
    """
    figure = Figure(figsize=(5, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [each for each in bins if each.images]
    left = [each.low for each in filled]
    widths = [each.high - each.low for each in filled]
    confidence = np.array([each.confidence for each in filled])
    accuracy = np.array([each.accuracy for each in filled])
    top.bar(left, accuracy, widths, align="edge", edgecolor="white", label="accuracy")
    low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
    top.vlines(confidence, low, high, color="tab:red", label="distance to the confidence")
    top.plot(confidence, accuracy, "o", color="tab:red", markersize=3)
    top.plot([0, 1], [0, 1], "--", color="grey", label="perfect")
    top.set(ylabel="accuracy", ylim=(0, 1), title=f"calibration error {error:.2f} %")
    top.legend(loc="upper left", fontsize="small")
    bottom.bar(left, [each.images for each in filled], widths, align="edge", edgecolor="white")
    bottom.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def curves_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss, accuracy, learning rate and images a second over the iterations.

    Args:
        records: lines of metrics.jsonl (see `MetricsHook`); what a panel lacks stays out of it.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2, sharex=True)
    train = [record for record in records if record["stage"] == "train"]
    val = [record for record in records if record["stage"] == "val"]
    names = list(dict.fromkeys(name for record in val for name in record))
    _line(loss, train, "loss", "training")
    for name in (name for name in names if "loss" in name):
        _line(loss, val, name, f"validation {name.replace('loss', '').strip('/_')}".strip())
    for name in (name for name in names if any(x in name for x in ("top1", "top5", "mIoU"))):
        _line(accuracy, val, name, name)
    _line(rate, train, "lr", "")
    _line(speed, train, "images_per_second", "")
    for axes, title in (
        (loss, "loss"),
        (accuracy, "accuracy in validation, %"),
        (rate, "learning rate"),
        (speed, "images/s"),
    ):
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(EngFormatter())
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes, color="grey")
    for axes in (rate, speed):
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
    return figure


def _line(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    points = [(r["iteration"], r[key]) for r in records if r.get(key) is not None]
    if points:
        # Few points need their marks to be seen.
        marker = "." if len(points) < 30 else ""
        axes.plot(*zip(*points, strict=True), marker=marker, label=label)


def comparison_figure(groups: Mapping[str, Sequence[Any]]) -> Figure:
    """Draw the accuracy of several models against seconds of training and against parameters.

    Args:
        groups: by model the runs that differ by seed, each with `curve`, `top1` and `parameters`
            (see `vim.engine.comparison.Run`). Every run has a line and a point.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, (name, runs) in enumerate(groups.items()):
        colour, style = f"C{i % 10}", "-" if i < 10 else "--"
        for run in runs:
            label = name if run is runs[0] else None
            left.plot(*zip(*run.curve, strict=True), style, color=colour, label=label, lw=1.2)
            right.plot(run.parameters, run.top1, "o", color=colour)
    left.set(xlabel="seconds of training, validations included", ylabel="top-1, %", xlim=(0, None))
    right.set(xlabel="parameters", xscale="log")
    right.xaxis.set_major_formatter(EngFormatter())
    right.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    right.xaxis.set_minor_formatter(EngFormatter())
    right.margins(x=0.25)
    _name_points(right, {name: max(runs, key=lambda r: r.top1) for name, runs in groups.items()})
    left.legend(fontsize="small", ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _name_points(axes: Axes, runs: Mapping[str, Any]) -> None:
    """Write the name of each run beside its point, no two names over one another."""
    low, high = axes.get_ylim()
    line = (high - low) / 36  # of small print
    middle = math.sqrt(math.prod(axes.get_xlim()))
    places = {1: math.inf, -1: math.inf}  # of the last name right and left of its point
    for i, (name, run) in sorted(enumerate(runs.items()), key=lambda item: -item[1][1].top1):
        side = 1 if run.parameters < middle else -1
        y = places[side] = min(run.top1, places[side] - line)
        align = {"ha": "left" if side > 0 else "right", "va": "center"}
        axes.text(run.parameters * 1.06**side, y, name, color=f"C{i % 10}", size="small", **align)
