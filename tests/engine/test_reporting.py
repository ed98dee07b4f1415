"""What the hooks write and say: metrics.jsonl over interruptions, curves, progress, run.json."""

import io
import itertools
import json
import logging
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mmengine")
pytest.importorskip("torchmetrics")

from mmengine.config import Config
from mmengine.hooks import ParamSchedulerHook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

import vim.engine.metrics
import vim.engine.optimization  # noqa: F401  registers, as the line above
from vim.engine import reporting
from vim.engine.plots import curves_figure
from vim.engine.reporting import (
    CurvesHook,
    Meter,
    MetricsHook,
    ProgressHook,
    RunInfoHook,
    read_metrics,
)


class Stand:
    """Calls hooks as a runner does: epochs of ten iterations, the loss a function of iteration.

    Checkpoints are dicts; the learning rate is 1 / iteration.
    """

    max_epochs, epoch_length, seed = 3, 10, 7

    def __init__(self, folder, hooks):
        self.work_dir = str(folder)
        self.hooks = sorted(hooks, key=lambda hook: hook.priority != "BELOW_NORMAL")
        self.iter, self.epoch = 0, 0
        self.max_iters = self.max_epochs * self.epoch_length
        self.model = nn.Linear(1, 1)
        self.cfg = Config({"train_cfg": {"max_epochs": 3}})
        self.optim_wrapper = SimpleNamespace(get_lr=self.rates)
        self.logger = logging.getLogger("stand")
        self.val_dataloader = self.test_dataloader = range(4)

    def rates(self):
        return {"lr": [0.1 / (self.iter + 1), 1 / (self.iter + 1)]}

    def call(self, name, **kwargs):
        for hook in self.hooks:
            getattr(hook, name)(self, **kwargs)

    def save(self):
        checkpoint = {"iteration": self.iter + 1}
        self.call("before_save_checkpoint", checkpoint=checkpoint)
        return json.loads(json.dumps(checkpoint))  # plain data

    def resume(self, checkpoint):
        self.iter = checkpoint["iteration"]
        self.epoch = self.iter // self.epoch_length
        self.call("after_load_checkpoint", checkpoint=checkpoint)

    def validate(self, **metrics):
        self.call("before_val_epoch")
        for index in self.val_dataloader:
            self.call("after_val_iter", batch_idx=index, data_batch={}, outputs=[])
        self.call("after_val_epoch", metrics={"top1": float(self.iter), **metrics})

    def train(self, stop=math.inf, save_at=None):
        """Train up to iteration `stop`; return the checkpoint of iteration `save_at`."""
        self.call("before_train")
        checkpoint = None
        while self.epoch < self.max_epochs:
            self.call("before_train_epoch")
            for index in range(self.iter % self.epoch_length, self.epoch_length):
                if self.iter >= stop:
                    return checkpoint
                batch = {"images": torch.zeros(4, 3, 2, 2)}
                self.call("before_train_iter", batch_idx=index, data_batch=batch)
                loss = torch.tensor(1 / (self.iter + 3), requires_grad=True)
                outputs = {"loss": loss, "loss_cls": 2 * loss}
                self.call("after_train_iter", batch_idx=index, data_batch=batch, outputs=outputs)
                if self.iter + 1 == save_at:
                    checkpoint = self.save()
                self.iter += 1
            self.epoch += 1
            self.validate()
        self.call("after_train")
        return checkpoint


def lines_without_times(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    changing = ("images_per_second", "data_wait", "memory_gib")
    return [{k: v for k, v in line.items() if k not in changing} for line in lines]


@pytest.fixture
def undisturbed(tmp_path):
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    Stand(folder, [MetricsHook(4, tensorboard=False)]).train()
    return lines_without_times(folder)


def test_lines(undisturbed):
    train = [line for line in undisturbed if line["stage"] == "train"]
    assert [line["iteration"] for line in train] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [line["epoch"] for line in train] == [1, 1, 2, 2, 2, 3, 3, 3]
    bounds = itertools.pairwise([0, *(line["iteration"] for line in train)])
    means = [sum(1 / (i + 3) for i in range(*pair)) / (pair[1] - pair[0]) for pair in bounds]
    assert [line["loss"] for line in train] == pytest.approx(means)
    assert [line["loss_cls"] for line in train] == pytest.approx([2 * mean for mean in means])
    assert [line["lr"] for line in train] == [1 / line["iteration"] for line in train]
    val = [line for line in undisturbed if line["stage"] == "val"]
    assert val == [
        {"stage": "val", "iteration": 10 * epoch, "epoch": epoch, "top1": 10.0 * epoch}
        for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize("saved", [1, 7, 8, 10, 20])
@pytest.mark.parametrize("killed", [20, 23, 30])
def test_a_resumed_run_has_the_lines_of_an_undisturbed_one(saved, killed, undisturbed, tmp_path):
    first = Stand(tmp_path, [MetricsHook(4, tensorboard=False)])
    checkpoint = first.train(stop=killed, save_at=saved)
    second = Stand(tmp_path, [MetricsHook(4, tensorboard=False)])
    second.resume(checkpoint)
    if saved % 10 == 0:  # killed after the checkpoint: validates again
        second.call("before_train")
        second.validate()
    second.train()
    assert lines_without_times(tmp_path) == undisturbed


def test_a_validation_that_is_not_repeated_stays(undisturbed, tmp_path):
    checkpoint = Stand(tmp_path, [MetricsHook(4, tensorboard=False)]).train(23, save_at=20)
    second = Stand(tmp_path, [MetricsHook(4, tensorboard=False)])
    second.resume(checkpoint)
    second.train()
    assert lines_without_times(tmp_path) == undisturbed


def test_a_torn_line_is_passed_over(undisturbed, tmp_path, caplog):
    checkpoint = Stand(tmp_path, [MetricsHook(4, tensorboard=False)]).train(15, save_at=12)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "train", "iterat')
    second = Stand(tmp_path, [MetricsHook(4, tensorboard=False)])
    second.resume(checkpoint)
    second.train()
    assert lines_without_times(tmp_path) == undisturbed
    assert "line 5: not a whole line of JSON" in caplog.text


def test_a_new_run_keeps_the_earlier_lines_aside(undisturbed, tmp_path):
    for _ in range(2):
        Stand(tmp_path, [MetricsHook(4, tensorboard=False)]).train()
        assert lines_without_times(tmp_path) == undisturbed
    assert len(read_metrics(tmp_path / "metrics.old.jsonl")) == len(undisturbed)


def test_sums_of_other_weights_are_not_ours(undisturbed, tmp_path):
    stand = Stand(tmp_path, [MetricsHook(4, tensorboard=False)])
    sums = {"iteration": 99, "count": 3, "sums": {"loss": 1e6}}
    stand.call("after_load_checkpoint", checkpoint={"metrics_hook": sums})
    stand.train()
    assert lines_without_times(tmp_path) == undisturbed


def test_optimizer_figures_and_what_is_not_finite(tmp_path):
    stand = Stand(tmp_path, [MetricsHook(1, tensorboard=False)])
    stand.optim_wrapper.grad_norm = torch.tensor(math.inf)
    scaler = SimpleNamespace(get_scale=lambda: 1024.0, is_enabled=lambda: True)
    stand.optim_wrapper.scaler = scaler
    stand.train(stop=1)
    stand.validate(loss=math.nan, names=["a"], ece=torch.tensor([2.0]))
    train, val = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (train["grad_norm"], train["loss_scale"]) == (None, 1024.0)
    assert (val["loss"], val["ece"]) == (None, 2.0)
    assert "names" not in val


def test_speed_counts_all_processes(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(reporting, "get_world_size", lambda: 2)
    Stand(tmp_path, [MetricsHook(5, tensorboard=False)]).train()
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        if line["stage"] == "train":
            # Each step takes two ticks, one of them waiting for its 2 x 4 images.
            assert (line["images_per_second"], line["data_wait"]) == (4.0, 0.5)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mmengine.dist.utils.get_rank", lambda group=None: 1)
    hooks = [MetricsHook(4), ProgressHook(4), CurvesHook(), RunInfoHook()]
    Stand(tmp_path, hooks).train(save_at=7)
    assert list(tmp_path.iterdir()) == []


def test_meter(monkeypatch):
    now = 0.0
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now)
    meter = Meter()
    now = 100.0  # validation
    meter.start()
    for checkpoint in (False, True):
        now += 1  # reading
        meter.arrived()
        now += 2  # the step
        meter.done(images=6)
        if checkpoint:
            meter.leave()
            now += 5
    meter.arrived()
    assert meter.take() == (12 / 6, 2 / 6)
    now += 2
    meter.done(images=6)
    assert meter.take() == (3, 0)


@pytest.mark.gpu
def test_the_wait_of_a_gpu():
    meter = Meter(on_gpu=True)
    x = torch.ones(4096, 4096, device="cuda")
    for pause in (0.0, 0.2):
        meter.start()
        for _ in range(5):
            meter.arrived()
            for _ in range(20):
                x = x @ x * 1e-4
            meter.done(images=1)
            torch.cuda.synchronize()
            time.sleep(pause)
        meter.take()
        assert (meter.device_wait > 0.5) == bool(pause)


def test_times_of_a_runner_that_tells_them(tmp_path):
    stand = Stand(tmp_path, [MetricsHook(10, tensorboard=False)])
    stand.seconds = 2.5
    stand.train(stop=10)
    assert [line["seconds"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.5, 2.5]


def test_a_wrong_interval():
    with pytest.raises(ValueError, match="1 or more iterations, got 0"):
        MetricsHook(interval=0)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint = Stand(tmp_path, [MetricsHook(5)]).train(stop=20, save_at=10)
    second = Stand(tmp_path, [MetricsHook(5)])
    second.resume(checkpoint)
    second.train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20, 25, 30]
    assert [event.value for event in events.Scalars("val/top1")] == [10, 20, 30]


def test_curves(tmp_path):
    stand = Stand(tmp_path, [MetricsHook(4, tensorboard=False), CurvesHook()])
    stand.train(stop=20)
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 600
    figure = curves_figure(read_metrics(tmp_path / "metrics.jsonl"))
    loss, accuracy, rate, speed = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [4, 8, 12, 16, 20]
    assert accuracy.lines[0].get_ydata().tolist() == [10, 20]
    assert len(rate.lines) == len(speed.lines) == 1


@pytest.mark.parametrize(("seconds", "drawings"), [(0, 4), (60, 2)])
def test_curves_are_not_drawn_after_every_validation(seconds, drawings, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(CurvesHook, "_draw", lambda self, runner: drawn.append(runner.iter))
    Stand(tmp_path, [MetricsHook(4, tensorboard=False), CurvesHook(seconds)]).train()
    assert (len(drawn), drawn[-1]) == (drawings, 30)


def test_curves_of_little():
    loss, accuracy, *_ = curves_figure([{"stage": "val", "iteration": 3, "loss": 2.0}]).axes
    assert [line.get_label() for line in loss.lines] == ["validation"]
    assert [text.get_text() for text in accuracy.texts] == ["nothing yet"]


def test_progress_in_lines(tmp_path, caplog):
    caplog.set_level("INFO")
    Stand(tmp_path, [ProgressHook(15)]).train()
    first, *_, last, validation = caplog.messages
    assert first == "validation after epoch 1: top1 10"
    assert len(caplog.messages) == 5
    assert last.startswith("epoch 3/3, iteration 30/30: loss 0.0312, ")
    assert last.endswith(" waiting for data, lr 3.333e-02, 00:00 to go")
    assert validation == "validation after epoch 3: top1 30"


def test_remaining_time_counts_all(tmp_path, caplog, monkeypatch):
    now = 0.0
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now)
    caplog.set_level("INFO")
    stand = Stand(tmp_path, [ProgressHook(10)])
    stand.iter, stand.epoch = 10, 1
    stand.call("before_train")
    now, stand.iter = 3600.0, 19
    batch = {"images": torch.zeros(4, 3, 2, 2)}
    stand.call(
        "after_train_iter", batch_idx=9, data_batch=batch, outputs={"loss": torch.tensor(1.0)}
    )
    assert "1:00:00 to go" in caplog.text


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    stand = Stand(tmp_path, [ProgressHook(10)])
    stand.train()
    stand.call("before_test_epoch")
    stand.call("after_test_iter", batch_idx=0, data_batch={}, outputs=[])
    stand.call("after_test_epoch", metrics={})
    shown = terminal.getvalue()
    for text in (
        "epoch 1/3",
        "epoch 3/3",
        "30/30",
        "loss 0.0312",
        "images/s",
        "validation",
        "test",
    ):
        assert text in shown


def test_a_stopped_validation_leaves_no_bar(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    hook = ProgressHook()
    stand = Stand(tmp_path, [hook])
    for stage in ("before_train", "before_val_epoch"):
        stand.call(stage)
    bars = hook._bar, hook._evaluation
    stand.call("after_train")
    assert all(bar.disable for bar in bars)  # closed


def test_run_info(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "a config.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("AWS_SECRET", "hidden")
    for iteration in (0, 10):
        stand = Stand(tmp_path, [RunInfoHook()])
        stand.iter = iteration
        stand.call("before_train")
    text = (tmp_path / "run.json").read_text()
    first, second = json.loads(text)
    assert (first["iteration"], second["iteration"], first["seed"]) == (0, 10, 7)
    assert first["command"].endswith("tools/train.py 'a config.py'")
    assert first["device"].startswith("cpu, ")
    assert first["processes"] == 1
    assert first["environment"]["torch"] in torch.__version__
    assert {"python", "mmengine", "pillow"} <= first["environment"].keys()
    assert first["variables"]["OMP_NUM_THREADS"] == "1"
    assert "hidden" not in text
    assert Config.fromfile(tmp_path / "config.py").train_cfg.max_epochs == 3


def test_commit(monkeypatch):
    answers = {"ls-files": "__init__.py", "status": " M vim/x.py", "rev-parse": "abc"}
    run = lambda command, **_: SimpleNamespace(stdout=answers[command[3]] + "\n")  # noqa: E731
    monkeypatch.setattr(reporting.subprocess, "run", run)
    monkeypatch.setattr(reporting.shutil, "which", lambda name: name)
    assert reporting._commit() == "abc+"
    answers["status"] = ""
    assert reporting._commit() == "abc"
    answers["ls-files"] = ""  # installed inside another project's checkout
    assert reporting._commit() is None
    monkeypatch.setattr(reporting.shutil, "which", lambda name: None)
    assert reporting._commit() is None


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, images, targets, mode):
        logits = self.head(images)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(logits, targets)}
        return [{"logits": logits, "targets": targets}]


def test_all_hooks_in_mmengines_runner(tmp_path):
    targets = torch.arange(24) % 3
    images = torch.randn(24, 6) + 5 * torch.eye(6)[targets]
    rows = [{"images": x, "targets": y} for x, y in zip(images, targets, strict=True)]
    names = ("Progress", "Metrics", "Curves", "RunInfo")
    hooks = [HOOKS.build({"type": f"Vim{name}Hook"}) for name in names]
    runner = Runner(
        model=Model(),
        work_dir=str(tmp_path),
        experiment_name=tmp_path.name,
        train_dataloader=DataLoader(rows, batch_size=8),
        train_cfg={"by_epoch": True, "max_epochs": 4},
        optim_wrapper={
            "type": "VimOptimWrapper",
            "optimizer": {"type": "SGD", "lr": 0.1},
            "clip_grad": {"max_norm": 1.0},
            "dtype": "float32",
        },
        param_scheduler={"type": "LinearLR", "by_epoch": False, "end": 12},
        val_dataloader=DataLoader(rows, batch_size=5),
        val_cfg={},
        val_evaluator={"type": "VimClassificationMetric"},
        default_hooks=dict.fromkeys(("logger", "checkpoint", "timer", "sampler_seed"))
        | {"param_scheduler": ParamSchedulerHook()},
        custom_hooks=hooks,
        log_level="WARNING",
    )
    for hook in hooks[:2]:
        hook.interval = 3
    runner.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    train = [line for line in lines if line["stage"] == "train"]
    val = [line for line in lines if line["stage"] == "val"]
    assert [(line["iteration"], line["epoch"]) for line in train] == [
        (3 * i, i) for i in range(1, 5)
    ]
    assert [(line["iteration"], line["epoch"]) for line in val] == [(3 * i, i) for i in range(1, 5)]
    assert [line["lr"] for line in train] == sorted({line["lr"] for line in train})
    assert train[0]["loss"] > train[-1]["loss"]
    assert val[-1]["top1"] > val[0]["top1"]
    assert train[0]["grad_norm"] > 0
    assert {path.name for path in tmp_path.iterdir()} >= {"run.json", "config.py", "curves.png"}
