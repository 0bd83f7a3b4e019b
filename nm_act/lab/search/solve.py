"""The solver: one option for every group, so that the sum of sensitivities is least for a given predicted speed-up."""

import math
from dataclasses import dataclass

import numpy as np

from ...recipe import DENSE, LinearSpec, Recipe, Rule
from ..cost import Rates, added_macs, pattern_of
from .sensitivity import Group

__all__ = ["Choice", "frontier", "solve", "to_recipe"]

_SECONDS = 60.0
"""After this time the best choice so far is taken; its `Choice.bound` limits how far the optimum may be below it."""


@dataclass(frozen=True)
class Choice:
    """An assignment of a spec's name (or "dense") to every group."""

    names: tuple[str, ...]  # one per group
    speedup: float  # predicted for all linear layers of the decoder
    sensitivity: float  # sum over the groups, nats per token
    bound: float  # lower bound of the sensitivity of any choice that is as fast as the target


def solve(
    groups: list[Group],
    costs: dict[str, dict[str, float]],
    specs: dict[str, LinearSpec],
    rates: Rates,
    target_speedup: float,
    other_macs: int = 0,
) -> Choice:
    """Least total sensitivity at a predicted speed-up of at least the target: a multiple-choice knapsack.

    Solved exactly (up to a millionth) by HiGHS, as an integer program with one binary variable per group and option. A
    ValueError if even the fastest option everywhere does not reach the target.

    `costs` has the sensitivities by group key and spec name, from `sensitivities`; `other_macs` counts the
    multiply-accumulates per token of the linear layers in no group, which stay dense.
    """
    return _Problem.of(groups, costs, specs, rates, other_macs).solved(target_speedup)


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
    return [problem.solved(1 / (1 - problem.reachable * index / points)) for index in range(points + 1)]


@dataclass(frozen=True)
class _Problem:
    """Options in numbers: arrays [groups, options] of the share of time saved and of sensitivity; option 0 is dense."""

    names: tuple[str, ...]
    saved: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, groups, costs, specs, rates: Rates, other_macs: int) -> "_Problem":
        total = sum(group.macs for group in groups) + other_macs

        def saved(group: Group, spec: LinearSpec) -> float:
            added = sum(added_macs(spec, *shape) for shape in group.shapes)
            return max(0.0, ((1 - 1 / rates.speedup(pattern_of(spec))[0]) * group.macs - added) / total)

        times = [[0.0, *(saved(group, spec) for spec in specs.values())] for group in groups]
        cost = [[0.0, *(costs[group.key][name] for name in specs)] for group in groups]
        return cls((DENSE, *specs), np.array(times), np.array(cost))

    @property
    def reachable(self) -> float:
        """The largest share of time that can be saved."""
        return float(self.saved.max(axis=1).sum())

    def solved(self, target_speedup: float) -> Choice:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag

        needed = 1 - 1 / target_speedup
        if needed > self.reachable + 1e-9:
            best = 1 / (1 - self.reachable)
            raise ValueError(
                f"expected a target speed-up of at most {best:.3f} with these options, got {target_speedup:g}"
            )
        groups, options = self.cost.shape
        unit = self.cost.max() or 1.0
        useful = self.saved > 0  # what saves nothing is never chosen
        useful[:, 0] = True
        # HiGHS lets a row fall short by 1e-6: in units of a ten-thousandth, that is 1e-10 of the time.
        enough = LinearConstraint(1e4 * self.saved.reshape(1, -1), 1e4 * min(needed, self.reachable))
        one_each = LinearConstraint(block_diag([np.ones((1, options))] * groups), 1, 1)
        found = milp(
            self.cost.ravel() / unit,
            integrality=np.ones(groups * options),
            bounds=Bounds(0, useful.ravel()),
            constraints=[enough, one_each],
            options={"mip_rel_gap": 1e-9, "time_limit": _SECONDS},
        )
        if found.x is None:
            raise RuntimeError(f"expected an optimal choice, got none ({found.message}); use larger --layers-together")
        picked = found.x.reshape(groups, options).argmax(axis=1)
        rows = np.arange(groups)
        sensitivity = math.fsum(self.cost[rows, picked])
        return Choice(
            names=tuple(self.names[index] for index in picked),
            speedup=1 / (1 - math.fsum(self.saved[rows, picked])),
            sensitivity=sensitivity,
            bound=min(found.mip_dual_bound * unit, sensitivity),
        )


def to_recipe(choice: Choice, groups: list[Group], specs: dict[str, LinearSpec]) -> Recipe:
    """Recipe of a choice: dense by default, and a rule for each spec and projection with the layers that get it."""
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
