"""The runner and its loops: set-up, places in the data, resuming and what it refuses."""

import json
import math
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from torch import nn

import vim.engine.optimization  # noqa: F401, registers VimCosineLR
from vim.engine import checkpoints
from vim.engine.checkpoints import CheckpointError
from vim.engine.runner import VimRunner, VimTrainLoop
from vim.models import save_checkpoint

from . import drill


def runner_of(work_dir, **options) -> VimRunner:
    return VimRunner.from_cfg(drill.config(work_dir, **options))


def trained(work_dir, **options) -> VimRunner:
    runner = runner_of(work_dir, **options)
    runner.train()
    return runner


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_curve(tmp_path):
    states = [
        trained(tmp_path / name, epochs=1, randomness=randomness).model_state()
        for name, randomness in (("a", {"seed": 0}), ("b", {"seed": None}), ("c", {"seed": 1}))
    ]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_the_number_of_workers_changes_nothing(tmp_path):
    config = drill.config(tmp_path / "workers", epochs=2, interval=25)
    config.train_dataloader.num_workers = 2
    runner = VimRunner.from_cfg(config)
    runner.train()
    assert same(runner.model_state(), trained(tmp_path / "none", epochs=2).model_state())


def stop_after(runner, iterations: int, **options) -> None:
    """Have SIGTERM stop the run after so many iterations."""

    class Stopping(VimTrainLoop):
        def should_stop(self):
            if self.iter >= iterations:
                self._signal = signal.SIGTERM
            return super().should_stop()

    runner._train_loop = Stopping(runner, runner._train_dataloader, **options)


@pytest.mark.parametrize("length", [10, 20, 33])
def test_training_in_parts(tmp_path, length):
    """A run that is stopped after some iterations goes on from there, in the same data."""
    whole = trained(tmp_path / "whole", epochs=2)
    runner = runner_of(tmp_path / "parts", epochs=2)
    stop_after(runner, length, max_epochs=2, val_interval=2)
    runner.train()
    assert runner.stopped_by == "SIGTERM"
    assert max(checkpoints.iterations(tmp_path / "parts")) == length
    runner = trained(tmp_path / "parts", epochs=2, resume=True)
    assert runner.stopped_by is None
    assert same(runner.model_state(), whole.model_state())
    assert (tmp_path / "parts" / "weights.safetensors").exists()


def test_what_is_done_is_not_done_again(tmp_path):
    first = trained(tmp_path, epochs=2)
    runner = trained(tmp_path, epochs=2, resume=True)
    assert runner.iter == 40
    assert same(runner.model_state(), first.model_state())
    log = (tmp_path / "losses.0.jsonl").read_text()
    assert log.count("validated") == 1
    assert log.count("lr") == 40


def test_resuming_nothing_starts_anew(tmp_path):
    assert trained(tmp_path, epochs=1, resume=True).iter == 20


def test_a_used_folder_is_not_overwritten(tmp_path):
    trained(tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match="up to iteration 20: resume=True"):
        runner_of(tmp_path, epochs=1).train()


def test_a_run_that_trained_can_validate(tmp_path):
    runner = trained(tmp_path, epochs=2)
    expected = runner.message_hub.get_scalar("val/loss").current()
    assert runner.val()["loss"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"randomness": {"seed": 4}}, "seed 3 -> 4.*resume_with_changes=True"),
        ({"accumulation": 2}, "accumulative_counts 1 -> 2"),
        ({"batch_size": 8}, "epoch_length 20 -> 10, batch_size 4 -> 8.*new run from its weights"),
        ({"param_scheduler": []}, "has 0 parameter schedulers, .* has 2"),
    ],
)
def test_another_set_up_is_refused(tmp_path, changes, message):
    trained(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, epochs=2, resume=True, **changes)


def test_a_change_may_be_asked_for_but_not_of_the_epoch(tmp_path):
    trained(tmp_path, epochs=1)
    asked = {"epochs": 2, "resume": True, "resume_with_changes": True}
    with pytest.raises(ValueError, match="epoch_length 20 -> 10"):
        trained(tmp_path, **asked, batch_size=8)
    assert trained(tmp_path, **asked, randomness={"seed": 4}).iter == 40


def test_changes_of_the_config_are_told(tmp_path, capsys):
    trained(tmp_path, epochs=1)
    trained(tmp_path, epochs=2, resume=True)
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if line[:1] in "+-" and line]
    assert [line[0] for line in lines] == ["-", "+"]
    assert "max_epochs=1" in lines[0]
    assert "max_epochs=2" in lines[1]


def test_going_on_from_an_older_checkpoint(tmp_path):
    """Newer ones are out of the way then, so that the next resume does not go on from them."""
    whole = trained(tmp_path / "whole", epochs=2)
    trained(tmp_path / "run", epochs=2)
    older = str(checkpoints.iteration_path(tmp_path / "run", 28))
    runner = trained(tmp_path / "run", epochs=2, resume=True, load_from=older)
    assert same(runner.model_state(), whole.model_state())
    names = {path.name for path in (tmp_path / "run").glob("*.superseded")}
    assert names == {"iter_00000035.pth.superseded", "iter_00000040.pth.superseded"}


def test_other_files_are_not_resumed_from(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no training checkpoint .* give it as load_from"):
        trained(tmp_path / "run", resume=True, load_from=str(tmp_path / "other.pth"))


def test_weights_to_start_from(tmp_path):
    """Averaged weights of a run, or those of a backbone alone, without the rest of the run."""
    first = trained(tmp_path / "first", epochs=1)
    with first.ema.swapped():
        average = first.model_state()
    backbone = {name.removeprefix("backbone."): value for name, value in average.items()}
    save_checkpoint(backbone, tmp_path / "backbone.pth")
    for path in (
        tmp_path / "first" / "iter_00000020.pth",
        tmp_path / "first" / "weights.safetensors",
        tmp_path / "backbone.pth",
    ):
        runner = runner_of(tmp_path / path.stem, load_from=str(path))
        runner.val()
        assert same(runner.model_state(), average)
        with runner.ema.swapped():
            assert same(runner.model_state(), average)
        assert runner.iter == 0


def test_evaluation_alone(tmp_path):
    """`test` needs no part of the training."""
    config = drill.config(tmp_path / "test").to_dict()
    first = trained(tmp_path / "first", epochs=2)
    for key in ("train_cfg", "train_dataloader", "optim_wrapper", "param_scheduler"):
        config.pop(key)
    config["test_dataloader"] = config.pop("val_dataloader")
    config["test_evaluator"] = config.pop("val_evaluator")
    config["test_cfg"] = {"type": "VimTestLoop"}
    config.pop("val_cfg")
    config["load_from"] = str(tmp_path / "first" / "best_top1.pth")
    found = VimRunner.from_cfg(Config(config)).test()
    assert found["loss"] == first.message_hub.get_scalar("val/loss").current()
    assert not checkpoints.iterations(tmp_path / "test")


def test_training_outside_the_main_thread(tmp_path):
    """Signals cannot be caught there; it trains without."""
    runner = runner_of(tmp_path, epochs=1)
    thread = threading.Thread(target=runner.train)
    thread.start()
    thread.join()
    assert runner.iter == 20


def test_signal_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trained(tmp_path, epochs=1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class Stream(torch.utils.data.IterableDataset):
    """Batches, without a place to go on at."""

    def __iter__(self):
        for _ in range(5):
            targets = torch.randint(0, drill.CLASSES, (4,))
            yield {"images": torch.rand(4, 3, drill.SIZE, drill.SIZE), "targets": targets}


class StreamLoader:
    """Gives 5 batches, though it says 8."""

    batch_size = 4

    def __init__(self):
        self.dataset = Stream()
        self.places = []

    def set_epoch(self, epoch, start=0):
        self.places.append((epoch, start))

    def __iter__(self):
        return iter(self.dataset)

    def __len__(self):
        return 8


def test_an_iterable_set_begins_anew_until_the_epoch_is_full(tmp_path):
    loader = StreamLoader()
    runner = runner_of(tmp_path)
    runner._train_loop = VimTrainLoop(runner, loader, max_epochs=2, val_interval=9, val_begin=9)
    runner.train()
    assert runner.iter == 16
    assert loader.places == [(0, 0), (1, 0)]


def test_data_that_end_early(tmp_path):
    runner = runner_of(tmp_path)
    loop = runner.build_train_loop(runner._train_loop)
    loop.dataloader.sampler.positions = loop.dataloader.sampler.positions[:12]
    runner._train_loop = loop
    with pytest.raises(RuntimeError, match="the data ended after 3 of 20 batches of epoch 1"):
        runner.train()


@pytest.mark.parametrize("name", ["max_epochs", "val_interval", "val_begin", "checkpoint_interval"])
def test_lengths_are_checked(tmp_path, name):
    config = drill.config(tmp_path)
    config.train_cfg[name] = 0
    with pytest.raises(ValueError, match=f"{name} must be a whole number, 1 or more, got 0"):
        VimRunner.from_cfg(config).train()


def budgeted(work_dir, seconds, **options) -> VimRunner:
    """A run of 1000 epochs of a fifth of a second, which has so many seconds."""
    schedule = {"type": "VimCosineLR", "convert_to_iter_based": True, "total": 4, "min_lr": 1e-5}
    loop = {"type": "VimTrainLoop", "max_epochs": 1000, "val_interval": 1000}
    options = {"param_scheduler": schedule, "model": {"seconds": 0.01}} | options
    return runner_of(work_dir, train_cfg={**loop, "max_seconds": seconds}, **options)


def rates(work_dir) -> list[float]:
    lines = map(json.loads, (work_dir / "losses.0.jsonl").read_text().splitlines())
    return [float.fromhex(line["lr"]) for line in lines if "lr" in line]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the sleep of a drill's model moves on: other machines' work does not."""
    now = [0.0]
    loops = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr("vim.engine.loops.time", loops)

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(drill, "time", SimpleNamespace(**vars(time) | {"sleep": sleep}))


@pytest.mark.usefixtures("clock")
def test_a_budget_of_seconds(tmp_path):
    runner = budgeted(tmp_path, 0.705)
    runner.train()
    loop = runner.train_loop
    assert loop.seconds == pytest.approx(0.71)
    assert loop.progress == 1
    assert loop.iter == 72  # the clock starts after the first
    assert loop.epoch == loop.iter // 20  # it need not end with an epoch
    assert loop.validated_epoch == math.ceil(loop.iter / 20)
    found = rates(tmp_path)
    assert found[0] == pytest.approx(0.01)
    assert found == sorted(found, reverse=True)
    assert runner.optim_wrapper.get_lr()["lr"][0] == pytest.approx(1e-5)
    progress = runner.model.data_preprocessor.progress  # at the last iteration's start
    assert progress == pytest.approx(0.70 / 0.705, rel=1e-4)


def test_a_budget_that_ends_within_the_first_epoch(tmp_path):
    runner = budgeted(tmp_path, 0.05)
    runner.train()
    assert 1 < runner.iter < 20
    assert runner.train_loop.validated_epoch == 1
    assert (tmp_path / f"iter_{runner.iter:08d}.pth").exists()


@pytest.mark.usefixtures("clock")
def test_a_budget_goes_on_where_it_was_left(tmp_path):
    first = budgeted(tmp_path, 1000)
    stop_after(first, 20, max_epochs=1000, max_seconds=1000)
    first.train()
    seconds = checkpoints.load(tmp_path / "iter_00000020.pth")["seconds"]
    assert seconds == pytest.approx(0.19)
    second = budgeted(tmp_path, 2 * seconds, resume=True)
    second.train()
    assert second.train_loop.seconds >= 2 * seconds
    found = rates(tmp_path)
    assert found[19] > 0.0099
    assert 0.001 < found[20] < 0.0051


def test_whichever_ends_first(tmp_path):
    """Epochs, where they are over before the seconds."""
    runner = budgeted(tmp_path, 1000)
    runner._train_loop["max_epochs"] = 2
    runner.train()
    assert runner.iter == 40
    assert rates(tmp_path)[20] == pytest.approx((0.01 + 1e-5) / 2, rel=1e-3)


def test_a_schedule_that_knows_no_seconds_is_refused(tmp_path):
    schedule = {"type": "LinearLR", "by_epoch": False}
    with pytest.raises(ValueError, match="schedules that follow progress: VimCosineLR, not Linear"):
        budgeted(tmp_path, 1.0, param_scheduler=schedule).train()
    with pytest.raises(ValueError, match="max_seconds must be more than 0, got 0"):
        budgeted(tmp_path, 0).train()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_how_ddp_adds_gradients_up(cuda_graph, monkeypatch):
    monkeypatch.setattr(
        "vim.engine.runner.MMDistributedDataParallel", lambda module, **options: options
    )
    runner = SimpleNamespace(cfg={"device": "cpu"}, distributed=True, device_type="cpu")
    model = nn.Linear(2, 1)
    model.cuda_graph = cuda_graph
    options = VimRunner.wrap_model(runner, None, model)
    assert options["gradient_as_bucket_view"]
    assert (options["bucket_cap_mb"] is not None) == cuda_graph
    assert VimRunner.wrap_model(runner, {"bucket_cap_mb": 7}, model)["bucket_cap_mb"] == 7


def test_unknown_choices_are_refused(tmp_path):
    with pytest.raises(ValueError, match='parallel must be "ddp" or "fsdp", got \'tp\''):
        runner_of(tmp_path, parallel="tp")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'int8'"):
        runner_of(tmp_path, val_cfg={"type": "VimValLoop", "dtype": "int8"}).val()


def test_the_backbone_is_compiled(tmp_path):
    runner = trained(tmp_path, epochs=1, compile={"backend": "eager"})
    assert runner.unwrapped_model.backbone._compiled_call_impl is not None
    assert same(runner.model_state(), trained(tmp_path / "eager", epochs=1).model_state())
