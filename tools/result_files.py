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


def perplexities(task: str = "wikitext2") -> list[dict[str, str]]:
    """Perplexity rows of one model, text and protocol in float32, on whatever device; of one name the first."""
    rows = [row for row in read_rows(EVALUATION) if row["metric"] == "ppl" and row["dtype"] == "float32"]
    rows = [row for row in rows if (row["task"], row["model"]) == (task, rows[0]["model"])]
    rows = [row for row in rows if row["samples"] == rows[0]["samples"]]
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row["name"], row)
    return list(found.values())


def geometric_mean(values: list[float]) -> float | None:
    return math.prod(values) ** (1 / len(values)) if values else None


def with_error(row: dict[str, str]) -> str:
    """A perplexity row's value ± standard error."""
    return f"{float(row['value']):.2f} ± {float(row['stderr']):.2f}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"
