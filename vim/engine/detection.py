"""The detector that a training run trains: a backbone of timm's under torchvision's heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ._dense import optional_libraries
from ._encoders import build_maps
from ._keys import check_keys
from .preprocessing import Preprocessor
from .training_graph import TrainingGraph

__all__ = ["DetectionPreprocessor", "VimDetector"]

INFERENCE_KEYS = {
    "short_side",
    "long_side",
    "canvas",
    "score_threshold",
    "nms_threshold",
    "max_detections",
}
TRAINED = ("boxes", "labels", "masks")


@MODELS.register_module(name="VimDetectionPreprocessor")
class DetectionPreprocessor(Preprocessor):
    """Images (3, H, W) uint8 of any sizes to normalised float32 on the device, and their targets.

    Args:
        mean, std: of each channel, in 0..1.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(mean=mean, std=std)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """Prepare a batch of the loader.

        Args:
            data: lists of images (3, H, W) uint8 and of targets; other entries are left out.
            training: the boxes, labels and masks of the targets go to the device, too.

        Raises:
            TypeError: images of another dtype.
        """
        self._mean, self._std = self._mean.to(self.device), self._std.to(self.device)
        images = []
        for image in data["images"]:
            if image.dtype != torch.uint8:
                raise TypeError(f"images must be uint8 in 0..255, got {image.dtype}")
            image = image.to(self.device, non_blocking=True).to(torch.float32)
            images.append(image.sub_(self._mean[0]).div_(self._std[0]))
        targets = data.get("targets")
        if training:
            targets = [
                {k: t[k].to(self.device, non_blocking=True) for k in TRAINED if k in t}
                for t in targets
            ]
        return {"images": images, "targets": targets}

    def check_loader(self, loader: DataLoader) -> None:
        """Do nothing: there is no batch that a detector cannot train on."""


@MODELS.register_module()
class VimDetector(BaseModel):
    """A `vim.heads.detector.Detector` in training and evaluation.

    The whole network is its attribute `backbone`, for that is what the engine optimizes, compiles
    and exports.

    Args:
        num_classes: of the objects, without the background.
        backbone: of the encoder: `name` of a timm model and its arguments; `checkpoint`, `use_ema`
            and `grad_checkpointing` as for `VimClassifier`; of a Vim also `norm` and `class_token`,
            see `vim.models.VisionMambaMaps`.
        masks, cascade, channels, fc_channels, anchor_sizes, proposals, box_samples: see `Detector`.
        inference: further arguments of `Detector`, of evaluation: short_side, long_side, canvas,
            score_threshold, nms_threshold, max_detections.
        cuda_graph: whether a GPU replays forward and backward of the pyramid, backbone included, in
            training, see `TrainingGraph`; the rest depends on how many boxes there are. Without
            `grad_checkpointing`, `torch.compile` and FSDP.
        data_preprocessor: config of `VimDetectionPreprocessor`.

    Raises:
        ImportError: the libraries of the extra `dense` are not installed.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: Mapping[str, Any],
        masks: bool = True,
        cascade: bool = False,
        channels: int = 256,
        fc_channels: int = 1024,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        proposals: int = 1000,
        box_samples: int = 512,
        inference: Mapping[str, Any] | None = None,
        cuda_graph: bool = False,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        init_cfg: None = None,
    ) -> None:
        if isinstance(data_preprocessor, Mapping):
            data_preprocessor = dict(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        check_keys("model.inference", inference or {}, INFERENCE_KEYS)
        with optional_libraries("detection"):
            from vim.heads.detector import Detector

        self.backbone = Detector(
            build_maps(backbone),
            num_classes,
            masks=masks,
            cascade=cascade,
            channels=channels,
            fc_channels=fc_channels,
            anchor_sizes=anchor_sizes,
            proposals=proposals,
            box_samples=box_samples,
            **(inference or {}),
        )
        self.cuda_graph = cuda_graph
        self._training_graph: TrainingGraph | None = None

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Any]] | None = None,
        mode: str = "tensor",
    ) -> list[dict[str, Tensor]] | dict[str, Any]:
        """Return losses or predictions.

        Args:
            images: (3, H, W) each, normalised, of any sizes.
            targets: of each image, see `vim.engine.detection_data.DetectionSample`.
            mode: "loss" for a dict of scalars whose names start with "loss"; "tensor" for what
                `Detector` finds in each image; "predict" for a dict of that, as `predictions`, of
                `targets` and of `num_classes`.

        Raises:
            ValueError: another mode, or targets without the masks that the detector learns from.
        """
        if mode == "loss":
            if self.backbone.has_masks and not all("masks" in t for t in targets):
                raise ValueError(
                    "the detector learns masks, and the data have none: set dataset.masks=True "
                    "or model.masks=False"
                )
            if self.cuda_graph and self._training_graph is None:
                # Made here and not before, since averaged copies of this model must not share it.
                self._training_graph = TrainingGraph(self.backbone.pyramid)
            return self.backbone(images, targets, pyramid=self._training_graph)
        if mode not in ("tensor", "predict"):
            raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
        found = self.backbone(images)
        if mode == "tensor":
            return found
        return {
            "predictions": found,
            "targets": targets,
            "num_classes": self.backbone.num_classes,
        }
