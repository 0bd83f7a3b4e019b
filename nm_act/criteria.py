"""Selection criteria: static channel scales computed once from a layer's weight.

Every criterion scores an activation as ``S_ij = |X_ij| * c_j``; they differ in the channel
scale ``c [in]`` only.

==========  ================================================================================
name        ``c_j`` for ``W [out, in]``
==========  ================================================================================
act         1 (magnitude alone)
wina        ``||W_:j||_2`` (WINA, R-Sparse, Wanda-like)
variance    ``Var(W_:j)``, population variance
amber       ``||V_:j||_2``; V is W standardised without its entries beyond the [0.5 %, 99.5 %]
            quantiles, which count as 0
==========  ================================================================================

Scales are summed in float64 and returned in float32, so that they do not depend on how the weight is stored.
"""

import numpy as np
import torch

AMBER_QUANTILES = (0.005, 0.995)
"""Quantiles of the whole weight outside which Amber-Pruner sets entries aside."""


def check_criterion(name: str) -> str:
    """Return ``name`` if it is a known criterion, else raise a ValueError that lists them."""
    if name not in list(CRITERIA):  # a list, because a recipe file may hold something unhashable here
        raise ValueError(f"expected a criterion among {', '.join(CRITERIA)}, got {name!r}; choose one of those")
    return name


def channel_scale(name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """Channel scale ``c`` of a criterion for one weight.

    Parameters
    ----------
    name : str
        "act", "wina", "variance" or "amber".
    weight : Tensor [out, in]
        The weight as the layer stores it (after any quantisation), any floating dtype.

    Returns
    -------
    Tensor [in] float32, or None for "act", whose scale is 1.

    Raises
    ------
    ValueError
        If the criterion is unknown, or ``weight`` is not a matrix.

    Notes
    -----
    Sources: arXiv 2509.22166 and its relatives Amber-Pruner and WINA. Amber-Pruner's
    quantiles are exact here, over all entries, interpolated linearly between neighbours; a random sample of
    them would make the choice differ from run to run.

    Examples
    --------
    >>> import torch
    >>> channel_scale("wina", torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    tensor([5., 1.])
    """
    check_criterion(name)
    if weight.ndim != 2:
        raise ValueError(f"expected a weight [out, in], got {weight.ndim} dimensions; pass one layer's matrix")
    formula = CRITERIA[name]
    if formula is None:
        return None
    with torch.no_grad():
        return formula(weight.detach().float()).float()


def _column_norm(weight: torch.Tensor) -> torch.Tensor:
    return weight.square().sum(dim=0, dtype=torch.float64).sqrt()


def _column_variance(weight: torch.Tensor) -> torch.Tensor:
    mean = weight.sum(dim=0, dtype=torch.float64) / weight.shape[0]
    return (weight - mean.float()).square().sum(dim=0, dtype=torch.float64) / weight.shape[0]


def _amber_norm(weight: torch.Tensor) -> torch.Tensor:
    low, high = _quantiles(weight, AMBER_QUANTILES)
    inside = (weight >= low) & (weight <= high)
    count = inside.sum()
    mean = torch.where(inside, weight, 0).sum(dtype=torch.float64) / count
    centred = torch.where(inside, weight - mean.float(), 0)
    spread = (centred.square().sum(dtype=torch.float64) / count).sqrt()
    if spread == 0:  # all entries equal: no channel matters more than another
        return torch.ones_like(weight[0])
    return _column_norm(centred) / spread


def _quantiles(weight: torch.Tensor, levels: tuple[float, ...]) -> list[torch.Tensor]:
    # torch.quantile refuses more than 2**24 elements, fewer than one large layer holds, and torch.kthvalue takes
    # quadratic time on sorted values; numpy's selection is linear in the worst case.
    flat = weight.flatten()
    positions = [level * (flat.numel() - 1) for level in levels]
    neighbours = [(int(position), min(int(position) + 1, flat.numel() - 1)) for position in positions]
    if flat.device.type == "cpu":
        ordered = torch.from_numpy(np.partition(flat.numpy(), sorted({i for pair in neighbours for i in pair})))
    else:
        ordered = flat.sort().values
    pairs = zip(positions, neighbours, strict=True)
    return [torch.lerp(ordered[below], ordered[above], position - below) for position, (below, above) in pairs]


CRITERIA = {"act": None, "wina": _column_norm, "variance": _column_variance, "amber": _amber_norm}
"""Criterion name -> formula of its channel scale (None: the scale is 1)."""
