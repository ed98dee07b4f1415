"""Images with masks: layouts, broken annotations that are named, and samples that repeat."""

import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim.engine.data import loader_builder
from vim.engine.segmentation_data import build_loader

ROOT = Path(__file__).parents[2]
CAMVID = ROOT.parent / "shared/data/camvid11.tar"
SIZE = (20, 24)  # height, width
PLAIN = {"scale": (1.0, 1.0), "max_class_share": 1, "hflip": 0, "photometric": 0}

pytestmark = [
    # Said by torch on machines of one core, and by Python 3.12 of any fork beside a thread.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def ids(index, classes=3):
    mask = np.random.default_rng(index).integers(classes, size=SIZE, dtype=np.uint8)
    mask[0] = 255
    return mask


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(root, masks, image="images/train/{}.png", mask="masks/train/{}.png"):
    """Write images whose pixels are 10 times their number, and the masks."""
    for index, labels in enumerate(masks):
        save(root / image.format(f"a/{index}"), np.full((*SIZE, 3), 10 * index, dtype=np.uint8))
        save(root / mask.format(f"a/{index}"), labels)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data", [ids(index) for index in range(6)])
    (tmp_path / "data" / "classes.json").write_text(json.dumps(["sky", "road", "car"]))
    return tmp_path / "data"


def load(root, is_training=False, batch_size=1, **options):
    """Batches of the training split, as they are unless `is_training`."""
    dataset = {"root": str(root), "split": "train"}
    dataset |= {key: options.pop(key) for key in list(options) if key in DATASET}
    cfg = {"task": "segmentation", "dataset": dataset, "batch_size": batch_size, **options}
    if is_training:
        cfg = {"crop_size": (16, 16), **cfg}
    return build_loader(cfg, is_training=is_training)


DATASET = {"name", "layout", "num_classes", "classes", "reduce_zero_label", "on_corrupt"}
DATASET |= {"num_samples", "split", "img_size"}


@pytest.mark.parametrize("packed", ["folder", "tar"])
def test_a_folder_or_a_tar(folder, tmp_path, packed):
    if packed == "tar":
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            archive.add(folder, arcname=".")
        folder = tmp_path / "data.tar"
    loader = load(folder, batch_size=4)
    assert loader.dataset.class_names == ["sky", "road", "car"]
    first, second = loader
    assert (first["images"].shape, second["images"].shape) == ((4, 3, *SIZE), (2, 3, *SIZE))
    assert first["images"].dtype == first["targets"].dtype == torch.uint8
    for index, target in enumerate(torch.cat([first["targets"], second["targets"]])):
        assert torch.equal(target, torch.from_numpy(ids(index)))
    assert first["images"][3].unique().tolist() == [30]
    assert first["corrupt"] == 0


def test_ade20k(tmp_path):
    annotations = [np.where(ids(i) == 255, 0, ids(i) + 1).astype(np.uint8) for i in range(2)]
    write(tmp_path, annotations, "images/training/{}.jpg", "annotations/training/{}.png")
    loader = load(tmp_path, layout="ade20k", split="training", num_classes=3)
    for index, batch in enumerate(loader):
        assert torch.equal(batch["targets"][0], torch.from_numpy(ids(index)))


def test_reduce_zero_label_of_folders(tmp_path):
    write(tmp_path, [np.where(ids(0) == 255, 0, ids(0) + 1).astype(np.uint8)])
    (batch,) = load(tmp_path, reduce_zero_label=True, classes=["a", "b", "c"])
    assert torch.equal(batch["targets"][0], torch.from_numpy(ids(0)))


def test_cityscapes(tmp_path):
    mask = np.array([[7, 8, 33], [0, 3, 16]], dtype=np.uint8).repeat(2, 1)
    image = tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png"
    save(image, np.zeros((2, 6, 3), dtype=np.uint8))
    save(tmp_path / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", mask)
    save(tmp_path / "gtFine/train/ulm/ulm_0_gtFine_color.png", mask)
    loader = load(tmp_path, layout="cityscapes", num_classes=19)
    assert loader.dataset.class_names[18] == "bicycle"
    (batch,) = loader
    assert batch["targets"][0, :, ::2].tolist() == [[0, 1, 18], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["P", "I;16"])
def test_other_kinds_of_index_masks(folder, mode):
    image = Image.fromarray(ids(0))
    if mode == "P":
        image.putpalette([7 * value % 256 for value in range(768)])  # makes it "P"
    else:
        image = Image.fromarray(ids(0).astype(np.uint16))
    assert image.mode == mode
    image.save(folder / "masks/train/a/0.png")
    assert torch.equal(next(iter(load(folder)))["targets"][0], torch.from_numpy(ids(0)))


def breakage(name, folder):
    mask = folder / "masks/train/a/2.png"
    if name == "missing":
        mask.unlink()
    elif name == "size":
        Image.fromarray(ids(2)[:10]).save(mask)
    elif name == "class":
        Image.fromarray(np.full(SIZE, 7, dtype=np.uint8)).save(mask)
    elif name == "colours":
        Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(mask)
    elif name == "truncated":
        mask.write_bytes(mask.read_bytes()[:80])
    else:
        (folder / "images/train/a/2.png").write_bytes(b"")


REASONS = {
    "missing": r"mask .*masks/train/a/2\.png: missing",
    "size": r"it has 24 x 10 pixels, its image 24 x 20",
    "class": r"unknown class ids 7; there are 3 classes, and 255 for void",
    "colours": r"its pixels are RGB, a mask's are class ids",
    "truncated": r"mask .*2\.png: ",
    "image": "the file is empty",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_broken_stops_an_evaluation(folder, name):
    breakage(name, folder)
    with pytest.raises(RuntimeError, match=rf"(?s)images/train/a/2\.png .*{REASONS[name]}"):
        list(load(folder))


@pytest.mark.parametrize("name", REASONS)
def test_what_is_broken_is_named_and_replaced_in_training(folder, name, caplog):
    breakage(name, folder)
    loader = load(folder, is_training=True, batch_size=2)
    with caplog.at_level(logging.WARNING, "vim.data"):
        batches = list(loader)
    assert sum(batch["corrupt"] for batch in batches) == 1
    assert len(batches) == 3
    (file,) = loader.corrupt
    assert file == str(folder / "images/train/a/2.png")
    assert "another stands in for it" in caplog.text


def test_masks_without_image(folder, caplog):
    (folder / "images/train/a/2.png").unlink()
    with pytest.raises(ValueError, match=r"1 masks have no image, the first .*a/2\.png: remove"):
        load(folder)
    with caplog.at_level(logging.WARNING, "vim.data"):
        assert len(load(folder, on_corrupt="skip").dataset) == 5
    assert "1 masks have no image" in caplog.text


def batches(root, workers=0, seed=0, epoch=0, start=0, rank=0, world_size=1):
    cfg = {"dataset": {"root": str(root)}, "batch_size": 2, "num_workers": workers}
    cfg |= {"crop_size": (16, 16), "drop_last": False}
    loader = build_loader(cfg, seed=seed, rank=rank, world_size=world_size, is_training=True)
    loader.set_epoch(epoch, start)
    return [torch.cat([b["images"], b["targets"][:, None]], 1) for b in loader]


def test_samples_are_a_function_of_seed_epoch_and_position(folder):
    first = torch.cat(batches(folder))
    assert torch.equal(torch.cat(batches(folder)), first)
    assert torch.equal(torch.cat(batches(folder, workers=2)), first)
    assert torch.equal(torch.cat(batches(folder, start=2)), first[2:])
    assert not torch.equal(torch.cat(batches(folder, epoch=1)), first)
    assert not torch.equal(torch.cat(batches(folder, seed=1)), first)
    ranks = [torch.cat(batches(folder, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), first)


def test_images_of_several_sizes(folder):
    save(folder / "images/train/b.png", np.zeros((9, 9, 3), dtype=np.uint8))
    save(folder / "masks/train/b.png", np.zeros((9, 9), dtype=np.uint8))
    assert len(list(load(folder))) == 7
    with pytest.raises(ValueError, match="several sizes, 9 x 9 and 20 x 24: set batch_size=1"):
        list(load(folder, batch_size=7))


def test_made_up_images():
    dataset = {"name": "made-up", "num_samples": 4, "num_classes": 3, "img_size": 32}
    (batch,) = build_loader({"dataset": dataset, "batch_size": 4}, is_training=False)
    assert batch["images"].shape == (4, 3, 32, 32)
    assert batch["targets"].unique().tolist() == [0, 1, 2, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "coco"}, "layout must be one of folders, ade20k, cityscapes, got 'coco'"),
        ({"split": "val"}, "has no images in images/val"),
        ({"num_classes": 4}, "num_classes=4, but 3 classes are named"),
        ({"name": "voc"}, "dataset.name must be ''"),
        ({"img_size": 4}, "img_size is for name='made-up'"),
        ({"crop_size": (4, 4)}, "crop_size is for training"),
        ({"crop": 4}, "unknown key 'crop' in dataloader: did you mean crop_size"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_configs(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_more_bad_configs(folder, tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a folder with images/"):
        load(tmp_path / "nowhere")
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"is no uncompressed \.tar"):
        load(tmp_path / "x.tar")
    (folder / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"give dataset\.classes or num_classes"):
        load(folder)
    with pytest.raises(ValueError, match="needs the key 'crop_size'"):
        build_loader({"dataset": {"root": str(folder)}, "batch_size": 1}, is_training=True)
    with pytest.raises(ValueError, match=r"dataset\.root has no effect on name='made-up'"):
        load(folder, name="made-up")


def test_the_task_of_a_loader():
    assert loader_builder({"task": "segmentation"}) is build_loader
    assert loader_builder({}).__module__ == "vim.engine.data"
    assert loader_builder({"task": "detection"}).__module__ == "vim.engine.detection_data"
    with pytest.raises(ValueError, match="'segmentation' or 'detection', got 'depth'"):
        loader_builder({"task": "depth"})


@pytest.mark.skipif(not CAMVID.is_file(), reason=f"{CAMVID} is not there")
@pytest.mark.parametrize(("split", "images"), [("train", 367), ("val", 101), ("test", 233)])
def test_camvid(split, images):
    loader = load(CAMVID, split=split, num_classes=11, num_samples=8, batch_size=4)
    assert len(loader.dataset.source) == images
    assert loader.dataset.class_names[3] == "road"
    for batch in loader:
        assert batch["images"].shape == (4, 3, 360, 480)
        assert set(batch["targets"].unique().tolist()) <= {*range(11), 255}
