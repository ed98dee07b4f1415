"""`python -m vim.doctor` tells what can run and notices what computes wrongly."""

import subprocess
import sys

import pytest
import torch

from vim import doctor, ops
from vim.ops._dispatch import AUTO_ORDER, probe


def test_report():
    command = [sys.executable, "-m", "vim.doctor"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("torch", "kernel cache", "selective_scan", "bidirectional_mixer", *AUTO_ORDER):
        assert word in report
    assert "WRONG" not in report


@pytest.mark.parametrize("op", doctor._cases())
@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_backend_that_cannot_serve_says_why(op, backend):
    right, why = doctor.check(op, backend, torch.device("cpu"))
    module, reason = probe(op, backend, torch.device("cpu"), torch.float32)
    assert right is (None if module is None else True)
    assert module is not None or why == reason


def test_wrong_results_are_noticed(monkeypatch, capsys):
    module, _ = probe("add_norm", "cpu", torch.device("cpu"), torch.float32)
    if module is None:
        pytest.skip("needs the C++ kernels")
    right = module.forward

    def wrong(*args):
        normed, residual, rstd = right(*args)
        return normed * 1.01, residual, rstd

    monkeypatch.setattr(module, "forward", wrong)
    assert doctor.check("add_norm", "cpu", torch.device("cpu"))[0] is False
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_failure_is_told(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(ops, "add_norm", broken)
    if probe("add_norm", "cpu", torch.device("cpu"), torch.float32)[0] is None:
        pytest.skip("needs the C++ kernels")
    right, why = doctor.check("add_norm", "cpu", torch.device("cpu"))
    assert right is False
    assert "out of order" in why
