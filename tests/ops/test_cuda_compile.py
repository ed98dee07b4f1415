"""The CUDA kernels compile for every architecture without spilling, and their cache is safe.

NVRTC needs no GPU, so this runs anywhere that has it.
"""

import logging
import multiprocessing
import re
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

import vim.ops.cuda
from vim.ops.cuda import _compile

REASON = _compile.compiler_unavailable("sm_90a")
needs_nvrtc = pytest.mark.skipif(REASON is not None, reason=f"no NVRTC here: {REASON}")

OPS = sorted(
    path.stem
    for path in Path(vim.ops.cuda.__file__).parent.glob("*.py")
    if not path.stem.startswith("_")
)
ARCHITECTURES = [
    "sm_90a",
    *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100a", "sm_120")),
]


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_and_keep_to_registers(op, arch):
    """Local memory is as slow as memory: an array indexed at run time, or too many registers."""
    module = import_module(f"vim.ops.cuda.{op}")
    if not hasattr(module, "instantiations"):
        pytest.skip(f"{op} has no kernels of its own")
    complaints = []
    for source, name in module.instantiations():
        report = []
        _compile.compile_cubin(source, name, arch, report=report)
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", report[0])
        assert used, f"the assembler reports nothing: {report[0]}"
        if any(int(count) for pair in used for count in pair):
            complaints.append(f"{name}: {used}")
    assert not complaints, "\n".join(complaints)


@needs_nvrtc
def test_first_used_by_several_threads():
    """As by DataParallel: cuda.core is not whole for others while one of them imports it."""
    program = """
import importlib.abc, sys, threading, time
from vim.ops.cuda import _compile

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("cuda.core"):
            time.sleep(0.02)

def look():
    found.append(_compile.compiler_unavailable("sm_90a"))

sys.meta_path.insert(0, Slow())
found, threads = [], []
for _ in range(40):  # some of them while the first is still importing
    threads.append(threading.Thread(target=look))
    threads[-1].start()
    time.sleep(0.02)
for thread in threads:
    thread.join()
assert found == [None] * 40, found
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


TOY = """
#include "toy.cuh"
template <typename T> __global__ void toy_kernel(T* x, Arguments a) { x[a.at] = T(a.value); }
"""
TOY_HEADER = "struct Arguments { long long at; double value; };\n"
NAME = "toy_kernel<float>"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A small kernel and an empty cache; what the function returned was called with is listed."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "toy.cu").write_text(TOY)
    (sources / "toy.cuh").write_text(TOY_HEADER)
    monkeypatch.setattr(_compile, "kernel_sources", lambda kind: sources)
    monkeypatch.setenv(_compile.CACHE_VARIABLE, str(tmp_path / "cache"))
    log = tmp_path / "compiled"
    log.touch()
    compile_cubin = _compile.compile_cubin

    def logged(source, name, arch):
        with log.open("a") as file:
            file.write(f"{name}\n")
        return compile_cubin(source, name, arch)

    monkeypatch.setattr(_compile, "compile_cubin", logged)
    return sources


def build():
    return _compile.cached_cubin("toy", NAME, "sm_90a")


def compilations(tmp_path) -> int:
    return len((tmp_path / "compiled").read_text().splitlines())


def entries(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.cubin"))


@needs_nvrtc
class TestCache:
    def test_second_use_compiles_nothing(self, toy, tmp_path):
        first = build()
        assert first[1].startswith(b"\x7fELF")
        assert build() == first
        assert compilations(tmp_path) == 1

    @pytest.mark.parametrize("file", ["toy.cu", "toy.cuh"])
    def test_a_changed_source_is_another_entry(self, toy, tmp_path, file):
        build()
        (toy / file).write_text((toy / file).read_text() + "// changed\n")
        build()
        assert compilations(tmp_path) == 2

    @pytest.mark.parametrize(
        "harm",
        [
            lambda data: b"",
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda data: b"something else",
        ],
        ids=["empty", "truncated", "bit_flipped", "other_file"],
    )
    def test_a_corrupt_entry_is_built_again(self, toy, tmp_path, harm):
        sound = build()
        (entry,) = entries(tmp_path)
        entry.write_bytes(harm(entry.read_bytes()))
        assert build() == sound
        assert build() == sound
        assert compilations(tmp_path) == 2

    def test_another_kernels_entry_is_not_taken(self, toy, tmp_path):
        sound = build()
        (entry,) = entries(tmp_path)
        _compile.cached_cubin("toy", "toy_kernel<double>", "sm_90a")
        (other,) = set(entries(tmp_path)) - {entry}
        entry.write_bytes(other.read_bytes())
        assert build() == sound

    def test_processes_starting_together_compile_once(self, toy, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where threads run
            context = multiprocessing.get_context("fork")
            barrier, results = context.Barrier(8), context.SimpleQueue()

            def work():
                barrier.wait()
                results.put(build())

            processes = [context.Process(target=work) for _ in range(8)]
            for process in processes:
                process.start()
            built = [results.get() for _ in processes]
            for process in processes:
                process.join()
        assert len(set(built)) == 1
        assert compilations(tmp_path) == 1
        assert len(entries(tmp_path)) == 1
        assert not list((tmp_path / "cache").rglob("*.tmp"))

    def test_without_a_writable_folder_it_compiles_in_memory(self, toy, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv(_compile.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
        _compile._warn_no_cache.cache_clear()
        with pytest.warns(RuntimeWarning, match=_compile.CACHE_VARIABLE):
            first = build()
        assert build() == first  # warned once only
        assert compilations(tmp_path) == 2

    def test_a_lock_without_end_only_delays(self, tmp_path):
        path = tmp_path / "lock"
        with _compile._only_process(path):
            started = time.monotonic()
            with _compile._only_process(path, patience=0.1):
                assert 0.1 <= time.monotonic() - started < 5

    def test_a_source_that_does_not_compile_says_why(self, toy, tmp_path):
        (toy / "toy.cu").write_text(TOY.replace("T(a.value)", "undeclared"))
        with pytest.raises(RuntimeError, match=r"toy\.cu does not compile(.|\n)*undeclared"):
            build()
        assert not entries(tmp_path)


def test_a_long_compilation_says_so(monkeypatch, caplog):
    def slow(source, name, arch):
        time.sleep(1.2)
        return "symbol", b"cubin"

    monkeypatch.setattr(_compile, "compile_cubin", slow)
    with caplog.at_level(logging.WARNING, logger="vim"):
        _compile._compile_aloud("toy", NAME, "sm_90a")
    before, after = caplog.messages
    assert before.startswith(f"compiling the CUDA kernel {NAME}")
    assert re.match(rf"compiled {NAME} in 1\.\d s", after)


@pytest.mark.parametrize(
    ("system", "variable", "folder"),
    [
        ("linux", "XDG_CACHE_HOME", "vim-mamba/cuda"),
        ("win32", "LOCALAPPDATA", "vim-mamba/Cache/cuda"),
        ("darwin", None, "Library/Caches/vim-mamba/cuda"),
        ("linux", None, ".cache/vim-mamba/cuda"),
    ],
)
def test_the_cache_is_where_the_system_keeps_caches(
    monkeypatch, tmp_path, system, variable, folder
):
    for name in (_compile.CACHE_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_compile.sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path))
    assert _compile.cache_folder() == tmp_path / folder


class TestUnavailable:
    def test_on_a_cpu(self):
        reason = _compile.unavailable(torch.device("cpu"), torch.float32)
        assert "on cpu" in reason

    def test_on_amd(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "7.0")
        reason = _compile.unavailable(torch.device("cuda"), torch.float32)
        assert "triton" in reason

    @pytest.mark.parametrize(
        ("dtype", "capability", "expected"),
        [
            (torch.float64, (9, 0), "float64 is not served"),
            (torch.float32, (7, 5), "below 8.0; the triton backend"),
            (torch.float32, (99, 9), "does not know sm_999"),
        ],
        ids=["float64", "turing", "unknown"],
    )
    @needs_nvrtc
    def test_on_a_gpu(self, monkeypatch, dtype, capability, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert expected in _compile.unavailable(torch.device("cuda"), dtype)
