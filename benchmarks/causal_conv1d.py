"""Time the short convolution against the time that moving its bytes once takes.

python benchmarks/causal_conv1d.py [--dtype bfloat16] [--json FILE]
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import copy_bandwidth, measure, report, sets_of_inputs

from vim.ops.cuda import causal_conv1d as conv

SHAPES = [(128, 197, 384), (128, 197, 768), (8, 6085, 384), (8, 6085, 768), (1, 197, 384)]


def cases(batch: int, length: int, channels: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Return {case: (calls, bytes)}; x is the first half of a projection of twice the channels."""
    weights = torch.randn(2, channels, 4, device="cuda")
    biases = torch.randn(2, channels, device="cuda")
    branches = (weights[0], biases[0], weights[1], biases[1])
    size = batch * length * channels * dtype.itemsize

    def make():
        xz = torch.randn(batch, length, 2 * channels, device="cuda").to(dtype)
        dy = torch.randn(2, batch, length, channels, device="cuda").to(dtype)
        return xz[..., :channels], dy, torch.empty_like(xz)[..., :channels]

    sets = sets_of_inputs(make, 6 * size)
    one = (weights[0], biases[0])
    return {
        "forward": (
            [lambda x=x: conv.forward(x, *one, None, "silu", False) for x, _, _ in sets],
            2 * size,
        ),
        "forward both": (
            [lambda x=x: conv.forward_bidirectional(x, *branches) for x, _, _ in sets],
            3 * size,
        ),
        "backward": (
            [
                lambda x=x, dy=dy: conv.backward(dy[0], None, x, *one, None, "silu", False)
                for x, dy, _ in sets
            ],
            3 * size,
        ),
        "backward both": (
            [
                lambda x=x, dy=dy, dx=dx: conv.backward_bidirectional(dy, x, *branches, dx=dx)
                for x, dy, dx in sets
            ],
            4 * size,
        ),
        "forward, PyTorch": (
            [
                lambda x=x: F.silu(
                    F.conv1d(
                        x.mT,
                        weights[0, :, None].to(dtype),
                        biases[0].to(dtype),
                        padding=3,
                        groups=channels,
                    )[..., :length]
                )
                for x, _, _ in sets
            ],
            2 * size,
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth()
    rows = []
    for shape in SHAPES:
        timed = cases(*shape, dtype)
        times = measure({name: calls for name, (calls, _) in timed.items()})
        for name, (_, size) in timed.items():
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "case": name,
                    "us": times[name] * 1e3,
                    "GB/s": size / times[name] / 1e6,
                    "of copy": size / times[name] * 1e3 / bandwidth,
                }
            )
    sys.stdout.write(report(rows, arguments.json) + f"\ncopy {bandwidth / 1e9:.0f} GB/s\n")


if __name__ == "__main__":
    main()
