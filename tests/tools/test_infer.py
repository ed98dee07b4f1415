"""tools/infer.py from the command line: what it prints and writes, and its exit code."""

import csv
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

from vim.models import save_checkpoint

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "infer.py"
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_classes": 3}
MODEL = ["--model", "vim_tiny_patch16_224", "--device", "cpu", "--model-kwargs"] + [
    f"{key}={value}" for key, value in SMALL.items()
]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, caplog):
    """The current folder, with the images a.png, b.png and c.png in photos/."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    (tmp_path / "photos").mkdir()
    for name, colour in zip("abc", ("red", "green", "blue"), strict=True):
        Image.new("RGB", (40, 60), colour).save(tmp_path / "photos" / f"{name}.png")
    return tmp_path


def usage_error(main, argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_all_is_well(main, folder, capsys, caplog):
    (folder / "labels.txt").write_text("ant\nbee\ncow\n")
    argv = ["photos", *MODEL, "--labels", "labels.txt", "--topk", "2", "--batch-size", "2"]
    assert main([*argv, "--output", "new/x.jsonl", "--save-plot", "sheet.png"]) == 0

    lines = [json.loads(line) for line in (folder / "new" / "x.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["photos/a.png", "photos/b.png", "photos/c.png"]
    assert {row["label"] for line in lines for row in line["classes"]} <= {"ant", "bee", "cow"}

    first, second = lines[0]["classes"]
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    assert rows[0].split() == ["photos/a.png", f"{first['probability']:.1%}", first["label"]]
    assert rows[1].split() == [f"{second['probability']:.1%}", second["label"]]
    assert rows[0].index("%") == rows[1].index("%")

    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert 500 < sheet.width < 1500
        assert 300 < sheet.height < 1500
    assert "the weights are random" in caplog.text
    assert "3 images, 0 failed" in caplog.text
    assert "images/s" in caplog.text


def test_failures_are_named_and_the_rest_goes_on(main, folder, capsys, caplog):
    (folder / "photos" / "b.png").write_bytes(b"")
    (folder / "photos" / "d.png").write_bytes(b"text")
    argv = ["photos", *MODEL, "--topk", "1", "--output", "x.csv", "--save-plot", "sheet.png"]
    assert main(argv) == 1

    assert "failed: photos/b.png: the file is empty" in caplog.text
    assert "failed: photos/d.png: not an image" in caplog.text
    assert "4 images, 2 failed" in caplog.text
    assert [row.split()[1] == "failed" for row in capsys.readouterr().out.splitlines()] == [
        *(False, True, False, True)
    ]
    with open(folder / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"photos/{name}.png" for name in "abcd"]
    assert [bool(row["error"]) for row in rows] == [False, True, False, True]
    assert (folder / "sheet.png").exists()


def test_all_fail(main, folder, caplog):
    (folder / "x.png").write_bytes(b"")
    assert main(["x.png", *MODEL, "--save-plot", "sheet.png"]) == 1
    assert "1 images, 1 failed" in caplog.text


def test_list_on_standard_input(main, monkeypatch, capsys, caplog):
    stdin = io.TextIOWrapper(io.BytesIO(b"photos/c.png\nphotos/missing.png\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["-", *MODEL]) == 1
    assert "failed: photos/missing.png: No such file or directory" in caplog.text
    assert "photos/c.png" in capsys.readouterr().out


def test_checkpoint(main, folder, caplog):
    model = timm.create_model("vim_tiny_patch16_224", **SMALL)
    model.head.bias.data[1] = 50
    save_checkpoint(model.state_dict(), folder / "weights.safetensors")
    argv = ["photos/a.png", *MODEL, "--checkpoint", "weights.safetensors", "--output", "x.jsonl"]
    assert main(argv) == 0
    best = json.loads((folder / "x.jsonl").read_text())["classes"][0]
    assert (best["index"], best["label"]) == (1, "class 1")
    assert best["probability"] == pytest.approx(1)
    assert "random" not in caplog.text


def test_only_the_first_images_are_on_the_sheet(main, folder, caplog, monkeypatch):
    monkeypatch.setitem(main.__globals__, "SHEET_LIMIT", 1)
    assert main(["photos", *MODEL, "--save-plot", "sheet.png"]) == 0
    assert "sheet.png shows the first 1 of 3 images" in caplog.text
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width < 350


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photos"], "one of these is required: --model NAME"),
        (["photos", "--model", "vim_tinny_patch16_224"], "did you mean vim_tiny_patch16_224"),
        (["photos", *MODEL, "--nonsense"], "unrecognized arguments: --nonsense"),
        (["photos", *MODEL, "widht=3"], "unexpected keyword argument 'widht'"),
        (["photos", *MODEL, "--labels", "two.txt"], "two.txt must name 3 classes, got 2"),
        (["photos", *MODEL, "--labels", "no.txt"], "No such file or directory: 'no.txt'"),
        (["photos", *MODEL, "--checkpoint", "no.pth"], "checkpoint no.pth does not exist"),
        (["photos", *MODEL, "--use-ema"], "give --checkpoint"),
        (["photos", *MODEL, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["photos", *MODEL, "--device", "tpu"], "device must be auto, cpu, cuda or"),
        (["photos", *MODEL, "--topk", "0"], "--topk"),
        (["photos", *MODEL, "--output", "x.txt"], "x.txt must be one of .jsonl, .csv"),
        (["photos", *MODEL, "--save-plot", "x.jpg"], "x.jpg must be one of .png"),
        (["no.png", *MODEL], "no such file or folder"),
        (["photos/*.gif", *MODEL], "no such file or folder"),
        (["empty", *MODEL], "no image in 'empty'"),
        (["photos", *MODEL, "num_classes=0"], "no classes"),
    ],
)
def test_bad_usage(argv, message, main, folder, capsys):
    (folder / "two.txt").write_text("ant\nbee\n")
    (folder / "empty").mkdir()
    assert message in usage_error(main, argv, capsys)


def test_as_a_command(folder):
    (folder / "photos" / "b.png").write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TOOL), "photos/*.png", *MODEL],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == 3 + 1 + 3
    warning, failure, summary = done.stderr.splitlines()
    assert warning.startswith("the weights are random")
    assert failure == "failed: photos/b.png: the file is empty"
    assert summary.startswith("3 images, 1 failed")


CONFIGS = ROOT / "configs"
DETECTOR = CONFIGS / "detection" / "vim-debug-mask-rcnn_1xb2_made-up.py"
SEGMENTER = CONFIGS / "segmentation" / "vim-debug-upernet_1xb2_made-up.py"
CLASSIFIER = CONFIGS / "vim" / "vim-debug_1xb4_made-up.py"


@pytest.fixture
def run():
    """The folder of a run of a config, in the current folder."""
    pytest.importorskip("mmengine")
    for library in ("segmentation_models_pytorch", "faster_coco_eval", "cv2"):
        pytest.importorskip(library)
    from mmengine.registry import MODELS

    from vim.engine.config import load_config

    def make(path, **changes):
        config = load_config(path, changes)
        weights = MODELS.build(config.model).backbone.state_dict()
        Path("run").mkdir()
        Path("run/config.py").write_text(config.pretty_text)
        save_checkpoint(weights, "run/weights.safetensors")
        return "run"

    return make


def video(path, count=3):
    from vim.engine.video import VideoWriter

    with VideoWriter(path, 5) as writer:
        for _ in range(count):
            writer.add(Image.new("RGB", (64, 48), "blue"))


RUN = ["photos", "--device", "cpu", "--checkpoint"]


def test_segmenting(main, folder, run, capsys, caplog):
    (folder / "photos" / "b.png").write_bytes(b"")
    video(folder / "photos" / "d.mp4")
    assert main([*RUN, run(SEGMENTER), "--fps", "5"]) == 1
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["photos/a.png", "photos/c.png", *(f"photos/d.mp4/00000{i}" for i in range(3))]
    out = folder / "run" / "infer"
    with Image.open(out / "masks" / "a.png") as mask:
        assert mask.size == (40, 60)
    assert (out / "masks" / "d.mp4" / "000001.png").is_file()
    assert (out / "overlays" / "c.png").is_file()
    assert (out / "overlays" / "d.mp4").is_file()
    assert (out / "overlays.mp4").is_file()
    assert "failed: photos/b.png: the file is empty" in caplog.text
    assert "6 images, 1 failed" in caplog.text


def test_detecting(main, folder, run, capsys):
    (folder / "names.txt").write_text("ant\nbee\ncow\n")
    options = ["--labels", "names.txt", "--work-dir", "out", "--dtype", "bfloat16"]
    options += ["--cfg-options", "model.inference.score_threshold=0.0"]
    assert main([*RUN, run(DETECTOR), "--config", str(DETECTOR), *options]) == 0
    data = json.loads((folder / "out" / "predictions.json").read_text())
    assert [each["file_name"] for each in data["images"]] == ["a.png", "b.png", "c.png"]
    assert data["categories"][1] == {"id": 2, "name": "bee"}
    assert data["annotations"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_classifier_of_a_run(main, folder, run):
    video(folder / "photos" / "d.mp4")
    options = ["--output", "x.jsonl", "--save-plot", "sheet.png", "--batch-size", "2"]
    assert main([*RUN, run(CLASSIFIER), *options]) == 0
    lines = [json.loads(line) for line in (folder / "x.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines][3:] == [f"photos/d.mp4/00000{i}" for i in range(3)]
    assert len({tuple(c["probability"] for c in line["classes"]) for line in lines[3:]}) == 1
    assert (folder / "sheet.png").is_file()


def test_bad_usage_of_a_run(main, folder, run, capsys):
    run(SEGMENTER)
    for argv, message in (
        ([*RUN, "run", "--output", "x.csv"], "--output is for a classifier: see --work-dir"),
        ([*RUN, "run", "--use-ema"], "--use-ema goes with --model"),
        (["photos", *MODEL, "--config", "x.py"], "--config is of a training run"),
        (["photos", *MODEL, "--fps", "5"], "--fps is for a segmenter or detector"),
        ([*RUN, "run", "--fps", "0"], "--fps must be above 0"),
        (["photos", "--config", str(SEGMENTER)], "needs weights: give --checkpoint"),
        ([*RUN, "nowhere"], "nowhere"),
        ([*RUN, "run", "--cfg-options", "model.x=1"], "no key 'model.x'"),
        ([*RUN, "run", "--labels", "photos/a.txt"], "No such file"),
    ):
        assert message in usage_error(main, argv, capsys), argv
