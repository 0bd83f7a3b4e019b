"""A whole search: options, the frontier and its baselines measured on calibration text, the choice, the files."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...conversion.calibration import DATA_FILE, FACTS_FILE, RECIPE_FILE, save_calibration
from ...conversion.fingerprint import weights_fingerprint
from ...conversion.sparsify import decoder_linears
from ...files import write_atomic
from ...recipe import DEFAULT_PROJECTIONS, LinearSpec, Recipe
from ..cost import Cost, places_of, predictions
from ..evaluate.folder import RunFolder
from ..evaluate.perplexity import perplexity
from ..evaluate.variants import resolved
from ..measured import Place
from ..output import new_figure, png, to_csv, to_json, write_json
from ..overlap import KEY, fingerprints
from ..policies import POLICIES
from .options import CalibratedData, option_name, option_recipe, option_variant, read_data
from .sensitivity import Group, groups_of, sensitivities
from .solve import Problem
from .store import ResultLines

SEARCH_FILE = "search.json"
"""The result, and the hashes of the text that it was found on."""

MEASURED_POINTS = 6
"""Solutions along the frontier whose perplexity is measured."""


@dataclass(frozen=True)
class Goal:
    """The goal: a predicted speed-up of the linear layers, or the largest allowed rise of perplexity in per cent."""

    target_speedup: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if (self.target_speedup is None) == (self.max_drop is None):
            raise ValueError("expected either --target-speedup or --max-drop, got both or neither; give one of them")
        if self.target_speedup is not None and not self.target_speedup >= 1:
            raise ValueError(
                f"expected --target-speedup of at least 1, got {self.target_speedup:g}; 1.2 is 20 % faster"
            )
        if self.max_drop is not None and not self.max_drop > 0:
            raise ValueError(
                f"expected --max-drop above 0 per cent, got {self.max_drop:g}; 20 allows a rise by a fifth"
            )


@dataclass(frozen=True)
class Point:
    """A recipe (None: dense) with its predicted speed-up and its perplexity on the calibration text."""

    name: str
    recipe: Recipe | None
    speedups: dict[str, float]  # predicted, by phase
    perplexity: float

    @property
    def speedup(self) -> float:
        """The smallest predicted speed-up of the phases."""
        return min(self.speedups.values())


def search(
    dense: nn.Module,
    windows: torch.Tensor,
    specs: dict[str, LinearSpec],
    cost: Cost,
    goal: Goal,
    output: Path,
    *,
    identity: dict[str, Any],
    layers_together: int = 1,
    merged: bool = False,
    calibrated: Path | None = None,
    note: Callable[[str], None],
    bar: Callable[[str], AbstractContextManager[Any]],
) -> tuple[Point, list[Point], list[str]]:
    """Find a recipe for a goal, and write it with its frontier; finished measurements in `output` are not repeated.

    ``windows [windows, tokens]``, int64, is calibration text, ``specs`` are the options of a layer, and ``cost`` says
    what they gain in one phase or several: the goal then holds in each. If the phase is decode alone, the recipe's
    layers are sparse only in decode. ``output`` is a new folder or that of an earlier run; ``identity`` has facts about
    model and text for it, besides those that follow from the other arguments.

    ``layers_together`` consecutive layers get one choice, with ``merged`` also the projections that share their input
    (q/k/v, gate/up), so that `optimize` merges them. ``calibrated`` is the folder of the calibrations that options
    need. ``note`` is called with a line before a measurement, ``bar`` with a label for a context that yields
    ``update(done, total)``.

    Returns the best point, all that were measured (the dense model's first), and the files' names, the recipe's first.
    """
    groups = groups_of(dense, DEFAULT_PROJECTIONS, layers_together, merged=merged)
    if not groups:
        raise ValueError(
            f"expected projections among {', '.join(DEFAULT_PROJECTIONS)} in {identity['search']!r}, got none of them; "
            "search another model"
        )
    places = dict(zip(decoder_linears(dense), places_of(dense), strict=True))
    inside = {name for group in groups for name in group.names}
    others = tuple(place for name, place in places.items() if name not in inside)
    _check_reachable(groups, specs, cost, goal, others)
    data = read_data(dense, specs, calibrated)
    count, window = windows.shape
    identity = identity | {
        "weights": weights_fingerprint(dense),
        "windows": count,
        "window": window,
        "token_ids": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "layers_together": layers_together,
        **({"merged": True} if merged else {}),
    }
    folder = RunFolder.open(output, identity).path
    note(f"sensitivities of {len(groups)} groups, {len(specs)} options, {count} windows of {window} tokens")
    with bar("sensitivities") as update:
        costs = sensitivities(dense, windows, groups, specs, folder / "sensitivities.jsonl", update, data)
    problem = Problem(groups, costs, specs, cost, others)
    choices = problem.frontier(MEASURED_POINTS)[1:]
    if goal.target_speedup is not None:
        choices.append(problem.solve(goal.target_speedup))
    phase = cost.phases[0] if tuple(cost.phases) == ("decode",) else "both"
    found = [dataclasses.replace(problem.recipe(choice), phase=phase) for choice in choices]
    recipes = [("dense", None), *(("search", recipe) for recipe in found)]
    recipes += [item for spec in specs.values() for item in _baselines(spec, phase).items()]
    points = _measure(dense, windows, recipes, lambda r: predictions(cost, places.values(), r), folder, note, data)
    best = _best(points, found[-1], goal)
    used = {name: data[name] for name in specs if name in data.keys() & _options_of(best.recipe)}
    return best, points, _write(folder, points, best, dense, used, fingerprints(windows))


def _check_reachable(groups: list[Group], specs: Any, cost: Cost, goal: Goal, others: tuple[Place, ...]) -> None:
    """Raise a ValueError if the target cannot be reached or, without one, if no option is faster than dense."""
    free = Problem(groups, {group.key: dict.fromkeys(specs, 0.0) for group in groups}, specs, cost, others)
    if goal.target_speedup is not None:
        free.solve(goal.target_speedup)
    elif free.frontier(1)[-1].speedup <= 1:
        raise ValueError(
            f"expected an option faster than dense, got none among {', '.join(specs)}; add an --option with a faster "
            "pattern or less to compute, or its measured speed-up with --rates"
        )


def _baselines(spec: LinearSpec, phase: str) -> dict[str, Recipe]:
    """Name -> recipe of the published policies with one spec."""
    return {
        f"{name}, {spec}": option_recipe(spec, projections=projections, phase=phase)
        for name, projections in POLICIES.items()
    }


def _measure(
    model: nn.Module,
    windows: torch.Tensor,
    recipes: list[tuple[str, Recipe | None]],
    predict: Callable[[Recipe | None], dict[str, float]],
    folder: Path,
    note: Callable[[str], None],
    data: dict[str, CalibratedData],
) -> list[Point]:
    """Perplexity of every recipe on calibration text, with all tokens sparse; results in `folder` are not repeated."""
    known = ResultLines(folder / "points.jsonl", ("recipe", "calibration"), ("perplexity",))
    points = []
    for name, recipe in recipes:
        always = None if recipe is None else dataclasses.replace(recipe, phase="both")
        text = "dense" if always is None else json.dumps(always.to_dict(), sort_keys=True)
        digests = sorted(data[option].digest for option in data.keys() & _options_of(recipe)) or None
        if (text, digests) not in known:
            note(f"perplexity on calibration text: {name}")
            variant = model if always is None else option_variant(model, always, data)
            value = perplexity(variant, windows.flatten(), window=windows.shape[1]).value
            known.add(recipe=text, calibration=digests, perplexity=value)
            known.write()
            del variant
        points.append(Point(name, recipe, predict(recipe), known[text, digests]["perplexity"]))
    return points


def _options_of(recipe: Recipe | None) -> set[str]:
    """All options that a recipe gives to a layer; none for the dense model."""
    return set() if recipe is None else {option_name(spec) for spec in resolved(recipe)}


def _best(points: list[Point], solved: Recipe, goal: Goal) -> Point:
    """The solver's point for a target speed-up, else the fastest one within the allowed rise."""
    if goal.max_drop is None:
        return next(point for point in points if point.recipe == solved)
    limit = points[0].perplexity * (1 + goal.max_drop / 100)
    allowed = [point for point in points[1:] if point.perplexity <= limit]
    if not allowed:
        raise ValueError(
            f"expected a recipe within a rise of {goal.max_drop:g} %, got none; allow more or add an --option"
        )
    return max(allowed, key=lambda point: point.speedup)


def point_rows(points: list[Point]) -> list[dict[str, Any]]:
    """Points as plain data, with their change against the first one in per cent."""
    return [
        {
            "name": point.name,
            "predicted_speedup": round(point.speedup, 4),
            **({f"predicted_{phase}": round(value, 4) for phase, value in point.speedups.items()}),
            "perplexity": point.perplexity,
            "change_percent": 100 * (point.perplexity / points[0].perplexity - 1),
        }
        for point in points
    ]


def result(best: Point, points: list[Point]) -> dict[str, Any]:
    """A search's result as plain data."""
    assert best.recipe is not None  # what is found is never the dense model
    return {
        "recipe": best.recipe.to_dict(),
        "predicted_speedup": best.speedup,
        "predicted": best.speedups,
        "points": point_rows(points),
    }


def _write(
    folder: Path, points: list[Point], best: Point, dense: Any, used: dict[str, CalibratedData], hashes: list[str]
) -> list[str]:
    """Write the recipe, the data of its options `used`, the frontier and its plot; names of the files."""
    assert best.recipe is not None
    files: dict[str, bytes | str] = {
        "frontier.png": _draw(points, best),
        "frontier.csv": to_csv(point_rows(points)),
        SEARCH_FILE: to_json(result(best, points) | {KEY: hashes}) + "\n",
    }
    for name in (DATA_FILE, FACTS_FILE):  # of another goal's recipe
        (folder / name).unlink(missing_ok=True)
    if used:
        facts = {"seed": next(iter(used.values())).seed, "options": {name: each.digest for name, each in used.items()}}
        write_json(folder / FACTS_FILE, facts | {KEY: hashes})
        save_calibration(option_variant(dense, best.recipe, used), folder)
    else:
        best.recipe.save(folder / RECIPE_FILE)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [RECIPE_FILE, *([DATA_FILE] if used else []), *files]


def _draw(points: list[Point], best: Point) -> bytes:
    """PNG of the frontier: perplexity on calibration text over predicted speed-up, baselines as single marks."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    line = sorted((p for p in points if p.name in ("dense", "search")), key=lambda p: p.speedup)
    axes.plot([p.speedup for p in line], [p.perplexity for p in line], "o-", color="C0", label="search")
    for index, point in enumerate(p for p in points if p.name not in ("dense", "search")):
        axes.plot(point.speedup, point.perplexity, "s^vDP*X<>"[index % 9], color=f"C{1 + index % 9}", label=point.name)
    axes.plot(best.speedup, best.perplexity, "o", markersize=13, fillstyle="none", color="k", label="written")
    axes.set_yscale("log")
    axes.set_xlabel(f"predicted speed-up, {' and '.join(best.speedups)}")
    axes.set_ylabel("perplexity, calibration text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return png(figure)
