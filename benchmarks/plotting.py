"""The command line of all plots of benchmark rows."""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path


def plot_command(draw: Callable[[list[dict[str, str]], Path], None], description: str, benchmark: str) -> None:
    """Draw rows of CSVs (all arguments but the last) as an image (the last); `benchmark` names their script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("png", type=Path)
    arguments = parser.parse_args()
    rows = []
    for path in arguments.csv:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        if not found:
            raise SystemExit(f"expected rows in {path}, found none; run {benchmark} first")
        rows += found
    draw(rows, arguments.png)
