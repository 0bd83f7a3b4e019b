"""Calls as they were before 0.2."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from ..patterns import NMPattern

P = ParamSpec("P")
R = TypeVar("R")


def takes_pattern(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that takes a ``pattern`` also be called as before 0.2, with a DeprecationWarning.

    Then it took ``n, m`` (and ``extra_columns``), by position or by name, in place of the pattern.
    """
    position = list(inspect.signature(function).parameters).index("pattern")

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> R:
        by_position = len(args) > position and isinstance(args[position], int)
        if by_position or "n" in kwargs or "m" in kwargs or "extra_columns" in kwargs:
            if "pattern" in kwargs or (len(args) > position and not by_position):
                raise TypeError(
                    f"nm_act.{function.__name__} expected a pattern alone, got n, m or extra_columns beside it; "
                    'write them into the pattern, as in "8:16" or "2:4+1"'
                )
            given = args[position : position + 2] if by_position else ()
            keep = given[0] if given else kwargs.pop("n", 2)
            group = given[1] if len(given) > 1 else kwargs.pop("m", 4)
            pattern = NMPattern(keep, group, kwargs.pop("extra_columns", ()))
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f'nm_act.{function.__name__} takes one pattern since 0.2: write "{pattern}" in place of n and m',
                    DeprecationWarning,
                    stacklevel=2,
                )
            if by_position:
                args = (*args[:position], pattern, *args[position + len(given) :])
            else:
                kwargs["pattern"] = pattern
        return function(*args, **kwargs)

    return called
