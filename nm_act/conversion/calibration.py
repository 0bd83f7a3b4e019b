"""Calibrations on disk: a folder with the recipe, the data as safetensors, and a record of how they were made."""

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from ..files import write_atomic
from ..layers.linear import NMLinear, sparse_layers
from ..methods import mitigations
from ..optimize.model import refuse_optimized
from ..recipe import LinearSpec, Recipe
from ..supported import require
from .fingerprint import weights_fingerprint
from .permutation import check_order, fold_order
from .sparsify import SparsifyReport, resolved_specs, sparsify

RECIPE_FILE = "recipe.yaml"
DATA_FILE = "calibration.safetensors"
FACTS_FILE = "calibration.json"
"""How the data were made, including the seed."""

_FORMAT = "nm_act calibration 1"
_ROUNDED = {"weights": torch.bfloat16, "weights_float16": torch.float16}
"""Fingerprint in the header -> dtype that the weights are rounded to, so that a calibration fits any dtype."""


def save_calibration(model: nn.Module, folder: str | os.PathLike[str], **facts: str) -> None:
    """Write the calibrated data and the recipe of a sparse model into a folder, which must exist.

    The data file, whose header contains ``facts``, is written last, so a folder without it is unfinished. Raises
    ValueError if the model is not sparse, or some layer is not calibrated.
    """
    recipe = getattr(model, "nm_act_recipe", None)
    if recipe is None:
        raise ValueError("expected a sparse model, got one without a recipe; calibrate it first")
    tensors = {}
    for name, layer in sparse_layers(model).items():
        for key, value in layer.data().items():
            if value.isnan().any():
                raise ValueError(f"expected calibrated layers, got no {key} in {name}; calibrate the model first")
            tensors[f"{name}.{key}"] = value.detach().cpu().contiguous()
    header = {"format": _FORMAT, "architecture": architecture(model), "model": describe(model)}
    header |= _weights_header(model) | facts
    recipe.save(Path(folder) / RECIPE_FILE)
    write_atomic(Path(folder) / DATA_FILE, require("safetensors.torch", "transformers").save(tensors, header))


def load_calibration(model: nn.Module, folder: str | os.PathLike[str]) -> SparsifyReport:
    """Make a dense model sparse with the recipe and the data of a calibration.

    Parameters
    ----------
    model : nn.Module
        The dense model that the calibration was made for, in any dtype; changed in place.
    folder : path
        Written by :func:`save_calibration` or ``nm-act calibrate``.

    Returns
    -------
    SparsifyReport
        With the sparse, calibrated model as ``.model``.

    Raises
    ------
    FileNotFoundError
        If there is no finished calibration in the folder.
    ValueError
        If it was made for another model or other weights, or its files are damaged. The model is then unchanged.
    """
    recipe, tensors = check_calibration(model, folder)
    original = dense_weights(model) if any(name.endswith(".input_order") for name in tensors) else {}
    report = sparsify(model, recipe)
    set_layers(report.model, sparse_layers(report.model), tensors)
    report.model.nm_act_dense_weights = original  # type: ignore[assignment]  # for save_calibration, where orders have changed the weights
    return report


def dense_weights(model: nn.Module) -> dict[str, str]:
    """The fingerprints of a dense model's weights that :func:`save_calibration` writes into the header."""
    return {key: weights_fingerprint(model, dtype) for key, dtype in _ROUNDED.items()}


def _weights_header(model: nn.Module) -> dict[str, str]:
    if not any(is_reordered(layer) for layer in sparse_layers(model).values()):
        return dense_weights(model)  # which the sparse layers share
    return getattr(model, "nm_act_dense_weights", {}) | {"folded": weights_fingerprint(model)}


def is_reordered(layer: NMLinear) -> bool:
    """Whether an order of input channels other than their own is folded into a layer's weight."""
    order = layer.data().get("input_order")
    return order is not None and not torch.equal(order.long(), torch.arange(len(order), device=order.device))


def _check_weights(model: nn.Module, header: dict[str, str], folder: Path) -> None:
    """Compare the model's weights with those of the calibration; old calibrations have no fingerprint."""
    known = {key: header[key] for key in _ROUNDED if key in header}
    if not known and "folded" not in header:
        return
    own = weights_fingerprint(model)
    if own == header.get("folded"):
        raise ValueError(
            f"expected the dense model that {str(folder)!r} was calibrated on, got its weights after permute has "
            "reordered them; name the original model"
        )
    if known and all(weights_fingerprint(model, _ROUNDED[key]) != value for key, value in known.items()):
        raise ValueError(
            f"expected the model that {str(folder)!r} was calibrated on, got other weights of the same shapes; name "
            "that model or calibrate this one"
        )


def check_calibration(model: nn.Module, folder: str | os.PathLike[str]) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """Recipe and tensors of a calibration; raises what :func:`load_calibration` would raise, and changes nothing."""
    refuse_optimized(model)
    folder = Path(folder)
    recipe, tensors, header = read_calibration(folder)
    if header.get("architecture") != architecture(model):
        raise ValueError(
            f"expected the model that {str(folder)!r} was calibrated for, {header.get('model')}, got "
            f"{describe(model)}; name that model or calibrate this one"
        )
    specs = resolved_specs(model, recipe)
    _check_weights(model, header, folder)
    _check_tensors(model, specs, tensors, folder)
    return recipe, tensors


def _check_tensors(
    model: nn.Module, specs: dict[str, LinearSpec], tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    """Compare the data's names and shapes with those that the layers need; a shared layer counts under one name."""
    modules = {name: module for name, module in model.named_modules() if name in specs}
    needed = {
        f"{name}.{key}": mitigations.shape_of(key, module.in_features, module.out_features, rank)
        for name, module in modules.items()
        for rank in [mitigations.rank_of(specs[name].mitigation)]
        for key in mitigations.data_of(specs[name])
    }
    for name in sorted(needed.keys() | tensors.keys()):
        got = list(tensors[name].shape) if name in tensors else "none"
        wanted = list(needed[name]) if name in needed else "none"
        if got != wanted:
            raise ValueError(
                f"expected in {str(folder)!r} the data of its recipe's layers, for {name} {wanted}, got {got}; "
                "calibrate again"
            )
    for name, value in tensors.items():
        layer, _, key = name.rpartition(".")
        if key == "input_order":
            check_order(*_in_block(model, layer), value)
        elif not value.isfinite().all():
            raise ValueError(f"expected finite numbers in {str(folder)!r}, got others in {name}; calibrate again")


def _in_block(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """A layer's decoder block, and its name in there: "mlp.down_proj"."""
    parent, _, child = name.rpartition(".")
    block, _, inner = parent.rpartition(".")
    return model.get_submodule(block), f"{inner}.{child}"


def set_layers(model: nn.Module, layers: dict[str, NMLinear], tensors: dict[str, torch.Tensor]) -> None:
    """Set the calibrated data of sparse layers, after folding the orders of input channels into the weights."""
    for name in layers:
        if f"{name}.input_order" in tensors:
            fold_order(*_in_block(model, name), tensors[f"{name}.input_order"])
    for name, layer in layers.items():
        layer.set_data(**{key: tensors[f"{name}.{key}"] for key in layer.data()})


def read_calibration(folder: Path) -> tuple[Recipe, dict[str, torch.Tensor], dict[str, str]]:
    """Recipe, tensors and header of a calibration; an error of one sentence if the folder has none."""
    path = folder / DATA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no finished calibration at {str(folder)!r}: there is no {DATA_FILE}; make one with nm-act calibrate"
        )
    recipe = Recipe.load(folder / RECIPE_FILE)
    safetensors = require("safetensors", "transformers")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
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
    """The model in a few words, for error messages."""
    return f"{type(model).__name__} with {sum(value.numel() for value in model.parameters()):,} parameters"
