"""The model's contract: everything that timm asks of a ViT, on small models; and bad input.

The numbers are right where `test_parity.py` passes; here the ways of asking for them agree.
"""

import copy
import itertools
import math
import pickle

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import create_feature_extractor, get_graph_node_names, resample_abs_pos_embed
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3

from vim import VisionMamba
from vim.layers import AddNorm
from vim.models import save_checkpoint

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 10}
VARIANTS = {
    "default": {},
    "first": {"cls_token_position": "first"},
    "last": {"cls_token_position": "last"},
    "both_ends": {"cls_token_position": "both_ends"},
    "none": {"class_token": False, "global_pool": "avg"},
    "avg": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "unpooled": {"global_pool": ""},
    "registers_even": {"reg_tokens": 3},
    "registers_middle": {"reg_tokens": 2, "reg_token_position": "middle"},
    "registers_only": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "no_pos_embed": {"pos_embed": "none"},
    "no_embed_class": {"no_embed_class": True},
    "overlap": {"patch_stride": 4},
    "conv_stem": {"embed_layer": "conv"},
    "oblong": {"img_size": (24, 40)},
    "gray": {"in_chans": 1},
    "four_channels": {"in_chans": 4},
    "features": {"num_classes": 0},
    "layer_norm": {"norm_layer": "layer"},
    "norm_after_scan": {"norm_after_scan": True},
    "sum": {"merge": "sum"},
    "keep_states": {"keep_states": True},
    "mixer_sizes": {"d_state": 5, "d_conv": 3, "expand": 1.5, "dt_rank": 3},
    "dynamic": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "one_block": {"depth": 1},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# Those that take different ways through the code, for tests that take a second each.
every_way = pytest.mark.parametrize(
    "variant",
    [
        "default",
        "both_ends",
        "none",
        "max",
        "unpooled",
        "registers_even",
        "no_pos_embed",
        "no_embed_class",
        "layer_norm",
        "norm_after_scan",
        "conv_stem",
        "dynamic",
    ],
)
PARAMETERS = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_micro_patch8_128": 2_891_386,
}
# Weight decay is for these: matrices that multiply activations.
DECAYED = ("proj.weight", "conv1d.weight", "head.weight")


def make(variant="default", **kwargs):
    """Return a small model whose weights are not the initial ones, so that none hides another."""
    model = VisionMamba(**(SMALL | VARIANTS[variant] | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(model, batch=2, size=None):
    return torch.randn(batch, model.in_chans, *(size or model.patch_embed.img_size))


def patches_and_grid(model, x):
    """Return the final features as forward_features gives them, patches only, and their grid."""
    grid = model.patch_embed.dynamic_feat_size(x.shape[-2:])
    return model.forward_features(x)[:, model.num_prefix_tokens :], grid


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def pairs(first, second):
    """Iterate over two nested outputs in step."""
    if isinstance(first, torch.Tensor):
        yield first, second
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            yield from pairs(first[key], second[key])
    else:
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            yield from pairs(one, other)


def assert_same(first, second):
    """Assert that nested outputs are equal to the bit."""
    for one, other in pairs(first, second):
        assert torch.equal(one, other)


def assert_close(first, second):
    for one, other in pairs(first, second):
        torch.testing.assert_close(one, other)


# What timm's tests ask of every model


def test_states_are_kept_in_every_block_or_in_some():
    def kept(**options):
        blocks = VisionMamba(img_size=32, embed_dim=24, num_classes=0, **options).blocks
        return [block.mixer.keep_states for block in blocks]

    mixers = ["bimamba", {"name": "bimamba", "keep_states": True}]
    assert kept(depth=2) == [False, False]
    assert kept(depth=2, keep_states=True) == [True, True]
    assert kept(depth=2, mixer=mixers) == [False, True]


@every_variant
def test_forward(variant):
    model = make(variant)
    y = model(images(model))
    grid = model.patch_embed.num_patches
    tokens = () if model.global_pool else (model.num_prefix_tokens + grid,)
    assert y.shape == (2, *tokens, model.num_classes or model.num_features)
    assert y.isfinite().all()
    assert y.std() > 0


@every_variant
def test_backward(variant):
    model = make(variant).train()
    for name, gradient in gradients(model, images(model)).items():
        assert gradient.isfinite().all(), name


def test_every_weight_takes_part():
    model = make("registers_even").train()
    for name, gradient in gradients(model, images(model)).items():
        assert (gradient != 0).any(), name


@every_variant
def test_features_pooling_and_classifier_are_forward(variant):
    model = make(variant)
    x = images(model)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, model.num_prefix_tokens + model.patch_embed.num_patches, 32)
    assert tokens.shape[-1] == model.num_features == model.head_hidden_size == model.embed_dim
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape[-1] == model.num_features
    assert_same(model.get_classifier()(features), model.forward_head(tokens))
    assert_same(model.forward_head(tokens), model(x))


@pytest.mark.parametrize("name", timm.list_models("vim*"))
def test_presets(name):
    """Every preset builds, classifies and matches its configuration, without memory or time."""
    model = timm.create_model(name, device="meta")
    config = model.default_cfg
    x = torch.empty(1, *config["input_size"], device="meta")
    micro = "micro" in name
    assert model(x).shape == (1, 10 if micro else 1000)
    assert model.pretrained_cfg is config
    assert f"{config['classifier']}.weight" in model.state_dict()
    assert f"{config['first_conv']}.weight" in model.state_dict()
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == model.forward_features(x).shape
    reduction = 8 if "stride8" in name or micro else 16
    assert model.feature_info == [
        {"module": f"blocks.{i}", "num_chs": model.embed_dim, "reduction": reduction}
        for i in range(9 if micro else 24)
    ]
    assert isinstance(model.get_submodule(model.feature_info[-1]["module"]), torch.nn.Module)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "size", "crop"),
    [("vim_tiny_patch16_224", 224, 0.875), ("vim_base_patch16_384", 384, 1)],
)
def test_data_config(name, size, crop):
    config = resolve_model_data_config(timm.create_model(name, device="meta"))
    assert config == {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": crop,
        "crop_mode": "center",
    }


AUTHORS_NAMES = {
    f"vim_{size}_{stride}224_bimambav2_final_pool_mean_abs_pos_embed_with_{token}_div2": (
        f"vim_{size}_{stride}224"
    )
    for size, stride, token in [
        ("tiny", "patch16_", "midclstok"),
        ("tiny", "patch16_stride8_", "midclstok"),
        ("small", "patch16_", "midclstok"),
        ("small", "patch16_stride8_", "midclstok"),
        ("base", "patch16_", "middle_cls_token"),
    ]
}


@pytest.mark.parametrize("name", AUTHORS_NAMES)
def test_names_of_the_authors_scripts(name):
    ours = AUTHORS_NAMES[name]
    with pytest.warns(UserWarning, match=f"Mapping deprecated model name {name} to current {ours}"):
        model = timm.create_model(name, device="meta")
    assert (model.default_cfg["architecture"], model.default_cfg["tag"]) == (ours, "in1k")
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in timm.create_model(ours, device="meta").parameters()
    )


@every_way
def test_torchscript(variant):
    model = make(variant)
    scripted = torch.jit.script(model)
    x = images(model)
    assert_same(scripted(x), model(x))
    expected = gradients(model, x)
    assert_close(gradients(scripted, x), expected)


@every_way
def test_fx(variant):
    model = make(variant).train()
    names, _ = get_graph_node_names(model)
    traced = create_feature_extractor(model, {names[-1]: "logits"})
    x = images(model)
    logits = traced(x)["logits"]
    assert_same(logits, model(x))
    logits.square().mean().backward()
    actual = {name: p.grad.clone() for name, p in traced.named_parameters()}
    expected = gradients(model, x)
    assert_close({name: actual[name] for name in expected}, expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed_batch", "any_batch"])
@pytest.mark.parametrize("variant", ["default", "none", "registers_even", "overlap"])
def test_export(variant, dynamic):
    model = make(variant)
    shapes = {"x": {0: torch.export.Dim("batch", max=64)}} if dynamic else None
    exported = torch.export.export(model, (images(model),), dynamic_shapes=shapes).module()
    for batch in (2, 1, 5) if dynamic else (2,):
        x = images(model, batch)
        assert_close(exported(x), model(x))


@pytest.mark.skipif(
    "is_exporting" not in vars(timm.layers.pos_embed),
    reason="this timm resamples position embeddings for the size of the example alone",
)
@torch.no_grad()  # what a backward would need has sizes that tie the program to the example's
def test_export_of_any_size():
    model = make("dynamic", dynamic_img_pad=False)
    height, width = (8 * torch.export.Dim(name, min=2, max=20) for name in ("rows", "columns"))
    shapes = {"x": {2: height, 3: width}}
    exported = torch.export.export(
        model, (images(model, size=(48, 64)),), dynamic_shapes=shapes
    ).module()
    for size in ((48, 64), (32, 32), (40, 72)):
        x = images(model, size=size)
        assert_close(exported(x), model(x))


@pytest.mark.parametrize("variant", ["default", "registers_even"])
def test_compile(variant):
    model = make(variant).train()
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x), gradients(model, x)
    actual = compiled(x), gradients(compiled, x)
    assert_close(actual[0], expected[0])
    assert_close({k.removeprefix("_orig_mod."): v for k, v in actual[1].items()}, expected[1])


# Features of the blocks


@every_variant
@pytest.mark.parametrize("norm", [False, True], ids=["stream", "normed"])
def test_forward_intermediates(variant, norm):
    model = make(variant)
    x = images(model)
    final, features = model.forward_intermediates(x, norm=norm)
    assert_same(final, model.forward_features(x))
    assert len(features) == len(model.blocks)
    patches, (height, width) = patches_and_grid(model, x)
    assert {f.shape for f in features} == {(2, 32, height, width)}
    last = features[-1].flatten(2).mT
    assert_close(last if norm else model.norm(last, None)[0], patches)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "drop_path_in_training"])
def test_a_blocks_feature_is_the_stream_that_the_next_block_reads(training):
    model = make("registers_even", drop_path_rate=0.5).train(training)
    streams = []
    for norm in [block.norm for block in model.blocks[1:]] + [model.norm]:
        norm.register_forward_hook(lambda module, inputs, output: streams.append(output[1]))
    _, features = model.forward_intermediates(
        images(model, batch=8), return_prefix_tokens=True, output_fmt="NLC"
    )
    for (patches, prefix), stream in zip(features, streams, strict=True):
        assert_close(torch.cat([prefix, patches], 1), model.token_order.separate(stream))


def test_formats_hold_the_same_features():
    model = make("oblong")
    x = images(model)
    maps = model.forward_intermediates(x, intermediates_only=True)
    tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert maps[0].shape == (2, 32, 3, 5)
    assert_same([m.flatten(2).mT for m in maps], tokens)
    assert all(m.is_contiguous() for m in maps)


@pytest.mark.parametrize(
    ("indices", "blocks"),
    [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([0, 2], [0, 2]), ([-3], [0]), ((1, -1), [1, 2])],
    ids=str,
)
def test_indices_of_intermediates(indices, blocks):
    model = make()
    x = images(model)
    every = model.forward_intermediates(x, intermediates_only=True)
    chosen = model.forward_intermediates(x, indices, intermediates_only=True)
    assert_same(chosen, [every[i] for i in blocks])
    if indices is not None:
        assert_same(model.get_intermediate_layers(x, indices, reshape=True), chosen)


@pytest.mark.parametrize("variant", ["default", "both_ends", "registers_even", "registers_middle"])
def test_prefix_tokens_come_first(variant):
    model = make(variant)
    x = images(model)
    tokens, features = model.forward_intermediates(
        x, norm=True, return_prefix_tokens=True, output_fmt="NLC"
    )
    patches, prefix = features[-1]
    assert prefix.shape == (2, model.num_prefix_tokens, 32)
    assert_same(torch.cat([prefix, patches], 1), tokens)
    assert_same(model.forward_head(tokens), model.head(prefix[:, : model.num_cls_tokens].mean(1)))


def test_prefix_tokens_are_named_when_there_are_none():
    model = make("none")
    features = model.forward_intermediates(
        images(model), return_prefix_tokens=True, intermediates_only=True
    )
    assert [f.shape for f in features] == [(2, 32, 4, 4)] * 3


@pytest.mark.parametrize("norm", [False, True], ids=["stream", "normed"])
def test_stop_early(norm):
    model = make()
    x, called = images(model), []
    model.blocks[2].register_forward_hook(lambda *_: called.append(2))
    _, whole = model.forward_intermediates(x, [0, 1], norm=norm)
    assert called
    called.clear()
    final, stopped = model.forward_intermediates(x, [0, 1], norm=norm, stop_early=True)
    assert not called
    assert_same(stopped, whole)
    shorter = copy.deepcopy(model)
    shorter.prune_intermediate_layers([1])
    assert_same(final, shorter.forward_features(x))


@pytest.mark.parametrize("prefix", [False, True], ids=["patches", "prefix"])
@pytest.mark.parametrize("only", [False, True], ids=["with_final", "only"])
def test_output_dict(only, prefix):
    model = make("registers_even")
    x = images(model)
    options = {"intermediates_only": only, "return_prefix_tokens": prefix}
    listed = model.forward_intermediates(x, **options)
    final, features = (None, listed) if only else listed
    expected = {"image_intermediates": features}
    if prefix:
        expected["image_intermediates"] = [patches for patches, _ in features]
        expected["image_intermediates_prefix"] = [prefixes for _, prefixes in features]
    if not only:
        expected["image_features"] = final
    assert_same(model.forward_intermediates(x, output_dict=True, **options), expected)


@pytest.mark.parametrize("reshape", [False, True], ids=["tokens", "maps"])
@pytest.mark.parametrize("norm", [False, True], ids=["stream", "normed"])
def test_get_intermediate_layers(norm, reshape):
    model = make()
    x = images(model)
    fmt = "NCHW" if reshape else "NLC"
    expected = model.forward_intermediates(x, [1, 2], True, norm, False, fmt, True)
    actual = model.get_intermediate_layers(x, 2, reshape, return_prefix_tokens=True, norm=norm)
    assert_same(actual, expected)


FEATURES = {
    "default": ({}, [3, 4, 5]),
    "last_two": ({"out_indices": 2}, [4, 5]),
    "chosen": ({"out_indices": (0, 2, 3)}, [0, 2, 3]),
    "negative": ({"out_indices": (-5, -2)}, [1, 4]),
}


@pytest.mark.parametrize("case", FEATURES)
def test_features_only(case):
    options, blocks = FEATURES[case]
    sizes = SMALL | {"depth": 6, "img_size": (24, 40)}
    whole = timm.create_model("vim_tiny_patch16_224", **sizes)
    net = timm.create_model("vim_tiny_patch16_224", features_only=True, **options, **sizes)
    net.model.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(2, 3, 24, 40)
    features = net.eval()(x)
    assert net.feature_info.channels() == [32] * len(blocks)
    assert net.feature_info.reduction() == [8] * len(blocks)
    assert net.feature_info.module_name() == [f"blocks.{i}" for i in blocks]
    assert [f.shape for f in features] == [(2, 32, 3, 5)] * len(blocks)
    assert_same(features, whole.eval().forward_intermediates(x, blocks, intermediates_only=True))
    assert len(net.model.blocks) == blocks[-1] + 1


def test_features_only_in_training():
    net = timm.create_model("vim_tiny_patch16_224", features_only=True, **SMALL).train()
    sum(f.square().mean() for f in net(torch.randn(2, 3, 32, 32))).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.isnan().any()] == []


def test_features_of_pretrained_weights_with_other_channels(tmp_path):
    whole = make()
    save_checkpoint(whole.state_dict(), tmp_path / "model.safetensors")
    options = {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors"), "num_classes": 10},
    }
    sizes = SMALL | {"num_classes": 4}
    net = timm.create_model("vim_tiny_patch16_224", features_only=True, **options, **SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_same(net(x), whole.forward_intermediates(x, 3, intermediates_only=True))
    gray = timm.create_model("vim_tiny_patch16_224", in_chans=1, **options, **sizes).eval()
    assert gray(torch.randn(2, 1, 32, 32)).shape == (2, 4)
    one = torch.randn(2, 1, 32, 32)
    assert_close(gray.forward_features(one), whole.forward_features(one.expand(2, 3, 32, 32)))


def test_save_for_hf_and_back(tmp_path):
    model = timm.create_model("vim_tiny_patch16_224", **SMALL)
    save_for_hf(model, tmp_path, model_args=SMALL)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    assert_same(back.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("indices", "kept", "blocks"), [(1, [2], 3), ([0, 1], [0, 1], 2), ([-3], [0], 1)], ids=str
)
@pytest.mark.parametrize("norm", [False, True], ids=["keep_norm", "prune_norm"])
@pytest.mark.parametrize("head", [False, True], ids=["keep_head", "prune_head"])
def test_prune_intermediate_layers(indices, kept, blocks, norm, head):
    model = make()
    x = images(model)
    before = model.forward_intermediates(x, indices, intermediates_only=True)
    assert model.prune_intermediate_layers(indices, norm, head) == kept
    assert len(model.blocks) == blocks
    assert_same(model.forward_intermediates(x, kept, intermediates_only=True), before)
    assert isinstance(model.norm, AddNorm) is not norm
    assert isinstance(model.head, torch.nn.Identity) is head
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    assert model(x).shape == ((2, tokens, 32) if head else (2, 10))


# Sizes of images


def resized(model, size):
    model = copy.deepcopy(model)
    model.set_input_size(size)
    return model


@pytest.mark.parametrize("variant", ["default", "both_ends", "no_embed_class", "registers_even"])
@pytest.mark.parametrize("size", [(64, 64), (24, 40), (8, 8)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_set_input_size(variant, size):
    model = make(variant)
    prefix = model.num_embedded_cls_tokens
    before = model.pos_embed.detach().clone()
    model.set_input_size(size)
    grid = (size[0] // 8, size[1] // 8)
    expected = resample_abs_pos_embed(before, list(grid), [4, 4], num_prefix_tokens=prefix)
    assert_same(model.pos_embed, expected)
    assert_same(model.pos_embed[:, :prefix], before[:, :prefix])
    assert isinstance(model.pos_embed, torch.nn.Parameter)
    assert model.forward_features(images(model)).shape == (
        2,
        model.num_prefix_tokens + grid[0] * grid[1],
        32,
    )
    with pytest.raises(ValueError, match="the image is 32x32, the model takes"):
        model(torch.randn(1, 3, 32, 32))


def test_set_input_size_changes_patches_too():
    model = make()
    model.set_input_size(img_size=64, patch_size=16)
    assert model.patch_embed.grid_size == (4, 4)
    assert {info["reduction"] for info in model.feature_info} == {16}
    assert model(images(model)).shape == (2, 10)
    model.set_input_size(patch_stride=8)
    assert model.patch_embed.grid_size == (7, 7)
    assert {info["reduction"] for info in model.feature_info} == {8}
    assert model(images(model)).shape == (2, 10)


def test_set_input_size_with_a_convolutional_stem():
    model = make("conv_stem")
    model.set_input_size((24, 40))
    assert model.pos_embed.shape == (1, 1 + 3 * 5, 32)
    assert model(images(model)).shape == (2, 10)
    with pytest.raises(ValueError, match="has patch_size 8: it cannot change to 4"):
        model.set_input_size(patch_size=4)


def test_set_input_size_without_position_embedding():
    model = make("no_pos_embed")
    model.set_input_size((16, 48))
    assert model(images(model, size=(16, 48))).shape == (2, 10)


def test_set_input_size_keeps_what_is_frozen():
    model = make().requires_grad_(False)
    model.set_input_size(64, 16)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", ["default", "both_ends", "no_embed_class", "no_pos_embed"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (24, 40), (8, 48)], ids=str)
def test_dynamic_img_size(variant, size):
    model = make(variant, dynamic_img_size=True)
    x = images(model, size=size)
    assert_same(model(x), resized(model, size)(x))
    patches, grid = patches_and_grid(model, x)
    assert grid == (size[0] // 8, size[1] // 8)
    assert patches.shape[1] == grid[0] * grid[1]
    assert model.forward_intermediates(x)[1][0].shape == (2, 32, *grid)


@pytest.mark.parametrize("stride", [None, 4], ids=["patches", "overlap"])
@pytest.mark.parametrize(
    ("size", "padded"), [((30, 45), (32, 48)), ((33, 5), (40, 8)), ((32, 40), (32, 40))], ids=str
)
def test_dynamic_img_pad(size, padded, stride):
    model = make("dynamic", patch_stride=stride)
    if stride:
        padded = tuple(max(8, -(-side // 4) * 4) for side in size)
    x = images(model, size=size)
    whole = torch.zeros(2, 3, *padded)
    whole[:, :, : size[0], : size[1]] = x
    assert_same(model(x), model(whole))
    _, grid = patches_and_grid(model, x)
    assert model.forward_intermediates(x)[1][0].shape == (2, 32, *grid)


def test_padding_at_a_fixed_size():
    model = make(img_size=(30, 37), dynamic_img_pad=True)
    x = images(model)
    assert model.patch_embed.grid_size == (4, 5)
    assert_same(model(x), resized(model, (32, 40))(torch.nn.functional.pad(x, (0, 3, 0, 2))))
    with pytest.raises(ValueError, match="the image is 32x40, the model takes 30x37"):
        model(images(model, size=(32, 40)))


def test_other_shapes_of_as_many_patches():
    model = make(strict_img_size=False)
    x = torch.randn(2, 3, 16, 64)
    assert model(x).shape == (2, 10)
    assert model.forward_intermediates(x)[1][0].shape == (2, 32, 2, 8)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (64, 64)], ids=str)
def test_another_number_of_patches_is_refused(size):
    """One patch has to be refused as others are: its token would spread over every position."""
    model = make(strict_img_size=False)
    with pytest.raises((ValueError, RuntimeError), match=r"16"):
        model(torch.randn(2, 3, *size))


# Classifier, pooling and dropping


@pytest.mark.parametrize(
    ("classes", "pool", "shape"),
    [
        (7, None, (2, 7)),
        (0, None, (2, 32)),
        (7, "avg", (2, 7)),
        (0, "max", (2, 32)),
        (0, "", (2, 17, 32)),
        (7, "", (2, 17, 7)),
    ],
)
def test_reset_classifier(classes, pool, shape):
    model = make()
    model.reset_classifier(classes, pool)
    assert model.num_classes == classes
    assert model.global_pool == ("token" if pool is None else pool)
    assert model(images(model)).shape == shape
    assert isinstance(model.get_classifier(), torch.nn.Linear if classes else torch.nn.Identity)


def test_reset_classifier_keeps_precision_and_device():
    model = VisionMamba(**SMALL, device="meta", dtype=torch.bfloat16)
    model.reset_classifier(3)
    assert (model.head.weight.dtype, model.head.weight.device.type) == (torch.bfloat16, "meta")


def test_a_new_classifier_starts_small():
    model = make()
    model.reset_classifier(1000)
    assert (model.head.bias == 0).all()
    assert 0.018 < model.head.weight.std() < 0.022


@pytest.mark.parametrize("variant", ["default", "both_ends", "registers_even"])
def test_pools(variant):
    model = make(variant)
    x = images(model)
    tokens = model.forward_features(x)
    patches = tokens[:, model.num_prefix_tokens :]
    assert_same(model.pool(tokens), tokens[:, : model.num_cls_tokens].mean(1))
    assert_same(model.pool(tokens, "avg"), patches.mean(1))
    assert_same(model.pool(tokens, "max"), patches.amax(1))
    assert_same(model.pool(tokens, ""), tokens)


@pytest.mark.parametrize(
    "option",
    ["drop_rate", "pos_drop_rate", "patch_drop_rate", "drop_path_rate"],
)
def test_dropping_is_for_training_only(option):
    plain, dropping = make(), make(**{option: 0.4})
    dropping.load_state_dict(plain.state_dict())
    x = images(plain, batch=8)
    assert_same(dropping(x), plain(x))
    dropping.train()
    first, second = dropping(x), dropping(x)
    assert first.isfinite().all()
    assert not torch.equal(first, second)


def test_patch_drop_leaves_prefix_tokens():
    model = make("registers_even", patch_drop_rate=0.5).train()
    x = images(model)
    assert model.forward_features(x).shape == (2, 4 + 8, 32)
    assert model(x).shape == (2, 10)


def test_drop_path_grows_with_depth_one_block_late():
    """A block drops what the one before it computed; the last rate stands before the final norm."""
    model = make(depth=5, drop_path_rate=0.4)
    rates = [getattr(b.drop_path, "drop_prob", 0) for b in model.blocks] + [
        model.drop_path.drop_prob
    ]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4])


# Optimisation


def test_layer_decay_scales_every_block_for_itself():
    model = make("registers_even")
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    actual = {name: scales[id(p)] for name, p in model.named_parameters()}
    expected = {}
    for name in actual:
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        else:
            layer = {"head": 4, "norm": 3}.get(name.split(".")[0], 0)
        expected[name] = 0.75 ** (4 - layer)
    assert actual == pytest.approx(expected)


def test_optimizer_with_layer_decay():
    model = make()
    optimizer = create_optimizer_v2(model, "adamw", 1e-3, weight_decay=0.1, layer_decay=0.75)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    scales = sorted({g["lr_scale"] for g in optimizer.param_groups})
    assert scales == pytest.approx([0.75**i for i in (4, 3, 2, 1, 0)])
    actual = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert actual == {name: 0.1 if name.endswith(DECAYED) else 0.0 for name in actual}


@pytest.mark.parametrize("variant", ["default", "registers_even", "norm_after_scan", "layer_norm"])
def test_weight_decay_spares_states_norms_and_embeddings(variant):
    model = make(variant)
    exempt = model.no_weight_decay()
    assert exempt <= {name for name, _ in model.named_parameters()} | {"reg_token"}
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=exempt)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    actual = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert actual == {name: 0.1 if name.endswith(DECAYED) else 0.0 for name in actual}


@every_variant
def test_gradient_checkpointing_changes_nothing(variant):
    model = make(variant).train()
    x = images(model)
    expected = model(x), gradients(model, x), model.forward_intermediates(x)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    model.set_grad_checkpointing()
    gradient = gradients(model, x)
    assert len(calls) == 2  # once forward, once more for the gradient
    assert_same((model(x), gradient, model.forward_intermediates(x)), expected)
    model.set_grad_checkpointing(False)
    calls.clear()
    gradients(model, x)
    assert len(calls) == 1


def test_gradient_checkpointing_drops_the_same_paths():
    model = make(drop_path_rate=0.5).train()
    x = images(model, batch=8)
    torch.manual_seed(1)
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    torch.manual_seed(1)
    assert_same(gradients(model, x), expected)


def test_exponential_moving_average():
    model = make()
    average = ModelEmaV3(model, decay=0.75)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    average.update(model)
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.25)
    x = images(model)
    assert not torch.equal(average(x), model(x))


def test_a_training_step_lowers_the_loss():
    model = make().train()
    optimizer = create_optimizer_v2(model, "adamw", 1e-3, layer_decay=0.9)
    x, target = images(model, batch=8), torch.arange(8)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Copies, precision and layout


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate):
    model = make("registers_even")
    other = duplicate(model)
    x = images(model)
    assert_same(other(x), model(x))
    with torch.no_grad():
        other.head.bias += 1
    assert_close(other(x), model(x) + 1)
    other.load_state_dict(model.state_dict())
    assert_same(other(x), model(x))


@every_variant
def test_state_dict_round_trip(variant):
    model, other = make(variant), make(variant)
    x = images(model)
    assert not torch.equal(other(x), model(x))
    tensors = (*model.named_parameters(), *model.named_buffers())
    assert set(other.state_dict()) == {name for name, _ in tensors}
    other.load_state_dict(model.state_dict())
    assert_same(other(x), model(x))


@pytest.mark.parametrize("variant", ["default", "registers_even", "layer_norm", "norm_after_scan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("way", ["cast", "cast_from_double", "constructor"])
def test_low_precision_keeps_exponents_in_float32(way, dtype, variant):
    if way == "cast":
        model = make(variant).to(dtype)
    elif way == "cast_from_double":
        model = make(variant).double().to(dtype)
    else:
        model = VisionMamba(**(SMALL | VARIANTS[variant]), dtype=dtype).eval()
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        f"blocks.{i}.mixer.{branch}_branch.{name}"
        for i, branch, name in itertools.product(
            range(3), ("forward", "backward"), ("A_log", "D", "dt_bias")
        )
    }
    y = model(images(model).to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


def roundings_allowance(model, dtype):
    """Return a relative error: roundings between image and logits, adding up as a random walk.

    Per block the norm, four projections, the convolution and the scan round, and their weights are
    rounded, too; so are the patches, the embeddings, the final norm and the logits.
    """
    roundings = 2 * 7 * len(model.blocks) + 8
    return math.sqrt(roundings) * torch.finfo(dtype).eps / 2


def relative_error(actual, truth):
    return ((actual.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_is_near(dtype):
    model = make()
    x = images(model, batch=8)
    truth = copy.deepcopy(model).double()(x.double())
    error = relative_error(model.to(dtype)(x.to(dtype)), truth)
    assert error < roundings_allowance(model, dtype)


def test_autocast():
    model = make()
    x = images(model, batch=8)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, truth) < roundings_allowance(model, torch.bfloat16)
    y.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_the_stream_is_float32_under_autocast():
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_intermediates(images(model), intermediates_only=True)
    assert {f.dtype for f in features} == {torch.float32}


def test_double():
    model = make()
    x = images(model)
    single = model(x)
    model = model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    y = model(x.double())
    assert y.dtype == torch.float64
    assert relative_error(single, y) < 8 * torch.finfo(torch.float32).eps


def test_channels_last():
    model = make()
    x = images(model)
    expected = model(x)
    assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    model = model.to(memory_format=torch.channels_last)
    assert_close(model(x.to(memory_format=torch.channels_last)), expected)


def test_batch_items_are_independent():
    model = make("registers_even")
    x = images(model, batch=3)
    assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]))


def test_construction_is_reproducible_and_init_weights_draws_anew():
    torch.manual_seed(3)
    first = VisionMamba(**SMALL)
    torch.manual_seed(3)
    second = VisionMamba(**SMALL)
    assert_same(first.state_dict(), second.state_dict())
    second.init_weights()
    same = {k for k, v in second.state_dict().items() if torch.equal(v, first.state_dict()[k])}
    constant = ("A_log", ".D", "norm.weight", "head.bias", "patch_embed.proj.bias")
    assert same == {k for k in first.state_dict() if k.endswith(constant)}


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"if_devide_out": True}, TypeError, "unexpected keyword argument 'if_devide_out'"),
        ({"global_pool": "mean"}, ValueError, "must be one of '', 'token', 'avg', 'max', got 'm"),
        ({"merge": "max"}, ValueError, "merge must be 'mean' or 'sum', got 'max'"),
        ({"norm_layer": "batch"}, ValueError, "norm must be 'rms' or 'layer', got 'batch'"),
        ({"pos_embed": "rope"}, ValueError, "pos_embed must be 'learned' or 'none', got 'rope'"),
        ({"cls_token_position": "center"}, ValueError, "cls_token_position must be one of none, f"),
        ({"reg_token_position": "odd"}, ValueError, "must be 'even' or 'middle', got 'odd'"),
        ({"reg_tokens": -1}, ValueError, "reg_tokens must not be negative, got -1"),
        ({"class_token": False}, ValueError, "global_pool='token' needs a class token: choose"),
        ({"cls_token_position": "none"}, ValueError, "needs a class token: .*global_pool='avg'"),
        ({"embed_layer": "linear"}, ValueError, "must be one of patch, conv, got 'linear'"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must not be negative, got -1"),
        ({"img_size": 4}, ValueError, "image size 4x4 is smaller than a patch of 8x8: use larger"),
        ({"img_size": 30}, ValueError, "size of 30x30 exactly: resize to 24x24, or .*pad=True"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        VisionMamba(**(SMALL | options))
    with pytest.raises(error, match=message):
        timm.create_model("vim_tiny_patch16_224", **(SMALL | options))


def test_unknown_name():
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("vim_huge_patch16_224")


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        ({}, torch.zeros(1, 1, 32, 32), ValueError, r"C = 3, got \[1, 1, 32, 32\]: convert them"),
        ({}, torch.zeros(3, 32, 32), ValueError, r"\(B, C, H, W\) with C = 3, got \[3, 32, 32\]"),
        ({}, torch.zeros(1, 3, 32, 40), ValueError, "is 32x40, the model takes 32x32: resize"),
        ({"dynamic_img_size": True}, torch.zeros(1, 3, 4, 32), ValueError, "4x32 is smaller than"),
        (
            {"dynamic_img_size": True},
            torch.zeros(1, 3, 32, 44),
            ValueError,
            "32x44 exactly: resize to 32x40, or .*dynamic_img_pad=True",
        ),
        ({}, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "got torch.uint8: scale to"),
        ({}, torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, "must be floating point"),
    ],
    ids=["channels", "no_batch", "strict", "under_a_patch", "not_divisible", "uint8", "int64"],
)
@pytest.mark.parametrize("method", ["forward", "forward_intermediates"])
def test_bad_images(method, options, x, error, message):
    model = make(**options)
    with pytest.raises(error, match=message):
        getattr(model, method)(x)


def test_bad_requests():
    model = make("none")
    with pytest.raises(ValueError, match="global_pool='token' needs a class token"):
        model.reset_classifier(3, "token")
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images(model), output_fmt="NHWC")
    with pytest.raises(ValueError, match="the only mode of initialisation is '', got 'jax'"):
        model.init_weights("jax")
    assert model(images(model)).shape == (2, 10)


@pytest.mark.parametrize("options", [{"img_size": 30}, {"patch_size": 5}], ids=["image", "patch"])
def test_a_refused_size_leaves_the_model_as_it_was(options):
    model = make()
    x = images(model)
    before = model(x)
    with pytest.raises(ValueError, match="exactly: resize to"):
        model.set_input_size(**options)
    assert_same(model(x), before)
