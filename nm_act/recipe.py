"""Recipes: data (YAML, JSON) that say which layer gets which pattern, criterion and mitigation."""

import dataclasses
import difflib
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import write_atomic
from .methods.criteria import CRITERIA, check_criterion
from .patterns import NMPattern, as_pattern
from .roles import DEFAULT_PROJECTIONS, ROLES
from .spec import LinearSpec, check_list, check_phase, read_mitigation

__all__ = ["DEFAULT_PROJECTIONS", "DENSE", "NAMED", "ROLES", "LinearSpec", "Recipe", "Rule", "in_state_space"]

DENSE = "dense"
"""Written in place of a pattern where nothing is pruned."""


@dataclass(frozen=True)
class Rule:
    """A refinement of a recipe for some layers and projections; a field left None keeps the earlier value.

    A rule that sets none of the fields from `pattern` on has no effect, which causes a warning: an error would refuse
    saved checkpoints and calibrations, which are read as recipes of users are.

    Parameters
    ----------
    layers : sequence of int, optional
        Decoder layers it applies to; all of them if None.
    projections : sequence of str, optional
        Projections it applies to; all of the recipe's if None. With the recipe's default projections, it may name those
        of several families: a model has to have one of them.
    pattern : str or NMPattern, optional
        "N:M", "2:4+1" or "2:4+2", a percentage such as "50%", or "dense".
    criterion, mitigation, phase, decode_pattern : optional
        As in :class:`LinearSpec`.
    """

    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] | None = None
    pattern: str | None = None
    criterion: str | None = None
    mitigation: tuple[str, ...] | None = None
    phase: str | None = None
    decode_pattern: str | None = None

    def __post_init__(self) -> None:
        _normalise(
            self,
            layers=_layers,
            projections=_names,
            pattern=_pattern,
            mitigation=read_mitigation,
            decode_pattern=_decode_pattern,
        )
        if self.criterion is not None:
            check_criterion(self.criterion)
        if self.phase is not None:
            check_phase(self.phase)
        if all(getattr(self, name) is None for name in _SPEC_FIELDS):
            where = ", ".join(f"{name} {value}" for name, value in self.to_dict().items()) or "all layers"
            warnings.warn(
                f"expected a rule that sets a pattern, criterion or the like, got one for {where} that sets nothing "
                f'and has no effect; write pattern: "{DENSE}" to leave these layers dense, or remove it',
                stacklevel=3,
            )

    def matches(self, layer: int, projection: str) -> bool:
        """Whether the rule applies to a projection of a layer."""
        in_layers = self.layers is None or layer in self.layers
        return in_layers and (self.projections is None or projection in self.projections)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Rule":
        """Rule from a plain mapping; ValueError for an unknown key."""
        return cls(**_checked_keys(cls, data, "a rule"))

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of the fields that are set."""
        return {key: value for key, value in _plain(self).items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """Which linear layers of a decoder become sparse, and how.

    Parameters
    ----------
    pattern : str or NMPattern
        "N:M", "2:4+1" or "2:4+2", a percentage kept by unstructured top-k such as "50%", or "dense" where only the
        rules prune.
    projections : sequence of str
        Last name components of the layers in scope, e.g. "down_proj"; everything else stays dense. The default, the
        seven projections of a Llama-like block, stands for the whole block of any family: every projection in
        :data:`ROLES`. Any other list is matched name by name.
    criterion, mitigation, phase, decode_pattern
        Defaults of every layer in scope, as in :class:`LinearSpec`.
    dense_first_tokens : int
        Number of first tokens of every sequence (attention sinks) that are computed dense.
    skip_layers : sequence of int
        Decoder layers that stay dense, whatever the rules say.
    rules : sequence of Rule
        Refinements in order: for each field, the last rule that matches and sets it wins.
    version : int
        Format version, 1.

    Raises
    ------
    ValueError
        For an unknown key, name, pattern or version; the message names what is allowed.

    Examples
    --------
    >>> recipe = Recipe("8:16", skip_layers=[0], rules=[Rule(projections=["down_proj"], pattern="2:4")])
    >>> str(recipe.resolve(1, "down_proj")), str(recipe.resolve(1, "q_proj")), recipe.resolve(0, "q_proj")
    ('2:4 act', '8:16 act', None)
    """

    pattern: str
    projections: tuple[str, ...] = DEFAULT_PROJECTIONS
    criterion: str = "act"
    mitigation: tuple[str, ...] = ()
    phase: str = "both"
    dense_first_tokens: int = 0
    skip_layers: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    decode_pattern: str | None = None
    version: int = 1

    def __post_init__(self) -> None:
        _check_version(self.version)
        fields = (field.name for field in dataclasses.fields(self) if field.default is not None)
        empty = next((name for name in fields if getattr(self, name) is None), None)
        if empty is not None:  # only a rule's field may be None: it keeps the earlier value
            raise ValueError(f"expected a value for {empty} of a recipe, got none (null); write one or leave it out")
        _normalise(
            self,
            pattern=_pattern,
            projections=_names,
            mitigation=read_mitigation,
            skip_layers=_layers,
            rules=_rules,
            decode_pattern=_decode_pattern,
        )
        if not self.projections:
            raise ValueError(
                "expected at least one projection, got none; leave projections out to take the usual seven"
            )
        check_criterion(self.criterion)
        check_phase(self.phase)
        if not _is_count(self.dense_first_tokens):
            raise ValueError(
                f"expected dense_first_tokens to be an integer >= 0, got {self.dense_first_tokens!r}; "
                "use 0 to treat all tokens alike"
            )
        for rule in self.rules:
            outside = [name for name in rule.projections or () if not self.covers(name)]
            if outside:
                raise ValueError(
                    f"expected a rule's projections among the recipe's ({', '.join(self.projections)}), got "
                    f"{outside[0]!r}; add it to the recipe's projections"
                )

    def covers(self, projection: str) -> bool:
        """Whether layers of that name are in scope."""
        return projection in (ROLES if self.projections == DEFAULT_PROJECTIONS else self.projections)

    def resolve(self, layer: int, projection: str) -> LinearSpec | None:
        """Spec of one projection of one decoder layer; None where it stays dense."""
        if layer in self.skip_layers or not self.covers(projection):
            return None
        fields = {name: getattr(self, name) for name in _SPEC_FIELDS}
        for rule in self.rules:
            if rule.matches(layer, projection):
                chosen = {name: getattr(rule, name) for name in _SPEC_FIELDS}
                fields.update({name: value for name, value in chosen.items() if value is not None})
        return None if fields["pattern"] == DENSE else LinearSpec(**fields)

    @property
    def needs_token_context(self) -> bool:
        """Whether layers have to know where sequences start and which tokens are padding."""
        named = (self.criterion, *(rule.criterion for rule in self.rules))
        return bool(self.dense_first_tokens) or any(CRITERIA[name].by_sequence for name in named if name is not None)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """Recipe from a plain mapping; ValueError names an unknown key, the allowed ones and the nearest."""
        if isinstance(data, dict):  # before the keys: a newer version may have keys that this one does not know
            _check_version(data.get("version", 1))
        fields = _checked_keys(cls, data, "a recipe")
        if "pattern" not in fields:
            raise ValueError('expected a recipe with a pattern, got none; add for example pattern: "8:16"')
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping (lists, strings, integers) that :meth:`from_dict` reads back."""
        fields = {"version": self.version, **_plain(self), "rules": [rule.to_dict() for rule in self.rules]}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a JSON file; ValueError if it is not valid JSON or not a recipe."""
        try:
            data = json.loads(_text_of(path))
        except ValueError as error:
            raise ValueError(f"expected a recipe in JSON, got invalid text in {path}: {_one_line(error)}") from error
        return cls.from_dict(data)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomic(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a YAML file (patterns need no quotes); ValueError if it is not valid YAML or not a recipe."""
        from .yaml_text import YAMLError, load_yaml  # needs PyYAML, which recipes made in Python do not

        try:
            data = load_yaml(_text_of(path))
        except (YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"expected a recipe in YAML, got invalid text in {path}: {_one_line(error)}") from error
        return cls.from_dict(data)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write a YAML file, whole or not at all."""
        from .yaml_text import dump_yaml

        write_atomic(path, dump_yaml(self.to_dict()))

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """A recommended recipe for any model; ValueError if there is none of that name (docs/recipes.md).

        Parameters
        ----------
        name : {"prefill", "decode", "balanced"}
            What to make faster: reading prompts, writing answers for few sequences at once, or both.

        Examples
        --------
        >>> str(Recipe.named("decode").resolve(0, "q_proj"))
        '20:32 act (decode only)'
        """
        if name not in NAMED:
            raise ValueError(f"expected a name among {', '.join(NAMED)}, got {name!r}; or load a recipe file")
        return NAMED[name]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe file (.yaml, .yml or .json; the suffix decides the format), or take a name of :meth:`named`."""
        if str(path) in NAMED:
            return cls.named(str(path))
        return cls.from_json(path) if _suffix(path) == ".json" else cls.from_yaml(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe; the suffix (.yaml, .yml or .json) decides the format."""
        self.to_json(path) if _suffix(path) == ".json" else self.to_yaml(path)


def _text_of(path: str | os.PathLike[str]) -> str:
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no file there"
        raise FileNotFoundError(
            f"expected a recipe file, got {str(path)!r} ({found}); give its path, or one of {', '.join(NAMED)}"
        )
    return Path(path).read_text(encoding="utf-8")


def _of_roles(*roles: str) -> tuple[str, ...]:
    """The projections of any family that have one of these roles."""
    return tuple(name for name, own in ROLES.items() if set(own) & set(roles))


def in_state_space(name: str) -> bool:
    """Whether a layer's name is that of a state-space mixer's output, whose kernels may be handed the weight alone.

    A recipe with the default projections leaves such a layer out; one that lists ``out_proj`` has it.

    Examples
    --------
    >>> in_state_space("layers.0.mixer.out_proj"), in_state_space("layers.0.self_attn.out_proj")
    (True, False)
    """
    parent, _, last = name.rpartition(".")
    return last == "out_proj" and "att" not in parent.rpartition(".")[2]


_SPEC_FIELDS = tuple(field.name for field in dataclasses.fields(LinearSpec))


def _normalise(instance: object, **converters: Callable[[Any], Any]) -> None:
    for name, convert in converters.items():
        value = getattr(instance, name)
        if value is not None:
            object.__setattr__(instance, name, convert(value))


def _pattern(value: Any) -> str:
    return DENSE if value == DENSE else str(as_pattern(value))


def _decode_pattern(value: Any) -> str:
    return str(NMPattern(value))


def _names(value: Any) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in check_list(value, "projections")):
        raise ValueError(f'expected projections as a list of names such as ["down_proj"], got {value!r}; use names')
    return tuple(value)


def _layers(value: Any) -> tuple[int, ...]:
    if not all(map(_is_count, check_list(value, "layers"))):
        raise ValueError(f"expected layers as a list of integers >= 0 such as [0, 29], got {value!r}; use integers")
    return tuple(value)


def _rules(value: Any) -> tuple[Rule, ...]:
    return tuple(rule if isinstance(rule, Rule) else Rule.from_dict(rule) for rule in check_list(value, "rules"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_version(version: Any) -> None:
    if version != 1:
        raise ValueError(f"expected recipe version 1, got {version!r}; upgrade nm_act")


def _checked_keys(cls: type[Any], data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"expected {what} as a mapping of fields, got {type(data).__name__}; see docs/recipes.md")
    allowed = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in allowed:
            nearest = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "; remove it"
            raise ValueError(f"expected the keys of {what} among {', '.join(allowed)}, got {key!r}{hint}")
    return data


def _plain(instance: Any) -> dict[str, Any]:
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        remedy = f"write pattern={str(path)!r}" if re.fullmatch(r"\d+:\d+.*", str(path)) else "rename it"
        raise ValueError(f"expected a recipe file ending in .yaml, .yml or .json, got {str(path)!r}; {remedy}")
    return suffix


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_SPARED = Rule(projections=_of_roles("k_proj", "v_proj", "o_proj", "up_proj"), pattern=DENSE)
# Some families call two layers c_proj, which then has the pattern of o_proj.
_LESS_KEPT = (
    Rule(projections=_of_roles("down_proj"), pattern="14:32"),
    Rule(projections=_of_roles("o_proj"), pattern="20:32"),
)

NAMED: dict[str, Recipe] = {
    "prefill": Recipe("2:4", criterion="wina", mitigation=("var",), phase="prefill", rules=(_SPARED,)),
    "decode": Recipe("20:32", phase="decode", rules=_LESS_KEPT),
    "balanced": Recipe("2:4", criterion="wina", mitigation=("var",), rules=(_SPARED,)),
}
"""Name -> recommended recipe: rules by projection for any model, chosen on SmolLM2 and C4 (docs/recipes.md)."""
