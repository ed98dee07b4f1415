"""Forward and backward of a model as CUDA graphs: the host starts a step's kernels at once."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["TrainingGraph"]


class TrainingGraph:
    """Call a module; in training on a CUDA device, replay graphs of its forward and backward.

    A small model's kernels end sooner than Python starts the next. The graphs are captured at the
    first such call, for its shape of images and under its autocast; images of other shapes, and all
    else, go through the module itself. Random numbers, such as stochastic depth's, are drawn anew
    at every replay. Gradients arrive as from the module.

    Args:
        module: what takes images (B, C, H, W) and returns a tensor. Its parameters may change their
            values but not their memory or `requires_grad`; hooks of the module itself do not run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._graphed: Callable[[Tensor], Tensor] | None = None
        self._captured: tuple | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if not (images.is_cuda and self.module.training and torch.is_grad_enabled()):
            return self.module(images)
        call = images.shape, images.dtype, images.device
        if self._graphed is None:
            self._graphed, self._captured = self._capture(images), call
        return self._graphed(images) if call == self._captured else self.module(images)

    def _capture(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            # Gradients arise on the stream of the capture, and are added up on the current one.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        with (
            warnings.catch_warnings(),
            # Weights must be cast in the graph, not once before it.
            torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False),
        ):
            # Said of the thread of the backward, where nothing has used the device yet.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
            torch.cuda.make_graphed_callables(self.module, (images.detach().clone(),))
        # It has put the replay in the place of the module's method, where copies would share it.
        replay = self.module.forward
        del self.module.forward
        return replay
