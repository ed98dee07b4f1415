"""Compare finished runs of classifiers: accuracy against seconds and against parameters.

    python tools/compare_runs.py runs/vim runs/lstm-0 runs/lstm-1 --output runs/comparison

Runs that differ by seed alone stand together. Writes comparison.md and comparison.png to a folder;
the table goes to stdout. Exit code: 0 if all went well, 2 for arguments that cannot be met.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vim.engine.comparison import group_runs, read_run, to_markdown
from vim.engine.inference import atomic_write
from vim.engine.plots import comparison_figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="their work folders")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder")
    arguments = parser.parse_args(argv)
    try:
        groups = group_runs([read_run(folder) for folder in arguments.runs])
    except ValueError as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = to_markdown(groups)
    with atomic_write(arguments.output / "comparison.md") as path:
        path.write_text(table)
    with atomic_write(arguments.output / "comparison.png") as path:
        comparison_figure(groups).savefig(path, format="png", dpi=120)
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
