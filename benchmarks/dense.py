"""Time detectors and segmenters of large images on Vim, DeiT, and DeiT with ViTDet's windows.

python benchmarks/dense.py [--tasks NAME ...] [--backbones NAME ...] [--json FILE]

Detection is Mask R-CNN on the simple feature pyramid at 1024 px, 80 classes; segmentation is
UPerNet at 1024 x 2048, 19 classes, its decoder as wide as the backbone. DeiT's attention is Flash,
or fails; that of `deit-windows` is inside windows of 14 x 14 but for four blocks. Random weights
and images, bfloat16 autocast over float32 weights, medians of up to 30 calls:

- backbone_forward_ms: one CUDA graph of the backbone and its pyramid.
- forward_ms: the model; a segmenter is one graph, of a detector the backbone and its pyramid are.
- train_ms: forward, backward and AdamW as with model.cuda_graph=True.
- eager_forward_ms, eager_train_ms: without graphs.
- *_gib: peak of the allocator without graphs, weights included.

--tiny rehearses all of it but the graphs on the CPU: small images, the smaller batch. Exit code: 1
if a case failed; its row says why.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from _timing import report
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vim.engine.training_graph import TrainingGraph
from vim.heads.detector import Detector
from vim.heads.plain_maps import PlainMaps, PlainPyramid
from vim.heads.segmenter import Segmenter
from vim.models import VisionMambaMaps

TASKS = {"detection": (1, 4), "segmentation": (2, 4)}
"""Batches of each task; a segmenter's batch norm cannot train on one image."""
SIZES = {"detection": (1024, 1024), "segmentation": (1024, 2048)}
TINY_SIZES = {"detection": (128, 128), "segmentation": (64, 128)}
VARIANTS = {"tiny": (192, 3), "small": (384, 6)}
BACKBONES = [
    f"{kind}-{variant}" for variant in VARIANTS for kind in ("vim", "deit", "deit-windows")
]
DETECTION_CLASSES, SEGMENTATION_CLASSES = 80, 19
MAPPED = (2, 5, 8, 11)
"""Blocks of DeiT whose maps a segmenter takes, and those that windows leave global."""
OBJECTS = 8
WARM_UP, MOST, SECONDS = 3, 30, 0.6


@contextlib.contextmanager
def flash_attention(device: torch.device) -> Iterator[None]:
    """Let attention on a GPU be Flash, or fail, inside; on a CPU as it comes.

    timm's windows give (B H, N, P), for which only the slow kernel is made; they get a batch of 1.
    """
    attend = F.scaled_dot_product_attention

    def attend_to_windows(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        if q.dim() == 3:
            return attend(q[None], k[None], v[None], **options)[0]
        return attend(q, k, v, **options)

    only = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    with (
        mock.patch.object(F, "scaled_dot_product_attention", attend_to_windows),
        only if device.type == "cuda" else contextlib.nullcontext(),
    ):
        yield


def encoder(backbone: str, size: tuple[int, int], pyramid: bool) -> nn.Module:
    """Return a backbone with its last map, or with a pyramid from four blocks."""
    kind, _, variant = backbone.rpartition("-")
    dim, heads = VARIANTS[variant]
    if kind == "vim":
        name = f"vim_{variant}_patch16_224_pyramid"
        if pyramid:
            return timm.create_model(name, features_only=True, img_size=size)
        return VisionMambaMaps(timm.create_model(name, img_size=size), class_token=False)
    if kind == "deit":
        name = f"deit_{variant}_patch16_224"
        model = timm.create_model(name, img_size=size, dynamic_img_size=True)
    else:
        model = VisionTransformerSAM(
            img_size=size,
            patch_size=16,
            num_classes=0,
            embed_dim=dim,
            depth=12,
            num_heads=heads,
            use_abs_pos=True,
            use_rel_pos=False,
            window_size=14,
            global_attn_indexes=MAPPED,
            neck_chans=dim,
        )
    return PlainPyramid(PlainMaps(model, MAPPED)) if pyramid else PlainMaps(model, [-1])


def objects(batch: int, side: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Return targets of a detector: boxes at random, their masks full."""
    targets = []
    for _ in range(batch):
        corner = torch.rand(OBJECTS, 2) * side * 0.6
        boxes = torch.cat([corner, corner + torch.rand(OBJECTS, 2) * side * 0.35 + 16], dim=1)
        masks = torch.zeros(OBJECTS, side, side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        target = {"boxes": boxes, "labels": torch.arange(OBJECTS) + 1, "masks": masks}
        targets.append({key: value.to(device) for key, value in target.items()})
    return targets


class Detection:
    """A detector, the part of it that a graph can hold, and its loss."""

    options: ClassVar[dict] = {}

    def __init__(self, backbone: str, batch: int, device: torch.device, tiny: bool) -> None:
        size = (TINY_SIZES if tiny else SIZES)["detection"]
        few = {"proposals": 20} if tiny else {}
        maps = encoder(backbone, size, False)
        self.model = Detector(
            maps, DETECTION_CLASSES, short_side=size[0], long_side=size[1], **few
        ).to(device)
        self.backbone = self.graphed = self.model.pyramid
        self.images = torch.randn(batch, 3, *size, device=device)
        self.targets = objects(batch, size[0], device)

    def forward(self, graph: Callable | None) -> None:
        self.model(list(self.images), pyramid=graph)

    def loss(self, graph: Callable | None) -> Tensor:
        return sum(self.model(list(self.images), self.targets, pyramid=graph).values())


class Segmentation:
    """A segmenter, which a graph can hold, and its loss."""

    options: ClassVar[dict] = {"auxiliary": True}

    def __init__(self, backbone: str, batch: int, device: torch.device, tiny: bool) -> None:
        size = (TINY_SIZES if tiny else SIZES)["segmentation"]
        width, _ = VARIANTS[backbone.rpartition("-")[2]]
        maps = encoder(backbone, size, True)
        self.model = self.graphed = Segmenter(maps, SEGMENTATION_CLASSES, width).to(device)
        self.backbone = self.model.encoder
        self.images = torch.randn(batch, 3, *size, device=device)
        self.labels = torch.randint(SEGMENTATION_CLASSES, (batch, *size), device=device)

    def forward(self, graph: Callable | None) -> None:
        (graph or self.model)(self.images)

    def loss(self, graph: Callable | None) -> Tensor:
        both = graph(self.images) if graph else self.model(self.images, **self.options)
        logits, auxiliary = (F.cross_entropy(y.float(), self.labels) for y in both)
        return logits + 0.4 * auxiliary


def inference_graph(module: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    """Return a call of `module` as one CUDA graph, for images of this shape."""
    images = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Weights must be cast in the graph, not once before it.
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                module(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = module(images)

    def replay(new: Tensor) -> object:
        images.copy_(new)
        graph.replay()
        return output

    return replay


def free(device: torch.device) -> float:
    """Give back what nothing refers to; return the GiB that are left."""
    gc.collect()  # a graphed module and its graph refer to each other
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(WARM_UP):
        step()
    times, begin = [], time.monotonic()
    while len(times) < 5 or (len(times) < MOST and time.monotonic() - begin < SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def of_case(task: str, backbone: str, batch: int, device: torch.device, tiny: bool) -> dict:
    """Return times in ms and peaks in GiB of a backbone in a task."""
    before = free(device)
    case = {"detection": Detection, "segmentation": Segmentation}[task](
        backbone, batch, device, tiny
    )
    model = case.model
    # The step takes its time whatever the rate, and the weights stay those that are timed later.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    autocast = torch.autocast(device.type, torch.bfloat16)
    row = {"task": task, "backbone": backbone, "batch": batch}
    row["million_parameters"] = sum(p.numel() for p in model.parameters()) / 1e6

    def infer(call: Callable, *inputs: object) -> None:
        with torch.inference_mode(), autocast:
            call(*inputs)

    def train(graph: Callable | None) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = case.loss(graph)
        loss.backward()
        optimizer.step()

    # All peaks come before the first graph, whose memory would be in them.
    steps = {
        "backbone_forward": lambda: infer(case.backbone, case.images),
        "forward": lambda: infer(case.forward, None),
        "train": lambda: train(None),
    }
    for name, step in steps.items():
        model.train(name == "train")
        free(device)
        ms = milliseconds(step, device)
        if name != "backbone_forward":
            row[f"eager_{name}_ms"] = ms
        if device.type == "cuda":
            row[f"{name}_gib"] = torch.cuda.max_memory_allocated() / 2**30 - before
    optimizer.zero_grad(set_to_none=True)
    if device.type != "cuda":
        return row

    def replayed(module: nn.Module, run: Callable[[Callable], None]) -> float:
        free(device)
        graph = inference_graph(module, case.images)
        return milliseconds(lambda: run(graph), device)

    model.eval()
    row["backbone_forward_ms"] = replayed(case.backbone, lambda graph: graph(case.images))
    row["forward_ms"] = replayed(case.graphed, lambda graph: infer(case.forward, graph))
    free(device)
    model.train()
    graph = TrainingGraph(case.graphed, **case.options)
    row["train_ms"] = milliseconds(lambda: train(graph), device)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.tiny else "cuda")
    torch.manual_seed(0)
    cases = [
        (task, backbone, batch)
        for task in arguments.tasks
        for batch in (TASKS[task][:1] if arguments.tiny else TASKS[task])
        for backbone in arguments.backbones
    ]
    rows, table = [], ""
    for case in cases:
        sys.stderr.write(f"timing {' '.join(map(str, case))}\n")
        try:
            with flash_attention(device):
                rows.append(of_case(*case, device, arguments.tiny))
        except (RuntimeError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
            named = dict(zip(("task", "backbone", "batch"), case, strict=True))
            rows.append(named | {"failed": reason})
        table = report(rows, arguments.json)  # kept, whatever becomes of the rows to come
    sys.stdout.write(table + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
