"""The hooks: averaged weights, checkpoints and the best, losses that are not finite."""

import os

import pytest
import safetensors.torch
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from timm.utils import ModelEmaV3

from vim.engine import checkpoints
from vim.engine.hooks import VimCheckpointHook, VimEMAHook, VimFiniteHook
from vim.engine.runner import NonFiniteError, VimRunner

from . import drill


def train(work_dir, **options) -> VimRunner:
    runner = VimRunner.from_cfg(drill.config(work_dir, **options))
    runner.train()
    return runner


@HOOKS.register_module(name="TimmEMA", force=True)
class TimmEMA(Hook):
    """What timm's train.py does."""

    priority = "NORMAL"

    def __init__(self, every: int, **options) -> None:
        self.every, self.options = every, options

    def before_run(self, runner):
        runner.reference = ModelEmaV3(runner.unwrapped_model, **self.options)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % self.every == 0:
            runner.reference.update(runner.unwrapped_model, step=(runner.iter + 1) // self.every)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_timm(tmp_path, every, warmup):
    ours = {"type": "VimEMAHook", "decay": 0.97, "warmup": warmup, "start": 3}
    theirs = {"decay": 0.97, "use_warmup": warmup, "update_after_step": 3}
    hooks = [ours, {"type": "TimmEMA", "every": every, **theirs}]
    runner = train(tmp_path, epochs=1, accumulation=every, custom_hooks=hooks)
    expected = runner.reference.module.state_dict()
    raw = runner.model_state()
    with runner.ema.swapped():
        average = runner.model_state()
    assert average.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, rtol=0, atol=0)
    assert not torch.equal(average["backbone.head.weight"], raw["backbone.head.weight"])
    assert all(torch.equal(raw[name], tensor) for name, tensor in runner.model_state().items())
    state = checkpoints.load(tmp_path / "iter_00000020.pth")
    assert all(torch.equal(state["model_ema"][name], average[name]) for name in average)
    exported = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert exported.keys() == {name.removeprefix("backbone.") for name in average}
    assert torch.equal(exported["head.weight"], average["backbone.head.weight"])


def test_validation_of_the_average_and_of_the_weights(tmp_path):
    hooks = [{"type": "VimEMAHook", "decay": 0.999, "validate_raw": True}]
    runner = train(tmp_path, epochs=2, custom_hooks=hooks)
    both = {name: runner.message_hub.get_scalar(f"val/{name}").current() for name in ("loss",)}
    both["raw"] = runner.message_hub.get_scalar("val/raw/loss").current()
    assert both["raw"] != both["loss"]
    found = runner.val_loop.run()
    assert found["loss"] == both["loss"]
    assert found["raw/loss"] == both["raw"]
    runner.ema.validate_raw = False
    with runner.ema.swapped():  # swapped once more, the loop validates the weights that train
        assert runner.val_loop.run()["loss"] == both["raw"]


def test_the_weights_come_back_if_a_validation_fails(tmp_path):
    runner = train(tmp_path, epochs=1)
    before = runner.model_state()
    with pytest.raises(ZeroDivisionError), runner.ema.swapped():
        raise ZeroDivisionError
    assert all(torch.equal(before[name], tensor) for name, tensor in runner.model_state().items())


def test_checkpoints_are_kept_by_interval_and_rotated(tmp_path):
    hooks = {"checkpoint": {"type": "VimCheckpointHook", "keep": 4}}
    train(tmp_path, epochs=2, interval=6, default_hooks=hooks)
    assert list(checkpoints.iterations(tmp_path)) == [40, 36, 30, 24]


def test_an_epoch_is_the_interval_by_default(tmp_path):
    train(tmp_path, epochs=2, interval=None)
    assert list(checkpoints.iterations(tmp_path)) == [40, 20]


def test_checkpoints_wait_for_an_update(tmp_path):
    """With 3 iterations to an update, 7, 14, 21 and 28 are put off to the next multiple of 3."""
    hooks = {"checkpoint": {"type": "VimCheckpointHook", "keep": 9}}
    train(tmp_path, epochs=2, interval=7, accumulation=3, default_hooks=hooks)
    assert list(checkpoints.iterations(tmp_path)) == [40, 36, 30, 21, 15, 9]


@HOOKS.register_module(name="Scores", force=True)
class Scores(Hook):
    """Puts made-up metrics in place of the validation's."""

    priority = "VERY_HIGH"

    def __init__(self, scores) -> None:
        self.scores = list(scores)

    def after_val_epoch(self, runner, metrics=None):
        metrics["score"] = metrics["error"] = self.scores.pop(0)


@pytest.mark.parametrize(("metric", "best"), [("score", 2), ("error", 4)])
def test_the_best_checkpoint(tmp_path, metric, best):
    checkpoint = {"type": "VimCheckpointHook", "save_best": metric}
    runner = train(
        tmp_path,
        epochs=8,
        default_hooks={"checkpoint": checkpoint},
        custom_hooks=[{"type": "Scores", "scores": [0.5, 0.2, 0.5, 0.3]}],
    )
    state = checkpoints.load(checkpoints.best_path(tmp_path, metric))
    assert state["iteration"] == best * 20
    assert "model_ema" not in state
    last = checkpoints.load(tmp_path / "iter_00000160.pth")
    expected = {"metric": metric, "score": {2: 0.5, 4: 0.2}[best], "iteration": best * 20}
    assert last["best"] == expected
    assert runner.message_hub.get_scalar("val/top1")


def test_a_best_metric_that_is_none_is_named(tmp_path):
    hooks = {"checkpoint": {"type": "VimCheckpointHook", "save_best": "top_1"}}
    with pytest.raises(ValueError, match=r"save_best='top_1' is none .* did you mean top1"):
        train(tmp_path, epochs=2, default_hooks=hooks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VimEMAHook(decay=1.0), "decay must be at least 0 and less than 1, got 1.0"),
        (lambda: VimCheckpointHook(keep=0), "keep must be 1 or more, got 0"),
        (lambda: VimCheckpointHook(rule="more"), "rule must be"),
        (lambda: VimFiniteHook(interval=0), "must be 1 or more, got 0 and 50"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class BreakLoss(torch.autograd.Function):
    """The identity, with NaN for a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def runner_with_broken(tmp_path, what: str, **options) -> VimRunner:
    """A runner whose `what` breaks at the 9th iteration."""
    runner = VimRunner.from_cfg(drill.config(tmp_path, **options))
    model = runner.unwrapped_model

    def at_9(module, inputs, output):
        if not module.training or runner.iter < 8:
            return None
        if what == "gradient":
            return BreakLoss.apply(output)
        if what == "loss":
            return {"loss": output["loss"] * float("inf")} if isinstance(output, dict) else None
        return {**output, "images": output["images"] * float("inf")}

    places = {"gradient": model.backbone, "loss": model, "data": model.data_preprocessor}
    places[what].register_forward_hook(at_9)
    return runner


def test_a_loss_that_is_infinite_by_itself(tmp_path):
    runner = runner_with_broken(tmp_path, "loss")
    with pytest.raises(NonFiniteError, match="loss inf; every module's output is finite") as error:
        runner.train()
    assert "at iteration 9 (epoch 1" in str(error.value)
    assert f"last good checkpoint is {tmp_path / 'iter_00000007.pth'}" in str(error.value)
    assert all(tensor.isfinite().all() for tensor in runner.model_state().values())


def test_data_that_are_not_finite(tmp_path):
    runner = runner_with_broken(tmp_path, "data")
    with pytest.raises(NonFiniteError, match=r"is data_preprocessor \(BaseDataPreprocessor\)"):
        runner.train()


def test_a_gradient_that_is_not_finite_is_found_by_the_next_loss(tmp_path):
    runner = runner_with_broken(tmp_path, "gradient")
    with pytest.raises(NonFiniteError, match="at iteration 10") as error:
        runner.train()
    assert "first module with an output that is not finite is backbone.embed" in str(error.value)
    assert "weights are not finite in backbone.embed.weight" in str(error.value)


def test_broken_weights_are_not_saved(tmp_path):
    runner = runner_with_broken(tmp_path, "gradient", interval=3)
    with pytest.raises(NonFiniteError, match="after iteration 9 the weights are not finite"):
        runner.train()
    assert list(checkpoints.iterations(tmp_path)) == [6, 3]


def test_losses_may_be_looked_at_less_often(tmp_path):
    runner = runner_with_broken(
        tmp_path,
        "gradient",
        interval=50,
        default_hooks={"finite": {"type": "VimFiniteHook", "interval": 7}},
    )
    with pytest.raises(NonFiniteError, match="at iteration 15"):
        runner.train()


@OPTIM_WRAPPERS.register_module(name="Scaled", force=True)
class Scaled(OptimWrapper):
    """An optimizer with a gradient scaler."""

    def __init__(self, optimizer, **options) -> None:
        super().__init__(optimizer, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def backward(self, loss, **kwargs):
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("allowed", [5, 6])
def test_updates_that_the_scaler_skips(tmp_path, allowed):
    config = drill.config(
        tmp_path,
        epochs=1,
        default_hooks={"finite": {"type": "VimFiniteHook", "max_skipped": allowed}},
    )
    config.optim_wrapper = {
        "type": "Scaled",
        "optimizer": {"type": "SGD", "lr": 0.01},
    }
    runner = VimRunner.from_cfg(config)
    model = runner.unwrapped_model

    def overflow(gradient):
        # Good at first, then 5 updates that overflow.
        return gradient * float("inf") if 4 <= runner.iter < 9 else gradient

    model.backbone.head.weight.register_hook(overflow)
    if allowed == 5:
        with pytest.raises(
            NonFiniteError, match="5 updates in a row were skipped up to iteration 9"
        ):
            runner.train()
    else:
        runner.train()
        state = checkpoints.load(tmp_path / "iter_00000020.pth")
        assert state["skipped_updates"] == [5, 0]
        assert runner.message_hub.get_info("skipped_updates") == 5
    assert os.path.exists(tmp_path / "iter_00000007.pth")
