"""N:M sparsity patterns: which share of a group of activations is kept."""

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


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
