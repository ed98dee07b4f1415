"""Every sample is a function of (seed, epoch, position), and no bad file goes unnoticed."""

import functools
import io
import logging
import operator
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.distributed_sampler import RepeatAugSampler

from vim.engine.data import (
    EpochSampler,
    ImageDataset,
    Loader,
    StreamDataset,
    build_dataset,
    build_loader,
)
from vim.engine.images import read_image

pytestmark = [
    # Said by torch on machines of one core, and by Python 3.12 of any fork beside a thread.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
CLASSES, PER_CLASS = ("ant", "bee", "cat"), 6
RECIPE = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3}
ASK_FOR = {"is_training": True, "seed": 0}


def whole(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def picture(index):
    rng = np.random.default_rng(index)
    return Image.fromarray(rng.integers(256, size=(20, 24, 3), dtype=np.uint8))


def encoded(image, form="PNG"):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def write_images(folder):
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            path = folder / name / f"{index}.png"
            path.write_bytes(encoded(picture(number * PER_CLASS + index)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    write_images(path)
    return path


@pytest.fixture
def own_folder(tmp_path):
    path = tmp_path / "images"
    write_images(path)
    return path


def make_loader(root, **settings):
    is_training = settings.pop("is_training", True)
    dataset = {"root": str(root), **settings.pop("dataset", {})}
    places = {key: settings.pop(key) for key in ("seed", "rank", "world_size") if key in settings}
    settings = {"batch_size": 4, "input_size": 16, **settings}
    return build_loader({"dataset": dataset, **settings}, is_training=is_training, **places)


def batches(loader, epoch=0, start=0):
    loader.set_epoch(epoch, start)
    return list(loader)


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(a["targets"], b["targets"])
        assert a["corrupt"] == b["corrupt"]


# Sampler


def indices(length, epoch=0, **settings):
    sampler = EpochSampler(length, **{"shuffle": True, **settings})
    sampler.set_epoch(epoch)
    return [index for _, _, index in sampler]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("remainder", ["keep", "pad", "drop"])
def test_ranks_share_an_epoch(remainder, length, world_size):
    ranks = [
        indices(length, rank=rank, world_size=world_size, remainder=remainder)
        for rank in range(world_size)
    ]
    counts = np.bincount(functools.reduce(operator.iadd, ranks, []), minlength=length)
    if remainder == "keep":
        assert (counts == 1).all()
    else:
        assert len({len(rank) for rank in ranks}) == 1
        missing = -length % world_size if remainder == "pad" else -(length % world_size)
        assert counts.sum() == length + missing
        if remainder == "drop":
            assert counts.max() <= 1
        else:
            assert counts.min() >= 1


def test_the_samples_of_an_iteration_do_not_depend_on_the_world_size():
    alone = EpochSampler(24, shuffle=True)
    expected = list(alone)
    ranks = [list(EpochSampler(24, shuffle=True, rank=rank, world_size=4)) for rank in range(4)]
    for iteration in range(3):
        together = [key for rank in ranks for key in rank[2 * iteration : 2 * iteration + 2]]
        assert sorted(together) == sorted(expected[8 * iteration : 8 * iteration + 8])


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 5, 8])
def test_an_epoch_goes_on_where_it_stood(start, repeats):
    settings = {"shuffle": True, "rank": 1, "world_size": 3, "repeats": repeats}
    sampler = EpochSampler(24, **settings)
    sampler.set_epoch(2)
    expected = list(sampler)
    sampler.set_epoch(2, start)
    assert list(sampler) == expected[start:]
    assert len(sampler) == 8
    sampler.set_epoch(3)
    assert len(list(sampler)) == 8


def test_order():
    assert indices(50, shuffle=False) == list(range(50))
    orders = [indices(50, epoch, seed=seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert indices(50, 1, seed=2) == indices(50, 1, seed=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_repeats_are_those_of_deit(world_size):
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        reference = RepeatAugSampler(
            range(24), world_size, rank, shuffle=False, num_repeats=3, selected_round=0
        )
        assert indices(24, shuffle=False, repeats=3, **place) == list(reference)


def test_repeats_go_to_as_many_ranks():
    ranks = [indices(24, repeats=3, rank=rank, world_size=3) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]
    assert len(set(ranks[0])) == 8
    assert set(ranks[0]) != set(indices(24, 1, repeats=3, rank=0, world_size=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "at least one sample"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0..1, got 2"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"remainder": "cut"}, r"remainder must be one of .*'pad'.*, got 'cut'"),
    ],
)
def test_sampler_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{"length": 5, "shuffle": True, **settings})


def test_sampler_refuses_a_start_beyond_the_epoch():
    with pytest.raises(ValueError, match=r"start must be in 0..5"):
        EpochSampler(5, shuffle=True).set_epoch(0, 6)


# Reproducibility


@pytest.mark.parametrize(
    ("workers", "context"),
    [
        (2, "fork"),
        pytest.param(1, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_change_nothing(workers, context, folder):
    loaders = [
        make_loader(folder, augmentation=RECIPE, repeats=3),
        make_loader(
            folder,
            augmentation=RECIPE,
            repeats=3,
            num_workers=workers,
            multiprocessing_context=context,
        ),
    ]
    for epoch in (0, 1):
        assert_same(*(batches(loader, epoch) for loader in loaders))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_an_epoch_changes_nothing(workers, folder):
    expected = batches(make_loader(folder, augmentation=RECIPE, num_workers=workers), 3)
    again = batches(make_loader(folder, augmentation=RECIPE, num_workers=workers), 3, start=8)
    assert_same(again, expected[2:])
    assert len(expected) == 4


def test_augmentations_do_not_depend_on_the_world_size(folder):
    alone = batches(make_loader(folder, augmentation=RECIPE, batch_size=6))
    ranks = [
        batches(make_loader(folder, augmentation=RECIPE, batch_size=3, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for whole_batch, first, second in zip(alone, *ranks, strict=True):
        assert torch.equal(whole_batch["images"][0::2], first["images"])
        assert torch.equal(whole_batch["images"][1::2], second["images"])


def test_repeats_are_augmented_differently(folder):
    batch = batches(make_loader(folder, repeats=3, batch_size=3))[0]
    assert len(set(batch["targets"].tolist())) == 1
    assert len({image.numpy().tobytes() for image in batch["images"]}) == 3


def test_seeds_and_epochs_augment_differently(folder):
    settings = {"augmentation": RECIPE, "batch_size": 18}
    pictures = set()
    for seed in range(2):
        for epoch in range(2):
            batch = batches(make_loader(folder, seed=seed, **settings), epoch)[0]
            pictures |= {image.numpy().tobytes() for image in batch["images"]}
    assert len(pictures) == 4 * 18


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_generators_alone(workers, folder):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    batches(make_loader(folder, augmentation=RECIPE, num_workers=workers))
    assert draw() == expected


# Batches and evaluation


def test_batches_have_what_the_preprocessor_takes(folder):
    loader = make_loader(folder, input_size=(16, 20))
    for batch in batches(loader):
        assert batch.keys() == {"images", "targets", "corrupt"}
        assert batch["images"].shape == (4, 3, 16, 20)
        assert batch["images"].dtype == torch.uint8
        assert batch["targets"].shape == (4,)
        assert batch["targets"].dtype == torch.int64
        assert batch["corrupt"] == 0
    assert len(loader) == 4


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_has_every_image_once(workers, world_size, folder):
    settings = {"is_training": False, "num_workers": workers, "crop_pct": 1.0}
    seen = []
    for rank in range(world_size):
        loader = make_loader(folder, rank=rank, world_size=world_size, **settings)
        found = batches(loader)
        assert len(found) == len(loader)
        seen += [image.numpy().tobytes() for batch in found for image in batch["images"]]
    assert len(seen) == len(set(seen)) == len(CLASSES) * PER_CLASS


def test_an_evaluation_is_the_centre_crop_in_order(folder):
    loader = make_loader(folder, is_training=False, input_size=20, crop_pct=1.0)
    images = torch.cat([batch["images"] for batch in batches(loader)])
    targets = torch.cat([batch["targets"] for batch in batches(loader)])
    for index in range(len(CLASSES) * PER_CLASS):
        assert torch.equal(images[index], whole(picture(index))[:, :, 2:22])
        assert targets[index] == index // PER_CLASS


def test_the_last_batch_is_dropped_in_training_only(folder):
    sizes = [len(batch["targets"]) for batch in batches(make_loader(folder))]
    assert sizes == [4, 4, 4, 4]
    sizes = [len(batch["targets"]) for batch in batches(make_loader(folder, drop_last=False))]
    assert sizes == [4, 4, 4, 4, 2]
    sizes = [len(batch["targets"]) for batch in batches(make_loader(folder, is_training=False))]
    assert sizes == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_resolution_grows_with_the_epoch(workers, folder):
    resolutions = [(0, 16), (2, (24, 32)), (3, 40)]
    loader = make_loader(folder, input_size=None, resolutions=resolutions, num_workers=workers)
    sizes = [{tuple(b["images"].shape[2:]) for b in batches(loader, epoch)} for epoch in range(5)]
    assert sizes == [{(16, 16)}, {(16, 16)}, {(24, 32)}, {(40, 40)}, {(40, 40)}]


def test_mixed_resolutions_are_one_a_batch_on_all_ranks_and_after_resuming(folder):
    settings = {"input_size": None, "mixed_resolutions": [16, 24, 32], "batch_size": 1}

    def sizes(epoch, start=0, **settings):
        return [
            b["images"].shape[-1] for b in batches(make_loader(folder, **settings), epoch, start)
        ]

    ranks = [sizes(1, rank=rank, world_size=2, **settings) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert set(ranks[0]) == {16, 24, 32}
    assert sizes(1, start=3, rank=1, world_size=2, **settings) == ranks[1][3:]
    assert sizes(2, rank=0, world_size=2, **settings) != ranks[0]
    assert len(sizes(0, **{**settings, "batch_size": 5})) == 3


@pytest.mark.parametrize(
    "augmentation",
    [
        pytest.param({"auto_augment": "rand-m10-n15-inc1"}, id="rand-strongest"),
        pytest.param({"auto_augment": "v0-mstd0.5"}, id="auto"),
        pytest.param({"auto_augment": "augmix-m5-w4-d2"}, id="augmix"),
        pytest.param({"three_augment": True}, id="three"),
        pytest.param({"train_crop_mode": "rkrr", "color_jitter": (0.1, 0.1, 0.1)}, id="crop"),
        pytest.param({"scale": [0.5, 1], "ratio": [1, 1], "hflip": 0, "vflip": 1.0}, id="lists"),
    ],
)
def test_augmentations_of_timm_work(augmentation, folder):
    for epoch in range(5):
        for batch in batches(make_loader(folder, augmentation=augmentation), epoch):
            assert batch["images"].shape == (4, 3, 16, 16)


def test_three_augment_is_grey_solarised_or_blurred_and_jittered(folder):
    transform = make_loader(folder, augmentation={"three_augment": True}).dataset.transform
    names = [type(step).__name__ for step in transform.transforms]
    assert names.index("AutoAugment") < names.index("ColorJitter")
    auto_augment = transform.transforms[names.index("AutoAugment")]
    operations = [operation.name for policy in auto_augment.policy for operation in policy]
    assert operations == ["Solarize", "Desaturate", "GaussianBlurRand"]
    assert transform.transforms[names.index("ColorJitter")].brightness == (0.7, 1.3)


# Unreadable images


def truncated_jpeg():
    data = encoded(picture(0).resize((200, 200)), "JPEG")
    return data[: len(data) // 2]


BROKEN = {
    "truncated": (truncated_jpeg(), "truncated"),
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "not an image"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_are_stood_in_for(kind, workers, own_folder, caplog):
    data, reason = BROKEN[kind]
    path = own_folder / "bee" / "2.png"
    path.write_bytes(data)
    loader = make_loader(own_folder, batch_size=6, num_workers=workers)
    with caplog.at_level(logging.WARNING, "vim.data"):
        first = batches(loader)
        again = batches(loader)
    assert [sum(b["corrupt"] for b in epoch) for epoch in (first, again)] == [1, 1]
    assert_same(first, again)
    assert len(torch.cat([b["targets"] for b in first])) == len(CLASSES) * PER_CLASS
    assert list(loader.corrupt) == [str(path)]
    assert reason in loader.corrupt[str(path)]
    assert [record.name for record in caplog.records] == ["vim.data"]
    assert str(path) in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_stop_an_evaluation(workers, own_folder):
    path = own_folder / "bee" / "2.png"
    path.write_bytes(b"")
    loader = make_loader(own_folder, is_training=False, num_workers=workers)
    message = r"bee/2.png \(ValueError: the file is empty\): replace or .*on_corrupt='skip'"
    with pytest.raises(RuntimeError, match=message):
        list(loader)
    if workers:
        # The error's traceback keeps them; waiting for the garbage collector takes 5 seconds.
        loader._iterator._shutdown_workers()


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_are_read_once_and_change_nothing(workers, own_folder):
    broken = own_folder / "bee" / "2.png"
    broken.write_bytes(b"")
    expected = batches(make_loader(own_folder, num_workers=workers))
    loader = make_loader(own_folder, num_workers=workers, dataset={"cache": "decoded"})
    for path in own_folder.rglob("*.png"):
        if path != broken:
            path.unlink()
    assert_same(batches(loader), expected)
    assert list(loader.corrupt) == [str(broken)]
    assert loader.dataset.class_names == list(CLASSES)


def test_missing_images_are_broken(own_folder):
    loader = make_loader(own_folder, is_training=False, dataset={"on_corrupt": "skip"})
    (own_folder / "cat" / "5.png").unlink()
    assert sum(batch["corrupt"] for batch in loader) == 1
    assert "FileNotFoundError" in loader.corrupt[str(own_folder / "cat" / "5.png")]


def test_many_broken_images_in_a_row_stop_training(own_folder):
    loader = make_loader(own_folder)
    for path in own_folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(RuntimeError, match="10 images in a row cannot be read"):
        list(loader)


def test_errors_of_the_transform_are_not_the_images_fault(folder):
    def broken(image):
        raise ValueError("a bug")

    dataset = build_dataset({"root": str(folder)}, broken, is_training=True)
    with pytest.raises(ValueError, match="a bug"):
        dataset[0, 0, 0]


def test_a_tar_that_ends_early_is_broken(folder, tmp_path):
    path = write_tar(tmp_path / "x.tar", folder)
    loader = make_loader(path, is_training=False, dataset={"on_corrupt": "skip"})
    os.truncate(path, loader.dataset.source.offsets[-1] + 10)
    batches(loader)
    assert list(loader.corrupt) == [f"{path}:cat/5.png"]
    assert "the archive ends after 10 of" in loader.corrupt[f"{path}:cat/5.png"]


# Sources


def write_tar(path, folder):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, file.relative_to(folder))
    return path


def write_tar_of_tars(path, folder):
    with tarfile.open(path, "w") as tar:
        for name in CLASSES:
            inner = path.with_name(f"{name}.tar")
            with tarfile.open(inner, "w") as part:
                for file in sorted((folder / name).iterdir()):
                    part.add(file, f"{name}_{file.name}")
            tar.add(inner, inner.name)
    return path


def same_folder(path, folder):
    return folder


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(same_folder, "", id="folder"),
        pytest.param(write_tar, "", id="tar"),
        pytest.param(write_tar_of_tars, "", id="tar of tars"),
        pytest.param(same_folder, "torch/image_folder", id="torchvision"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_sources_agree(workers, make, name, folder, tmp_path):
    root = make(tmp_path / "x.tar", folder)
    settings = {"is_training": False, "num_workers": workers, "input_size": 20, "crop_pct": 1.0}
    loader = make_loader(root, dataset={"name": name, "num_classes": 3}, **settings)
    loader.dataset[0, 0, 0]  # opened here and then in the workers
    assert_same(batches(loader), batches(make_loader(folder, **settings)))
    assert loader.dataset.class_names == list(CLASSES)
    assert "0.png" in loader.dataset.source.name(0)


@pytest.mark.parametrize("split", ["train", "validation", None])
def test_splits_are_found(split, folder, tmp_path):
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / "val" / "ant").mkdir(parents=True)
    (tmp_path / "val" / "ant" / "x.png").write_bytes(encoded(picture(0)))
    for is_training in (False, True):
        dataset = build_dataset({"root": str(tmp_path), "split": split}, whole, is_training)
        train = is_training if split is None else split == "train"
        assert len(dataset) == (18 if train else 1)


def test_a_class_map_decides_indices(folder, tmp_path):
    for class_map in ({"bee": 0, "ant": 4}, str(tmp_path / "classes.txt")):
        (tmp_path / "classes.txt").write_text("bee\n-\n-\n-\nant\n")
        cfg = {"root": str(folder), "class_map": class_map, "num_classes": 7}
        dataset = build_dataset(cfg, whole, is_training=False)
        assert [dataset[0, 0, i].target for i in range(12)] == [4] * 6 + [0] * 6
        assert len(dataset) == 12
        assert dataset.class_names[4] == "ant"


@pytest.mark.parametrize("num_samples", [1, 5, 18])
def test_num_samples_are_evenly_spaced(num_samples, folder):
    cfg = {"root": str(folder), "num_samples": num_samples}
    dataset = build_dataset(cfg, whole, is_training=True)
    targets = [dataset[0, 0, index].target for index in range(len(dataset))]
    assert len(targets) == num_samples
    assert max(np.bincount(targets)) <= num_samples // 3 + 1


@pytest.mark.parametrize("name", ["x.webp", "x.BMP", "x.JPEG", "x.txt"])
@pytest.mark.parametrize("archive", [False, True])
def test_images_are_told_by_extension(archive, name, own_folder, tmp_path):
    with open(own_folder / "ant" / name, "wb") as file:
        picture(0).save(file, "JPEG" if name == "x.JPEG" else "WEBP")
    root = tmp_path / "x.tar" if archive else own_folder
    if archive:
        with tarfile.open(root, "w") as tar:
            tar.add(own_folder, ".")
    dataset = build_dataset({"root": str(root)}, whole, is_training=False)
    assert len(dataset) == 18 + (name != "x.txt")


@pytest.mark.parametrize("image", ["alpha", "palette", "rotated", "16 bit"])
def test_images_are_read_as_in_inference(image, tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / ("x.tif" if image == "16 bit" else "x.png")
    pixels = np.random.default_rng(0).integers(256, size=(6, 4, 4), dtype=np.uint8)
    if image == "alpha":
        Image.fromarray(pixels).save(path)
    elif image == "palette":
        Image.fromarray(pixels[..., :3]).convert("P").save(path, transparency=0)
    elif image == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels[..., :3]).save(path, exif=exif)
    else:
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(path)
    dataset = build_dataset({"root": str(tmp_path)}, whole, is_training=False)
    assert torch.equal(dataset[0, 0, 0].image, whole(read_image(path)))


def test_made_up_images():
    cfg = {"name": "made-up", "num_samples": 20, "num_classes": 4, "img_size": 8}
    train, again, validation = (
        build_dataset(cfg, whole, is_training) for is_training in (True, True, False)
    )
    for index in range(20):
        sample = train[0, 0, index]
        assert sample.image.shape == (3, 8, 8)
        assert sample.target == index % 4
        assert torch.equal(sample.image, again[5, 5, index].image)
        assert not torch.equal(sample.image, validation[0, 0, index].image)
    assert len(train) == 20


def test_digits():
    pytest.importorskip("sklearn")
    train, validation = (build_dataset({"name": "digits"}, whole, t) for t in (True, False))
    assert (len(train), len(validation)) == (1437, 360)
    images = {d[0, 0, i].image.numpy().tobytes() for d in (train, validation) for i in range(360)}
    assert len(images) == 720
    assert {validation[0, 0, index].target for index in range(360)} == set(range(10))
    assert train.class_names == list("0123456789")


# Iterable data sets


class Shards:
    """Stands for timm's readers of shards: worker w of n has every n-th image."""

    def __init__(self, length, batch_size):
        self.length, self.batch_size = length, batch_size

    def __len__(self):
        return self.length

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for index in range(worker, self.length, workers):
            yield picture(index), index

    def set_epoch(self, epoch):
        self.epoch = epoch


def crop(image):
    left = random.randrange(8)
    return whole(image)[:, :16, left : left + 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_seeded_and_follow_the_epoch(workers):
    def make():
        dataset = StreamDataset(IterableImageDataset("", Shards(24, 4)), crop)
        options = {"persistent_workers": True} if workers else {}
        return Loader(dataset, batch_size=4, num_workers=workers, **options)

    loader, other = make(), make()
    first, second = batches(loader, 0), batches(loader, 1)
    assert len(first) == len(loader) == 6
    targets = sorted(torch.cat([batch["targets"] for batch in first]).tolist())
    assert targets == list(range(24))
    assert_same(batches(other, 1), second)
    assert any(
        not torch.equal(a["images"], b["images"]) for a, b in zip(first, second, strict=True)
    )


def test_streams_shorten_a_resumed_epoch_and_say_so(caplog):
    loader = Loader(StreamDataset(IterableImageDataset("", Shards(24, 4)), crop), batch_size=4)
    assert len(batches(loader, 0, start=8)) == 4
    assert "cannot go on at sample 8 of epoch 0" in caplog.text
    assert len(batches(loader, 1)) == 6


def write_shards(folder):
    for shard in range(4):
        with tarfile.open(folder / f"x-train-{shard:04d}.tar", "w") as tar:
            for index in range(shard * 6, shard * 6 + 6):
                parts = {"png": encoded(picture(index)), "cls": str(index).encode()}
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{index:03d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {"name": "wds/x", "root": str(folder), "split": "x-train-{0000..0003}.tar|24"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset(workers, tmp_path):
    pytest.importorskip("webdataset")
    settings = {"dataset": write_shards(tmp_path), "batch_size": 4, "input_size": 16}
    settings["num_workers"] = workers
    loader = build_loader(settings, **ASK_FOR)
    found = batches(loader)
    assert len(found) == len(loader) == 6
    loader = build_loader(settings, is_training=False)
    targets = torch.cat([batch["targets"] for batch in batches(loader)]).tolist()
    assert targets == list(range(24))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": {"on_corrupt": "error"}}, "can only skip unreadable images"),
        ({"dataset": {"cache": "decoded"}}, "dataset.cache has no effect on name='wds/x'"),
        ({"repeats": 3}, "repeated augmentation needs images by index"),
        ({"world_size": 2, "is_training": False}, "cannot be evaluated exactly on several ranks"),
        ({"world_size": 2}, "initialise the process group"),
    ],
)
def test_streams_refuse(settings, message, monkeypatch):
    stream = IterableImageDataset("", Shards(24, 4))
    monkeypatch.setattr("vim.engine.data.create", lambda cfg, **options: stream)
    settings = {**settings, "dataset": {"name": "wds/x", **settings.get("dataset", {})}}
    with pytest.raises(ValueError, match=message):
        make_loader("/data", **settings)


# Configs that cannot be right


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"rot": "x"}, r"unknown key 'rot' in dataset: did you mean root\? allowed:"),
        ({"root": "/nowhere/at/all"}, r"'/nowhere/at/all' does not exist: give a folder"),
        ({}, r"root='' does not exist"),
        ({"name": "imagenet"}, r"unknown data set name 'imagenet': allowed are"),
        ({"name": "s3/imagenet"}, r"unknown data set name 's3/imagenet'"),
        ({"name": "torch/nonesuch"}, r"cannot open the data set name='torch/nonesuch'"),
        ({"name": "digits", "root": "x"}, r"dataset.root has no effect on name='digits'"),
        ({"name": "", "download": True}, r"dataset.download has no effect"),
        ({"name": "made-up", "split": "tset"}, r"has the splits train and validation, got 'tset'"),
        ({"name": "made-up", "cache": "raw"}, r"cache must be None or 'decoded', got 'raw'"),
        ({"name": "made-up", "on_corrupt": "stop"}, r"must be 'skip' or 'error', got 'stop'"),
    ],
)
def test_dataset_refuses(cfg, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(cfg, whole, is_training=True)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"num_classes": 2}, r"num_classes=2, but there are 3 classes, ant, bee, cat"),
        ({"num_classes": 4}, r"one missing folder shifts"),
        ({"num_samples": 19}, r"num_samples must be in 1..18, got 19"),
        ({"class_map": "nowhere.txt"}, r"nowhere.txt"),
    ],
)
def test_dataset_refuses_what_is_not_there(cfg, message, folder):
    with pytest.raises(ValueError, match=message):
        build_dataset({"root": str(folder), **cfg}, whole, is_training=True)


def test_a_split_that_is_not_there_is_refused(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder)
    with pytest.raises(ValueError, match=r"no folder for the split 'validation', only \['train'\]"):
        build_dataset({"root": str(tmp_path)}, whole, is_training=False)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_an_archive_without_images_is_refused(content, tmp_path):
    path = tmp_path / "x.tar"
    if content is None:
        tarfile.open(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no .tar of class folders with images"):
        build_dataset({"root": str(path)}, whole, is_training=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batchsize": 4}, r"unknown key 'batchsize' in dataloader: did you mean batch_size"),
        ({"augmentation": {"auto_agument": "x"}}, r"'auto_agument' in augmentation: did you mean"),
        ({"augmentation": {"re_prob": 0.25}}, r"give re_prob to the data_preprocessor"),
        ({"augmentation": {"normalize": True}}, r"unknown key 'normalize'"),
        (
            {"augmentation": {"three_augment": True, "auto_augment": "v0"}},
            r"exclude each other",
        ),
        ({"is_training": False, "augmentation": {"hflip": 0.5}}, r"'hflip' in the augmentation of"),
        ({"is_training": False, "repeats": 3}, r"repeats=3 is for training"),
        ({"is_training": False, "drop_last": True}, r"drop_last=True is for training"),
        ({"crop_pct": 0.9}, r"crop_pct is for evaluation"),
        ({"input_size": None}, r"needs one of input_size, .* got none"),
        ({"resolutions": [(0, 16)]}, r"got input_size and resolutions"),
        ({"input_size": None, "resolutions": [(1, 16)]}, r"rising epochs from 0"),
        ({"input_size": None, "resolutions": [(0, 16), (0, 24)]}, r"rising epochs from 0"),
        ({"input_size": 0}, r"in pixels, got 0"),
        ({"input_size": (3, 16, 16)}, r"an integer or \(height, width\)"),
        ({"batch_size": 0}, r"batch_size must be at least 1"),
        ({"batch_size": None}, r"needs the key 'batch_size'"),
        ({"batch_size": 19}, r"18 images do not make one batch of 19 on each of 1 ranks"),
    ],
)
def test_loader_refuses(settings, message, folder):
    with pytest.raises(ValueError, match=message):
        make_loader(folder, **settings)


# Processes


def test_workers_survive_the_signals_that_stop_training(folder):
    loader = make_loader(folder, num_workers=2, batch_size=1, dataset={"num_samples": 12})
    expected = batches(loader)
    loader.set_epoch(0)
    iterator = iter(loader)
    found = [next(iterator)]
    for worker in loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    found += list(iterator)
    assert_same(found, expected)


SCRIPT = """
import sys
from vim.engine.data import build_loader
cfg = dict(dataset=dict(name="made-up"), batch_size=2, input_size=16, num_workers=2)
iterator = iter(build_loader(cfg, is_training=True))
next(iterator)
raise RuntimeError("stopped here")
"""


@pytest.mark.slow
def test_an_error_in_training_ends_the_workers():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 1
    assert b"stopped here" in done.stderr


# Real images


def imagenette(split):
    for base in (ROOT, ROOT.parent):
        path = base / "shared" / "data" / f"imagenette128_{split}.tar"
        if path.is_file():
            return path
    pytest.skip(f"shared/data/imagenette128_{split}.tar is not on this machine")


@pytest.mark.parametrize(("split", "length"), [("train", 9469), ("val", 3925)])
def test_imagenette(split, length):
    is_training = split == "train"
    settings = {"augmentation": RECIPE, "repeats": 3} if is_training else {"crop_pct": 0.875}
    loader = make_loader(
        imagenette(split),
        dataset={"num_classes": 10, "on_corrupt": "error"},
        is_training=is_training,
        batch_size=64,
        input_size=128,
        **settings,
    )
    loader.set_epoch(0)
    batch = next(iter(loader))
    assert len(loader.dataset) == length
    assert batch["images"].shape == (64, 3, 128, 128)
    assert 60 < batch["images"].float().mean() < 180
    assert loader.dataset.class_names[0] == "n01440764"
    assert isinstance(loader.dataset, ImageDataset)
