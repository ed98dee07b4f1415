"""torchvision's detectors with Vim and the simple feature pyramid as their backbone."""

import pytest
import timm
import torch

from vim import load_checkpoint
from vim.heads import SimpleFeaturePyramid
from vim.models import VisionMambaMaps

detection = pytest.importorskip(
    "torchvision.models.detection", reason="optional: extra 'dense' brings torchvision"
)

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 2}
TWO_STAGE, ONE_STAGE = (4, 8, 16, 32, 64), (8, 16, 32, 64, 128)
DETECTORS = {
    "MaskRCNN": TWO_STAGE,
    "FasterRCNN": TWO_STAGE,
    "RetinaNet": ONE_STAGE,
    "FCOS": ONE_STAGE,
}
every_detector = pytest.mark.parametrize("detector", DETECTORS)


def build(detector, **options):
    model = timm.create_model("vim_tiny_patch16_224_pyramid", **SMALL)
    backbone = SimpleFeaturePyramid(VisionMambaMaps(model, **options), 64, DETECTORS[detector])
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
    options = few if DETECTORS[detector] is TWO_STAGE else {}
    return getattr(detection, detector)(
        backbone, num_classes=3, min_size=128, max_size=192, **options
    )


def images_and_targets():
    """Two images of different sizes, the second without an object."""
    sizes = [(90, 130), (100, 70)]
    boxes = [[[10.0, 10.0, 60.0, 70.0], [70.0, 20.0, 120.0, 80.0]], []]
    targets = [
        {
            "boxes": torch.tensor(b).reshape(-1, 4),
            "labels": torch.ones(len(b), dtype=torch.long),
            "masks": torch.ones(len(b), *size, dtype=torch.uint8),
        }
        for b, size in zip(boxes, sizes, strict=True)
    ]
    return [torch.rand(3, *size) for size in sizes], targets


@every_detector
def test_training_step(detector):
    model = build(detector)
    losses = model(*images_and_targets())
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad.isfinite().all(), name
    blocks = [p for n, p in model.named_parameters() if "blocks." in n]
    assert len(blocks) == 2 * 17
    assert all((p.grad != 0).any() for p in blocks)


@every_detector
def test_prediction(detector):
    model = build(detector).eval()
    images, _ = images_and_targets()
    with torch.no_grad():
        predictions = model(images)
    assert len(predictions) == 2
    for image, prediction in zip(images, predictions, strict=True):
        boxes = prediction["boxes"]
        height, width = image.shape[1:]
        assert boxes.isfinite().all()
        assert boxes.numel() == 0 or boxes[:, ::2].max() <= width + 1e-3
        assert boxes.numel() == 0 or boxes[:, 1::2].max() <= height + 1e-3
        if detector == "MaskRCNN":
            assert prediction["masks"].shape == (len(boxes), 1, height, width)


@every_detector
@pytest.mark.parametrize("class_token", [True, False], ids=["token", "no_token"])
def test_published_weights_load(detector, class_token, authors_checkpoint):
    checkpoint = authors_checkpoint(**SMALL)
    model = build(detector, class_token=class_token)
    load_checkpoint(model.backbone, checkpoint.path)
    checkpoint.matches(model.backbone.backbone, torch.randn(1, 3, 96, 160))
