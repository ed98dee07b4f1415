"""What reaches the model: normalised in float32, erased and mixed as timm does, reproducibly."""

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.model import BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from torch.utils.data import DataLoader

from vim.engine.preprocessing import Preprocessor
from vim.engine.seeding import seed_everything_at

CLASSES = 5
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


class Model(BaseModel):
    def forward(self, images):
        return images


def make_batch(size=4, image_size=(16, 12)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, *image_size), dtype=torch.uint8, generator=generator)
    return {"images": images, "targets": torch.arange(size) % CLASSES, "corrupt": 0}


def normalised(batch, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
    return (batch["images"].double() / 255 - mean) / std


def test_mixing_ends_with_its_share_of_the_training():
    batch = make_batch()
    prepare = Preprocessor(mixup=0.8, mixup_until=0.9, label_smoothing=0.1, num_classes=CLASSES)
    plain = Preprocessor(label_smoothing=0.1, num_classes=CLASSES)(batch, training=True)
    for progress, mixed in ((0.0, True), (0.89, True), (0.9, False), (1.0, False)):
        prepare.progress = progress
        seed_everything_at(0, 0, 1)
        out = prepare(batch, training=True)
        assert torch.equal(out["images"], plain["images"]) != mixed
        assert torch.equal(out["targets"], plain["targets"]) != mixed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
def test_images_are_normalised_in_float32(device, training):
    batch = make_batch()
    out = Preprocessor().to(device)(batch, training)
    assert out["images"].dtype == torch.float32
    assert out["images"].device.type == out["targets"].device.type == device
    # 255 mean and 255 std are rounded to float32, then two operations: some ulps of values < 3.
    torch.testing.assert_close(
        out["images"].cpu().double(), normalised(batch), rtol=0, atol=4 * 3 * 2**-23
    )
    assert torch.equal(out["targets"].cpu(), batch["targets"])
    assert out.keys() == {"images", "targets"}


def test_own_mean_and_std():
    batch = make_batch()
    out = Preprocessor(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))(batch)
    expected = normalised(batch, (0.5, 0.5, 0.5), (0.5, 0.25, 1.0))
    torch.testing.assert_close(out["images"].double(), expected, rtol=0, atol=4 * 4 * 2**-23)


def test_a_model_in_bfloat16_keeps_float32_statistics_and_no_state():
    batch = make_batch()
    model = Model(data_preprocessor={"type": "VimPreprocessor"}).to(torch.bfloat16)
    assert torch.equal(model.data_preprocessor(batch)["images"], Preprocessor()(batch)["images"])
    assert not model.state_dict()


@pytest.mark.gpu
def test_a_model_takes_it_along_to_the_gpu():
    model = Model(data_preprocessor={"type": "VimPreprocessor"}).to("cuda")
    assert model.data_preprocessor(make_batch())["images"].device.type == "cuda"


@pytest.mark.parametrize("training", [False, True])
def test_channels_last(training):
    settings = {"re_prob": 1.0, "mixup": 0.8, "cutmix": 1.0, "num_classes": CLASSES}
    batch = make_batch()
    outs = []
    for channels_last in (False, True):
        seed_everything_at(0, 0, 0)
        preprocessor = Preprocessor(channels_last=channels_last, **settings)
        outs.append(preprocessor(batch, training)["images"])
    assert outs[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*outs)


def test_the_batch_stays_as_it_was():
    batch = make_batch()
    before = batch["images"].clone()
    Preprocessor(re_prob=1.0, mixup=0.8, num_classes=CLASSES)(batch, training=True)
    assert torch.equal(batch["images"], before)
    assert batch.keys() == {"images", "targets", "corrupt"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing(mode, device):
    batch = make_batch(image_size=(32, 32))
    clean = Preprocessor().to(device)(batch)["images"]
    erased = Preprocessor(re_prob=1.0, re_mode=mode).to(device)(batch, training=True)["images"]
    changed = (erased != clean).any(1).float().mean((1, 2))
    assert ((changed > 0) & (changed < 0.5)).all()
    values = erased[erased != clean]
    assert (values == 0).all() == (mode == "const")


def test_erasing_hits_its_share():
    batch = make_batch(400, (8, 8))
    clean = Preprocessor()(batch)["images"]
    erased = Preprocessor(re_prob=0.25)(batch, training=True)["images"]
    hit = (erased != clean).flatten(1).any(1).sum().item()
    # Binomial(400, 1/4) stays within 5 standard deviations of 100.
    assert 100 - 44 < hit < 100 + 44


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "mixing",
    [
        pytest.param({"mixup": 0.8}, id="mixup"),
        pytest.param({"cutmix": 1.0}, id="cutmix"),
        pytest.param({"cutmix_minmax": (0.2, 0.8)}, id="minmax"),
        pytest.param({"mixup": 0.8, "cutmix": 1.0}, id="both"),
    ],
)
def test_mixing_is_timms(mode, mixing):
    batch = make_batch()
    seed_everything_at(0, 0, 3)
    preprocessor = Preprocessor(**mixing, mixup_mode=mode, label_smoothing=0.1, num_classes=CLASSES)
    out = preprocessor(batch, training=True)
    seed_everything_at(0, 0, 3)
    reference = Mixup(
        mixing.get("mixup", 0.0),
        mixing.get("cutmix", 0.0),
        mixing.get("cutmix_minmax"),
        mode=mode,
        label_smoothing=0.1,
        num_classes=CLASSES,
    )
    images, targets = reference(Preprocessor()(batch)["images"], batch["targets"])
    assert torch.equal(out["images"], images)
    assert torch.equal(out["targets"], targets)
    torch.testing.assert_close(out["targets"].sum(1), torch.ones(4))


def test_validation_neither_erases_nor_mixes():
    batch = make_batch(3)
    preprocessor = Preprocessor(re_prob=1.0, mixup=0.8, label_smoothing=0.1, num_classes=CLASSES)
    out = preprocessor(batch)
    assert torch.equal(out["images"], Preprocessor()(batch)["images"])
    assert torch.equal(out["targets"], batch["targets"])


def test_smoothing_without_mixing():
    out = Preprocessor(label_smoothing=0.1, num_classes=CLASSES)(make_batch(2), training=True)
    expected = torch.full((2, CLASSES), 0.1 / CLASSES) + 0.9 * torch.eye(CLASSES)[:2]
    torch.testing.assert_close(out["targets"], expected)


def test_an_iteration_is_reproducible_and_others_differ():
    settings = {
        "re_prob": 0.5,
        "re_mode": "pixel",
        "mixup": 0.8,
        "cutmix": 1.0,
        "num_classes": CLASSES,
    }
    preprocessor, batch = Preprocessor(**settings), make_batch()
    outs = []
    for iteration in (5, 6, 5):
        seed_everything_at(0, 0, iteration)
        outs.append(preprocessor(batch, training=True))
    assert torch.equal(outs[0]["images"], outs[2]["images"])
    assert torch.equal(outs[0]["targets"], outs[2]["targets"])
    assert not torch.equal(outs[0]["images"], outs[1]["images"])


def test_an_odd_batch_cannot_be_mixed():
    preprocessor = Preprocessor(mixup=0.8, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"even, got 3 images; .* drop_last=True"):
        preprocessor(make_batch(3), training=True)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "fits"),
    [(4, True, True), (3, True, False), (4, False, False), (2, False, False), (6, False, False)],
)
def test_odd_batches_are_seen_before_training(batch_size, drop_last, fits):
    loader = DataLoader(range(13), batch_size=batch_size, drop_last=drop_last)
    Preprocessor().check_loader(loader)
    preprocessor = Preprocessor(mixup=0.8, num_classes=CLASSES)
    if fits:
        preprocessor.check_loader(loader)
    else:
        with pytest.raises(ValueError, match="it must be even"):
            preprocessor.check_loader(loader)


def test_float_images_are_refused():
    batch = make_batch()
    with pytest.raises(TypeError, match=r"uint8 in 0..255, got torch.float32"):
        Preprocessor()({**batch, "images": batch["images"].float()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"re_prob": 2}, r"re_prob must be in 0..1, got 2"),
        ({"re_mode": "noise"}, r"re_mode must be one of .*'pixel'.*, got 'noise'"),
        ({"mixup_mode": "half"}, r"mixup_mode must be one of .*, got 'half'"),
        ({"mixup": -1, "num_classes": CLASSES}, r"at least 0, got -1"),
        ({"std": (0.2, 0.2, 0)}, r"std above 0"),
        ({"mean": (0.5,)}, r"must be 3 numbers"),
        ({"mixup": 0.8}, r"need num_classes"),
        ({"label_smoothing": 0.1}, r"need num_classes"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preprocessor(**settings)


def test_misspelt_settings_are_refused():
    with pytest.raises(TypeError, match="mix_up"):
        MODELS.build({"type": "VimPreprocessor", "mix_up": 0.8})
