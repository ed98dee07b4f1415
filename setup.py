"""What building does beyond pyproject.toml: the C++ kernels, and the CUDA sources as data.

The C++ kernels are a plain shared library, ``vim/ops/cpu/_kernels.*``, which needs a compiler but
neither torch nor Python's headers. They are optional: where they cannot be built, installing goes
on, and PyTorch's own operators serve the CPU.
"""

import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CompileError, LinkError

ROOT = Path(__file__).parent
OPS = ("selective_scan", "causal_conv1d", "add_norm", "bidirectional_mixer")
X86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32

UNIX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# The vector code is written out; contracting it further would change results with the compiler.
UNIX_ISAS = {
    "plain": [],
    "avx2": ["-DVIM_AVX2", "-ffp-contract=off", "-mavx2", "-mfma"],
    "avx512": [
        "-DVIM_AVX512",
        "-ffp-contract=off",
        "-mprefer-vector-width=512",
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
        *("-mavx2", "-mfma"),
    ],
}
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc"]
MSVC_ISAS = {
    "plain": [],
    "avx2": ["/DVIM_AVX2", "/arch:AVX2"],
    "avx512": ["/DVIM_AVX512", "/arch:AVX512"],
}


class BuildKernels(build_ext):
    """Compiles each op once an instruction set, and links one shared library."""

    def build_extension(self, ext):
        try:
            self._build(ext)
        except (BaseError, CompileError, LinkError, OSError) as error:
            sys.stderr.write(
                f"\nvim: the C++ kernels were not built: {error}\n"
                "vim: installing goes on without them; on a CPU the slow PyTorch reference will "
                "run. Install gcc, clang or Visual Studio's build tools, and install again.\n\n"
            )

    def _build(self, ext):
        msvc = self.compiler.compiler_type == "msvc"
        flags, isas = (MSVC_FLAGS, MSVC_ISAS) if msvc else (UNIX_FLAGS, UNIX_ISAS)
        if X86:
            flags = [*flags, "-DVIM_BUILD_X86"]
        sources = Path("kernels/cpu")
        objects = self._compile(
            [sources / "dispatch.cpp", sources / "threads.cpp"], flags, "common"
        )
        for isa in isas if X86 else ["plain"]:
            files = [sources / f"{op}.cpp" for op in OPS]
            objects += self._compile(files, [*flags, f"-DVIM_ISA={isa}", *isas[isa]], isa)
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[] if msvc else ["-pthread"],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _compile(self, sources, flags, name):
        return self.compiler.compile(
            [str(source) for source in sources],
            output_dir=str(Path(self.build_temp) / name),
            extra_postargs=flags,
            depends=[str(path) for path in Path("kernels/cpu").glob("*.h")],
        )

    def get_ext_filename(self, fullname):
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext):
        return []

    def copy_extensions_to_source(self):
        built = (Path(self.build_lib, self.get_ext_filename(ext.name)) for ext in self.extensions)
        if all(path.exists() for path in built):
            super().copy_extensions_to_source()


class BuildPackage(build_py):
    """Adds the CUDA sources, which are compiled on the user's machine, as ``vim/_kernels/cuda``."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "vim", "_kernels", "cuda")
        target.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.cu", "*.cuh"):
            for source in (ROOT / "kernels" / "cuda").glob(pattern):
                shutil.copy2(source, target)


class Wheel(bdist_wheel):
    """One wheel a platform serves every Python: the kernels do not use Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("vim.ops.cpu._kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage, "bdist_wheel": Wheel},
)
