"""Committed result files, for the scripts that turn them into documentation."""

import csv
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVALUATION = "docs/evaluation/results.csv"


def read_rows(path: str) -> list[dict[str, str]]:
    """Rows of a committed CSV."""
    with (ROOT / path).open() as file:
        return list(csv.DictReader(file))


def measured_rows(path: str) -> list[dict[str, str]]:
    """Rows of a CSV, none if it has not been measured yet."""
    return read_rows(path) if (ROOT / path).exists() else []


def perplexities() -> list[dict[str, str]]:
    """Perplexity rows of the report's first run: one model, one text, one protocol."""
    rows = [row for row in read_rows(EVALUATION) if row["metric"] == "ppl"]
    same = ("model", "task", "samples", "dense_value")
    return [row for row in rows if all(row[key] == rows[0][key] for key in same)]


def geometric_mean(values: list[float]) -> float | None:
    return math.prod(values) ** (1 / len(values)) if values else None


def with_error(row: dict[str, str]) -> str:
    """A perplexity row's value ± standard error."""
    return f"{float(row['value']):.2f} ± {float(row['stderr']):.2f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"
