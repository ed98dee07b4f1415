"""Cascade heads against torchvision's own, and stage by stage."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou

from vim.heads.cascade import IOUS, WEIGHTS, CascadeRoIHeads, _ScaleGradient
from vim.heads.detector import _AgnosticBoxPredictor

SIZE = (64, 96)
OPTIONS = {
    "batch_size_per_image": 16,
    "positive_fraction": 0.25,
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 10,
}


def pool():
    return MultiScaleRoIAlign(["0", "1", "2", "3"], 3, 2)


def head():
    return nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 8), nn.ReLU())


def predictor(classes=4):
    return _AgnosticBoxPredictor(8, classes)


def cascade(stages=3):
    return CascadeRoIHeads(
        pool(),
        [head() for _ in range(stages)],
        [predictor() for _ in range(stages)],
        ious=IOUS[:stages],
        box_weights=WEIGHTS[:stages],
        **OPTIONS,
    )


def inputs(images=2):
    features = {
        str(i): torch.randn(images, 4, SIZE[0] // s, SIZE[1] // s, requires_grad=True)
        for i, s in enumerate((4, 8, 16, 32))
    }
    corners = torch.rand(images, 30, 2) * 40
    proposals = list(torch.cat([corners, corners + 8 + 20 * torch.rand(images, 30, 2)], dim=2))
    boxes = torch.tensor([[10.0, 10.0, 30.0, 40.0], [50.0, 20.0, 90.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    return features, proposals, [SIZE] * images, [target] * images


def test_one_stage_is_torchvisions_heads():
    ours = cascade(1)
    theirs = RoIHeads(
        pool(),
        ours.box_head[0],
        ours.box_predictor[0],
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        bbox_reg_weights=WEIGHTS[0],
        **OPTIONS,
    )
    features, proposals, sizes, targets = inputs()
    torch.manual_seed(0)
    _, losses = ours(features, list(proposals), sizes, targets)
    torch.manual_seed(0)
    _, expected = theirs(features, list(proposals), sizes, targets)
    assert losses["loss_classifier_1"] == expected["loss_classifier"]
    assert losses["loss_box_reg_1"] == expected["loss_box_reg"]
    with torch.no_grad():
        found, _ = ours.eval()(features, list(proposals), sizes)
        expected, _ = theirs.eval()(features, list(proposals), sizes)
    for mine, other in zip(found, expected, strict=True):
        assert len(mine["boxes"]) > 0
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(mine[name], other[name])


def test_each_stage_has_its_own_threshold_and_weights():
    heads = cascade()
    box = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    # IoU 0.65 with the box: an object for the first two stages, background for the third.
    region = torch.tensor([[0.0, 0.0, 20.0, 13.0]])
    assert box_iou(box, region).item() == pytest.approx(0.65)
    target = [{"boxes": box, "labels": torch.tensor([2])}]
    for stage, expected in enumerate((2, 2, 0)):
        (labels,), (wanted,) = heads._matched(stage, [region], target)
        assert labels.tolist() == [expected]
        torch.testing.assert_close(wanted, BoxCoder(WEIGHTS[stage]).encode_single(box, region))
    (labels,), (wanted,) = heads._matched(
        1, [region], [{"boxes": box[:0], "labels": torch.zeros(0, dtype=torch.long)}]
    )
    assert (labels.tolist(), wanted.shape) == ([0], (1, 4))


def test_regions_are_refined_from_stage_to_stage(monkeypatch):
    """A predictor that knows the way gives the true box in the end, within the image."""
    heads = cascade().eval()
    goal = torch.tensor([[40.0, 10.0, 70.0, 50.0]])
    seen = []

    def stage(number, features, proposals, sizes):
        seen.append(proposals[0].clone())
        deltas = heads.coders[number].encode([goal.expand_as(proposals[0])], proposals)[0]
        logits = torch.tensor([[0.0, 6.0 + number, 0.0, 0.0]]).expand(len(proposals[0]), 4)
        return logits, deltas.repeat(1, 4)

    monkeypatch.setattr(heads, "_stage", stage)
    features, proposals, sizes, _ = inputs(1)
    found, losses = heads(features, proposals, sizes)
    assert losses == {}
    torch.testing.assert_close(seen[0], proposals[0])
    torch.testing.assert_close(seen[2], goal.expand(30, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[0]["boxes"], goal, atol=1e-3, rtol=0)
    expected = torch.stack(
        [torch.tensor([0.0, 6.0 + i, 0.0, 0.0]).softmax(0)[1] for i in range(3)]
    ).mean()
    torch.testing.assert_close(found[0]["scores"], expected[None])


def test_no_gradient_flows_through_refined_boxes_and_each_stage_learns():
    heads = cascade()
    features, proposals, sizes, targets = inputs()
    _, losses = heads(features, proposals, sizes, targets)
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad.isfinite().all(), name
    first = [p.grad.clone() for p in heads.box_head[0].parameters()]
    heads.zero_grad()
    torch.manual_seed(0)
    _, losses = heads(features, inputs()[1], sizes, targets)
    (losses["loss_classifier_3"] + losses["loss_box_reg_3"]).backward()
    assert all(p.grad is None for p in heads.box_head[0].parameters())
    assert len(first) == 2


def test_the_gradient_is_shared():
    x = torch.ones(3, requires_grad=True)
    _ScaleGradient.apply(x, 0.25).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 0.25))


@pytest.mark.parametrize("training", [True, False])
def test_no_region_at_all(training):
    heads = cascade().train(training)
    features, proposals, sizes, _ = inputs(1)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]
    found, losses = heads(features, [proposals[0][:0]], sizes, nothing)
    assert all(loss.isfinite() for loss in losses.values())
    assert found == [] if training else len(found[0]["boxes"]) == 0


def test_as_many_of_each():
    with pytest.raises(ValueError, match="for each stage, got 2, 3, 3 and 3"):
        CascadeRoIHeads(pool(), [head()] * 2, [predictor()] * 3, **OPTIONS)
