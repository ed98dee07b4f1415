"""Images with objects: layouts, broken annotations that are named, and samples that repeat."""

import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("faster_coco_eval")

from vim.engine._annotations import mask_of
from vim.engine.data import loader_builder
from vim.engine.detection_data import build_loader

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
SIZE = (20, 24)  # height, width
SQUARE = [[2, 3, 12, 3, 12, 13, 2, 13]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def annotation(number=1, image=1, **changes):
    box = {"bbox": [2, 3, 10, 10], "area": 100, "iscrowd": 0, "segmentation": SQUARE}
    return {"id": number, "image_id": image, "category_id": 7} | box | changes


def dataset_of(annotations, images=3):
    return {
        "images": [
            {"id": i, "file_name": f"a/{i}.png", "width": SIZE[1], "height": SIZE[0]}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}],
    }


def write(root, data, file="instances_train.json"):
    (root / "images" / "a").mkdir(parents=True, exist_ok=True)
    for index in range(1, 4):
        pixels = np.full((*SIZE, 3), 10 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / "a" / f"{index}.png")
    (root / file).write_text(json.dumps(data))
    return root


KEYS = {"name", "layout", "num_classes", "classes", "on_corrupt", "on_fault", "num_samples"}
KEYS |= {"split", "img_size", "masks", "keep_empty", "annotations", "images"}


def load(root, is_training=False, batch_size=1, **options):
    dataset = {"root": str(root)} if root else {}
    if root and "layout" not in options:
        dataset["annotations"] = "instances_train.json"
    dataset |= {key: options.pop(key) for key in list(options) if key in KEYS}
    cfg = {"task": "detection", "dataset": dataset, "batch_size": batch_size, **options}
    if is_training:
        cfg = {"crop_size": (16, 16), **cfg}
    return loader_builder(cfg)(cfg, is_training=is_training)


@pytest.mark.parametrize("packed", ["folder", "tar"])
def test_a_folder_or_a_tar(tmp_path, packed):
    objects = [
        annotation(),
        annotation(2, category_id=9, bbox=[0, 0, 4, 5]),
        annotation(3, image=2),
    ]
    root = write(tmp_path / "data", dataset_of(objects))
    if packed == "tar":
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            archive.add(root, arcname=".")
        root = tmp_path / "data.tar"
    loader = load(root, batch_size=2)
    assert loader.dataset.class_names == ["cat", "dog"]
    first, second = loader
    assert [image.shape for image in first["images"]] == [(3, *SIZE)] * 2
    assert first["images"][1].unique().tolist() == [20]
    target = first["targets"][0]
    assert (target["image_id"], target["size"], target["file_name"]) == (1, SIZE, "a/1.png")
    assert [each["label"] for each in target["annotations"]] == [1, 2]
    assert second["targets"][0]["annotations"] == []
    assert loader.dataset.faults == []


def test_a_training_sample(tmp_path):
    crowd = {"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}
    objects = [annotation(), annotation(2, iscrowd=1, segmentation=crowd)]
    root = write(tmp_path, dataset_of(objects))
    plain = {"augmentation": {"scale": (1.0, 1.0), "hflip": 0}, "crop_size": SIZE, "masks": True}
    loader = load(root, True, **plain, drop_last=False)
    (target,) = (t for batch in loader for t in batch["targets"] if len(t["labels"]))
    assert target["boxes"].tolist() == [[2, 3, 12, 13]]
    assert target["labels"].tolist() == [1]
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    expected[3:13, 2:12] = 1
    assert torch.equal(target["masks"][0], expected)


def test_samples_repeat(tmp_path):
    root = write(tmp_path, dataset_of([annotation(i, image=i) for i in (1, 2, 3)]))

    def epoch(number):
        loader = load(root, True, masks=True)
        loader.set_epoch(number)
        return [batch["images"][0] for batch in loader]

    for ours, theirs in zip(epoch(1), epoch(1), strict=True):
        assert torch.equal(ours, theirs)
    assert not all(torch.equal(a, b) for a, b in zip(epoch(1), epoch(2), strict=True))


FAULTS = {
    "box outside": {"bbox": [20, 10, 8, 5]},
    "zero area": {"bbox": [2, 3, 0, 10]},
    "unknown class": {"category_id": 5},
    "unknown image": {"image_id": 12},
    "broken annotations": {"bbox": [1, 2, 3]},
    "mask size": {"segmentation": {"size": [4, 4], "counts": [0, 16]}},
    "broken mask": {"segmentation": [[1, 2, 3, 4]]},
}


@pytest.mark.parametrize("on_fault", ["repair", "drop", "error"])
@pytest.mark.parametrize("kind", FAULTS)
def test_broken_annotations(tmp_path, kind, on_fault, caplog):
    changes = dict(FAULTS[kind])
    image = changes.pop("image_id", 1)
    objects = [annotation(), annotation(2, image, **changes)]
    root = write(tmp_path, dataset_of(objects))
    caplog.set_level(logging.WARNING)
    if on_fault == "error":
        with pytest.raises(
            ValueError, match=rf"(?s)1 annotations are broken, 1 of '{kind}'.*on_fault"
        ):
            load(root, masks=True, on_fault="error")
        return
    loader = load(root, masks=True, on_fault=on_fault)
    (fault,) = loader.dataset.faults
    assert fault.kind == kind
    assert "annotation 2" in fault.where
    assert f"1 of '{kind}'" in caplog.text
    assert str(fault) in caplog.text
    found = next(iter(loader))["targets"][0]["annotations"]
    if kind == "box outside" and on_fault == "repair":
        assert fault.action == "cut off at the image's edge"
        assert found[1]["bbox"] == [20, 10, 4, 5]
    else:
        assert fault.action == "left out"
        assert [each["id"] for each in found] == [1]


def test_a_box_beyond_the_image_cannot_be_repaired(tmp_path):
    root = write(tmp_path, dataset_of([annotation(bbox=[30, 3, 5, 5])]))
    (fault,) = load(root, on_fault="repair").dataset.faults
    assert (fault.kind, fault.action) == ("box outside", "left out")


def test_rounding_is_no_fault(tmp_path):
    root = write(tmp_path, dataset_of([annotation(bbox=[-0.4, 3, 24.9, 10])]))
    assert load(root).dataset.faults == []
    plain = {"augmentation": {"scale": (1.0, 1.0), "hflip": 0}, "crop_size": SIZE}
    loader = load(root, True, **plain)
    boxes = torch.cat([target["boxes"] for batch in loader for target in batch["targets"]])
    assert boxes.tolist() == [[0, 3, 24, 13]]


def test_what_masks_are_broken_matters_only_where_they_are_read(tmp_path):
    root = write(tmp_path, dataset_of([annotation(segmentation=[])]))
    assert load(root).dataset.faults == []
    assert len(load(root, masks=True, on_fault="drop").dataset.faults) == 1


def test_a_missing_image(tmp_path):
    root = write(tmp_path, dataset_of([annotation(), annotation(2, image=2)]))
    (root / "images/a/2.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 of 'missing image'.*2.png.*it has 1 annotations"):
        load(root)
    loader = load(root, on_fault="repair")
    assert len(loader.dataset) == 2
    assert loader.dataset.faults[0].kind == "missing image"


def test_a_broken_image_or_one_of_another_size(tmp_path):
    root = write(tmp_path, dataset_of([annotation()]))
    Image.new("RGB", (5, 5)).save(root / "images/a/2.png")
    (root / "images/a/3.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"2.png.*5 x 5 pixels, its annotations are for 24 x 20"):
        list(load(root))
    loader = load(root, True)
    batches = list(loader)
    assert len(batches) == 3
    assert {Path(file).name for file in loader.corrupt} == {"2.png", "3.png"}


def test_images_without_objects(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = write(tmp_path, dataset_of([annotation(), annotation(2, image=2, iscrowd=1)]))
    assert len(load(root).dataset) == 3
    assert len(load(root, keep_empty=False).dataset) == 1
    assert "2 of 3 images have no object" in caplog.text
    with pytest.raises(ValueError, match="keep_empty=True"):
        load(write(tmp_path, dataset_of([])), keep_empty=False)


def test_a_choice_of_classes(tmp_path):
    root = write(tmp_path, dataset_of([annotation(), annotation(2, category_id=9)]))
    loader = load(root, classes=["dog"], on_fault="drop", num_classes=1)
    assert loader.dataset.categories == [{"id": 9, "name": "dog"}]
    found = next(iter(loader))["targets"][0]["annotations"]
    assert [(each["id"], each["label"]) for each in found] == [(2, 1)]
    with pytest.raises(ValueError, match=r"no category cow; it has cat, dog"):
        load(root, classes=["cow"])


VOC = """<annotation><filename>{0}.png</filename>
<size><width>24</width><height>20</height><depth>3</depth></size>
<object><name>{1}</name><difficult>{2}</difficult>
<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>{3}</xmax><ymax>13</ymax></bndbox></object></annotation>
"""


@pytest.fixture
def voc(tmp_path):
    write(tmp_path, {})
    (tmp_path / "images").rename(tmp_path / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a/1\na/2\n")
    (tmp_path / "Annotations/a").mkdir()
    (tmp_path / "Annotations/a/1.xml").write_text(VOC.format("a/1", "cat", 0, 12))
    (tmp_path / "Annotations/a/2.xml").write_text(VOC.format("a/2", "dog", 1, 12))
    return tmp_path


def test_pascal_voc(voc):
    loader = load(voc, layout="voc", split="train")
    assert loader.dataset.class_names[7] == "cat"
    first, second = (batch["targets"][0]["annotations"][0] for batch in loader)
    # The pixels 3 to 12 and 4 to 13, counted from 1.
    assert first["bbox"] == [2, 3, 10, 10]
    assert (first["label"], first["iscrowd"]) == (8, 0)
    assert (second["label"], second["iscrowd"]) == (12, 1)
    boxes = [t["boxes"] for batch in load(voc, True, layout="voc") for t in batch["targets"]]
    assert len(boxes) == 2


def test_faults_of_pascal_voc(voc):
    (voc / "ImageSets/Main/train.txt").write_text("a/1\na/2\na/3\na/4\n")
    (voc / "Annotations/a/1.xml").write_text(VOC.format("a/1", "unicorn", 0, 40))
    (voc / "Annotations/a/2.xml").write_text(VOC.format("a/2", "dog", 0, 40))
    (voc / "Annotations/a/3.xml").write_text("<annotation><size/>")
    dataset = load(voc, layout="voc", split="train", on_fault="repair").dataset
    kinds = [fault.kind for fault in dataset.faults]
    assert kinds == ["broken annotations", "missing annotations", "unknown class", "box outside"]
    assert len(dataset) == 2
    with pytest.raises(ValueError, match="4 annotations are broken"):
        load(voc, layout="voc", split="train")
    with pytest.raises(ValueError, match=r"no .*test.txt.*there are .*train.txt"):
        load(voc, layout="voc", split="test")


def test_run_lengths():
    counts = [0, 5, SIZE[0] * SIZE[1] - 5]
    mask = mask_of({"size": list(SIZE), "counts": counts}, *SIZE)
    assert mask[:5, 0].tolist() == [1] * 5
    assert mask.sum() == 5
    assert mask_of(SQUARE, *SIZE).sum() == 100


def test_made_up_images():
    loader = load(None, name="made-up", num_samples=4, masks=True, img_size=32)
    batches = list(loader)
    assert len(batches) == 4
    assert batches[0]["images"][0].shape == (3, 32, 48)
    for batch in batches:
        for each in batch["targets"][0]["annotations"]:
            left, top, w, h = each["bbox"]
            mask = mask_of(each["segmentation"], 32, 48)
            assert mask.sum() == w * h == mask[top : top + h, left : left + w].sum()
    again = next(iter(load(None, name="made-up", num_samples=4, img_size=32)))
    assert torch.equal(again["images"][0], batches[0]["images"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "yolo"}, r"layout must be one of coco, voc, got 'yolo'"),
        ({"on_fault": "ignore"}, r"on_fault must be 'repair', 'drop' or 'error', got 'ignore'"),
        ({"split": "train"}, "dataset.split has no effect on layout='coco'"),
        ({"layout": "voc", "masks": True}, "layout='voc' has boxes alone"),
        ({"num_classes": 5}, r"num_classes=5, but the data have the 2 classes cat, dog"),
        ({"img_size": 5}, "img_size is for name='made-up'"),
        ({"annotations": "no.json"}, r"no .*no.json: correct dataset.root or dataset.annotations"),
        ({"annotations": "list.json"}, "not in COCO's format"),
        ({"annotations": "text.json"}, "is no JSON"),
        ({"images": "nowhere", "on_fault": "drop"}, "none of the 3 images can be used"),
        ({"name": "x"}, r"name must be '' \(files in root\) or 'made-up', got 'x'"),
        ({"name": "made-up"}, "has no effect on name='made-up': remove it"),
        ({"crop_size": (8, 8)}, "crop_size is for training"),
    ],
)
def test_bad_configs(tmp_path, options, message):
    root = write(tmp_path, dataset_of([annotation()]))
    (root / "list.json").write_text("[]")
    (root / "text.json").write_text("{")
    with pytest.raises(ValueError, match=message):
        load(root, **options)


def test_what_is_missing():
    with pytest.raises(ValueError, match="'nowhere' does not exist: give a folder"):
        load("nowhere")
    with pytest.raises(ValueError, match="needs the key 'crop_size'"):
        build_loader({"dataset": {}, "batch_size": 1}, is_training=True)
    with pytest.raises(ValueError, match="unknown key 'scal' in augmentation: did you mean scale"):
        load(None, True, name="made-up", augmentation={"scal": 1})


@pytest.mark.parametrize(
    ("tar", "name", "images", "objects", "masks"),
    [
        ("bccd_coco.tar", "test.json", 72, 945, False),
        ("coco128_seg.tar", "instances.json", 128, 929, True),
    ],
)
def test_real_data(tar, name, images, objects, masks):
    if not (DATA / tar).is_file():
        pytest.skip(f"{DATA / tar} is not there")
    cfg = {"root": str(DATA / tar), "annotations": name, "masks": masks}
    options = {"task": "detection", "dataset": cfg, "batch_size": 4}
    loader = build_loader(options, is_training=False)
    assert len(loader.dataset) == images
    assert sum(map(len, loader.dataset.source.annotations.objects)) == objects
    assert loader.dataset.faults == []
    loader = build_loader({**options, "crop_size": (64, 64)}, is_training=True)
    batch = next(iter(loader))
    for target in batch["targets"]:
        boxes = target["boxes"]
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()
        assert boxes.numel() == 0 or (boxes.min() >= 0 and boxes.max() <= 64)
        if masks:
            assert target["masks"].shape == (len(boxes), 64, 64)
