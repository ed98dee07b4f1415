"""transformers: Vim as TimmBackbone of DETR, Mask2Former and UperNet, and in TimmWrapper."""

import pytest
import timm
import torch

from vim import load_checkpoint
from vim.models import VisionMambaPyramid, read_checkpoint, to_native

transformers = pytest.importorskip("transformers", reason="optional: pip install transformers")

NAME = "vim_tiny_patch16_224_pyramid"
TINY = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_labels": 3}


def backbone_config(out_indices=(0, 1, 2, 3)):
    return transformers.TimmBackboneConfig(backbone=NAME, out_indices=list(out_indices))


def detr():
    config = transformers.DetrConfig(
        backbone_config=backbone_config([3]),
        d_model=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        **TINY,
    )
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    labels = [{"class_labels": torch.tensor([1]), "boxes": boxes}] * 2
    return transformers.DetrForObjectDetection(config), {"labels": labels}


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=2,
        train_num_points=16,
        **TINY,
    )
    labels = {
        "mask_labels": [torch.ones(1, 64, 96)] * 2,
        "class_labels": [torch.tensor([1])] * 2,
    }
    return transformers.Mask2FormerForUniversalSegmentation(config), labels


def upernet():
    config = transformers.UperNetConfig(
        backbone_config=backbone_config(),
        hidden_size=32,
        num_labels=5,
        auxiliary_in_channels=192,
        auxiliary_channels=16,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    return model, {"labels": torch.randint(0, 5, (2, 64, 96))}


MODELS = {"detr": detr, "mask2former": mask2former, "upernet": upernet}
every_model = pytest.mark.parametrize("name", MODELS)


def pyramid_of(model):
    (found,) = (m for m in model.modules() if isinstance(m, VisionMambaPyramid))
    return found


@every_model
def test_forward_and_backward(name):
    model, labels = MODELS[name]()
    output = model(torch.randn(2, 3, 64, 96), **labels)
    assert output.loss.isfinite().all()
    output.loss.sum().backward()
    for parameter_name, parameter in pyramid_of(model).named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name


@every_model
def test_published_weights_load(name, authors_checkpoint):
    checkpoint = authors_checkpoint()
    model, _ = MODELS[name]()
    load_checkpoint(pyramid_of(model), checkpoint.path)
    checkpoint.matches(pyramid_of(model), torch.randn(1, 3, 64, 96))


@every_model
def test_initial_weights_are_vims(name):
    """transformers draws the weights of its own modules, and leaves ours."""
    pyramid = pyramid_of(MODELS[name]()[0])
    mixer = pyramid.model.blocks[0].mixer
    states = torch.arange(1.0, 17.0).log()
    torch.testing.assert_close(mixer.forward_branch.A_log, states.expand(384, 16))
    assert (mixer.backward_branch.D == 1).all()
    plain = timm.create_model(NAME)
    for own, ours in (
        (pyramid.model.patch_embed.proj.weight, plain.patch_embed.proj.weight),
        (mixer.out_proj.weight, plain.blocks[0].mixer.out_proj.weight),
    ):
        torch.testing.assert_close(own.std(), ours.std(), rtol=0.05, atol=0)


@pytest.mark.parametrize("out_indices", [[0, 1, 2, 3], [1, 3], [-1]], ids=str)
def test_timm_backbone(out_indices):
    small = {"depth": 2, "embed_dim": 16}
    backbone = transformers.TimmBackbone(backbone_config(out_indices), norm=True, **small)
    levels = [i % 4 for i in out_indices]
    assert backbone.stage_names == [f"levels.{i}" for i in range(4)]
    assert backbone.out_features == [f"levels.{i}" for i in levels]
    assert backbone.channels == [16] * len(levels)
    assert backbone._backbone.norm
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    assert [m.shape[-1] for m in maps] == [96 // (4, 8, 16, 32)[i] for i in levels]


def test_timm_wrapper(authors_checkpoint):
    small = {"depth": 2, "embed_dim": 16}
    checkpoint = authors_checkpoint(**small)
    config = transformers.TimmWrapperConfig(
        architecture="vim_tiny_patch16_224", num_labels=1000, model_args=small
    )
    model = transformers.TimmWrapperForImageClassification(config)
    load_checkpoint(model.timm_model, checkpoint.path)
    plain = timm.create_model("vim_tiny_patch16_224", **small)
    plain.load_state_dict(to_native(read_checkpoint(checkpoint.path)))
    x = torch.randn(2, 3, 224, 224)
    output = model(x, labels=torch.tensor([1, 7]), output_hidden_states=True)
    output.loss.backward()
    assert torch.equal(output.logits, plain(x))
    wanted = plain.forward_intermediates(x, intermediates_only=True)
    for actual, expected in zip(output.hidden_states, wanted, strict=True):
        assert torch.equal(actual, expected)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_timm_wrapper_of_features():
    config = transformers.TimmWrapperConfig(
        architecture=NAME, model_args={"depth": 2, "embed_dim": 16, "features_only": True}
    )
    maps = transformers.TimmWrapperModel(config)(torch.randn(1, 3, 50, 70), do_pooling=False)
    assert [m.shape[-1] for m in maps.last_hidden_state] == [18, 9, 5, 3]


def test_a_saved_model_is_the_same(tmp_path):
    model, _ = upernet()
    model.eval().save_pretrained(tmp_path)
    other = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(other(x).logits, model(x).logits)
