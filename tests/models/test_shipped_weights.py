"""The weights inside the package: there, unchanged, as good as their card says, and offline."""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch

import vim
from vim.engine.data import build_loader
from vim.engine.inference import class_names, resolve_data_config
from vim.engine.preprocessing import Preprocessor

NAME = "vim_micro_patch8_128"
FOLDER = Path(vim.__file__).parent / "models" / "weights"
FILE = FOLDER / f"{NAME}.imagenette.safetensors"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def facts():
    return json.loads((FOLDER / f"{NAME}.imagenette.json").read_text())


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return timm.create_model(NAME, pretrained=True).eval()


def test_the_file_is_the_one_that_was_tested(facts):
    data = FILE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == facts["sha256"]
    assert len(data) == facts["bytes"] <= 6_000_000


def test_the_card_says_what_was_measured(facts):
    card = (FOLDER / "README.md").read_text("utf-8")
    for text in (f"{facts['top1']:.2f} % top-1", facts["sha256"], f"{facts['bytes']:,} bytes"):
        assert text in card
    assert "non-commercial" in card
    assert facts["top1"] >= 90


def test_the_logits_are_those_that_were_tested(facts, model):
    numbers = torch.arange(3 * 128 * 128, dtype=torch.float64)
    image = torch.sin(0.37 * numbers).float().view(1, 3, 128, 128)
    with torch.no_grad():
        logits = model(image)[0]
    torch.testing.assert_close(logits, torch.tensor(facts["logits"]), rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"] <= 3_000_000


def test_it_names_its_classes(model):
    assert class_names(model)[:2] == ["tench", "English springer"]
    assert model.default_cfg["tag"] == "imagenette"


def test_it_starts_another_training():
    model = timm.create_model(NAME, pretrained=True, num_classes=3, in_chans=1, img_size=64)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 3)


def test_some_of_the_validation_images(facts, model):
    """120 images, evenly spaced over the classes: three standard deviations below is too low."""
    places = (base / "shared" / "data" / "imagenette128_val.tar" for base in (ROOT, ROOT.parent))
    tar = next((path for path in places if path.is_file()), None)
    if tar is None:
        pytest.skip("shared/data/imagenette128_val.tar is not on this machine")
    data = resolve_data_config(model)
    loader = build_loader(
        {
            "dataset": {"root": str(tar), "split": "validation", "num_samples": 120},
            "batch_size": 30,
            "input_size": data["input_size"][1:],
            "crop_pct": data["crop_pct"],
        },
        is_training=False,
    )
    prepare, right = Preprocessor(mean=data["mean"], std=data["std"]), 0
    with torch.no_grad():
        for batch in map(prepare, loader):
            right += (model(batch["images"]).argmax(-1) == batch["targets"]).sum().item()
    share = facts["top1"] / 100
    assert right >= 120 * share - 3 * (120 * share * (1 - share)) ** 0.5
