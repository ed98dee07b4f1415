"""tools/benchmark.py, as a user calls it."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from vim.engine.benchmark import Case, Result

PATH = Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_tool", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARGUMENTS = ["--dtypes", "float32", "--device", "cpu", "--repeats", "1", "--seconds", "1e-4"]


def test_table_json_and_plots(tool, tmp_path, capsys):
    models = ["--models", "vim_tiny_patch16_224", "test_vit2"]
    sizes = ["--img-sizes", "32", "64", "--batch-sizes", "1"]
    code = tool.main([*models, *sizes, *ARGUMENTS, "--output", str(tmp_path / "out")])
    assert code == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "out" / "benchmark.md").read_text()
    assert table.count("| vim_tiny_patch16_224 |") == 2
    results = json.loads((tmp_path / "out" / "benchmark.json").read_text())["results"]
    assert [(r["model"], r["img_size"]) for r in results] == [
        (model, size) for model in models[1:] for size in (32, 64)
    ]
    with Image.open(tmp_path / "out" / "inference-float32-eager.png") as image:
        assert min(image.size) > 400


def test_nothing_measured(tool, tmp_path):
    arguments = ["--models", "test_vit2", "--executions", "cuda-graph", "--output", str(tmp_path)]
    assert tool.main([*arguments, *ARGUMENTS]) == 1


def test_what_takes_too_long_is_skipped(tool, tmp_path, capsys):
    models = ["--models", "rnn_tiny_patch16_224", "--img-sizes", "32", "--batch-sizes", "1"]
    folder = ["--output", str(tmp_path), "--patience", "0"]
    assert tool.main([*models, *folder, *ARGUMENTS]) == 1
    assert "longer than 0 s" in capsys.readouterr().out


def test_what_is_measured_outlives_an_interruption(tool, tmp_path, monkeypatch):
    def interrupted(cases, device, repeats, seconds, on_result, patience):
        on_result(Result(cases[1], skipped="out of memory"))
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "benchmark", interrupted)
    sizes = ["--models", "vim_tiny_patch16_224", "--img-sizes", "32", "64", "--output"]
    with pytest.raises(KeyboardInterrupt):
        tool.main([*sizes, str(tmp_path)])
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert result["img_size"] == 64
    assert "out of memory" in (tmp_path / "benchmark.md").read_text()


def test_bad_arguments(tool, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main(["--models", "vim_tinny", *ARGUMENTS])
    assert exit_.value.code == 2
    assert "no model 'vim_tinny'" in capsys.readouterr().err


def test_the_plot_marks_where_the_first_model_overtakes(tool):
    def result(model, size, speed):
        latency = {"p50": 1.0, "p90": 1.0, "p99": 1.0}
        return Result(Case(model, size, 1), speed, 0.0, latency, size / 1000, 1.0, 1)

    speeds = {"vim_tiny_patch16_224": (10, 10), "test_vit2": (20, 5)}
    points = {name: zip((100, 200), pair, strict=True) for name, pair in speeds.items()}
    results = [result(name, *point) for name in points for point in points[name]]
    figure = tool.plot(results)
    speed, memory = figure.axes  # of one batch size
    assert [text.get_text() for text in speed.texts] == [" 141 px"]
    assert len(memory.lines) == 2
