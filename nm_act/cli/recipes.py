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
    are `default_patterns`. Raises ValueError for an option that would replace nothing, or a part only of what the file
    says, and for options and a file of which nothing is left because every layer is dense.
    """
    from ..patterns import as_pattern
    from ..recipe import DENSE, Recipe

    changes: dict[str, Any] = {"criterion": criterion} if criterion is not None else {}
    changes |= {"mitigation": mitigation} if mitigation else {}
    if changes and path is None and not (patterns or default_patterns):
        raise ValueError(
            "expected --pattern or --recipe with --criterion and --mitigation, got neither; add --pattern, for example"
        )
    if path is not None and not patterns:
        return _with_effect({path.stem: dataclasses.replace(_base(path, changes), **changes)}, [*changes])
    spelled = [name if name == DENSE else str(as_pattern(name)) for name in patterns or default_patterns]
    names = once(spelled, "--pattern")
    if path is None:
        return _with_effect({name: Recipe(pattern=name, **changes) for name in names}, [*changes])
    base = _base(path, {"pattern": names[0], **changes})
    made = {f"{path.stem} {name}": dataclasses.replace(base, pattern=name, **changes) for name in names}
    return _with_effect(made, ["recipe", *changes])


def _with_effect(recipes: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """The recipes; a ValueError for options beside a recipe that leaves every layer dense."""
    from ..lab.evaluate.variants import resolved

    given = " and ".join(f"--{option}" for option in options)
    dense = next((name for name, made in recipes.items() if options and not resolved(made)), None)
    if dense is not None:
        raise ValueError(
            f"expected sparse layers for {given} to have an effect on, got {dense!r}, in which every layer is dense; "
            f"leave {given} out or choose another pattern"
        )
    return recipes


def _base(path: Path, changes: dict[str, Any]) -> Any:
    """A file's recipe; a ValueError if one of the options would replace a part only of what the recipe sets.

    What stays without is not set: "dense" is no pattern, and an empty list no mitigation.
    """
    from ..recipe import DENSE, Recipe

    recipe = Recipe.load(path)
    for field, value in changes.items():
        names = ["pattern", "decode_pattern"] if field == "pattern" else [field]
        places = {"rules": [getattr(rule, name) for rule in recipe.rules for name in names]}
        if field == "pattern":
            places["decode_pattern"] = [recipe.decode_pattern]
        own = {place: [_text(each) for each in found if each and each != DENSE] for place, found in places.items()}
        parts = [f"{', '.join(dict.fromkeys(texts))} in {place}" for place, texts in own.items() if texts]
        if parts:
            raise ValueError(
                f"expected --{field} {_text(value)} beside a recipe with one {field} for all that it makes sparse, got "
                f"{str(path)!r} with {' and '.join(parts)}; write a recipe file with the {field} that you want"
            )
    return recipe


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "+".join(value)


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
