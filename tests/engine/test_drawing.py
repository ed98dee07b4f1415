"""Objects drawn on images; overlays of segmenters are in test_segmentation.py."""

import torch
from PIL import Image

from vim.engine.drawing import draw_objects, overlay, palette, with_legend

NAMES = ["cat", "dog", "a rather long name"]


def colour(label):
    return tuple(palette(len(NAMES))[label - 1].tolist())


def test_boxes_masks_and_names():
    image = torch.full((3, 60, 90), 100, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20.0, 40.0, 50.0], [50.0, 25.0, 80.0, 55.0]])
    masks = torch.zeros(2, 60, 90, dtype=torch.bool)
    masks[0, 25:45, 15:35] = True
    labels, scores = torch.tensor([1, 3]), torch.tensor([0.9, 0.8])
    page = draw_objects(image, boxes, labels, NAMES, scores, masks)
    assert page.size == (90, 60)
    assert page.getpixel((10, 35)) == colour(1)
    assert page.getpixel((80, 40)) == colour(3)
    assert page.getpixel((25, 35)) == tuple(int(0.45 * 100 + 0.55 * c) for c in colour(1))
    assert page.getpixel((65, 40)) == (100, 100, 100)
    plain = draw_objects(image, boxes, labels, NAMES)
    assert plain.getpixel((14, 12)) == (100, 100, 100), "no name without a score"
    assert page.getpixel((12, 8)) == colour(1), "the name's background"


def test_nothing_to_draw():
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    empty = torch.zeros(0, 4)
    masks = torch.zeros(0, 20, 30, dtype=torch.bool)
    labels = torch.zeros(0, dtype=torch.long)
    page = draw_objects(image, empty, labels, NAMES, torch.zeros(0), masks)
    assert not page.getbbox()


def test_the_legend_wraps():
    page = with_legend([Image.new("RGB", (100, 20))], [0, 1, 2], NAMES)
    assert page.width == 100
    assert page.height > 20 + 2 * (14 + 8)
    assert page.getpixel((8 + 3, 20 + 8 + 3)) == colour(1)


def test_an_overlay_without_truth():
    image = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    classes = torch.full((20, 30), 255, dtype=torch.uint8)
    page = overlay(image, classes, None, NAMES)
    assert page.width == 30
    assert page.getpixel((5, 5)) == (100, 100, 100)
    fixed = overlay(image, classes, None, NAMES, legend=[0, 1])
    assert fixed.height > page.height
