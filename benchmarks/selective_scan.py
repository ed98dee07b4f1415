"""Time the CUDA selective scan in both directions, forward and backward, after checking it."""

import statistics
import sys

import torch

from vim.ops import selective_scan_reference
from vim.ops.cuda import selective_scan as scan

EX2_RATE = 132 * 16 * 1.98e9


def inputs(batch, length, channels, states, dtype=torch.bfloat16, directions=2, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    xz = rand(batch, length, 2 * channels).to(dtype)
    rank = max(8, channels // 32)
    projected = rand(directions, batch, length, rank + 2 * states).to(dtype)
    return {
        "u": rand(directions, batch, length, channels).to(dtype),
        "dt": rand(directions, batch, length, channels).to(dtype),
        "A": -torch.rand(directions, channels, states, device="cuda", generator=g) * states,
        "B": projected[..., rank : rank + states],
        "C": projected[..., rank + states :],
        "D": rand(directions, channels),
        "z": xz[..., channels:],
        "dt_bias": rand(directions, channels) - 3,
    }


def floor_ms(batch, length, channels, states, directions=2):
    return batch * length * channels * (directions * (states + 2) + 2) / EX2_RATE * 1e3


def arguments(given):
    return [given[k] for k in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]


def truth(given, dtype=torch.float64):
    x = {k: v.to(dtype) for k, v in given.items()}
    y = 0
    for i in range(2):
        parts = (x[k][i] for k in ("u", "dt", "A", "B", "C", "D"))
        y = y + selective_scan_reference(*parts, dt_bias=x["dt_bias"][i], reverse=i == 1)[0]
    return 0.5 * y * torch.nn.functional.silu(x["z"])


def error(a, b):
    return float((a.double() - b).norm() / b.norm())


def time_ms(functions, repeats=9, launches=4):
    """Median time of each function on the GPU alone: graphs of a few launches, interleaved."""
    graphs = []
    for f in functions:
        f()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                f()
        graph.replay()
        graphs.append(graph)
    torch.cuda.synchronize()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for graph, t in zip(graphs, times, strict=True):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            t.append(a.elapsed_time(b) / launches)
    return [statistics.median(t) for t in times]


SHAPES = [
    (128, 197, 384, 16),
    (128, 197, 768, 16),
    (8, 6085, 384, 16),
    (8, 6085, 768, 16),
    (32, 1025, 384, 16),
    (2, 16385, 384, 16),
    (1, 197, 384, 16),
    (1, 100_000, 384, 16),
    (128, 197, 768, 1),
    (128, 197, 768, 8),
    (128, 197, 768, 64),
]


def main():
    for states in sorted({shape[3] for shape in SHAPES}):
        given = inputs(2, 197, 136, states)
        exact, single = truth(given), truth(given, torch.float32).to(torch.bfloat16)
        reached = error(scan.forward_bidirectional(*arguments(given)), exact)
        if not reached < 3 * error(single, exact):
            raise SystemExit(f"wrong at N = {states}: error {reached:.2e}; nothing was timed")
    sys.stdout.write("(B, L, D, N)  floor  forward  backward (ms, both directions, bf16)\n")
    for shape in SHAPES:
        given = arguments(inputs(*shape))
        dy = torch.randn(shape[:3], device="cuda").bfloat16()

        def forward(given=given):
            return scan.forward_bidirectional(*given)

        def backward(given=given, dy=dy):
            return scan.backward_bidirectional(dy, *given)

        forward_ms, backward_ms = time_ms([forward, backward])
        row = f"{shape!s:25} {floor_ms(*shape):7.3f} {forward_ms:8.3f} {backward_ms:9.3f}"
        sys.stdout.write(row + "\n")


if __name__ == "__main__":
    main()
