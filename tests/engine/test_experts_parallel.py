"""Mixtures of experts on two processes: what one process does with all images, they do together."""

import json
import os
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import vim  # noqa: F401, registers the models
from vim.layers import MixtureOfExperts, load_balance_loss

PROCESSES, IMAGES, STEPS = 2, 6, 3


def build() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 4}
    model = timm.create_model("moe_mamba_tiny_patch16_224", **options).double()
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.capacity_factor = 0.9  # so that some choices are dropped
    return model


def train(model: nn.Module, run: nn.Module, rank: int, processes: int) -> dict:
    """Return losses, counters and final weights of some steps on this process's images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(1)
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    found: dict = {"loss": [], "load": [], "dropped": []}
    for _ in range(STEPS):
        images = torch.randn(IMAGES, 3, 32, 32, dtype=torch.float64, generator=generator)
        labels = torch.randint(4, (IMAGES,), generator=generator)
        logits = run(images.chunk(processes)[rank])
        loss = F.cross_entropy(logits, labels.chunk(processes)[rank])
        loss = loss + 0.1 * load_balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found["loss"].append(loss.item())
        found["load"].append([m.load.tolist() for m in layers])
        found["dropped"].append([int(m.dropped) for m in layers])
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return found | {"weights": torch.cat([w.detach().flatten() for w in weights]).tolist()}


def work(rank: int, port: int, folder: str) -> None:
    """Train one model by DDP and one by FSDP, as `VimRunner` wraps them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    model = build()
    found = {"ddp": train(model, DistributedDataParallel(model), rank, PROCESSES)}
    model = build()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    experts = model.blocks[0].ffn.layer.fc1.weight
    shares = [experts.to_local().shape[0], experts.shape[0]]
    found["fsdp"] = train(model, model, rank, PROCESSES)
    found["shares"] = shares
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=PROCESSES)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(found, kind):
    model = build()
    alone = train(model, model, 0, 1)
    together = [process[kind] for process in found]
    losses = torch.tensor([process["loss"] for process in together])
    torch.testing.assert_close(losses.mean(0), torch.tensor(alone["loss"]))
    for name in ("load", "dropped"):
        counts = torch.tensor([process[name] for process in together])
        assert torch.equal(counts.sum(0), torch.tensor(alone[name]))
    choices = IMAGES * 17
    total = torch.tensor(alone["load"]).sum(-1) + torch.tensor(alone["dropped"])
    assert (total == choices).all()
    assert torch.tensor(alone["dropped"]).sum() > 0
    for process in together:
        weights = torch.tensor(process["weights"], dtype=torch.float64)
        expected = torch.tensor(alone["weights"], dtype=torch.float64)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11)


def test_a_process_keeps_its_share_of_the_experts(found):
    assert [process["shares"] for process in found] == [[4, 8]] * PROCESSES
