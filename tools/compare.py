"""What got slower or faster between two files of benchmark results: compare.py OLD.csv NEW.csv [--threshold PERCENT].

Rows are matched by their key columns: all that are neither measured nor about the run. One that the old file lacks is
empty in its rows. The exit code is 1 if a row is slower by more than the threshold, 2 if the files cannot be compared.
"""

import argparse
import csv
import statistics
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

TIMES = ("us_p50", "p50", "us", "nm_linear_us", "step_ms")
"""The compared column: microseconds, milliseconds, or what the column "metric" says."""

MEASURED = {"us_p20", "us_p80", "us_min", "p20", "p80", "baseline_us_p50", "baseline_p50", "speedup", "gbps", "tflops"}
MEASURED |= {"linear_us", "overhead_us", "device_ms", "tok_s", "first_s", "graphs", "graph_breaks", "cudagraph_skips"}
NOT_KEYS = MEASURED | set(TIMES) | {"baseline", "rounds", "note", "source", "torch", "cuda", "commit", "date"}


@dataclass(frozen=True)
class Change:
    """A row of both files; ``slower`` is the time's growth in percent, negative where it got faster."""

    key: tuple[str, ...]
    old: float
    new: float
    slower: float


def read(path: str, columns: list[str] | None = None) -> tuple[dict[tuple[str, ...], float], list[str]]:
    """Value by key (repeated rows give their median) and the key's columns; ValueError if the file holds no results.

    Columns that are given replace the file's own, if they hold all of these.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    value = next((column for column in TIMES if rows and column in rows[0]), None)
    if value is None:
        raise ValueError(
            f"expected rows with {' or '.join(TIMES)} in {path!r}, got none; name a file of benchmark results"
        )
    own = [column for column in rows[0] if column not in NOT_KEYS]
    if columns is None or not set(own) <= set(columns):
        columns = own
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column, "") for column in columns), []).append(float(row[value]))
    return {key: statistics.median(values) for key, values in found.items()}, columns


def compare(old: str, new: str) -> tuple[list[Change], list[str], int]:
    """Changes of the rows in both files, slowest first; the key's columns; the number of rows in one file only."""
    after, other = read(new)
    before, columns = read(old, other)
    if columns != other:
        raise ValueError(
            f"expected equal key columns, got {columns} in {old!r} and {other} in {new!r}; compare one benchmark"
        )
    common = before.keys() & after.keys()
    if not common:
        raise ValueError(
            f"expected rows of the same cases in {old!r} and {new!r}, got none; compare results of one device"
        )
    metric = columns.index("metric") if "metric" in columns else None
    changes = []
    for key in common:
        rate = metric is not None and key[metric].endswith("_s")  # tokens per second: more is faster
        ratio = before[key] / after[key] if rate else after[key] / before[key]
        changes.append(Change(key, before[key], after[key], 100 * (ratio - 1)))
    changes.sort(key=lambda change: (-change.slower, change.key))
    return changes, columns, len(before.keys() ^ after.keys())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--threshold", type=float, default=3.0, help="percent that counts as a change (3)")
    options = parser.parse_args(arguments)
    try:
        changes, columns, alone = compare(options.old, options.new)
    except (OSError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    shown = [change for change in changes if abs(change.slower) > options.threshold]
    varying = [i for i in range(len(columns)) if len({change.key[i] for change in changes}) > 1]
    if shown:
        table = Table(*[columns[i] for i in varying], "old", "new", "slower by")
        for change in shown:
            style = "red" if change.slower > 0 else "green"
            cells = [change.key[i] for i in varying]
            table.add_row(*cells, f"{change.old:g}", f"{change.new:g}", f"{change.slower:+.1f} %", style=style)
        Console(markup=False).print(table)
    slower = sum(change.slower > 0 for change in shown)
    print(
        f"{len(changes)} rows compared, {slower} slower and {len(shown) - slower} faster by more than "
        f"{options.threshold:g} %; {alone} in one file only"
    )
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
