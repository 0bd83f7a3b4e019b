"""The measured tables of ``benchmarks/results/DEVICE``: times of products by shape, and of whole models."""

import csv
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..patterns import NMPattern, TopKPattern, as_pattern

DEFAULT_DEVICE = "h100"
"""The device of a prediction unless another is named."""

_FILES = ("sparse_linear.csv", "families.csv", "patterns.csv", "decode.csv")
_WHOLE_MODELS = "inference_turns.csv"
"""Tables of products; the first column of each is the benchmark's name."""


@dataclass(frozen=True)
class Product:
    """A measured product, or the nearest one scaled to the requested sizes."""

    us: float
    dense_us: float  # of the same sizes, cuBLAS in bfloat16
    note: str = ""  # what was not measured, and which row stands for it


@dataclass(frozen=True)
class _Row:
    out_features: int
    in_features: int
    tokens: int
    us: float
    dense_us: float
    table: int = 0  # of two equal sizes the first table's counts

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.out_features, self.in_features, self.tokens

    def distance(self, sizes: tuple[int, int, int]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(self.sizes, sizes, strict=True))

    def scaled(self, sizes: tuple[int, int, int]) -> tuple[float, float]:
        """The times scaled to other sizes, in proportion to the multiply-accumulates."""
        factor = math.prod(sizes) / math.prod(self.sizes)
        return self.us * factor, self.dense_us * factor


def _folder() -> Path:
    """Folder with the tables of all devices: inside an installed package, else in the checkout."""
    inside = Path(__file__).with_name("results")
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def devices() -> list[str]:
    """Names of the devices whose products were measured."""
    return sorted(path.parent.name for path in _folder().glob("*/sparse_linear.csv"))


def table_file(device: str, name: str) -> Path:
    """Path of one table."""
    return _folder() / device / name


class Tables:
    """The tables of one device; ValueError if there are none."""

    def __init__(self, device: str):
        if device not in devices():
            raise ValueError(
                f"expected a measured device among {', '.join(devices()) or 'none'}, got {device!r}; "
                "give a CSV of your own with --rates"
            )
        self._device = device
        self._products: dict[tuple[str, str, str], list[_Row]] = {}  # "phase stage", dtype, pattern
        self._found: dict[tuple[Any, ...], Product] = {}
        self._whole_models = list(self._read(_WHOLE_MODELS))
        for index, name in enumerate(_FILES):
            for row in self._read(name):
                self._add(index, row)

    def _read(self, name: str) -> Iterator[dict[str, str]]:
        path = table_file(self._device, name)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)

    def _add(self, table: int, row: dict[str, str]) -> None:
        phase = "decode" if _FILES[table] == "decode.csv" else "prefill"
        kind = f"{phase} {row['stage']}", row["dtype"], row["pattern"]
        if row["stage"] == "prune":  # of an operand [tokens, in], whatever is multiplied by it
            sizes = 1, int(row["in_features"]), int(row["tokens"])
            self._products.setdefault(kind, []).append(_Row(*sizes, float(row["us_p50"]), 1.0))
        elif row["baseline"] == "cublas_bf16" and row["variant"] != "prune+dense":
            sizes = int(row["out_features"]), int(row["in_features"]), int(row["tokens"])
            times = float(row["us_p50"]), float(row["baseline_us_p50"])
            self._products.setdefault(kind, []).append(_Row(*sizes, *times, table))

    def product(
        self, phase: str, pattern: str, sizes: tuple[int, int, int], dtype: str = "bf16", *, fused: bool = False
    ) -> Product:
        """A product ``[tokens, in] x [out, in]`` with a pruned operand.

        ``sizes`` are out_features, in_features and tokens. Sizes that were not measured take the nearest row's time per
        multiply-accumulate. In decode, a share of kept features that was not measured is interpolated between measured
        ones, of the same M if there are some, or scaled in proportion outside their range. In prefill every pattern
        except those with :meth:`has_sparse_gemm` is a dense product with a pruned operand. ``fused`` says that in
        prefill the operator in front produces the operand: packed for 2:4, else pruned at no cost.
        """
        chosen = as_pattern(pattern)
        if phase == "decode":
            return self._decode(chosen, sizes, dtype)
        name = _row_name(pattern)
        if self.has_sparse_gemm(pattern, dtype):
            stage = "prefill gemm" if fused and name == "2:4" else "prefill op"
            return self._nearest((stage, dtype, name), sizes)
        dense = self.dense(phase, sizes)
        if fused and "+" not in name:
            return dense
        pruned = name if ("prefill prune", "bf16", name) in self._products else "8:16"
        prune = self._nearest(("prefill prune", "bf16", pruned), (1, *sizes[1:]))
        note = "" if pruned == name else f"{name} in prefill was not measured: 8:16 stands for it"
        return Product(prune.us + dense.dense_us, dense.dense_us, note or dense.note)

    def has_sparse_gemm(self, pattern: str, dtype: str = "bf16") -> bool:
        """Whether prefill with this pattern was measured on the sparse tensor cores: 2:4, and 2:4+1 in 16 bits."""
        return ("prefill op", dtype, _row_name(pattern)) in self._products

    def dense(self, phase: str, sizes: tuple[int, int, int]) -> Product:
        """The dense product of these sizes in bfloat16, in `us` and `dense_us` alike."""
        found = self._nearest((f"{phase} op", "bf16", "2:4"), sizes)
        return Product(found.dense_us, found.dense_us, found.note)

    def _decode(self, chosen: NMPattern | TopKPattern, sizes: tuple[int, int, int], dtype: str) -> Product:
        kept, group = chosen.kept_fraction, getattr(chosen, "group", None)
        measured = [
            (as_pattern(pattern), pattern)
            for stage, own, pattern in self._products
            if (stage, own) == ("decode op", dtype)
        ]
        alike = [each for each in measured if getattr(each[0], "group", None) == group]
        shares: dict[float, str] = {}
        for pattern, name in alike or measured:
            shares.setdefault(pattern.kept_fraction, name)
        below = max((share for share in shares if share <= kept), default=min(shares))
        above = min((share for share in shares if share >= kept), default=max(shares))
        low, high = (self._nearest(("decode op", dtype, shares[share]), sizes) for share in (below, above))
        if below == above:
            scaled = f"{kept:.1%} kept in decode was not measured: time in proportion to {below:.0%}"
            return Product(low.us * kept / below, low.dense_us, low.note if kept == below else scaled)
        weight = (kept - below) / (above - below)
        note = f"{kept:.1%} kept in decode was not measured: between {below:.1%} and {above:.1%}"
        return Product(low.us * (1 - weight) + high.us * weight, low.dense_us, note)

    def _nearest(self, kind: tuple[str, str, str], sizes: tuple[int, int, int]) -> Product:
        if (kind, sizes) not in self._found:  # asked for by every layer of a model
            self._found[kind, sizes] = self._nearest_row(kind, sizes)
        return self._found[kind, sizes]

    def _nearest_row(self, kind: tuple[str, str, str], sizes: tuple[int, int, int]) -> Product:
        best = min(self._products[kind], key=lambda row: (row.distance(sizes), row.table, row.us))
        note = ""
        if best.distance(sizes):
            wanted, got = (" x ".join(map(str, (each[2], *each[:2]))) for each in (sizes, best.sizes))
            note = f"{wanted} (tokens, out, in) was not measured in {kind[0].split()[0]}: the nearest is {got}"
        return Product(*best.scaled(sizes), note)

    def _of_whole(self, model: str, **wanted: str) -> Iterator[dict[str, str]]:
        """Rows of a whole model at batch 1 with these values."""
        wanted["batch"] = "1"
        for row in self._whole_models:
            if row["model"].split(" (")[0] == model and wanted.items() <= row.items():
                yield row

    def prompts(self, model: str, mode: str) -> list[int]:
        """Prompt lengths at which a mode of a whole model was measured at batch 1."""
        return sorted({int(row["prompt"]) for row in self._of_whole(model, mode=mode)})

    def whole(self, model: str, mode: str, phase: str, prompt: int) -> float | None:
        """Measured microseconds of a whole model at batch 1: time to first token, or a decode step; None if not
        measured.

        The modes took turns, with prompts back to back, as the products were measured.
        """
        metric = "decode_tok_s" if phase == "decode" else "ttft_busy_ms"
        wanted = {"prompt": str(prompt), "metric": metric, "baseline": "dense_bf16"}
        dense, row = (next(self._of_whole(model, mode=name, **wanted), None) for name in ("dense_bf16", mode))
        if dense is None or row is None:
            return None
        # Runs differ in clock: the mode's own run says how much faster it was.
        value = float(dense["p50"])
        return (1e6 / value if phase == "decode" else 1e3 * value) / float(row["speedup"])


def _row_name(pattern: str) -> str:
    """A pattern's name in the tables, whatever columns its extra windows have."""
    return str(as_pattern(pattern)).partition("@")[0]


@functools.cache
def load_tables(device: str) -> Tables:
    """The tables of a device, read once."""
    return Tables(device)
