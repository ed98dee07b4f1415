"""Vision Mamba (Vim) backbones: `import vim` registers them with timm.

>>> import timm, vim
>>> model = timm.create_model("vim_tiny_patch16_224")
"""

from importlib.metadata import PackageNotFoundError, version

from .models import VisionMamba, flops, load_checkpoint

try:
    __version__ = version("vim-mamba")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["VisionMamba", "__version__", "flops", "load_checkpoint"]
