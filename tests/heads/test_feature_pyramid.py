"""ViTDet's simple feature pyramid on Vim, and on other plain backbones."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vim import load_checkpoint
from vim.heads import SimpleFeaturePyramid
from vim.models import VisionMambaMaps, save_checkpoint, to_official

SMALL = {"img_size": 64, "embed_dim": 16, "depth": 2}


def vim(**kwargs):
    return timm.create_model("vim_tiny_patch16_224_pyramid", **(SMALL | kwargs))


def pyramid(out_channels=8, strides=(4, 8, 16, 32, 64), norm=False, class_token=True, **kwargs):
    maps = VisionMambaMaps(vim(**kwargs), norm=norm, class_token=class_token)
    model = SimpleFeaturePyramid(maps, out_channels, strides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def layer_norm(x, norm):
    """The norm over channels, from its equation."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    x = (x - mean) / (variance + norm.eps).sqrt()
    return x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


@pytest.mark.parametrize("size", [(128, 128), (64, 192), (50, 70), (1, 200)], ids=str)
@pytest.mark.parametrize(
    "strides", [(4, 8, 16, 32, 64), (8, 16, 32, 64, 128), (16,), (32, 64), (2, 4)], ids=str
)
def test_shapes(size, strides):
    model = pyramid(strides=strides)
    maps = model(torch.randn(2, 3, *size))
    assert list(maps) == [str(i) for i in range(len(strides))]
    assert [tuple(m.shape) for m in maps.values()] == [
        (2, 8, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in strides
    ]
    assert model.out_channels == 8


def test_equations():
    model = pyramid()
    x = torch.randn(2, 3, 64, 128)
    features = model.backbone(x)[-1]

    def level(index, y):
        *_, narrow, norm, wide, last_norm = model.levels[index]
        y = layer_norm(F.conv2d(y, narrow.weight), norm)
        return layer_norm(F.conv2d(y, wide.weight, padding=1), last_norm)

    def up(conv, y):
        return F.conv_transpose2d(y, conv.weight, conv.bias, stride=2)

    first, norm, _, second = model.levels[0][:4]
    assert first.weight.shape[:2] == (16, 8)
    assert second.weight.shape[:2] == (8, 4)
    expected = [
        level(0, up(second, F.gelu(layer_norm(up(first, features), norm)))),
        level(1, up(model.levels[1][0], features)),
        level(2, features),
        level(3, F.max_pool2d(features, 2)),
    ]
    expected.append(expected[3][:, :, ::2, ::2])
    for actual, wanted in zip(model(x).values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("norm", [False, True], ids=["stream", "norm"])
@pytest.mark.parametrize("class_token", [True, False], ids=["token", "no_token"])
def test_every_weight_takes_part(norm, class_token):
    model = pyramid(norm=norm, class_token=class_token).train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 96, 128)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("layout", ["authors", "ours"])
@pytest.mark.parametrize("class_token", [True, False], ids=["token", "no_token"])
def test_classification_weights(layout, class_token, tmp_path):
    source = vim().eval()
    state = source.state_dict()
    file = tmp_path / "vim.pth"
    save_checkpoint(to_official(state) if layout == "authors" else state, file)
    model = pyramid(class_token=class_token, img_size=(96, 64))
    levels = copy.deepcopy(model.levels.state_dict())
    load_checkpoint(model, file)

    if not class_token:
        source.drop_class_tokens()
    source.set_input_size((96, 64))
    x = torch.randn(1, 3, 96, 64)
    (wanted,) = source.forward_intermediates(x, 1, intermediates_only=True)
    assert torch.equal(model.backbone(x)[-1], wanted)
    for name, value in model.levels.state_dict().items():
        assert torch.equal(value, levels[name])

    again = pyramid(class_token=class_token, img_size=(96, 64))
    again.load_state_dict(model.state_dict())
    for one, other in zip(again(x).values(), model(x).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_any_plain_backbone_of_timm(name):
    depth = {"depth": 2, "embed_dim": 24}
    backbone = timm.create_model(
        name, features_only=True, out_indices=[-1], dynamic_img_size=True, **depth
    )
    maps = SimpleFeaturePyramid(backbone, 8)(torch.randn(1, 3, 64, 96))
    assert [m.shape[-1] for m in maps.values()] == [24, 12, 6, 3, 2]


def test_bfloat16():
    model = pyramid().bfloat16()
    for m in model(torch.randn(1, 3, 64, 96, dtype=torch.bfloat16)).values():
        assert m.dtype == torch.bfloat16
        assert m.isfinite().all()


def test_compile():
    model = pyramid()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in ((64, 64), (50, 70)):
        x = torch.randn(1, 3, *size)
        for one, other in zip(compiled(x).values(), model(x).values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("strides", [(), (4, 16), (8, 4), (3, 6), (0,), (64, 128)], ids=str)
def test_bad_strides(strides):
    with pytest.raises(ValueError, match=r"strides must be powers of two.*start at 32 or less"):
        pyramid(strides=strides)


def test_a_backbone_of_an_odd_stride():
    with pytest.raises(ValueError, match="stride of the backbone's map must be a power of two"):
        pyramid(patch_size=12, img_size=48)


def test_the_registry_gets_both_backbones():
    registry = pytest.importorskip("mmengine.registry", reason="optional: extra 'train'")
    from vim.heads import register_backbones

    models = registry.Registry("models of this test")
    register_backbones(models)
    register_backbones(models)  # twice is no error
    for name, length in (("VimPyramid", 4), ("VimSimpleFeaturePyramid", 5)):
        config = {"type": name, "name": "vim_tiny_patch16_224_pyramid", **SMALL}
        backbone = models.build(config)
        assert isinstance(backbone, nn.Module)
        assert len(backbone(torch.randn(1, 3, 64, 64))) == length
        with pytest.raises(TypeError, match="class_tokens"):
            models.build(config | {"class_tokens": False})


@pytest.mark.parametrize("name", ["VimPyramid", "VimSimpleFeaturePyramid"])
def test_a_registered_backbone_starts_from_a_checkpoint(name, tmp_path):
    registry = pytest.importorskip("mmengine.registry", reason="optional: extra 'train'")
    from vim.heads import register_backbones

    source = vim()
    file = tmp_path / "vim.pth"
    save_checkpoint(to_official(source.state_dict()), file)
    models = registry.Registry("models of this test")
    register_backbones(models)
    config = {"type": name, "name": "vim_tiny_patch16_224_pyramid", "checkpoint": str(file)}
    state = models.build(config | SMALL).state_dict()
    loaded = [k for k in state if k.endswith("blocks.1.mixer.in_proj.weight")]
    assert len(loaded) == 1
    assert torch.equal(state[loaded[0]], source.blocks[1].mixer.in_proj.weight)
