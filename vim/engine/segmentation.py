"""The segmenter that a training run trains: a pyramid of timm's, UPerNet, and their loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_world_size
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ._dense import optional_libraries
from ._encoders import build_pyramid
from ._keys import check_keys
from .preprocessing import Preprocessor
from .segmentation_metrics import VOID
from .training_graph import TrainingGraph

__all__ = ["SegmentationPreprocessor", "VimSegmenter"]

INFERENCE_KEYS = {"window", "stride", "scales", "flip"}


@MODELS.register_module(name="VimSegmentationPreprocessor")
class SegmentationPreprocessor(Preprocessor):
    """Images (B, 3, H, W) uint8 to normalised float32 on the device; masks (B, H, W) to int64.

    Args:
        mean, std: of each channel, in 0..1.
        channels_last: the memory format of the images.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        channels_last: bool = False,
    ) -> None:
        super().__init__(mean=mean, std=std, channels_last=channels_last)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Tensor]:
        """Prepare a batch of the loader: see `Preprocessor.forward`."""
        data = super().forward(data, training)
        return {**data, "targets": data["targets"].long()}

    def check_loader(self, loader: DataLoader) -> None:
        """Raise before training where a batch would have one image alone.

        The decoder's pooling leaves one value a channel, of which batch norm takes no variance.

        Raises:
            ValueError: such a batch.
        """
        last = 0 if loader.drop_last else len(loader.sampler) % loader.batch_size
        if loader.batch_size == 1 or last == 1:
            raise ValueError(
                "batch norm cannot train on a batch of one image: give the dataloader a batch_size "
                "of 2 or more and drop_last=True"
            )


@MODELS.register_module()
class VimSegmenter(BaseModel):
    """A `vim.heads.segmenter.Segmenter` in training and evaluation.

    The whole network is its attribute `backbone`, for that is what the engine optimizes, compiles
    and exports.

    Args:
        num_classes: of the masks, without void.
        backbone: of the encoder: `name` of a timm model, a vim_*_pyramid or any other with maps of
            one stride, such as a DeiT, or of the strides 4, 8, 16 and 32, and its arguments;
            `checkpoint`, `use_ema` and `grad_checkpointing` as for `VimClassifier`.
        channels, dropout, auxiliary_level, auxiliary_channels: see `Segmenter`.
        auxiliary_weight: of the auxiliary head's loss.
        inference: arguments of `Segmenter.predict`: window, stride, scales, flip.
        sync_bn: where several GPUs train, batch norm takes the statistics of all their images.
        cuda_graph: whether a GPU replays forward and backward of the whole network in training, see
            `TrainingGraph`; without `grad_checkpointing`, `torch.compile` and FSDP, and on several
            processes with sync_bn=False.
        data_preprocessor: config of `VimSegmentationPreprocessor`.

    Raises:
        ImportError: the libraries of the extra `dense` are not installed.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        channels: int = 256,
        dropout: float = 0.1,
        auxiliary_level: int | None = 2,
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        inference: Mapping[str, Any] | None = None,
        sync_bn: bool = True,
        cuda_graph: bool = False,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        init_cfg: None = None,
    ) -> None:
        if isinstance(data_preprocessor, Mapping):
            data_preprocessor = dict(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        check_keys("model.inference", inference or {}, INFERENCE_KEYS)
        with optional_libraries("segmentation"):
            from vim.heads.segmenter import Segmenter

        encoder = build_pyramid(backbone)
        self.backbone = Segmenter(
            encoder, num_classes, channels, dropout, auxiliary_level, auxiliary_channels
        )
        if sync_bn and get_world_size() > 1 and torch.cuda.is_available():
            self.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(self.backbone)
        self.auxiliary_weight = auxiliary_weight
        self.inference = dict(inference or {})
        self.cuda_graph = cuda_graph
        self._training_graph: TrainingGraph | None = None

    def forward(
        self, images: Tensor, targets: Tensor | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor]:
        """Return logits, losses or predictions.

        Args:
            images: (B, C, H, W), normalised.
            targets: (B, H, W) classes, 255 for void; in "predict" of any size.
            mode: "tensor" for logits (B, classes, H, W); "loss" for a dict of scalars whose names
                start with "loss"; "predict" for a dict of `predictions`, classes of the size of
                `targets` (255 where scores are not finite), `targets`, and `num_classes`.
        """
        if mode == "tensor":
            return self.backbone(images)
        if mode == "predict":
            size = images.shape[2:] if targets is None else targets.shape[1:]
            scores = self.backbone.predict(images, size=size, **self.inference)
            broken = ~scores.isfinite().all(1)  # a class would hide it
            predictions = scores.argmax(1).masked_fill(broken, VOID)
            return {
                "predictions": predictions,
                "targets": targets,
                "num_classes": self.backbone.num_classes,
            }
        if mode != "loss":
            raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
        if self.cuda_graph and self._training_graph is None:
            # Made here and not before, since averaged copies of this model must not share it.
            self._training_graph = TrainingGraph(self.backbone, auxiliary=True)
        if self._training_graph is not None:
            logits, *auxiliary = self._training_graph(images)
        else:
            logits, *auxiliary = self.backbone(images, auxiliary=True)
        losses = {"loss_decode": _cross_entropy(logits, targets)}
        for each in auxiliary:
            losses["loss_auxiliary"] = self.auxiliary_weight * _cross_entropy(each, targets)
        return losses


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all pixels that are not void; 0 where all are."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=VOID, reduction="sum")
    return total / (targets != VOID).sum().clamp(min=1)
