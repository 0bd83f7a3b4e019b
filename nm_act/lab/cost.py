"""Predicts the speed-up of a model with a recipe, from measured tables or from one rate for every pattern."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from ..conversion.sparsify import decoder_linears
from ..layers.linear import FOLLOW_WEIGHT
from ..methods.mitigations import data_of, rank_of, shape_of
from ..patterns import NMPattern, as_pattern
from ..recipe import DENSE, LinearSpec, Recipe
from .measured import Measured, Place, merged_with, shapes_of
from .tables import DEFAULT_DEVICE, table_file

__all__ = ["Cost", "Measured", "Place", "Rates", "added_macs", "cost_of", "places_of", "predictions", "shapes_of"]

PREFILL_TOKENS = 4096
"""Tokens of the sequence whose prefill is predicted."""

SHAPE = {"tokens": str(PREFILL_TOKENS), "out_features": "4096", "in_features": "4096"}
"""The row of a benchmark table that stands for a pattern."""


@dataclass(frozen=True)
class Rates:
    """Speed-up of one linear layer over dense bfloat16: pattern -> (speed-up, source)."""

    table: dict[str, tuple[float, str]]
    phases = ("prefill",)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "Rates":
        """Rates of the H100's whole operator, replaced by those of `path` where it has some.

        `path` is a CSV with the columns ``pattern,speedup,source``, or one that ``benchmarks/bench_sparse_linear.py``
        wrote, of which the whole-operator rows in bfloat16 with 4096 tokens, in and out features are read. Raises
        OSError if there is no such file, ValueError if it has other columns, no usable row, or a speed-up that is not a
        positive number.
        """
        table = _read(table_file(DEFAULT_DEVICE, "sparse_linear.csv"))
        return cls(table if path is None else table | _read(Path(path)))

    def speedup(self, pattern: str) -> tuple[float, str]:
        """Speed-up of a pattern, and its source.

        The row of "2:4+r" stands for every "2:4+r@columns". Without one, the product costs ``1 + r/4`` times that of
        2:4, because its inner dimension is longer by that factor. Other patterns without a row run the dense product.
        """
        for row in (pattern, pattern.partition("@")[0]):
            if row in self.table:
                return self.table[row]
        chosen = None if pattern == DENSE else as_pattern(pattern)
        if chosen is not None and chosen.extra_columns and "2:4" in self.table:
            factor = 1 + len(chosen.extra_columns) / 4
            return self.table["2:4"][0] / factor, f"cost model: the 2:4 row / {factor:g}"
        return 1.0, "dense product"

    def time(
        self, phase: str, place: Place, spec: LinearSpec | None, *, fused: bool = False, merged: bool = True
    ) -> float:
        """Time of a layer, as the number of multiply-accumulates that take as long at the dense speed."""
        return place.macs / self.speedup(DENSE if spec is None else str(spec.pattern))[0]

    def rest(self, phase: str, layers: int) -> float:
        """Time outside the linear layers: not counted."""
        return 0.0


def _read(path: Path) -> dict[str, tuple[float, str]]:
    where = repr(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"no table of rates at {where}: there is no such file; check --rates")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    if {"bench", "stage", "variant", "dtype", "baseline", *SHAPE} <= columns:
        wanted = {"stage": "op", "dtype": "bf16", "baseline": "cublas_bf16", **SHAPE}
        rows = [row for row in rows if wanted.items() <= row.items()]
        for row in rows:
            row["source"] = f"{row['device']}, torch {row['torch']}, {row['date']}: {row['variant']}"
    elif not {"pattern", "speedup", "source"} <= columns:
        raise ValueError(f"expected a CSV with the columns pattern, speedup, source in {where}; see docs/search.md")
    table: dict[str, tuple[float, str]] = {}
    for row in rows:
        try:
            value = float(row["speedup"])
        except (TypeError, ValueError):  # text, or a row that ends early
            value = 0.0
        if not 0 < value < math.inf:
            raise ValueError(
                f"expected a positive speed-up for {row['pattern']} in {where}, got {row['speedup']!r}; correct it"
            )
        pattern = str(as_pattern(row["pattern"]))
        table[pattern] = max(table.get(pattern, (0.0, "")), (value, row["source"]), key=lambda rate: rate[0])
    if not table:
        raise ValueError(
            f"expected rates in {where}, got no row that counts (stage op, bf16 over cublas_bf16, "
            f"{' x '.join(SHAPE.values())}); see docs/search.md"
        )
    return table


class Cost(Protocol):
    """Times of linear layers, in any one unit: `Rates` or `Measured`."""

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases whose times are known."""

    def time(
        self, phase: str, place: Place, spec: LinearSpec | None, *, fused: bool = False, merged: bool = True
    ) -> float:
        """Time of one layer; `spec` None is dense.

        `merged` says that it is one product with the layers that share its input, `fused` that the operand of that
        product comes packed.
        """

    def rest(self, phase: str, layers: int) -> float:
        """Time of everything else in that many decoder layers."""


def places_of(model: nn.Module | str, layers: int | None = None) -> list[Place]:
    """Linear layers of a model's decoder, or as many layers with the shapes of a model in `shapes.SHAPES`."""
    if isinstance(model, str):
        return [Place(i, name, *sizes) for i in range(layers or 0) for name, sizes in shapes_of(model).items()]
    return [
        Place(layer, projection, linear.in_features, linear.out_features)
        for layer, projection, linear in decoder_linears(model).values()
    ]


def cost_of(
    model: nn.Module,
    device: str,
    shapes: str | None = None,
    *,
    phases: tuple[str, ...] = ("prefill",),
    dtype: str = "bf16",
) -> Measured:
    """Measured times on a device for the shapes of a named model, or else of the model itself."""
    if shapes is not None:
        return Measured(device, shapes_of(shapes), shapes, dtype, phases)
    own = {place.projection: (place.in_features, place.out_features) for place in reversed(places_of(model))}
    return Measured(device, own, "", dtype, phases)


def pruned(spec: LinearSpec | None, phase: str) -> LinearSpec | None:
    """The spec if it prunes activations in a phase, with that phase's pattern if kernels have it; else None."""
    if spec is None or spec.scoring.prunes_weight or not isinstance(spec.pattern, NMPattern):
        return None
    if spec.decode_pattern is not None:
        spec = replace(spec, pattern=spec.pattern_in(phase == "decode"), decode_pattern=None)
    return spec if spec.phase in ("both", phase) else None


def is_packed(spec: LinearSpec | None) -> bool:
    """Whether the operator in front can select for a spec: static scores, VAR and D-PTS, without calibrated data."""
    return spec is not None and not data_of(spec) and not spec.scoring.by_sequence


def merges(spec: LinearSpec | None) -> bool:
    """Whether `optimize` merges layers with this spec that share an input: no layer has scores or data of its own."""
    return spec is None or (spec.scoring.formula is None and not data_of(spec))


def layer_time(
    cost: Cost,
    phase: str,
    place: Place,
    spec: LinearSpec | None,
    *,
    alike: bool = False,
    packed: bool = True,
    rank_factor: float = 1.0,
) -> float:
    """Time of a layer plus that of its mitigations' GEMMs, at the dense speed and with ranks times `rank_factor`.

    `alike` says that all layers that share its input have this spec, `packed` whether the recipe lets operands come
    packed.
    """
    spec = pruned(spec, phase)
    merged = merged_with(place.projection) == (place.projection,) or (alike and merges(spec))
    time = cost.time(phase, place, spec, fused=packed and alike and merged and is_packed(spec), merged=merged)
    added = 0.0 if spec is None else float(added_macs(spec, place.in_features, place.out_features))
    added *= rank_factor if spec is not None and rank_of(spec.mitigation) else 1.0
    return time + (cost.time(phase, place, None) * added / place.macs if added else 0.0)


def predictions(
    cost: Cost, places: Iterable[Place], recipe: Recipe | None, *, rank_factor: float = 1.0
) -> dict[str, float]:
    """Predicted speed-up over the dense model by phase, for a recipe in these layers.

    First tokens that stay dense are computed twice in prefill. The GEMMs that mitigations add run at the dense speed.
    If the prediction is for a model `rank_factor` times wider than the evaluated one, low ranks grow by that factor.

    Examples
    --------
    >>> cost = Measured("h100", shapes_of("llama-3-8b"), "llama-3-8b", phases=("prefill", "decode"))
    >>> found = predictions(cost, places_of("llama-3-8b", 32), Recipe("2:4"))
    >>> sorted(found), found["prefill"] > 1.2
    (['decode', 'prefill'], True)
    """
    blocks: dict[int, list[Place]] = {}
    for place in places:
        blocks.setdefault(place.layer, []).append(place)
    speedups = {}
    for phase in cost.phases:
        rest = cost.rest(phase, len(blocks))
        dense, sparse = rest, rest
        for layer, block in blocks.items():
            specs = {p.projection: None if recipe is None else recipe.resolve(layer, p.projection) for p in block}
            for place in block:
                spec, alone = specs[place.projection], cost.time(phase, place, None)
                alike = len({specs[name] for name in merged_with(place.projection) if name in specs}) == 1
                packed = not (recipe and recipe.dense_first_tokens)
                dense += alone
                sparse += layer_time(cost, phase, place, spec, alike=alike, packed=packed, rank_factor=rank_factor)
                if recipe is not None and phase == "prefill" and pruned(spec, phase) is not None:
                    sparse += alone * min(recipe.dense_first_tokens / PREFILL_TOKENS, 1)
        speedups[phase] = dense / sparse
    return speedups


def added_macs(spec: LinearSpec, in_features: int, out_features: int) -> int:
    """Multiply-accumulates per token of the GEMMs that a spec's mitigations add to a layer's own."""
    sizes = in_features, out_features, rank_of(spec.mitigation)
    return sum(math.prod(shape_of(name, *sizes)) for name in data_of(spec) if name in FOLLOW_WEIGHT)
