"""The segmenter in the engine: losses, predictions, figures against torchmetrics, whole runs."""

import builtins
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

pytest.importorskip("segmentation_models_pytorch")

from vim.engine import segmentation, segmentation_metrics
from vim.engine.config import build_runner, load_config
from vim.engine.segmentation import SegmentationPreprocessor, VimSegmenter
from vim.engine.segmentation_data import build_loader
from vim.engine.segmentation_metrics import SegmentationMetric, overlay, palette
from vim.models import save_checkpoint

ROOT = Path(__file__).parents[2]
DEBUG = ROOT / "configs/segmentation/vim-debug-upernet_1xb2_made-up.py"
CAMVID = ROOT.parent / "shared/data/camvid11.tar"
C = 4


def model_config():
    return Config.fromfile(DEBUG).model


def batch_of(images=2, size=64):
    targets = torch.randint(C, (images, size, size), dtype=torch.uint8)
    targets[:, 0] = 255
    return {"images": torch.randint(256, (images, 3, size, size), dtype=torch.uint8)} | {
        "targets": targets
    }


def test_losses():
    model = MODELS.build(model_config()).eval()
    data = model.data_preprocessor(batch_of())
    assert data["targets"].dtype == torch.int64
    assert (data["images"].min(), data["images"].max()) == (-1, 1)
    losses = model(**data, mode="loss")
    logits, auxiliary = model.backbone(data["images"], auxiliary=True)
    expected = F.cross_entropy(logits, data["targets"], ignore_index=255)
    torch.testing.assert_close(losses["loss_decode"], expected)
    expected = 0.4 * F.cross_entropy(auxiliary, data["targets"], ignore_index=255)
    torch.testing.assert_close(losses["loss_auxiliary"], expected)
    torch.testing.assert_close(model(data["images"]), logits)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("auxiliary_level", [2, None])
def test_a_graph_changes_no_step(device, auxiliary_level):
    """Losses, gradients and running statistics; on a CPU there is no graph."""
    torch.use_deterministic_algorithms(False)  # on a GPU, the training's own kernels
    config = model_config()
    config.update(auxiliary_level=auxiliary_level, dropout=0.0)
    model = MODELS.build(config).to(device)
    graphed = MODELS.build({**config, "cuda_graph": True}).to(device)
    graphed.load_state_dict(model.state_dict())
    for images in (2, 2, 3, 2):
        batch = batch_of(images)
        results = []
        for each in (graphed, model):
            each.zero_grad()
            losses = each(**each.data_preprocessor(batch), mode="loss")
            sum(losses.values()).backward()
            gradients = {name: p.grad.clone() for name, p in each.named_parameters()}
            statistics = {name: x.clone() for name, x in each.named_buffers()}
            results.append((losses, gradients, statistics))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    graphed.eval()
    data = graphed.data_preprocessor(batch_of())
    with torch.no_grad():
        assert graphed(**data, mode="predict")["predictions"].shape == (2, 64, 64)


def test_void_alone_has_no_loss():
    model = MODELS.build(model_config())
    data = model.data_preprocessor(batch_of())
    losses = model(data["images"], torch.full_like(data["targets"], 255), mode="loss")
    assert sum(losses.values()) == 0


def test_predictions_have_the_size_of_the_masks():
    model = MODELS.build(model_config()).eval()
    data = model.data_preprocessor(batch_of())
    data["targets"] = torch.zeros(2, 30, 50, dtype=torch.int64)
    outputs = model(**data, mode="predict")
    scores = F.interpolate(model(data["images"]), (30, 50), mode="bilinear")
    assert torch.equal(outputs["predictions"], scores.argmax(1))
    model.inference = {"window": (32, 32), "stride": (16, 16), "flip": True}
    assert model(**data, mode="predict")["predictions"].shape == (2, 30, 50)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_it_starts_from_a_classifier(tmp_path, prefix):
    """Of another image size and class token, as a file of ours or of a training run has it."""
    config = model_config()
    options = dict(config.backbone) | {"img_size": 96}
    classifier = timm.create_model(options.pop("name"), **options)
    path = tmp_path / "weights.safetensors"
    save_checkpoint({prefix + n: x for n, x in classifier.state_dict().items()}, path)
    config.backbone.update(checkpoint=str(path), class_token=False)
    encoder = MODELS.build(config).backbone.encoder.model
    for name, tensor in classifier.blocks.state_dict().items():
        assert torch.equal(encoder.blocks.state_dict()[name], tensor), name
    assert encoder.pos_embed.shape[1] == 16


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown key 'x' in model\.inference"):
        VimSegmenter(C, {}, inference={"x": 1})
    model = MODELS.build(model_config())
    with pytest.raises(ValueError, match="mode must be"):
        model(torch.zeros(2, 3, 64, 64), mode="train")


def test_without_the_library(monkeypatch):
    """The engine imports without smp; a segmenter says what to install."""
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("segmentation_models_pytorch"):
            raise ModuleNotFoundError("no smp", name="segmentation_models_pytorch")
        return real(name, *arguments)

    monkeypatch.delitem(sys.modules, "vim.heads.segmenter", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs segmentation_models_pytorch.*vim-mamba\[dense\]"):
        MODELS.build(model_config())


def test_a_classifier_needs_no_library_of_segmentation():
    code = f"""
import sys
sys.modules["segmentation_models_pytorch"] = None
from vim.engine.config import build_runner, load_config
load_config({str(ROOT / "configs/vim/vim-debug_1xb4_made-up.py")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_batch_norm_over_all_gpus(monkeypatch):
    def kinds():
        model = MODELS.build(model_config())
        return {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    assert kinds() == {nn.BatchNorm2d}
    monkeypatch.setattr(segmentation, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kinds() == {nn.SyncBatchNorm}


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "refused"), [(1, True, True), (3, False, True), (3, True, False)]
)
def test_a_batch_of_one_is_refused_before_training(batch_size, drop_last, refused):
    dataset = {"name": "made-up", "num_samples": 4}
    cfg = {"dataset": dataset, "batch_size": batch_size, "crop_size": (8, 8)}
    loader = build_loader(cfg | {"drop_last": drop_last}, is_training=True)
    preprocessor = SegmentationPreprocessor()
    if not refused:
        preprocessor.check_loader(loader)
        return
    with pytest.raises(ValueError, match="batch of one image"):
        preprocessor.check_loader(loader)


def outputs_of(predictions, targets):
    return {"predictions": predictions, "targets": targets, "num_classes": C}


def processed(batches, **options):
    metric = SegmentationMetric(**options)
    for data, predictions in batches:
        metric.process(data, outputs_of(predictions, data["targets"].long()))
    return metric


def some_batches(count=3, classes=C):
    batches = [batch_of(size=16) for _ in range(count)]
    return [(data, torch.randint(classes, data["targets"].shape)) for data in batches]


def test_figures():
    batches = some_batches()
    figures = processed(batches).evaluate(6)
    predictions = torch.cat([predicted for _, predicted in batches])
    targets = torch.cat([data["targets"].long() for data, _ in batches])
    options = {"num_classes": C, "ignore_index": 255}
    iou = multiclass_jaccard_index(predictions, targets, average="macro", **options)
    assert figures["mIoU"] == pytest.approx(100 * iou.item(), rel=1e-5)
    for name, average in (("pixel_accuracy", "micro"), ("mean_class_accuracy", "macro")):
        expected = multiclass_accuracy(predictions, targets, average=average, **options)
        assert figures[name] == pytest.approx(100 * expected.item(), rel=1e-5)


def test_classes_that_do_not_occur_do_not_count():
    targets = torch.tensor([[[0, 0, 1, 255]]])
    metric = SegmentationMetric(overlays=0)
    metric.process({"images": torch.zeros(1, 3, 1, 4)}, outputs_of(targets.clamp(max=1), targets))
    assert metric.evaluate(1) == {"mIoU": 100, "mean_class_accuracy": 100, "pixel_accuracy": 100}
    assert [result.iou for result in metric.report.per_class] == [100, 100, None, None]


def test_processes_add_up(monkeypatch):
    batches = some_batches()
    whole = processed(batches).evaluate(6)
    other = processed(batches[:2]).results
    metric = processed(batches[2:])
    monkeypatch.setattr(
        segmentation_metrics, "all_gather_object", lambda mine: [(other[0], other[1]), mine]
    )
    assert metric.evaluate(6) == whole
    assert metric.results == []
    idle = SegmentationMetric()
    monkeypatch.setattr(
        segmentation_metrics, "all_gather_object", lambda mine: [(other[0], other[1]), mine]
    )
    idle.evaluate(4)
    assert idle.report.images == 4


def test_another_number_of_images_is_told(caplog):
    processed(some_batches(1)).evaluate(5)
    assert "evaluated 2 images of a dataset of 5" in caplog.text


def test_what_cannot_be_evaluated_is_refused():
    with pytest.raises(ValueError, match="no image was evaluated"):
        SegmentationMetric().evaluate(0)
    data, predictions = some_batches(1)[0]
    with pytest.raises(ValueError, match="must be of the size of the targets"):
        processed([(data, predictions[:, 1:])])
    with pytest.raises(ValueError, match="pixels of the targets are none of the 4 classes"):
        processed([({**data, "targets": data["targets"] + 4}, predictions)]).evaluate(2)
    with pytest.raises(ValueError, match="of the predictions are none of the 4 classes"):
        processed([(data, torch.full_like(predictions, 255))]).evaluate(2)
    void = {**data, "targets": torch.full_like(data["targets"], 255)}
    with pytest.raises(ValueError, match="no pixel counts"):
        processed([(void, predictions)]).evaluate(2)
    with pytest.raises(ValueError, match="class_names must be of the 4 classes, got 1"):
        processed([(data, predictions)], class_names=["a"]).evaluate(2)


def test_files(tmp_path):
    metric = processed(some_batches(), class_names=["sky", "road", "car", "tree|bush"], overlays=3)
    figures = metric.evaluate(6)
    metric.report.facts = {"model": "m", "run": {"torch": "2"}}
    metric.report.write(tmp_path)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: record[name] for name in figures} == figures
    assert (record["images"], record["model"]) == (6, "m")
    with open(tmp_path / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows][3] == "tree|bush"
    assert sum(float(row["iou"]) for row in rows) / C == pytest.approx(figures["mIoU"])
    with open(tmp_path / "confusion.csv", newline="") as file:
        counts = [[int(x) for x in row[1:]] for row in list(csv.reader(file))[1:]]
    assert counts == metric.report.confusion.tolist()
    assert f"{figures['mIoU']:.2f} %" in (tmp_path / "table.md").read_text()
    assert len(list((tmp_path / "overlays").iterdir())) == 3
    with Image.open(tmp_path / "overlays/0000.png") as image:
        assert image.width == 2 * 16 + 8


def test_overlays_show_prediction_truth_and_what_is_there():
    prediction = torch.zeros(40, 60, dtype=torch.uint8)
    target = torch.full((40, 60), 255, dtype=torch.uint8)
    image = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    page = overlay(image, prediction, target, ["sky", "a class with a long name"])
    colour = palette(2)[0]
    assert page.getpixel((5, 5)) == tuple(int(0.45 * 100 + 0.55 * c) for c in colour.tolist())
    assert page.getpixel((60 + 8 + 5, 5)) == (100, 100, 100), "void shows the image"
    assert page.getpixel((8 + 7, 40 + 8 + 7)) == tuple(colour.tolist()), "the legend"
    assert len({tuple(c) for c in palette(150)[:150].tolist()}) == 150


def tool(name):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_resumed_is_a_run_undisturbed_and_can_be_tested(tmp_path):
    train = tool("train")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, epochs in ((whole, 2), (parts, 1), (parts, 2)):
        # mmengine tells loggers apart by this and the second.
        name = f"experiment_name={folder.name}-{epochs}"
        options = ["--cfg-options", f"train_cfg.max_epochs={epochs}", name]
        resume = ["--resume"] if (folder / "metrics.jsonl").exists() else []
        assert train.main([str(DEBUG), "--work-dir", str(folder), *resume, *options]) == 0
    curves = [[x["loss"] for x in lines(f) if x["stage"] == "train"] for f in (whole, parts)]
    assert len(curves[0]) == 20
    assert curves[0] == curves[1]
    last = [line for line in lines(whole) if line["stage"] == "val"][-1]
    assert (whole / "best_mIoU.pth").is_file()
    options = ["--checkpoint", str(whole), "--device", "cpu", "--work-dir", str(tmp_path / "test")]
    assert tool("test").main([str(DEBUG), *options]) == 0
    record = json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert record["mIoU"] == pytest.approx(last["mIoU"])
    assert len(list((tmp_path / "test" / "overlays").iterdir())) == 4


@pytest.mark.slow
def test_it_learns(tmp_path):
    config = load_config(DEBUG, work_dir=tmp_path)
    config.experiment_name, config.default_hooks.ema = "learns", None
    config.optim_wrapper.optimizer.lr = 5e-3
    config.train_dataloader.batch_size = 4
    config.train_cfg.max_epochs = 8
    config.param_scheduler = {"type": "ConstantLR", "factor": 1.0}
    runner = build_runner(config)
    runner.train()
    assert [x["mIoU"] for x in lines(tmp_path) if x["stage"] == "val"][-1] > 60


@pytest.mark.skipif(not CAMVID.is_file(), reason=f"{CAMVID} is not there")
def test_a_step_on_camvid(tmp_path):
    small = {"embed_dim": 32, "depth": 4, "d_state": 4}
    options = {f"model.backbone.{key}": value for key, value in small.items()}
    for name, samples in (("train", 4), ("val", 2)):
        options[f"{name}_dataloader.dataset.root"] = str(CAMVID)
        options[f"{name}_dataloader.dataset.num_samples"] = samples
        options |= {f"{name}_dataloader.num_workers": 0, f"{name}_dataloader.batch_size": 2}
    options |= {"model.channels": 16, "train_cfg.max_epochs": 1, "model.inference": {"flip": True}}
    options |= {"optim_wrapper.dtype": "float32", "val_cfg.dtype": "float32"}
    config = load_config(
        ROOT / "configs/segmentation/vim-tiny-upernet_1xb8_camvid11.py", options, tmp_path
    )
    config.param_scheduler = {"type": "ConstantLR", "factor": 1.0}
    build_runner(config).train()
    (line,) = [x for x in lines(tmp_path) if x["stage"] == "val"]
    assert 0 <= line["mIoU"] <= 100
