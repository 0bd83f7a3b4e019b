"""Variants of one dense model: the dense one, sparse copies by a recipe, and calibrated copies, side by side."""

import copy
import dataclasses
import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ...conversion.calibration import check_calibration, load_calibration
from ...conversion.sparsify import SparsifyReport, check_recipe, sparsify
from ...layers.linear import sparse_layers
from ...recipe import LinearSpec, Recipe
from ..policies import policy_of


@dataclass(frozen=True)
class Variant:
    """One row of a study: the dense model, a recipe, or a calibration."""

    name: str  # unique in a study
    method: str  # criterion and mitigations, "wina+var" or "act+first-1"; "mixed" where layers differ
    pattern: str  # "2:4", ...; "mixed" where layers differ
    layers: str  # "all", "amber", "alanova", "search" or "custom"
    recipe: Recipe | None = None  # None for the dense model
    calibrated: bool = False  # whether nm-act calibrate made its data
    seed: int = 0  # of the calibration
    calibration: str = ""  # SHA-256 of the calibration's data
    calibrated_on: str = ""  # text and training of the calibration
    folder: Path | None = None  # of the calibration; not part of a result

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of the fields, without the folder."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}
        return {**values, "recipe": None if self.recipe is None else self.recipe.to_dict()}

    @property
    def slug(self) -> str:
        """The name as a file or folder name."""
        return "".join(c if c.isalnum() or c in "+-." else "-" for c in self.name.replace(":", "x").replace("%", "pct"))

    def check(self, dense: nn.Module) -> None:
        """Raise the ValueError that `make` would raise, before any work."""
        if self.recipe is not None:
            check_recipe(dense, self.recipe)
        if self.folder is not None:
            check_calibration(dense, self.folder)

    def make(self, dense: nn.Module) -> SparsifyReport:
        """The variant as ``report.model``; it shares all layers that stay dense with the dense model."""
        if self.recipe is None:
            return SparsifyReport(dense, None)  # type: ignore[arg-type]  # the dense model has no recipe
        return sparse_copy(dense, self.recipe) if self.folder is None else calibrated_copy(dense, self.folder)


DENSE_VARIANT = Variant("dense", "dense", "dense", "all")


def from_recipe(recipe: Recipe, name: str | None = None, **fields: Any) -> Variant:
    """Variant of a recipe; its name and fields follow from the recipe unless they are given.

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
    return Variant(name, method, pattern, layers, recipe, **fields)


def resolved(recipe: Recipe) -> set[LinearSpec]:
    """All specs that a recipe may give to a layer."""
    named = {*recipe.skip_layers, *(layer for rule in recipe.rules for layer in rule.layers or ())}
    projections = {*recipe.projections, *(name for rule in recipe.rules for name in rule.projections or ())}
    places = itertools.product([*named, max(named, default=-1) + 1], projections)
    specs = {recipe.resolve(layer, projection) for layer, projection in places}
    return {spec for spec in specs if spec is not None}


def sparse_copy(model: nn.Module, recipe: Recipe) -> SparsifyReport:
    """Sparsify a copy of a dense model, which itself is unchanged: ``report.model`` is the sparse copy.

    The copy shares embeddings, norms and every layer that stays dense with `model`; only the layers that become sparse
    take memory of their own, because they store their weight in another order. Raises ValueError if the recipe names
    nothing that the model has, or the model is already sparse.
    """
    return sparsify(_shared_copy(model), recipe)


def calibrated_copy(model: nn.Module, folder: str | Path) -> SparsifyReport:
    """`sparse_copy` with the recipe and the data of a calibration (:func:`nm_act.load_calibration`)."""
    return load_calibration(_shared_copy(model), folder)


def prunes_in_decode_only(recipe: Recipe | None) -> bool:
    """Whether a recipe may give some layer the phase "decode", so that perplexity, which is prefill, would not see it.

    Examples
    --------
    >>> prunes_in_decode_only(Recipe.named("decode")), prunes_in_decode_only(Recipe("2:4"))
    (True, False)
    """
    return recipe is not None and any(spec.phase == "decode" for spec in resolved(recipe))


def every_token_sparse(report: SparsifyReport) -> SparsifyReport:
    """The same report after its layers of phase "decode" were made sparse in prefill too."""
    for layer in sparse_layers(report.model).values():
        if layer.spec.phase == "decode":
            layer.spec = dataclasses.replace(layer.spec, phase="both")
    return report


def _shared_copy(model: nn.Module) -> nn.Module:
    # A memo that maps every tensor to itself makes deepcopy rebuild the modules around the same tensors.
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
