"""The second stage of the kernels' deterministic sums: rows of partial sums, added in order."""

import torch
from torch import Tensor

from ._compile import DTYPES, get_kernel
from ._launch import launch

_COLUMNS = 32  # of a block
_LANES = 32  # that share the rows, at most
_OUTPUTS = 4


def sum_partials(
    source: str, partials: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> list[Tensor]:
    """Return the sums over the first dimension, in tensors of their own.

    Args:
        source: which has the kernel, as all that includes common.cuh.
        partials: (rows, directions, columns) float32, columns side by side.
        shapes: of up to four results; behind each other they take the columns.

    Returns:
        (directions, *shape) for each of `shapes`.
    """
    rows, directions, columns = partials.shape
    outputs = [partials.new_empty(directions, *shape, dtype=dtype) for shape in shapes]
    absent = _OUTPUTS - len(outputs)
    launch(
        get_kernel(source, sum_kernel(dtype), partials.device.index),
        (-(-columns // _COLUMNS), directions, 1),
        (_COLUMNS, min(_LANES, max(1, rows // 8)), 1),
        0,
        *(partials, rows, *partials.stride()[:2]),
        *(*outputs, *[None] * absent),
        *(*(x.numel() // directions for x in outputs), *[0] * absent),
    )
    return outputs


def sum_kernel(dtype: torch.dtype) -> str:
    """Return the kernel's name, for results of `dtype`."""
    return f"sum_partials_kernel<{DTYPES[dtype]}>"
