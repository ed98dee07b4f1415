"""Image and mask go through the same geometry, and what is beyond the image is void."""

import numpy as np
import pytest
import torch
from PIL import Image

from vim.heads.segmentation_transforms import VOID, EvaluationTransform, TrainingTransform

PLAIN = {"scale": (1.0, 1.0), "max_class_share": 1, "hflip": 0, "photometric": 0}


def pair(height=40, width=60):
    """An image whose red channel is its mask."""
    mask = np.random.default_rng(0).integers(200, size=(height, width), dtype=np.uint8)
    pixels = np.stack([mask, mask // 2, mask * 0], 2)
    return Image.fromarray(pixels), mask


@pytest.mark.parametrize("hflip", [0, 1])
def test_crops_agree(hflip):
    image, labels = TrainingTransform((16, 24), **PLAIN | {"hflip": hflip})(*pair())
    assert (image.shape, labels.shape) == ((3, 16, 24), (16, 24))
    assert image.dtype == labels.dtype == torch.uint8
    assert type(image) is type(labels) is torch.Tensor
    assert torch.equal(image[0], labels)


def test_beyond_the_image_is_void_and_of_the_mean_colour():
    mean = (0.2, 0.4, 0.6)
    image, labels = TrainingTransform((64, 80), **PLAIN, mean=mean)(*pair())
    void = labels == VOID
    assert void.sum() == 64 * 80 - 40 * 60
    assert image[:, void].unique(dim=1).flatten().tolist() == [51, 102, 153]
    assert torch.equal(image[0][~void], labels[~void])


@pytest.mark.parametrize(("short_side", "factor"), [(None, 0.5), (20, 1.0), (10, 2.0)])
def test_scale(short_side, factor):
    options = PLAIN | {"scale": (factor, factor), "short_side": short_side}
    _, labels = TrainingTransform((40, 60), **options)(*pair())
    assert (labels != VOID).sum() == 20 * 30


def test_a_crop_of_one_class_is_drawn_again():
    mask = np.zeros((16, 64), dtype=np.uint8)
    mask[:, 60:] = 1
    image = Image.new("RGB", (64, 16))
    shares = []
    for share in (1.0, 0.9):
        transform = TrainingTransform((16, 16), **PLAIN | {"max_class_share": share})
        crops = [transform(image, mask)[1] for _ in range(50)]
        shares.append(sum(len(crop.unique()) == 2 for crop in crops) / len(crops))
    assert shares[0] < 0.2 < shares[1]


def test_colours_change_and_masks_do_not():
    image, labels = TrainingTransform((40, 60), **PLAIN | {"photometric": 1})(*pair())
    assert torch.equal(labels, torch.from_numpy(pair()[1]))
    assert not torch.equal(image[0], labels)


def test_evaluation_resizes_the_image_alone():
    image, labels = EvaluationTransform(20)(*pair())
    assert (image.shape, labels.shape) == ((3, 20, 30), (40, 60))
    image, labels = EvaluationTransform()(*pair())
    assert torch.equal(image[0], labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": (0, 4)}, "crop_size must be"),
        ({"scale": (2.0, 0.5)}, "scale must be"),
        ({"hflip": 1.5}, "hflip must be in 0..1, got 1.5"),
        ({"short_side": 0}, "short_side must be in pixels"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingTransform(**{"crop_size": (8, 8)} | options)
