"""Measure speed and memory of timm models side by side, over resolutions and batch sizes.

Writes benchmark.json, benchmark.md and one plot a task, dtype and execution to a folder; the table
goes to stdout. Exit code: 0 if something was measured, 1 if every case was skipped, 2 for arguments
that cannot be met.
"""

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vim.engine.benchmark import (
    DTYPES,
    EXECUTIONS,
    Case,
    Result,
    benchmark,
    crossover,
    to_json,
    to_markdown,
)
from vim.engine.inference import atomic_write, positive_int, select_device

logger = logging.getLogger("benchmark")


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["vim_tiny_patch16_224", "deit_tiny_patch16_224@flash"],
        help="timm models; @flash, @efficient or @math names the kernel of attention, @keep-states "
        "has a Vim keep its scans' states in training",
    )
    parser.add_argument("--img-sizes", nargs="+", type=positive_int, default=[224])
    parser.add_argument("--batch-sizes", nargs="+", type=positive_int, default=[128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--tasks", nargs="+", choices=("inference", "training"), default=["inference"]
    )
    parser.add_argument("--executions", nargs="+", choices=EXECUTIONS, default=["eager"])
    parser.add_argument("--repeats", type=positive_int, default=5, help="of each case")
    parser.add_argument("--seconds", type=float, default=0.3, help="that a repeat lasts")
    parser.add_argument(
        "--patience", type=float, default=math.inf, help="skip a case whose step takes more seconds"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder")
    return parser, parser.parse_args(argv)


def plot(results: Sequence[Result]) -> Figure:
    """Draw speed and memory against resolution: a column a batch size, a line a model.

    Models whose names begin alike are a family, and have a style of line; colours go by the order
    in a family. Where no two are alike, or families many, each model has a colour. Of two
    families, a star stands where a model of the first overtakes for good the one that has its place
    in the other.
    """
    sizes = sorted({result.case.img_size for result in results})
    batches = sorted({result.case.batch_size for result in results})
    families: dict[str, list[str]] = {}
    for model in dict.fromkeys(result.case.model for result in results):
        families.setdefault(model.partition("_")[0], []).append(model)
    rows = {"images a second": "images_per_second"}
    if all(result.memory_gib is not None for result in results):
        rows["peak memory in GiB"] = "memory_gib"
    figure = Figure(figsize=(1 + 4 * len(batches), 1 + 3.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(batches), squeeze=False, sharex=True, sharey="row")
    for (title, quantity), panels in zip(rows.items(), grid, strict=True):
        panels[0].set_ylabel(title)
        for batch, axes in zip(batches, panels, strict=True):
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(sizes, labels=map(str, sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
            lines = _lines(result for result in results if result.case.batch_size == batch)
            for model, style in _styles(families).items():
                line = lines.get(model, [])
                axes.plot(
                    [result.case.img_size for result in line],
                    [getattr(result, quantity) for result in line],
                    style,
                    label=model,
                )
            if quantity == "images_per_second":
                axes.set_title(f"batch {batch}")
                for first, other in _rivals(families):
                    _mark(axes, lines.get(first, []), lines.get(other, []))
            else:
                axes.set_xlabel("pixels a side")
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = min(len(families), int(figure.get_figwidth() // 2.5))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    case = results[0].case
    figure.suptitle(f"{case.task}, {case.dtype}, {case.execution}")
    return figure


def _styles(families: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return how the line of each model is drawn."""
    styles = ("-", "--", ":", "-.")
    if max(map(len, families.values())) == 1 or len(families) > len(styles):
        models = [model for family in families.values() for model in family]
        return {model: f"o{'-' if i < 10 else '--'}C{i % 10}" for i, model in enumerate(models)}
    pairs = zip(families.values(), styles, strict=False)
    return {model: f"o{style}C{i}" for family, style in pairs for i, model in enumerate(family)}


def _lines(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return the results of each model by rising resolution."""
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.case.img_size):
        lines.setdefault(result.case.model, []).append(result)
    return lines


def _rivals(families: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Return each model of the first family with the one in its place in the other, of two."""
    first, *others = families.values()
    if len(others) > 1:
        return []
    return [pair for other in others for pair in zip(first, other)]  # noqa: B905, some are shorter


def _mark(axes: Axes, first: Sequence[Result], other: Sequence[Result]) -> None:
    """Mark the resolution from which `first` is the faster, over those that both have."""
    ours = {result.case.img_size: result.images_per_second for result in first}
    theirs = {result.case.img_size: result.images_per_second for result in other}
    sizes = sorted(ours.keys() & theirs.keys())
    if len(sizes) < 2:
        return
    crossing = crossover(sizes, [ours[s] for s in sizes], [theirs[s] for s in sizes])
    if crossing is None:
        return
    speed = math.exp(np.interp(math.log(crossing), np.log(sizes), np.log([ours[s] for s in sizes])))
    axes.plot(crossing, speed, "k*", markersize=12, zorder=3)
    axes.annotate(f" {crossing:.0f} px", (crossing, speed), va="bottom")


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    parser, arguments = parse_args(argv)
    axes = (arguments.models, arguments.img_sizes, arguments.batch_sizes, arguments.dtypes)
    try:
        device = select_device(arguments.device)
        cases = [Case(*c) for c in itertools.product(*axes, arguments.tasks, arguments.executions)]
    except ValueError as error:
        parser.error(str(error))

    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    finished: dict[Case, Result] = {}

    def report(result: Result) -> None:
        """Write what there is by now: who is interrupted keeps it."""
        speed = result.skipped or f"{result.images_per_second:,.1f} images/s"
        logger.info("%s: %s", " ".join(map(str, vars(result.case).values())), speed)
        finished[result.case] = result
        results = [finished[case] for case in cases if case in finished]
        for name, text in (
            ("benchmark.json", to_json(results, device)),
            ("benchmark.md", to_markdown(results)),
        ):
            with atomic_write(folder / name) as path:
                path.write_text(text)

    results = benchmark(
        cases, device, arguments.repeats, arguments.seconds, report, arguments.patience
    )
    measured = [result for result in results if result.skipped is None]
    figures: dict[str, list[Result]] = {}
    for result in measured:
        case = result.case
        figures.setdefault(f"{case.task}-{case.dtype}-{case.execution}.png", []).append(result)
    for name, members in figures.items():
        with atomic_write(folder / name) as path:
            plot(members).savefig(path, format="png", dpi=120)
    sys.stdout.write(to_markdown(results))
    return 0 if measured else 1


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    sys.exit(main())
