"""The solver: one option for every group, which minimises the sum of sensitivities for a predicted speed-up."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...recipe import DENSE, LinearSpec, Recipe, Rule
from ...supported import require
from ..cost import Cost, layer_time
from ..measured import Place
from .sensitivity import Group

_SECONDS = 60.0
"""After this time, the best choice so far is taken; its `Choice.bound` limits how much better the optimum may be."""


@dataclass(frozen=True)
class Choice:
    """An assignment of a spec's name (or "dense") to every group."""

    names: tuple[str, ...]  # one per group
    speedup: float  # predicted; of several phases the smaller
    sensitivity: float  # sum over the groups, nats per token
    bound: float  # lower bound of the sensitivity of any choice that is as fast as the target


@dataclass(frozen=True)
class Problem:
    """A multiple-choice knapsack: the least total sensitivity for a predicted speed-up in every phase of the cost.

    `costs` has the sensitivities by group key and spec name; `others` are the linear layers outside all groups, which
    stay dense.
    """

    groups: list[Group]
    costs: dict[str, dict[str, float]]
    specs: dict[str, LinearSpec]
    cost: Cost
    others: tuple[Place, ...] = ()

    @cached_property
    def _saved(self) -> np.ndarray:
        """Share of the time that every option saves, [phases, groups, options]; option 0 is dense."""
        layers = len({place.layer for group in self.groups for place in group.places} | {p.layer for p in self.others})

        def phase_saved(phase: str) -> list[list[float]]:
            def time(group: Group, spec: LinearSpec | None) -> float:
                alike = group.is_whole_product
                return math.fsum(layer_time(self.cost, phase, place, spec, alike=alike) for place in group.places)

            dense = [time(group, None) for group in self.groups]
            total = math.fsum(dense) + self.cost.rest(phase, layers)
            total += math.fsum(self.cost.time(phase, place, None) for place in self.others)
            return [
                [0.0, *((alone - time(group, spec)) / total for spec in self.specs.values())]
                for group, alone in zip(self.groups, dense, strict=True)
            ]

        return np.array([phase_saved(phase) for phase in self.cost.phases])

    @cached_property
    def _reachable(self) -> float:
        """The largest share of the time that can be saved in every phase."""
        if len(self._saved) == 1:
            return float(self._saved[0].max(axis=1).sum())
        optimize = require("scipy.optimize", "eval", "the solver of nm-act search")
        phases, groups, options = self._saved.shape
        saved = np.hstack([self._saved.reshape(phases, -1), -np.ones((phases, 1))])
        one_each = np.hstack([np.kron(np.eye(groups), np.ones(options)), np.zeros((groups, 1))])
        with _no_output():
            found = optimize.milp(
                [*np.zeros(groups * options), -1.0],
                integrality=[*np.ones(groups * options), 0],
                bounds=optimize.Bounds([*np.zeros(groups * options), -1.0], 1),
                constraints=[optimize.LinearConstraint(saved, 0), optimize.LinearConstraint(one_each, 1, 1)],
                options={"time_limit": _SECONDS},
            )
        return max(0.0, float(-found.fun) - 1e-6)  # HiGHS lets rows fall short by as much

    def frontier(self, points: int = 24) -> list[Choice]:
        """Solutions from no speed-up to the largest that can be reached, equally spaced in time saved."""
        return [self.solve(1 / (1 - self._reachable * index / points)) for index in range(points + 1)]

    def solve(self, target_speedup: float) -> Choice:
        """The optimum (up to a millionth) for a predicted speed-up of at least the target, in every phase.

        It is found by HiGHS, as an integer program with one binary variable per group and option. Raises ValueError if
        even the fastest option everywhere does not reach the target.
        """
        optimize = require("scipy.optimize", "eval", "the solver of nm-act search")
        needed = 1 - 1 / target_speedup
        if needed > self._reachable + 1e-9:
            best = 1 / (1 - self._reachable)
            raise ValueError(
                f"expected a target speed-up of at most {best:.3f} with these options, got {target_speedup:g}; lower "
                "it or add a faster --option"
            )
        cost = np.array([[0.0, *(self.costs[group.key][name] for name in self.specs)] for group in self.groups])
        groups, options = cost.shape
        unit = cost.max() or 1.0
        useful: Any = (self._saved > 0).any(axis=0)  # what saves nothing is never chosen
        useful[:, 0] = True
        # HiGHS lets a row fall short by 1e-6: in units of a ten-thousandth, that is 1e-10 of the time.
        enough = optimize.LinearConstraint(
            1e4 * self._saved.reshape(len(self._saved), -1), 1e4 * min(needed, self._reachable)
        )
        one_each = optimize.LinearConstraint(np.kron(np.eye(groups), np.ones(options)), 1, 1)
        with _no_output():
            found = optimize.milp(
                cost.ravel() / unit,
                integrality=np.ones(groups * options),
                bounds=optimize.Bounds(0, useful.ravel()),
                constraints=[enough, one_each],
                options={"mip_rel_gap": 1e-9, "time_limit": _SECONDS},
            )
        if found.x is None:
            raise RuntimeError(f"expected an optimal choice, got none ({found.message}); use larger --layers-together")
        picked = found.x.reshape(groups, options).argmax(axis=1)
        names, rows = (DENSE, *self.specs), np.arange(groups)
        sensitivity = math.fsum(cost[rows, picked])
        speedup = min(1 / (1 - math.fsum(saved[rows, picked])) for saved in self._saved)
        bound = min(found.mip_dual_bound * unit, sensitivity)
        return Choice(tuple(names[index] for index in picked), speedup, sensitivity, bound)

    def recipe(self, choice: Choice) -> Recipe:
        """Recipe of a choice: dense by default, and a rule for each spec and projection with the layers that get it."""
        layers: dict[tuple[str, str], list[int]] = {}
        for group, name in zip(self.groups, choice.names, strict=True):
            if name != DENSE:
                for projection in group.projections:
                    layers.setdefault((projection, name), []).extend(dict.fromkeys(group.layers))
        rules = [
            Rule(
                layers=tuple(sorted(chosen)),
                projections=(projection,),
                pattern=str(self.specs[name].pattern),
                criterion=self.specs[name].criterion,
                mitigation=self.specs[name].mitigation,
            )
            for (projection, name), chosen in sorted(layers.items())
        ]
        projections = tuple(dict.fromkeys(projection for group in self.groups for projection in group.projections))
        return Recipe(pattern=DENSE, projections=projections, rules=tuple(rules))


@contextmanager
def _no_output() -> Iterator[None]:
    """Drop the lines that some versions of HiGHS print on stdout, where a command's JSON belongs."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    own = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
        flush(None)
    finally:
        os.dup2(own, 1)
        os.close(own)
