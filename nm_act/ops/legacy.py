"""Support for calls in the form of versions before 0.2."""

import functools
import inspect
import numbers
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from ..patterns import NMPattern

P = ParamSpec("P")
R = TypeVar("R")


def takes_pattern(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that takes a ``pattern`` also be called as before 0.2, with a DeprecationWarning.

    In that form, ``n, m`` (and ``extra_columns``), by position or by name, take the place of the pattern.
    """
    parameters = inspect.signature(function).parameters
    position = list(parameters).index("pattern")
    has_default = parameters["pattern"].default is not inspect.Parameter.empty

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> R:
        by_position = len(args) > position and isinstance(args[position], numbers.Integral)
        if by_position or "n" in kwargs or "m" in kwargs or "extra_columns" in kwargs:
            if "pattern" in kwargs or (len(args) > position and not by_position):
                raise TypeError(
                    f"nm_act.{function.__name__} expected a pattern alone, got n, m or extra_columns beside it; "
                    'write them into the pattern, as in "8:16" or "2:4+1"'
                )
            given = args[position : position + 2] if by_position else ()
            numbers_given = len(given) + ("n" in kwargs) + ("m" in kwargs)
            if numbers_given == 1 or not (numbers_given or has_default):
                raise TypeError(
                    f'nm_act.{function.__name__} expected one pattern such as "8:16", got {numbers_given} of n and m; '
                    "write the pattern"
                )
            keep = given[0] if given else kwargs.pop("n", 2)
            group = given[1] if len(given) > 1 else kwargs.pop("m", 4)
            pattern = NMPattern(int(keep), int(group), kwargs.pop("extra_columns", ()))
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


def takes_activation_dtype(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that takes ``activation_dtype`` also be called with ``fp8``, as before 0.2, with a warning."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if "fp8" in kwargs:
            fp8 = kwargs.pop("fp8")
            if "activation_dtype" in kwargs:
                raise TypeError(
                    f"nm_act.{function.__name__} expected activation_dtype alone, got fp8={fp8} beside it; leave it out"
                )
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"nm_act.{function.__name__} takes activation_dtype since 0.2: write "
                    "activation_dtype=torch.float8_e4m3fn in place of fp8=True, and nothing in place of fp8=False",
                    DeprecationWarning,
                    stacklevel=2,
                )
            kwargs["activation_dtype"] = torch.float8_e4m3fn if fp8 else None
        return function(*args, **kwargs)

    return called


def not_packed(found: object) -> TypeError:
    """The error for anything else in place of a packed operand."""
    return TypeError(
        f"expected operand as an nm_act.Packed, got {type(found).__name__}; pass all that compress_packed returned as "
        "one, row_scale and eta are in it"
    )


def takes_operand(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse a call as before 0.2, with values and metadata apart, in a sentence, however many arguments follow."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if args and isinstance(args[0], torch.Tensor):
            raise not_packed(args[0])
        return function(*args, **kwargs)

    return called
