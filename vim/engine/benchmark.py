"""Speed and memory of timm models side by side: inference and training steps.

Models that are compared are timed in turn, repeat by repeat, so that a drift of the clock meets all
alike; figures are medians over the repeats. Latency is that of single steps, each waited for;
throughput is that of steps back to back, of which the host prepares one while the device works on
another, as in training.
"""

import contextlib
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import exp, inf, log

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vim

from .training_graph import TrainingGraph

__all__ = [
    "ATTENTION",
    "DTYPES",
    "EXECUTIONS",
    "Case",
    "Result",
    "benchmark",
    "crossover",
    "machine",
    "to_json",
    "to_markdown",
]

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""What may follow a model's name after "@": the kernel of scaled_dot_product_attention."""

VARIANTS = {"keep-states": {"keep_states": True}}
"""What else may follow it, and the arguments that the model is given."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast-bfloat16": torch.bfloat16,
    "autocast-float16": torch.float16,
}
"""Dtypes of weights and images; with "autocast-", float32 weights under autocast."""

EXECUTIONS = ("eager", "compile", "reduce-overhead", "cuda-graph")
"""Eager, torch.compile, torch.compile(mode="reduce-overhead"), or captured CUDA graphs: one of an
inference, or those of a training step's forward and backward."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        model: name of a timm model, perhaps with "@" and a key of `ATTENTION` or `VARIANTS`.
        img_size: side of the images in pixels.
        batch_size: images a step.
        dtype: a key of `DTYPES`.
        task: "inference", or "training": forward, backward and a fused AdamW step.
        execution: one of `EXECUTIONS`.
    """

    model: str
    img_size: int
    batch_size: int
    dtype: str = "bfloat16"
    task: str = "inference"
    execution: str = "eager"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES),
            ("task", ("inference", "training")),
            ("execution", EXECUTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if not timm.is_model(self.name):
            raise ValueError(f"timm has no model {self.name!r}; timm.list_models() names them")
        allowed = (*ATTENTION, *VARIANTS)
        if self.variant and self.variant not in allowed:
            raise ValueError(
                f"after @ stands one of {', '.join(allowed)}, got {self.variant!r} in "
                f"{self.model!r}"
            )

    @property
    def name(self) -> str:
        """The name that timm knows."""
        return self.model.partition("@")[0]

    @property
    def variant(self) -> str:
        """What follows it, if anything."""
        return self.model.partition("@")[2]


@dataclass
class Result:
    """What was measured; everything but `case` and `skipped` is None where the case was skipped."""

    case: Case
    images_per_second: float | None = None
    spread: float | None = None
    """(Largest less smallest) / median of the repeats' images a second."""
    latency_ms: dict[str, float] | None = None
    """Percentiles p50, p90 and p99 of a step."""
    memory_gib: float | None = None
    """Peak memory that PyTorch allocates on the device, weights included; None on a CPU."""
    gflops: float | None = None
    """Operations of a forward pass of one image, as `vim.flops` counts them, in 1e9."""
    parameters: int | None = None
    skipped: str | None = None
    repeats: list[float] = field(default_factory=list)
    """Images a second of each repeat."""

    def as_dict(self) -> dict:
        values = asdict(self)
        return values.pop("case") | values


def benchmark(
    cases: Sequence[Case],
    device: torch.device,
    repeats: int = 5,
    seconds: float = 0.3,
    on_result: Callable[[Result], None] = lambda result: None,
    patience: float = inf,
) -> list[Result]:
    """Measure every case; those that differ only in the model are timed in turn.

    Args:
        device: of models and images.
        repeats: of each case.
        seconds: that a repeat lasts, half of them for single steps; at least one of either.
        on_result: called with each result as soon as there is one.
        patience: seconds; a case whose step takes longer is skipped.

    Returns:
        results in the order of `cases`; what cannot run (too large, unsupported) says why.
    """
    if device.type == "cuda":
        _take_workspaces(device)
    results = {}
    for _, group in itertools.groupby(sorted(cases, key=_comparable), key=_comparable):
        runs = [_Run(case, device) for case in group]
        for run in runs:
            run.prepare(patience)
        for _ in range(repeats):
            for run in runs:
                run.repeat(seconds)
        for run in runs:
            results[run.case] = run.result()
            on_result(results[run.case])
            run.release()
    return [results[case] for case in cases]


def _take_workspaces(device: torch.device) -> None:
    """Have cuBLAS take the tens of MB that it keeps, which would count for the first case."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(16, 16, device=device, dtype=dtype)
        torch.addmm(x[0], x, x @ x)
    torch.cuda.synchronize(device)


def _comparable(case: Case) -> tuple:
    return case.task, case.dtype, case.execution, case.img_size, case.batch_size


class _TooSlow(Exception):
    """A step takes longer than there is patience for."""


class _Run:
    """A case on a device: prepared, repeated, summed up."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.skipped: str | None = None
        self.step: Callable[[], object] | None = None
        self.throughputs: list[float] = []
        self.latencies: list[float] = []
        self.memory: float | None = None

    @contextlib.contextmanager
    def _skipping(self) -> Iterator[None]:
        """Turn what this case cannot do into the reason why it was skipped."""
        try:
            with self._attention():
                yield
        except torch.cuda.OutOfMemoryError:
            self.skipped = "out of memory"
        except _TooSlow as reason:
            self.skipped = str(reason)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            self.skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if self.skipped is not None:
            self.release()

    def _attention(self) -> contextlib.AbstractContextManager:
        attention = ATTENTION.get(self.case.variant)
        return contextlib.nullcontext() if attention is None else sdpa_kernel(attention)

    @property
    def _graphed_training(self) -> bool:
        return self.case.task == "training" and self.case.execution == "cuda-graph"

    def prepare(self, patience: float) -> None:
        if self.skipped is None:
            with self._skipping():
                on_gpu = self.device.type == "cuda"
                if on_gpu and self._graphed_training:  # its memory is seen only as it is captured
                    torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
                self.step, self.model = _make_step(self.case, self.device)
                self.parameters = sum(p.numel() for p in self.model.parameters())
                # Of the first two steps, one may compile.
                warmup = min(_time_ms(self.step, self.device) for _ in range(2)) / 1e3
                if warmup > patience:
                    raise _TooSlow(f"a step takes {warmup:.1f} s, longer than {patience:g} s")
                self.step()
                if on_gpu and not self._graphed_training:
                    torch.cuda.synchronize(self.device)
                    torch.cuda.reset_peak_memory_stats(self.device)
                self.step()
                if on_gpu:
                    torch.cuda.synchronize(self.device)
                    peak = torch.cuda.max_memory_allocated(self.device)
                    self.memory = (peak - before) / 2**30
                if self.case.execution == "cuda-graph" and self.case.task == "inference":
                    self.step = _captured(self.step, self.device)

    def repeat(self, seconds: float) -> None:
        if self.skipped is None:
            with self._skipping():
                self.step()
                times = []
                while sum(times) < seconds / 2 * 1e3:
                    times.append(_time_ms(self.step, self.device))
                self.latencies += times
                together = _time_ms(self.step, self.device, len(times))
                self.throughputs.append(1e3 * self.case.batch_size / together)

    def result(self) -> Result:
        if self.skipped is not None:
            return Result(self.case, skipped=self.skipped)
        middle = statistics.median(self.throughputs)
        percentiles = {f"p{p}": _percentile(self.latencies, p) for p in (50, 90, 99)}
        return Result(
            self.case,
            images_per_second=middle,
            spread=(max(self.throughputs) - min(self.throughputs)) / middle,
            latency_ms=percentiles,
            memory_gib=self.memory,
            gflops=_gflops(self.case.name, self.case.img_size),
            parameters=self.parameters,
            repeats=self.throughputs,
        )

    def release(self) -> None:
        self.step = self.model = None
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _create(name: str, img_size: int, **options) -> nn.Module:
    """Return the model for images of this size; models of any size take no such argument."""
    try:
        return timm.create_model(name, img_size=img_size, **options)
    except TypeError:
        return timm.create_model(name, **options)


@functools.cache
def _gflops(name: str, img_size: int) -> float:
    with torch.device("meta"):
        model = _create(name, img_size)
    return vim.flops(model, img_size) / 1e9


def _make_step(case: Case, device: torch.device) -> tuple[Callable[[], object], nn.Module]:
    """Return a function that does one step, and the model."""
    with device:  # where large weights are drawn soonest
        model = _create(case.name, case.img_size, **VARIANTS.get(case.variant, {}))
    dtype, mixed = DTYPES[case.dtype], case.dtype.startswith("autocast")
    if not mixed:
        model = model.to(dtype)
    images = torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device)
    images = images if mixed else images.to(dtype)
    run: Callable = model
    if case.execution == "cuda-graph" and case.task == "training":
        run = TrainingGraph(model)
    if case.execution in ("compile", "reduce-overhead"):
        mode = "default" if case.execution == "compile" else "reduce-overhead"
        run = torch.compile(model, fullgraph=True, mode=mode)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=mixed):
            return run(images)

    if case.execution == "cuda-graph" and device.type != "cuda":
        raise ValueError("cuda-graph needs a CUDA device")
    if case.task == "inference":
        model.eval()
        return torch.inference_mode()(forward), model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    labels = torch.randint(model.num_classes, (case.batch_size,), device=device)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward().float(), labels).backward()
        optimizer.step()

    return train, model


def _captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _time_ms(step: Callable[[], object], device: torch.device, steps: int = 1) -> float:
    """Return the mean time of a step, of so many back to back."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - begun) * 1e3 / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def machine(device: torch.device) -> dict[str, str]:
    """Return what figures depend on: device, versions, commit (VIM_COMMIT without git)."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vim": vim.__version__,
        "commit": commit or os.environ.get("VIM_COMMIT", "unknown"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def to_json(results: Sequence[Result], device: torch.device) -> str:
    rows = [result.as_dict() for result in results]
    return json.dumps({"machine": machine(device), "results": rows}, indent=1) + "\n"


def to_markdown(results: Sequence[Result]) -> str:
    """Return the results as a table; what was skipped says why."""
    lines = [
        "| model | px | batch | dtype | task | run | images/s | spread | p50 ms | p99 ms | GiB "
        "| GFLOPs | M params |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        c = r.case
        start = f"| {c.model} | {c.img_size} | {c.batch_size} | {c.dtype} | {c.task} "
        start += f"| {c.execution} | "
        if r.skipped is not None:
            lines.append(f"{start}skipped: {r.skipped} | | | | | | |")
            continue
        memory = "" if r.memory_gib is None else f"{r.memory_gib:.2f}"
        lines.append(
            f"{start}{r.images_per_second:,.0f} | {r.spread:.1%} | {r.latency_ms['p50']:.2f} "
            f"| {r.latency_ms['p99']:.2f} | {memory} | {r.gflops:.2f} | {r.parameters / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def crossover(sizes: Sequence[int], first: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the size from which `first` stays the faster; None where it never is.

    Between sizes, both speeds are taken as straight lines in logarithms.
    """
    leads = [log(a) - log(b) for a, b in zip(first, other, strict=True)]
    if leads[-1] <= 0:
        return None
    behind = max((i for i, lead in enumerate(leads) if lead <= 0), default=None)
    if behind is None:
        return float(sizes[0])
    a, b = leads[behind], leads[behind + 1]
    low, high = log(sizes[behind]), log(sizes[behind + 1])
    return exp(low + (high - low) * -a / (b - a))
