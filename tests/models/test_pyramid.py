"""Vim as a backbone of dense prediction: maps, pyramid, and classification weights in them."""

import copy
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

from vim import VisionMamba, load_checkpoint
from vim.models import VisionMambaMaps, VisionMambaPyramid, save_checkpoint, to_official

NAME = "vim_tiny_patch16_224_pyramid"
SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 4}
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}
with_and_without_norm = pytest.mark.parametrize("norm", [False, True], ids=["stream", "norm"])
with_and_without_token = pytest.mark.parametrize(
    "class_token", [True, False], ids=["token", "no_token"]
)


def moved(module):
    """Move every weight from where it starts, so that none hides another."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.eval()


def classifier(**kwargs):
    return moved(VisionMamba(**(SMALL | {"num_classes": 7} | kwargs)))


def pyramid(**kwargs):
    return moved(timm.create_model(NAME, features_only=True, **(SMALL | kwargs)))


def without_class_token(model):
    """Return a model built without class tokens, with the weights of `model`, mapped by hand."""
    state = model.state_dict()
    state["pos_embed"] = state["pos_embed"][:, state.pop("cls_token").shape[1] :]
    other = VisionMamba(**SMALL, num_classes=7, class_token=False, global_pool="avg", **ANY_SIZE)
    other.load_state_dict(state)
    return other.eval()


def assert_equal(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 70), (33, 16), (1, 200)], ids=str)
def test_any_size_gives_maps_of_four_strides(size):
    model = pyramid()
    maps = model(torch.randn(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [
        (2, 16, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in (4, 8, 16, 32)
    ]
    assert all(m.isfinite().all() and m.std() > 0 for m in maps)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_presets(size):
    name = f"vim_{size}_patch16_224_pyramid"
    model = timm.create_model(name, features_only=True, device="meta")
    assert isinstance(model, VisionMambaPyramid)
    dim = {"tiny": 192, "small": 384, "base": 768}[size]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [dim] * 4
    assert model.block_indices == [5, 11, 17, 23]
    for module in model.feature_info.module_name():
        assert isinstance(model.get_submodule(module), nn.Module)
    maps = model(torch.empty(1, 3, 64, 96, device="meta"))
    assert [m.shape[1:] for m in maps] == [
        (dim, 64 // s, 96 // s) for s in model.feature_info.reduction()
    ]
    ours = timm.create_model(name, device="meta").pretrained_cfg
    plain = timm.create_model(f"vim_{size}_patch16_224", device="meta").pretrained_cfg
    for key in ("hf_hub_id", "hf_hub_filename", "mean", "std", "num_classes"):
        assert ours[key] == plain[key]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 24])
def test_blocks_are_evenly_spaced(depth):
    expected = {
        1: [0, 0, 0, 0],
        2: [0, 0, 1, 1],
        3: [0, 1, 2, 2],
        4: [0, 1, 2, 3],
        5: [1, 2, 3, 4],
        24: [5, 11, 17, 23],
    }
    model = pyramid(depth=depth)
    assert model.block_indices == expected[depth]
    assert model(torch.randn(1, 3, 32, 32))[-1].isfinite().all()


@with_and_without_norm
@with_and_without_token
def test_maps_are_those_of_the_classifier(norm, class_token):
    plain = classifier(**ANY_SIZE)
    expected = plain if class_token else without_class_token(plain)
    x = torch.randn(2, 3, 48, 80)
    wanted = expected.forward_intermediates(x, [1, 3], norm=norm, intermediates_only=True)
    model = VisionMambaMaps(copy.deepcopy(plain), (-1, 1, 3), norm, class_token)
    assert_equal(model(x), [wanted[1], wanted[0], wanted[1]])
    assert model.feature_info.reduction() == [16, 16, 16]
    assert model.feature_info.channels() == [16, 16, 16]
    assert ("model.cls_token" in model.state_dict()) == class_token


def test_levels_rescale_the_maps():
    model = pyramid()
    x = torch.randn(2, 3, 64, 128)
    quarter, eighth, sixteenth, half = model.maps(x)
    up, norm, _, up_again = model.levels["0"]
    y = F.conv_transpose2d(quarter, up.weight, up.bias, stride=2)
    y = (y - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
    y = F.gelu(y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1))
    y = F.conv_transpose2d(y, up_again.weight, up_again.bias, stride=2)
    up = model.levels["1"][0]
    expected = [y, F.conv_transpose2d(eighth, up.weight, up.bias, stride=2)]
    expected += [sixteenth, F.max_pool2d(half, 2)]
    for actual, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_maps_are_where_the_image_is():
    """What changes at one place of the image changes the maps most at that place."""
    model = pyramid(pos_embed="none", class_token=False)
    x = torch.randn(1, 3, 64, 160)
    changed = x.clone()
    changed[:, :, 16:32, 96:112] += 1
    for before, after, stride in zip(model(x), model(changed), (4, 8, 16, 32), strict=True):
        difference = (after - before).abs().sum(dim=1)[0]
        row, column = divmod(difference.argmax().item(), difference.shape[1])
        assert (row * stride // 16 * 16) in (16, 0)
        assert 96 - 16 <= column * stride < 112


@pytest.mark.parametrize("out_indices", [(0,), [-1], (1, 3), 2, (0, 1, 2)], ids=str)
def test_some_levels_are_as_among_all(out_indices):
    whole, some = pyramid(), pyramid(out_indices=out_indices)
    state = whole.state_dict()
    some.load_state_dict({name: state[name] for name in some.state_dict()})
    levels = [2, 3] if out_indices == 2 else [i % 4 for i in out_indices]
    x = torch.randn(1, 3, 40, 56)
    maps = whole(x)
    assert_equal(some(x), [maps[i] for i in levels])
    assert some.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in levels]
    assert some.feature_info.out_indices == tuple(levels)
    assert len(some.model.blocks) == max(levels) + 1


@pytest.mark.parametrize(
    ("output_stride", "strides"),
    [(8, [4, 8, 8, 8]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 32]), (None, [4, 8, 16, 32])],
)
def test_output_stride(output_stride, strides):
    model = pyramid(output_stride=output_stride)
    assert model.feature_info.reduction() == strides
    assert [m.shape[-1] for m in model(torch.randn(1, 3, 64, 96))] == [96 // s for s in strides]


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
def test_patch_sizes(patch_size):
    model = pyramid(patch_size=patch_size)
    maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape[-1] for m in maps] == [24, 12, 6, 3]


@with_and_without_norm
@with_and_without_token
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1,)], ids=str)
def test_every_weight_takes_part(norm, class_token, out_indices):
    model = pyramid(norm=norm, class_token=class_token, out_indices=out_indices).train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 48, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # Before a batch norm a bias changes nothing.
        assert (parameter.grad != 0).any() or name == "levels.0.0.bias", name


def test_checkpointing_changes_nothing():
    model = pyramid().train()
    x = torch.randn(2, 3, 32, 48)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(m.square().mean() for m in model(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert_equal(*gradients)


def test_dtypes():
    model = pyramid(norm=False)
    x = torch.randn(1, 3, 32, 48)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(m.isfinite().all() for m in model(x))
    maps = model.bfloat16()(x.bfloat16())
    assert all(m.dtype == torch.bfloat16 for m in maps)
    for actual, wanted in zip(maps, expected, strict=True):
        error = (actual.float() - wanted).norm() / wanted.norm()
        assert error < 16 * torch.finfo(torch.bfloat16).eps


def test_compile():
    model = pyramid()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in ((64, 64), (48, 80), (50, 70)):
        x = torch.randn(1, 3, *size)
        assert_equal(compiled(x), model(x))


def test_copies():
    model = pyramid(class_token=False)
    x = torch.randn(1, 3, 32, 48)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(other(x), model(x))
        other.load_state_dict(to_official(classifier().state_dict()))


def test_layer_decay():
    model = pyramid()
    groups = param_groups_layer_decay(
        model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    names = {p: name for name, p in model.named_parameters()}
    scales, decays = {}, {}
    for group in groups:
        for parameter in group["params"]:
            scales[names[parameter]] = group["lr_scale"]
            decays[names[parameter]] = group["weight_decay"]
    assert scales.keys() == set(names.values())
    assert scales["model.pos_embed"] == scales["model.patch_embed.proj.weight"] == 0.5**5
    assert scales["model.blocks.3.norm.weight"] == 0.5
    assert scales["levels.0.0.weight"] == 1
    assert decays["levels.0.0.weight"] == decays["model.blocks.0.mixer.in_proj.weight"] == 0.1
    assert decays["model.pos_embed"] == decays["model.blocks.0.mixer.forward_branch.A_log"] == 0


def test_a_classifier_without_features_only():
    model = timm.create_model(NAME, **SMALL, num_classes=7)
    assert isinstance(model, VisionMamba)
    assert model(torch.randn(2, 3, 50, 70)).shape == (2, 7)


@pytest.mark.parametrize("position", ["first", "middle", "last", "both_ends"])
def test_drop_class_tokens(position):
    model = classifier(cls_token_position=position, **ANY_SIZE)
    expected = without_class_token(model)
    model.drop_class_tokens()
    x = torch.randn(1, 3, 64, 80)
    assert_equal([model(x)], [expected(x)])
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert model.num_prefix_tokens == 0
    model.drop_class_tokens()  # nothing is left to drop
    assert_equal([model(x)], [expected(x)])


# Classification weights


@pytest.mark.parametrize("position", ["first", "middle", "last", "both_ends"])
@pytest.mark.parametrize("layout", ["authors", "ours"])
@with_and_without_norm
@with_and_without_token
def test_classification_weights_load(position, layout, norm, class_token):
    source = classifier(cls_token_position=position, **ANY_SIZE)
    state = source.state_dict()
    state = to_official(state, position) if layout == "authors" else state
    given = dict(state)
    expected = source if class_token else without_class_token(source)

    model = pyramid(cls_token_position=position, norm=norm, class_token=class_token)
    levels = {k: v.clone() for k, v in model.levels.state_dict().items()}
    model.load_state_dict(state)
    assert state.keys() == given.keys()
    x = torch.randn(1, 3, 50, 96)
    wanted = expected.forward_intermediates(x, norm=norm, intermediates_only=True)
    assert_equal(model.maps(x), wanted)
    assert_equal(list(model.levels.state_dict().values()), list(levels.values()))

    again = pyramid(cls_token_position=position, norm=norm, class_token=class_token)
    again.load_state_dict(model.state_dict())
    assert_equal(again(x), model(x))


@pytest.mark.parametrize("layout", ["authors", "ours"])
def test_class_tokens_that_carry_no_position(layout):
    source = classifier(no_embed_class=True, **ANY_SIZE)
    state = source.state_dict()
    state = to_official(state, "none") if layout == "authors" else state
    x = torch.randn(1, 3, 64, 64)
    expected = copy.deepcopy(source)
    expected.drop_class_tokens()
    for class_token, wanted in ((True, source), (False, expected)):
        model = pyramid(no_embed_class=True, class_token=class_token)
        model.load_state_dict(state)
        assert_equal(model.maps(x), wanted.forward_intermediates(x, intermediates_only=True))


def test_a_model_built_without_class_token_takes_a_file_with_one():
    source = classifier(**ANY_SIZE)
    bare = VisionMamba(**SMALL, class_token=False, global_pool="avg", **ANY_SIZE)
    model = VisionMambaMaps(bare, range(4)).eval()
    x = torch.randn(1, 3, 64, 64)
    wanted = without_class_token(source).forward_intermediates(x, intermediates_only=True)
    for state in (to_official(source.state_dict()), source.state_dict()):
        model.load_state_dict(state)
        assert_equal(model(x), wanted)


@pytest.mark.parametrize("img_size", [(64, 64), (48, 112), (128, 96)], ids=str)
@with_and_without_token
def test_weights_of_another_resolution(img_size, class_token):
    source = classifier()
    model = pyramid(img_size=img_size, class_token=class_token)
    model.load_state_dict(to_official(source.state_dict()))
    source.set_input_size(img_size)
    if not class_token:
        source.drop_class_tokens()
    x = torch.randn(1, 3, *img_size)
    assert_equal(model.maps(x), source.forward_intermediates(x, intermediates_only=True))


@pytest.mark.parametrize("way", ["timm", "load_checkpoint", "nested"])
@with_and_without_token
def test_ways_to_load_the_authors_file(way, class_token, tmp_path):
    source = classifier(num_classes=1000)
    file = tmp_path / "vim.pth"
    save_checkpoint(to_official(source.state_dict()), file)
    options = {"class_token": class_token, "img_size": 96}
    if way == "timm":
        overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
        model = timm.create_model(NAME, features_only=True, **(SMALL | options), **overlay).eval()
    else:
        model = pyramid(**options)
        load_checkpoint(model, file)
    if way == "nested":
        outer = nn.ModuleDict({"encoder": pyramid(**options), "head": nn.Linear(1, 1)})
        state = {f"encoder.{k}": v for k, v in to_official(source.state_dict()).items()}
        outer.load_state_dict(state | {"head.weight": torch.ones(1, 1), "head.bias": torch.ones(1)})
        model = outer["encoder"]
    source.set_input_size(96)
    if not class_token:
        source.drop_class_tokens()
    x = torch.randn(1, 3, 96, 96)
    assert_equal(model.maps(x), source.forward_intermediates(x, intermediates_only=True))


def test_blocks_that_no_map_needs_are_left_out():
    source = classifier(**ANY_SIZE)
    model = pyramid(out_indices=(0, 1))
    model.load_state_dict(to_official(source.state_dict()))
    x = torch.randn(1, 3, 64, 64)
    wanted = source.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert_equal(model.maps(x), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.2.mixer.D"), "Missing key.*model.blocks.2.mixer.forward_branch.D"),
        (lambda s: s.pop("cls_token"), "Missing key.*model.cls_token"),
        (lambda s: s.update(surplus=torch.ones(1)), "Unexpected key.*model.surplus"),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.ones(16, 1, 16, 16)}),
            "build the model with in_chans=1",
        ),
    ],
    ids=["block", "token", "surplus", "channels"],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    state = to_official(classifier().state_dict())
    change(state)
    if "cls_token" not in state:
        state["pos_embed"] = torch.zeros(1, 16, 16)
    with pytest.raises(RuntimeError, match=message):
        pyramid().load_state_dict(state)


def test_weights_that_are_not_finite_are_refused():
    state = to_official(classifier().state_dict())
    state["layers.1.norm.weight"] = torch.full((16,), math.nan)
    with pytest.raises(ValueError, match=r"blocks\.1\.norm\.weight"):
        pyramid().load_state_dict(state)


def test_a_dense_state_dict_must_be_whole():
    state = pyramid().state_dict()
    del state["levels.1.0.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        pyramid().load_state_dict(state)


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_stride": 4}, "output_stride must be 8, 16, 32 or None, got 4"),
        ({"out_indices": (0, 4)}, r"four levels.*got \(0, 4\)"),
        ({"out_indices": ()}, r"at least one, got \(\)"),
        ({"out_indices": 5}, "four levels"),
        ({"out_indices": (3, -1)}, r"each level once, got \(3, -1\)"),
        ({"blocks": (0, 1)}, r"blocks must be four indices, one a level, got \(0, 1\)"),
        ({"blocks": (0, 1, 2, 4)}, "blocks must be indices from -4 to 3"),
        ({"patch_stride": 8}, "patches that do not overlap"),
        ({"patch_size": (16, 8)}, "square patches"),
        ({"patch_size": 12}, "power of two"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(NAME, features_only=True, **(SMALL | options))


def test_options_of_the_pyramid_are_no_options_of_the_classifier():
    with pytest.raises(TypeError, match="norm"):
        timm.create_model(NAME, **SMALL, norm=True)


def test_a_misspelt_option_fails():
    with pytest.raises(TypeError, match="class_tokens"):
        timm.create_model(NAME, features_only=True, **SMALL, class_tokens=False)


def test_a_norm_that_is_pruned_cannot_be_applied():
    maps = VisionMambaMaps(classifier())
    with pytest.raises(ValueError, match="final norm is pruned"):
        VisionMambaMaps(maps.model, norm=True)


def test_images_that_patches_do_not_cover():
    model = pyramid(dynamic_img_pad=False)
    with pytest.raises(ValueError, match="resize to 48x64"):
        model(torch.randn(1, 3, 50, 70))
