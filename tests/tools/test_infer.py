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
        (["photos"], "required: --model"),
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
