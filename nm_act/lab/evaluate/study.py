"""A study: which variants of a model are compared, as a small YAML file."""

import itertools
from pathlib import Path
from typing import Any

from ...recipe import DENSE, Recipe
from ...yaml_text import YAMLError, load_yaml
from ..policies import POLICIES
from .variants import DENSE_VARIANT, Variant, from_recipe

__all__ = ["DENSE_VARIANT", "Variant", "from_recipe", "load_study", "row_variant"]

_FIELDS = ("pattern", "criterion", "mitigation", "dense_first_tokens")
_BESIDE_RECIPE = ("layers", "calibrated", "seed")
_KEYS = (*_FIELDS, "layers", "recipe", "calibrated", "seed")
_RECIPE_LAYERS = (*POLICIES, "search")


def load_study(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a study file, with all combinations expanded: one value per key, for `row_variant`.

    The file holds ``rows``, a list of mappings with the keys ``pattern``, ``criterion``, ``mitigation``,
    ``dense_first_tokens`` and ``layers`` (each a value or a list of values, of which all combinations are taken; a
    mitigation is itself a list), ``calibrated`` (true: the row is a folder of ``nm-act calibrate``), ``seed`` (the
    calibration's); or ``recipe``, the path of a recipe relative to the study file, with ``layers`` (also "search"),
    ``calibrated`` and ``seed``. Raises OSError if it cannot be read, ValueError if it is not YAML of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study at {str(path)!r}: there is no such file; check the path")
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected a study in YAML, got invalid text in {str(path)!r}: {reason}") from error
    if not isinstance(data, dict) or list(data) != ["rows"] or not isinstance(data["rows"], list) or not data["rows"]:
        raise ValueError(f"expected a study with the one key rows, a list, in {str(path)!r}; see docs/evaluate.md")
    return [row for entry in data["rows"] for row in _expand(entry, path)]


def _expand(entry: object, path: Path) -> list[dict[str, Any]]:
    where = repr(str(path))
    if not isinstance(entry, dict) or not ({"pattern", "recipe"} & set(entry)):
        raise ValueError(
            f"expected every row of {where} to be a mapping with a pattern or a recipe, got {entry!r}; add one"
        )
    unknown = next((key for key in entry if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"expected the keys of a row among {', '.join(_KEYS)}, got {unknown!r} in {where}")
    values = {key: _values(key, entry[key]) for key in _KEYS if key in entry}
    if "recipe" in entry:
        beside = next((key for key in entry if key not in ("recipe", *_BESIDE_RECIPE)), None)
        if beside is not None:
            raise ValueError(
                f"expected beside recipe only {', '.join(_BESIDE_RECIPE)}, got {beside!r} in {where}; "
                "write it into the recipe"
            )
        layers = next((name for name in values.get("layers", ()) if name not in _RECIPE_LAYERS), None)
        if layers is not None:
            raise ValueError(
                f"expected layers of a recipe's row among {', '.join(_RECIPE_LAYERS)}, got {layers!r} in {where}"
            )
        values["recipe"] = [str(path.parent / entry["recipe"])]
    for key, kind in (("seed", int), ("calibrated", bool)):
        if type(entry.get(key, kind())) is not kind:
            wrong = f"{key} {entry[key]!r}"
            raise ValueError(f"expected an integer seed and calibrated true or false, got {wrong} in {where}")
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _values(key: str, value: object) -> list[Any]:
    if key == "mitigation":  # [var] is one mitigation, [[var], [dpts-mean, var]] are two
        value = value if isinstance(value, list) else [value]
        return value if value and all(isinstance(item, list) for item in value) else [value]
    return value if isinstance(value, list) and key in (*_FIELDS, "layers") else [value]


def row_variant(row: dict[str, Any]) -> Variant:
    """Variant of one row of `load_study`; ValueError if a name in it is unknown."""
    fields = {key: row[key] for key in _BESIDE_RECIPE if key in row}
    if "recipe" in row:
        return from_recipe(Recipe.load(row["recipe"]), Path(row["recipe"]).stem, **fields)
    layers = row.get("layers", "all")
    if layers not in POLICIES:
        raise ValueError(f"expected layers among {', '.join(POLICIES)}, got {layers!r}; or name a recipe")
    if row.get("pattern") == DENSE:
        beside = next((key for key in row if key != "pattern"), None)
        if beside is not None:
            raise ValueError(
                f"expected nothing beside pattern {DENSE} in a study's row, got {beside}, which has no effect there; "
                "leave the row out, because every study measures the dense model"
            )
    chosen = {key: row[key] for key in _FIELDS if key in row}
    return from_recipe(Recipe(projections=POLICIES[layers], **chosen), **{"layers": layers, **fields})
