"""The detector in the engine: losses, average precision, files, whole runs."""

import builtins
import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from vim.engine import detection_metrics
from vim.engine._annotations import mask_of
from vim.engine.classifier import build_backbone
from vim.engine.config import load_config
from vim.engine.detection import VimDetector
from vim.engine.detection_data import build_loader
from vim.engine.detection_metrics import DetectionMetric, detections_of, segmentation_of
from vim.models import save_checkpoint

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs/detection/vim-debug-mask-rcnn_1xb2_made-up.py"
DATA = ROOT.parent / "shared/data"
C = 3


def model_config(**changes):
    config = Config.fromfile(DEBUG).model
    config.update(changes)
    return config


def made_up(is_training=False, count=8, **options):
    cfg = {"task": "detection", "batch_size": 4, **options}
    cfg["dataset"] = {"name": "made-up", "num_samples": count, "masks": True, "split": "train"}
    if is_training:
        still = {"scale": (1.0, 1.0), "hflip": 0}
        cfg |= {"crop_size": (64, 80), "augmentation": still}
    return build_loader(cfg, is_training=is_training)


def test_losses_and_predictions():
    model = MODELS.build(model_config())
    batch = next(iter(made_up(True)))
    data = model.data_preprocessor(batch, True)
    assert (data["images"][0].min(), data["images"][0].max()) <= (1, 1)
    expected = (batch["images"][0].float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(data["images"][0], expected)
    losses = model(**data, mode="loss")
    assert all(name.startswith("loss") and loss.isfinite() for name, loss in losses.items())
    model.eval()
    batch = next(iter(made_up()))
    data = model.data_preprocessor(batch)
    outputs = model(**data, mode="predict")
    assert outputs["targets"] is batch["targets"]
    assert outputs["num_classes"] == C
    assert len(outputs["predictions"]) == 4
    found = model(data["images"])
    assert torch.equal(found[0]["boxes"], outputs["predictions"][0]["boxes"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_graph_changes_no_step(device):
    """Losses and gradients, of batches of two sizes; on a CPU there is no graph."""
    torch.use_deterministic_algorithms(False)  # with it, torchvision compiles its RoIAlign on a GPU
    model = MODELS.build(model_config()).to(device)
    graphed = MODELS.build(model_config(cuda_graph=True)).to(device)
    graphed.load_state_dict(model.state_dict())
    batches = list(made_up(True))
    batches += [{key: batches[0][key][:3] for key in ("images", "targets")}, batches[1]]
    for step, batch in enumerate(batches):
        results = []
        for each in (graphed, model):
            each.zero_grad()
            torch.manual_seed(step)  # which regions train is drawn
            losses = each(**each.data_preprocessor(batch, True), mode="loss")
            sum(losses.values()).backward()
            results.append((losses, {name: p.grad.clone() for name, p in each.named_parameters()}))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    graphed.eval()
    with torch.no_grad():
        assert len(graphed(graphed.data_preprocessor(batches[0])["images"])) == 4


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_it_starts_from_a_classifier(tmp_path, prefix):
    config = model_config()
    options = dict(config.backbone) | {"img_size": 96}
    classifier = timm.create_model(options.pop("name"), **options)
    path = tmp_path / "weights.safetensors"
    save_checkpoint({prefix + n: x for n, x in classifier.state_dict().items()}, path)
    config.backbone.update(checkpoint=str(path), class_token=False)
    encoder = MODELS.build(config).backbone.pyramid.backbone.model
    for name, tensor in classifier.blocks.state_dict().items():
        assert torch.equal(encoder.blocks.state_dict()[name], tensor), name
    assert not encoder.has_class_token


def test_deit_starts_from_a_classifier(tmp_path):
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    classifier = timm.create_model("deit_tiny_patch16_224", img_size=96, num_classes=5, **small)
    path = tmp_path / "weights.safetensors"
    save_checkpoint(classifier.state_dict(), path)
    backbone = {"name": "deit_tiny_patch16_224", "dynamic_img_size": True, **small}
    config = model_config()
    config.backbone = {**backbone, "checkpoint": str(path)}
    encoder = MODELS.build(config).backbone.pyramid.backbone.model
    for name, tensor in classifier.blocks.state_dict().items():
        assert torch.equal(encoder.blocks.state_dict()[name], tensor), name
    path.unlink()
    save_checkpoint({k: v for k, v in classifier.state_dict().items() if "blocks.1" not in k}, path)
    with pytest.raises(RuntimeError, match="does not fit the model: it lacks"):
        MODELS.build(config)


def test_deit_with_a_convolutional_stem(tmp_path):
    """As the classifier that it starts from, and of images of any size."""
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "class_token": False}
    small |= {"name": "deit_tiny_patch16_224", "embed_layer": "conv", "global_pool": "avg"}
    classifier = build_backbone({**small, "img_size": 32, "num_classes": 5})
    path = tmp_path / "weights.safetensors"
    save_checkpoint(classifier.state_dict(), path)
    config = model_config()
    config.backbone = {**small, "dynamic_img_size": True, "checkpoint": str(path)}
    model = MODELS.build(config).eval()
    stem = model.backbone.pyramid.backbone.model.patch_embed.stem
    assert torch.equal(stem[0].conv.weight, classifier.patch_embed.stem[0].conv.weight)
    with torch.no_grad():
        assert len(model([torch.zeros(3, 40, 70)])) == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown key 'x' in model\.inference"):
        VimDetector(C, {}, inference={"x": 1})
    model = MODELS.build(model_config())
    with pytest.raises(ValueError, match="mode must be"):
        model([torch.zeros(3, 64, 64)], mode="train")
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"set dataset.masks=True or model.masks=False"):
        model([torch.zeros(3, 64, 64)], [target], mode="loss")
    with pytest.raises(TypeError, match="images must be uint8"):
        model.data_preprocessor({"images": [torch.zeros(3, 8, 8)]})


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("torchvision"):
            raise ModuleNotFoundError("no torchvision", name="torchvision")
        return real(name, *arguments)

    for module in ("vim.heads.detector", "vim.heads.cascade"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs torchvision.*vim-mamba\[dense\]"):
        MODELS.build(model_config())


def test_other_tasks_need_no_library_of_detection():
    code = f"""
import sys
sys.modules["faster_coco_eval"] = None
from vim.engine.config import load_config
load_config({str(ROOT / "configs/vim/vim-debug_1xb4_made-up.py")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def truth(targets, shift=0.0, score=1.0):
    """What a detector would say that knows the truth, its boxes moved to the right."""
    found = []
    for target in targets:
        objects = target["annotations"]
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, ::2] += shift
        masks = [torch.from_numpy(mask_of(o["segmentation"], *target["size"])) for o in objects]
        found.append(
            {
                "boxes": boxes,
                "labels": torch.tensor([each["label"] for each in objects], dtype=torch.int64),
                "scores": torch.full((len(objects),), score),
                "masks": torch.stack(masks)[:, None].float(),
            }
        )
    return found


def processed(predict, count=8, **options):
    metric = DetectionMetric(**options)
    for batch in made_up(count=count):
        outputs = {"predictions": predict(batch["targets"]), "targets": batch["targets"]}
        metric.process(batch, {**outputs, "num_classes": C})
    return metric


def test_the_truth_is_perfect():
    figures = processed(truth).evaluate(8)
    names = ("AP", "AP50", "AP75", "AP_small")
    assert figures == {f"{kind}_{name}": 100 for kind in ("box", "mask") for name in names}


def test_boxes_that_are_off():
    """By a part of their width: the IoU counts, and masks, which stay, are none the worse."""
    figures = processed(lambda targets: truth(targets, shift=3.0)).evaluate(8)
    assert 0 < figures["box_AP"] < 70
    assert figures["box_AP50"] == pytest.approx(100)
    assert figures["mask_AP"] == pytest.approx(100)


def test_figures_against_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    def noisy(targets):
        generator = torch.Generator().manual_seed(targets[0]["image_id"])
        found = truth(targets)
        for each in found:
            each["boxes"] += 4 * torch.rand(each["boxes"].shape, generator=generator)
            each["scores"] = torch.rand(len(each["scores"]), generator=generator)
        return found

    figures = processed(noisy).evaluate(8)
    reference = MeanAveragePrecision(iou_type="bbox", backend="faster_coco_eval")
    for batch in made_up():
        wanted = truth(batch["targets"])
        keys = ("boxes", "labels")
        reference.update(noisy(batch["targets"]), [{k: w[k] for k in keys} for w in wanted])
    expected = reference.compute()
    for ours, theirs in (("AP", "map"), ("AP50", "map_50"), ("AP75", "map_75")):
        # Boxes are rounded to hundredths of a pixel in COCO's format.
        assert figures[f"box_{ours}"] == pytest.approx(100 * expected[theirs].item(), abs=0.1)


def test_small_medium_large():
    sizes = {"small": 20, "medium": 60, "large": 120}
    for name, side in sizes.items():
        each = {"bbox": [0, 0, side, side], "area": side * side, "iscrowd": 0, "label": 1}
        target = {"image_id": 5, "size": (200, 200), "file_name": "x", "annotations": [each]}
        box = torch.tensor([[0.0, 0.0, side, side]])
        found = {"boxes": box, "labels": torch.ones(1, dtype=torch.long), "scores": torch.ones(1)}
        metric = DetectionMetric(overlays=0)
        outputs = {"predictions": [found], "targets": [target], "num_classes": 1}
        metric.process({"images": [torch.zeros(3, 200, 200)]}, outputs)
        figures = metric.evaluate(1)
        assert set(figures) == {"box_AP", "box_AP50", "box_AP75", f"box_AP_{name}"}
        assert figures[f"box_AP_{name}"] == pytest.approx(100)


def test_nothing_found_is_zero():
    def nothing(targets):
        return [{k: v[:0] for k, v in each.items()} for each in truth(targets)]

    metric = processed(nothing)
    assert set(metric.evaluate(8).values()) == {0.0}
    assert metric.report.per_class[0].box_AP == 0
    assert "| 0 " in metric.report.table()


def test_crowds_do_not_count():
    objects = [
        {"bbox": [0, 0, 20, 20], "area": 400, "iscrowd": crowd, "label": 1, "id": crowd}
        for crowd in (0, 1)
    ]
    objects[1]["bbox"] = [100, 100, 50, 50]
    target = {"image_id": 1, "size": (200, 200), "file_name": "x", "annotations": objects}
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [110.0, 110.0, 130.0, 130.0]])
    found = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.long), "scores": torch.ones(2)}
    metric = DetectionMetric(overlays=0)
    outputs = {"predictions": [found], "targets": [target], "num_classes": 1}
    metric.process({"images": [torch.zeros(3, 200, 200)]}, outputs)
    assert metric.evaluate(1)["box_AP"] == pytest.approx(100)
    assert metric.report.per_class[0].objects == 1


def test_processes_add_up(monkeypatch):
    whole = processed(truth).evaluate(8)
    metric, other = processed(truth), DetectionMetric()
    results = metric.results[:4]
    half = len(results[0]) // 2
    ids = {target["image_id"] for target in results[0][:half]}
    parts = [
        [results[0][:half], [d for d in results[1] if d["image_id"] in ids], C, True],
        [results[0][half:], [d for d in results[1] if d["image_id"] not in ids], C, True],
    ]
    monkeypatch.setattr(detection_metrics, "all_gather_object", lambda mine: parts)
    assert other.evaluate(8) == whole
    assert metric.evaluate(8) == whole
    assert metric.results == []


def test_what_cannot_be_evaluated_is_refused(caplog):
    with pytest.raises(ValueError, match="no image was evaluated"):
        DetectionMetric().evaluate(0)
    metric = processed(truth)
    metric.results[2] = 1
    with pytest.raises(ValueError, match=r"have \d classes or more, the detector 1"):
        metric.evaluate(8)
    with pytest.raises(ValueError, match="class_names must be of the 3 classes, got 1"):
        processed(truth, class_names=["a"]).evaluate(8)
    metric = processed(truth)
    for target in metric.results[0]:
        target["annotations"] = []
    metric.results[1] = []
    with pytest.raises(ValueError, match="none has an object"):
        metric.evaluate(8)
    processed(truth).evaluate(5)
    assert "evaluated 8 images of a dataset of 5" in caplog.text


def test_files(tmp_path):
    metric = processed(truth, class_names=["cat", "dog", "tree|bush"], overlays=2)
    metric.dataset_meta = {"category_ids": [4, 5, 9], "faults": [("kind", "where", "why", "out")]}
    figures = metric.evaluate(8)
    metric.report.facts = {"model": "m", "run": {"torch": "2"}}
    metric.report.write(tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: record[name] for name in figures} == figures
    assert (record["images"], record["broken_annotations"]) == (8, 1)
    with open(tmp_path / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["cat", "dog", "tree|bush"]
    assert {row["box_AP"] for row in rows if int(row["objects"])} == {"100.0"}
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert {each["category_id"] for each in found} <= {4, 5, 9}
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert "| broken annotations | 1" in (tmp_path / "table.md").read_text()
    assert "kind,where,reason,action" in (tmp_path / "faults.csv").read_text()
    assert len(list((tmp_path / "overlays").iterdir())) == 2
    with Image.open(tmp_path / "overlays/0000.png") as image:
        assert image.width == 2 * 80 + 8


def test_masks_survive_the_run_lengths():
    mask = torch.zeros(7, 5, dtype=torch.bool)
    mask[2:4, 1:] = True
    record = json.loads(json.dumps(segmentation_of(mask)))
    assert torch.equal(torch.from_numpy(mask_of(record, 7, 5)).bool(), mask)
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 5.0, 4.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.5]),
        "masks": mask[None, None].float(),
    }
    (record,) = detections_of(found, 7)
    assert record["bbox"] == [1, 2, 4, 2]
    assert record["segmentation"] == segmentation_of(mask)


def tool(name):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("cascade", [False, True], ids=["plain", "cascade"])
def test_a_run_resumed_is_a_run_undisturbed_and_can_be_tested(tmp_path, cascade):
    train = tool("train")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, epochs in ((whole, 2), (parts, 1), (parts, 2)):
        name = f"experiment_name=detect-{folder.name}-{epochs}-{cascade}"
        options = ["--cfg-options", f"train_cfg.max_epochs={epochs}", name]
        options += [f"model.cascade={cascade}", "train_dataloader.dataset.num_samples=6"]
        resume = ["--resume"] if (folder / "metrics.jsonl").exists() else []
        assert train.main([str(DEBUG), "--work-dir", str(folder), *resume, *options]) == 0
    curves = [[x["loss"] for x in lines(f) if x["stage"] == "train"] for f in (whole, parts)]
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]
    last = [line for line in lines(whole) if line["stage"] == "val"][-1]
    assert (whole / "best_box_AP.pth").is_file()
    options = ["--checkpoint", str(whole), "--device", "cpu", "--work-dir", str(tmp_path / "test")]
    options += ["--cfg-options", f"model.cascade={cascade}"]
    assert tool("test").main([str(DEBUG), *options]) == 0
    record = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert record["box_AP"] == pytest.approx(last["box_AP"])
    assert len(list((tmp_path / "test" / "overlays").iterdir())) == 4


@pytest.mark.slow
def test_it_learns():
    """A few images by heart, boxes and masks: what is trained is what is evaluated."""
    torch.manual_seed(0)
    config = model_config(channels=32, fc_channels=64, anchor_sizes=(16, 24, 32, 48, 64))
    config.backbone.update(patch_size=8, embed_dim=64)
    model = MODELS.build(config)
    batch = next(iter(made_up(True, count=4)))
    data = model.data_preprocessor(batch, True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    steps = 200
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 10) * cosine
        losses = sum(model(**data, mode="loss").values())
        optimizer.zero_grad()
        losses.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metric = DetectionMetric()
    model.eval()
    with torch.no_grad():
        for batch in made_up(count=4):
            metric.process(batch, model(**model.data_preprocessor(batch), mode="predict"))
    figures = metric.evaluate(4)
    assert figures["box_AP"] > 80
    assert figures["mask_AP"] > 80


CONFIGS = sorted((ROOT / "configs/detection").glob("*.py"))
CONFIGS += [ROOT / "configs/segmentation/deit-tiny-upernet_1xb8_camvid11.py"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_build(path):
    """Each config's model, at its full size, and every key of its parts."""
    config = load_config(path)
    model = MODELS.build(config.model)
    matcher = model.backbone.group_matcher()
    assert {"stem", "blocks"} == set(matcher)
    for key in ("train", "val", "test"):
        assert config[f"{key}_dataloader"].task in ("detection", "segmentation")


def test_options_of_the_command_line():
    options = ["model.cascade=True", "model.inference.score_threshold=0.1"]
    options += ["train_dataloader.augmentation.hflip=0.0", "train_dataloader.dataset.on_fault=drop"]
    config = load_config(ROOT / "configs/detection/vim-tiny-faster-rcnn_1xb8_bccd.py", options)
    assert config.model.cascade is True
    with pytest.raises(ValueError, match="did you mean on_fault"):
        load_config(
            ROOT / "configs/detection/vim-tiny-faster-rcnn_1xb8_bccd.py",
            ["train_dataloader.dataset.on_fualt=drop"],
        )
