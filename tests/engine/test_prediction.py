"""Segmenters and detectors on files: their config and weights, frames, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("faster_coco_eval")
pytest.importorskip("cv2")

from vim.engine import checkpoints
from vim.engine.config import load_config
from vim.engine.prediction import (
    Frame,
    Predictor,
    Result,
    ResultWriter,
    class_names_of,
    config_of_run,
    find_weights,
    read_frames,
    summary,
)
from vim.engine.video import VideoWriter, read_video
from vim.models import save_checkpoint

ROOT = Path(__file__).parents[2]
DETECTOR = ROOT / "configs/detection/vim-debug-mask-rcnn_1xb2_made-up.py"
SEGMENTER = ROOT / "configs/segmentation/vim-debug-upernet_1xb2_made-up.py"
CPU = torch.device("cpu")


def run_of(path, folder, **changes):
    """The folder of a run: its config as it is written there, and its final weights."""
    config = load_config(path, changes)
    model = MODELS.build(config.model)
    folder.mkdir()
    (folder / "config.py").write_text(config.pretty_text)
    save_checkpoint(model.backbone.state_dict(), folder / "weights.safetensors")
    return folder, model


def frame_of(size=(70, 50), path="x.png", **options):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Frame(Path(path), Image.fromarray(pixels), **options)


def test_the_config_of_a_run(tmp_path):
    folder, _ = run_of(DETECTOR, tmp_path / "run")
    expected = load_config(DETECTOR)
    for path in (folder, folder / "weights.safetensors"):
        assert config_of_run(path).model == expected.model
    other = tmp_path / "other"
    other.mkdir()
    state = {"format": "vim training checkpoint 1", "config": expected.pretty_text, "model": {}}
    checkpoints.save(state, other / "iter_00000003.pth")
    for path in (other, other / "iter_00000003.pth"):
        assert config_of_run(path).model == expected.model
    (other / "config.py").write_text("import os\nmodel = dict(type='x', size=-1)\n")
    assert config_of_run(other).model.to_dict() == {"type": "x", "size": -1}
    (other / "config.py").write_text("model = open('secret')\n")
    with pytest.raises(ValueError, match="cannot be read"):
        config_of_run(other)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(ValueError, match=r"says nothing of the model.*--config"):
        config_of_run(tmp_path / "w.safetensors")


def test_which_weights(tmp_path):
    folder, _ = run_of(SEGMENTER, tmp_path / "run")
    assert find_weights(folder) == folder / "weights.safetensors"
    assert find_weights(None) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has neither weights.safetensors nor"):
        find_weights(tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        find_weights(tmp_path / "nothing")


def test_segmenting(tmp_path):
    folder, model = run_of(SEGMENTER, tmp_path / "run")
    config = config_of_run(folder)
    predict = Predictor(config, folder / "weights.safetensors", device=CPU)
    assert predict.segments
    result = predict(frame_of())
    assert result.classes.shape == (50, 70)
    pixels = torch.from_numpy(np.array(frame_of().image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.eval()((pixels.float() / 255 - 0.5) / 0.5)
    assert torch.equal(result.classes, logits[0].argmax(0).to(torch.uint8))
    assert "class 0" not in summary(result, ["sky", "road", "car", "tree"])
    # The input's size is the config's; the answer's is the image's.
    config.test_dataloader.short_side = 32
    small = Predictor(config, folder / "weights.safetensors", device=CPU)(frame_of())
    assert small.classes.shape == (50, 70)


def test_detecting(tmp_path):
    folder, model = run_of(DETECTOR, tmp_path / "run", **{"model.inference.score_threshold": 0.0})
    checkpoints.save(
        {"format": "vim training checkpoint 1", "model": {}, "model_ema": model.state_dict()},
        folder / "iter_00000001.pth",
    )
    results = [
        Predictor(config_of_run(folder), folder / name, device=CPU)(frame_of())
        for name in ("weights.safetensors", "iter_00000001.pth")
    ]
    objects = results[0].objects
    assert len(objects["boxes"]) > 0
    assert objects["masks"].shape == (len(objects["boxes"]), 50, 70)
    assert objects["masks"].dtype == torch.bool
    assert torch.equal(objects["boxes"], results[1].objects["boxes"])
    low = Predictor(
        config_of_run(folder), folder / "weights.safetensors", device=CPU, dtype=torch.bfloat16
    )
    assert low(frame_of()).objects["boxes"].dtype == torch.float32


def test_what_does_not_fit(tmp_path):
    folder, _ = run_of(SEGMENTER, tmp_path / "run")
    config = config_of_run(folder)
    config.model.channels = 32
    with pytest.raises(ValueError, match="does not fit the config"):
        Predictor(config, folder / "weights.safetensors", device=CPU)
    classifier = load_config(ROOT / "configs/vim/vim-debug_1xb4_made-up.py")
    with pytest.raises(ValueError, match="VimClassifier neither segments nor detects"):
        Predictor(classifier, folder / "weights.safetensors", device=CPU)


def test_outputs_that_are_not_finite_are_said(tmp_path):
    for number, path in enumerate((SEGMENTER, DETECTOR)):
        folder, _ = run_of(path, tmp_path / str(number))
        predict = Predictor(config_of_run(folder), folder / "weights.safetensors", device=CPU)
        for name, parameter in predict.model.named_parameters():
            if "pos_embed" in name:
                parameter.data.fill_(float("nan"))
        assert "not finite" in predict(frame_of()).error


def test_names_of_classes(tmp_path):
    config = load_config(DETECTOR)
    assert class_names_of(config, 3) == (["class 0", "class 1", "class 2"], [1, 2, 3])
    config = load_config(ROOT / "configs/_base_/datasets/bccd.py")
    config.test_dataloader.dataset.root = str(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 4}],
        "annotations": [],
        "categories": [{"id": 5, "name": "x"}, {"id": 8, "name": "y"}, {"id": 9, "name": "z"}],
    }
    (tmp_path / "test.json").write_text(json.dumps(data))
    assert class_names_of(config, 3) == (["x", "y", "z"], [5, 8, 9])
    config.test_dataloader.dataset.root = "nowhere"
    assert class_names_of(config, 2)[0] == ["class 0", "class 1"]


def clip(path, count=3):
    with VideoWriter(path, 5) as video:
        for index in range(count):
            video.add(Image.new("RGB", (64, 48), (80 * index, 0, 0)))
    return path


def test_frames_come_in_order(tmp_path):
    paths = []
    for index in range(6):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (8, 8), (index, 0, 0)).save(paths[-1])
    paths[1].write_bytes(b"")
    paths.insert(3, clip(tmp_path / "clip.mp4"))
    (tmp_path / "broken.mp4").write_text("text")
    paths.append(tmp_path / "broken.mp4")
    frames = list(read_frames(paths, workers=2))
    names = [frame.path.relative_to(tmp_path).as_posix() for frame in frames]
    assert names == [
        *("0.png", "1.png", "2.png"),
        *(f"clip.mp4/00000{i}" for i in range(3)),
        *("3.png", "4.png", "5.png", "broken.mp4"),
    ]
    assert [bool(frame.error) for frame in frames] == [i in (1, 9) for i in range(10)]
    assert frames[4].video == tmp_path / "clip.mp4"


def classes_of(frame):
    width, height = frame.image.size
    return Result(frame, classes=torch.arange(width).repeat(height, 1).remainder(3).byte())


def objects_of(frame):
    masks = torch.zeros(2, frame.image.height, frame.image.width, dtype=torch.bool)
    masks[0, 5:20, 10:30] = True
    return Result(
        frame,
        objects={
            "boxes": torch.tensor([[10.0, 5.0, 30.0, 20.0], [0.0, 0.0, 5.0, 5.0]]),
            "labels": torch.tensor([2, 1]),
            "scores": torch.tensor([0.9, 0.1]),
            "masks": masks,
        },
    )


NAMES = ["sky", "road", "car"]


def test_masks_and_overlays(tmp_path):
    paths = [tmp_path / "in" / name for name in ("a/x.png", "a/x.jpg", "b/y.png")]
    with ResultWriter(tmp_path / "out", NAMES, [1, 2, 3], paths) as writer:
        for path in paths:
            writer.add(classes_of(frame_of(path=path)))
    out = tmp_path / "out"
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    names = ("a/x.jpg.png", "a/x.png.png", "b/y.png")
    assert files == [
        "classes.json",
        *(f"masks/{n}" for n in names),
        *(f"overlays/{n}" for n in names),
    ]
    with Image.open(out / "masks/b/y.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.asarray(mask)[0, :4], [0, 1, 2, 0])
    with Image.open(out / "overlays/b/y.png") as page:
        assert page.width == 70
        assert page.height > 50
    assert json.loads((out / "classes.json").read_text()) == NAMES


def test_cocos_format(tmp_path):
    from faster_coco_eval import COCO

    paths = [tmp_path / "in" / name for name in ("x.png", "y.png")]
    with ResultWriter(tmp_path / "out", NAMES, [4, 5, 9], paths) as writer:
        for path in paths:
            writer.add(objects_of(frame_of(path=path)))
    data = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [each["file_name"] for each in data["images"]] == ["x.png", "y.png"]
    assert [each["category_id"] for each in data["annotations"]] == [5, 4, 5, 4]
    assert data["annotations"][0]["bbox"] == [10, 5, 20, 15]
    assert data["categories"][2] == {"id": 9, "name": "car"}
    coco = COCO(data)
    assert coco.annToMask(coco.loadAnns([1])[0]).sum() == 15 * 20
    assert summary(objects_of(frame_of()), NAMES) == "1 road (0.90)"


def test_videos(tmp_path):
    source = clip(tmp_path / "clip.avi")
    frames = list(read_frames([source]))
    for result_of, name in ((classes_of, "s"), (objects_of, "d")):
        with ResultWriter(tmp_path / name, NAMES, [1, 2, 3], [source], fps=4) as writer:
            for frame in frames:
                writer.add(result_of(frame))
        out = tmp_path / name
        assert len(list(read_video(out / "overlays/clip.avi.mp4"))) == 3
        assert len(list(read_video(out / "overlays.mp4"))) == 3
    assert (tmp_path / "s/masks/clip.avi/000002.png").is_file()
    data = json.loads((tmp_path / "d/predictions.json").read_text())
    assert data["images"][2]["file_name"] == "clip.avi/000002"


def test_nothing_in_it():
    result = objects_of(frame_of())
    result.objects = {key: value[:0] for key, value in result.objects.items()}
    assert summary(result, NAMES) == "nothing"


def test_config_is_not_changed(tmp_path):
    folder, _ = run_of(SEGMENTER, tmp_path / "run")
    config = config_of_run(folder)
    before = config.to_dict()
    Predictor(config, folder / "weights.safetensors", device=CPU)
    assert config.to_dict() == before
