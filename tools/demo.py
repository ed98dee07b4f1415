"""Train a small Vision Mamba on handwritten digits and classify scans it has not seen.

Then classify photographs with the weights that come with the package, and show what a larger model
makes of them. Runs on a CPU in a few minutes and needs no network: the digits come with
scikit-learn, the photographs with scikit-learn and scikit-image. Writes weights, predictions and
pictures; the summary goes to stdout. Exit code: 0 if all went well, 1 if the result is not what it
should be, 2 for arguments that cannot be met.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

import vim
from vim.engine.inference import atomic_write, positive_int

logger = logging.getLogger("demo")

ARCHITECTURE = "vim_tiny_patch16_224"
SHIPPED = "vim_micro_patch8_128"

REQUIRED_ACCURACY = 0.95
HELD_OUT = 360

# 16 patches and the class token: the PyTorch reference scans them in a Python loop.
DIGITS_MODEL = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 48,
    "depth": 3,
    "d_state": 8,
    "num_classes": 10,
    "global_pool": "avg",
}
# Saved with the weights, so that tools/infer.py prepares images as the training does. Scans are
# grey, and read as RGB like every other image: three equal channels.
DIGITS_CFG = {
    "input_size": (3, 8, 8),
    "fixed_input_size": True,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "num_classes": 10,
    "label_names": tuple("0123456789"),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "description": "Trained on scikit-learn's handwritten digits by tools/demo.py",
}
BLACK = -1.0  # a pixel of value 0 after mean and std

BATCH_SIZE = 64
LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0

FEATURE_BLOCKS = (2, 9, 16, 23)
SQUARE, WIDE = (224, 224), (224, 336)  # (height, width)


@dataclass
class Digits:
    """Scans of one part of the split.

    Args:
        scans: (M, 8, 8) uint8, white on black.
        labels: (M,) the digits.
        indices: (M,) each scan's place in scikit-learn's data set.
    """

    scans: np.ndarray
    labels: Tensor
    indices: np.ndarray

    def images(self) -> Tensor:
        """Return the scans as the model takes them: (M, 3, 8, 8)."""
        return (torch.from_numpy(self.scans) / 255 * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)

    def file_names(self) -> list[str]:
        """Return a name for each scan that tells its place and its digit."""
        return [
            f"{index:04}_is_{label}.png"
            for index, label in zip(self.indices, self.labels.tolist(), strict=True)
        ]


@dataclass
class History:
    """What a training measured.

    Args:
        losses: mean training loss of each epoch.
        accuracies: share of the held-out scans read correctly after each epoch.
        seconds: duration of the whole training.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


def load_digits() -> tuple[Digits, Digits]:
    """Return the training and the held-out scans: always the same split, stratified by digit.

    It is by scan, not by writer: the data set does not say who wrote what.
    """
    data = sklearn.datasets.load_digits()
    scans = np.rint(data.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(
        np.arange(len(scans)), test_size=HELD_OUT, stratify=data.target, random_state=0
    )
    train, held_out = (Digits(scans[i], torch.from_numpy(data.target[i]), i) for i in parts)
    return train, held_out


def shifted(images: Tensor) -> Tensor:
    """Return each image moved by up to one pixel up, down, left or right at random."""
    count, _, height, width = images.shape
    windows = F.pad(images, (1, 1, 1, 1), value=BLACK).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count), :, torch.randint(3, (count,)), torch.randint(3, (count,))]


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the likeliest class of each image."""
    return model.eval()(images).argmax(dim=1)


@contextmanager
def single_thread() -> Iterator[None]:
    """Within it, torch computes in one thread.

    Operations as small as those of one token gain little from a second one, and wait for it long
    where the machine is busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@single_thread()
def train_digits(
    train: Digits, held_out: Digits, *, epochs: int, seed: int
) -> tuple[nn.Module, History]:
    """Train a model from scratch, with a progress bar; the same seed gives the same weights.

    The held-out scans are only measured on: nothing is chosen by them, and the weights are those
    of the last epoch.
    """
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, pretrained_cfg=DIGITS_CFG, **DIGITS_MODEL)
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    images, test_images = train.images(), held_out.images()
    steps = len(images) // BATCH_SIZE
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps,
        warmup_t=steps,
        warmup_lr_init=LEARNING_RATE / 10,
        t_in_epochs=False,
    )
    history = History()
    start = time.perf_counter()
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(
        total=epochs * steps * BATCH_SIZE, unit=" images", mininterval=interval, dynamic_ncols=True
    ) as bar:
        for epoch in range(epochs):
            bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
            model.train()
            total = 0.0
            batches = torch.randperm(len(images)).split(BATCH_SIZE)[:steps]
            for step, batch in enumerate(batches):
                logits = model(shifted(images[batch]))
                labels = train.labels[batch]
                loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                schedule.step_update(epoch * steps + step + 1)
                total += loss.item()
                bar.update(len(batch))
            accuracy = (predict(model, test_images) == held_out.labels).double().mean().item()
            history.losses.append(total / steps)
            history.accuracies.append(accuracy)
            bar.set_postfix_str(f"loss {total / steps:.3f}, accuracy {accuracy:.1%}")
    history.seconds = time.perf_counter() - start
    return model, history


def save_model(model: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors for timm's `local-dir:`; each is moved in whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        save_for_hf(model, temporary, safe_serialization=True, model_args=DIGITS_MODEL)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def write_scans(digits: Digits, folder: Path) -> None:
    """Write each scan as a grey PNG of 8 x 8 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for scan, name in zip(digits.scans, digits.file_names(), strict=True):
        Image.fromarray(scan).save(folder / name)


def write_photographs(folder: Path) -> None:
    """Write the sample photographs as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, photo in photographs():
        photo.save(folder / f"{name}.png")


def infer(images: Path, model: str, predictions: Path, sheet: Path) -> dict[str, tuple[str, float]]:
    """Run tools/infer.py on a folder as a user would; return file name -> (class, probability).

    Raises:
        RuntimeError: tools/infer.py failed.
    """
    tool = os.path.relpath(Path(__file__).with_name("infer.py"))
    command = [sys.executable, tool, str(images), "--model", model, "--pretrained", "--topk", "3"]
    command += ["--output", str(predictions), "--save-plot", str(sheet)]
    logger.info("$ %s", shlex.join(command))
    # Its table has three lines a file; all of it is in the predictions, too.
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"tools/infer.py failed with exit code {done.returncode}")
    records = [json.loads(line) for line in predictions.read_text("utf-8").splitlines()]
    best = {Path(r["file"]).name: r["classes"][0] for r in records}
    return {name: (row["label"], row["probability"]) for name, row in best.items()}


def plot_learning_curve(history: History, path: Path) -> None:
    """Draw training loss and held-out accuracy over the epochs."""
    epochs = range(1, len(history.losses) + 1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, history.losses, "o-", color="#3465a4", markersize=4)
    left.set(title="Training loss", ylabel=f"cross-entropy, label smoothing {LABEL_SMOOTHING}")
    left.set_ylim(bottom=0)
    right.axhline(REQUIRED_ACCURACY, color="#888888", linestyle="--", linewidth=1)
    right.plot(epochs, history.accuracies, "o-", color="#4e9a06", markersize=4)
    last = f"{history.accuracies[-1]:.1%} after the last epoch, {REQUIRED_ACCURACY:.0%} required"
    right.set(title=f"Accuracy: {last}", ylabel="held-out scans read correctly")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def photographs() -> list[tuple[str, Image.Image]]:
    """Return the sample photographs, cut to the two sizes the feature maps are made of."""
    china, flower = sklearn.datasets.load_sample_images().images
    named = {
        "astronaut": (skimage.data.astronaut(), SQUARE),
        "cat": (skimage.data.chelsea(), WIDE),
        "coffee": (skimage.data.coffee(), WIDE),
        "flower": (flower, WIDE),
        "temple": (china, WIDE),
    }
    return [
        (name, ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.BICUBIC))
        for name, (pixels, (height, width)) in named.items()
    ]


def feature_model(checkpoint: Path | None) -> nn.Module:
    """Return Vim-tiny for images of any size, with random weights unless a checkpoint is given."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, dynamic_img_size=True)
    if checkpoint is not None:
        vim.load_checkpoint(model, checkpoint)
    return model.eval()


@single_thread()
@torch.inference_mode()
def feature_maps(model: nn.Module, photo: Image.Image) -> list[np.ndarray]:
    """Return a picture (H', W', 3) of the patch features after each block of FEATURE_BLOCKS."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = (torch.from_numpy(np.array(photo)) / 255 - mean) / std
    image = pixels.permute(2, 0, 1).unsqueeze(0)
    maps = model.forward_intermediates(image, list(FEATURE_BLOCKS), intermediates_only=True)
    return [pca_colours(features[0]) for features in maps]


def pca_colours(features: Tensor) -> np.ndarray:
    """Return the first three principal components of patches as colours: (D, H, W) -> (H, W, 3).

    Each component is stretched from its 2nd to its 98th percentile to [0, 1]. Its sign, which
    carries no meaning, is chosen such that its largest value is positive.
    """
    _, height, width = features.shape
    patches = features.double().flatten(1).T
    u, s, _ = torch.linalg.svd(patches - patches.mean(dim=0), full_matrices=False)
    components = u[:, :3] * s[:3]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * largest.sign()
    low, high = components.quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    colours = (components - low) / (high - low).clamp(min=1e-12)
    return colours.clamp(0, 1).reshape(height, width, 3).numpy()


def plot_feature_maps(model: nn.Module, weights: str, path: Path) -> None:
    """Draw each photograph beside its feature maps.

    Args:
        model: see `feature_model`.
        weights: what the title says of the weights.
        path: PNG to write.
    """
    photos = photographs()
    figure = Figure(figsize=(15, 2.1 * len(photos) + 0.9), layout="constrained")
    figure.suptitle(
        f"Patch features of {ARCHITECTURE}: first three principal components as RGB\n{weights}",
        fontsize=14,
    )
    grid = figure.subplots(len(photos), 1 + len(FEATURE_BLOCKS))
    for row, (name, photo) in zip(grid, photos, strict=True):
        maps = feature_maps(model, photo)
        patches = f"{photo.height} x {photo.width} px, {maps[0].shape[0]} x {maps[0].shape[1]}"
        row[0].set_ylabel(f"{name}\n{patches} patches", fontsize=8)
        for axes, picture in zip(row, (photo, *maps), strict=True):
            axes.imshow(picture, extent=(0, photo.width, photo.height, 0), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    titles = [
        "photograph",
        *(f"after block {i + 1} of {len(model.blocks)}" for i in FEATURE_BLOCKS),
    ]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def summary(
    history: History,
    wrong: Sequence[str],
    count: int,
    seen: Mapping[str, tuple[str, float]],
    total_seconds: float,
    output: Path,
) -> str:
    """Return the text that ends the demo.

    Args:
        history: of the training.
        wrong: a phrase for each held-out scan read wrongly.
        count: number of held-out scans.
        seen: the class and its probability of each photograph, by file name.
        total_seconds: duration of the whole demo.
        output: its folder.
    """
    right = count - len(wrong)
    shown = "; ".join(wrong[:8]) + ("; ..." if len(wrong) > 8 else "")
    pictures = ("contact_sheet.png", "learning_curve.png", "photographs.png", "feature_maps.png")
    rows = [
        ("accuracy", f"{right / count:.1%}, {right} of {count} held-out scans"),
        *([("read wrongly", shown)] if wrong else []),
        ("training", f"{history.seconds:.0f} s, {len(history.losses)} epochs"),
        *(("photograph", f"{name}: {label}, {p:.0%}") for name, (label, p) in seen.items()),
        ("", f"{SHIPPED} knows ten classes; of these photographs, only the temple is near one"),
        ("in all", f"{total_seconds:.0f} s"),
        ("weights", f"local-dir:{output / 'digits'}"),
        ("predictions", str(output / "predictions.jsonl")),
        *(("picture", str(output / name)) for name in pictures),
    ]
    return "".join(f"{key:<13} {value}\n" for key, value in rows)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--epochs", type=positive_int, default=18)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help=f"weights of {ARCHITECTURE} for the feature maps, the authors' .pth for one; "
        "random without it",
    )
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.perf_counter()
    parser, args = parse_args(argv)
    output = args.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        larger_model = feature_model(args.checkpoint)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))

    train, held_out = load_digits()
    count = len(held_out.scans)
    logger.info("training on %d scans of digits, %d held out", len(train.scans), count)
    model, history = train_digits(train, held_out, epochs=args.epochs, seed=args.seed)
    save_model(model, output / "digits")
    plot_learning_curve(history, output / "learning_curve.png")

    write_scans(held_out, output / "heldout")
    write_photographs(output / "photographs")
    digits = (output / "heldout", f"local-dir:{output / 'digits'}", output / "predictions.jsonl")
    photos = (output / "photographs", SHIPPED, output / "photographs.jsonl")
    try:
        found = infer(*digits, output / "contact_sheet.png")
        seen = infer(*photos, output / "photographs.png")
    except RuntimeError as error:
        logger.error("error: %s", error)
        return 1
    read = {name: label for name, (label, _) in found.items()}
    answers = dict(zip(held_out.file_names(), map(str, held_out.labels.tolist()), strict=True))
    wrong = [f"{name} as {read.get(name)}" for name in answers if read.get(name) != answers[name]]

    logger.info("drawing feature maps of %s", ARCHITECTURE)
    weights = "RANDOM weights, whose blocks add next to nothing yet"
    if args.checkpoint:
        weights = f"weights of {args.checkpoint.name}"
    plot_feature_maps(larger_model, weights, output / "feature_maps.png")

    total_seconds = time.perf_counter() - start
    sys.stdout.write(summary(history, wrong, count, seen, total_seconds, output))
    error = complaint(round(history.accuracies[-1] * count), count - len(wrong), count)
    if error:
        logger.error("error: %s", error)
    return 1 if error else 0


def complaint(trained: int, from_files: int, count: int) -> str:
    """Return what is wrong with the result; "" where nothing is.

    Args:
        trained: held-out scans read correctly when the training ended.
        from_files: the same, by tools/infer.py from the saved weights and the files.
        count: number of held-out scans.
    """
    if abs(trained - from_files) > 1:  # one scan may fall on the edge between two classes
        return (
            f"the training ended with {trained} of {count} held-out scans read correctly, but "
            f"tools/infer.py reads {from_files} of them: it prepares images otherwise, or the "
            "saved weights are not the trained ones"
        )
    if from_files < REQUIRED_ACCURACY * count:
        return (
            f"accuracy {from_files / count:.1%} on the held-out scans is under the "
            f"{REQUIRED_ACCURACY:.0%} required: train for longer (--epochs)"
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
