"""What the benchmarks share: timing by CUDA graphs and events, and a table or JSON of the result.

A kernel of some microseconds cannot be timed call by call, since the host takes as long to start
it. So calls are captured in a graph, over as many sets of inputs as exceed the level-2 cache, and
replays of the graphs of all cases are timed in turn, so that a drift of the clock meets all alike.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CALLS = 12


def measure(cases: dict[str, Sequence[Callable]], repeats: int = 11) -> dict[str, float]:
    """Return the median time of a call in ms, by case; a case has one callable a set of inputs."""
    graphs = {}
    stream = torch.cuda.Stream()
    for name, calls in cases.items():
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(CALLS):
                calls[i % len(calls)]()
        graphs[name] = graph
    times = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat > 0:  # the first is a warm-up
                times[name].append(start.elapsed_time(end) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def host_microseconds(call: Callable, calls: int = 300) -> float:
    """Return the time that a call takes on the host, the device left behind."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def sets_of_inputs(make: Callable, bytes_a_set: int) -> list:
    """Return as many results of `make()` as exceed three times the level-2 cache, two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(min(max(2, -(-3 * cache // bytes_a_set)), CALLS))]


def copy_bandwidth() -> float:
    """Return bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    # A kernel: what a graph makes of `copy_` is slower.
    ms = measure({"copy": [lambda: torch.mul(source, 1.0, out=target)]}, repeats=5)["copy"]
    return 2 * source.numel() * source.element_size() / ms * 1e3


def machine() -> dict[str, str]:
    """Return what a figure depends on; VIM_COMMIT names the commit where there is no git."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit or os.environ.get("VIM_COMMIT", "not in a git checkout"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def multiprocessor_clock() -> float:
    """Return the highest clock of the multiprocessors in Hz, which an H100 holds in these loads."""
    command = "nvidia-smi --query-gpu=clocks.max.sm --format=csv,noheader,nounits -i 0"
    text = subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
    return float(text) * 1e6


def report(rows: list[dict], path: Path | None = None) -> str:
    """Return rows as a table under a line about the machine; write them as JSON to `path`, too."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    lines = [", ".join(f"{key} {value}" for key, value in machine().items())]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return "\n".join(lines)


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
