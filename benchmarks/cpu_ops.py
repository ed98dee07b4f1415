"""Time the C++ kernels, forward and backward, against the PyTorch reference and a peak.

    python benchmarks/cpu_ops.py [--threads 2] [--repeats 200] [--json FILE]

The peak of the scan counts vector instructions per token, vector of channels and state: 11 forward
(8 of them the exponential) and 21 backward on AVX-512, where a core starts two a cycle. Their rate
is measured by a loop of FMAs, compiled here. Softplus, gate, loads and stores are not counted, so
the peak cannot be reached. Convolution and norm have no such peak: their limit is memory. Times are
the least and the median of the repeats, from Python, with all that a call costs.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _timing import machine

from vim.ops.add_norm import _REFERENCE as NORM_REFERENCE
from vim.ops.bidirectional_mixer import _REFERENCE as MIXER_REFERENCE
from vim.ops.causal_conv1d import _REFERENCE as CONV_REFERENCE
from vim.ops.cpu import _library, add_norm, bidirectional_mixer, causal_conv1d, selective_scan
from vim.ops.selective_scan import _REFERENCE as SCAN_REFERENCE

SHAPES = ((1, 197, 384, 16), (8, 197, 384, 16))  # B, L, D, N of Vim-Ti at 224 px
LANES = 16
INSTRUCTIONS = {"forward": 11, "backward": 21}

FMA_LOOP = """
void fma_loop(long n) {
    __asm__ volatile("vzeroall\\n 1: %s dec %%0\\n jnz 1b" : "+r"(n) :: "cc" %s);
}
"""


def fma_rate() -> float | None:
    """Return the 512-bit FMAs that one core does a nanosecond; None without AVX-512 or compiler."""
    if _library.ISAS[_library.load()[0].vim_cpu_isa()] != "avx512":
        return None
    body = "".join(f"vfmadd231ps %%zmm0, %%zmm0, %%zmm{i}\\n" for i in range(1, 11))
    clobbered = "".join(f', "xmm{i}"' for i in range(16))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(FMA_LOOP % (body, clobbered))
        command = ["cc", "-O2", "-mavx512f", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        loop = ctypes.CDLL(str(library)).fma_loop
    return 10 * 100_000 / (measure(lambda: loop(ctypes.c_long(100_000)), 50)[0] * 1e3)


def measure(function, repeats: int) -> tuple[float, float]:
    """Return the least and the median time of a call in microseconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        function()
        times.append((time.perf_counter_ns() - start) / 1e3)
    times.sort()
    return times[0], times[len(times) // 2]


def scan_calls(backend, shape, dtype):
    batch, length, channels, state = shape
    u, z = torch.randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    _, B, C = torch.randn(batch, length, 12 + 2 * state).to(dtype).split([12, state, state], -1)
    dt, dy = torch.randn(2, batch, length, channels).to(dtype)
    A = -torch.arange(1, state + 1).float().repeat(channels, 1)
    inputs = (u, dt, A, B, C, torch.ones(channels), z, torch.randn(channels) - 4, None)
    saved = backend.forward(*inputs, True, False, True)[2]
    return {
        "forward": lambda: backend.forward(*inputs, True, False, False),
        "backward": lambda: backend.backward(dy, None, *inputs, saved, True, False),
    }


def conv_calls(backend, shape, dtype):
    batch, length, channels, _ = shape
    x = torch.randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)[0]
    dy = torch.randn(batch, length, channels).to(dtype)
    inputs = (x, torch.randn(channels, 4), torch.randn(channels), None, "silu", False)
    return {
        "forward": lambda: backend.forward(*inputs),
        "backward": lambda: backend.backward(dy, None, *inputs),
    }


def norm_calls(backend, shape, dtype):
    batch, length, channels, _ = shape
    x, dy = torch.randn(2, batch, length, channels // 2).to(dtype)
    residual, weight = torch.randn(batch, length, channels // 2), torch.randn(channels // 2)
    _, total, rstd = backend.forward(x, residual, weight, None, 1e-5, "rms", torch.float32)
    return {
        "forward": lambda: backend.forward(x, residual, weight, None, 1e-5, "rms", torch.float32),
        "backward": lambda: backend.backward(dy, None, total, rstd, weight, dtype, "rms", False),
    }


def mixer_calls(backend, shape, dtype):
    batch, length, channels, state = shape
    rank, width = -(-channels // 32), 4

    def branch():
        return [
            torch.randn(channels, width) * 0.5,
            torch.randn(channels),
            torch.randn(rank + 2 * state, channels) * channels**-0.5,
            torch.randn(channels, rank) * rank**-0.5,
            torch.randn(channels) - 4,
            torch.arange(1, state + 1).float().log().repeat(channels, 1),
            torch.ones(channels),
        ]

    inputs = (torch.randn(batch, length, 2 * channels).to(dtype), branch(), branch())
    dy = torch.randn(batch, length, channels).to(dtype)
    saved = backend.forward(*inputs, 0.5, True)[1]
    return {
        "forward": lambda: backend.forward(*inputs, 0.5, False),
        "backward": lambda: backend.backward(dy, *inputs, saved, 0.5),
    }


OPS = {
    "selective_scan": (scan_calls, selective_scan, SCAN_REFERENCE),
    "causal_conv1d": (conv_calls, causal_conv1d, CONV_REFERENCE),
    "add_norm": (norm_calls, add_norm, NORM_REFERENCE),
    "bidirectional_mixer": (mixer_calls, bidirectional_mixer, MIXER_REFERENCE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    library, reason = _library.load()
    if library is None:
        sys.exit(reason)
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rate = fma_rate()
    rows = []
    for shape in SHAPES:
        for dtype in _library.DTYPES:
            for op, (calls, backend, reference) in OPS.items():
                slow = calls(reference, shape, dtype)
                for direction, call in calls(backend, shape, dtype).items():
                    least, median = measure(call, arguments.repeats)
                    row = {
                        "op": op,
                        "direction": direction,
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "us": least,
                        "us_median": median,
                        "us_reference": measure(slow[direction], 3)[0],
                    }
                    if op == "selective_scan" and rate:
                        steps = torch.Size(shape).numel() / LANES
                        ideal = steps * INSTRUCTIONS[direction] / rate / 1e3 / arguments.threads
                        row["us_peak"] = ideal
                    rows.append(row)
    heading = {
        **machine(),
        "isa": _library.ISAS[library.vim_cpu_isa()],
        "threads": arguments.threads,
        "fma_per_ns": rate,
    }
    lines = [
        "| op | shape | dtype | us | median | peak | reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak = f"{row['us_peak']:.0f}" if "us_peak" in row else ""
        lines.append(
            f"| {row['op']} {row['direction']} | {row['shape']} | {row['dtype']} | {row['us']:.0f} "
            f"| {row['us_median']:.0f} | {peak} | {row['us_reference']:.0f} |"
        )
    sys.stdout.write("\n".join([json.dumps(heading), *lines]) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({**heading, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
