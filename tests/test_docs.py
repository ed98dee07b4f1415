"""Every snippet and command of README.md and docs/ runs, or says why not."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image

from vim.models import save_checkpoint, to_official

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.S
)
RUN_BY_CI = {"make demo", "make test", "make lint", "pip install vim-mamba"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language):
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("code"))
                yield Block(page, line + 1, language, match["code"], match["reason"])


def run(command, cwd):
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("block", [b for b in blocks("python") if not b.reason], ids=str)
def test_snippet(block, tmp_path):
    """What a `print` is said to print in a comment is what it prints."""
    printed = run([sys.executable, "-W", "ignore", "-c", block.code], tmp_path)
    for comment in re.findall(r"print\(.*\)  # (.*)", block.code):
        expected = comment.split(": ")[-1]
        assert expected in printed


def test_snippets_are_found():
    assert len([b for b in blocks("python") if not b.reason]) >= 3


COMMANDS = [
    (block, line)
    for block in blocks("bash")
    if not block.reason
    for line in block.code.replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


@pytest.fixture
def workplace(tmp_path):
    """A folder with what the commands expect: the tools, photographs, an official checkpoint."""
    for folder in ("tools", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        noise = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    model = timm.create_model("vim_tiny_patch16_224", depth=1)
    save_checkpoint(to_official(model.state_dict()), tmp_path / "vim_t_midclstok_76p1acc.pth")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page, workplace):
    """In the order of the page: a command may need what the one before it has written."""
    for block, line in COMMANDS:
        if block.page != page:
            continue
        if line in RUN_BY_CI:
            assert line.startswith("pip") or line in (ROOT / ".ci" / "run").read_text()
            continue
        program, *arguments = shlex.split(line)
        assert program == "python", f"{block}: no test knows how to run {line!r}"
        run([sys.executable, *arguments], workplace)
