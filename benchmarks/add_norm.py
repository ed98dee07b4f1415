"""Time residual add + norm against the time that moving its bytes once takes.

python benchmarks/add_norm.py [--dtype bfloat16] [--kind rms] [--json FILE]
"""

import argparse
import sys
from pathlib import Path

import torch
from _timing import copy_bandwidth, measure, report, sets_of_inputs

from vim.ops.cuda import add_norm as norm

SHAPES = [
    (128 * 197, 192),
    (128 * 197, 384),
    (128 * 197, 768),
    (128 * 197, 1024),
    (8 * 6085, 384),
    (197, 384),
]


def cases(rows: int, features: int, dtype: torch.dtype, kind: str) -> dict[str, tuple]:
    """Return {case: (calls, bytes)}; the residual is float32."""
    weight = torch.randn(features, device="cuda")
    narrow, wide = rows * features * dtype.itemsize, rows * features * 4

    def make():
        x, dnormed = (torch.randn(rows, features, device="cuda").to(dtype) for _ in range(2))
        residual, dresidual = (torch.randn(rows, features, device="cuda") for _ in range(2))
        return x, residual, dnormed, dresidual, torch.rand(rows, device="cuda")

    sets = sets_of_inputs(make, 2 * narrow + 2 * wide)
    return {
        "forward": (
            [
                lambda x=x, r=r: norm.forward(x, r, weight, None, 1e-5, kind, torch.float32)
                for x, r, *_ in sets
            ],
            2 * narrow + 2 * wide,
        ),
        "backward": (
            [
                lambda r=r, dn=dn, dr=dr, rstd=rstd: norm.backward(
                    dn, dr, r, rstd, weight, dtype, kind, False
                )
                for _, r, dn, dr, rstd in sets
            ],
            2 * narrow + 3 * wide,
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kind", default="rms", choices=("rms", "layer"))
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    table = []
    for shape in SHAPES:
        timed = cases(*shape, getattr(torch, arguments.dtype), arguments.kind)
        times = measure({name: calls for name, (calls, _) in timed.items()})
        for name, (_, size) in timed.items():
            table.append(
                {
                    "rows x D": "x".join(map(str, shape)),
                    "case": name,
                    "us": times[name] * 1e3,
                    "GB/s": size / times[name] / 1e6,
                    "of copy": size / times[name] * 1e3 / bandwidth,
                }
            )
    sys.stdout.write(report(table, arguments.json) + f"\ncopy {bandwidth / 1e9:.0f} GB/s\n")


if __name__ == "__main__":
    main()
