"""The backend written in Triton: any GPU that Triton serves, or the CPU under its interpreter.

This package is called like Triton itself; absolute imports keep the two apart.
"""

import contextlib
import functools
import os
import subprocess

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "Triton is not installed; `pip install triton` (Linux; PyTorch's CUDA builds bring it)"
    ) from error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which is decided when they are defined."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton's kernels cannot serve, and what to do; None where they can."""
    if dtype not in DTYPES:
        return f"its kernels compute in float32, not {dtype}; use backend='reference'"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < (7, 0) and not INTERPRETED:
            return (
                "Triton needs a GPU of compute capability 7.0, "
                f"this one has {capability[0]}.{capability[1]}; use backend='reference'"
            )
        return None if INTERPRETED else _no_launcher()
    if device.type == "cpu" and INTERPRETED:
        return None
    return (
        "Triton's kernels run on a GPU; move the tensors to one, or, to debug on the CPU, set "
        "TRITON_INTERPRET=1 before Python starts"
    )


@functools.cache
def _no_launcher() -> str | None:
    """Return why Triton cannot build the C code that launches kernels; None where it can."""
    try:
        _ = triton.runtime.driver.active.utils
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return (
            f"Triton cannot build what launches its kernels ({error}); install a C compiler and "
            "Python's headers"
        )
    return None


def launching_on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which kernels are launched on the tensor's GPU."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def first_token(tensor, item, stride_b, stride_l, length, REVERSE: tl.constexpr):
    """Address of the token scanned first of a batch item, and the step to the next, in int64."""
    first = tensor + item * stride_b
    step = tl.cast(stride_l, tl.int64)
    if REVERSE:
        first += (length - 1) * step
        step = -step
    return first, step
