"""The command line of all plots of benchmark rows."""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path


def plot_command(draw: Callable[[list[dict[str, str]], Path], None], description: str, benchmark: str) -> None:
    """Draw the rows of the CSV (first argument) as the image (second one); `benchmark` names the CSV's script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    arguments = parser.parse_args()
    with arguments.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"expected rows in {arguments.csv}, found none; run {benchmark} first")
    draw(rows, arguments.png)
