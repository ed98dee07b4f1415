"""The compiled kernels of ``kernels/cpu``, and how to pass arguments to them."""

import ctypes
import functools
import os
import struct
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ISAS = ("plain", "avx2", "avx512")
"""Instruction sets that the kernels are compiled for; the best of the processor is taken."""

ENVIRONMENT_VARIABLE = "VIM_CPU_ISA"

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of activations that the kernels read and write."""


_ENTRIES = (
    "selective_scan_fwd",
    "selective_scan_bwd",
    "causal_conv1d_fwd",
    "causal_conv1d_bwd",
    "add_norm_fwd",
    "add_norm_bwd",
    "bidirectional_mixer_fwd",
)

_LAYOUTS = {
    "add_norm_fwd": "4qd23q",
    "selective_scan_fwd": "49qd",
    "bidirectional_mixer_fwd": "50qd",
}
"""Fields that are not all integers and pointers, as `struct` writes them: eps and scale."""


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or None and the reason why there is none with the remedy."""
    found = sorted(Path(__file__).parent.glob("_kernels.*"))
    if not found:
        return None, (
            "the C++ kernels were not built at installation (no compiler found?): install gcc, "
            "clang or Visual Studio's build tools, then reinstall with "
            "pip install --force-reinstall --no-deps --no-binary :all: vim-mamba "
            "(in a checkout: pip install --no-deps -e .), whose -v output says what failed"
        )
    try:
        library = ctypes.CDLL(str(found[0]))
        for name in _ENTRIES:
            entry = getattr(library, f"vim_cpu_{name}")
            entry.argtypes, entry.restype = [c_char_p, c_int64], c_int
    except (OSError, AttributeError) as error:
        return None, f"{found[0]} cannot be used ({error}): reinstall vim-mamba to build it again"
    _let_malloc_keep_memory()
    library.vim_cpu_use_openmp.argtypes = [c_void_p]
    library.vim_cpu_use_openmp(_openmp_entry())
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted:
        if wanted not in ISAS:
            return None, f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(ISAS)}, got {wanted!r}"
        if not library.vim_cpu_set_isa(ISAS.index(wanted)):
            return None, f"{ENVIRONMENT_VARIABLE} is {wanted!r}, which this processor lacks"
    return library, None


def _let_malloc_keep_memory() -> None:
    """Have glibc keep up to 64 MB of freed memory, as it does once it has freed a block of 32 MB.

    A process whose tensors were all smaller hands the memory of each call back to the system and
    faults it in again in the next one, which can take longer than the call itself. The block is
    never touched, and what the user has set by mallopt or MALLOC_* variables stays in force.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _openmp_entry() -> int | None:
    """Return the address by which to run on the OpenMP threads of PyTorch's own operators."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no GNU OpenMP; on Windows, no CDLL(None)
        return None
    return ctypes.cast(entry, c_void_p).value


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why these kernels cannot serve, with the remedy; None where they can."""
    if device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {device.type}"
    if dtype not in DTYPES:
        return f"the C++ kernels serve float32 and bfloat16, not {dtype}; convert the activations"
    return load()[1]


def call(entry: str, *arguments: int | float) -> None:
    """Run a kernel on the fields of its struct in kernels/cpu/vim_cpu.h, in their order.

    The tensors that the arguments point to must outlive the call.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    packed = struct.pack(_LAYOUTS.get(entry, f"{len(arguments)}q"), *arguments)
    if not getattr(library, f"vim_cpu_{entry}")(packed, len(packed)):
        raise RuntimeError("the C++ kernels are of another version: install vim-mamba again")


def activation(x: Tensor | None) -> Tensor | None:
    """Return `x` as the kernels read it: float32 or bfloat16, with stride 1 in the last dimension.

    This is the one place where activations are copied.
    """
    if x is None:
        return None
    if x.dtype not in DTYPES:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def parameter(x: Tensor | None) -> Tensor | None:
    """Return `x` as contiguous float32."""
    return None if x is None else x.float().contiguous()


def sequence(x: Tensor | None) -> tuple[int, ...]:
    """Return the fields that describe `activation`'s (B, L, D) or (B, L, G, N)."""
    if x is None:
        return (0, 0, 0, 0, 0)
    strides = x.stride()
    group = strides[2] if len(strides) == 4 else 0
    return (x.data_ptr(), strides[0], strides[1], group, x.dtype == torch.bfloat16)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
