"""The search as a whole: options, the frontier with its baselines measured on calibration text, and the choice."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..criteria import CRITERIA
from ..evaluate.perplexity import perplexity
from ..evaluate.variants import sparse_copy
from ..files import write_atomic
from ..mitigations import data_of
from ..policies import POLICIES
from ..recipe import LinearSpec, Recipe
from .cost import Rates, extra_macs, macs_by_pattern, pattern_of, predicted_speedup

__all__ = ["Point", "baselines", "check_options", "measure_points", "parse_option"]


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


def parse_option(text: str) -> LinearSpec:
    """Spec from "PATTERN [CRITERION] [MITIGATION ...]", as specs are printed; nothing in it may need calibration.

    Examples
    --------
    >>> str(parse_option("2:4 var"))
    '2:4 act var'
    """
    pattern, *names = text.split() or [""]
    criteria = [name for name in names if name in CRITERIA]
    if len(criteria) > 1:
        raise ValueError(f"expected at most one criterion in the option {text!r}, got {', '.join(criteria)}")
    mitigation = tuple(name for name in names if name not in CRITERIA)
    spec = LinearSpec(pattern, *criteria, mitigation=mitigation)
    if data_of(spec):
        needs = next((name for name in mitigation if data_of(LinearSpec(pattern, mitigation=(name,)))), spec.criterion)
        raise ValueError(
            f"expected an option that needs no calibration, got {str(spec)!r}; leave {needs} out and calibrate the "
            "recipe that is found with it"
        )
    return spec


def check_options(specs: Iterable[LinearSpec], rates: Rates) -> None:
    """Raise a ValueError if no option is faster than dense: nothing but the dense model could be found."""
    specs = list(specs)
    if not any(rates.speedup(pattern_of(spec))[0] > 1 for spec in specs):
        raise ValueError(
            f"expected an option faster than dense, got none among {', '.join(map(str, specs))}; add an --option with "
            "a faster pattern, or its measured speed-up with --rates"
        )


def baselines(spec: LinearSpec) -> dict[str, Recipe]:
    """Name -> recipe of the fixed rules with one spec: all projections, Amber's skip rule, Alanova's subset."""
    fields = {"pattern": str(spec.pattern), "criterion": spec.criterion, "mitigation": spec.mitigation}
    return {f"{name}, {spec}": Recipe(projections=projections, **fields) for name, projections in POLICIES.items()}


def measure_points(
    model: nn.Module,
    tokens: torch.Tensor,
    window: int,
    recipes: list[tuple[str, Recipe | None]],
    rates: Rates,
    store: Path,
    progress: Callable[[str], None],
) -> list[Point]:
    """Perplexity of every recipe on calibration text; what `store` (JSON lines) holds is not measured again."""
    lines = store.read_text(encoding="utf-8").split("\n") if store.is_file() else []
    found = {row["recipe"]: row for row in (json.loads(line) for line in lines if line)}
    points = []
    for name, recipe in recipes:
        key = "dense" if recipe is None else json.dumps(recipe.to_dict(), sort_keys=True)
        if key not in found:
            progress(f"perplexity on calibration text: {name}")
            variant = model if recipe is None else sparse_copy(model, recipe).model
            value = perplexity(variant, tokens, window=window).value
            macs, extra = macs_by_pattern(variant), extra_macs(variant)
            found[key] = {"recipe": key, "perplexity": value, "macs": macs, "extra_macs": extra}
            del variant
            write_atomic(store, "".join(json.dumps(row) + "\n" for row in found.values()))
        row = found[key]
        points.append(Point(name, recipe, predicted_speedup(row["macs"], rates, row["extra_macs"]), row["perplexity"]))
    return points
