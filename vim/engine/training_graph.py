"""Forward and backward of a model as CUDA graphs: the host starts a step's kernels at once."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vim.layers import MixtureOfExperts

__all__ = ["BUCKET_CAP_MB", "TrainingGraph"]

BUCKET_CAP_MB = 3
"""DDP's buckets for a graph, whose gradients come all at once: small ones, so that the first are
added up while others are still copied."""


class TrainingGraph:
    """Call a module; in training on a CUDA device, replay graphs of its forward and backward.

    A small model's kernels end sooner than Python starts the next. The graphs are captured at the
    first such call, for its shape of images and under its autocast; images of other shapes, and all
    else, go through the module itself. Random numbers, such as stochastic depth's, are drawn anew
    at every replay. Gradients arrive as from the module. Mixtures of experts have `aux_loss`, with
    its gradient, `load` and `dropped` after a replay, too, until the next one overwrites them.
    Batch norm counts each step once, the trial runs before the capture not at all. Of several
    processes each has graphs of its own; DDP adds their gradients up after the replay.

    Args:
        module: what takes images (B, C, H, W) and returns a tensor, or tuples, lists and dicts of
            such. Its parameters may change their values but not their memory or `requires_grad`;
            hooks of the module itself do not run.
        options: of every call.

    Raises:
        ValueError: FSDP shards the module, or its batch norms are synchronised.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise ValueError(
                "a graph's weights stay where they are, and FSDP gathers them anew in each step: "
                'leave out model.cuda_graph=True or parallel="fsdp"'
            )
        if any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
            raise ValueError(
                "synchronised batch norm asks other processes in the middle of what would be a "
                "graph: set model.sync_bn=False, or leave out model.cuda_graph=True"
            )
        self.module = module
        self.options = options
        self._experts = [m for m in module.modules() if isinstance(m, MixtureOfExperts)]
        self._graphed: Callable[[Tensor], tuple] | None = None
        self._captured: tuple | None = None

    def __call__(self, images: Tensor) -> Any:
        if not (images.is_cuda and self.module.training and torch.is_grad_enabled()):
            return self.module(images, **self.options)
        call = images.shape, images.dtype, images.device
        if self._graphed is None:
            self._graphed, self._captured = self._capture(images), call
        if call != self._captured:
            return self.module(images, **self.options)
        for parameter in self.module.parameters():
            if parameter.grad is not None:  # where gradients are added up over several batches
                # It may be the graph's own memory, which the next replay overwrites.
                parameter.grad = parameter.grad.clone()
        output, *left = self._graphed(images)
        for i, experts in enumerate(self._experts):
            experts.aux_loss, experts.load, experts.dropped = left[3 * i : 3 * i + 3]
        return output

    def _capture(self, images: Tensor) -> Callable[[Tensor], tuple]:
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
            # Gradients arise on the stream of the capture, and are added up on the current one.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        statistics = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with (
            warnings.catch_warnings(),
            # Weights must be cast in the graph, not once before it.
            torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False),
        ):
            # Said of the thread of the backward, where nothing has used the device yet.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
            # It puts the replay in the place of a module's method, where copies would share it.
            graphed = torch.cuda.make_graphed_callables(
                _WithExperts(self.module, self._experts, self.options), (images.detach().clone(),)
            )
        for buffer, value in statistics:
            buffer.copy_(value)
        return graphed


class _WithExperts(nn.Module):
    """Return what a module returns, and what its mixtures of experts leave behind."""

    def __init__(
        self, module: nn.Module, experts: list[MixtureOfExperts], options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.module = module
        self.options = options
        self.experts = tuple(experts)  # registered with the module already

    def forward(self, images: Tensor) -> tuple:
        output = self.module(images, **self.options)
        left = [x for m in self.experts for x in (m.aux_loss, m.load, m.dropped)]
        return output, *left
