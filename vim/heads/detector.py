"""A detector: boxes, classes and perhaps masks from a simple feature pyramid, by torchvision."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from .cascade import CascadeRoIHeads
from .feature_pyramid import SimpleFeaturePyramid

__all__ = ["Detector"]

BOX_POOL, MASK_POOL = 7, 14
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
POOLED = ["0", "1", "2", "3"]
"""The maps that regions are pooled from: all but the coarsest, which is for proposals alone."""


class Detector(nn.Module):
    """Images to boxes, classes, scores and perhaps masks; in training, to losses.

    Faster R-CNN (Ren et al. 2015, arXiv:1506.01497), with masks Mask R-CNN (He et al. 2017,
    arXiv:1703.06870), on request in three stages, Cascade R-CNN (Cai and Vasconcelos 2017,
    arXiv:1712.00726). The heads are ViTDet's (Li et al. 2022, arXiv:2203.16527, appendix), which
    official Vim has, too: a simple feature pyramid, two convolutions for proposals, four
    convolutions and one linear layer for boxes, four for masks, with LayerNorm. All of them are
    torchvision's; boxes and scores are float32 under autocast, too.

    Args:
        encoder: image to a list of maps, of which the last is taken; with timm's `feature_info`.
        num_classes: of the objects, without the background.
        masks: whether there is a head for masks.
        cascade: three stages of boxes instead of one; see `CascadeRoIHeads`.
        channels: of the pyramid and the heads' convolutions.
        fc_channels: of the boxes' linear layer.
        anchor_sizes: side of the anchors of each map, in pixels, the finest first.
        proposals: of an image that go on to the boxes' heads.
        box_samples: of these, how many train the heads.
        short_side, long_side: in evaluation an image is resized until its shorter side is
            `short_side`, or, if that is less, its longer one `long_side`. In training it is not.
        canvas: (height, width) that images are padded to at least, at the right and the bottom: the
            crops' of training, so that position embeddings mean the same in evaluation.
        score_threshold: boxes with lower scores are left out.
        nms_threshold: of two boxes of a class with a higher IoU, the one with the lower score is
            left out.
        max_detections: of an image.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        masks: bool = True,
        cascade: bool = False,
        channels: int = 256,
        fc_channels: int = 1024,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        proposals: int = 1000,
        box_samples: int = 512,
        short_side: int = 800,
        long_side: int = 1333,
        canvas: Sequence[int] = (0, 0),
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                f"num_classes must be 1 or more, without background, got {num_classes}"
            )
        if not 0 < short_side <= long_side:
            raise ValueError(
                f"short_side must be above 0 and at most long_side, got {short_side}, {long_side}"
            )
        if len(canvas) != 2:
            raise ValueError(f"canvas must be (height, width) in pixels, got {canvas}")
        self.num_classes = num_classes
        self.pyramid = SimpleFeaturePyramid(encoder, channels)
        strides = self.pyramid.strides
        if len(anchor_sizes) != len(strides):
            raise ValueError(
                f"anchor_sizes must have a size for each of the maps of the strides {strides}, "
                f"got {tuple(anchor_sizes)}"
            )
        # Sides are multiples of the coarsest stride: anchors would lie off their cells otherwise.
        self.transform = _Transform(short_side, long_side, [], [], max(strides), _skip_resize=True)
        self.transform.canvas = tuple(canvas)
        anchors = _AnchorGenerator(
            tuple((size,) for size in anchor_sizes), (ANCHOR_RATIOS,) * len(strides)
        )
        self.rpn = RegionProposalNetwork(
            anchors,
            _RPNHead(channels, len(ANCHOR_RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.roi_heads = _roi_heads(
            num_classes + 1,
            strides=strides[: len(POOLED)],
            masks=masks,
            cascade=cascade,
            channels=channels,
            fc_channels=fc_channels,
            batch_size_per_image=box_samples,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
        )

    @property
    def has_masks(self) -> bool:
        """Whether masks are predicted, and needed in training."""
        return self.roi_heads.has_mask()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay would harm."""
        names = getattr(self.pyramid.backbone, "no_weight_decay", set)()
        return {f"pyramid.backbone.{name}" for name in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the patterns by which timm groups parameters into layers, for layer decay.

        All but the encoder's stem and blocks is of the last layer.
        """
        model = r"^pyramid\.backbone\.model\."
        return {
            "stem": model + r"(?:cls_token|reg_token|pos_embed|patch_embed)",
            "blocks": model + r"blocks\.(\d+)",
        }

    def compile(self, *args, **kwargs) -> None:
        """Compile the pyramid; the rest depends on how many boxes there are."""
        self.pyramid.compile(*args, **kwargs)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        pyramid: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses in training, else what is found in each image.

        Args:
            images: (3, H, W) each, normalised, of any sizes.
            targets: in training, of each image `boxes` (N, 4) float32 of left, top, right and
                bottom in pixels, `labels` (N,) int64 from 1, 0 being the background, and for
                masks `masks` (N, H, W) uint8. N may be 0.
            pyramid: what is called instead of the module `pyramid`, such as its CUDA graph.

        Returns:
            In training a dict of scalars. Else, of each image, `boxes`, `labels`, `scores` and for
            masks `masks` (N, 1, H, W), shares of certainty, all at the image's own size.

        Raises:
            ValueError: no targets in training; maps that are not finite, else.
        """
        if self.training and targets is None:
            raise ValueError("a detector needs targets in training: give them, or call eval()")
        sizes = [tuple(image.shape[1:]) for image in images]
        batch, targets = self.transform(list(images), targets if self.training else None)
        features = (pyramid or self.pyramid)(batch.tensors)
        # No box would come of such, which looks like an image without objects.
        if not self.training and not all(y.isfinite().all() for y in features.values()):
            raise ValueError(
                "the detector's maps are not finite: float16 overflows, so evaluate in bfloat16 "
                "or float32; or the weights are broken"
            )
        proposals, losses = self.rpn(batch, features, targets)
        found, more = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if self.training:
            return {**losses, **more}
        return self.transform.postprocess(found, batch.image_sizes, sizes)


def _roi_heads(
    num_classes: int,
    *,
    strides: Sequence[int],
    masks: bool,
    cascade: bool,
    channels: int,
    fc_channels: int,
    **options,
) -> RoIHeads:
    """The heads of regions; `num_classes` counts the background, `options` are torchvision's."""

    def box_head() -> nn.Module:
        size = (channels, BOX_POOL, BOX_POOL)
        return FastRCNNConvFCHead(size, [channels] * 4, [fc_channels], norm_layer=LayerNorm2d)

    options |= {
        "box_roi_pool": _RoIAlign(BOX_POOL, strides),
        "positive_fraction": 0.25,
    }
    if masks:
        options |= {
            "mask_roi_pool": _RoIAlign(MASK_POOL, strides),
            "mask_head": MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=LayerNorm2d),
            "mask_predictor": _MaskPredictor(channels, channels, num_classes),
        }
    if cascade:
        stages = range(3)
        return CascadeRoIHeads(
            box_heads=[box_head() for _ in stages],
            box_predictors=[_AgnosticBoxPredictor(fc_channels, num_classes) for _ in stages],
            **options,
        )
    return RoIHeads(
        box_head=box_head(),
        box_predictor=_BoxPredictor(fc_channels, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        **options,
    )


class _Transform(GeneralizedRCNNTransform):
    """Resizing in evaluation, padding and batching; images come normalised already."""

    canvas: tuple[int, int] = (0, 0)

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """As images are resized for training: antialiased, sides rounded; torchvision does neither.

        Of a smaller image without it, what the heads have learnt does not hold.
        """
        if self.training:
            return image, target
        sides = image.shape[1:]
        factor = min(self.min_size[-1] / min(sides), self.max_size / max(sides))
        size = [max(1, round(factor * side)) for side in sides]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target

    def max_by_axis(self, the_list: list[list[int]]) -> list[int]:
        return super().max_by_axis([*the_list, [0, *self.canvas]])

    def normalize(self, image: Tensor) -> Tensor:
        return image


class _RoIAlign(MultiScaleRoIAlign):
    """Pooling from maps of known strides.

    torchvision guesses them at the first call, from the sizes of images without their padding.
    """

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__(POOLED, size, sampling_ratio=2)
        self.scales = [1 / stride for stride in strides]
        self.map_levels = initLevelMapper(*(int(math.log2(s)) for s in (strides[0], strides[-1])))


# torchvision computes boxes in the dtype of maps and deltas. In bfloat16 a coordinate of 1,000
# pixels would be rounded to a multiple of 4, so both are made float32.


class _AnchorGenerator(AnchorGenerator):
    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class _RPNHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [y.float() for y in logits], [y.float() for y in deltas]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class _AgnosticBoxPredictor(_BoxPredictor):
    """One box for all classes, as the deltas of each."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits, deltas.repeat(1, logits.shape[1])


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()
