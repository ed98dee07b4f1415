"""Models, devices, labels, reading in parallel and results, on models of two small blocks."""

import argparse
import csv
import json
import os
import re
import threading
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf

from vim.engine.inference import (
    Prediction,
    Runner,
    add_arguments,
    atomic_write,
    build_model,
    check_output,
    chunk,
    class_names,
    classify,
    read_batches,
    resolve_data_config,
    select_device,
    write_predictions,
)
from vim.models import save_checkpoint

NAME = "vim_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_classes": 10}


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*argv])


def small_args(*argv):
    kwargs = [f"{key}={value}" for key, value in SMALL.items()]
    return parse("x.png", "--model", NAME, "--device", "cpu", "--model-kwargs", *kwargs, *argv)


@pytest.fixture
def images(tmp_path):
    """Five images, of which the third is broken and the fourth too elongated."""
    paths = []
    for index in range(5):
        path = tmp_path / f"{index}.png"
        size = (1, 4000) if index == 3 else (40 + index, 50)
        Image.new("RGB", size, (50 * index, 0, 0)).save(path)
        paths.append(path)
    paths[2].write_bytes(b"")
    return paths


def test_model_kwargs_are_literals_or_text():
    args = parse(
        *("x.png", "--model", "x", "--model-kwargs"),
        *("a=1", "b=(2, 3)", "c=None", "d=avg", "e=", "f=x=y", "--model-kwargs", "g=0.5"),
    )
    expected = {"a": 1, "b": (2, 3), "c": None, "d": "avg", "e": "", "f": "x=y", "g": 0.5}
    assert args.model_kwargs == expected
    assert parse("x.png", "--model", "x").model_kwargs == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model-kwargs", "a=1", "photo.png"], r"'photo.png' is not key=value \(-- ends"),
        (["--batch-size", "0"], "invalid positive_int value: '0'"),
        (["--workers", "some"], "invalid positive_int value: 'some'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_arguments_that_cannot_be(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse("x.png", "--model", "x", *argv)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_random_weights_are_repeatable_and_said_to_be_random(caplog):
    before = torch.random.get_rng_state()
    first, second = build_model(NAME, model_kwargs=SMALL), build_model(NAME, model_kwargs=SMALL)
    assert "weights are random" in caplog.text
    assert not first.training
    assert torch.equal(before, torch.random.get_rng_state())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", [NAME, "test_vit"])
def test_checkpoint(name, suffix, tmp_path, caplog):
    kwargs = SMALL if name == NAME else {"num_classes": 10}
    trained = timm.create_model(name, **kwargs)
    save_checkpoint(trained.state_dict(), tmp_path / f"weights{suffix}")
    model = build_model(name, checkpoint=tmp_path / f"weights{suffix}", model_kwargs=kwargs)
    assert torch.equal(model.head.weight, trained.head.weight)
    assert "random" not in caplog.text


def test_averaged_weights(tmp_path):
    model = timm.create_model(NAME, **SMALL)
    ema = {key: value + 1 for key, value in model.state_dict().items()}
    path = tmp_path / "last.pth"
    torch.save({"model": model.state_dict(), "model_ema": ema}, path)
    for use_ema in (False, True):
        loaded = build_model(NAME, checkpoint=path, use_ema=use_ema, model_kwargs=SMALL)
        assert torch.equal(loaded.head.bias, model.head.bias + use_ema)


def test_local_dir(tmp_path):
    """A folder in the Hub's layout brings its size, weights and labels."""
    labels = [f"kind {index}" for index in range(10)]
    saved = timm.create_model(NAME, **SMALL)
    args = {key: value for key, value in SMALL.items() if key != "num_classes"}
    save_for_hf(
        saved,
        tmp_path,
        model_args=args,
        model_config={"label_names": labels},
        safe_serialization=True,
    )
    model = build_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(model.head.weight, saved.head.weight)
    assert resolve_data_config(model)["input_size"] == (3, 32, 32)
    assert class_names(model) == labels


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vim_tiny", {}, r"unknown model 'vim_tiny'; did you mean vim_tiny_patch16_224.*\?"),
        ("vim_tinny_patch16_224", {}, "did you mean vim_tiny_patch16_224"),
        ("qqqqqqqqqqqqqq", {}, "timm.list_models"),
        (NAME + ".nonsense", {}, "cannot build .*nonsense"),
        (NAME, {"model_kwargs": {"embed_dims": 3}}, "cannot build .*embed_dims"),
        (NAME, {"model_kwargs": {"depth": 0}}, "cannot build .*depth must be at least 1"),
        ("local-dir:/nowhere", {}, "cannot build local-dir:/nowhere"),
        ("there/is", {}, "hf-hub:there/is"),
        (NAME, {"use_ema": True}, "give --checkpoint"),
        (NAME, {"checkpoint": Path("/nowhere.pth")}, "nowhere.pth does not exist"),
    ],
)
def test_models_that_cannot_be(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **kwargs)


@pytest.mark.parametrize("name", [NAME, "test_vit"])
@pytest.mark.parametrize("content", [b"", b"nonsense"], ids=["empty", "nonsense"])
def test_broken_checkpoint(name, content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot load .*weights.pth into"):
        build_model(name, checkpoint=path)


def test_checkpoint_of_another_model(tmp_path):
    save_checkpoint(timm.create_model(NAME, **SMALL).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"(?s)cannot load .*num_classes"):
        build_model(
            NAME, checkpoint=tmp_path / "weights.pth", model_kwargs=SMALL | {"num_classes": 7}
        )


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        (NAME, {}, (3, 224, 224)),
        (NAME, {"img_size": (32, 64)}, (3, 32, 64)),
        ("vit_tiny_patch16_224", {"img_size": 64}, (3, 64, 64)),
        ("test_resnet", {}, (3, 160, 160)),
    ],
)
def test_input_size_is_the_one_built(name, kwargs, size):
    assert resolve_data_config(timm.create_model(name, **kwargs))["input_size"] == size


def test_models_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="in_chans must be 3, got 1"):
        resolve_data_config(timm.create_model(NAME, **SMALL, in_chans=1))


def test_device():
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu", "meta", "", "cuda:99", "cuda:x"])
def test_devices_that_are_not_here(name):
    with pytest.raises(ValueError, match="device"):
        select_device(name)


def test_labels_of_imagenet_or_numbers():
    assert class_names(timm.create_model(NAME, depth=1))[1] == "goldfish, Carassius auratus"
    names = class_names(timm.create_model(NAME, **SMALL))
    assert names == [f"class {index}" for index in range(10)]


def test_labels_of_the_configuration():
    config = {"label_names": list("abcdefghij"), "label_descriptions": {"b": "bee"}}
    model = timm.create_model(NAME, **SMALL, pretrained_cfg_overlay=config)
    assert class_names(model) == ["a", "bee", *"cdefghij"]
    model.reset_classifier(4)
    assert class_names(model) == ["class 0", "class 1", "class 2", "class 3"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.txt", "cat\r\ndog\n\ntr\N{LATIN SMALL LETTER AE}\n"),
        ("labels.json", '["cat", "dog", "tr\\u00e6"]'),
        ("labels.json", '{"2": "tr\\u00e6", "0": "cat", "1": "dog"}'),
    ],
    ids=["lines", "list", "object"],
)
def test_labels_of_a_file(file, text, tmp_path):
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    model = timm.create_model(NAME, **SMALL | {"num_classes": 3})
    assert class_names(model, tmp_path / file) == ["cat", "dog", "tr\N{LATIN SMALL LETTER AE}"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.txt", "cat\ndog\n", "must name 3 classes, got 2"),
        ("labels.json", '{"1": "a", "2": "b", "3": "c"}', "the keys 0 to 2"),
        ("labels.json", '"cat"', "must be a list, or an object"),
        ("labels.json", "[", "Expecting"),
    ],
)
def test_labels_that_cannot_be(file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        class_names(timm.create_model(NAME, **SMALL | {"num_classes": 3}), tmp_path / file)


def test_no_classes():
    with pytest.raises(ValueError, match="no classes"):
        class_names(timm.create_model(NAME, **SMALL | {"num_classes": 0}))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_batches_keep_order_and_failures_move_nothing(size, images):
    transform = create_transform((3, 32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    batches = list(read_batches(chunk(images, size), transform, workers=3))
    assert [list(batch.paths) for batch in batches] == [list(c) for c in chunk(images, size)]
    errors = {path: reason for batch in batches for path, reason in batch.errors.items()}
    assert errors == {
        images[2]: "the file is empty",
        images[3]: "1 x 4000 pixels are too elongated",
    }
    red = [image[0, 0, 0].item() * 255 for batch in batches for image in batch.images]
    assert red == pytest.approx([0, 50, 200])


def test_abandoned_reading_ends_its_threads(images):
    before = threading.active_count()
    batches = read_batches([images] * 100, create_transform((3, 32, 32)), workers=2)
    next(batches)
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_classify(dtype, images):
    runner = Runner(small_args("--dtype", dtype, "--workers", "2"))
    labels = class_names(runner.model)
    predictions = list(classify(runner, chunk(images, 2), labels, topk=3))
    assert [prediction.path for prediction in predictions] == images
    assert [bool(prediction.error) for prediction in predictions] == [0, 0, 1, 1, 0]
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())

    transform = create_transform(**runner.data_config)
    with torch.inference_mode(), Image.open(images[1]) as image:
        expected = runner.model(transform(image)[None]).softmax(1)[0]
    got = predictions[1].classes
    assert [label for _, label, _ in got] == [labels[index] for index, _, _ in got]
    assert [p for _, _, p in got] == sorted((p for _, _, p in got), reverse=True)
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    assert [p for _, _, p in got] == pytest.approx(expected.topk(3).values.tolist(), abs=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_agrees_with_cpu(dtype, images):
    results = []
    for argv in (["--device", "cuda", "--dtype", dtype], ["--device", "cpu"]):
        runner = Runner(small_args(*argv))
        (prediction,) = classify(runner, [images[:1]], class_names(runner.model), topk=10)
        results.append([p for _, _, p in sorted(prediction.classes)])
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert results[0] == pytest.approx(results[1], abs=tolerance)


def test_all_classes_where_fewer_than_asked_for(images):
    runner = Runner(small_args())
    (prediction,) = classify(runner, [images[:1]], class_names(runner.model), topk=99)
    assert len(prediction.classes) == 10
    assert sum(p for _, _, p in prediction.classes) == pytest.approx(1)


def test_output_that_is_not_finite_is_a_failure(images):
    runner = Runner(small_args())
    torch.nn.init.constant_(runner.model.head.bias, torch.nan)
    (prediction,) = classify(runner, [images[:1]], class_names(runner.model), topk=1)
    assert (prediction.classes, prediction.error) == ([], "the model's output is not finite")


PREDICTIONS = [
    Prediction(
        Path("a, b.png"), [(1, 'a "cat", tabby', 0.75), (0, "tr\N{LATIN SMALL LETTER AE}", 0.25)]
    ),
    Prediction(Path("c.png"), error="the file is empty"),
    Prediction(Path(os.fsdecode(b"\xe9.png")), [(0, "dog", 1.0)]),
]


def test_json_lines(tmp_path):
    write_predictions(PREDICTIONS, tmp_path / "x.jsonl")
    text = (tmp_path / "x.jsonl").read_text(encoding="utf-8", errors="surrogateescape")
    assert [json.loads(line) for line in text.splitlines()] == [
        {
            "file": "a, b.png",
            "classes": [
                {"index": 1, "label": 'a "cat", tabby', "probability": 0.75},
                {"index": 0, "label": "tr\N{LATIN SMALL LETTER AE}", "probability": 0.25},
            ],
        },
        {"file": "c.png", "error": "the file is empty"},
        {
            "file": os.fsdecode(b"\xe9.png"),
            "classes": [{"index": 0, "label": "dog", "probability": 1.0}],
        },
    ]


def test_csv(tmp_path):
    write_predictions(PREDICTIONS, tmp_path / "x.csv")
    text = (tmp_path / "x.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert list(csv.reader(text.splitlines())) == [
        ["file", "rank", "index", "label", "probability", "error"],
        ["a, b.png", "1", "1", 'a "cat", tabby', "0.75", ""],
        ["a, b.png", "2", "0", "tr\N{LATIN SMALL LETTER AE}", "0.25", ""],
        ["c.png", "", "", "", "", "the file is empty"],
        [os.fsdecode(b"\xe9.png"), "1", "0", "dog", "1.0", ""],
    ]


def interrupted_write(path):
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_check_output(tmp_path):
    check_output(None, (".csv",))
    check_output(tmp_path / "made" / "too" / "x.csv", (".csv",))
    assert (tmp_path / "made" / "too").is_dir()
    with pytest.raises(ValueError, match=r"x.txt must be one of .csv, no extension"):
        check_output(tmp_path / "x.txt", (".csv", ""))
    (tmp_path / "y.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path / "y.csv", (".csv",))


def test_chunk():
    assert chunk("abcde", 2) == ["ab", "cd", "e"]
    assert chunk("", 2) == []
