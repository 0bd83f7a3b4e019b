"""The options of a layer in a search: specs from the command line, and the calibrated data of those that need some."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...conversion.calibration import check_calibration, set_layers
from ...layers.linear import sparse_layers
from ...methods.criteria import CRITERIA
from ...methods.mitigations import data_of
from ...patterns import as_pattern
from ...recipe import LinearSpec, Recipe
from ..evaluate.calibrated import calibrated_row
from ..evaluate.variants import Variant, from_recipe, sparse_copy


@dataclass(frozen=True)
class CalibratedData:
    """One option's calibrated data."""

    tensors: dict[str, torch.Tensor]  # "layer.key" -> data of all layers, as nm_act.methods.mitigations.DATA says
    digest: str  # SHA-256 of their file
    seed: int = 0  # of their calibration


def parse_option(text: str) -> LinearSpec:
    """Spec from "PATTERN [CRITERION] [MITIGATION ...]", as specs are printed.

    Raises ValueError if the text is no spec, or if the spec reorders weights (``permute``): several layers share an
    order, but may get different options.

    Examples
    --------
    >>> str(parse_option("2:4 var"))
    '2:4 act var'
    """
    pattern, *names = text.split() or [""]
    criteria = [name for name in names if name in CRITERIA]
    if len(criteria) > 1:
        raise ValueError(f"expected at most one criterion in the option {text!r}, got {', '.join(criteria)}")
    mitigation = tuple(name for name in names if name not in CRITERIA)
    scores: dict[str, Any] = {"criterion": criteria[0]} if criteria else {}
    spec = LinearSpec(as_pattern(pattern), mitigation=mitigation, **scores)
    if "input_order" in data_of(spec):
        raise ValueError(
            f"expected an option that leaves weights as they are, got {str(spec)!r}; leave permute out and calibrate "
            "the recipe that is found with it"
        )
    return spec


def option_name(spec: LinearSpec) -> str:
    """Name of the option that a layer has, whatever the phase."""
    return str(dataclasses.replace(spec, phase="both"))


def option_recipe(spec: LinearSpec, **fields: Any) -> Recipe:
    """Recipe that gives a spec to every projection, or to those in `fields`."""
    return Recipe(pattern=str(spec.pattern), criterion=spec.criterion, mitigation=spec.mitigation, **fields)


def find_calibrations(specs: dict[str, LinearSpec], calibrated: Path | None) -> dict[str, Variant]:
    """Option -> its calibration, for the options that need one.

    The folder `calibrated` has a folder of ``nm-act calibrate`` for each, with all layers alike, as for
    ``nm-act eval --study``. Raises FileNotFoundError if one is missing, ValueError if it is of another recipe or if the
    seeds differ.
    """
    found = {
        name: calibrated_row(from_recipe(option_recipe(spec)), calibrated)
        for name, spec in specs.items()
        if data_of(spec)
    }
    seeds = sorted({variant.seed for variant in found.values()})
    if len(seeds) > 1:
        raise ValueError(f"expected calibrations with one seed, got {seeds}; calibrate the options alike")
    return found


def read_data(model: nn.Module, specs: dict[str, LinearSpec], calibrated: Path | None) -> dict[str, CalibratedData]:
    """Option -> data of its calibration (`find_calibrations`); ValueError if it was made for another model."""
    data = {}
    for name, found in find_calibrations(specs, calibrated).items():
        assert found.folder is not None  # else it were no calibration
        data[name] = CalibratedData(check_calibration(model, found.folder)[1], found.calibration, found.seed)
    return data


def option_variant(model: nn.Module, recipe: Recipe, calibrated: dict[str, CalibratedData]) -> nn.Module:
    """Sparse copy of the dense model with a recipe of options, each layer with the data of its own.

    `calibrated` has the data of every option in the recipe that needs some.
    """
    variant = sparse_copy(model, recipe).model
    for name, layer in sparse_layers(variant).items():
        if layer.data():
            set_layers(variant, {name: layer}, calibrated[option_name(layer.spec)].tensors)
    return variant
