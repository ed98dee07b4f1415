"""Fixtures for the whole suite: seeds, poisoned memory, GPUs, and the backends that can serve."""

import contextlib
import importlib
import os
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from vim.ops import BACKENDS, _dispatch

# cuBLAS is deterministic with this set before its first call; without it, it warns.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        # mmengine's yapf writes a file to the user's cache when it is first imported: were it for
        # pytest-xdist's workers to do so, one might read what another has not finished.
        with contextlib.suppress(ImportError):
            importlib.import_module("yapf")
    for entry in (
        # Said by operations that stay nondeterministic under `poisoned_memory`, which wants NaN.
        "ignore:.* does not have a deterministic implementation:UserWarning",
        # A machine without a compiler or GPU runs the suite on the reference.
        "ignore:.* runs on the slow PyTorch reference:vim.ops.SlowBackendWarning",
    ):
        config.addinivalue_line("filterwarnings", entry)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch.cuda.is_available() is False")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Leave the cores to the workers of pytest-xdist: threads would wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Give every test the same random numbers, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill `torch.empty` with NaN, so that reading what was never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class Backend(NamedTuple):
    """A backend, and a device that it is tested on."""

    name: str
    device: torch.device

    def unavailable(self, op: str, dtype: torch.dtype) -> str | None:
        """Return why this backend cannot serve `op` for `dtype`; None where it can."""
        if self.name == "reference":
            return None
        _, reason = _dispatch.probe(op, self.name, self.device, dtype)
        return reason


def _backends():
    for name in BACKENDS:
        if name in ("cpu", "reference"):
            yield pytest.param(Backend(name, torch.device("cpu")), id=name)
        if name not in ("auto", "cpu"):
            device = torch.device("cuda", 0)
            identifier = name if name != "reference" else "reference_on_cuda"
            yield pytest.param(Backend(name, device), id=identifier, marks=pytest.mark.gpu)


@pytest.fixture(params=_backends())
def backend(request):
    """Every backend but "auto", one after another, skipped where it cannot serve.

    The test module names its op in a constant `OP`; a test's parameter `dtype` is the dtype asked
    of the backend, float32 where it has none.
    """
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    reason = request.param.unavailable(request.module.OP, dtype)
    if reason is not None:
        pytest.skip(f"backend {request.param.name!r} cannot serve: {reason}")
    return request.param
