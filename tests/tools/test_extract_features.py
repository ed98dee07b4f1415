"""tools/extract_features.py: what it writes, faults, and going on after being stopped anywhere."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform

from vim.engine.inference import build_model, resolve_data_config

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "extract_features.py"
NAME = "vim_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_classes": 3}
MODEL = ["--model", NAME, "--device", "cpu", "--batch-size", "2", "--model-kwargs"] + [
    f"{key}={value}" for key, value in SMALL.items()
]
SUFFIXES = [".npz", ".safetensors", ""]


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, caplog):
    """The current folder, with five images of different sizes in photos/."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        values = rng.integers(0, 256, (40 + 9 * index, 60 - 5 * index, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path


def read(output):
    """Arrays, files and settings in an output of any kind."""
    if output.suffix == ".npz":
        with np.load(output) as arrays:
            arrays = dict(arrays)
        return arrays, list(arrays.pop("files")), json.loads(str(arrays.pop("settings")))
    if output.suffix == ".safetensors":
        with safe_open(output, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            info = json.loads(file.metadata()["info"])
        return arrays, info["files"], info["settings"]
    parts, files = [], []
    for shard in sorted(output.glob("*.safetensors")):
        with safe_open(shard, "numpy") as file:
            parts.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            files += json.loads(file.metadata()["info"])["files"]
    arrays = {name: np.concatenate([p[name] for p in parts if p]) for name in parts[0]}
    return arrays, files, json.loads((output / "job.json").read_text())


def contents(output):
    """Every byte of an output file or folder."""
    if output.is_file():
        return output.read_bytes()
    return {file.name: file.read_bytes() for file in output.iterdir()}


def images(name, model):
    transform = create_transform(**resolve_data_config(model))
    paths = sorted(Path(name).iterdir())
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


@pytest.mark.parametrize("suffix", SUFFIXES, ids=["npz", "safetensors", "folder"])
def test_output(suffix, main, folder, caplog):
    output = folder / f"new/feats{suffix}"
    assert main(["photos", *MODEL, "--output", str(output)]) == 0
    arrays, files, settings = read(output)

    model = build_model(NAME, model_kwargs=SMALL)
    with torch.inference_mode():
        tokens = model.forward_features(images("photos", model))
        expected = model.forward_head(tokens, pre_logits=True).numpy()
    assert arrays.keys() == {"pooled"}
    assert arrays["pooled"].dtype == np.float32
    np.testing.assert_allclose(arrays["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert files == [f"photos/{index}.png" for index in range(5)]
    assert (settings["model"], settings["model_kwargs"]) == (NAME, SMALL)
    assert settings["dtype"] == "float32"
    assert settings["versions"].keys() == {"torch", "timm", "vim"}
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert "5 images, 0 failed" in caplog.text


@pytest.mark.parametrize("name", [NAME, "test_vit", "test_resnet"])
@pytest.mark.parametrize("layout", ["map", "tokens", "pooled"])
def test_layers(name, layout, main, folder):
    kwargs = SMALL if name == NAME else {}
    argv = ["photos", *MODEL] if kwargs else ["photos", "--model", name, "--device", "cpu"]
    layers = ["-1", "last", "0", "pooled", "1", "0"]
    for layer in layers:
        argv += ["--layer", layer]
    assert main([*argv, "--format", layout, "--output", "x.npz"]) == 0

    model = build_model(name, model_kwargs=kwargs)
    depth = len(model.feature_info)
    with torch.inference_mode():
        x = images("photos", model)
        maps = model.forward_intermediates(x, intermediates_only=True)
        last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    dense = {"last": last, "layer_0": maps[0], "layer_1": maps[1], f"layer_{depth - 1}": maps[-1]}
    arrays, _, settings = read(folder / "x.npz")
    assert settings["layers"] == [f"layer_{depth - 1}", "last", "layer_0", "pooled", "layer_1"]
    assert set(settings["layers"]) == arrays.keys()
    for key, value in dense.items():
        B, C, H, W = value.shape
        if layout == "tokens":
            value = value.permute(0, 2, 3, 1).reshape(B, H * W, C)
        elif layout == "pooled":
            value = value.mean((2, 3))
        np.testing.assert_allclose(arrays[key], value.numpy(), rtol=1e-3, atol=1e-4, err_msg=key)
    np.testing.assert_allclose(arrays["pooled"], pooled.numpy(), rtol=1e-3, atol=1e-4)


def test_low_precision_is_stored_in_float32(main, folder):
    for dtype in ("float32", "bfloat16"):
        assert main(["photos", *MODEL, "--dtype", dtype, "--output", f"{dtype}.npz"]) == 0
    exact, rounded = (
        read(folder / f"{dtype}.npz")[0]["pooled"] for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, rtol=0.1, atol=0.1)
    assert not np.array_equal(rounded, exact)


@pytest.mark.parametrize("suffix", SUFFIXES, ids=["npz", "safetensors", "folder"])
def test_failures_are_named_and_the_rest_goes_on(suffix, main, folder, caplog):
    for index in (1, 2, 3):
        (folder / "photos" / f"{index}.png").write_bytes(b"")
    assert main(["photos", *MODEL, "--output", f"x{suffix}"]) == 1
    arrays, files, _ = read(folder / f"x{suffix}")
    assert files == ["photos/0.png", "photos/4.png"]
    assert arrays["pooled"].shape == (2, 24)
    for index in (1, 2, 3):
        assert f"failed: photos/{index}.png: the file is empty" in caplog.text
    assert "5 images, 3 failed" in caplog.text


def test_all_fail(main, folder, caplog):
    (folder / "x.png").write_bytes(b"")
    assert main(["x.png", *MODEL, "--output", "x.npz"]) == 1
    assert "no image could be read: nothing written" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["photos", "x.png"]


@pytest.mark.parametrize("suffix", SUFFIXES, ids=["npz", "safetensors", "folder"])
@pytest.mark.parametrize("moment", range(5))
def test_interrupted_at_any_moment(moment, suffix, main, folder, monkeypatch):
    """Files come into being by os.replace: settings, three batches, output."""
    (folder / "photos" / "2.png").write_bytes(b"")
    assert main(["photos", *MODEL, "--output", f"whole{suffix}"]) == 1

    replace, calls = os.replace, []

    def interrupted(source, target):
        if len(calls) == moment:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["photos", *MODEL, "--output", f"x{suffix}"])
    assert not (folder / f"x{suffix}").exists()

    calls.clear()
    monkeypatch.setattr(os, "replace", lambda *args: (calls.append(args[1]), replace(*args)))
    assert main(["photos", *MODEL, "--output", f"x{suffix}"]) == 1
    assert len(calls) == 5 - moment, "what was done is not done again"
    assert contents(folder / f"x{suffix}") == contents(folder / f"whole{suffix}")
    assert not (folder / f"x{suffix}.partial").exists()


KILLED = """
import os, runpy, signal, sys
replace, calls = os.replace, []
def killing(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = killing
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no kill -9")
@pytest.mark.parametrize("suffix", [".npz", ""], ids=["npz", "folder"])
def test_killed_and_resumed(suffix, main, folder, caplog):
    argv = ["photos", *MODEL, "--layer", "last", "--output"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(TOOL), *argv, f"x{suffix}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = [path.name for path in (folder / f"x{suffix}.partial").iterdir()]
    assert sum(name.startswith("shard") for name in names) == 1
    assert sum(name.endswith(".tmp") for name in names) == 1

    assert main([*argv, f"x{suffix}"]) == 0
    assert "resuming: 2 of 3 batches left" in caplog.text
    assert main([*argv, f"whole{suffix}"]) == 0
    assert contents(folder / f"x{suffix}") == contents(folder / f"whole{suffix}")
    assert not (folder / f"x{suffix}.partial").exists()


@pytest.fixture
def unfinished(main, folder, monkeypatch):
    """x.npz.partial with one batch of `MODEL`."""
    with monkeypatch.context() as patch:
        patch.setattr(main.__globals__["Shards"], "finish", lambda *args: None)
        assert main(["photos", *MODEL, "--output", "x.npz"]) == 0
    for index in (1, 2):
        (folder / "x.npz.partial" / f"shard-{index:06d}.safetensors").unlink()
    return folder / "x.npz.partial"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (["--layer", "0"], "layers"),
        (["--format", "tokens"], "format"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--batch-size", "3"], "batch_size"),
        (["--model-kwargs", "depth=2"], "model_kwargs, weights_sha256"),
        (["--model", "vim_tiny_patch16_384"], "model"),
        (["--", "photos/0.png"], "files"),
    ],
)
def test_another_command_does_not_continue(change, what, main, unfinished, capsys):
    argv = [*MODEL, "--output", "x.npz", *change]
    with pytest.raises(SystemExit) as error:
        main(argv if "--" in change else [*argv, "--", "photos"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert f"x.npz.partial holds unfinished work that differs in {what}" in message
    assert "delete that folder" in message
    assert len(list(unfinished.glob("shard-*"))) == 1


def test_weights_that_changed_do_not_continue(main, folder, capsys):
    model = timm.create_model(NAME, **SMALL)
    argv = ["photos", *MODEL, "--checkpoint", "weights.pth", "--output", "x.npz"]
    torch.save(model.state_dict(), folder / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.__globals__["Shards"], "finish", lambda *args: None)
        assert main(argv) == 0
    model.norm.weight.data.fill_(2)
    torch.save(model.state_dict(), folder / "weights.pth")
    with pytest.raises(SystemExit):
        main(argv)
    assert "differs in weights_sha256:" in capsys.readouterr().err


def test_shards_without_settings_are_not_trusted(main, unfinished, folder):
    """As when deleting the folder of a finished run was interrupted."""
    (unfinished / "job.json").unlink()
    assert main(["photos", *MODEL, "--layer", "0", "--output", "x.npz"]) == 0
    arrays, _, _ = read(folder / "x.npz")
    assert arrays.keys() == {"layer_0"}


def test_finished_file_is_replaced_and_finished_folder_is_not(main, folder, capsys):
    for argv in (["photos"], ["photos/0.png"]):
        assert main([*argv, *MODEL, "--output", "x.npz"]) == 0
    assert read(folder / "x.npz")[1] == ["photos/0.png"]

    assert main(["photos", *MODEL, "--output", "feats"]) == 0
    with pytest.raises(SystemExit) as error:
        main(["photos", *MODEL, "--output", "feats"])
    assert error.value.code == 2
    assert "feats exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photos", *MODEL], "required: --output"),
        (["photos", *MODEL, "--output", "x.pt"], "x.pt must be one of .npz, .safetensors, no ext"),
        (["photos", *MODEL, "--output", "x", "--layer", "first"], "invalid parse_layer value"),
        (["photos", *MODEL, "--output", "x", "--layer", "3"], "must be in -3 ... 2, got 3"),
        (["photos", *MODEL, "--output", "x", "--layer", "-4"], "must be in -3 ... 2, got -4"),
        (["photos", *MODEL, "--output", "x", "--format", "hwc"], "invalid choice: 'hwc'"),
        (["no.png", *MODEL, "--output", "x"], "no such file or folder"),
        (["photos", "--model", "vim_tinny", "--output", "x"], "did you mean vim_tiny"),
    ],
)
def test_bad_usage(argv, message, main, folder, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["photos"]
