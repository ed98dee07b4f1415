"""Time the selective scan of both directions, by each backend and by mamba-ssm where it imports.

python benchmarks/selective_scan.py [--backends cuda triton mamba-ssm] [--json FILE]

Every backend is checked against the float64 reference first, at every N that is timed. The floor
is the special-function unit's: one exponential for each (token, channel, state) and direction, and
those of softplus and the gate, 16 a clock and multiprocessor. One call of the CUDA backend does
both directions; "cuda-kept" is the same where the forward keeps its states for the backward. The
others take one direction after the other, which is how a model must call them: Triton's second
forward adds to the first's result, of mamba-ssm neither flips nor sum are counted.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import measure, multiprocessor_clock, report, sets_of_inputs

from vim.ops import selective_scan_reference

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
    (8, 6085, 384, 1),
]
ORDER = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def make_inputs(batch, length, channels, states):
    """Return the tensors of both directions, laid out as projections leave them, and dy."""
    projected = torch.randn(2, batch, length, 24 + 2 * states, device="cuda").bfloat16()
    _, B, C = projected.split([24, states, states], -1)
    u, dt = torch.randn(2, 2, batch, length, channels, device="cuda").bfloat16()
    A = -torch.rand(2, channels, states, device="cuda") * states
    z = torch.randn(batch, length, 2 * channels, device="cuda").bfloat16()[..., channels:]
    D, dt_bias = torch.randn(2, 2, channels, device="cuda")
    dy = torch.randn(batch, length, channels, device="cuda").bfloat16()
    return dict(zip(ORDER, (u, dt, A, B, C, D, z, dt_bias - 3), strict=True)), dy


def cuda_calls(given, dy):
    from vim.ops.cuda import selective_scan as scan

    inputs = [given[k] for k in ORDER]
    return (
        lambda: scan.forward_bidirectional(*inputs),
        lambda: scan.backward_bidirectional(dy, *inputs),
    )


def cuda_kept_calls(given, dy):
    from vim.ops.cuda import selective_scan as scan

    inputs = [given[k] for k in ORDER]
    specs = scan.kept_specs(*given["u"].shape[1:], given["A"].shape[2], given["u"].dtype)
    if not specs:
        return None  # so many states are not kept
    kept = scan.Kept(*(torch.empty(s, dtype=t, device="cuda") for s, t in specs))
    scan.forward_bidirectional(*inputs, kept=kept)
    return (
        lambda: scan.forward_bidirectional(*inputs, kept=kept),
        lambda: scan.backward_bidirectional(dy, *inputs, kept=kept),
    )


def triton_calls(given, dy):
    from vim.ops.triton import selective_scan as scan

    z, no_z = given["z"], [k for k in ORDER if k != "z"]
    both = [[given[k][i] for k in no_z] for i in range(2)]
    sides = [[given[k] if k == "z" else given[k][i] for k in ORDER] for i in range(2)]
    saved = [scan.forward(*sides[i], None, True, i == 1, True)[2] for i in range(2)]
    return (
        lambda: scan.forward_bidirectional(both, z, 0.5, False)[0],
        lambda: [
            scan.backward(dy, None, *side, None, states, True, reverse)
            for side, states, reverse in zip(sides, saved, (False, True), strict=True)
        ],
    )


def mamba_ssm_calls(given, dy):
    import selective_scan_cuda

    z, dy = given["z"].mT.contiguous(), dy.mT.contiguous()
    sides = []
    for i in range(2):
        x = {k: given[k][i] if k != "z" else z for k in ORDER}
        x |= {k: x[k].mT.contiguous() for k in ("u", "dt")}
        x |= {k: x[k].mT.unsqueeze(1).contiguous() for k in ("B", "C")}
        sides.append([x[k] for k in ORDER])
    saved = [selective_scan_cuda.fwd(*side, True) for side in sides]
    return (
        lambda: [selective_scan_cuda.fwd(*side, True) for side in sides],
        lambda: [
            selective_scan_cuda.bwd(*side, dy, states, y, None, True, False)
            for side, (y, states, _) in zip(sides, saved, strict=True)
        ],
    )


CALLS = {
    "cuda": cuda_calls,
    "cuda-kept": cuda_kept_calls,
    "triton": triton_calls,
    "mamba-ssm": mamba_ssm_calls,
}


def truth(given, dtype):
    x = {k: v.to(dtype) for k, v in given.items()}
    y = 0
    for i in range(2):
        parts = (x[k][i] for k in ("u", "dt", "A", "B", "C", "D"))
        y = y + selective_scan_reference(*parts, dt_bias=x["dt_bias"][i], reverse=i == 1)[0]
    return 0.5 * y * F.silu(x["z"])


def check(backend: str, states: int) -> None:
    """Stop where a backend's forward is wrong; that its gradients are right is for the tests."""
    given, dy = make_inputs(2, 197, 136, states)
    exact = truth(given, torch.float64)
    rounded = truth(given, torch.float32).bfloat16()
    allowed = 3 * float((rounded - exact).norm() / exact.norm())
    calls = CALLS[backend](given, dy)
    if calls is None:
        return
    error = float((calls[0]() - exact).norm() / exact.norm())
    if not error < allowed:
        sys.exit(f"{backend} is wrong at N = {states}: error {error:.2e}; nothing was timed")


def floor_ms(batch, length, channels, states):
    properties = torch.cuda.get_device_properties(0)
    rate = properties.multi_processor_count * 16 * multiprocessor_clock()
    return batch * length * channels * (2 * (states + 2) + 2) / rate * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", choices=CALLS, default=["cuda", "triton"])
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    for states in sorted({shape[3] for shape in SHAPES}):
        for backend in arguments.backends:
            if backend != "mamba-ssm":  # its two directions would have to be flipped and merged
                check(backend, states)
    rows = []
    for shape in SHAPES:
        sys.stderr.write(f"timing {shape}\n")
        size = 12 * torch.Size(shape[:3]).numel()
        sets = sets_of_inputs(lambda shape=shape: make_inputs(*shape), size)
        calls = {name: [CALLS[name](*given) for given in sets] for name in arguments.backends}
        row = {"B, L, D, N": ", ".join(map(str, shape)), "floor": floor_ms(*shape)}
        for i, direction in enumerate(("forward", "backward")):
            cases = {name: [p[i] for p in pairs] for name, pairs in calls.items() if pairs[0]}
            for name, ms in measure(cases, repeats=7).items():
                row[f"{direction} {name}"] = ms
        first = f"forward {arguments.backends[0]}"
        if first in row:  # not of states that are not kept
            row["forward / floor"] = row[first] / row["floor"]
        rows.append(row)
        table = report(rows, arguments.json)  # kept, whatever becomes of the rows to come
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
