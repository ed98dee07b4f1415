"""Visual tokens: which they are, in which order, of one backbone and of several, and errors."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vim import VisionMamba
from vim.models import visual_maps, visual_tokens

VIM = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 4, "num_classes": 3}
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}
PREFIXES = {
    "none": {"cls_token_position": "none", "global_pool": "avg"},
    "first": {"cls_token_position": "first"},
    "middle": {"cls_token_position": "middle"},
    "last": {"cls_token_position": "last"},
    "both_ends": {"cls_token_position": "both_ends"},
    "middle_and_3_registers": {"reg_tokens": 3},
    "middle_and_2_registers_there": {"reg_tokens": 2, "reg_token_position": "middle"},
    "no_embed_class": {"no_embed_class": True},
}
every_prefix = pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)


def vim_model(**options):
    return VisionMamba(**(VIM | options)).eval()


def vit(**options):
    return timm.create_model("vit_tiny_patch16_224", **(VIT | options)).eval()


def images(*size, batch=2):
    return torch.randn(batch, 3, *(size or (64, 64)))


@every_prefix
def test_where_blocks_add_nothing_tokens_are_the_embedded_patches(prefix):
    """Row by row, in the image's order, wherever prefix tokens stand while scanning."""
    model = vim_model(**prefix)
    for block in model.blocks:
        nn.init.zeros_(block.mixer.out_proj.weight)
    x = images()
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=16)
    expected = patches.flatten(2).transpose(1, 2) + model.pos_embed[:, -16:]
    for layer in range(-4, 4):
        torch.testing.assert_close(visual_tokens(model, x, layer), expected)


@every_prefix
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layers_tokens_are_what_the_next_block_reads(prefix, layer):
    model = vim_model(**prefix)
    read = []
    model.blocks[layer + 1].norm.register_forward_hook(lambda _, __, out: read.append(out[1]))
    x = images()
    model(x)
    scanned = read.pop()
    marks = torch.arange(scanned.shape[1]).float()[None, :, None]
    patches = model.token_order.separate(marks)[0, model.num_prefix_tokens :, 0].int()
    assert len(patches) == 16
    assert (patches.diff() > 0).all()
    for same in (layer, layer - 4):
        torch.testing.assert_close(visual_tokens(model, x, same), scanned[:, patches])


def test_the_class_token_of_vim_is_dropped_from_the_middle():
    model = vim_model()
    read = []
    model.blocks[-1].norm.register_forward_hook(lambda _, __, out: read.append(out[1]))
    tokens = visual_tokens(model, x := images())
    model(x)
    torch.testing.assert_close(tokens, torch.cat([read[0][:, :8], read[0][:, 9:]], dim=1))


@pytest.mark.parametrize("model", [vim_model, vit], ids=["vim", "vit"])
def test_the_call_of_cobras_code_gives_the_same(model):
    model = model()
    x = images()
    (expected,) = model.get_intermediate_layers(x, n={len(model.blocks) - 2})
    assert torch.equal(visual_tokens(model, x), expected)


@pytest.mark.parametrize("model", [vim_model, vit], ids=["vim", "vit"])
def test_with_norm_the_last_layer_is_what_the_classifier_sees(model):
    model = model()
    x = images()
    expected = model.forward_features(x)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(visual_tokens(model, x, -1, norm=True), expected)
    assert (visual_tokens(model, x, -1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (50, 70), (16, 160)], ids=str)
def test_any_grid(size):
    model = vim_model(dynamic_img_size=True, dynamic_img_pad=True)
    x = images(*size)
    maps = visual_maps(model, x)
    assert maps.shape == (2, 16, -(-size[0] // 16), -(-size[1] // 16))
    assert torch.equal(visual_tokens(model, x), maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "name",
    [
        "vim_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "beit_base_patch16_224",
        "swin_tiny_patch4_window7_224",
        "hiera_tiny_224",
        "convnext_atto",
        "resnet18",
        "efficientnet_b0",
        "mambaout_femto",
    ],
)
def test_backbones_of_timm(name):
    """Plain with prefix tokens, hierarchical, convolutional: shapes as `feature_info` says."""
    model = timm.create_model(name, device="meta").eval()
    _, height, width = model.default_cfg["input_size"]
    for layer in (-2, 0, len(model.feature_info) - 1):
        info = model.feature_info[layer]
        maps = visual_maps(model, torch.empty(2, 3, height, width, device="meta"), layer)
        side = height // info["reduction"]
        assert maps.shape == (2, info["num_chs"], side, side)


def test_backbones_are_fused_by_channel():
    models = [vim_model(), vit()]
    x = images()
    fused = visual_tokens(models, x)
    assert fused.shape == (2, 16, 16 + 24)
    assert torch.equal(fused[..., :16], visual_tokens(models[0], x))
    assert torch.equal(fused[..., 16:], visual_tokens(models[1], x))
    for same in (tuple(models), nn.ModuleList(models)):
        assert torch.equal(visual_tokens(same, x), fused)


def test_each_backbone_its_images_and_its_layer():
    models = [vim_model(), vit(img_size=96)]
    x = [images(), images(96, 96)]
    fused = visual_maps(models, x, [0, -1])
    assert fused.shape == (2, 16 + 24, 4, 4)
    assert torch.equal(fused[:, :16], visual_maps(models[0], x[0], 0))
    coarse = F.interpolate(
        visual_maps(models[1], x[1], -1), (4, 4), mode="bilinear", antialias=True
    )
    assert torch.equal(fused[:, 16:], coarse)


class Colours(nn.Module):
    """Maps of one layer that are the image itself."""

    feature_info = ({"num_chs": 3, "reduction": 1, "module": ""},)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward_intermediates(self, x, indices, **_):
        return [x * self.weight]


@pytest.mark.parametrize(
    ("size", "grid"), [((8, 8), (4, 4)), ((4, 6), (8, 6)), ((9, 5), (4, 7)), ((3, 3), 1)], ids=str
)
def test_resampling(size, grid):
    """A constant stays, a ramp stays a ramp inside, a mirrored image gives mirrored tokens."""
    model = Colours()
    wanted = (grid, grid) if isinstance(grid, int) else grid
    constant = torch.full((1, 3, *size), 2.5)
    out = visual_maps(model, constant, -1, grid=grid)
    torch.testing.assert_close(out, torch.full((1, 3, *wanted), 2.5))
    x = images(*size)
    out = visual_maps(model, x, -1, grid=grid)
    torch.testing.assert_close(visual_maps(model, x.flip(3), -1, grid=grid), out.flip(3))
    torch.testing.assert_close(visual_maps(model, x.flip(2), -1, grid=grid), out.flip(2))
    ramp = ((torch.arange(32.0) + 0.5) / 32).expand(1, 3, 2, 32)
    inside = visual_maps(model, ramp, -1, grid=(2, 8))[..., 1:-1]
    expected = ((torch.arange(8.0) + 0.5) / 8)[1:-1].expand_as(inside)
    torch.testing.assert_close(inside, expected)


def test_the_grid_is_the_first_backbones_unless_said():
    fine, coarse = vim_model(patch_size=8), vit()
    x = images()
    assert visual_tokens([fine, coarse], x).shape == (2, 64, 40)
    assert visual_tokens([coarse, fine], x).shape == (2, 16, 40)
    assert visual_maps([coarse, fine], x, grid=(3, 5)).shape == (2, 40, 3, 5)
    assert visual_tokens(fine, x, grid=4).shape == (2, 16, 16)
    ours = visual_maps([fine, coarse], x)[:, :16]
    assert torch.equal(ours, visual_maps(fine, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tokens_have_the_dtype_of_the_weights(dtype):
    """Vim's residual stream is float32 at least; a projector of the same dtype takes the tokens."""
    model = vim_model().to(dtype)
    assert visual_tokens(model, images().to(dtype)).dtype == dtype
    assert visual_tokens(model, images().to(dtype), grid=3).dtype == dtype


def test_the_widest_dtype_of_fused_backbones():
    models = [vim_model().bfloat16(), vit()]
    x = images()
    assert visual_tokens(models, [x.bfloat16(), x]).dtype == torch.float32


def test_gradients_reach_weights_and_image():
    models = [vim_model(), vit(patch_size=8)]
    x = images().requires_grad_()
    visual_tokens(models, x, grid=3).square().mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert models[0].blocks[2].mixer.out_proj.weight.grad.abs().sum() > 0
    assert models[0].blocks[3].mixer.out_proj.weight.grad is None  # behind the layer asked for
    assert models[1].blocks[1].mlp.fc2.weight.grad.abs().sum() > 0


def test_blocks_behind_the_layer_are_not_run():
    model = vim_model()
    run = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: run.append(i))
    visual_tokens(model, images(), 1)
    assert run == [0, 1]


@torch.no_grad()
def test_compiles():
    models = [vim_model(), vit()]
    x = images()
    compiled = torch.compile(visual_tokens, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(models, x, grid=3), visual_tokens(models, x, grid=3))


def test_patch_dropout_is_refused_only_while_it_drops():
    model = vim_model(patch_drop_rate=0.5)
    assert visual_tokens(model, images()).shape == (2, 16, 16)
    with pytest.raises(ValueError, match=r"VisionMamba drops patches .* call model.eval\(\)"):
        visual_tokens(model.train(), images())
    assert visual_tokens(vim_model().train(), images()).shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("models", "x", "options", "error", "message"),
    [
        ([], images(), {}, ValueError, "a backbone or several, got none"),
        (nn.Linear(2, 2), images(), {}, TypeError, "forward_intermediates, .* got Linear: create"),
        (vim_model(), [[0.0]], {}, TypeError, "images must be of type Tensor, or a list .* got"),
        (vim_model(), "cat.jpg", {}, TypeError, "images must be of type Tensor.* got str"),
        (vim_model(), images()[0], {}, ValueError, r"\(B, C, H, W\), got \(3, 64, 64\): .*\[None"),
        (vim_model(), images()[0, 0], {}, ValueError, r"\(B, C, H, W\), got \(64, 64\)$"),
        (
            [vim_model(), vit()],
            [images()],
            {},
            ValueError,
            "images must be one for all backbones or one for each of the 2, got 1",
        ),
        (
            [vim_model(), vit()],
            [images(), images(batch=3)],
            {},
            ValueError,
            "the same images, got batches of 2, 3",
        ),
        (
            vim_model(),
            images(),
            {"layer": 4},
            ValueError,
            "VisionMamba must be from -4 to 3, got 4",
        ),
        (vit(), images(), {"layer": -4}, ValueError, "VisionTransformer .* -3 to 2, got -4"),
        (
            vim_model(),
            images(),
            {"layer": "last"},
            TypeError,
            "layer must be of type int.* got str",
        ),
        (vim_model(), images(), {"layer": [1, 2]}, ValueError, "layer must be one .* got 2"),
        (
            vim_model(),
            images(),
            {"grid": 0},
            ValueError,
            r"grid must be a positive .* got \(0, 0\)",
        ),
        (vim_model(), images(), {"grid": (1, 2, 3)}, ValueError, r"grid must .* got \(1, 2, 3\)"),
    ],
)
def test_errors(models, x, options, error, message):
    with pytest.raises(error, match=message):
        visual_tokens(models, x, **options)


def test_a_pyramid_is_told_what_to_do():
    model = timm.create_model("vim_tiny_patch16_224_pyramid", features_only=True, depth=4)
    with pytest.raises(TypeError, match="VisionMambaPyramid: create it without features_only=True"):
        visual_tokens(model, images())
