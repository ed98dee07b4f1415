"""Cascade R-CNN: boxes are refined in stages, each trained on better ones than the last."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import box_convert, clip_boxes_to_image

__all__ = ["CascadeRoIHeads"]

IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
SMALLEST = 1e-2
"""Side of a box in pixels under which it can't be refined."""


class CascadeRoIHeads(RoIHeads):
    """torchvision's heads of regions with stages of boxes, each fed with the last one's.

    A region is an object for a stage where its IoU with one is that stage's threshold or more. The
    stages share the pooled maps' gradient evenly. In evaluation scores are the mean of all stages'
    on that stage's boxes, and boxes are the last stage's. Masks learn from the first stage's
    regions and are predicted on the final boxes.

    Source: Cai and Vasconcelos 2017, "Cascade R-CNN", arXiv:1712.00726; thresholds, weights and
    the shared gradient as in detectron2, modeling/roi_heads/cascade_rcnn.py.

    Args:
        box_roi_pool: regions to maps of one size.
        box_heads, box_predictors: of each stage; a predictor returns logits (R, C) and, of one box
            for all classes, the deltas repeated to (R, 4 C).
        ious: of each stage.
        box_weights: of each stage: by how much deltas of x, y, width and height are scaled.
        options: of torchvision's `RoIHeads`: batch_size_per_image, positive_fraction, score_thresh,
            nms_thresh, detections_per_img, mask_roi_pool, mask_head, mask_predictor.

    Raises:
        ValueError: not as many of one as of the other.
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        ious: Sequence[float] = IOUS,
        box_weights: Sequence[tuple[float, float, float, float]] = WEIGHTS,
        **options: Any,
    ) -> None:
        counts = [len(box_heads), len(box_predictors), len(ious), len(box_weights)]
        if len(set(counts)) > 1 or not box_heads:
            raise ValueError(
                "a cascade needs a head, a predictor, an IoU and weights for each stage, got "
                "{}, {}, {} and {}".format(*counts)
            )
        super().__init__(
            box_roi_pool=box_roi_pool,
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),
            fg_iou_thresh=ious[0],
            bg_iou_thresh=ious[0],
            bbox_reg_weights=box_weights[0],
            **options,
        )
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in ious]
        self.coders = [BoxCoder(weights) for weights in box_weights]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return what is found in each image, and {}; in training [], and the losses."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        scores = []
        for stage, coder in enumerate(self.coders):
            logits, deltas = self._stage(stage, features, proposals, image_shapes)
            scores.append(logits.softmax(-1))
            regions = proposals
            if stage < len(self.coders) - 1:
                proposals = self._refined(coder, deltas, proposals, image_shapes)
        mean = sum(scores) / len(scores)
        # torchvision decodes the last stage's deltas and takes the softmax of logits.
        self.box_coder = self.coders[-1]
        found = self.postprocess_detections(mean.log(), deltas, regions, image_shapes)
        result = [{"boxes": b, "labels": c, "scores": s} for b, s, c in zip(*found, strict=True)]
        if self.has_mask():
            logits = self._mask_logits(features, [r["boxes"] for r in result], image_shapes)
            masks = maskrcnn_inference(logits, [r["labels"] for r in result])
            for mask, each in zip(masks, result, strict=True):
                each["masks"] = mask
        return result, {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        # The first stage draws regions; the others go on with the same ones, refined.
        self.box_coder, self.proposal_matcher = self.coders[0], self.matchers[0]
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        losses = {}
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(
                features, proposals, image_shapes, targets, matched, labels
            )
        for stage, coder in enumerate(self.coders):
            if stage:
                labels, wanted = self._matched(stage, proposals, targets)
            logits, deltas = self._stage(stage, features, proposals, image_shapes)
            classes, boxes = 0 * logits.sum(), 0 * deltas.sum()  # of no regions at all
            if len(logits):
                classes, boxes = fastrcnn_loss(logits, deltas, labels, wanted)
            losses[f"loss_classifier_{stage + 1}"] = classes
            losses[f"loss_box_reg_{stage + 1}"] = boxes
            proposals = self._refined(coder, deltas, proposals, image_shapes)
            proposals = [p[_is_box(p)] for p in proposals]
        return losses

    def _stage(
        self,
        stage: int,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """Logits (R, C) and deltas (R, 4 C) of the regions of all images."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        if self.training:
            pooled = _ScaleGradient.apply(pooled, 1 / len(self.coders))
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _refined(
        self,
        coder: BoxCoder,
        deltas: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """The regions moved by their deltas, within the image; no gradient flows through them."""
        boxes = coder.decode(deltas[:, :4].detach(), proposals).reshape(-1, 4)
        parts = boxes.split([len(p) for p in proposals])
        return [clip_boxes_to_image(p, s) for p, s in zip(parts, image_shapes, strict=True)]

    def _matched(
        self, stage: int, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels and deltas that the regions of a later stage should have."""
        self.proposal_matcher = self.matchers[stage]
        boxes = [t["boxes"].to(proposals[0].dtype) for t in targets]
        matched, labels = self.assign_targets_to_proposals(
            proposals, boxes, [t["labels"] for t in targets]
        )
        objects = [
            b[i] if len(b) else torch.zeros_like(p)
            for b, i, p in zip(boxes, matched, proposals, strict=True)
        ]
        return labels, list(self.coders[stage].encode(objects, proposals))

    def _mask_logits(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        pooled = self.mask_roi_pool(features, proposals, image_shapes)
        return self.mask_predictor(self.mask_head(pooled))

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Sequence[Mapping[str, Tensor]],
        matched: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        objects = [torch.where(each > 0)[0] for each in labels]
        regions = [p[i] for p, i in zip(proposals, objects, strict=True)]
        return maskrcnn_loss(
            self._mask_logits(features, regions, image_shapes),
            regions,
            [t["masks"] for t in targets],
            [t["labels"] for t in targets],
            [m[i] for m, i in zip(matched, objects, strict=True)],
        )


def _is_box(boxes: Tensor) -> Tensor:
    """Whether each of (R, 4) boxes has a width and a height."""
    return (box_convert(boxes, "xyxy", "xywh")[:, 2:] > SMALLEST).all(1)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * gradient, None
