"""Random numbers as a function of where training stands, so that resuming needs no saved state.

Every draw in training comes from generators seeded by (the run's seed, what it is for, where it
stands): a sample by epoch and position, a batch by rank and iteration. A run that was killed draws
the same numbers after resuming, with any number of workers.
"""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["Stream", "derived_seed", "seed_everything_at", "seed_generators", "seeded"]


class Stream(IntEnum):
    """What random numbers are for: keeps those of one place in training apart from each other."""

    ORDER = 0
    SAMPLE = 1
    REPLACEMENT = 2
    RESOLUTION = 3
    BATCH = 4
    WORKER = 5


def derived_seed(*numbers: int) -> int:
    """A seed in [0, 2^63), a BLAKE2b hash of the numbers, the same on every machine.

    Args:
        numbers: integers in [-2^63, 2^63); one more or fewer, 0 included, is another seed.
    """
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seed_generators(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and torch (CPU and all devices) from numbers."""
    seed = derived_seed(*numbers)
    _seed_python_and_numpy(seed)
    torch.manual_seed(seed)


def seed_everything_at(seed: int, rank: int, iteration: int) -> None:
    """Seed all generators for one iteration: mixup, erasing, dropout and drop path draw from them.

    Args:
        seed: of the run.
        rank: of this process, so that no two drop the same paths.
        iteration: counted from the start of the run, not of the epoch.
    """
    seed_generators(seed, Stream.BATCH, rank, iteration)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within, the generators of Python, NumPy and torch's CPU are seeded; then as they were before.

    The devices' generators are left alone: data workers must not touch them. In a data worker the
    generators serve nothing else and are left as they are, which saves a tenth of a millisecond.
    """
    alone = get_worker_info() is not None
    if not alone:
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derived_seed(*numbers)
    _seed_python_and_numpy(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if not alone:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)


def _seed_python_and_numpy(seed: int) -> None:
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
