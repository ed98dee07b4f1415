"""Triton's kernels of ssd compile for a GPU in each of their forms, without one."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vim.ops.triton import INTERPRETED, ssd

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

POINTERS = {
    "bf16": ("x", "dy", "dx", "y", "B", "C", "W", "saved", "before", "dafter"),
    "fp32": ("dt", "A", "D", "start", "end", "ddt", "dA", "dB", "dC", "dD"),
}
TYPES = {name: f"*{dtype}" for dtype, names in POINTERS.items() for name in names}
TILES = {"PRECISION": "ieee", "CHUNK": 64, "BLOCK_N": 64, "BLOCK_P": 64, "REVERSE": True}
FORMS = {
    "forward": ("ssd_fwd_kernel", {"HAS_START": False, "HAS_D": False, "WALK": True}),
    "forward-from-a-state": ("ssd_fwd_kernel", {"HAS_START": True, "HAS_D": True, "WALK": True}),
    "forward-of-chunks": ("ssd_fwd_kernel", {"HAS_START": True, "HAS_D": True, "WALK": False}),
    "states": ("ssd_states_kernel", {"HAS_START": True, "HAS_END": True, "ADJOINT": False}),
    "adjoint-states": (
        "ssd_states_kernel",
        {"HAS_START": False, "HAS_END": False, "ADJOINT": True},
    ),
    "backward": ("ssd_bwd_kernel", {"HAS_D": True}),
}
OPTIONAL = {"HAS_START": ("start",), "HAS_END": ("end",), "HAS_D": ("D", "dD")}


@pytest.mark.parametrize(("name", "flags"), FORMS.values(), ids=FORMS)
def test_compiles_for_hopper(name, flags):
    kernel = getattr(ssd, name)
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    constants = TILES | flags
    for flag, names in OPTIONAL.items():
        if flags.get(flag) is False:
            constants |= dict.fromkeys(names)
    contiguous = (a for a in kernel.arg_names if a.endswith(("_p", "_n")))
    constants = dict.fromkeys(contiguous, 1) | constants
    constants = {a: constants[a] for a in kernel.arg_names if a in constants}
    signature = {
        a: "constexpr" if a in constants else TYPES.get(a, "i32") for a in kernel.arg_names
    }
    places = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.metadata.shared <= 227 * 1024
