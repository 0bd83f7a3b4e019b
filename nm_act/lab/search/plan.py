"""The search as a whole: options, the frontier with its baselines measured on calibration text, and the choice."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...files import read_json_lines, write_json_lines
from ...recipe import LinearSpec, Recipe
from ..cost import Rates, extra_macs, macs_by_pattern, predicted_speedup
from ..evaluate.perplexity import perplexity
from ..evaluate.study import resolved
from ..policies import POLICIES
from .options import CalibratedData, option_recipe, option_variant
from .sensitivity import Group
from .solve import frontier, solve

__all__ = ["Point", "baselines", "check_reachable", "measure_points", "options_of"]


@dataclass(frozen=True)
class Point:
    """A recipe with its predicted speed-up and, once measured, its perplexity on the calibration text.

    Attributes
    ----------
    name : str
        "search", or the baseline's.
    recipe : Recipe or None
        None for the dense model.
    speedup : float
    perplexity : float
    """

    name: str
    recipe: Recipe | None
    speedup: float
    perplexity: float


def check_reachable(
    groups: list[Group], specs: dict[str, LinearSpec], rates: Rates, target_speedup: float | None, other_macs: int
) -> None:
    """Raise a ValueError if the target cannot be reached or, without one, if no option is faster than dense."""
    free = {group.key: dict.fromkeys(specs, 0.0) for group in groups}
    if target_speedup is not None:
        solve(groups, free, specs, rates, target_speedup, other_macs)
    elif frontier(groups, free, specs, rates, other_macs, points=1)[-1].speedup <= 1:
        raise ValueError(
            f"expected an option faster than dense, got none among {', '.join(specs)}; add an --option with a faster "
            "pattern or less to compute, or its measured speed-up with --rates"
        )


def baselines(spec: LinearSpec) -> dict[str, Recipe]:
    """Name -> recipe of the fixed rules with one spec: all projections, Amber's skip rule, Alanova's subset."""
    return {f"{name}, {spec}": option_recipe(spec, projections=projections) for name, projections in POLICIES.items()}


def measure_points(
    model: nn.Module,
    tokens: torch.Tensor,
    window: int,
    recipes: list[tuple[str, Recipe | None]],
    rates: Rates,
    store: Path,
    progress: Callable[[str], None],
    calibrated: dict[str, CalibratedData],
) -> list[Point]:
    """Perplexity of every recipe on calibration text; what `store` (JSON lines) holds is not measured again."""
    rows = read_json_lines(store, ("recipe", "perplexity", "macs", "extra_macs"))
    found = {(row["recipe"], *row.get("calibration", [])): row for row in rows}
    points = []
    for name, recipe in recipes:
        text = "dense" if recipe is None else json.dumps(recipe.to_dict(), sort_keys=True)
        digests = sorted(calibrated[option].digest for option in calibrated.keys() & options_of(recipe))
        key = (text, *digests)
        if key not in found:
            progress(f"perplexity on calibration text: {name}")
            variant = model if recipe is None else option_variant(model, recipe, calibrated)
            value = perplexity(variant, tokens, window=window).value
            macs, extra = macs_by_pattern(variant), extra_macs(variant)
            found[key] = {"recipe": text, "perplexity": value, "macs": macs, "extra_macs": extra}
            found[key] |= {"calibration": digests} if digests else {}
            del variant
            write_json_lines(store, found.values())
        row = found[key]
        points.append(Point(name, recipe, predicted_speedup(row["macs"], rates, row["extra_macs"]), row["perplexity"]))
    return points


def options_of(recipe: Recipe | None) -> set[str]:
    """The options that a recipe gives to any layer; none for the dense model."""
    return set() if recipe is None else {str(spec) for spec in resolved(recipe)}
