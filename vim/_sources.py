"""Where the sources of compiled kernels are: in the checkout, or in the installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def kernel_sources(kind: str) -> Path:
    """Return the folder of the sources of `kind`, "cuda" or "cpu".

    Raises:
        RuntimeError: the installation lacks them.
    """
    for folder in (_PACKAGE.parent / "kernels" / kind, _PACKAGE / "_kernels" / kind):
        if folder.is_dir():
            return folder
    raise RuntimeError(f"the {kind} kernels are missing from {_PACKAGE}; reinstall vim-mamba")
