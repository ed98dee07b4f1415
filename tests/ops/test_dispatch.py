"""Which backend serves a call: by name, by the environment, and by itself."""

import subprocess
import sys
import warnings
from types import ModuleType

import pytest
import torch

from vim import ops
from vim.ops import BACKENDS, SlowBackendWarning, _dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_dispatch(monkeypatch):
    """Let each test choose anew, and the next one not inherit its choices."""
    monkeypatch.delenv("VIM_BACKEND", raising=False)
    for function in (_dispatch._resolve, _dispatch._fused):
        function.cache_clear()
    yield
    for function in (_dispatch._resolve, _dispatch._fused):
        function.cache_clear()


@pytest.fixture
def make_backend(monkeypatch):
    """Return a function that adds a backend for add_norm, which marks its results with 7."""

    def make(name, serves=lambda device, dtype: None):
        def forward(x, residual, weight, bias, eps, kind, residual_dtype):
            shape = x.shape
            return x.new_full(shape, 7), x.new_zeros(shape), x.new_zeros(shape[:-1])

        module = ModuleType(f"vim.ops.{name}.add_norm")
        module.forward, module.unavailable = forward, serves
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(_dispatch, "BACKENDS", (*_dispatch.BACKENDS, name))
        return name

    return make


def call(backend="auto", dtype=torch.float32, device="cpu"):
    x = torch.ones(2, 3, dtype=dtype, device=device)
    normed, _ = ops.add_norm(x, None, torch.ones(3, device=device), eps=0.0, backend=backend)
    return normed


def served_by_made_up(result):
    return bool((result == 7).all())


def test_names():
    assert BACKENDS[0] == "auto"
    assert BACKENDS[-1] == "reference"
    assert set(_dispatch.AUTO_ORDER) <= set(BACKENDS) - {"auto", "reference"}


def test_public_names_exist():
    assert all(hasattr(ops, name) for name in ops.__all__)


class TestByName:
    def test_the_named_backend_serves(self, make_backend):
        assert served_by_made_up(call(make_backend("made_up")))
        assert not served_by_made_up(call("reference"))

    def test_one_that_cannot_serve_says_why(self, make_backend):
        name = make_backend("made_up", lambda device, dtype: f"it wants more than {dtype}; buy it")
        message = (
            "backend 'made_up' cannot serve add_norm on cpu: "
            "it wants more than torch.float32; buy it"
        )
        with pytest.raises(RuntimeError, match=message):
            call(name)

    @pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "add_norm"])
    @pytest.mark.parametrize("name", ["cuda", "triton", "cpu"])
    def test_one_that_cannot_be_imported_says_why(self, monkeypatch, name, op):
        monkeypatch.setitem(sys.modules, f"vim.ops.{name}.{op}", None)
        message = f"backend '{name}' cannot serve {op} on cpu: .*vim.ops.{name}.{op}"
        with pytest.raises(RuntimeError, match=message):
            _dispatch.resolve_backend(op, name, CPU, torch.float32, None)

    @pytest.mark.parametrize("name", ["", "Reference", "numpy"])
    def test_unknown(self, name):
        message = f"backend must be one of auto, cuda, triton, cpu, reference, got '{name}'"
        with pytest.raises(ValueError, match=message):
            call(name)


class TestByEnvironment:
    def test_it_stands_in_for_auto_only(self, monkeypatch, make_backend):
        make_backend("made_up")
        monkeypatch.setenv("VIM_BACKEND", "made_up")
        assert served_by_made_up(call())
        assert served_by_made_up(call("auto"))
        assert not served_by_made_up(call("reference"))

    def test_it_overrides_what_auto_would_choose(self, monkeypatch, make_backend):
        monkeypatch.setattr(_dispatch, "AUTO_ORDER", (make_backend("made_up"),))
        assert served_by_made_up(call())
        monkeypatch.setenv("VIM_BACKEND", "reference")
        assert not served_by_made_up(call())
        monkeypatch.setenv("VIM_BACKEND", "auto")
        assert served_by_made_up(call())

    def test_an_unknown_name_is_refused(self, monkeypatch):
        monkeypatch.setenv("VIM_BACKEND", "fastest")
        with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fastest'"):
            call()

    def test_one_that_cannot_serve_is_refused(self, monkeypatch, make_backend):
        make_backend("made_up", lambda device, dtype: "it is asleep")
        monkeypatch.setenv("VIM_BACKEND", "made_up")
        with pytest.raises(RuntimeError, match=r"'made_up' cannot serve add_norm .* it is asleep"):
            call()


class TestByItself:
    def test_auto_takes_the_first_that_can_serve(self, monkeypatch, make_backend):
        def float16_only(device, dtype):
            return None if dtype == torch.float16 else "it serves float16 only"

        order = (make_backend("picky", lambda device, dtype: "no"), make_backend("made_up"))
        monkeypatch.setattr(_dispatch, "AUTO_ORDER", order)
        assert served_by_made_up(call())
        _dispatch._resolve.cache_clear()
        monkeypatch.setattr(_dispatch, "AUTO_ORDER", (make_backend("half", float16_only),))
        assert served_by_made_up(call(dtype=torch.float16))
        with pytest.warns(SlowBackendWarning, match="half: it serves float16 only"):
            assert not served_by_made_up(call(dtype=torch.float32))

    @pytest.fixture
    def asleep(self, monkeypatch, make_backend):
        """Make auto's only compiled backend one that cannot serve."""
        name = make_backend("asleep", lambda device, dtype: "it is asleep; wake it")
        monkeypatch.setattr(_dispatch, "AUTO_ORDER", (name,))

    def count_warnings(self, *calls):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for options in calls:
                call(**options)
        return len([w for w in caught if issubclass(w.category, SlowBackendWarning)])

    @pytest.mark.usefixtures("asleep")
    def test_the_warning_says_why_and_what_to_do(self):
        message = (
            r"^add_norm on cpu \(torch.float32\) runs on the slow PyTorch reference.*"
            r"asleep: it is asleep; wake it. Set VIM_BACKEND=reference to accept this silently"
        )
        with pytest.warns(SlowBackendWarning, match=message):
            call()

    @pytest.mark.usefixtures("asleep")
    def test_the_warning_comes_once_for_each_op_device_and_dtype(self):
        assert self.count_warnings({}, {}, {"backend": "auto"}) == 1
        low = {"dtype": torch.bfloat16}
        assert self.count_warnings({}, low, low) == 1

    @pytest.mark.usefixtures("asleep")
    def test_another_op_warns_on_its_own(self):
        assert self.count_warnings({}) == 1
        with pytest.warns(SlowBackendWarning, match="^causal_conv1d on cpu"):
            ops.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 2))

    @pytest.mark.usefixtures("asleep")
    def test_no_warning_for_the_reference_by_name(self, monkeypatch):
        assert self.count_warnings({"backend": "reference"}) == 0
        monkeypatch.setenv("VIM_BACKEND", "reference")
        assert self.count_warnings({}) == 0

    @pytest.mark.usefixtures("asleep")
    def test_no_warning_where_speed_is_not_asked_for(self):
        assert self.count_warnings({"dtype": torch.float64}, {"device": "meta"}) == 0
        assert self.count_warnings({}) == 1

    def test_no_warning_without_compiled_backends(self, monkeypatch):
        monkeypatch.setattr(_dispatch, "AUTO_ORDER", ())
        assert self.count_warnings({}) == 0

    def test_a_choice_is_made_once(self, monkeypatch, make_backend):
        asked = []
        name = make_backend("made_up", lambda device, dtype: asked.append(dtype))
        monkeypatch.setattr(_dispatch, "AUTO_ORDER", (name,))
        for _ in range(3):
            call()
        assert asked == [torch.float32]


class TestOfComposition:
    """Ops that are kernels in Triton or, where it cannot serve, a composition."""

    def resolve(self, requested="auto", device="cuda", dtype=torch.bfloat16):
        return _dispatch.resolve_fused("ssd", requested, torch.device(device), dtype)

    @pytest.fixture
    def kernels(self, monkeypatch):
        """Make ssd have kernels that serve no dtype but bfloat16, and no device but a GPU."""

        def unavailable(device, dtype):
            served = device.type == "cuda" and dtype == torch.bfloat16
            return None if served else "it is asleep; wake it"

        module = ModuleType("vim.ops.triton.ssd")
        module.unavailable = unavailable
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    def test_auto_takes_kernels_that_can_serve(self, kernels):
        assert self.resolve() is self.resolve("triton") is kernels
        assert self.resolve("reference") is None

    @pytest.mark.usefixtures("kernels")
    def test_auto_warns_once_where_they_could_but_cannot(self):
        message = r"^ssd on cuda \(torch.float16\) runs .* slowly: it is asleep; wake it. Set VIM_"
        with pytest.warns(SlowBackendWarning, match=message):
            assert self.resolve(dtype=torch.float16) is None
        assert self.resolve(dtype=torch.float16) is None  # a second warning would be an error
        with pytest.raises(RuntimeError, match="'triton' cannot serve ssd on cuda: it is asleep"):
            self.resolve("triton", dtype=torch.float16)

    @pytest.mark.usefixtures("kernels")
    @pytest.mark.parametrize("other", [{"device": "cpu"}, {"dtype": torch.float64}])
    def test_the_composition_is_fair_elsewhere(self, other):
        assert self.resolve(**other) is None

    @pytest.mark.parametrize("backend", ["cuda", "cpu", "reference"])
    @pytest.mark.usefixtures("kernels")
    def test_the_environment_names_a_backend_without_them(self, backend, monkeypatch):
        monkeypatch.setenv("VIM_BACKEND", backend)
        assert self.resolve() is None


@pytest.mark.slow
def test_importing_the_ops_needs_no_compiled_backend():
    script = (
        "import sys\n"
        "sys.modules['triton'] = sys.modules['cuda'] = None\n"
        "import vim.ops\n"
        "prefixes = ('vim.ops.cuda.', 'vim.ops.triton.', 'vim.ops.cpu.')\n"
        "sys.exit(', '.join(m for m in sys.modules if m.startswith(prefixes)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu"])
def test_a_change_of_the_environment_before_the_backward_does_no_harm(name):
    module, reason = _dispatch.probe("selective_scan", name, CPU, torch.float32)
    if module is None:
        pytest.skip(f"backend {name!r} cannot serve: {reason}")
    script = f"""
import os, sys, torch
from vim.ops import selective_scan
u, dt, B = (torch.randn(2, 70, x) for x in (12, 12, 4))
u.requires_grad_()
os.environ["VIM_BACKEND"] = "reference"
y = selective_scan(u, dt, -torch.rand(12, 4), B, B)
(expected,) = torch.autograd.grad(y.sum(), u, retain_graph=True)
os.environ["VIM_BACKEND"] = "{name}"
try:
    (actual,) = torch.autograd.grad(y.sum(), u)
except RuntimeError:
    sys.exit(0)  # to refuse is as good as to be right
torch.testing.assert_close(actual, expected)
"""
    # A process of its own, since a kernel that reads states nobody saved may end it.
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
