"""The segmenter: sizes, gradients, layers, and inference in windows, mirrored and at scales."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

import vim  # noqa: F401

pytest.importorskip("segmentation_models_pytorch")

from vim.heads.segmenter import Segmenter

CLASSES = 5
SMALL = {"features_only": True, "img_size": 64, "embed_dim": 32, "depth": 4, "d_state": 4}


def segmenter(**options):
    encoder = timm.create_model("vim_tiny_patch16_224_pyramid", **SMALL)
    return Segmenter(encoder, CLASSES, channels=16, auxiliary_channels=16, **options)


class PixelSegmenter(Segmenter):
    """Logits that depend on each pixel alone, so that windows change nothing; counts its calls."""

    def __init__(self):
        nn.Module.__init__(self)
        self.num_classes = CLASSES
        self.conv = nn.Conv2d(3, CLASSES, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        return self.conv(x)


@pytest.mark.parametrize("size", [(64, 64), (33, 70)], ids=str)
def test_logits_have_the_size_of_the_image(size):
    model = segmenter().eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits = model(images)
        both = model(images, auxiliary=True)
    assert logits.shape == (2, CLASSES, *size)
    assert torch.equal(both[0], logits)
    assert both[1].shape == logits.shape


def test_every_parameter_has_a_gradient():
    model = segmenter()
    logits, auxiliary = model(torch.randn(2, 3, 64, 64), auxiliary=True)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_without_an_auxiliary_head():
    model = segmenter(auxiliary_level=None)
    assert model(torch.randn(2, 3, 64, 64), auxiliary=True)[1:] == ()
    assert not any(name.startswith("auxiliary") for name in model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auxiliary_level": 4}, "auxiliary_level must be 0 to 3 or None, got 4"),
        ({"output_stride": 16}, r"needs maps of the strides \[4, 8, 16, 32\], got \[4, 8, 16, 16"),
    ],
)
def test_what_cannot_be_built(options, message):
    stride = {key: options.pop(key) for key in ("output_stride",) if key in options}
    encoder = timm.create_model("vim_tiny_patch16_224_pyramid", **SMALL, **stride)
    with pytest.raises(ValueError, match=message):
        Segmenter(encoder, CLASSES, **options)


def test_layer_decay_and_weight_decay():
    model = segmenter()
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {name: groups[id(p)] for name, p in model.named_parameters()}
    scales = {name: group["lr_scale"] for name, group in found.items()}
    assert scales["encoder.model.patch_embed.proj.weight"] == 0.5**5
    for block in range(4):
        of_block = {s for n, s in scales.items() if n.startswith(f"encoder.model.blocks.{block}.")}
        assert of_block == {0.5 ** (4 - block)}
    others = {s for n, s in scales.items() if not n.startswith("encoder.model.")}
    assert others == {1.0}
    undecayed = model.no_weight_decay() & found.keys()
    assert "encoder.model.pos_embed" in undecayed
    assert {found[name]["weight_decay"] for name in undecayed} == {0}
    assert found["decoder.fusion_block.0.weight"]["weight_decay"] == 0.1


def test_weights_of_a_classifier_reach_the_encoder():
    options = {key: value for key, value in SMALL.items() if key != "features_only"}
    classifier = timm.create_model("vim_tiny_patch16_224_pyramid", **options)
    model = segmenter()
    model.encoder.load_state_dict(classifier.state_dict())
    for name, tensor in classifier.blocks.state_dict().items():
        assert torch.equal(model.encoder.model.blocks.state_dict()[name], tensor), name


@pytest.mark.parametrize("size", [(20, 30), (16, 16), (7, 9), (33, 5)], ids=str)
@pytest.mark.parametrize("stride", [(16, 16), (11, 5), None], ids=str)
def test_windows_cover_every_pixel(size, stride):
    model = PixelSegmenter()
    images = torch.randn(2, 3, *size)
    whole = model.predict(images)
    model.seen.clear()
    windows = model.predict(images, window=(16, 16), stride=stride)
    torch.testing.assert_close(windows, whole)
    assert set(model.seen) == {(16, 16)}


def test_overlapping_windows_are_averaged():
    model = segmenter().eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = model.predict(images, window=(64, 64), stride=(64, 32))
        left, right = model(images[..., :64]), model(images[..., 32:])
    expected = torch.cat(
        [left[..., :32], (left[..., 32:] + right[..., :32]) / 2, right[..., 32:]], 3
    )
    torch.testing.assert_close(found, expected.softmax(1))


def test_mirrored_images_are_averaged():
    model = segmenter().eval()
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        found = model.predict(images, flip=True)
        mirrored = model(images.flip(3)).softmax(1).flip(3)
        expected = (model(images).softmax(1) + mirrored) / 2
        torch.testing.assert_close(found, expected)
        again = model.predict(images.flip(3), flip=True)
    torch.testing.assert_close(again.flip(3), found)


def test_scales_are_averaged_and_the_size_is_as_asked():
    model = PixelSegmenter()
    images = torch.randn(1, 3, 20, 30)
    found = model.predict(images, scales=(1.0, 0.5), size=(40, 60))
    assert model.seen == [(20, 30), (10, 15)]
    half = F.interpolate(images, (10, 15), mode="bilinear", antialias=True)
    expected = sum(
        F.interpolate(model.conv(x), (40, 60), mode="bilinear").softmax(1) for x in (images, half)
    )
    torch.testing.assert_close(found, expected / 2)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 40, 60))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0, 4)}, r"window must be .height, width. in pixels, got \(0, 4\)"),
        ({"stride": (4, 4)}, "give window, or leave stride out"),
        ({"window": (8, 8), "stride": (9, 8)}, r"from 1 to the window's \(8, 8\), got \(9, 8\)"),
        ({"scales": ()}, "one or more"),
        ({"scales": (0.0,)}, "each above 0"),
    ],
)
def test_bad_inference(options, message):
    with pytest.raises(ValueError, match=message):
        PixelSegmenter().predict(torch.zeros(1, 3, 8, 8), **options)
