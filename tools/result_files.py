"""Committed result files, for the scripts that make documentation of them."""

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
    """Perplexity rows of the one run that the report holds."""
    rows = [row for row in read_rows(EVALUATION) if row["metric"] == "ppl"]
    if len({(row["model"], row["task"], row["samples"], row["dense_value"]) for row in rows}) != 1:
        raise ValueError(f"expected perplexities of one model and text in {EVALUATION}, got several")
    return rows


def geometric_mean(values: list[float]) -> float | None:
    return math.prod(values) ** (1 / len(values)) if values else None


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"
