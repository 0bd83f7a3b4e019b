"""How one linear layer is made sparse: pattern, criterion, mitigations and phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from .methods.criteria import CRITERIA, Criterion, check_criterion
from .methods.mitigations import Mitigation, check_mitigations, mitigation
from .patterns import NMPattern, TopKPattern, as_pattern

PHASES = ("both", "prefill", "decode")
"""When a layer is sparse: a call with one token per sequence is decode, any other is prefill."""


@dataclass(frozen=True)
class LinearSpec:
    """How one linear layer is made sparse.

    Parameters
    ----------
    pattern : NMPattern, TopKPattern or str
        Pattern of the input activations: N:M, or 2:4+1, 2:4+2 (:class:`nm_act.NMPattern`); or the percentage kept by
        unstructured top-k ("50%", a baseline).
    criterion : str
        How survivors are chosen, or which baseline prunes the weights instead; see :mod:`nm_act.methods.criteria`.
    mitigation : sequence of str
        How the error is reduced; see :mod:`nm_act.methods.mitigations`. Some exclude each other.
    phase : str
        "both", "prefill" or "decode".
    decode_pattern : NMPattern or str, optional
        N:M pattern of decode steps, if it differs; ``pattern`` is then that of prefill.

    Raises
    ------
    ValueError
        If any of them is unknown, or they cannot be combined.
    """

    pattern: NMPattern | TopKPattern
    criterion: str = "act"
    mitigation: tuple[str, ...] = ()
    phase: str = "both"
    decode_pattern: NMPattern | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        check_criterion(self.criterion)
        check_phase(self.phase)
        object.__setattr__(self, "decode_pattern", self._own_decode_pattern())
        object.__setattr__(self, "mitigation", read_mitigation(self.mitigation))
        if self.scoring.prunes_weight and self.mitigation:
            raise ValueError(
                f"expected no mitigation where the weights are pruned ({self.criterion}), got {self.mitigation[0]}; "
                "remove it or choose a criterion for activations"
            )

    def _own_decode_pattern(self) -> NMPattern | None:
        """``decode_pattern`` as an object; None if it equals ``pattern``."""
        pattern = None if self.decode_pattern is None else as_pattern(self.decode_pattern)
        if pattern is None or pattern == self.pattern:
            return None
        if self.phase != "both":
            raise ValueError(
                f"expected phase both along with decode_pattern {pattern}, got {self.phase}; leave one of them out"
            )
        if not isinstance(pattern, NMPattern) or not isinstance(self.pattern, NMPattern):
            raise ValueError(
                f"expected N:M patterns for both phases, got {self.pattern} and decode_pattern {pattern}; top-k has one"
            )
        if self.scoring.prunes_weight:
            raise ValueError(
                f"expected one pattern where the weights are pruned ({self.criterion}), got decode_pattern {pattern}; "
                "leave it out or choose a criterion for activations"
            )
        return pattern

    def pattern_in(self, decode: bool) -> NMPattern | TopKPattern:
        """The pattern of decode steps or of prefill."""
        return self.decode_pattern if decode and self.decode_pattern is not None else self.pattern

    @property
    def span(self) -> int:
        """in_features must be a multiple of this: whole groups of both patterns."""
        return self.pattern.span if self.decode_pattern is None else lcm(self.pattern.span, self.decode_pattern.span)

    @property
    def scoring(self) -> Criterion:
        """The criterion as data."""
        return CRITERIA[self.criterion]

    @property
    def methods(self) -> tuple[Mitigation, ...]:
        """The mitigations as data."""
        return tuple(mitigation(name) for name in self.mitigation)

    @property
    def variance_correction(self) -> bool:
        """Whether the output is rescaled per token (VAR)."""
        return any(each.variance_correction for each in self.methods)

    @property
    def token_shift(self) -> str:
        """Per-token shift of the operators: "none", "mean" or "median" (D-PTS)."""
        return next((each.token_shift for each in self.methods if each.token_shift != "none"), "none")

    def __str__(self) -> str:
        pattern = str(self.pattern) if self.decode_pattern is None else f"{self.pattern}/{self.decode_pattern}"
        parts = [pattern, self.criterion, *self.mitigation]
        return " ".join(parts) if self.phase == "both" else f"{' '.join(parts)} ({self.phase} only)"


def check_phase(phase: str) -> None:
    """Raise a ValueError for an unknown phase."""
    if phase not in PHASES:
        raise ValueError(f"expected a phase among {', '.join(PHASES)}, got {phase!r}; choose one of those")


def read_mitigation(value: Any) -> tuple[str, ...]:
    """Mitigations as a tuple; ValueError if one is unknown, or ``value`` is not a list."""
    return check_mitigations(check_list(value, "mitigation"))


def check_list(value: Any, what: str) -> Sequence[Any]:
    """The value itself; ValueError if it is not a list."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected {what} as a list, got {value!r}; put it in brackets")
    return value
