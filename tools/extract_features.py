"""Extract image features with a timm model.

The output holds float32 arrays, one row an image, beside the names of the files and the settings:

- FILE.npz: `pooled`, `last` or `layer_3` as asked for, `files`, and `settings` as JSON text;
- FILE.safetensors: the same arrays, and in its metadata `info`, a JSON object of `files` and
  `settings`;
- DIR: files like that of consecutive images, for what does not fit in memory; their settings are in
  `job.json`.

Every batch is first stored in `<output>.partial/`, so that the same command continues after an
interruption; the result is the one of an undisturbed run.
Exit code: 0 if all went well, 1 if some images failed, 2 for arguments that cannot be met.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

import vim
from vim.engine.images import find_images, printable
from vim.engine.inference import (
    Batch,
    Runner,
    add_arguments,
    atomic_write,
    check_output,
    chunk,
)

logger = logging.getLogger("extract_features")

FORMATS = {
    "map": lambda features: features,
    "tokens": lambda features: features.flatten(2).transpose(1, 2),
    "pooled": lambda features: features.mean(dim=(2, 3)),
}


def parse_layer(text: str) -> str | int:
    return text if text in ("pooled", "last") else int(text)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="FILE.npz, FILE.safetensors or DIR"
    )
    parser.add_argument(
        "--layer",
        type=parse_layer,
        action="append",
        metavar="pooled|last|INT",
        help="what the classifier sees (pooled, the default), the normalised last layer, or the "
        "output of layer INT, negative from the end; may be repeated",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="map",
        help="of all layers but pooled: map (C, H, W), tokens (H*W, C), or pooled (C), their mean",
    )
    return parser, parser.parse_args(argv)


def resolve_layers(model: nn.Module, layers: Sequence[str | int]) -> dict[str, int | None]:
    """Name in the output -> layer index (None: pooled), each once."""
    if set(layers) != {"pooled"} and not hasattr(model, "forward_intermediates"):
        raise ValueError("this model gives no features of its layers, only --layer pooled")
    depth = len(model.feature_info)
    resolved: dict[str, int | None] = {}
    for layer in layers:
        if layer == "pooled":
            resolved[layer] = None
        elif layer == "last":
            resolved[layer] = depth - 1
        elif -depth <= layer < depth:
            resolved[f"layer_{layer % depth}"] = layer % depth
        else:
            raise ValueError(f"--layer must be in {-depth} ... {depth - 1}, got {layer}")
    return resolved


def compute_features(
    model: nn.Module, images: Tensor, layers: dict[str, int | None], layout: str
) -> dict[str, Tensor]:
    """The features of images (B, 3, H, W) by name, of the shape that `layout` says, in float32."""

    def maps(indices: list[int], norm: bool) -> list[Tensor]:
        return model.forward_intermediates(
            images, indices=indices, norm=norm, output_fmt="NCHW", intermediates_only=True
        )

    features = {}
    # forward_intermediates returns layers in the model's order, whatever the order of `indices`.
    inner = sorted((i, name) for name, i in layers.items() if name.startswith("layer_"))
    if inner:
        indices, names = zip(*inner, strict=True)
        features.update(zip(names, maps(list(indices), norm=False), strict=True))
    if "last" in layers:
        features["last"] = maps([layers["last"]], norm=True)[0]
    features = {name: FORMATS[layout](value) for name, value in features.items()}
    if "pooled" in layers:
        features["pooled"] = model.forward_head(model.forward_features(images), pre_logits=True)
    return {name: value.float().cpu() for name, value in features.items()}


def describe(args: argparse.Namespace, runner: Runner, layers: dict[str, Any]) -> dict[str, Any]:
    """All settings that the features depend on, as JSON gives them back."""
    weights = hashlib.sha256()
    for name, value in sorted(runner.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    settings = {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "pretrained": args.pretrained,
        "checkpoint": args.checkpoint,
        "use_ema": args.use_ema,
        "weights_sha256": weights.hexdigest(),
        "preprocessing": runner.data_config,
        "layers": list(layers),
        "format": args.format,
        "dtype": args.dtype,
        "device": runner.device.type,
        "batch_size": args.batch_size,
        "versions": {package.__name__: package.__version__ for package in (torch, timm, vim)},
    }
    return json.loads(json.dumps(settings, default=str))


def save(arrays: dict[str, np.ndarray], path: Path, info: dict[str, Any]) -> None:
    """Write safetensors; one entry of metadata, since the order of several is left to chance."""
    save_file(arrays, path, {"info": json.dumps(info)})


class Shards:
    """The folder that holds the features of each batch while a run is unfinished.

    Args:
        folder: made if missing.
        settings: what the features depend on.
        paths: the image files, all of them.
        count: of batches.

    Raises:
        ValueError: the folder holds the work of other settings or images.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], paths: Sequence[Path], count: int
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.files = [folder / f"shard-{index:06d}.safetensors" for index in range(count)]
        job = {**settings, "files": [str(path) for path in paths]}
        file = folder / "job.json"
        if not file.exists():
            folder.mkdir(exist_ok=True)
            for stale in folder.glob("shard-*.safetensors"):
                stale.unlink()
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(job))
            return
        begun = json.loads(file.read_text())
        differing = [key for key in job if job[key] != begun.get(key)]
        if differing:
            raise ValueError(
                f"{folder} holds unfinished work that differs in {', '.join(differing)}: "
                "finish it with the command that began it, or delete that folder"
            )

    def missing(self) -> list[int]:
        """The batches still to compute."""
        return [index for index, file in enumerate(self.files) if not file.exists()]

    def write(self, index: int, batch: Batch, features: dict[str, Tensor]) -> None:
        info = {
            "files": [str(path) for path in batch.paths if path not in batch.errors],
            "failures": [[str(path), reason] for path, reason in batch.errors.items()],
        }
        arrays = {name: value.contiguous().numpy() for name, value in features.items()}
        with atomic_write(self.files[index]) as temporary:
            save(arrays, temporary, info)

    def info(self, key: str) -> list:
        """One of the lists `files` and `failures`, over all batches."""
        values = []
        for file in self.files:
            with safe_open(file, "numpy") as shard:
                values += json.loads(shard.metadata()["info"])[key]
        return values

    def array(self, name: str) -> np.ndarray:
        """Features over all batches."""
        parts = []
        for file in self.files:
            with safe_open(file, "numpy") as shard:
                if name in shard.keys():  # noqa: SIM118 (a shard is no mapping)
                    parts.append(shard.get_tensor(name))
        return np.concatenate(parts)

    def finish(self, output: Path) -> None:
        """Turn the folder into the output."""
        for stale in self.folder.glob("*.tmp"):
            stale.unlink()
        if not output.suffix:
            os.replace(self.folder, output)
            return
        files = self.info("files")
        arrays = {name: self.array(name) for name in self.settings["layers"]}
        merged = self.folder / output.name
        if output.suffix == ".npz":
            np.savez(merged, files=files, settings=json.dumps(self.settings), **arrays)
        else:
            save(arrays, merged, {"files": files, "settings": self.settings})
        os.replace(merged, output)
        shutil.rmtree(self.folder)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, args = parse_args(argv)
    try:
        check_output(args.output, (".npz", ".safetensors", ""))
        if not args.output.suffix and args.output.exists():
            raise ValueError(f"{args.output} exists already: delete it, or name another folder")
        paths = find_images(args.images)
        runner = Runner(args)
        layers = resolve_layers(runner.model, args.layer or ["pooled"])
        chunks = chunk(paths, args.batch_size)
        folder = args.output.with_name(args.output.name + ".partial")
        shards = Shards(folder, describe(args, runner, layers), paths, len(chunks))
    except (ValueError, OSError) as error:
        parser.error(str(error))

    missing = shards.missing()
    if len(missing) < len(chunks):
        logger.info("resuming: %d of %d batches left", len(missing), len(chunks))
    start = time.perf_counter()
    batches = runner.read([chunks[index] for index in missing])
    for index, batch in zip(missing, batches, strict=True):
        features = {}
        if len(batch.images):
            with runner.precision():
                features = compute_features(runner.model, batch.images, layers, args.format)
        shards.write(index, batch, features)
    seconds = time.perf_counter() - start

    failures = shards.info("failures")
    for path, reason in failures:
        logger.error("failed: %s: %s", printable(path), reason)
    if len(failures) == len(paths):
        logger.error("no image could be read: nothing written")
        shutil.rmtree(folder)
        return 1
    shards.finish(args.output)
    count = sum(len(chunks[index]) for index in missing)
    logger.info(
        "%d images, %d failed, %.1f s, %.1f images/s: %s",
        len(paths),
        len(failures),
        seconds,
        count / seconds,
        args.output,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
