"""Backbones of timm in the place of a Vim: maps, pyramids, and a classifier's weights in them."""

import pytest
import timm
import torch

from vim.heads.plain_maps import ConvStemOfAnySize, PlainMaps, PlainPyramid
from vim.layers import ConvStem

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64}
ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}


def deit(**options):
    return timm.create_model("deit_tiny_patch16_224", **SMALL | ANY_SIZE | options)


def test_maps_are_those_of_the_model():
    model = deit().eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, [1, 3], intermediates_only=True)
        maps = PlainMaps(model, [1, -1]).eval()
        for ours, theirs in zip(maps(x), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert maps.feature_info.reduction() == [16, 16]
    assert maps.no_weight_decay() >= {"model.pos_embed", "model.cls_token"}


def test_of_a_model_of_several_strides_the_last_four():
    maps = PlainMaps(timm.create_model("resnet18"))
    assert maps.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("patch", [8, 16])
def test_pyramid(patch):
    pyramid = PlainPyramid(PlainMaps(deit(patch_size=patch))).eval()
    assert pyramid.maps.out_indices == [0, 1, 2, 3]
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 3, 72, 100))
    assert [tuple(m.shape) for m in maps] == [
        (1, 48, 18, 25),
        (1, 48, 9, 13),
        (1, 48, 5, 7),
        (1, 48, 3, 4),
    ]
    assert "maps.model.pos_embed" in pyramid.no_weight_decay()


@pytest.mark.parametrize("wrap", [PlainMaps, lambda m: PlainPyramid(PlainMaps(m))])
def test_a_classifier_of_another_size_loads(wrap):
    state = deit(img_size=96, num_classes=5).state_dict()
    module = wrap(deit())
    module.load_state_dict(state)
    own = module.state_dict()
    for name, value in state.items():
        if name.startswith("blocks."):
            (found,) = (x for key, x in own.items() if key.endswith(f"model.{name}"))
            assert torch.equal(found, value), name
    (embedding,) = (x for name, x in own.items() if name.endswith("pos_embed"))
    assert embedding.shape[1] == 16 + 1
    module.load_state_dict(own)  # and its own


def test_weights_of_another_model_do_not():
    with pytest.raises(RuntimeError, match="size mismatch"):
        PlainMaps(deit()).load_state_dict(deit(embed_dim=96).state_dict())


def test_pruned_blocks_need_no_weights():
    maps = PlainMaps(deit(), [1])
    assert len(maps.model.blocks) == 2
    maps.load_state_dict(deit().state_dict())


def test_grad_checkpointing_changes_nothing():
    pyramid = PlainPyramid(PlainMaps(deit())).train()
    x = torch.randn(2, 3, 64, 64)
    plain = [m.detach() for m in pyramid(x)]
    pyramid.set_grad_checkpointing()
    for ours, theirs in zip(pyramid(x), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_has_no_maps_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no forward_intermediates.*resnet50"):
        PlainMaps(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"4 maps of one stride.*\[16, 16\]"):
        PlainPyramid(PlainMaps(deit(), [0, 1]))
    with pytest.raises(ValueError, match=r"got maps of the strides \[4, 8, 16, 32\]"):
        PlainPyramid(PlainMaps(timm.create_model("resnet18")))


def test_a_convolutional_stem_takes_images_of_any_size():
    options = {"embed_layer": ConvStemOfAnySize, "patch_size": 8, "class_token": False}
    pyramid = PlainPyramid(PlainMaps(deit(global_pool="avg", **options))).eval()
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 3, 60, 100))
    assert [tuple(m.shape[2:]) for m in maps] == [(15, 25), (8, 13), (4, 7), (2, 4)]
    plain = timm.create_model(
        "deit_tiny_patch16_224",
        **SMALL | options | {"embed_layer": ConvStem, "global_pool": "avg"},
    )
    pyramid.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain.eval().forward_intermediates(x, [3], intermediates_only=True)[0]
        torch.testing.assert_close(pyramid.maps(x)[3], expected)
    with pytest.raises(ValueError, match="output_fmt must be 'NHWC', got 'NLC'"):
        ConvStemOfAnySize(64, 8, output_fmt="NLC")
