"""Measure speed and memory of timm models side by side, over resolutions and batch sizes.

Writes benchmark.json, benchmark.md and one plot a task, dtype and execution to a folder; the table
goes to stdout. Exit code: 0 if something was measured, 1 if every case was skipped, 2 for arguments
that cannot be met.
"""

import argparse
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
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
        help="timm models; @flash, @efficient or @math names the kernel of attention",
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
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder")
    return parser, parser.parse_args(argv)


def plot(results: Sequence[Result]) -> Figure:
    """Draw speed and memory against resolution, a line a model and batch size.

    A dotted line stands where the first model overtakes another for good.
    """
    with_memory = all(result.memory_gib is not None for result in results)
    figure = Figure(figsize=(11 if with_memory else 6, 4.5), layout="constrained")
    panels = {"images a second": "images_per_second"}
    if with_memory:
        panels["peak memory in GiB"] = "memory_gib"
    lines: dict[tuple[str, int], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.case.img_size):
        lines.setdefault((result.case.model, result.case.batch_size), []).append(result)
    sizes = sorted({result.case.img_size for result in results})
    for axes, (title, quantity) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axes.set(xlabel="pixels a side", ylabel=title, xscale="log", yscale="log")
        axes.set_xticks(sizes, labels=map(str, sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        for (model, batch), line in lines.items():
            values = [getattr(result, quantity) for result in line]
            where = [result.case.img_size for result in line]
            (drawn,) = axes.plot(where, values, "o-", label=f"{model}, batch {batch}")
            first = lines.get((results[0].case.model, batch), [])
            crossing = _crossing(first, line) if first is not line else None
            if quantity == "images_per_second" and crossing is not None:
                axes.axvline(crossing, linestyle=":", color=drawn.get_color())
                axes.annotate(
                    f" {crossing:.0f} px", (crossing, 0.02), xycoords=("data", "axes fraction")
                )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    case = results[0].case
    figure.suptitle(f"{case.task}, {case.dtype}, {case.execution}")
    return figure


def _crossing(first: Sequence[Result], other: Sequence[Result]) -> float | None:
    """Return the resolution from which `first` is the faster, over those that both have."""
    ours = {result.case.img_size: result.images_per_second for result in first}
    theirs = {result.case.img_size: result.images_per_second for result in other}
    sizes = sorted(ours.keys() & theirs.keys())
    if len(sizes) < 2:
        return None
    return crossover(sizes, [ours[s] for s in sizes], [theirs[s] for s in sizes])


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    parser, arguments = parse_args(argv)
    axes = (arguments.models, arguments.img_sizes, arguments.batch_sizes, arguments.dtypes)
    try:
        device = select_device(arguments.device)
        cases = [Case(*c) for c in itertools.product(*axes, arguments.tasks, arguments.executions)]
    except ValueError as error:
        parser.error(str(error))

    def report(result: Result) -> None:
        speed = result.skipped or f"{result.images_per_second:,.1f} images/s"
        logger.info("%s: %s", " ".join(map(str, vars(result.case).values())), speed)

    results = benchmark(cases, device, arguments.repeats, arguments.seconds, report)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    table = to_markdown(results)
    for name, text in (("benchmark.json", to_json(results, device)), ("benchmark.md", table)):
        with atomic_write(folder / name) as path:
            path.write_text(text)
    measured = [result for result in results if result.skipped is None]
    figures: dict[str, list[Result]] = {}
    for result in measured:
        case = result.case
        figures.setdefault(f"{case.task}-{case.dtype}-{case.execution}.png", []).append(result)
    for name, members in figures.items():
        with atomic_write(folder / name) as path:
            plot(members).savefig(path, format="png", dpi=120)
    sys.stdout.write(table)
    return 0 if measured else 1


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    sys.exit(main())
