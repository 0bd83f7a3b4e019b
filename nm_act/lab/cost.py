"""What a pattern gains: speed-up of a linear layer in prefill, from measured tables, and of a model's linear layers."""

import csv
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..conversion.sparsify import decoder_linears
from ..layers.linear import FOLLOW_WEIGHT, NMLinear
from ..methods.criteria import WEIGHT_PRUNING
from ..methods.mitigations import data_of, rank_of, shape_of
from ..patterns import NMPattern, as_pattern
from ..recipe import DENSE, LinearSpec

__all__ = ["Rates", "added_macs", "extra_macs", "macs_by_pattern", "predicted_speedup"]

PREFILL_TOKENS = 4096
"""Tokens of the sequence whose prefill is predicted."""

SHAPE = {"tokens": str(PREFILL_TOKENS), "out_features": "4096", "in_features": "4096"}
"""The row of a benchmark table that stands for a pattern."""


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

        Which columns the windows of "2:4+r@..." hold makes no difference: the row of "2:4+r" counts. Without one it
        costs ``1 + r/4`` times the 2:4 product, whose inner dimension it lengthens by that factor. Any other pattern
        without a row runs the dense product: 1.
        """
        chosen = None if pattern == DENSE else as_pattern(pattern)
        windows = len(chosen.extra_columns) if isinstance(chosen, NMPattern) else 0
        rows = (pattern, f"{chosen.keep}:{chosen.group}+{windows}") if windows else (pattern,)
        row = next((row for row in rows if row in self.table), None)
        if row is not None:
            return self.table[row]
        if windows and "2:4" in self.table:
            factor = 1 + windows / 4
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
        except (TypeError, ValueError):  # text, or a row that ends early
            value = 0.0
        if not 0 < value < float("inf"):
            raise ValueError(
                f"expected a positive speed-up for {row['pattern']} in {str(path)!r}, got {row['speedup']!r}"
            )
        pattern = str(as_pattern(row["pattern"]))
        if value > table.get(pattern, (0.0, ""))[0]:  # the best of several kernels
            table[pattern] = value, row["source"]
    if not table:
        raise ValueError(
            f"expected rates in {str(path)!r}, got no row that counts (stage op, bf16 over cublas_bf16, "
            f"{' x '.join(SHAPE.values())}); see docs/search.md"
        )
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


def extra_macs(model: nn.Module) -> float:
    """Multiply-accumulates a token that sparse layers add to their own in prefill, at the dense speed.

    The GEMMs of a low-rank pair, R (in + out); of a rotation, in * in; and the first tokens of a sequence that are
    computed dense as well, of one sequence of `PREFILL_TOKENS`. What has no GEMM (scores, shifts, scales) is not
    counted.
    """
    return sum(_extra(linear) for _, _, linear in decoder_linears(model).values() if isinstance(linear, NMLinear))


def _extra(linear: NMLinear) -> float:
    if linear.spec.phase == "decode":
        return 0.0
    first = 0 if linear.token_context is None else min(linear.token_context.first_tokens, PREFILL_TOKENS)
    return (
        added_macs(linear.spec, linear.in_features, linear.out_features) + layer_macs(linear) * first / PREFILL_TOKENS
    )


def added_macs(spec: LinearSpec, in_features: int, out_features: int) -> int:
    """Multiply-accumulates a token of the GEMMs that a spec's mitigations add to a layer's own."""
    sizes = in_features, out_features, rank_of(spec.mitigation)
    return sum(math.prod(shape_of(name, *sizes)) for name in data_of(spec) if name in FOLLOW_WEIGHT)


def predicted_speedup(macs: dict[str, int], rates: Rates, extra: float = 0.0) -> float:
    """Predicted prefill speed-up of the linear layers, ``sum(m) / (sum(m / rate) + extra)``.

    Parameters
    ----------
    macs : dict of str to int
        Multiply-accumulates m by pattern, from `macs_by_pattern`.
    rates : Rates
    extra : float
        What mitigations add, from `extra_macs`; it runs at the dense speed.

    Examples
    --------
    >>> predicted_speedup({"dense": 1, "2:4": 3}, Rates({"2:4": (1.5, "")}))
    1.3333333333333333
    >>> predicted_speedup({"dense": 1, "2:4": 3}, Rates({"2:4": (1.5, "")}), extra=1)
    1.0
    """
    return sum(macs.values()) / (sum(count / rates.speedup(pattern)[0] for pattern, count in macs.items()) + extra)
