"""The solver: for every group one option, so that the sum of sensitivities is least for a given predicted speed-up."""

import math
from dataclasses import dataclass

import numpy as np

from ..recipe import DENSE, LinearSpec, Recipe, Rule
from .cost import Rates, pattern_of
from .sensitivity import Group

__all__ = ["Choice", "frontier", "solve", "to_recipe"]

_STEPS = 4000
"""Resolution of the time that can be saved."""


@dataclass(frozen=True)
class Choice:
    """An assignment of a spec's name (or "dense") to every group.

    Attributes
    ----------
    names : tuple of str
        One a group.
    speedup : float
        Predicted for all linear layers of the decoder.
    sensitivity : float
        Sum over the groups, nats a token.
    """

    names: tuple[str, ...]
    speedup: float
    sensitivity: float


def solve(
    groups: list[Group],
    costs: dict[str, dict[str, float]],
    specs: dict[str, LinearSpec],
    rates: Rates,
    target_speedup: float,
    other_macs: int = 0,
) -> Choice:
    """Least total sensitivity with a predicted speed-up of at least the target: a multiple-choice knapsack, exactly.

    Dynamic programming over the time saved, in `_STEPS` steps rounded down, so that the target is always met.

    Parameters
    ----------
    groups : list of Group
    costs : dict
        group key -> spec name -> sensitivity, from `sensitivities`.
    specs : dict of str to LinearSpec
    rates : Rates
    target_speedup : float
        Of all linear layers together.
    other_macs : int
        Multiply-accumulates of the linear layers in no group: they stay dense.

    Raises
    ------
    ValueError
        If not even the fastest option everywhere reaches the target.
    """
    total = sum(group.macs for group in groups) + other_macs
    savings = {name: 1 - 1 / rates.speedup(pattern_of(spec))[0] for name, spec in specs.items()}
    options = [DENSE, *(name for name in specs if savings[name] > 0)]
    fastest = max((savings[name] for name in options[1:]), default=0.0)
    reachable = fastest * (total - other_macs) / total
    needed = 1 - 1 / target_speedup
    if needed > reachable + 1e-12:
        best = 1 / (1 - reachable)
        raise ValueError(f"expected a target speed-up of at most {best:.3f} with these options, got {target_speedup:g}")
    goal = math.ceil(_STEPS * needed / reachable - 1e-6) if reachable else 0
    unit = reachable / _STEPS if reachable else 1.0
    best = np.full(goal + 1, np.inf)  # [saved] -> least sensitivity so far; the last entry is "the goal or more"
    best[0] = 0.0
    taken, origin = (np.zeros((len(groups), goal + 1), dtype=np.int32) for _ in range(2))
    for row, group in enumerate(groups):
        fresh = np.full(goal + 1, np.inf)
        for index, name in enumerate(options):
            saved = savings.get(name, 0.0) * group.macs / total
            moved, source = _shifted(best, int(saved / unit + 1e-9))
            moved = moved + (0.0 if name == DENSE else costs[group.key][name])
            better = moved < fresh
            fresh[better], taken[row][better], origin[row][better] = moved[better], index, source[better]
        best = fresh
    if np.isfinite(best[goal]):
        names, state = [], goal
        for row in reversed(range(len(groups))):
            names.append(options[taken[row][state]])
            state = origin[row][state]
        return _choice(names[::-1], groups, costs, savings, total)
    # At the very end of what can be reached, the steps lost to rounding are missing: everything as fast as it can be.
    names = [min(options, key=lambda n: (-savings.get(n, 0.0), costs[group.key].get(n, 0.0))) for group in groups]
    return _choice(names, groups, costs, savings, total)


def _shifted(best: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Least sensitivity after saving `step` more, and the state that it comes from."""
    goal = len(best) - 1
    step = min(step, goal)
    source = np.maximum(np.arange(goal + 1) - step, 0)
    moved = np.where(np.arange(goal + 1) >= step, best[source], np.inf)
    source[goal] = goal - step + int(best[goal - step :].argmin())
    moved[goal] = best[source[goal]]
    return moved, source


def frontier(
    groups: list[Group],
    costs: dict[str, dict[str, float]],
    specs: dict[str, LinearSpec],
    rates: Rates,
    other_macs: int = 0,
    points: int = 24,
) -> list[Choice]:
    """Solutions from no speed-up to the largest that can be reached, equally spaced in time saved."""
    total = sum(group.macs for group in groups) + other_macs
    fastest = max((1 - 1 / rates.speedup(pattern_of(spec))[0] for spec in specs.values()), default=0.0)
    largest = max(fastest, 0.0) * (total - other_macs) / total
    targets = [1 / (1 - largest * index / points) for index in range(points + 1)]
    return [solve(groups, costs, specs, rates, target, other_macs) for target in targets]


def to_recipe(choice: Choice, groups: list[Group], specs: dict[str, LinearSpec]) -> Recipe:
    """Recipe of a choice: dense by default, a rule for each spec and projection with the layers that get it."""
    layers: dict[tuple[str, str], list[int]] = {}
    for group, name in zip(groups, choice.names, strict=True):
        if name != DENSE:
            for projection in group.projections:
                layers.setdefault((projection, name), []).extend(group.layers)
    rules = [
        Rule(
            layers=tuple(sorted(chosen)),
            projections=(projection,),
            pattern=str(specs[name].pattern),
            criterion=specs[name].criterion,
            mitigation=specs[name].mitigation,
        )
        for (projection, name), chosen in sorted(layers.items())
    ]
    projections = tuple(dict.fromkeys(projection for group in groups for projection in group.projections))
    return Recipe(pattern=DENSE, projections=projections, rules=tuple(rules))


def _choice(names, groups, costs, savings, total) -> Choice:
    saved = sum(savings.get(name, 0.0) * group.macs for name, group in zip(names, groups, strict=True)) / total
    cost = sum(0.0 if n == DENSE else costs[g.key][n] for n, g in zip(names, groups, strict=True))
    return Choice(tuple(names), 1 / (1 - saved), cost)
