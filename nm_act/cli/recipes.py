"""Recipes from the options of a command."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import common


def build_recipes(
    path: Path | None,
    patterns: list[str] | None,
    criterion: str | None,
    mitigation: list[str] | None,
    default_patterns: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Name -> Recipe from the options, which replace fields of the file's recipe or the default one.

    Every pattern makes one recipe. Without patterns the file's recipe keeps its own, and without a file the patterns
    are `default_patterns`. Raises ValueError for a pattern beside a file whose rules have other ones.
    """
    from ..patterns import as_pattern
    from ..recipe import DENSE, Recipe

    changes: dict[str, Any] = {"criterion": criterion} if criterion is not None else {}
    changes |= {"mitigation": mitigation} if mitigation else {}
    base = None if path is None else Recipe.load(path)
    if base is not None and path is not None and not patterns:
        return {path.stem: dataclasses.replace(base, **changes)}
    spelled = [name if name == DENSE else str(as_pattern(name)) for name in patterns or default_patterns]
    names = once(spelled, "--pattern")
    if base is not None:
        _check_one_pattern(base, str(path), names[0])
    if base is None or path is None:
        return {name: Recipe(pattern=name, **changes) for name in names}
    return {f"{path.stem} {name}": dataclasses.replace(base, pattern=name, **changes) for name in names}


def _check_one_pattern(recipe: Any, path: str, pattern: str) -> None:
    """Raise a ValueError for a pattern beside a recipe with rules that set others; "dense" is none."""
    from ..recipe import DENSE

    own = [each for rule in recipe.rules for each in (rule.pattern, rule.decode_pattern) if each not in (None, DENSE)]
    if own:
        raise ValueError(
            f"expected --pattern {pattern} beside a recipe whose rules set no patterns, got {path!r} with "
            f"{', '.join(dict.fromkeys(own))} in rules; edit the patterns in a recipe file"
        )


def once(values: list[Any] | None, option: str) -> list[Any]:
    """The values of a repeatable option without duplicates; a note names the duplicates."""
    values = values or []
    found = list(dict.fromkeys(values))
    if len(found) < len(values):
        common.note(f"{option} names {', '.join(str(each) for each in found if values.count(each) > 1)} twice: one row")
    return found


def check_uncalibrated(variants: Iterable[Any], remedy: str) -> None:
    """Raise a ValueError for a variant that needs calibrated data and has none."""
    from ..lab.evaluate.variants import resolved
    from ..methods.mitigations import data_of

    for variant in variants:
        needs = sorted(str(spec) for spec in resolved(variant.recipe) if data_of(spec))
        if needs and variant.folder is None:
            raise ValueError(
                f"expected recipes that need no calibration, got {needs[0]!r} in {variant.name!r}; make its data with "
                f"nm-act calibrate and {remedy}"
            )
