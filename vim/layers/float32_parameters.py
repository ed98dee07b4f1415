"""Parameters that stand in exponents, and stay float32."""

from torch import nn

from .mamba import _keep_float32

__all__ = ["Float32Parameters"]


class Float32Parameters(nn.Module):
    """A module whose own parameters stay float32 when the model is cast to a lower precision.

    Those of its children are cast as usual.
    """

    def _apply(self, fn, recurse=True):
        for child in self.children():
            child._apply(fn)
        return super()._apply(lambda tensor: _keep_float32(fn, tensor), recurse=False)
