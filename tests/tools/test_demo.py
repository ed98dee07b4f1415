"""The demo on few scans and one epoch: what it writes, and how it says that this was too little."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(monkeypatch):
    """The module tools/demo.py."""
    for package in ("sklearn", "skimage", "matplotlib"):
        pytest.importorskip(package, reason="needs the extra vim-mamba[demo]")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def few(demo):
    """128 scans to train on and 20 held-out ones."""
    return tuple(
        demo.Digits(part.scans[:n], part.labels[:n], part.indices[:n])
        for part, n in zip(demo.load_digits(), (128, 20), strict=True)
    )


@pytest.fixture
def small_demo(demo, few, monkeypatch):
    """The demo with `few` scans, one photograph of either shape and four blocks."""
    photos = demo.photographs()[:2]
    larger_model = timm.create_model(demo.ARCHITECTURE, dynamic_img_size=True, depth=4).eval()
    monkeypatch.setattr(demo, "load_digits", lambda: few)
    monkeypatch.setattr(demo, "photographs", lambda: photos)
    monkeypatch.setattr(demo, "feature_model", lambda checkpoint: larger_model)
    monkeypatch.setattr(demo, "FEATURE_BLOCKS", (0, 1, 2, 3))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The demo starts tools/infer.py, which shall import this checkout.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return demo


def test_writes_everything_and_fails_for_low_accuracy(small_demo, few, tmp_path, capsys, caplog):
    code = small_demo.main(["--epochs", "1", "--output", str(tmp_path)])

    assert code == 1
    assert "is under the 95% required" in caplog.text
    out = capsys.readouterr().out
    names = ("contact_sheet.png", "learning_curve.png", "photographs.png", "feature_maps.png")
    for name in names:
        assert str(tmp_path / name) in out
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300

    lines = (tmp_path / "photographs.jsonl").read_text("utf-8").splitlines()
    assert [Path(json.loads(line)["file"]).name for line in lines] == ["astronaut.png", "cat.png"]
    assert "astronaut.png: " in out

    held_out = few[1]
    files = sorted((tmp_path / "heldout").iterdir())
    assert [file.name for file in files] == sorted(held_out.file_names())
    with Image.open(tmp_path / "heldout" / held_out.file_names()[0]) as scan:
        assert scan.mode == "L"
        assert np.array_equal(np.array(scan), held_out.scans[0])

    model = timm.create_model(f"local-dir:{tmp_path / 'digits'}", pretrained=True)
    expected = small_demo.predict(model, held_out.images()).tolist()
    lines = (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()
    labels = {Path(r["file"]).name: r["classes"][0]["label"] for r in map(json.loads, lines)}
    assert [int(labels[name]) for name in held_out.file_names()] == expected
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "tmp"))]


def test_training_is_deterministic(demo, few):
    (first, history), (second, again), (_, other) = (
        demo.train_digits(*few, epochs=2, seed=seed) for seed in (1, 1, 2)
    )
    assert history.losses == again.losses != other.losses
    assert history.accuracies == again.accuracies
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_split_is_fixed_and_disjoint(demo):
    train, held_out = demo.load_digits()
    assert len(held_out.scans) == demo.HELD_OUT
    assert sorted([*train.indices, *held_out.indices]) == list(range(1797))
    assert np.array_equal(held_out.indices, demo.load_digits()[1].indices)
    assert held_out.labels.bincount(minlength=10).min() > 30


def test_shifts_move_whole_images(demo):
    image = torch.full((64, 3, 8, 8), demo.BLACK)
    image[:, :, 4, 4] = 1
    places = (demo.shifted(image) == 1).nonzero()[:, 2:].unique(dim=0)
    assert places.tolist() == [[y, x] for y in (3, 4, 5) for x in (3, 4, 5)]


def test_principal_components_become_colours(demo):
    features = torch.randn(32, 6, 9)
    colours = demo.pca_colours(features)
    assert colours.shape == (6, 9, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    assert np.isfinite(demo.pca_colours(torch.ones(32, 6, 9))).all()
    assert np.allclose(colours, demo.pca_colours(3 * features + 1), atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "from_files", "said"),
    [(342, 342, ""), (342, 343, ""), (341, 341, "is under"), (350, 340, "tools/infer.py reads")],
)
def test_complaint(demo, trained, from_files, said):
    text = demo.complaint(trained, from_files, 360)
    assert (said in text) if said else not text


def test_failing_classification_is_reported(small_demo, tmp_path):
    with pytest.raises(RuntimeError, match=r"tools/infer\.py failed with exit code 2"):
        small_demo.infer(tmp_path / "none", "vim_none", tmp_path / "a.jsonl", tmp_path / "a.png")


def test_unusable_checkpoint_is_told_before_training(demo, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--checkpoint", str(tmp_path / "none.pth"), "--output", str(tmp_path)])
    assert "no checkpoint at" in capsys.readouterr().err


def test_feature_model_takes_a_checkpoint(demo, tmp_path):
    weights = timm.create_model(demo.ARCHITECTURE).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = demo.feature_model(tmp_path / "weights.safetensors").state_dict()
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name
