"""A plugin of pytest, `-p tests.ops.under_sanitizer`, for compute-sanitizer: docs/backends.md.

Products on CUDA run without cuBLAS: initcheck takes what some of its kernels write for
uninitialised, and racecheck stops with an internal error in others. And new memory is left as it
is, since initcheck would take the NaN that other runs fill it with for a value.
"""

import warnings

import torch
from torch import Tensor

_MOST = 1 << 26  # products held in memory at a time


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(..., I, J) and (..., J, K) -> (..., I, K), in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    rows = max(1, _MOST // max(1, b.numel()))
    parts = [
        (part.to(dtype).unsqueeze(-1) * b.to(dtype).unsqueeze(-3)).sum(-2)
        for part in a.split(rows, dim=-2)
    ]
    return torch.cat(parts, dim=-2)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b).to(a.dtype)


def _multiply_into(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(_product(a, b))


def _multiply_to(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return _product(a, b).to(out_dtype)


def _add_product(x: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    return (beta * x + alpha * _product(a, b)).to(a.dtype)


def _add_product_in_place(x: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> Tensor:
    return x.copy_(beta * x + alpha * _product(a, b))


_OVERRIDES = {
    "mm": _multiply,
    "bmm": _multiply,
    "mm.dtype": _multiply_to,
    "mm.out": _multiply_into,
    "bmm.out": _multiply_into,
    "addmm": _add_product,
    "baddbmm": _add_product,
    "baddbmm_": _add_product_in_place,
}


def override(key: str) -> torch.library.Library:
    """Replace products on the devices of a dispatch key, as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, function in _OVERRIDES.items():
            library.impl(name, function, key)
    return library


def pytest_configure(config) -> None:
    config.products = override("CUDA")
    torch.utils.deterministic.fill_uninitialized_memory = False
