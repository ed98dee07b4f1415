"""Train a model by a config of configs/.

    python tools/train.py CONFIG [--cfg-options train_cfg.max_epochs=10 ...]
    torchrun --nproc-per-node 8 tools/train.py CONFIG

Checkpoints, logs, curves and the resolved config go to the work directory. The same command with
--resume goes on where the run stopped. Exit code: 0 when the training is done or was stopped by a
signal, 1 if it failed, 2 for arguments that cannot be met.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from vim.engine.checkpoints import CheckpointError
from vim.engine.config import build_runner, load_config
from vim.engine.runner import NonFiniteError


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work-dir", type=Path, help="default: runs/<name of the config>")
    parser.add_argument("--checkpoint", help="weights to start from, as model.backbone.checkpoint")
    parser.add_argument("--resume", action="store_true", help="from the newest whole checkpoint")
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the rate by the images of a step"
    )
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser, arguments = parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.cfg_options, arguments.work_dir)
        if arguments.checkpoint:
            config.model.backbone.checkpoint = arguments.checkpoint
        if arguments.auto_scale_lr:
            if "auto_scale_lr" not in config:
                raise ValueError("the config has no auto_scale_lr.base_batch_size to scale from")
            config.auto_scale_lr.enable = True
        config.resume = arguments.resume
        runner = build_runner(config)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    try:
        runner.train()
    except (CheckpointError, NonFiniteError, FileExistsError) as error:
        logging.error("%s", error)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
