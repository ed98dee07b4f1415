"""Imports go one way: ops < layers < models < heads < engine < tools."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("ops", "layers", "models", "heads", "engine", "tools")
ONLY_IN = {
    "mmengine": ("engine", "tools"),
    "torchvision": ("heads",),
    "segmentation_models_pytorch": ("heads",),
}
OPTIONAL = {*ONLY_IN, "cv2", "pycocotools"}

SOURCES = sorted([*(ROOT / "vim").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
OWN_CODE = sorted([*SOURCES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
PACKAGES = sorted((ROOT / "vim").rglob("__init__.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(module: str) -> str | None:
    """Return the layer that a dotted name is in, None where it is in none."""
    first, _, rest = module.partition(".")
    layer = rest.partition(".")[0] if first == "vim" else first
    return layer if layer in ORDER and (first == "vim" or layer == "tools") else None


def imported(source: str, package: str) -> list[str]:
    """Return the dotted names that `source`, a module of `package`, imports anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def wrong_imports(source: str, package: str) -> list[str]:
    layer = layer_of(package)
    wrong = []
    for name in imported(source, package):
        other, library = layer_of(name), name.partition(".")[0]
        if layer and other and ORDER.index(other) > ORDER.index(layer):
            wrong.append(name)
        # The root package imports the models.
        if layer in ("ops", "layers", "models") and name == "vim":
            wrong.append(name)
        if library in ONLY_IN and layer not in ONLY_IN[library]:
            wrong.append(name)
    return wrong


def edits_of_sys_path(source: str) -> list[int]:
    """Return the lines that touch `sys.path`, which nothing here has a reason to."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        or (isinstance(node, ast.ImportFrom) and node.module == "sys")
        or (isinstance(node, ast.Attribute) and node.attr == "addsitedir")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    assert wrong_imports(path.read_text(), package) == []


@pytest.mark.parametrize("path", OWN_CODE, ids=name_of)
def test_nothing_edits_sys_path(path):
    assert edits_of_sys_path(path.read_text()) == []


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_public_names_exist(path):
    name = ".".join(path.relative_to(ROOT).parts[:-1])
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    public = getattr(package, "__all__", [])
    assert [x for x in public if not hasattr(package, x)] == []
    assert len(set(public)) == len(public)
    # A package that imports names from its modules offers them: it says which.
    offers = any(isinstance(x, ast.ImportFrom) for x in ast.parse(path.read_text()).body)
    assert public or not offers, f"{name} must say what is public in __all__"


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("from ..models import VisionMamba", "vim.ops", ["vim.models.VisionMamba"]),
        ("from .. import heads", "vim.layers", ["vim.heads"]),
        ("from vim import engine", "vim.models", ["vim.engine"]),
        ("def f():\n    import vim.models.x as x", "vim.ops.triton", ["vim.models.x"]),
        ("import vim", "vim.layers", ["vim"]),
        ("import tools.train", "vim.engine", ["tools.train"]),
        ("from mmengine.runner import Runner", "vim.models", ["mmengine.runner.Runner"]),
        ("import mmengine", "vim", ["mmengine"]),
        ("from torchvision import transforms", "vim.engine", ["torchvision.transforms"]),
        ("import segmentation_models_pytorch as smp", "tools", ["segmentation_models_pytorch"]),
        ("from ..ops import add_norm\nfrom .norms import x\nimport torch", "vim.layers", []),
        ("from .models import VisionMamba", "vim", []),
        ("from mmengine import Config\nfrom vim.heads import x\nimport vim", "tools", []),
        ("import torchvision", "vim.heads", []),
    ],
)
def test_the_rule_can_fail(source, package, expected):
    assert wrong_imports(source, package) == expected


@pytest.mark.parametrize(
    "line",
    [
        "sys.path.insert(0, '.')",
        "sys.path += ['.']",
        "sys.path[:0] = ['.']",
        "from sys import path",
        "site.addsitedir('.')",
    ],
)
def test_an_edit_of_sys_path_is_seen(line):
    assert edits_of_sys_path(f"import sys\n{line}") == [2]
    assert edits_of_sys_path("import sys\nsys.exit('sys.path')") == []
