"""Seeds are the same everywhere, differ wherever their numbers do, and reach all generators."""

import contextlib
import random

import numpy as np
import pytest
import torch

from vim.engine.seeding import (
    Stream,
    derived_seed,
    seed_everything_at,
    seed_generators,
    seeded,
)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((), 6510301506637419378),
        ((0,), 893442142816765029),
        ((1, 2, 3), 6520558355739401531),
        ((-1, 2**62), 4775384491428675070),
    ],
)
def test_seeds_never_change(numbers, expected):
    assert derived_seed(*numbers) == expected


def test_seeds_of_different_numbers_differ():
    few = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    shorter = [(a, b) for a in range(12) for b in range(12)]
    large = [(2**32 + a, 1) for a in range(12)]
    seeds = {derived_seed(*numbers) for numbers in few + shorter + large + [(0,), ()]}
    assert len(seeds) == len(few) + len(shorter) + len(large) + 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numpy_integers_seed_as_pythons_do():
    assert derived_seed(np.int64(5), Stream.SAMPLE) == derived_seed(5, 1)


def test_seed_generators_seeds_all_three():
    seed_generators(0, 1)
    first = draw()
    seed_generators(0, 1)
    assert draw() == first
    seed_generators(0, 2)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.gpu
def test_seed_generators_seeds_the_gpu():
    seed_generators(3)
    first = torch.rand(4, device="cuda")
    seed_generators(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_iterations_and_ranks_draw_apart():
    draws = set()
    for rank in range(3):
        for iteration in range(3):
            seed_everything_at(0, rank, iteration)
            draws.add(draw())
    assert len(draws) == 9


def test_seeded_leaves_the_generators_as_they_were():
    seed_generators(7)
    expected = [draw(), draw()]
    seed_generators(7)
    with seeded(1, 2):
        inside = draw()
    assert draw() == expected[0]
    with contextlib.suppress(KeyError), seeded(1, 2):
        assert draw() == inside
        raise KeyError
    assert draw() == expected[1]
