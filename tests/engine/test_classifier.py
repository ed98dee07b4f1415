"""The model of a training run: losses, teacher, weights to start from."""

import pytest
import torch
import torch.nn.functional as F

from vim.engine.classifier import VimClassifier, build_backbone, build_loss
from vim.layers import ConvStem, load_balance_loss
from vim.models import save_checkpoint

SMALL = {
    "name": "vim_tiny_patch16_224",
    "img_size": 32,
    "embed_dim": 32,
    "depth": 2,
    "d_state": 4,
    "num_classes": 10,
}


def batch(classes=10):
    return torch.randn(2, 3, 32, 32), torch.randint(classes, (2,))


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "deit_tiny_patch16_224"])
@pytest.mark.parametrize(("layer", "stem"), [("conv", True), ("patch", False)])
def test_every_vit_takes_the_convolutional_stem(name, layer, stem):
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 3}
    model = build_backbone({"name": name, "embed_layer": layer, **options})
    assert isinstance(model.patch_embed, ConvStem) == stem
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_modes():
    model = VimClassifier(SMALL)
    images, targets = batch()
    logits = model(images)
    assert logits.shape == (2, 10)
    assert model(images, targets, "loss")["loss"].item() == pytest.approx(
        F.cross_entropy(logits, targets).item()
    )
    predicted = model(images, targets, "predict")
    assert torch.equal(predicted["logits"], logits)
    assert predicted["targets"] is targets
    with pytest.raises(ValueError, match="'tensor', 'loss' or 'predict'"):
        model(images, mode="train")


@pytest.mark.parametrize(
    ("kind", "options"), [("soft-target", {}), ("bce", {"target_threshold": 0.2})]
)
def test_losses_of_soft_targets(kind, options):
    logits, targets = torch.randn(3, 5), torch.softmax(torch.randn(3, 5), -1)
    loss = build_loss(kind, **options)(logits, targets)
    if kind == "soft-target":
        expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    else:
        hard = (targets > 0.2).float()
        expected = F.binary_cross_entropy_with_logits(logits, hard)
    torch.testing.assert_close(loss, expected)


def test_label_smoothing():
    logits, targets = torch.randn(3, 5), torch.tensor([0, 3, 4])
    loss = build_loss("cross-entropy", 0.1)(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=0.1))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind, tmp_path):
    teacher = build_backbone(SMALL)
    save_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    options = {k: v for k, v in SMALL.items() if k != "name"}
    model = VimClassifier(
        SMALL,
        distillation={
            "teacher": SMALL["name"],
            "checkpoint": str(tmp_path / "teacher.safetensors"),
            "kind": kind,
            "weight": 0.25,
            "tau": 2.0,
            **options,
        },
    )
    images, targets = batch()
    losses = model(images, targets, "loss")
    logits, wanted = model(images), teacher.eval()(images)
    assert losses["loss_classification"].item() == pytest.approx(
        0.75 * F.cross_entropy(logits, targets).item(), rel=1e-5
    )
    if kind == "hard":
        expected = F.cross_entropy(logits, wanted.argmax(-1))
    else:
        p = torch.softmax(wanted / 2, -1)
        expected = 4 * (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    assert losses["loss_distillation"].item() == pytest.approx(0.25 * expected.item(), rel=1e-4)
    assert not [name for name in model.state_dict() if "teacher" in name]
    assert len(list(model.parameters())) == len(list(teacher.parameters()))


def test_start_from_weights_for_other_classes(tmp_path, caplog):
    source = build_backbone(SMALL | {"num_classes": 7})
    save_checkpoint(source.state_dict(), tmp_path / "w.safetensors")
    model = build_backbone(SMALL | {"checkpoint": str(tmp_path / "w.safetensors")})
    assert "has 7 classes, the model 10" in caplog.text
    torch.testing.assert_close(model.pos_embed, source.pos_embed)
    assert model.head.out_features == 10


def test_start_from_weights_of_a_training_run_at_another_size(tmp_path):
    source = VimClassifier(SMALL)
    torch.save({"model": source.state_dict()}, tmp_path / "iter_00000005.pth")
    options = {"img_size": 64, "checkpoint": str(tmp_path / "iter_00000005.pth")}
    model = build_backbone(SMALL | options)
    assert model.pos_embed.shape[1] == 17
    torch.testing.assert_close(model.head.weight, source.backbone.head.weight)


def test_weights_that_do_not_fit(tmp_path):
    source = build_backbone(SMALL | {"depth": 3})
    save_checkpoint(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RuntimeError, match=r"blocks\.2"):
        build_backbone(SMALL | {"checkpoint": str(tmp_path / "w.safetensors")})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_backbone({"img_size": 32}), "needs the key 'name'"),
        (lambda: build_loss("hinge"), "soft-target, cross-entropy, bce"),
        (lambda: build_loss("cross-entropy", target_threshold=0.1), "takes no target_threshold"),
        (lambda: VimClassifier(SMALL, distillation={"teacher": "x", "kind": "x"}), "'soft' or"),
        (lambda: VimClassifier(SMALL, distillation={"teacher": "x", "weight": 2}), "0 to 1"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


MOE = {"name": "moe_mamba_tiny_patch16_224", "img_size": 32, "depth": 2, "num_classes": 3}


def test_experts_add_their_load_balance_loss():
    model = VimClassifier(MOE, load_balance=0.5)
    losses = model(torch.randn(2, 3, 32, 32), torch.tensor([0, 2]), mode="loss")
    assert set(losses) == {"loss", "loss_balance"}
    expected = 0.5 * load_balance_loss(model.backbone)
    assert expected.item() > 0
    torch.testing.assert_close(losses["loss_balance"], expected)
    losses["loss_balance"].backward()
    routers = [p.grad for n, p in model.named_parameters() if "router" in n]
    assert routers
    assert all(grad.abs().sum() > 0 for grad in routers)


def test_a_convolutional_stem_for_any_of_our_models():
    options = {"img_size": 32, "depth": 1, "embed_layer": "conv"}
    for name in ("mamba_tiny_patch16_224", "vim_tiny_patch16_224", "deit_tiny_patch16_224"):
        model = VimClassifier({"name": name, **options})
        assert type(model.backbone.patch_embed).__name__ == "ConvStem"
