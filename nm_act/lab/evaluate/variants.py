"""Sparse variants of one dense model side by side."""

import copy

from torch import nn

from ...conversion.calibration import load_calibration
from ...conversion.sparsify import SparsifyReport, sparsify
from ...recipe import Recipe

__all__ = ["calibrated_copy", "sparse_copy"]


def sparse_copy(model: nn.Module, recipe: Recipe) -> SparsifyReport:
    """Sparsify a copy of `model`, so that the dense model stays what it is.

    The copy shares embeddings, norms and every layer that stays dense with `model`; only the layers that
    become sparse hold memory of their own, because they store their weight in another order.

    Parameters
    ----------
    model : torch.nn.Module
        The dense model; it is not changed.
    recipe : Recipe
        What to make sparse.

    Returns
    -------
    SparsifyReport
        What was replaced and what was not; ``report.model`` is the sparse copy.

    Raises
    ------
    ValueError
        If the recipe names nothing that the model has, or the model is sparse already.
    """
    return sparsify(_shared_copy(model), recipe)


def calibrated_copy(model: nn.Module, folder) -> SparsifyReport:
    """`sparse_copy` with the recipe and the data of a calibration (:func:`nm_act.load_calibration`)."""
    return load_calibration(_shared_copy(model), folder)


def _shared_copy(model: nn.Module) -> nn.Module:
    # A memo that maps every tensor to itself makes deepcopy rebuild the modules around the same tensors.
    shared = {id(tensor): tensor for tensor in model.parameters()}
    shared |= {id(tensor): tensor for tensor in model.buffers()}
    return copy.deepcopy(model, shared)
