"""Large-scale jitter: boxes and masks go where the pixels go."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")

from vim.heads.detection_transforms import DetectionTransform

PLAIN = {"scale": (1.0, 1.0), "hflip": 0.0}


def sample(size=(40, 60), boxes=((10, 5, 30, 25), (35, 20, 55, 38))):
    """An image, black but for white rectangles, with their boxes and masks."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        pixels[top:bottom, left:right] = 255
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Image.fromarray(pixels), boxes, torch.arange(1, len(boxes) + 1), masks


def test_as_it_is():
    image, boxes, labels, masks = sample()
    pixels, target = DetectionTransform((40, 60), **PLAIN)(image, boxes, labels, masks)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(target["boxes"], boxes)
    assert torch.equal(target["masks"], masks)
    assert {type(x) for x in (pixels, *target.values())} == {torch.Tensor}


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "boxes"])
@pytest.mark.parametrize("crop", [(64, 64), (48, 80), (80, 48)])
def test_boxes_stay_on_their_objects(crop, masked):
    """What lies in a box is white, what surrounds all boxes is not, but for a pixel at the rim."""
    transform = DetectionTransform(crop, scale=(0.3, 2.0), mean=(0, 0, 0))
    image, boxes, labels, masks = sample()
    kept = 0
    for _ in range(30):
        pixels, target = transform(image, boxes, labels, masks if masked else None)
        assert pixels.shape == (3, *crop)
        outside = torch.ones(crop, dtype=torch.bool)
        for number, (left, top, right, bottom) in enumerate(target["boxes"].round().int().tolist()):
            if masked:
                mask = target["masks"][number].bool()
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert target["boxes"][number].tolist() == [float(x) for x in expected]
            inner = pixels[:, top + 1 : bottom - 1, left + 1 : right - 1]
            assert inner.numel() == 0 or inner.float().mean() > 235
            outside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
            kept += 1
        if len(target["boxes"]) == 2:
            assert pixels[:, outside].float().mean() < 3
    assert kept > 20


def test_a_crop_that_is_not_square_is_filled():
    """torchvision's ScaleJitter would take its height for its width."""
    image, *rest = sample((64, 80))
    pixels, target = DetectionTransform((64, 80), **PLAIN, mean=(1, 1, 1))(image, *rest[:2])
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(target["boxes"], rest[0])


@pytest.mark.parametrize("hflip", [0, 1])
def test_a_smaller_image_lies_at_the_top_left(hflip):
    """As a detector pads it in evaluation."""
    image, boxes, labels, masks = sample()
    transform = DetectionTransform((40, 60), scale=(0.5, 0.5), hflip=hflip, mean=(1, 1, 1))
    pixels, target = transform(image, boxes, labels, masks)
    shown, masks = pixels[:, :20, :30].clone(), target["masks"][:, :20, :30].clone()
    pixels[:, :20, :30], target["masks"][:, :20, :30] = 255, 0
    assert (pixels == 255).all()
    assert not target["masks"].any()
    assert (shown == 0).any()
    assert masks.flatten(1).any(1).all()


def test_objects_that_the_crop_does_not_show_are_left_out():
    image, boxes, labels, masks = sample(boxes=((0, 0, 4, 4), (50, 30, 60, 40)))
    transform = DetectionTransform((40, 60), scale=(4.0, 4.0), hflip=0)
    counts = set()
    for _ in range(30):
        _, target = transform(image, boxes, labels, masks)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert target["masks"].flatten(1).any(1).all()
        counts.add(len(target["boxes"]))
    assert counts >= {0, 1}


@pytest.mark.parametrize("masked", [True, False])
def test_nothing_in_it(masked):
    image, boxes, labels, masks = sample(boxes=())
    _, target = DetectionTransform((32, 32))(image, boxes, labels, masks if masked else None)
    assert target["boxes"].shape == (0, 4)
    assert ("masks" in target) is masked


def test_mirrored_and_distorted():
    image, boxes, labels, masks = sample()
    transform = DetectionTransform((40, 60), scale=(1, 1), hflip=1, photometric=1)
    _, target = transform(image, boxes, labels, masks)
    assert target["boxes"][0].tolist() == [30, 5, 50, 25]


def test_draws_come_from_torchs_generator():
    image, boxes, labels, masks = sample()
    transform = DetectionTransform((48, 48), photometric=0.5)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(transform(image, boxes, labels, masks)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": (0, 4)}, "crop_size must be"),
        ({"scale": (2, 1)}, "scale must be"),
        ({"hflip": 2}, r"hflip must be in 0..1, got 2"),
        ({"min_box": 0}, "min_box must be above 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionTransform(**{"crop_size": (8, 8)} | options)
