"""`python -m vim.doctor`: what this machine can run, and whether it computes the right thing.

For each op and backend it says whether the backend can serve, else why not and what to do; where it
can, a small case is compared with the reference, gradients included. The exit code is 1 where a
backend gives wrong results.
"""

import importlib.metadata
import platform
import sys

import torch
from torch import Tensor

from vim import ops
from vim.ops._dispatch import AUTO_ORDER, probe
from vim.ops.cuda._compile import cache_folder

__all__ = ["check", "environment", "main"]

PACKAGES = ("vim-mamba", "torch", "timm", "triton", "cuda-core", "safetensors", "numpy")
TOLERANCE = 1e-4
"""Largest relative error, in the norm, of a float32 result; a wrong result is off by far more."""


def environment() -> dict[str, str]:
    """Return versions, devices and folders, by name."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["threads"] = str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    if not torch.cuda.is_available():
        facts["cuda"] = "no device"
    facts["kernel cache"] = str(cache_folder() or "none can be written; kernels stay in memory")
    return facts


def _cases() -> dict[str, tuple]:
    """Return for each op its function, its reference, and small inputs by name."""
    torch.manual_seed(0)
    batch, length, channels, state, width, rank = 2, 37, 40, 16, 4, 3

    def branch() -> list[Tensor]:
        return [
            torch.randn(channels, width) / 2,
            torch.randn(channels) / 10,
            torch.randn(rank + 2 * state, channels) / 6,
            torch.randn(channels, rank),
            torch.randn(channels) - 3,
            torch.rand(channels, state),
            torch.randn(channels),
        ]

    x = torch.randn(batch, length, channels)
    scan = {
        "u": x,
        "dt": torch.randn_like(x),
        "A": -torch.rand(channels, state),
        "B": torch.randn(batch, length, state),
        "C": torch.randn(batch, length, state),
        "D": torch.randn(channels),
        "z": torch.randn_like(x),
        "dt_bias": torch.randn(channels),
    }
    conv = {"x": x, "weight": torch.randn(channels, width), "bias": torch.randn(channels)}
    norm = {"x": x, "residual": torch.randn_like(x), "weight": torch.randn(channels)}
    xz = torch.randn(batch, length, 2 * channels)
    heads = {
        "x": torch.randn(batch, length, 5, 8),
        "dt": torch.rand(batch, length, 5),
        "A": -torch.rand(5),
        "B": torch.randn(batch, length, state),
        "C": torch.randn(batch, length, state),
        "D": torch.randn(5),
    }
    gated = {"y": x, "z": torch.randn_like(x), "weight": torch.randn(channels)}
    mixer = {f"tensor {i}": t for i, t in enumerate((xz, *branch(), *branch()))}

    def call_mixer(function):
        def call(backend=None, **tensors):
            xz, *rest = tensors.values()
            options = {} if backend is None else {"backend": backend}
            return function(xz, rest[:7], rest[7:], **options)

        return call

    return {
        "selective_scan": (ops.selective_scan, ops.selective_scan_reference, scan, {}),
        "causal_conv1d": (
            ops.causal_conv1d,
            ops.causal_conv1d_reference,
            conv,
            {"activation": "silu"},
        ),
        "add_norm": (ops.add_norm, ops.add_norm_reference, norm, {"eps": 1e-5}),
        "bidirectional_mixer": (
            call_mixer(ops.bidirectional_mixer),
            call_mixer(ops.bidirectional_mixer_reference),
            mixer,
            {},
        ),
        "ssd": (ops.ssd, ops.ssd_reference, heads, {}),
        "gated_rms_norm": (ops.gated_rms_norm, ops.gated_rms_norm_reference, gated, {}),
    }


def _run(function, inputs: dict[str, Tensor], options: dict, device, dtype) -> list[Tensor]:
    """Return the first output and the gradients of all inputs."""
    leaves = {k: v.to(device, dtype).requires_grad_() for k, v in inputs.items()}
    out = function(**leaves, **options)
    out = out[0] if isinstance(out, tuple) else out
    cotangent = torch.linspace(-1, 1, out.numel(), device=device, dtype=dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), cotangent)]


def check(op: str, backend: str, device: torch.device) -> tuple[bool | None, str]:
    """Return whether a backend computes an op rightly on a device (None: cannot serve), and why."""
    module, reason = probe(op, backend, device, torch.float32)
    if module is None:
        return None, reason
    function, reference, inputs, options = _cases()[op]
    truth = _run(reference, inputs, options, "cpu", torch.float64)
    try:
        actual = _run(function, inputs, options | {"backend": backend}, device, torch.float32)
    except Exception as error:  # whatever it is, the table goes on and tells it
        return False, f"failed: {type(error).__name__}: {error}"
    worst = max(
        float((a.double().cpu() - t).norm() / t.norm()) for a, t in zip(actual, truth, strict=True)
    )
    return worst <= TOLERANCE, f"relative error {worst:.1e} with gradients"


def main() -> int:
    """Print the facts and the table; return 1 where a backend gives wrong results."""
    lines = [f"{name:>14}  {value}" for name, value in environment().items()]
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    wrong = False
    for op in _cases():
        lines += ["", op]
        for backend in AUTO_ORDER:
            for device in devices:
                right, why = check(op, backend, torch.device(device))
                wrong |= right is False
                state = {True: "works", False: "WRONG", None: "no"}[right]
                lines.append(f"  {backend:8}{device:8}{state:6}  {why}")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
