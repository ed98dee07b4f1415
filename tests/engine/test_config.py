"""Reading configs: every one of the project's, options, and misspelt keys."""

from pathlib import Path

import pytest
from mmengine.config import Config

from vim.engine.config import apply_options, load_config, parse_options

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if "_base_" not in p.parts)
DEBUG = ROOT / "configs/vim/vim-debug_1xb4_made-up.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config(path):
    config = load_config(path)
    assert config.work_dir == f"runs/{path.stem}"
    assert config.filename == str(path)
    doc = path.read_text().split('"""')[1]
    assert len(doc) > 20, "a config says what it is and where its numbers come from"
    batch = int(path.stem.split("xb")[1].split("_")[0].split("-")[0])
    assert config.train_dataloader.batch_size == batch, "the file's name states the batch"
    preprocessor = config.model.data_preprocessor
    if config.model.type != "VimClassifier":
        task = {"VimSegmenter": "segmentation", "VimDetector": "detection"}[config.model.type]
        assert config.train_dataloader.mean == preprocessor.mean
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            assert loader.task == task
            assert loader.dataset.num_classes == config.model.num_classes
        return
    assert preprocessor.num_classes == config.model.backbone.get("num_classes", 1000)
    for loader in (config.train_dataloader, config.val_dataloader):
        assert (loader.mean, loader.std) == (preprocessor.mean, preprocessor.std)


def test_the_official_recipe():
    config = load_config(ROOT / "configs/vim/vim-tiny-p16_8xb128_in1k.py")
    assert config.optim_wrapper.optimizer.lr == 1e-3
    assert config.optim_wrapper.optimizer.weight_decay == 0.1
    assert config.param_scheduler.warmup == 5
    assert config.train_dataloader.repeats == 3
    assert config.default_hooks.ema.decay == 0.99996


def test_the_official_recipe_of_segmentation():
    config = load_config(ROOT / "configs/segmentation/vim-small-upernet_4xb8_ade20k-512.py")
    optimizer = config.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == (1e-4, 0.05, 0.95)
    assert config.model.channels == 384
    assert config.model.inference == {"window": (512, 512), "stride": (341, 341)}
    iterations = config.train_cfg.max_epochs * (20210 // 4 // 8)
    assert config.param_scheduler[1].end == iterations == 59945


def test_options_from_the_command_line():
    options = parse_options(["train_cfg.max_epochs=3", "work_dir=a/b", "val_cfg.dtype=bfloat16"])
    assert options == {"train_cfg.max_epochs": 3, "work_dir": "a/b", "val_cfg.dtype": "bfloat16"}
    config = load_config(DEBUG, ["train_cfg.max_epochs=3", "model.backbone.d_conv=3"])
    assert config.train_cfg.max_epochs == 3
    assert config.model.backbone.d_conv == 3, "an argument of the model that the config leaves out"
    assert load_config(DEBUG, {}, "elsewhere").work_dir == "elsewhere"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train_cfg.max_epoch", "max_epochs"),
        ("train_cgf.max_epochs", "train_cfg"),
        ("optim_wrapper.optimizer.learning_rat", "lr"),
        ("optim_wrapper.clip_grads", "clip_grad"),
        ("model.backbone.drop_path", "drop_path_rate"),
        ("default_hooks.ema.dekay", "decay"),
        ("train_dataloader.batchsize", "batch_size"),
        ("train_dataloader.dataset.roots", "root"),
        ("train_dataloader.augmentation.color_jiter", "color_jitter"),
        ("model.loss.label_smooth", "label_smoothing"),
        ("model.data_preprocessor.mix_up", "mixup"),
        ("compil", "compile"),
    ],
)
def test_a_misspelt_key_fails_with_near_misses(key, near):
    with pytest.raises(ValueError, match="no ") as error:
        load_config(DEBUG, {key: 1})
    assert near in str(error.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.chanels", "channels"),
        ("model.backbone.class_tokens", "class_token"),
        ("model.inference.strides", "stride"),
        ("train_dataloader.crop_sizes", "crop_size"),
        ("train_dataloader.dataset.reduce_zero_labels", "reduce_zero_label"),
        ("train_dataloader.augmentation.flip", "hflip"),
        ("val_evaluator.overlay", "overlays"),
    ],
)
def test_a_misspelt_key_of_segmentation(key, near):
    path = ROOT / "configs/segmentation/vim-tiny-upernet_4xb8_ade20k-512.py"
    with pytest.raises(ValueError, match="no ") as error:
        load_config(path, {key: 1})
    assert near in str(error.value)


def test_positions_in_lists():
    config = Config({"hooks": [{"type": "VimCurvesHook", "a": 1}, 5]})
    apply_options(config, {"hooks.0.a": 2, "hooks.1": 6})
    assert config.hooks == [{"type": "VimCurvesHook", "a": 2}, 6]
    with pytest.raises(ValueError, match="list of 2"):
        apply_options(config, {"hooks.2": 6})


def test_a_misspelt_key_of_the_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("train_dataloder = dict()\n")
    with pytest.raises(ValueError, match="did you mean train_dataloader"):
        load_config(path)


def test_no_such_config(tmp_path):
    (tmp_path / "one.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"one\.py"):
        load_config(tmp_path / "two.py")


@pytest.mark.parametrize("text", ["train_cfg.max_epochs", "=3"])
def test_options_of_another_form(text):
    with pytest.raises(ValueError, match=r"key\.of\.the\.config=value"):
        parse_options([text])
