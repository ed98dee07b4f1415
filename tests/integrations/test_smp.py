"""segmentation-models-pytorch: every decoder with Vim as its encoder, by timm's name."""

import pytest
import torch
import torch.nn.functional as F

from vim import load_checkpoint
from vim.models import VisionMambaMaps, VisionMambaPyramid

smp = pytest.importorskip("segmentation_models_pytorch", reason="optional: extra 'dense'")

ENCODER = "tu-vim_tiny_patch16_224_pyramid"
# The depth cannot be passed: smp has an argument of that name for itself.
SMALL = {"embed_dim": 16, "encoder_weights": None, "classes": 5}
# Decoders, and the strides of the maps that they ask their encoder for. DeepLab and PAN would have
# a convolutional network dilate. DPT reads the tokens of the classifier itself.
PYRAMID = [4, 8, 16, 32]
DECODERS = {
    "Unet": PYRAMID,
    "UnetPlusPlus": PYRAMID,
    "FPN": PYRAMID,
    "UPerNet": PYRAMID,
    "Segformer": PYRAMID,
    "Linknet": PYRAMID,
    "MAnet": PYRAMID,
    "PSPNet": [4, 8],
    "DeepLabV3": [4, 8, 8, 8],
    "DeepLabV3Plus": [4, 8, 16, 16],
    "PAN": [4, 8, 16, 16],
    "DPT": None,
}
every_decoder = pytest.mark.parametrize("decoder", DECODERS)


def build(decoder, **options):
    return getattr(smp, decoder)(ENCODER, **(SMALL | options))


@every_decoder
def test_forward_and_backward(decoder):
    model = build(decoder)
    if decoder != "DPT":
        assert isinstance(model.encoder.model, VisionMambaPyramid)
        assert model.encoder.model.feature_info.reduction() == DECODERS[decoder]
    x = torch.randn(2, 3, 128, 160)  # not square
    logits = model(x)
    assert logits.shape == (2, 5, 128, 160)
    F.cross_entropy(logits, torch.randint(0, 5, (2, 128, 160))).backward()
    # Some decoders leave levels unread; the tokens of all blocks are read by every one.
    blocks = [p for n, p in model.encoder.model.named_parameters() if "blocks." in n]
    assert blocks
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in blocks)


@every_decoder
def test_published_weights_load(decoder, authors_checkpoint):
    checkpoint = authors_checkpoint(embed_dim=16)
    model = build(decoder)
    x = torch.randn(1, 3, 64, 96)
    backbone = model.encoder.model
    load_checkpoint(backbone, checkpoint.path)
    if decoder != "DPT":
        checkpoint.matches(backbone, x)
        return
    maps, _ = model.encoder.eval()(x)
    checkpoint.matches(VisionMambaMaps(backbone, [5, 11, 17, 23]), x)
    for actual, wanted in zip(maps, VisionMambaMaps(backbone, [5, 11, 17, 23])(x), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("decoder", ["Unet", "UPerNet", "Segformer"])
def test_options_reach_the_encoder(decoder, authors_checkpoint):
    """smp hands what it does not know to timm: options of the pyramid, and a file to start from."""
    checkpoint = authors_checkpoint(embed_dim=16)
    model = build(
        decoder,
        encoder_weights=True,
        pretrained_cfg_overlay={"file": str(checkpoint.path)},
        norm=True,
        class_token=False,
        drop_path_rate=0.1,
    )
    pyramid = model.encoder.model
    assert pyramid.norm
    assert not pyramid.model.has_class_token
    checkpoint.matches(pyramid, torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("depth", [3, 4])
def test_a_shallower_encoder(depth):
    model = build("Unet", encoder_depth=depth, decoder_channels=(32, 16, 16, 16)[:depth])
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)
    assert len(model.encoder.model.levels) == depth - 1


def test_a_state_dict_goes_round():
    model, other = build("FPN").eval(), build("FPN").eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


def test_the_classifiers_own_entry_is_refused():
    """smp wants strides 4 to 32, which a plain backbone has not: its own words say so."""
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.Unet("tu-vim_tiny_patch16_224", encoder_weights=None)


def test_export_and_compile():
    model = build("Unet").eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(compiled(x), expected)
