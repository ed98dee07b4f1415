"""tools/test.py from the command line: of a model and of a config, what it writes and refuses."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("mmengine")
pytest.importorskip("torchmetrics")

from vim.engine import checkpoints
from vim.models import save_checkpoint

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "test.py"
DEBUG = str(ROOT / "configs" / "vim" / "vim-debug_1xb4_made-up.py")
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_classes": 3}
MODEL = ["--model", "vim_tiny_patch16_224", "--data", "photos", "--workers", "0", "--device", "cpu"]
KWARGS = ["--model-kwargs", *(f"{key}={value}" for key, value in SMALL.items())]
FILES = {"metrics.json", "per_class.csv", "confusion.png", "calibration.png", "table.md"}


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, caplog):
    """The current folder, with 2, 3 and 4 images in photos/blue, photos/green and photos/red."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    for count, (name, colour) in enumerate(COLOURS.items(), start=2):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 60), colour).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path


def always(class_index, prefix="", **kwargs):
    """Return weights of a model that is sure of one class, whatever the image."""
    state = timm.create_model("vim_tiny_patch16_224", **kwargs).state_dict()
    state["head.weight"].zero_()
    state["head.bias"].zero_()[class_index] = 9
    return {prefix + name: tensor for name, tensor in state.items()}


def usage_error(main, argv, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_a_model_on_a_folder(main, folder, capsys):
    (folder / "run").mkdir()
    save_checkpoint(always(2, **SMALL), folder / "run" / "weights.safetensors")
    argv = [*MODEL, *KWARGS, "--batch-size", "4", "--checkpoint"]
    assert main([*argv, "run/weights.safetensors"]) == 0
    assert {path.name for path in (folder / "run" / "test").iterdir()} == FILES
    record = json.loads((folder / "run" / "test" / "metrics.json").read_text())
    assert record["top1"] == pytest.approx(100 * 4 / 9)
    assert record["mean_class_accuracy"] == pytest.approx(100 / 3)
    assert (record["images"], record["classes"], record["input size"]) == (9, 3, "32x32")
    assert record["weights"] == "run/weights.safetensors"
    assert record["run"]["environment"]["timm"] == timm.__version__
    table = capsys.readouterr().out
    assert table == (folder / "run" / "test" / "table.md").read_text()
    assert "| 44.44 %" in table
    assert "| green         | 3      | 0.0 %    | red (3)" in table

    # The folder of a run means its final weights.
    assert main([*argv, "run", "--work-dir", "other"]) == 0
    assert capsys.readouterr().out == table
    assert {path.name for path in (folder / "other").iterdir()} == FILES


def test_preprocessing_is_the_models_own(main, folder):
    model = timm.create_model("test_vit2", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint(model.state_dict(), folder / "w.safetensors")
    argv = ["--model", "test_vit2", *MODEL[2:], "--model-kwargs", "num_classes=3"]
    assert main([*argv, "--checkpoint", "w.safetensors"]) == 0
    losses = []
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    for target, name in enumerate(COLOURS):
        for path in (folder / "photos" / name).iterdir():
            image = transform(Image.open(path).convert("RGB"))[None]
            with torch.no_grad():
                logits = model.eval()(image)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([target])))
    record = json.loads((folder / "test" / "metrics.json").read_text())
    assert record["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_names_of_classes(main, folder, capsys):
    save_checkpoint(always(1, **SMALL), folder / "w.safetensors")
    (folder / "labels.txt").write_text("azure\nlime\ncrimson\n")
    (folder / "map.txt").write_text("red\ngreen\nblue\n")
    argv = [*MODEL, *KWARGS, "--checkpoint", "w.safetensors"]
    assert main([*argv, "--labels", "labels.txt", "--dtype", "bfloat16"]) == 0
    assert "| azure " in capsys.readouterr().out
    assert main([*argv, "--class-map", "map.txt"]) == 0
    rows = (folder / "test" / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[1:3] for row in rows[1:]] == [
        ["red", "4"],
        ["green", "3"],
        ["blue", "2"],
    ]


def test_synsets_are_said_in_words(main):
    described = main.__globals__["described"]
    assert described(["n01440764", "n01443537"])[0] == "tench, Tinca tinca"
    assert described(["n01440764", "cat"]) == ["n01440764", "cat"]
    assert described(None) is None


@pytest.fixture
def debug_weights(main):
    config = main.__globals__["load_config"](DEBUG)
    options = {k: v for k, v in config.model.backbone.items() if k != "name"}
    return lambda class_index: always(class_index, "backbone.", **options)


def test_a_config(main, folder, capsys, debug_weights):
    (folder / "run").mkdir()
    state = {"format": "vim training checkpoint 1", "iteration": 5, "model": debug_weights(2)}
    checkpoints.save(state, folder / "run" / "iter_00000005.pth")
    state |= {"iteration": 10, "model_ema": debug_weights(4)}
    checkpoints.save(state, folder / "run" / "iter_00000010.pth")
    argv = [DEBUG, "--checkpoint", "run", "--device", "cpu", "--cfg-options"]
    assert main([*argv, "test_dataloader.dataset.num_samples=15"]) == 0
    assert {path.name for path in (folder / "run" / "test").iterdir()} >= FILES
    record = json.loads((folder / "run" / "test" / "metrics.json").read_text())
    # Classes 0 to 4 come twice, the others once; the newest averaged weights say class 4.
    assert (record["images"], record["classes"]) == (15, 10)
    assert record["top1"] == pytest.approx(100 * 2 / 15)
    assert record["weights"] == "run/iter_00000010.pth"
    assert record["model"] == "vim_tiny_patch16_224"
    assert capsys.readouterr().out == (folder / "run" / "test" / "table.md").read_text()
    per_class = (folder / "run" / "test" / "per_class.csv").read_text().splitlines()
    assert per_class[5].startswith("4,4,2,2,15,")


def test_a_config_without_weights(main, folder, caplog):
    assert main([DEBUG, "--work-dir", "new", "--device", "cpu"]) == 0
    assert "give --checkpoint" in caplog.text
    assert json.loads((folder / "new" / "metrics.json").read_text())["weights"] == "none"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either CONFIG or --model NAME --data ROOT"),
        ([DEBUG, "--model", "test_vit2"], "give either CONFIG or --model NAME --data ROOT"),
        (["--model", "test_vit2"], "--model needs --data"),
        ([*MODEL, "--cfg-options", "x=1"], "--cfg-options are of a CONFIG"),
        (["no.py"], "no config at no.py"),
        ([DEBUG, "--cfg-options", "test_dataloader.batch_sise=2"], "did you mean batch_size"),
        ([DEBUG, "--checkpoint", "no.pth"], "checkpoint no.pth does not exist"),
        ([DEBUG, "--checkpoint", "photos"], "photos has neither weights.safetensors nor"),
        ([DEBUG, "--device", "tpu"], "device must be auto, cpu, cuda or"),
        (["--model", "vim_tinny_patch16_224", *MODEL[2:]], "did you mean vim_tiny_patch16_224"),
        (["--model", "test_vit2", "--data", "no"], "no"),
        ([*MODEL, "--model-kwargs", "num_classes=2", "img_size=32"], "0 to 1 of the model, got 0"),
    ],
)
def test_bad_usage(argv, message, main, capsys):
    assert message in usage_error(main, argv, capsys)


def test_as_a_command(folder):
    done = subprocess.run(
        [sys.executable, str(TOOL), *MODEL, *KWARGS],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / "runs" / "test" / "table.md").read_text()
    assert "the report is in runs/test" in done.stderr
