"""The solver: for every group one option, so that the sum of sensitivities is least for a given predicted speed-up."""

import math
from dataclasses import dataclass

import numpy as np

from ...recipe import DENSE, LinearSpec, Recipe, Rule
from ..cost import Rates, added_macs, pattern_of
from .sensitivity import Group

__all__ = ["Choice", "frontier", "solve", "to_recipe"]

_STATES = 20_000
"""Partial solutions that are kept at most: where there are more, the cheapest of each of so many ranges of savings."""

_SCALE = 2**62
"""The dense model's time. Savings are integers: each is rounded once, their sums not at all."""


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
    bound : float
        Sensitivity below which no choice is as fast as was asked for (the Lagrangian bound): how near the optimum is.
    """

    names: tuple[str, ...]
    speedup: float
    sensitivity: float
    bound: float


def solve(
    groups: list[Group],
    costs: dict[str, dict[str, float]],
    specs: dict[str, LinearSpec],
    rates: Rates,
    target_speedup: float,
    other_macs: int = 0,
) -> Choice:
    """Least total sensitivity with a predicted speed-up of at least the target: a multiple-choice knapsack.

    Group by group, the partial solutions are kept that no other one beats in both time saved and sensitivity, and that
    could still become better than the best known solution: their sensitivity plus the Lagrangian bound of what is left
    has to be below it. This is exact (up to a part in 1e9 of the speed-up) as long as at most `_STATES` of them remain;
    beyond that they are thinned out, and the result is near the optimum: its `bound` says how near at most.

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
    return _solved(_Problem.of(groups, costs, specs, rates, other_macs), target_speedup)


@dataclass(frozen=True)
class _Problem:
    """Options in numbers: arrays [groups, options] of time saved (int64) and of sensitivities; option 0 is dense."""

    names: tuple[str, ...]
    saved: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, groups, costs, specs, rates: Rates, other_macs: int) -> "_Problem":
        fractions = {name: 1 - 1 / rates.speedup(pattern_of(spec))[0] for name, spec in specs.items()}
        total = sum(group.macs for group in groups) + other_macs

        def saved(group: Group, name: str) -> int:
            added = sum(added_macs(specs[name], *shape) for shape in group.shapes)
            return max(0, int((fractions[name] * group.macs - added) / total * _SCALE))  # a loss is never chosen

        names = (DENSE, *(name for name in specs if any(saved(group, name) > 0 for group in groups)))
        times = [[0, *(saved(group, name) for name in names[1:])] for group in groups]
        cost = np.array([[0.0, *(costs[g.key][name] for name in names[1:])] for g in groups])
        return cls(names, np.array(times, dtype=np.int64), cost)

    def needed(self, target_speedup: float) -> int:
        """Time to save for a target; ValueError if that cannot be reached."""
        reachable = int(self.saved.max(axis=1).sum())
        needed = 1 - 1 / target_speedup
        if needed > reachable / _SCALE + 1e-9:
            best = 1 / (1 - reachable / _SCALE)
            raise ValueError(
                f"expected a target speed-up of at most {best:.3f} with these options, got {target_speedup:g}"
            )
        return min(int(needed * _SCALE), reachable)

    def choice(self, picked: np.ndarray, bound: float) -> Choice:
        rows = np.arange(len(self.cost))
        saved = int(self.saved[rows, picked].sum()) / _SCALE
        cost = math.fsum(self.cost[rows, picked])
        return Choice(tuple(self.names[index] for index in picked), 1 / (1 - saved), cost, bound)


def _solved(problem: _Problem, target_speedup: float) -> Choice:
    needed = problem.needed(target_speedup)
    bound, incumbent, price = _relaxed(problem, needed)
    picked = _search(problem, needed, incumbent, price)
    return problem.choice(incumbent if picked is None else picked, bound)


def _relaxed(problem: _Problem, needed: int) -> tuple[float, np.ndarray, float]:
    """Lagrangian bound, the cheapest choice seen that saves enough, and the bound's price of time."""
    rows = np.arange(len(problem.cost))
    best = np.lexsort((problem.cost, -problem.saved), axis=1)[:, 0]  # the fastest; of equally fast ones the cheapest
    bound, price = -math.inf, 0.0
    low, high = 0.0, None
    tried = 0.0
    for _ in range(160):
        reduced = problem.cost - tried * (problem.saved / _SCALE)
        picked = reduced.argmin(axis=1)
        value = reduced[rows, picked].sum() + tried * (needed / _SCALE)
        if value > bound:
            bound, price = value, tried
        if problem.saved[rows, picked].sum() >= needed:
            if problem.cost[rows, picked].sum() < problem.cost[rows, best].sum():
                best = picked
            high = tried
        else:
            low = tried
        if low == high:
            break
        tried = (low + high) / 2 if high is not None else max(2 * low, 1e-12)
    return float(bound), best, price


def _search(problem: _Problem, needed: int, incumbent: np.ndarray, price: float) -> np.ndarray | None:
    """Options that save enough at less cost than the incumbent, the cheapest ones; None if there are none."""
    count = len(problem.cost)
    reduced = problem.cost - price * problem.saved / _SCALE
    # The groups from a row on: the least that they add to the cost less the price of their time, and all they can save.
    rest = np.append(reduced.min(axis=1)[::-1].cumsum()[::-1], 0.0)
    reach = np.append(problem.saved.max(axis=1)[::-1].cumsum()[::-1], 0)
    limit = problem.cost[np.arange(count), incumbent].sum()
    saved, cost, trail = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for row in range(count):
        options = len(problem.names)
        every_saved = np.minimum((saved[:, None] + problem.saved[row]).ravel(), needed)
        every_cost = (cost[:, None] + problem.cost[row]).ravel()
        # What is left has to save what the goal still lacks, if anything, at the price at least.
        bound = every_cost + price * (needed - every_saved) / _SCALE + rest[row + 1]
        order = np.flatnonzero((bound < limit) & (every_saved + reach[row + 1] >= needed))
        order = order[np.lexsort((every_cost[order], -every_saved[order]))]
        ahead = np.minimum.accumulate(np.append(np.inf, every_cost[order]))[:-1]
        order = _thinned(order[every_cost[order] < ahead], every_saved)
        if not len(order):
            return None
        trail.append((order // options, order % options))
        saved, cost = every_saved[order], every_cost[order]
    state, picked = int(cost.argmin()), []
    for origin, option in reversed(trail):
        picked.append(option[state])
        state = origin[state]
    return np.array(picked[::-1])


def _thinned(order: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """At most `_STATES` of partial solutions in order of falling savings: the cheapest of every range of savings."""
    if len(order) <= _STATES:
        return order
    values = saved[order]
    ranges = (values - values[-1]) // ((values[0] - values[-1]) // (_STATES - 1) + 1)
    return order[np.append(ranges[1:] != ranges[:-1], True)]


def frontier(
    groups: list[Group],
    costs: dict[str, dict[str, float]],
    specs: dict[str, LinearSpec],
    rates: Rates,
    other_macs: int = 0,
    points: int = 24,
) -> list[Choice]:
    """Solutions from no speed-up to the largest that can be reached, equally spaced in time saved."""
    problem = _Problem.of(groups, costs, specs, rates, other_macs)
    largest = int(problem.saved.max(axis=1).sum()) / _SCALE
    targets = [1 / (1 - largest * index / points) for index in range(points + 1)]
    return [_solved(problem, target) for target in targets]


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
