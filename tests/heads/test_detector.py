"""The detector: losses, predictions, boxes in float32, parameter groups, refusals."""

import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2

pytest.importorskip("torchvision")

from vim.heads import detector as detector_module
from vim.heads.detection_transforms import DetectionTransform
from vim.heads.detector import Detector
from vim.heads.plain_maps import PlainMaps
from vim.models import VisionMambaMaps

FEW = {
    "channels": 16,
    "fc_channels": 32,
    "proposals": 40,
    "box_samples": 32,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "short_side": 64,
    "long_side": 128,
}
every_kind = pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
every_stage = pytest.mark.parametrize("cascade", [False, True], ids=["plain", "cascade"])
BACKBONES = ("vim", "deit")


def maps(backbone="vim"):
    if backbone == "vim":
        options = {"img_size": 64, "embed_dim": 32, "depth": 2, "d_state": 4}
        return VisionMambaMaps(timm.create_model("vim_tiny_patch16_224_pyramid", **options))
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
    return PlainMaps(timm.create_model("deit_tiny_patch16_224", **options), [-1])


def build(backbone="vim", **options):
    return Detector(maps(backbone), 3, **FEW | options)


def images_and_targets():
    """Two images of one size, the second without an object."""
    boxes = [[[5.0, 10.0, 40.0, 50.0], [30.0, 5.0, 70.0, 30.0]], []]
    targets = []
    for each in boxes:
        masks = torch.zeros(len(each), 64, 80, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, each, strict=True):
            mask[int(top) : int(bottom), int(left) : int(right)] = 1
        labels = torch.arange(1, len(each) + 1)
        box = torch.tensor(each).reshape(-1, 4)
        targets.append({"boxes": box, "labels": labels, "masks": masks})
    return [torch.randn(3, 64, 80) for _ in boxes], targets


@every_kind
@every_stage
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_step(masks, cascade, backbone):
    model = build(backbone, masks=masks, cascade=cascade)
    assert model.has_masks is masks
    images, targets = images_and_targets()
    if not masks:
        for target in targets:
            del target["masks"]
    losses = model(images, targets)
    stages = [f"_{i}" for i in (1, 2, 3)] if cascade else [""]
    expected = {"loss_objectness", "loss_rpn_box_reg", *(["loss_mask"] if masks else [])}
    expected |= {f"loss_{part}{s}" for part in ("classifier", "box_reg") for s in stages}
    assert set(losses) == expected
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_images_are_resized_as_for_training():
    """Antialiased, sides rounded."""
    model = build(short_side=48, long_side=64).eval()
    pixels = torch.randint(256, (3, 150, 333), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    transform = DetectionTransform((64, 64), scale=(1, 1), hflip=0)
    expected, _ = transform(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch, _ = model.transform([pixels.float()], None)
    assert batch.image_sizes == [(29, 64)]  # 28.8 is rounded
    torch.testing.assert_close(batch.tensors[0, :, :29], expected[:, :29].float(), rtol=0, atol=1)


def test_images_are_padded_to_the_canvas():
    """At the right and the bottom, so that boxes need not move."""
    model = build(canvas=(128, 192)).eval()
    seen = []
    handle = model.pyramid.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(3, 64, 80)
    with torch.no_grad():
        model([image])
        model([torch.randn(3, 64, 128), torch.randn(3, 128, 64)])
    handle.remove()
    assert [tuple(x.shape[2:]) for x in seen] == [(128, 192)] * 2
    assert torch.equal(seen[0][0, :, :64, :80], image)
    assert not seen[0][0, :, 64:].any()
    with pytest.raises(ValueError, match="canvas must be"):
        build(canvas=(64,))


def test_padding_does_not_move_what_regions_show():
    """Of an image that fills less than 0.7 of the canvas, as the first that a detector sees."""
    options = {"canvas": (128, 128), "short_side": 128, "score_threshold": 0.0}
    first = build(**options).eval()
    second = build(**options).eval()
    second.load_state_dict(first.state_dict())
    image = torch.randn(3, 40, 100)
    with torch.no_grad():
        second([torch.randn(3, 128, 128)])
        (found,), (expected,) = first([image]), second([image])
    assert len(found["boxes"])
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@every_kind
@every_stage
def test_prediction(masks, cascade):
    model = build(masks=masks, cascade=cascade, score_threshold=0.0, max_detections=7).eval()
    images = [torch.randn(3, 50, 70), torch.randn(3, 90, 40)]
    with torch.no_grad():
        found = model(images)
    for image, each in zip(images, found, strict=True):
        height, width = image.shape[1:]
        boxes = each["boxes"]
        assert 0 < len(boxes) <= 7
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width + 1e-3
        assert boxes[:, 3].max() <= height + 1e-3
        assert set(each["labels"].tolist()) <= {1, 2, 3}
        assert ("masks" in each) is masks
        if masks:
            assert each["masks"].shape == (len(boxes), 1, height, width)


@every_stage
def test_a_batch_of_nothing_to_find(cascade):
    model = build(cascade=cascade)
    images, targets = images_and_targets()
    losses = model([images[1]] * 2, [targets[1]] * 2)
    assert sum(losses.values()).isfinite()


@every_stage
def test_boxes_are_float32_under_autocast(cascade, monkeypatch):
    """bfloat16 would round coordinates of hundreds of pixels to whole ones."""
    model = build(cascade=cascade, score_threshold=0.0).eval()
    anchors = []
    forward = detector_module._AnchorGenerator.forward
    monkeypatch.setattr(
        detector_module._AnchorGenerator,
        "forward",
        lambda self, *args: anchors.append(forward(self, *args)) or anchors[-1],
    )
    images, _ = images_and_targets()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (first, _) = model(images)
    with torch.no_grad():
        model(images)
    assert anchors[0][0].dtype == torch.float32
    assert torch.equal(anchors[0][0], anchors[1][0])
    assert first["boxes"].dtype == first["scores"].dtype == torch.float32
    assert not torch.equal(first["boxes"], first["boxes"].bfloat16().float())


def test_anchors_lie_on_their_cells():
    """Also of the coarsest map, whatever the image's size."""
    model = build(short_side=72, long_side=100).eval()
    batch, _ = model.transform([torch.zeros(3, 72, 100)])
    features = list(model.pyramid(batch.tensors).values())
    anchors = model.rpn.anchor_generator(batch, features)[0]
    strides = [4, 8, 16, 32, 64]
    for y, stride, anchor in zip(
        features,
        strides,
        anchors.split([3 * y.shape[2] * y.shape[3] for y in features]),
        strict=True,
    ):
        centres = (anchor[:, :2] + anchor[:, 2:]) / 2
        last = torch.tensor([y.shape[3] - 1.0, y.shape[2] - 1.0]) * stride
        assert torch.equal(centres.max(0).values, last)


def test_resized_in_evaluation_alone():
    model = build()
    image = torch.randn(3, 32, 40)
    assert model.train().transform([image], None)[0].image_sizes == [(32, 40)]
    assert model.eval().transform([image])[0].image_sizes == [(64, 80)]
    assert torch.equal(model.train().transform([image], None)[0].tensors[0, :, :32, :40], image)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_layer_decay(backbone):
    """As ViTDet's: the stem decay^(L + 1), block i decay^(L - i), the rest 1."""
    model = build(backbone)
    groups = create_optimizer_v2(
        model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5
    ).param_groups
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        expected = 1.0
        if "pos_embed" in name or "patch_embed" in name or "cls_token" in name:
            expected = 0.5**3
        elif ".blocks." in name:
            expected = 0.5 ** (2 - int(name.split(".blocks.")[1].split(".")[0]))
        assert scale[id(parameter)] == expected, name
        if "pos_embed" in name or parameter.ndim == 1:
            assert decay[id(parameter)] == 0, name


def test_compile_leaves_the_heads_alone(monkeypatch):
    model, calls = build(), []
    monkeypatch.setattr(model.pyramid, "compile", lambda **options: calls.append(options))
    model.compile(dynamic=True)
    assert calls == [{"dynamic": True}]


def test_what_is_not_finite_is_said():
    model = build().eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"maps are not finite.*bfloat16"):
        model([torch.full((3, 64, 64), float("nan"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be 1 or more, without background, got 0"),
        ({"short_side": 200}, "short_side must be above 0 and at most long_side, got 200, 128"),
        ({"anchor_sizes": (8, 16)}, r"of the strides \(4, 8, 16, 32, 64\), got \(8, 16\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Detector(maps(), **{"num_classes": 3} | FEW | options)


def test_training_needs_targets():
    with pytest.raises(ValueError, match=r"needs targets in training.*eval\(\)"):
        build()([torch.zeros(3, 64, 64)])
