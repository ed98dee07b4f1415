"""Convert a checkpoint between the authors' layout (.pth) and ours (.safetensors), bit-exact.

    python tools/convert_checkpoint.py vim_t_midclstok_76p1acc.pth vim_tiny.safetensors
    python tools/convert_checkpoint.py vim_tiny.safetensors official.pth --to official
    python tools/convert_checkpoint.py runs/x/best_top1.pth x.safetensors --use-ema --dtype float16

The layout of the source is recognised by its names; nothing but the weights is kept, of a training
run those of the backbone.
"""

import argparse
import logging
import os
import sys

import torch
from torch import Tensor

from vim.layers.token_order import CLS_POSITIONS
from vim.models import (
    backbone_weights,
    is_official,
    read_checkpoint,
    save_checkpoint,
    to_native,
    to_official,
)

logger = logging.getLogger("convert_checkpoint")


def cast(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights in another precision; counters stay as they are.

    Raises:
        ValueError: a weight that the dtype cannot hold.
    """
    out = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}
    lost = [k for k, v in out.items() if v.isfinite().all() != state_dict[k].isfinite().all()]
    if lost:
        raise ValueError(f"{dtype} cannot hold the values of {', '.join(lost[:8])}")
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the file to read: .pth, .pt or .safetensors")
    parser.add_argument("target", help="the file to write: .safetensors, .pth or .pt")
    parser.add_argument("--to", choices=("native", "official"), default="native", help="layout")
    parser.add_argument(
        "--cls-token-position",
        choices=tuple(CLS_POSITIONS),
        default="middle",
        help="where the model scans its class token (every published file: middle)",
    )
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights in the target; by default that of the source",
    )
    parser.add_argument("--force", action="store_true", help="replace the target if it exists")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    if os.path.exists(args.target) and not args.force:
        parser.error(f"{args.target} exists: choose another name, or give --force")
    try:
        state_dict = backbone_weights(read_checkpoint(args.source, use_ema=args.use_ema))
        if is_official(state_dict) != (args.to == "official"):
            convert = to_official if args.to == "official" else to_native
            state_dict = convert(state_dict, args.cls_token_position)
        if args.dtype:
            state_dict = cast(state_dict, getattr(torch, args.dtype))
        save_checkpoint(state_dict, args.target)
    except (OSError, ValueError, RuntimeError) as error:
        logger.error("%s", error)
        return 1
    logger.info("%s: %d tensors, %s layout", args.target, len(state_dict), args.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
