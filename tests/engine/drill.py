"""Small training runs to break in the tests: a model, configs, and a server of processes.

Run as a script it imports everything once and then forks a run for each line of its input, so that
a run starts in a moment: a line is the JSON of `config`'s arguments and of `processes`; the answers
are the run's process ids and, when it has ended, how: its exit code, or minus the signal that
killed it.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS
from torch import nn

import vim.engine.hooks
import vim.engine.metrics  # noqa: F401
from vim.engine.config import load_config
from vim.engine.runner import VimRunner

CLASSES, SIZE, BATCH, IMAGES = 4, 8, 4, 80
CONFIGS = Path(__file__).parents[2] / "configs"
DENSE = {
    "detection": "detection/vim-debug-mask-rcnn_1xb2_made-up.py",
    "segmentation": "segmentation/vim-debug-upernet_1xb2_made-up.py",
}


class TinyBackbone(nn.Module):
    """Pixels to logits, with dropout to draw random numbers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * SIZE * SIZE, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.float().flatten(1) / 255)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@MODELS.register_module(name="DrillModel", force=True)
class DrillModel(BaseModel):
    """A classifier; an iteration lasts `seconds`, a batch of a validation `validating` seconds;
    from the call numbered `nan_at` on a block's output is NaN in training on one rank."""

    def __init__(
        self,
        seconds: float = 0.0,
        validating: float = 0.0,
        nan_at: int | None = None,
        nan_rank: int = 0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.backbone = TinyBackbone(dropout)
        self.seconds = seconds
        self.validating = validating
        self.nan_at = nan_at
        self.calls = 0
        if nan_at is not None and nan_rank == int(os.environ.get("RANK", "0")):
            self.backbone.blocks[1].register_forward_hook(self._break)

    def _break(self, module, inputs, output):
        return output * float("nan") if self.training and self.calls >= self.nan_at else output

    def forward(self, images, targets, corrupt=0, mode="tensor"):
        self.calls += self.training
        logits = self.backbone(images)
        if mode != "loss":
            time.sleep(self.validating)
            return {"logits": logits, "targets": targets}
        time.sleep(self.seconds)
        return {"loss": nn.functional.cross_entropy(logits, targets)}


@HOOKS.register_module(name="DrillLog", force=True)
class DrillLog(Hook):
    """Appends a line an iteration and validation, to the bit."""

    priority = "BELOW_NORMAL"

    def _write(self, runner, line):
        with open(Path(runner.work_dir) / f"losses.{runner.rank}.jsonl", "a") as file:
            file.write(json.dumps({"pid": os.getpid(), **line}) + "\n")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        loss = outputs["loss"].detach().double().item().hex()
        rate = runner.optim_wrapper.get_lr()["lr"][0].hex()
        self._write(runner, {"iteration": runner.iter + 1, "loss": loss, "lr": rate})

    def after_val_epoch(self, runner, metrics=None):
        found = {name: float(value).hex() for name, value in metrics.items()}
        self._write(runner, {"validated": runner.epoch, **found})


@HOOKS.register_module(name="DrillDiskFull", force=True)
class DrillDiskFull(Hook):
    """After an iteration, the system refuses to make files of more than 16 KiB."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))


def config(
    work_dir,
    *,
    epochs=4,
    interval=7,
    batch_size=BATCH,
    model=None,
    accumulation=1,
    disk_full_after=None,
    **changes,
):
    """The config of a run of `epochs` epochs of 20 iterations on made-up images."""
    loader = {
        "batch_size": batch_size,
        "input_size": SIZE,
        "dataset": {
            "name": "made-up",
            "num_samples": IMAGES,
            "num_classes": CLASSES,
            "img_size": 2 * SIZE,
        },
    }
    validation = {**loader, "dataset": {**loader["dataset"], "num_samples": 26}}
    optimizer = {"type": "AdamW", "lr": 0.01, "weight_decay": 0.05}
    cfg = {
        "work_dir": str(work_dir),
        "experiment_name": f"drill-{os.getpid()}-{time.monotonic_ns()}",
        "model": {"type": "DrillModel", **(model or {})},
        "train_dataloader": loader,
        "train_cfg": {
            "type": "VimTrainLoop",
            "max_epochs": epochs,
            "val_interval": 2,
            "checkpoint_interval": interval,
        },
        "optim_wrapper": {
            "type": "OptimWrapper",
            "optimizer": optimizer,
            "clip_grad": {"max_norm": 1.0},
            "accumulative_counts": accumulation,
        },
        "param_scheduler": [
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 25},
            {"type": "MultiStepLR", "by_epoch": True, "milestones": [1, 3]},
        ],
        "val_dataloader": validation,
        "val_cfg": {"type": "VimValLoop"},
        "val_evaluator": {"type": "VimClassificationMetric"},
        "custom_hooks": [
            {"type": "VimEMAHook", "decay": 0.9},
            {"type": "DrillLog"},
            *([{"type": "DrillDiskFull", "after": disk_full_after}] if disk_full_after else []),
        ],
        "randomness": {"seed": 3},
        "log_level": "WARNING",
        **changes,
    }
    return Config(cfg)


def dense_config(work_dir, task, *, epochs=3, interval=4, **changes):
    """The config of a detector's or segmenter's run of `epochs` epochs of 20 images."""
    options = {
        "train_cfg.max_epochs": epochs,
        "train_cfg.checkpoint_interval": interval,
        "param_scheduler.total": epochs,
        "model.backbone.drop_path_rate": 0.2,
        "train_dataloader.num_workers": 1,
        "default_hooks.ema.decay": 0.9,
        "log_level": "WARNING",
    }
    found = load_config(CONFIGS / DENSE[task], options, work_dir)
    found.custom_hooks = [{"type": "DrillLog"}]
    found.experiment_name = f"drill-{os.getpid()}-{time.monotonic_ns()}"
    found.update(changes)
    return found


def run(cfg: Config, rank: int, processes: int, port: int) -> None:
    """Be a process of a run; never return."""
    code = 1
    with open(Path(cfg.work_dir).with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if processes > 1:
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{processes}")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    try:
        VimRunner.from_cfg(cfg).train()
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    """Fork a run for each line of the input; of several processes, kill the rest when one fails."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments = json.loads(line)
        processes, port = arguments.pop("processes", 1), free_port()
        cfg = dense_config(**arguments) if "task" in arguments else config(**arguments)
        children = []
        for rank in range(processes):
            children.append(os.fork())
            if children[-1] == 0:
                run(cfg, rank, processes, port)
        sys.stdout.write(f"pids {' '.join(map(str, children))}\n")
        sys.stdout.flush()
        failure = 0
        while children:
            child, status = os.waitpid(-1, 0)
            children.remove(child)
            if status and not failure:
                failure = os.waitstatus_to_exitcode(status)
                for other in children:
                    os.kill(other, signal.SIGKILL)
        sys.stdout.write(f"code {failure}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
