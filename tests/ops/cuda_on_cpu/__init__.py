"""Run the CUDA backend on a CPU: its kernels compiled as C++, its launches answered by fibers.

What is written in PTX stands in few functions of the kernels, which get a body in C++ instead; see
`device.h` for the rest. Kernels, shapes of blocks and the Python around them are the backend's own.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from vim._sources import kernel_sources
from vim.ops.cuda import (
    _compile,
    _sums,
    add_norm,
    bidirectional_mixer,
    causal_conv1d,
    selective_scan,
)

HERE = Path(__file__).parent
PROCESSORS = 2
SHARED_BYTES = 99 << 10  # of a block
FLAGS = "CUDA_ON_CPU_FLAGS"
"""Environment variable with more options for g++."""

MMA = "mma.sync.aligned.m16n8k8.row.col.f32"
MMA_16 = "mma.sync.aligned.m16n8k16.row.col.f32"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4"
# PTX, and what stands for it on a CPU.
PTX = {
    "ex2.approx": "y = device::exp2_approx(x);",
    "rcp.approx": "y = 1.f / x;",
    f"{MMA}.bf16": "device::multiply_halves(__nv_bfloat16(), d, a, b);",
    f"{MMA}.f16": "device::multiply_halves(__half(), d, a, b);",
    f"{MMA}.tf32": "device::multiply_tf32(d, a, b, c);",
    f"{MMA_16}.bf16": "device::multiply_halves(__nv_bfloat16(), d, a, b0, b1);",
    f"{MMA_16}.f16": "device::multiply_halves(__half(), d, a, b0, b1);",
    f"{LDMATRIX}.shared": "device::load_matrices<false>(words, row);",
    f"{LDMATRIX}.trans": "device::load_matrices<true>(words, row);",
    "bar.sync 1": "device::wait_for_some(1, TEAM);",
    "bar.sync 2": "device::wait_for_some(2, TEAM);",
    "barrier.cluster": "device::wait_for_cluster();",
    "mapa.u64": "theirs = device::in_block(rank, mine);",
    "cvt.rn.f32.f64": "scale = static_cast<float>(p.scale);",
    "cp.async.cg": "device::copy_async(shared, global, BYTES, valid);",
    "cp.async.ca": "device::copy_async(shared, global, BYTES, valid);",
    "cp.async.commit_group": "device::commit();",
    "cp.async.wait_group": "device::wait_copies(PENDING);",
}


def without_ptx(source: str) -> str:
    """Return a source with its assembly replaced."""
    parts, end = [], 0
    for match in re.finditer(r"\basm(?: volatile)?\(", source):
        parts.append(source[end : match.start()])
        depth, quoted, end = 1, False, match.end()
        while depth > 0:
            quoted ^= source[end] == '"'
            depth += 0 if quoted else (source[end] == "(") - (source[end] == ")")
            end += 1
        ptx = source[match.end() : end].split('"')[1]
        end += 1  # the semicolon
        bodies = [body for name, body in PTX.items() if ptx.startswith(name)]
        if ptx and not bodies:
            raise ValueError(f"nothing stands for {ptx!r} on a CPU: add it to PTX")
        parts.append(bodies[0] if ptx else "")  # without any, it keeps a value in a register
    text = "".join([*parts, source[end:]])
    # Shared memory of either block of a cluster.
    text = re.sub(
        r"__shared__ Shared shared\[TEAMS\];",
        "static Shared memory[2][TEAMS]; auto &shared = memory[device::rank()];",
        text,
    )
    # Shared memory whose size the launch says: as much as a block may have.
    return re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];",
        rf"static \1 \2[{SHARED_BYTES} / sizeof(\1)];",
        text,
    )


class Kernel:
    """A kernel compiled as C++; stands for that of `vim.ops.cuda._compile`."""

    def __init__(self, folder: Path, source: str, name: str) -> None:
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        program, library = folder / f"{key}.cpp", folder / f"{key}.so"
        if not library.exists():
            in_clusters = "device::wait_for_cluster" in (folder / f"{source}.cu").read_text()
            program.write_text(
                f'#include "device.h"\n#include "{source}.cu"\n'
                'extern "C" void run(const unsigned *grid, const unsigned *block,\n'
                "                    const std::uint64_t *words) {\n"
                f"    device::run<{name}>({1 + in_clusters}, grid, block, words);\n}}\n"
            )
            flags = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-w"]
            flags += ["-shared", "-fPIC", f"-I{folder}", f"-I{HERE}"]
            flags += os.environ.get(FLAGS, "").split()
            subprocess.run(["g++", *flags, program, "-o", library], check=True)
        self._run = ctypes.CDLL(library).run

    def start(self, grid, block, shared_bytes: int, words: list[int | float]) -> None:
        values = b"".join(
            struct.pack("d" if isinstance(x, float) else "q" if x < 0 else "Q", x) for x in words
        )
        self._run(*((ctypes.c_uint * 3)(*size) for size in (grid, block)), values)

    def resident_blocks(self, threads: int, shared_bytes: int = 0) -> int:
        return PROCESSORS


def missing() -> str | None:
    """Return what this machine lacks, if anything."""
    if not sys.platform.startswith("linux"):
        return f"fibers by ucontext.h are for Linux, this is {sys.platform}"
    return None if shutil.which("g++") else "g++ is not installed"


def with_address_sanitizer() -> dict[str, str] | None:
    """Return the environment of a process in which kernels stop at an access outside of a tensor.

    None where g++ lacks the library.
    """
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = ["g++", f"-print-file-name={name}"]
        libraries += subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.split()
        if not Path(libraries[-1]).is_absolute():  # g++ repeats the name of what it does not find
            return None
    return {
        **os.environ,
        FLAGS: "-fsanitize=address",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def use(monkeypatch, folder: Path) -> None:
    """Have the CUDA backend run on the CPU.

    Args:
        folder: where to compile.
    """
    for path in kernel_sources("cuda").iterdir():
        if path.suffix in (".cu", ".cuh"):
            target = folder / path.name
            text = without_ptx(path.read_text())
            if not target.exists() or target.read_text() != text:
                target.write_text(text)
    kernel = functools.cache(lambda source, name, device: Kernel(folder, source, name))
    for module in (_compile, _sums, add_norm, bidirectional_mixer, causal_conv1d, selective_scan):
        monkeypatch.setattr(module, "unavailable", lambda device, dtype: None, raising=False)
        monkeypatch.setattr(module, "get_kernel", kernel)
        monkeypatch.setattr(module, "multiprocessors", lambda device: PROCESSORS, raising=False)
        monkeypatch.setattr(module, "has_clusters", lambda device: True, raising=False)
        monkeypatch.setattr(module, "shared_memory", lambda device: SHARED_BYTES, raising=False)
