"""The figures of an evaluation against sums by hand and torchmetrics, and the files of a report."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("mmengine")
pytest.importorskip("torchmetrics")

from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from vim.engine import metrics
from vim.engine.metrics import ClassificationMetric, ClassResult, EvaluationReport, evaluate
from vim.engine.plots import calibration_figure, confusion_figure

FIGURES = ("top1", "top5", "mean_class_accuracy", "loss", "ece")


def logits_and_targets(images: int, classes: int, dtype=torch.float32):
    """Return predictions that are right now and then, of classes that all have images."""
    targets = torch.arange(images) % classes
    logits = torch.randn(images, classes)
    logits[torch.arange(images), targets] += 1.5
    return logits.to(dtype), targets


def report_of(logits, targets, batch_size=7, **kwargs) -> EvaluationReport:
    batches = zip(logits.split(batch_size), targets.split(batch_size), strict=True)
    batches = [{"images": x, "targets": y} for x, y in batches]
    return evaluate(lambda batch: batch["images"], batches, ClassificationMetric(**kwargs))


def by_hand(logits, targets) -> dict[str, float]:
    """Return the figures in plain Python, image by image."""
    rows = logits.double().softmax(1).tolist()
    right, among_five, losses = [], [], []
    per_class: dict[int, list[bool]] = {}
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(rows, targets.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index: -row[index])
        right.append(order[0] == target)
        among_five.append(target in order[:5])
        losses.append(-math.log(row[target]))
        per_class.setdefault(target, []).append(right[-1])
        bins.setdefault(min(int(max(row) * 15), 14), []).append((max(row), right[-1]))
    distances = [abs(sum(c - r for c, r in members)) for members in bins.values()]
    accuracies = [sum(values) / len(values) for values in per_class.values()]
    count = len(rows)
    return {
        "top1": 100 * sum(right) / count,
        "top5": 100 * sum(among_five) / count,
        "mean_class_accuracy": 100 * sum(accuracies) / len(accuracies),
        "loss": sum(losses) / count,
        "ece": 100 * sum(distances) / count,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("images", "classes"), [(1, 1), (5, 2), (97, 3), (100, 5), (400, 37)])
def test_figures_are_the_sums(images, classes, dtype):
    # No two logits of an image are equal in any dtype: which of equals comes first is left open.
    logits = (torch.rand(images, classes).argsort(1) / 8).to(dtype)
    targets = torch.where(
        torch.rand(images) < 0.5, logits.argmax(1), torch.arange(images) % classes
    )
    found = report_of(logits, targets).scalars()
    assert found == pytest.approx(by_hand(logits, targets), rel=1e-5, abs=1e-6)


def test_figures_are_those_of_torchmetrics():
    logits, targets = logits_and_targets(500, 20)
    found = report_of(logits, targets).scalars()
    expected = {
        "top1": 100 * multiclass_accuracy(logits, targets, 20, average="micro"),
        "top5": 100 * multiclass_accuracy(logits, targets, 20, average="micro", top_k=5),
        "mean_class_accuracy": 100 * multiclass_accuracy(logits, targets, 20, average="macro"),
        "loss": F.cross_entropy(logits, targets),
        "ece": 100 * multiclass_calibration_error(logits.softmax(1), targets, 20, n_bins=15),
    }
    assert tuple(found) == FIGURES
    assert found == pytest.approx({name: x.item() for name, x in expected.items()}, rel=1e-5)


def test_each_class_is_as_torchmetrics_says():
    logits, targets = logits_and_targets(300, 12)
    report = report_of(logits, targets)
    rows = report.per_class()
    accuracy = multiclass_accuracy(logits, targets, 12, average="none")
    assert [row.accuracy for row in rows] == pytest.approx((100 * accuracy).tolist())
    matrix = multiclass_confusion_matrix(logits, targets, 12)
    assert torch.equal(report.confusion_matrix(), matrix)
    assert [row.images for row in rows] == matrix.sum(1).tolist()
    assert [row.predicted for row in rows] == matrix.sum(0).tolist()
    assert [row.correct for row in rows] == matrix.diag().tolist()
    mistakes = (matrix - matrix.diag().diag()).max(1).values
    assert [row.mistakes for row in rows] == mistakes.tolist()
    assert sum(c.images for c in report.confusions) == matrix.sum() - matrix.trace()
    assert report.confusions[0].images == mistakes.max()


def test_four_images_by_hand():
    half, most = math.log(2), math.log(6)
    logits = torch.tensor([[half, 0, 0], [0, most, 0], [0, most, 0], [0.0, 0, most]])
    report = report_of(logits, torch.tensor([0, 1, 2, 2]), class_names=["ant", "bee", "cow"])
    # Confidences 1/2, 3/4, 3/4, 3/4; the third is wrong.
    assert report.scalars() == pytest.approx(
        {
            "top1": 75.0,
            "top5": 100.0,
            "mean_class_accuracy": 100 * (1 + 1 + 1 / 2) / 3,
            "loss": (math.log(2) + 2 * math.log(4 / 3) + math.log(8)) / 4,
            "ece": 100 * (1 / 4 * 1 / 2 + 3 / 4 * (3 / 4 - 2 / 3)),
        }
    )
    assert report.per_class() == [
        ClassResult(0, "ant", 1, 1, 1, "", 0),
        ClassResult(1, "bee", 1, 1, 2, "", 0),
        ClassResult(2, "cow", 2, 1, 1, "bee", 1),
    ]
    assert report.confusion_matrix().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    filled = [b for b in report.calibration() if b.images]
    assert [(b.images, b.accuracy) for b in filled] == [(1, 1.0), (3, pytest.approx(2 / 3))]
    assert [b.low for b in filled] == pytest.approx([7 / 15, 11 / 15])


def test_a_class_without_images_counts_for_nothing():
    logits = torch.eye(3)[[0, 1, 1]] * 9
    report = report_of(logits, torch.tensor([0, 0, 1]))
    assert report.scalars()["mean_class_accuracy"] == 75
    assert [row.accuracy for row in report.per_class()] == [50, 100, None]
    assert "class 2" not in report.table()


def test_certainty_is_in_the_last_bin():
    logits = 200 * torch.eye(3)[[0, 1, 2, 0]]
    report = report_of(logits, torch.tensor([0, 1, 2, 1]))
    assert report.confidence.tolist() == [1, 1, 1, 1]
    last = report.calibration()[-1]
    assert (last.images, last.accuracy) == (4, 0.75)
    assert last.confidence == pytest.approx(1)
    assert report.scalars()["ece"] == pytest.approx(25)


def test_bins_make_up_the_calibration_error():
    report = report_of(*logits_and_targets(333, 6))
    bins = report.calibration()
    error = sum(b.images * abs(b.accuracy - b.confidence) for b in bins) / 333
    assert 100 * error == pytest.approx(report.scalars()["ece"])
    assert all(b.low <= b.confidence <= b.high for b in bins if b.images)


@pytest.mark.parametrize("batch_size", [1, 64, 1000])
def test_the_size_of_batches_changes_nothing(batch_size):
    logits, targets = logits_and_targets(200, 9)
    assert report_of(logits, targets, batch_size).scalars() == report_of(logits, targets).scalars()


def test_grouped_neighbours_add_up():
    report = report_of(*logits_and_targets(500, 23))
    matrix = torch.zeros(24, 24, dtype=torch.long)
    matrix[:23, :23] = report.confusion_matrix()
    assert torch.equal(report.confusion_matrix(12), matrix.view(12, 2, 12, 2).sum((1, 3)))


def test_in_mmengine():
    metric = METRICS.build({"type": "VimClassificationMetric", "class_names": list("abc")})
    evaluator = Evaluator(metric)
    for _ in range(2):  # nothing stays behind from one validation to the next
        logits, targets = logits_and_targets(6, 3)
        evaluator.process([{"logits": logits, "targets": targets}], None)
        assert evaluator.evaluate(6) == metric.report.scalars()
        assert len(metric.report.targets) == 6
    assert metric.report.class_names == list("abc")


def test_names_of_the_data_set_and_prefix():
    metric = ClassificationMetric(prefix="raw")
    metric.dataset_meta = {"classes": ("a", "b")}
    logits, targets = logits_and_targets(4, 2)
    metric.process(None, {"logits": logits, "targets": targets})
    assert list(metric.evaluate(4)) == [f"raw/{name}" for name in FIGURES]
    assert metric.report.class_names == ("a", "b")
    metric.process(None, {"logits": torch.zeros(2, 3), "targets": torch.zeros(2, dtype=torch.long)})
    metric.evaluate(2)
    assert metric.report.class_names == ["class 0", "class 1", "class 2"]


def test_all_processes_are_asked(monkeypatch, caplog):
    logits, targets = logits_and_targets(21, 4)
    parts = []
    for rows in (slice(0, 8), slice(8, 16)):
        metric = ClassificationMetric()
        metric.process(None, {"logits": logits[rows], "targets": targets[rows]})
        parts.append(metric.results)
    metric = ClassificationMetric()
    metric.process(None, {"logits": logits[16:], "targets": targets[16:]})
    expected = report_of(logits, targets).scalars()
    monkeypatch.setattr(metrics, "all_gather_object", lambda mine: [*parts, mine])
    assert metric.evaluate(21) == expected
    assert "dataset" not in caplog.text


def test_another_number_of_images_is_told(caplog):
    metric = ClassificationMetric()
    logits, targets = logits_and_targets(4, 2)
    metric.process(None, {"logits": logits, "targets": targets})
    metric.evaluate(5)
    assert "evaluated 4 images of a dataset of 5" in caplog.text


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "no image was evaluated"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "classes 0 to 2 of the model, got 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "got -1 to 0"),
        (torch.zeros(2, 3), torch.zeros(2), "targets .B,. integers, got .2, 3. and .2,."),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), r"got \(2, 3\) and \(3,\)"),
        (torch.zeros(2, 3, 1), torch.tensor([0, 1]), r"got \(2, 3, 1\)"),
        (torch.tensor([[0, math.nan]]), torch.tensor([0]), "1 of 1 images are not finite"),
        (torch.tensor([[0, math.inf]]), torch.tensor([0]), "not finite.*bfloat16 or float32"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(logits, targets, message):
    metric = ClassificationMetric()

    def run():
        metric.process(None, {"logits": logits, "targets": targets})
        metric.evaluate(len(logits))

    with pytest.raises(ValueError, match=message):
        run()


def test_bad_use():
    with pytest.raises(ValueError, match="no image was evaluated"):
        ClassificationMetric().evaluate(0)
    with pytest.raises(TypeError, match=r"hand \[outputs\], a list, to Evaluator.process"):
        Evaluator(ClassificationMetric()).process({"logits": 1, "targets": 2})
    with pytest.raises(ValueError, match="must be of the 3 classes, got 2"):
        report_of(*logits_and_targets(4, 3), class_names=["a", "b"])
    metric = ClassificationMetric()
    for classes in (3, 4):
        logits, targets = logits_and_targets(4, classes)
        metric.process(None, {"logits": logits, "targets": targets})
    with pytest.raises(ValueError, match=r"the same classes, got \[3, 4\]"):
        metric.evaluate(8)


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_written_files(classes, tmp_path):
    names = [f"$ {index} | \\alpha" + " long" * (index % 20) for index in range(classes)]
    report = report_of(*logits_and_targets(1500, classes), class_names=names)
    report.facts = {"model": "vim|x", "speed": 1234.5, "machine": {"torch": "2"}}
    folder = tmp_path / "a" / "b"
    report.write(folder)
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "per_class.csv", "confusion.png", "calibration.png", "table.md")
    }

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)
    assert {name: record[name] for name in FIGURES} == report.scalars()
    assert (record["images"], record["classes"], record["model"]) == (1500, classes, "vim|x")
    assert sum(each["images"] for each in record["calibration"]) == 1500
    with open(folder / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert sum(int(row["correct"]) for row in rows) == pytest.approx(15 * record["top1"])
    for name in ("confusion.png", "calibration.png"):
        with Image.open(folder / name) as image:
            assert 450 < min(image.size) < max(image.size) < 2000
    table = (folder / "table.md").read_text()
    assert "| vim\\|x" in table
    assert "1,234" in table
    assert "machine" not in table
    assert f"{record['top1']:.2f} %" in table


@pytest.mark.parametrize(("classes", "names", "numbers"), [(10, 10, True), (30, 30, False)])
def test_few_classes_are_named_and_numbered(classes, names, numbers):
    matrix = np.eye(classes, dtype=int) * 9
    matrix[0, 1] = 1
    labels = [f"n{index}" for index in range(classes)]
    figure = confusion_figure(matrix, labels, [("n0", "n1", 1)])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == labels[:names]
    texts = [text.get_text() for text in axes.texts]
    assert texts == (["90", "10", *["100"] * (classes - 1)] if numbers else [])
    others = [text.get_text() for each in figure.axes[1:] for text in each.texts]
    assert ("n0 → n1" in others) == (not numbers)


def test_many_classes_show_the_worst_confusions():
    names = [f"class {index}" for index in range(1000)]
    worst = [(names[index], names[index + 1], 50 - index) for index in range(30)]
    figure = confusion_figure(np.eye(200, dtype=int), names, worst)
    assert figure.axes[0].get_ylabel() == "index of the true class"
    assert figure.axes[0].yaxis.get_major_formatter()(100, 0) == "500"
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts[:2] == ["50", "class 0 → class 1"]
    assert len(texts) == 40


def test_calibration_shows_only_bins_with_images():
    report = report_of(200 * torch.eye(3), torch.arange(3))
    top, bottom = calibration_figure(report.calibration(), 0.0).axes
    assert len(top.patches) == len(bottom.patches) == 1
