"""Cases, skipping, interleaving and the crossover of vim.engine.benchmark."""

import json
import subprocess
import sys

import pytest
import torch

from vim.engine import benchmark as engine
from vim.engine.benchmark import Case, Result, benchmark, crossover, to_json, to_markdown

CPU = torch.device("cpu")
SMALL = {"img_size": 32, "batch_size": 2, "dtype": "float32"}


def run(*cases, **options):
    return benchmark(cases, CPU, **({"repeats": 2, "seconds": 1e-4} | options))


@pytest.mark.parametrize("task", ["inference", "training"])
def test_what_is_measured(task):
    seen = []
    cases = [Case(name, task=task, **SMALL) for name in ("vim_tiny_patch16_224", "test_vit2")]
    first, second = run(*cases, on_result=seen.append)
    assert seen == [first, second]
    assert (first.case, second.case) == tuple(cases)
    for result in (first, second):
        assert result.skipped is None
        assert len(result.repeats) == 2
        assert min(result.repeats) <= result.images_per_second <= max(result.repeats)
        assert 0 < result.latency_ms["p50"] <= result.latency_ms["p90"] <= result.latency_ms["p99"]
        assert result.gflops > 0
        assert result.memory_gib is None
    assert first.parameters == 7_111_144


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast-bfloat16"])
def test_dtypes(dtype):
    (result,) = run(Case("test_vit2", 32, 1, dtype))
    assert result.skipped is None


def test_variants_of_a_model(monkeypatch):
    created = []
    create = engine.timm.create_model
    monkeypatch.setattr(
        engine.timm, "create_model", lambda *a, **k: created.append(k) or create(*a, **k)
    )
    model = "vim_tiny_patch16_224@keep-states"
    kept, vit = run(Case(model, 32, 1, "float32"), Case("test_vit2@keep-states", **SMALL))
    assert kept.skipped is None
    assert kept.case.model == model
    assert created[0] == {"img_size": 32, "keep_states": True}
    assert "keep_states" in vit.skipped  # timm's models have no such argument


def test_a_case_that_cannot_run_says_why_and_the_others_go_on():
    cases = [
        Case("test_vit2", execution="cuda-graph", **SMALL),
        Case("vim_tiny_patch16_224", 33, 1, "float32"),
        Case("test_vit2", **SMALL),
    ]
    graph, size, fine = run(*cases)
    assert "needs a CUDA device" in graph.skipped
    assert "32x32" in size.skipped
    assert fine.skipped is None
    table = to_markdown([graph, fine])
    assert "skipped: ValueError: cuda-graph needs a CUDA device" in table
    rows = json.loads(to_json([graph, fine], CPU))
    assert rows["machine"]["torch"] == torch.__version__
    assert [row["model"] for row in rows["results"]] == ["test_vit2", "test_vit2"]


def test_throughput_is_of_steps_back_to_back_and_latency_of_single_ones(monkeypatch):
    monkeypatch.setattr(engine, "_time_ms", lambda step, device, steps=1: 10.0 if steps == 1 else 4)
    (result,) = run(Case("test_vit2", **SMALL), seconds=0.05)
    assert result.latency_ms == {"p50": 10, "p90": 10, "p99": 10}
    assert result.repeats == [1e3 * SMALL["batch_size"] / 4] * 2


def test_models_of_a_case_take_turns(monkeypatch):
    order = []
    repeat = engine._Run.repeat
    monkeypatch.setattr(
        engine._Run, "repeat", lambda s, *a: (order.append(s.case.model), repeat(s, *a))
    )
    run(*[Case(name, **SMALL) for name in ("test_vit2", "test_vit3")], repeats=3)
    assert order == ["test_vit2", "test_vit3"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vim_tinny"}, "no model 'vim_tinny'"),
        ({"model": "test_vit2@fast"}, "flash, efficient, math, keep-states"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"task": "sleep"}, "task must be one of"),
        ({"execution": "fast"}, "execution must be one of"),
    ],
)
def test_bad_cases(changes, message):
    with pytest.raises(ValueError, match=message):
        Case(**{"model": "test_vit2", **SMALL} | changes)


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        ([10, 10, 10], [40, 10, 2.5], 200),
        ([10, 10], [20, 5], 2**0.5 * 100),
        ([10, 10], [5, 5], 100),
        ([10, 10], [20, 20], None),
        ([10, 5, 10], [5, 10, 5], 2**1.5 * 100),
    ],
)
def test_crossover(first, other, expected):
    sizes = [100, 200, 400][: len(first)]
    found = crossover(sizes, first, other)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_the_table_of_a_result():
    result = Result(
        Case("test_vit2", 224, 8),
        *(1234.5, 0.02, {"p50": 6.5, "p90": 7, "p99": 9}, 0.5, 2.5, 5_700_000),
    )
    row = to_markdown([result]).splitlines()[-1]
    assert row == (
        "| test_vit2 | 224 | 8 | bfloat16 | inference | eager | 1,234 | 2.0% | 6.50 | 9.00 | 0.50 "
        "| 2.50 | 5.7 |"
    )


MEMORY_TWICE = """
import torch
from vim.engine.benchmark import Case, benchmark
cases = [Case("vim_tiny_patch16_224", 64, 2, "bfloat16", "inference", "eager")]
print(*(benchmark(cases, torch.device("cuda"), 1, 0.01)[0].memory_gib for _ in range(2)))
"""


@pytest.mark.gpu
def test_the_first_case_is_not_charged_with_what_cublas_keeps():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_TWICE], capture_output=True, text=True, check=True
    )
    first, second = run.stdout.split()
    assert first == second
