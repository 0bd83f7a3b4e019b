"""Sparsity patterns: N:M, which keeps N of every M activations, and per-token top-k as the baseline."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

GROUP_SIZES = (2, 4, 8, 16, 32)
"""Group sizes M that every operator accepts."""

WINDOW_SPAN = 16
"""Features that the windows of 2:4+1 and 2:4+2 select together."""

_TEXT = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:\+\s*(\d+)\s*(?:@\s*(\d+(?:\s*,\s*\d+)*)\s*)?)?", re.ASCII)


@dataclass(frozen=True, init=False, order=True)
class NMPattern:
    """An N:M pattern: of every ``group`` consecutive features of a token, ``keep`` survive.

    2:4+1 and 2:4+2 keep ten and twelve of sixteen features: two of each quad, and two more for each extra window, which
    holds column e of the four quads. They can run on 2:4 tensor cores over a weight with duplicated columns.

    Parameters
    ----------
    keep : int or str
        N, the survivors per group, ``1 <= keep < group``; or the whole pattern as text, ``"2:4"``, ``"2:4+1"``,
        ``"2:4+2@0,3"`` (after the @, the columns of the extra windows; by default 0, or 0 and 1).
    group : int, optional
        M, one of 2, 4, 8, 16, 32.
    extra_columns : sequence of int
        Column e of each extra window of 2:4+r: one or two distinct ones of 0 to 3.

    Raises
    ------
    ValueError
        If the text is no pattern, or N, M or a column is outside its range.

    Examples
    --------
    >>> pattern = NMPattern("8:16")
    >>> pattern.keep, pattern.group, pattern.kept_fraction
    (8, 16, 0.5)
    >>> str(NMPattern(2, 4)), str(NMPattern("2:4+1")), str(NMPattern(2, 4, [3]))
    ('2:4', '2:4+1', '2:4+1@3')
    >>> NMPattern("2:4+1").kept_fraction, NMPattern("2:4+1").span
    (0.625, 16)
    """

    keep: int
    group: int
    extra_columns: tuple[int, ...] = ()

    def __init__(self, keep: "int | str | NMPattern", group: int | None = None, extra_columns: Sequence[int] = ()):
        if isinstance(keep, NMPattern) and group is None:
            extra_columns, group, keep = keep.extra_columns, keep.group, keep.keep
        elif isinstance(keep, str) and group is None:
            keep, group, extra_columns = _parse(keep)
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
        object.__setattr__(self, "extra_columns", _columns(extra_columns, keep, group))

    @property
    def kept_fraction(self) -> float:
        """Share of the features that survive: ``keep / group``, or ``(8 + 2 r) / 16`` for 2:4+r."""
        return self.keep / self.group + 2 * len(self.extra_columns) / WINDOW_SPAN

    @property
    def span(self) -> int:
        """Features that are selected together: in_features has to be a multiple of it."""
        return WINDOW_SPAN if self.extra_columns else self.group

    def __str__(self) -> str:
        text, extra = f"{self.keep}:{self.group}", self.extra_columns
        if extra:
            text += f"+{len(extra)}"
        return text if extra == tuple(range(len(extra))) else f"{text}@{','.join(map(str, extra))}"


def _parse(text: str) -> tuple[int, int, tuple[int, ...]]:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f'expected a pattern written "N:M" such as "2:4" or "8:16", or "2:4+1", got {text!r}')
    keep, group, extras, columns = match.groups()
    if extras is None:
        return int(keep), int(group), ()
    count = int(extras)
    if count not in (1, 2) or (columns is not None and len(columns.split(",")) != count):
        raise ValueError(
            f'expected 2:4+1 or 2:4+2 with as many columns after an @, such as "2:4+2@0,3", got {text!r}; correct it'
        )
    return int(keep), int(group), tuple(range(count) if columns is None else map(int, columns.split(",")))


def _columns(extra_columns: Sequence[int], keep: int, group: int) -> tuple[int, ...]:
    columns = tuple(extra_columns)
    if columns and (keep, group) != (2, 4):
        raise ValueError(f"expected extra windows with 2:4 only, got {keep}:{group}+{len(columns)}; drop them")
    if len(columns) > 2 or len(set(columns)) < len(columns) or not all(_is_int(e) and 0 <= e <= 3 for e in columns):
        raise ValueError(f"expected one or two distinct extra columns in 0 to 3, got {columns}; choose such columns")
    return tuple(sorted(columns))


@dataclass(frozen=True, order=True)
class TopKPattern:
    """Unstructured per-token top-k, which keeps a share of each token's features: the baseline for N:M patterns.

    It has no kernel; it shows what the structure of N:M costs in quality.

    Parameters
    ----------
    percent : float
        Percentage of features kept, ``0 < percent < 100``, rounded to a whole number of features, at least one.

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
    group = span = 1  # divides any number of features
    extra_columns = ()

    def __post_init__(self) -> None:
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


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
