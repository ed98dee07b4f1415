"""Forward and backward of a model as CUDA graphs: the host starts a step's kernels at once."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vim.layers import MixtureOfExperts

__all__ = ["TrainingGraph"]


class TrainingGraph:
    """Call a module; in training on a CUDA device, replay graphs of its forward and backward.

    A small model's kernels end sooner than Python starts the next. The graphs are captured at the
    first such call, for its shape of images and under its autocast; images of other shapes, and all
    else, go through the module itself. Random numbers, such as stochastic depth's, are drawn anew
    at every replay. Gradients arrive as from the module. Mixtures of experts have `aux_loss`, with
    its gradient, `load` and `dropped` after a replay, too, until the next one overwrites them.

    Args:
        module: what takes images (B, C, H, W) and returns a tensor. Its parameters may change their
            values but not their memory or `requires_grad`; hooks of the module itself do not run.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._experts = [m for m in module.modules() if isinstance(m, MixtureOfExperts)]
        self._graphed: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self._captured: tuple | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if not (images.is_cuda and self.module.training and torch.is_grad_enabled()):
            return self.module(images)
        call = images.shape, images.dtype, images.device
        if self._graphed is None:
            self._graphed, self._captured = self._capture(images), call
        if call != self._captured:
            return self.module(images)
        output, *left = self._graphed(images)
        for i, experts in enumerate(self._experts):
            experts.aux_loss, experts.load, experts.dropped = left[3 * i : 3 * i + 3]
        return output

    def _capture(self, images: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
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
            # It puts the replay in the place of a module's method, where copies would share it.
            return torch.cuda.make_graphed_callables(
                _WithExperts(self.module, self._experts), (images.detach().clone(),)
            )


class _WithExperts(nn.Module):
    """Return what a module returns, and what its mixtures of experts leave behind."""

    def __init__(self, module: nn.Module, experts: list[MixtureOfExperts]) -> None:
        super().__init__()
        self.module = module
        self.experts = tuple(experts)  # registered with the module already

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.module(images)
        left = [x for m in self.experts for x in (m.aux_loss, m.load, m.dropped)]
        return output, *left
