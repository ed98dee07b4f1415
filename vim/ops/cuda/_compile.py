"""CUDA C++ kernels compiled at first use; `_launch` starts them on PyTorch's current stream.

NVRTC, which comes with PyTorch's own CUDA wheels, compiles `kernels/cuda/*.cu` through `cuda.core`:
no toolkit is needed. A kernel is a template; what it is specialised for stands in its name::

    kernel = get_kernel("add_norm", "add_norm_fwd_kernel<__nv_bfloat16, float>", x.device.index)
    launch(kernel, (rows, 1, 1), (32, 1, 1), 0, x, residual, weight, None, rows, eps)

Arguments are eight bytes each, in the order of the kernel's parameters: a tensor or None is a
pointer (null for None), an int a `long long`, a float a `double`. Consecutive arguments may equally
fill a struct of such fields that the kernel takes by value, which suits a kernel with many strides;
the first launch checks the total against the compiled kernel.

Binaries are kept in the user's cache folder (`VIM_CACHE_DIR` overrides it), so that only the first
process on a machine compiles.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import re
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from vim._sources import kernel_sources

CACHE_VARIABLE = "VIM_CACHE_DIR"
DTYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
"""The dtypes that the kernels serve, and their names in CUDA C++."""

_OPTIONS = {"std": "c++17"}
_log = logging.getLogger("vim")
_kernels: dict[tuple[str, str, int], "Kernel"] = {}
_compiling = threading.Lock()
_importing = threading.Lock()
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None where the CUDA kernels serve tensors of `dtype` on `device`, else why not."""
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm; the triton backend serves AMD GPUs"
    if device.type != "cuda":
        return f"the tensors are on {device.type}; move them to a CUDA device"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device; check the driver with nvidia-smi"
    if dtype not in DTYPES:
        served = ", ".join(str(d) for d in DTYPES)
        return f"{dtype} is not served, only {served}; backend 'reference' serves any"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        major, minor = capability
        return f"compute capability {major}.{minor} is below 8.0; the triton backend serves it"
    return compiler_unavailable(architecture(*capability))


@functools.cache
def compiler_unavailable(arch: str) -> str | None:
    """Return None where kernels can be compiled for `arch` here, else what is missing."""
    try:
        with _importing:  # while one thread imports cuda.core, others get it half finished
            import cuda.core
        from cuda.bindings import nvrtc
    except ImportError as error:
        return f"cuda.core cannot be imported ({error}); run: pip install cuda-core cuda-bindings"
    if not hasattr(cuda.core, "Program"):
        return f"cuda.core {cuda.core.__version__} is too old; run: pip install -U cuda-core"
    try:
        error, archs = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as failure:  # what cuda.pathfinder raises where it finds no library
        return (
            f"NVRTC is not found ({str(failure).splitlines()[0]}); it comes with PyTorch's CUDA "
            "wheels, or run: pip install nvidia-cuda-nvrtc"
        )
    if error:
        return f"NVRTC does not answer ({error.name}); reinstall PyTorch's CUDA wheels"
    if int(re.sub(r"\D", "", arch)) not in archs:
        version = ".".join(map(str, _nvrtc_version()))
        return f"NVRTC {version} does not know {arch}; update PyTorch, or use the triton backend"
    if cuda_include() is None:
        return (
            "cuda_bf16.h is not found in the nvidia wheels, CUDA_HOME or /usr/local/cuda; run: "
            "pip install nvidia-cuda-runtime, or set CUDA_HOME"
        )
    return None


def architecture(major: int, minor: int) -> str:
    """Return NVRTC's name of a compute capability, with its own instructions where it has some."""
    return f"sm_{major}{minor}{'a' if major in (9, 10) else ''}"


@functools.cache
def multiprocessors(device_index: int) -> int:
    """Return how many multiprocessors the device has, for the choice of a grid."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def has_clusters(device_index: int) -> bool:
    """Return whether blocks of the device can share their memory in clusters: sm_90 and newer."""
    return torch.cuda.get_device_properties(device_index).major >= 9


@functools.cache
def shared_memory(device_index: int) -> int:
    """Return how many bytes of shared memory a block of the device may have, if it asks."""
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin


class Kernel:
    """A kernel loaded for one device; made by `get_kernel`."""

    __slots__ = (
        "_arguments",
        "_blocks",
        "_kernel",
        "_pack_into",
        "_resident",
        "_start",
        "device_index",
        "handle",
        "name",
        "shared_limit",
    )

    def __init__(self, name: str, device_index: int, cubin: bytes, symbol: str):
        from cuda.bindings import driver
        from cuda.core import ObjectCode

        self.name = name
        self.device_index = device_index
        with torch.cuda.device(device_index):
            self.set_current()
            code = ObjectCode.from_cubin(cubin, name=name, symbol_mapping={name: symbol.encode()})
            self._kernel = code.get_kernel(name)
        self.handle = driver.CUfunction(int(self._kernel.handle))
        self.shared_limit = 48 * 1024  # what a kernel gets without asking
        self._start = driver.cuLaunchKernel
        self._arguments = None
        self._blocks = []
        self._resident = {}

    def start(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        words: list[int | float],
    ) -> None:
        """Start on PyTorch's current stream of the kernel's device; see `_launch.launch`.

        Args:
            words: the arguments, addresses of tensors among them.
        """
        if shared_bytes > self.shared_limit:
            self._raise_shared_limit(shared_bytes)
        memory = self._take_block(words)
        self._pack_into(memory.values, 0, *words)
        if torch._C._cuda_getDevice() == self.device_index:
            error = self._try_to_start(grid, block, shared_bytes, memory)
        else:
            with torch.cuda.device(self.device_index):
                error = self._try_to_start(grid, block, shared_bytes, memory)
        self._blocks.append(memory)
        if error:
            raise RuntimeError(
                f"{self.name} did not start on CUDA device {self.device_index} with grid {grid}, "
                f"block {block} and {shared_bytes} bytes of shared memory: {error.name}"
            )

    def _try_to_start(self, grid, block, shared_bytes: int, memory: "_ArgumentBlock"):
        """Return the driver's error of the launch, zero where there is none."""
        arguments = (
            self.handle,
            *grid,
            *block,
            shared_bytes,
            torch._C._cuda_getCurrentRawStream(self.device_index),
            memory.pointer,
            0,
        )
        error = self._start(*arguments)[0]
        if error == _INVALID_CONTEXT:  # nothing has used this device in this thread yet
            self.set_current()
            error = self._start(*arguments)[0]
        return error

    def resident_blocks(self, threads: int, shared_bytes: int = 0) -> int:
        """Return how many blocks of `threads` threads the whole device runs at a time."""
        key = (threads, shared_bytes)
        if key not in self._resident:
            with torch.cuda.device(self.device_index):
                self.set_current()
                if shared_bytes > self.shared_limit:
                    self._raise_shared_limit(shared_bytes)
                occupancy = self._kernel.occupancy
                blocks = occupancy.max_active_blocks_per_multiprocessor(threads, shared_bytes)
            self._resident[key] = blocks * multiprocessors(self.device_index)
        return self._resident[key]

    def set_current(self) -> None:
        """Make the device's context, which PyTorch uses too, that of the calling thread."""
        from cuda.core import Device

        Device(self.device_index).set_current()

    def _take_block(self, values: list) -> "_ArgumentBlock":
        """Return memory for the arguments; one a launch in flight, since threads may share us."""
        if self._arguments is None:
            # What the kernel was compiled to take: (offset, size) of each of its parameters.
            parameters = [tuple(info) for info in self._kernel.arguments_info]
            size = sum(size for _, size in parameters)
            if size != 8 * len(values):
                raise TypeError(
                    f"{self.name} takes {size} bytes of arguments, got {len(values)} arguments "
                    "of 8 bytes"
                )
            slots = "".join("d" if isinstance(v, float) else "q" for v in values)
            self._pack_into = struct.Struct(f"={slots}").pack_into
            self._arguments = parameters  # last, since other threads look at it
        try:
            return self._blocks.pop()
        except IndexError:
            return _ArgumentBlock(len(values), [offset for offset, _ in self._arguments])

    def _raise_shared_limit(self, shared_bytes: int):
        from cuda.bindings import driver

        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(
            attribute, shared_bytes, driver.CUkernel(int(self.handle)), self.device_index
        )
        if error:
            raise RuntimeError(
                f"{self.name} cannot have {shared_bytes} bytes of shared memory a block on CUDA "
                f"device {self.device_index}: {error.name}"
            )
        self.shared_limit = shared_bytes


class _ArgumentBlock:
    """Argument values side by side, and the table of their addresses that the driver reads."""

    __slots__ = ("addresses", "pointer", "values")

    def __init__(self, count: int, offsets: list[int]):
        self.values = (ctypes.c_int64 * count)()
        start = ctypes.addressof(self.values)
        self.addresses = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        self.pointer = ctypes.addressof(self.addresses)


def get_kernel(source: str, name: str, device_index: int) -> Kernel:
    """Return the kernel `name` of kernels/cuda/<source>.cu for a device, compiled if need be.

    Args:
        source: file name without suffix.
        name: name of the kernel with its template arguments, as C++ would write it. A dict keeps
            one kernel a (source, name, device).
        device_index: of the tensors: `x.device.index`.

    Raises:
        RuntimeError: the source does not compile; the message has the compiler's.
    """
    kernel = _kernels.get((source, name, device_index))
    if kernel is None:
        with _compiling:
            kernel = _kernels.get((source, name, device_index))
            if kernel is None:
                arch = architecture(*torch.cuda.get_device_capability(device_index))
                symbol, cubin = cached_cubin(source, name, arch)
                kernel = _kernels[source, name, device_index] = Kernel(
                    name, device_index, cubin, symbol
                )
    return kernel


def cached_cubin(source: str, name: str, arch: str) -> tuple[str, bytes]:
    """Return (symbol, cubin) of a kernel from the cache on disk, which it fills.

    An entry is written under another name and then moved to its place, and carries its key and a
    checksum, so that processes starting together, a crash or a full disk cannot harm it: what does
    not check is built again. One process compiles while others wait for its entry.
    """
    key = _cache_key(source, name, arch)
    folder = cache_folder()
    if folder is None:
        return _compile_aloud(source, name, arch)
    path = folder / f"{source}-{arch}-{key[:32]}.cubin"
    entry = _read_entry(path, key)
    if entry is None:
        with _only_process(folder / f"{key[0]}.lock"):
            entry = _read_entry(path, key)  # another process may have built it while we waited
            if entry is None:
                entry = _compile_aloud(source, name, arch)
                _write_entry(path, key, *entry)
    return entry


def compile_cubin(
    source: str, name: str, arch: str, *, report: list | None = None
) -> tuple[str, bytes]:
    """Return (symbol, cubin) of a kernel by NVRTC, which needs neither a GPU nor a driver.

    `report` receives the assembler's text: registers, spills and stack of the kernel.
    """
    from cuda.core import Program, ProgramOptions

    folder = kernel_sources("cuda")
    include = cuda_include()
    if include is None:
        raise RuntimeError(compiler_unavailable(arch))
    options = ProgramOptions(
        name=f"{source}.cu",
        arch=arch,
        include_path=[str(folder), str(include)],
        **_OPTIONS,
        ptxas_options=None if report is None else "-v",
    )
    log = _Log()
    try:
        code = Program((folder / f"{source}.cu").read_text(), "c++", options).compile(
            "cubin", name_expressions=(name,), logs=log
        )
    except Exception as error:  # cuda.core's own classes, which no public module names
        raise RuntimeError(f"{source}.cu does not compile {name} for {arch}: {error}") from error
    if report is not None:
        report.append(log.text)
    symbol = code.symbol_mapping[name]
    return (symbol.decode() if isinstance(symbol, bytes) else symbol), bytes(code.code)


class _Log:
    text = ""

    def write(self, text: str):
        self.text += text


def _compile_aloud(source: str, name: str, arch: str) -> tuple[str, bytes]:
    """`compile_cubin`, with a word to the user where it takes more than a second."""
    started = time.perf_counter()
    notice = threading.Timer(
        1.0,
        _log.warning,
        ("compiling the CUDA kernel %s for %s (at its first use on this machine) ...", name, arch),
    )
    notice.daemon = True
    notice.start()
    try:
        compiled = compile_cubin(source, name, arch)
    finally:
        notice.cancel()
    elapsed = time.perf_counter() - started
    _compile_aloud.count += 1
    _compile_aloud.seconds += elapsed
    level = logging.WARNING if elapsed > 1 else logging.INFO
    _log.log(
        level,
        "compiled %s in %.1f s (%d kernels, %.1f s so far)",
        name,
        elapsed,
        _compile_aloud.count,
        _compile_aloud.seconds,
    )
    return compiled


_compile_aloud.count, _compile_aloud.seconds = 0, 0.0


@functools.cache
def cuda_include() -> Path | None:
    """Return the folder of cuda_bf16.h: that of the nvidia wheels, else of a toolkit."""
    folders = []
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("nvidia")
        for nvidia in spec.submodule_search_locations if spec else ():
            major = _nvrtc_version()[0]
            folders += [
                Path(nvidia, f"cu{major}", "include"),
                Path(nvidia, "cuda_runtime", "include"),
            ]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            folders.append(Path(os.environ[variable], "include"))
    folders += [Path(sys.prefix, "targets/x86_64-linux/include"), Path("/usr/local/cuda/include")]
    for folder in folders:
        if (folder / "cuda_bf16.h").is_file() and (folder / "cuda_fp16.h").is_file():
            return folder
    return None


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


@functools.cache
def _toolchain() -> str:
    """Everything but sources and architecture that a binary depends on."""
    import cuda.core

    include, headers = cuda_include(), hashlib.sha256()
    for header in ("cuda_bf16.h", "cuda_bf16.hpp", "cuda_fp16.h", "cuda_fp16.hpp"):
        headers.update((include / header).read_bytes())
    return (
        f"nvrtc {_nvrtc_version()}, cuda.core {cuda.core.__version__}, {headers.hexdigest()}, "
        f"{_OPTIONS}"
    )


def _cache_key(source: str, name: str, arch: str) -> str:
    digest = hashlib.sha256()
    for part in (name, arch, _toolchain(), *_texts(f"{source}.cu", set())):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def _texts(file: str, seen: set[str]) -> Iterator[str]:
    """Yield the text of a source, then of those of our own files that it includes."""
    path = kernel_sources("cuda") / file
    if file in seen or not path.is_file():
        return
    seen.add(file)
    text = path.read_text()
    yield text
    for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
        yield from _texts(included, seen)


def cache_folder() -> Path | None:
    """Return the folder of compiled kernels, or None where there can be none."""
    if CACHE_VARIABLE in os.environ:
        folder = Path(os.environ[CACHE_VARIABLE])
    elif "XDG_CACHE_HOME" in os.environ:
        folder = Path(os.environ["XDG_CACHE_HOME"], "vim-mamba")
    elif sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        folder = Path(os.environ["LOCALAPPDATA"], "vim-mamba", "Cache")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library/Caches/vim-mamba"
    else:
        folder = Path.home() / ".cache/vim-mamba"
    folder = folder / "cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _warn_no_cache(str(folder), str(error))
        return None
    return folder


@functools.cache
def _warn_no_cache(folder: str, reason: str):
    warnings.warn(
        f"compiled CUDA kernels cannot be kept in {folder} ({reason}), so that every process "
        f"compiles them again; set {CACHE_VARIABLE} to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


_MAGIC = b"vim-cubin-1"


def _read_entry(path: Path, key: str) -> tuple[str, bytes] | None:
    """Return (symbol, cubin), or None where there is no entry or it does not check."""
    try:
        magic, checksum, body = path.read_bytes().split(b"\n", 2)
        written_key, symbol, cubin = body.split(b"\n", 2)
    except (OSError, ValueError):
        return None
    sound = hashlib.sha256(body).hexdigest().encode() == checksum
    if magic != _MAGIC or not sound or written_key != key.encode():
        return None
    return symbol.decode(), cubin


def _write_entry(path: Path, key: str, symbol: str, cubin: bytes):
    body = b"\n".join([key.encode(), symbol.encode(), cubin])
    entry = b"\n".join([_MAGIC, hashlib.sha256(body).hexdigest().encode(), body])
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(entry)
        os.replace(temporary, path)
    except OSError as error:
        _warn_no_cache(str(path.parent), str(error))
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _only_process(path: Path, patience: float = 120.0) -> Iterator[None]:
    """Hold a lock between processes, which ends with its holder; go on without after `patience`.

    The lock spares work and nothing depends on it: where the system has none, several processes
    compile the same kernel, and each writes the same entry.
    """
    try:
        import fcntl

        file = open(path, "ab")  # noqa: SIM115, closed below
    except (ImportError, OSError):
        yield
        return
    with file:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield
