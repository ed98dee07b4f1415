"""Choice of the backend that serves an op: one rule for every op.

A backend is a module ``vim.ops.<backend>.<op>`` with three functions:

- ``forward`` and ``backward`` (and, for the scan, ``saved_shape``), with the signatures of those in
  the op's ``_REFERENCE``;
- ``unavailable(device, dtype) -> str | None``: None where the backend can serve, else the reason
  and the remedy in one sentence.

A backend that can start again what a call has started also has `Repeated`; see
`vim.ops.block_sequence`.

Modules are imported when first asked for, so that importing `vim` compiles nothing and needs
neither Triton nor CUDA.
"""

import functools
import importlib
import os
import warnings
from types import ModuleType, SimpleNamespace

import torch

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")

AUTO_ORDER: tuple[str, ...] = ("cuda", "triton", "cpu")
"""Compiled backends, fastest first; `auto` takes the first that can serve."""

ENVIRONMENT_VARIABLE = "VIM_BACKEND"


class SlowBackendWarning(UserWarning):
    """The reference implementation serves a call that a compiled backend could serve faster."""


def resolve_backend(
    op: str,
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    reference: SimpleNamespace,
) -> ModuleType | SimpleNamespace:
    """Return the backend that serves `op` on `device` for activations of `dtype`.

    Args:
        op: name of the op, which is the name of the modules that implement it.
        requested: a name in `BACKENDS`. "auto" takes the fastest that can serve; the environment
            variable VIM_BACKEND, where set, stands in for "auto".
        reference: the PyTorch implementation, which can always serve.

    Raises:
        ValueError: `requested` is no backend's name.
        RuntimeError: the backend asked for by name cannot serve; the message says why.
    """
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if requested == "reference":
        return reference
    return _resolve(op, requested, device, dtype) or reference


def resolve_fused(
    op: str, requested: str, device: torch.device, dtype: torch.dtype
) -> ModuleType | None:
    """Return the kernels that fuse `op`, or None where its composition of PyTorch's ops serves.

    For ops with kernels in Triton alone, and of which the composition is fair on a CPU.

    Args:
        op, requested, device, dtype: as in `resolve_backend`; where VIM_BACKEND names a backend
            without kernels of the op, "auto" is the composition.
    """
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        if requested == "auto":
            return _fused(op, device, dtype)
        if requested in ("cuda", "cpu"):
            return None
    return None if requested == "reference" else _resolve(op, requested, device, dtype)


@functools.cache
def _fused(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    module, reason = probe(op, "triton", device, dtype)
    if module is None and device.type == "cuda" and dtype != torch.float64:
        warnings.warn(
            f"{op} on {device} ({dtype}) runs as many of PyTorch's ops, slowly: {reason}. Set "
            f"{ENVIRONMENT_VARIABLE}=reference to accept this silently.",
            SlowBackendWarning,
            stacklevel=2,
        )
    return module


@functools.cache
def _resolve(
    op: str, requested: str, device: torch.device, dtype: torch.dtype
) -> ModuleType | None:
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {requested!r}")
    if requested != "auto":
        module, reason = probe(op, requested, device, dtype)
        if module is None:
            raise RuntimeError(f"backend {requested!r} cannot serve {op} on {device}: {reason}")
        return module
    reasons = []
    for name in AUTO_ORDER:
        module, reason = probe(op, name, device, dtype)
        if module is not None:
            return module
        reasons.append(f"{name}: {reason}")
    # Meta and fake tensors compute nothing, and float64 is asked for its precision.
    if reasons and device.type != "meta" and dtype != torch.float64:
        warnings.warn(
            f"{op} on {device} ({dtype}) runs on the slow PyTorch reference, because no compiled "
            f"backend can serve: {'; '.join(reasons)}. Set {ENVIRONMENT_VARIABLE}=reference to "
            "accept this silently.",
            SlowBackendWarning,
            stacklevel=2,
        )
    return None


def probe(
    op: str, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[ModuleType | None, str | None]:
    """Return the backend's module, or None and the reason why it cannot serve."""
    name = f"vim.ops.{backend}.{op}"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name == name:
            return None, f"it has no kernels of {op} ({error})"
        return None, f"{error}"
    reason = module.unavailable(device, dtype)
    return (module, None) if reason is None else (None, reason)
