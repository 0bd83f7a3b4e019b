"""A study: which variants of a model are compared, written as a small YAML file or put together from options."""

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ...recipe import LinearSpec, Recipe, load_yaml
from ..policies import POLICIES, policy_of

__all__ = ["DENSE_VARIANT", "Variant", "from_recipe", "load_study"]

_AXES = ("pattern", "criterion", "mitigation", "dense_first_tokens", "layers")
_RECIPE_KEYS = ("recipe", "layers", "calibrated", "seed")
_KEYS = (*_AXES, *(key for key in _RECIPE_KEYS if key not in _AXES))
_RECIPE_LAYERS = (*POLICIES, "search")


@dataclass(frozen=True)
class Variant:
    """One row of a study.

    Attributes
    ----------
    name : str
        Unique in a study.
    method : str
        Criterion and mitigations, "wina+var", and "first-1" where a sequence's first token stays dense; "mixed" where
        layers differ; "dense" for the dense model.
    pattern : str
        "2:4", ...; "mixed" where layers differ.
    layers : str
        "all", "amber", "alanova", "search" or "custom".
    recipe : dict or None
        Plain mapping of the recipe; None for the dense model.
    calibrated : bool
        Whether ``nm-act calibrate`` made the variant's data.
    seed : int
        Of the calibration.
    calibration : str
        SHA-256 of the calibration's data; "" where nothing is calibrated.
    calibrated_on : str
        Its text and training, to be read.
    """

    name: str
    method: str
    pattern: str
    layers: str
    recipe: dict | None = None
    calibrated: bool = False
    seed: int = 0
    calibration: str = ""
    calibrated_on: str = ""

    def to_dict(self) -> dict:
        """Plain mapping of the fields."""
        return asdict(self)

    @property
    def slug(self) -> str:
        """The name as a file or folder name."""
        return "".join(c if c.isalnum() or c in "+-." else "-" for c in self.name.replace(":", "x").replace("%", "pct"))


DENSE_VARIANT = Variant("dense", "dense", "dense", "all")


def from_recipe(recipe: Recipe, name: str | None = None, **fields) -> Variant:
    """Variant of a recipe; what it is called follows from the recipe unless `name` or `fields` say so.

    Examples
    --------
    >>> from_recipe(Recipe("2:4", mitigation=["var"])).name
    'act+var 2:4'
    """
    specs = resolved(recipe)
    methods = {"+".join([spec.criterion, *spec.mitigation]) for spec in specs}
    patterns = {str(spec.pattern) for spec in specs}
    method = methods.pop() if len(methods) == 1 else "mixed"
    method += f"+first-{recipe.dense_first_tokens}" if recipe.dense_first_tokens else ""
    pattern = patterns.pop() if len(patterns) == 1 else "mixed"
    layers = fields.pop("layers", policy_of(recipe))
    name = name or f"{method} {pattern}" + ("" if layers == "all" else f" {layers}")
    return Variant(name, method, pattern, layers, recipe.to_dict(), **fields)


def resolved(recipe: Recipe) -> set[LinearSpec]:
    """Specs that a recipe gives to any layer: to those that it names, and to the layers behind them."""
    named = {*recipe.skip_layers, *(layer for rule in recipe.rules for layer in rule.layers or ())}
    projections = {*recipe.projections, *(name for rule in recipe.rules for name in rule.projections or ())}
    places = itertools.product([*named, max(named, default=-1) + 1], projections)
    return {recipe.resolve(layer, projection) for layer, projection in places} - {None}


def load_study(path: str | Path) -> list[dict]:
    """Rows of a study file, products multiplied out.

    The file holds ``rows``, a list of mappings with the keys ``pattern``, ``criterion``, ``mitigation``,
    ``dense_first_tokens`` and ``layers`` (each a value or a list of values, of which all combinations are taken; a
    mitigation is itself a list), ``calibrated`` (true: the row is a folder of ``nm-act calibrate``), ``seed`` (the
    calibration's); or ``recipe``, the path of a recipe relative to the study file, with ``layers`` (also "search"),
    ``calibrated`` and ``seed``.

    Returns
    -------
    list of dict
        One value an axis; turn each into a variant by `row_variant`.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not YAML of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no study at {str(path)!r}: there is no such file; check the path")
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected a study in YAML, got invalid text in {str(path)!r}: {reason}") from error
    if not isinstance(data, dict) or list(data) != ["rows"] or not isinstance(data["rows"], list) or not data["rows"]:
        raise ValueError(f"expected a study with the one key rows, a list, in {str(path)!r}; see docs/evaluate.md")
    rows = [row for entry in data["rows"] for row in _expand(entry, path)]
    return [{**row, "recipe": str(path.parent / row["recipe"])} if "recipe" in row else row for row in rows]


def _expand(entry, path: Path) -> list[dict]:
    if not isinstance(entry, dict) or not ({"pattern", "recipe"} & set(entry)):
        raise ValueError(
            f"expected every row of {str(path)!r} to be a mapping with a pattern or a recipe, got {entry!r}"
        )
    unknown = next((key for key in entry if key not in _KEYS), None)
    if unknown is not None:
        raise ValueError(f"expected the keys of a row among {', '.join(_KEYS)}, got {unknown!r} in {str(path)!r}")
    _check_values(entry, path)
    fixed = {key: value for key, value in entry.items() if key not in _AXES}
    axes = {key: _values(key, entry[key]) for key in _AXES if key in entry}
    return [{**dict(zip(axes, chosen, strict=True)), **fixed} for chosen in itertools.product(*axes.values())]


def _check_values(entry: dict, path: Path) -> None:
    if "recipe" in entry:
        beside = next((key for key in entry if key not in _RECIPE_KEYS), None)
        if beside is not None:
            raise ValueError(
                f"expected beside recipe only {', '.join(_RECIPE_KEYS[1:])}, got {beside!r} in {str(path)!r}; "
                "write it into the recipe"
            )
        layers = next(
            (name for name in _values("layers", entry.get("layers", "all")) if name not in _RECIPE_LAYERS), None
        )
        if layers is not None:
            raise ValueError(
                f"expected layers of a recipe's row among {', '.join(_RECIPE_LAYERS)}, got {layers!r} in {str(path)!r}"
            )
    seed, calibrated = entry.get("seed", 0), entry.get("calibrated", False)
    if type(seed) is not int or type(calibrated) is not bool:
        wrong = f"seed {seed!r}" if type(seed) is not int else f"calibrated {calibrated!r}"
        raise ValueError(f"expected an integer seed and calibrated true or false, got {wrong} in {str(path)!r}")


def _values(key: str, value) -> list:
    if key == "mitigation":  # [var] is one mitigation, [[var], [dpts-mean, var]] are two
        value = value if isinstance(value, list) else [value]
        return value if value and all(isinstance(item, list) for item in value) else [value]
    return value if isinstance(value, list) else [value]


def row_variant(row: dict) -> Variant:
    """Variant of one row of `load_study`; ValueError if a name in it is unknown."""
    fields = {key: row[key] for key in ("calibrated", "seed") if key in row}
    if "recipe" in row:
        extra = {"layers": row["layers"]} if "layers" in row else {}
        return from_recipe(Recipe.load(row["recipe"]), Path(row["recipe"]).stem, **extra, **fields)
    layers = row.get("layers", "all")
    if layers not in POLICIES:
        raise ValueError(f"expected layers among {', '.join(POLICIES)}, got {layers!r}; or name a recipe")
    chosen = {key: row[key] for key in ("pattern", "criterion", "mitigation", "dense_first_tokens") if key in row}
    return from_recipe(Recipe(projections=POLICIES[layers], **chosen), layers=layers, **fields)
