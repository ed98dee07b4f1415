"""Train one small Vim along several paths and compare the curves of the loss.

python benchmarks/training_paths.py [--data imagenette128_train.tar] [--json FILE]

The paths share seed, data order and hyperparameters: eager and compiled execution of the fastest
backend in float32 and under autocast, Triton, and the reference. In float32 only the order of sums
differs between them; chaos multiplies that up in time, so what is compared with the first path is
the mean loss over windows of 25 steps. Without `--data` the images are scikit-learn's digits.
"""

import argparse
import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from _timing import report
from PIL import Image

import vim  # noqa: F401, registers the models

STEPS, BATCH, WINDOW = 200, 64, 25
PATHS = {  # name: (backend, compiled, dtype of autocast)
    "eager float32": ("auto", False, None),
    "compiled float32": ("auto", True, None),
    "triton float32": ("triton", False, None),
    "eager bfloat16": ("auto", False, torch.bfloat16),
    "compiled bfloat16": ("auto", True, torch.bfloat16),
    "eager float16": ("auto", False, torch.float16),
    "reference float32": ("reference", False, None),
}


def images_of(tar: Path | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return uint8 images (N, 3, S, S), labels (N,), and the number of classes."""
    if tar is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images / 16 * 255).to(torch.uint8)
        images = images.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return images[:, None].expand(-1, 3, -1, -1), torch.from_numpy(digits.target), 10
    pixels, names = [], []
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and len(pixels) < STEPS * BATCH:
                data = archive.extractfile(member).read()
                pixels.append(
                    np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64)))
                )
                names.append(Path(member.name).parent.name)
    classes = sorted(set(names))
    labels = torch.tensor([classes.index(name) for name in names])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels, len(classes)


def curve(path: str, images, labels, classes: int, device) -> list[float]:
    """Return the loss of every step."""
    backend, compiled, dtype = PATHS[path]
    os.environ["VIM_BACKEND"] = backend
    torch.manual_seed(0)
    model = timm.create_model(
        "vim_tiny_patch16_224",
        img_size=images.shape[-1],
        patch_size=8,
        depth=4,
        num_classes=classes,
    ).to(device)
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=order)
        x = images[chosen].to(device).float() / 127.5 - 1
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(run(x).float(), labels[chosen].to(device))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    torch.compiler.reset()
    return [float(loss) for loss in losses]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a tar of CLASS/IMAGE")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    data = images_of(arguments.data)
    rows, first = [], None
    for path in arguments.paths:
        losses = torch.tensor(curve(path, *data, torch.device(arguments.device)))
        windows = losses.view(-1, WINDOW).mean(1)
        first = losses if first is None else first
        means = first.view(-1, WINDOW).mean(1)
        rows.append(
            {
                "path": path,
                "first loss": float(losses[0]),
                "last window": float(windows[-1]),
                "first 10 steps apart": float(((losses - first)[:10] / first[:10]).abs().max()),
                "windows apart": float(((windows - means) / means).abs().max()),
                "losses": [round(float(loss), 5) for loss in losses],
            }
        )
        sys.stderr.write(f"{path}: last window {float(windows[-1]):.4f}\n")
    report(rows, arguments.json)
    for row in rows:
        del row["losses"]  # too long for a table
    sys.stdout.write(report(rows) + "\n")


if __name__ == "__main__":
    main()
