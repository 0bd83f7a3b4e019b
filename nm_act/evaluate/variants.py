"""Sparse variants of one dense model side by side."""

import copy

from torch import nn

from ..recipe import Recipe
from ..sparsify import SparsifyReport, sparsify

__all__ = ["sparse_copy"]


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
    # A memo that maps every tensor to itself makes deepcopy rebuild the modules around the same tensors.
    shared = {id(tensor): tensor for tensor in model.parameters()}
    shared |= {id(tensor): tensor for tensor in model.buffers()}
    return sparsify(copy.deepcopy(model, shared), recipe)
