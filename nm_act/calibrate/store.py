"""Calibrations on disk: one folder with the recipe, the data as safetensors, and what they were made with."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .. import mitigations
from ..files import write_atomic
from ..linear import NMLinear
from ..optimize.model import refuse_optimized
from ..recipe import Recipe
from ..sparsify import SparsifyReport, check_recipe, sparsify
from .permute import fold_order

RECIPE_FILE = "recipe.yaml"
DATA_FILE = "calibration.safetensors"
_FORMAT = "nm_act calibration 1"


def save_calibration(model: nn.Module, folder, **facts: str) -> None:
    """Write the calibrated data and the recipe of a sparse model into a folder.

    Parameters
    ----------
    model : nn.Module
        A calibrated sparse model.
    folder : path
        Must exist. The data file comes last, so a folder without it is not finished.
    **facts : str
        Kept in the data file's header.

    Raises
    ------
    ValueError
        If the model is not sparse, or some layer is not calibrated.
    """
    recipe = getattr(model, "nm_act_recipe", None)
    if recipe is None:
        raise ValueError("expected a sparse model, got one without a recipe; calibrate it first")
    tensors = {}
    for name, layer in _sparse_layers(model).items():
        for key, value in layer.data().items():
            if value.isnan().any():
                raise ValueError(f"expected calibrated layers, got no {key} in {name}; calibrate the model first")
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    header = {"format": _FORMAT, "architecture": architecture(model), "model": describe(model), **facts}
    recipe.save(Path(folder) / RECIPE_FILE)
    write_atomic(Path(folder) / DATA_FILE, save(tensors, header))


def load_calibration(model: nn.Module, folder) -> SparsifyReport:
    """Make a dense model sparse with the recipe and the data of a calibration.

    Parameters
    ----------
    model : nn.Module
        The dense model that the calibration was made for, in any dtype; changed in place.
    folder : path
        As :func:`save_calibration` or ``nm-act calibrate`` wrote it.

    Returns
    -------
    SparsifyReport
        With the sparse, calibrated model as ``.model``.

    Raises
    ------
    FileNotFoundError
        If there is no finished calibration in the folder.
    ValueError
        If it was made for another model, or its files are damaged. The model is unchanged then.
    """
    recipe, tensors = check_calibration(model, folder)
    report = sparsify(model, recipe)
    layers = _sparse_layers(report.model)
    for name, layer in layers.items():
        missing = next((key for key in layer.data() if f"{name}.{key}" not in tensors), None)
        if missing is not None:
            raise ValueError(
                f"expected calibrated data for every sparse layer in {str(folder)!r}, got no {missing} for {name}; "
                "calibrate again"
            )
    set_layers(report.model, layers, tensors)
    return report


def check_calibration(model: nn.Module, folder) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """Recipe and tensors of a calibration; raises what :func:`load_calibration` would, and changes nothing."""
    refuse_optimized(model)
    folder = Path(folder)
    recipe, tensors, header = read_calibration(folder)
    if header.get("architecture") != architecture(model):
        raise ValueError(
            f"expected the model that {str(folder)!r} was calibrated for, {header.get('model')}, got "
            f"{describe(model)}; name that model or calibrate this one"
        )
    check_recipe(model, recipe)
    return recipe, tensors


def set_layers(model: nn.Module, layers: dict[str, NMLinear], tensors: dict[str, torch.Tensor]) -> None:
    """Give sparse layers their calibrated data; orders of input channels are folded into the weights first."""
    for name in layers:
        if f"{name}.input_order" in tensors:
            parent, _, child = name.rpartition(".")
            block, _, inner = parent.rpartition(".")
            fold_order(model.get_submodule(block), f"{inner}.{child}", tensors[f"{name}.input_order"])
    for name, layer in layers.items():
        layer.set_data(**{key: tensors[f"{name}.{key}"] for key in layer.data()})


def read_calibration(folder: Path) -> tuple[Recipe, dict[str, torch.Tensor], dict[str, str]]:
    """Recipe, tensors and header of a calibration; one sentence for a folder that holds none."""
    path = folder / DATA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no finished calibration at {str(folder)!r}: there is no {DATA_FILE}; make one with nm-act calibrate"
        )
    recipe = Recipe.load(folder / RECIPE_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"expected safetensors in {str(path)!r}, got a damaged file; calibrate again") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"expected {_FORMAT!r} in {str(path)!r}, got {header.get('format')!r}; calibrate with this version"
        )
    return recipe, tensors, header


def architecture(model: nn.Module) -> str:
    """Digest of the parameters' names and shapes: equal for a dense model and its sparse form, in any dtype."""
    shapes = sorted((name, list(value.shape)) for name, value in model.named_parameters())
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def describe(model: nn.Module) -> str:
    """The model in a few words, for error sentences."""
    return f"{type(model).__name__} with {sum(value.numel() for value in model.parameters()):,} parameters"


def is_calibrated(recipe: Recipe) -> bool:
    """Whether any layer of the recipe needs calibrated data."""
    names = [*recipe.mitigation, *(name for rule in recipe.rules for name in rule.mitigation or ())]
    criteria = (recipe.criterion, *(rule.criterion for rule in recipe.rules))
    return "wanda" in criteria or any(mitigations.mitigation(name).data for name in names)


def _sparse_layers(model: nn.Module) -> dict[str, NMLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}
