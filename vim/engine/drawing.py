"""What segmenters and detectors found, drawn on the image, with a legend."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["draw_objects", "overlay", "palette", "with_legend"]

OPACITY = 0.55
MARGIN, SWATCH, FONT = 8, 14, 13
"""Of the legend, in pixels."""


def palette(classes: int) -> np.ndarray:
    """Return (256, 3) uint8, a colour for each class: hues a golden ratio apart; the rest black."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(classes):
        hue = (index * 0.618034) % 1
        rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.55)[index % 2], (1.0, 0.75, 0.5)[index % 3])
        colours[index] = [round(255 * value) for value in rgb]
    return colours


def with_legend(
    panels: Sequence[Image.Image], present: Sequence[int], class_names: Sequence[str]
) -> Image.Image:
    """Return images of one size beside each other, above the colours of the classes in them.

    Args:
        panels: at least one.
        present: indices of the classes in the legend.
        class_names: of all classes.
    """
    colours = palette(len(class_names))
    width, height = panels[0].size
    font = ImageFont.load_default(FONT)
    entries, x, y = [], MARGIN, height + MARGIN
    page_width = len(panels) * (width + MARGIN) - MARGIN
    for index in present:
        length = SWATCH + MARGIN // 2 + round(font.getlength(class_names[index])) + 2 * MARGIN
        if x > MARGIN and x + length > page_width:
            x, y = MARGIN, y + SWATCH + MARGIN
        entries.append((index, x, y))
        x += length
    page = Image.new("RGB", (page_width, y + SWATCH + MARGIN), "white")
    for number, panel in enumerate(panels):
        page.paste(panel, (number * (width + MARGIN), 0))
    draw = ImageDraw.Draw(page)
    for index, x, y in entries:
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), tuple(colours[index].tolist()))
        text = (x + SWATCH + MARGIN // 2, y + SWATCH // 2)
        draw.text(text, class_names[index], "black", font, anchor="lm")
    return page


def overlay(
    image: Tensor,
    prediction: Tensor,
    target: Tensor | None,
    class_names: Sequence[str],
    legend: Sequence[int] | None = None,
) -> Image.Image:
    """Return prediction and truth beside each other, laid over the image, above a legend.

    Args:
        image: (3, h, w) uint8; it is resized to the size of the masks.
        prediction: (H, W) uint8 classes; others, such as 255, show the image.
        target: likewise, or None where the truth isn't known.
        class_names: of the classes.
        legend: indices of the classes in it; by default of those that occur.
    """
    masks = [prediction] if target is None else [prediction, target]
    colours = palette(len(class_names))
    height, width = prediction.shape
    photo = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height)))
    panels = []
    for mask in masks:
        mask = mask.numpy()
        mixed = (1 - OPACITY) * photo + OPACITY * colours[mask]
        known = (mask < len(class_names))[..., None]
        panels.append(Image.fromarray(np.where(known, mixed, photo).astype(np.uint8)))
    if legend is None:
        legend = [i for i in torch.cat(masks).unique().tolist() if i < len(class_names)]
    return with_legend(panels, legend, class_names)


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Tensor | None = None,
    masks: Tensor | None = None,
) -> Image.Image:
    """Return the image with a box in its class's colour around each object, and its mask.

    Args:
        image: (3, H, W) uint8.
        boxes: (N, 4) of left, top, right and bottom in pixels.
        labels: (N,) from 1.
        class_names: of the classes, the first that of label 1.
        scores: (N,), written beside the class's name, in percent.
        masks: (N, H, W) bool.
    """
    colours = palette(len(class_names))
    pixels = image.permute(1, 2, 0).numpy()
    # Large objects first, so that small ones stay to be seen.
    sides = boxes[:, 2:] - boxes[:, :2]
    order = sides.prod(1).argsort(descending=True).tolist()
    if masks is not None:
        pixels = pixels.astype(np.float32)
        for i in order:
            colour = colours[int(labels[i]) - 1]
            inside = masks[i].numpy()
            pixels[inside] = (1 - OPACITY) * pixels[inside] + OPACITY * colour
        pixels = pixels.astype(np.uint8)
    page = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    line = max(1, round(min(page.size) / 240))
    for i in order:
        label = int(labels[i]) - 1
        colour = tuple(colours[label].tolist())
        box = boxes[i].tolist()
        draw.rectangle(box, outline=colour, width=line)
        if scores is None:
            continue
        text = f"{class_names[label]} {100 * float(scores[i]):.0f}"
        place = (max(0, box[0]), max(0, box[1] - FONT - 3))
        draw.rectangle(draw.textbbox(place, text, font), colour)
        draw.text(place, text, "white" if sum(colour) < 400 else "black", font)
    return page
