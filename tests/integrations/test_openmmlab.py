"""mmseg and mmdet: Vim by name from their configs, through mmengine's registry.

Ran with mmcv-lite 2.1.0, mmsegmentation 1.2.2 and mmdet 3.3.0. mmcv-lite lacks the compiled
operators that both import; those which are called here come from torchvision.
"""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from vim.heads import register_backbones
from vim.models import VisionMambaMaps

pytest.importorskip("mmengine", reason="optional: extra 'train'")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs; no release since 2024-01

SMALL = {"name": "vim_tiny_patch16_224_pyramid", "img_size": 64, "embed_dim": 32, "depth": 4}
SIZE = (64, 96)


def operators_from_torchvision():
    """Return a stand-in for `mmcv._ext`: NMS and RoIAlign; any other operator raises."""
    ops = pytest.importorskip("torchvision.ops", reason="optional: extra 'dense'")

    class Extension(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)

            def missing(*args, **kwargs):
                raise NotImplementedError(f"mmcv-lite has no {name}")

            return missing

        @staticmethod
        def nms(boxes, scores, iou_threshold, offset=0):
            return ops.nms(boxes, scores, iou_threshold)

        @staticmethod
        def roi_align_forward(x, rois, output, *_, spatial_scale, sampling_ratio, aligned, **__):
            size = output.shape[-2:]
            output.copy_(ops.roi_align(x, rois, size, spatial_scale, sampling_ratio, aligned))

    return Extension("mmcv._ext")


@pytest.fixture
def scope(request):
    """Import a library, and build what the test builds in its registry."""
    library = request.param
    for name in ("mmcv", library):
        pytest.importorskip(name, reason="optional: mmcv-lite, mmsegmentation, mmdet")
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = operators_from_torchvision()
    importlib.import_module(f"{library}.models")
    from mmengine.registry import MODELS, DefaultScope

    register_backbones(MODELS)
    with DefaultScope.overwrite_default_scope(library):
        yield importlib.import_module(f"{library}.registry").MODELS


def images():
    return [torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8) for _ in range(2)]


def segmenter(**options):
    from mmengine import ConfigDict

    head = {
        "num_classes": 5,
        "norm_cfg": {"type": "BN"},
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss"},
    }
    return ConfigDict(
        type="EncoderDecoder",
        data_preprocessor={"type": "SegDataPreProcessor", "size": SIZE},
        backbone={"type": "VimPyramid", **SMALL, **options},
        decode_head=head
        | {
            "type": "UPerHead",
            "in_channels": [32] * 4,
            "in_index": [0, 1, 2, 3],
            "channels": 32,
        },
        auxiliary_head=head
        | {
            "type": "FCNHead",
            "in_channels": 32,
            "in_index": 2,
            "channels": 16,
            "num_convs": 1,
        },
        train_cfg={},
        test_cfg={"mode": "whole"},
    )


def detector(**options):
    from mmengine import ConfigDict

    nms = {"type": "nms", "iou_threshold": 0.7}
    proposals = {"nms_pre": 50, "max_per_img": 20, "nms": nms, "min_bbox_size": 0}
    coder = {"type": "DeltaXYWHBBoxCoder"}
    cross_entropy = {"type": "CrossEntropyLoss"}

    def extractor(size):
        align = {
            "type": "RoIAlign",
            "output_size": size,
            "sampling_ratio": 0,
            "use_torchvision": True,
        }
        return {
            "type": "SingleRoIExtractor",
            "roi_layer": align,
            "out_channels": 32,
            "featmap_strides": [4, 8, 16, 32],
        }

    def assigner(positive, negative):
        return {
            "type": "MaxIoUAssigner",
            "pos_iou_thr": positive,
            "neg_iou_thr": negative,
            "min_pos_iou": negative,
        }

    sampler = {"type": "RandomSampler", "num": 16, "pos_fraction": 0.5}
    rest = {"pos_weight": -1, "debug": False, "sampler": sampler}
    box_head = {
        "type": "Shared2FCBBoxHead",
        "in_channels": 32,
        "fc_out_channels": 32,
        "roi_feat_size": 7,
        "num_classes": 3,
        "bbox_coder": coder,
        "reg_class_agnostic": True,
        "loss_cls": cross_entropy,
        "loss_bbox": {"type": "SmoothL1Loss"},
    }
    return ConfigDict(
        type="CascadeRCNN",
        data_preprocessor={
            "type": "DetDataPreprocessor",
            "pad_mask": True,
            "pad_size_divisor": 32,
        },
        backbone={
            "type": "VimSimpleFeaturePyramid",
            "out_channels": 32,
            **SMALL,
            **options,
        },
        rpn_head={
            "type": "RPNHead",
            "in_channels": 32,
            "feat_channels": 32,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": coder,
            "loss_cls": cross_entropy | {"use_sigmoid": True},
            "loss_bbox": {"type": "L1Loss"},
        },
        roi_head={
            "type": "CascadeRoIHead",
            "num_stages": 2,
            "stage_loss_weights": [1, 0.5],
            "bbox_roi_extractor": extractor(7),
            "bbox_head": [box_head] * 2,
            "mask_roi_extractor": extractor(14),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 1,
                "in_channels": 32,
                "conv_out_channels": 32,
                "num_classes": 3,
                "loss_mask": cross_entropy | {"use_mask": True},
            },
        },
        train_cfg={
            "rpn": rest | {"assigner": assigner(0.7, 0.3), "allowed_border": 0},
            "rpn_proposal": proposals,
            "rcnn": [rest | {"assigner": assigner(0.5, 0.5), "mask_size": 28}] * 2,
        },
        test_cfg={
            "rpn": proposals,
            "rcnn": {"score_thr": 0.0, "nms": nms, "max_per_img": 5, "mask_thr_binary": 0.5},
        },
    )


def segmentation_samples():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        labels = PixelData(data=torch.randint(0, 5, (1, *SIZE)))
        samples.append(SegDataSample(gt_sem_seg=labels, metainfo={"ori_shape": SIZE}))
    return samples


def detection_samples():
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for _ in range(2):
        instances = InstanceData(
            bboxes=torch.tensor([[10.0, 10.0, 50.0, 60.0]]),
            labels=torch.tensor([1]),
            masks=BitmapMasks(np.ones((1, *SIZE), dtype=np.uint8), *SIZE),
        )
        sample = DetDataSample(gt_instances=instances)
        sample.set_metainfo(
            {"img_shape": SIZE, "ori_shape": SIZE, "pad_shape": SIZE, "scale_factor": (1.0, 1.0)}
        )
        samples.append(sample)
    return samples


CASES = [("mmseg", segmenter, segmentation_samples), ("mmdet", detector, detection_samples)]
each = pytest.mark.parametrize(
    ("scope", "config", "samples"), CASES, indirect=["scope"], ids=["mmseg", "mmdet"]
)


@each
def test_training_step_and_prediction(scope, config, samples):
    model = scope.build(config())
    data = model.data_preprocessor({"inputs": images(), "data_samples": samples()}, True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        predictions = model.eval()(**data, mode="predict")
    for prediction in predictions:
        if config is segmenter:
            assert prediction.pred_sem_seg.data.shape == (1, *SIZE)
        else:
            assert prediction.pred_instances.masks.shape[1:] == SIZE


@each
@pytest.mark.parametrize("class_token", [True, False], ids=["token", "no_token"])
def test_published_weights_load(scope, config, samples, class_token, authors_checkpoint):
    small = {k: v for k, v in SMALL.items() if k != "name"}
    checkpoint = authors_checkpoint(**small)
    model = scope.build(config(checkpoint=str(checkpoint.path), class_token=class_token))
    model.init_weights()  # which mmengine's runner calls, and which leaves ours as they are
    (maps,) = (m for m in model.modules() if isinstance(m, VisionMambaMaps))
    checkpoint.matches(maps, torch.randn(1, 3, *SIZE))
