"""Sparsity patterns: N:M, which share of a group of activations is kept, and per-token top-k as the baseline."""

import re
from dataclasses import dataclass

GROUP_SIZES = (2, 4, 8, 16, 32)
"""Group sizes M that every operator accepts."""


@dataclass(frozen=True, init=False, order=True)
class NMPattern:
    """An N:M pattern: of every ``group`` consecutive features of a token, ``keep`` survive.

    Parameters
    ----------
    keep : int or str
        N, the survivors per group, ``1 <= keep < group``; or the whole pattern as text, ``"2:4"``.
    group : int, optional
        M, one of 2, 4, 8, 16, 32.

    Raises
    ------
    ValueError
        If the text is not ``"N:M"``, or N and M are outside their ranges.

    Examples
    --------
    >>> pattern = NMPattern("8:16")
    >>> pattern.keep, pattern.group, pattern.kept_fraction
    (8, 16, 0.5)
    >>> str(NMPattern(2, 4))
    '2:4'
    """

    keep: int
    group: int

    def __init__(self, keep: "int | str | NMPattern", group: int | None = None):
        if isinstance(keep, NMPattern) and group is None:
            keep, group = keep.keep, keep.group
        elif isinstance(keep, str) and group is None:
            match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", keep)
            if match is None:
                raise ValueError(f'expected a pattern written "N:M" such as "2:4" or "8:16", got {keep!r}')
            keep, group = int(match[1]), int(match[2])
        if not (_is_int(keep) and _is_int(group)):
            raise ValueError(f'expected two integers or text such as "2:4", got keep={keep!r}, group={group!r}')
        if group not in GROUP_SIZES:
            raise ValueError(
                f"expected a group size M in {{2, 4, 8, 16, 32}}, got pattern {keep}:{group}; "
                "choose one of those group sizes"
            )
        if not 1 <= keep < group:
            raise ValueError(
                f"expected 1 <= N < M, got pattern {keep}:{group}; use the dense layer where nothing is pruned"
            )
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "group", group)

    @property
    def kept_fraction(self) -> float:
        """Share of the features that survive, ``keep / group``."""
        return self.keep / self.group

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True, order=True)
class TopKPattern:
    """Unstructured per-token top-k, the baseline of every N:M pattern: that share of each token's features is kept.

    No kernel serves it: it shows what the structure of N:M costs in quality.

    Parameters
    ----------
    percent : float
        Features kept, ``0 < percent < 100``, rounded to a whole number of features, at least one.

    Raises
    ------
    ValueError
        If the percentage is not between 0 and 100.

    Examples
    --------
    >>> pattern = as_pattern("50%")
    >>> pattern.keep_of(576), pattern.kept_fraction, str(pattern)
    (288, 0.5, '50%')
    """

    percent: float
    group = 1  # divides any number of features

    def __post_init__(self):
        if isinstance(self.percent, bool) or not isinstance(self.percent, (int, float)) or not 0 < self.percent < 100:
            raise ValueError(
                f'expected a percentage kept between 0 and 100 such as "50%", got {self.percent!r}; '
                "use the dense layer where nothing is pruned"
            )

    @property
    def kept_fraction(self) -> float:
        """Share of the features that survive."""
        return self.percent / 100

    def keep_of(self, in_features: int) -> int:
        """How many of a token's features survive."""
        return max(1, round(in_features * self.percent / 100))

    def __str__(self) -> str:
        return f"{self.percent:g}%"


def as_pattern(value: "str | NMPattern | TopKPattern") -> NMPattern | TopKPattern:
    """Pattern of a recipe: ``"N:M"``, or ``"50%"`` for unstructured top-k; a ValueError names what is wrong."""
    if isinstance(value, TopKPattern):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return NMPattern(value) if match is None else TopKPattern(float(match[1]))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
