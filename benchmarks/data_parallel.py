"""Time training steps on one GPU and on several with DistributedDataParallel.

torchrun --nproc-per-node 2 benchmarks/data_parallel.py [--json FILE]

Every process first trains alone, then all train together, each on a batch of its own, without and
with CUDA graphs of the model; bf16 autocast and a fused AdamW step, images at random.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _timing import report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vim  # noqa: F401, registers the models
from vim.engine.training_graph import BUCKET_CAP_MB, TrainingGraph

STEPS, REPEATS, WARM_UP = 10, 3, 6


class Graphed(nn.Module):
    """A model that goes through a graph of itself: (B, C, H, W) -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.run = TrainingGraph(model)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return DDP of a model as `VimRunner` makes it: on a side stream, for a graph's sake."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model = DistributedDataParallel(
            model,
            device_ids=[device.index],
            gradient_as_bucket_view=True,
            bucket_cap_mb=BUCKET_CAP_MB if isinstance(model, Graphed) else None,
        )
    torch.cuda.current_stream().wait_stream(side)
    return model


def step_ms(model, images, labels) -> float:
    """Return the median time of a step in ms, of some back to back, over a few repeats."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def steps(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    steps(WARM_UP)
    return statistics.median(steps(STEPS) for _ in range(REPEATS))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["vim_tiny_patch16_224", "vim_small_patch16_224"]
    )
    parser.add_argument("--batch-size", type=int, default=128, help="of each process")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    batch, world, rows = arguments.batch_size, dist.get_world_size(), []
    for name in arguments.models:
        for execution, wrap in (("eager", nn.Sequential), ("cuda-graph", Graphed)):

            def make(name=name, wrap=wrap):
                return wrap(timm.create_model(name).to(device).train())

            images = torch.randn(batch, 3, 224, 224, device=device)
            labels = torch.randint(1000, (batch,), device=device)
            alone = step_ms(make(), images, labels)
            dist.barrier()
            together = step_ms(parallel(make(), device), images, labels)
            slowest = torch.tensor([alone, together], device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            alone, together = slowest.tolist()
            rows.append(
                {
                    "model": name,
                    "execution": execution,
                    "GPUs": world,
                    "images/s alone": 1e3 * batch / alone,
                    "images/s together": 1e3 * batch * world / together,
                    "ratio": world * alone / together,
                }
            )
    if dist.get_rank() == 0:
        sys.stdout.write(report(rows, arguments.json) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
