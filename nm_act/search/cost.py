"""What a pattern gains: speed-up of a linear layer in prefill, from measured tables, and of a model's linear layers."""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..criteria import WEIGHT_PRUNING
from ..linear import NMLinear
from ..recipe import DENSE, LinearSpec
from ..sparsify import decoder_linears

__all__ = ["Rates", "macs_by_pattern", "predicted_speedup"]

SHAPE = {"tokens": "4096", "out_features": "4096", "in_features": "4096"}
"""The row of a benchmark table that stands for a pattern."""

_WINDOWS = re.compile(r"2:4\+(\d)")


@dataclass(frozen=True)
class Rates:
    """Speed-up of one linear layer over dense bfloat16, by pattern.

    Attributes
    ----------
    table : dict of str to (float, str)
        Pattern -> speed-up and where it is from.
    """

    table: dict[str, tuple[float, str]]

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Rates":
        """Rates of the packaged table, with those of `path` in their place where it has some.

        `path` is a CSV with the columns ``pattern,speedup,source``, or one that ``benchmarks/bench_sparse_linear.py``
        wrote; of the latter the whole-operator rows in bfloat16 at 4096 tokens, 4096 in and out features are read.

        Raises
        ------
        OSError
            If there is no such file.
        ValueError
            If it has other columns, no row that counts, or a speed-up that is no positive number.
        """
        table = _read(Path(__file__).with_name("rates.csv"))
        return cls(table if path is None else table | _read(Path(path)))

    def speedup(self, pattern: str) -> tuple[float, str]:
        """Speed-up of a pattern, and its source.

        A pattern of 2:4 windows, "2:4+e", that has no row costs ``1 + e/4`` times the 2:4 product, whose inner
        dimension it lengthens by that factor. Any other pattern without a row runs the dense product: 1.
        """
        if pattern in self.table:
            return self.table[pattern]
        windows = _WINDOWS.fullmatch(pattern)
        if windows and "2:4" in self.table:
            factor = 1 + int(windows[1]) / 4
            return self.table["2:4"][0] / factor, f"cost model: the 2:4 row / {factor:g}"
        return 1.0, "dense product"


def _read(path: Path) -> dict[str, tuple[float, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no table of rates at {str(path)!r}: there is no such file; check --rates")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    if {"bench", "stage", "variant", "dtype", "baseline", *SHAPE} <= columns:
        wanted = {"stage": "op", "dtype": "bf16", "baseline": "cublas_bf16", **SHAPE}
        rows = [
            {**row, "source": f"{row['device']}, torch {row['torch']}, {row['date']}: {row['variant']}"}
            for row in rows
            if all(row[key] == value for key, value in wanted.items())
        ]
    elif not {"pattern", "speedup", "source"} <= columns:
        raise ValueError(
            f"expected a CSV with the columns pattern, speedup, source in {str(path)!r}; see docs/search.md"
        )
    table: dict[str, tuple[float, str]] = {}
    for row in rows:
        try:
            value = float(row["speedup"])
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(
                f"expected a positive speed-up for {row['pattern']} in {str(path)!r}, got {row['speedup']!r}"
            )
        if value > table.get(row["pattern"], (0.0, ""))[0]:  # the best of several kernels
            table[row["pattern"]] = value, row["source"]
    return table


def layer_macs(linear: nn.Linear) -> int:
    """Multiply-accumulates of a layer for one token."""
    return linear.in_features * linear.out_features


def pattern_of(spec: LinearSpec | None) -> str:
    """Pattern that a spec's prefill runs with; "dense" where the activations are not pruned then."""
    if spec is None or spec.phase == "decode" or not prunes_activations(spec):
        return DENSE
    return str(spec.pattern)


def prunes_activations(spec: LinearSpec) -> bool:
    """False for the baselines that prune weights: their speed-up is that of another operator."""
    return spec.criterion not in WEIGHT_PRUNING


def macs_by_pattern(model: nn.Module) -> dict[str, int]:
    """Multiply-accumulates a token of the decoder's linear layers, by the pattern that prefill runs them with."""
    macs: Counter[str] = Counter()
    for _, _, linear in decoder_linears(model).values():
        macs[pattern_of(linear.spec) if isinstance(linear, NMLinear) else DENSE] += layer_macs(linear)
    return dict(macs)


def predicted_speedup(macs: dict[str, int], rates: Rates) -> float:
    """Predicted prefill speed-up of the linear layers, ``sum(m) / sum(m / rate)`` over multiply-accumulates m.

    Examples
    --------
    >>> predicted_speedup({"dense": 1, "2:4": 3}, Rates({"2:4": (1.5, "")}))
    1.3333333333333333
    """
    return sum(macs.values()) / sum(count / rates.speedup(pattern)[0] for pattern, count in macs.items())
