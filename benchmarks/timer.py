"""The timer and the CSV writer of all benchmarks."""

import csv
import datetime
import io
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nm_act.files import write_atomic
from nm_act.version import commit

COLUMNS = (
    *("bench", "device", "variant", "dtype", "pattern", "stage", "tokens", "out_features", "in_features"),
    *("us_p20", "us_p50", "us_p80", "baseline", "baseline_us_p50", "speedup", "gbps", "tflops"),
    *("torch", "cuda", "commit", "date"),
)


def interleaved(functions: dict[str, Callable[[], object]], seconds: float, warmup: int = 2) -> dict[str, list[float]]:
    """Microseconds of each call; the functions take turns, so whatever slows the machine slows all of them."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    ordered = sorted(times)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """``|got - exact| / |exact|``, Frobenius norms in float64."""
    exact = exact.double()
    return ((got.double() - exact).norm() / exact.norm()).item()


class Rows:
    """Benchmark rows; the CSV is rewritten after each, so an interrupted run keeps what it measured."""

    def __init__(self, path: str | None, columns: tuple[str, ...] = COLUMNS, append: bool = False, **common: object):
        self.path, self.columns, self.rows = path, columns, []
        if append and path and Path(path).exists():
            with open(path, newline="") as file:
                self.rows.extend(csv.DictReader(file))
        self.common = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "",
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            **common,
        }

    def add(self, times: list[float], baseline_times: list[float], **row: object) -> dict[str, object]:
        p20, p50, p80 = percentiles(times)
        base = percentiles(baseline_times)[1]
        row |= {"us_p20": f"{p20:.1f}", "us_p50": f"{p50:.1f}", "us_p80": f"{p80:.1f}"}
        return self.append(**row, baseline_us_p50=f"{base:.1f}", speedup=f"{base / p50:.3f}")

    def append(self, **row: object) -> dict[str, object]:
        """Add a row whose columns are complete."""
        full = {**self.common, **row}
        self.rows.append(full)
        if self.path:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_atomic(self.path, text.getvalue())
        return full
