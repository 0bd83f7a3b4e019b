"""Selection criteria: channel scales, most of them static and computed once from a layer's weight.

Every criterion scores an activation as ``S_ij = |X_ij| * c_j``; they differ in the channel
scale ``c [in]`` only.

==================  ========================================================================
name                ``c_j`` for ``W [out, in]``
==================  ========================================================================
act                 1 (magnitude alone)
clact               ``||X_:j||_2`` over the tokens of a sequence in the running call, padding
                    left out, before any shift; for one token without a shift it ranks like act
wina                ``||W_:j||_2`` (WINA, R-Sparse, Wanda-like)
variance            ``Var(W_:j)``, population variance
amber               ``||V_:j||_2``; V is W standardised without its entries beyond the [0.5 %,
                    99.5 %] quantiles, which count as 0
amber-channel       the same with quantiles, mean and deviation of each output channel (row)
weight-magnitude    none: prunes the *weights* N:M by ``|W_ij|``, activations stay dense
wanda               none: prunes the weights by ``|W_ij| * ||X_:j||_2``, calibrated
==================  ========================================================================

There are two readings of Amber-Pruner, because its text (arXiv 2508.02128) trims and standardises "the weight" without
saying over what. ``amber`` takes the whole matrix; ``amber-channel`` takes each output channel, so that one with large
weights does not outvote the others. Standardising each *input* channel is no third reading: it would make all norms
equal, which is act.

The last two are the weight-pruning baselines; see :func:`prune_weight`.

Scales are summed in float64 and returned in float32, so that they do not depend on how the weight is stored.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops import composed
from ..patterns import NMPattern, TopKPattern

AMBER_QUANTILES = (0.005, 0.995)
"""Quantiles of the whole weight outside which Amber-Pruner sets entries aside."""


@dataclass(frozen=True)
class Criterion:
    """A criterion as data; a new criterion needs only an entry in ``CRITERIA``."""

    # ``weight [out, in], float32 -> c [in]``; None where no channel scale derives from the weight.
    formula: Callable[[torch.Tensor], torch.Tensor] | None = None
    by_sequence: bool = False  # whether the scale comes from the tokens of each sequence in a call (`call_scale`)
    prunes_weight: bool = False  # whether it prunes the weight and leaves the activation dense (`prune_weight`)
    data: tuple[str, ...] = ()  # names of the calibrated tensors (``mitigations.DATA``) that it needs


def check_criterion(name: str) -> str:
    """Return ``name`` if it is a known criterion, else raise a ValueError that lists them."""
    if name not in list(CRITERIA):  # a list, because a recipe file may hold something unhashable here
        raise ValueError(f"expected a criterion among {', '.join(CRITERIA)}, got {name!r}; choose one of those")
    return name


def channel_scale(name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """Channel scale ``c [in]``, float32, of a criterion for one weight ``[out, in]`` as the layer stores it.

    None if no scale is derived from the weight: "act" (1), "clact" and the weight-pruning baselines. Raises ValueError
    if the criterion is unknown, or ``weight`` is not a matrix. Amber-Pruner's quantiles are computed exactly, over all
    entries and with linear interpolation between neighbours; with a random sample, the choice would differ from run to
    run. Sources: arXiv 2509.22166 and its relatives Amber-Pruner and WINA.

    Examples
    --------
    >>> import torch
    >>> channel_scale("wina", torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    tensor([5., 1.])
    """
    check_criterion(name)
    if weight.ndim != 2:
        raise ValueError(f"expected a weight [out, in], got {weight.ndim} dimensions; pass one layer's matrix")
    formula = CRITERIA[name].formula
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
    return _standardised_norm(weight, (weight >= low) & (weight <= high), dim=None)


def _amber_channel_norm(weight: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(AMBER_QUANTILES, dtype=weight.dtype, device=weight.device)
    low, high = weight.contiguous().quantile(levels, dim=1, keepdim=True)
    return _standardised_norm(weight, (weight >= low) & (weight <= high), dim=1)


def _standardised_norm(weight: torch.Tensor, inside: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Column norms of the weight, standardised along ``dim`` over the entries ``inside``; the others count as 0."""
    count = inside.sum(dim=dim, keepdim=dim is not None)
    mean = torch.where(inside, weight, 0).sum(dim=dim, keepdim=dim is not None, dtype=torch.float64) / count
    centred = torch.where(inside, weight - mean.float(), 0)
    square = centred.square().sum(dim=dim, keepdim=dim is not None, dtype=torch.float64) / count
    if not square.any():  # all entries equal: no channel matters more than another
        return torch.ones_like(weight[0])
    # A constant row has nothing but zeros in `centred`: it stays out of the norm.
    return _column_norm(centred / torch.where(square == 0, 1.0, square).sqrt().float())


def _quantiles(weight: torch.Tensor, levels: tuple[float, ...]) -> list[torch.Tensor]:
    # torch.quantile refuses more than 2**24 elements, fewer than one large layer holds, and torch.kthvalue takes
    # quadratic time on sorted values; numpy's selection, where it is installed, is linear in the worst case.
    flat = weight.flatten()
    positions = [level * (flat.numel() - 1) for level in levels]
    neighbours = [(int(position), min(int(position) + 1, flat.numel() - 1)) for position in positions]
    if flat.device.type == "cpu" and importlib.util.find_spec("numpy") is not None:
        import numpy as np

        ordered = torch.from_numpy(np.partition(flat.numpy(), sorted({i for pair in neighbours for i in pair})))
    else:
        ordered = flat.sort().values
    pairs = zip(positions, neighbours, strict=True)
    return [torch.lerp(ordered[below], ordered[above], position - below) for position, (below, above) in pairs]


@torch.no_grad()
def call_scale(x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """CLACT's channel scale of one sequence ``x [tokens, in]``: ``||X_:j||_2`` over its tokens, float32 ``[in]``.

    ``valid [tokens]`` is False for padding, which does not count.
    """
    # In float64, rounded once, so that the result does not depend on the order of the sum, nor on a split over ranks.
    square = x.double().square()
    if valid is not None:
        # Selected, not multiplied: 0 * inf is NaN, and padding may hold anything.
        square = torch.where(valid.unsqueeze(-1), square, 0)
    return square.sum(dim=0).sqrt().float()


def prune_weight(
    name: str, weight: torch.Tensor, pattern: NMPattern | TopKPattern, input_norm: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight with all but its best entries of every group of inputs set to zero (a weight-pruning baseline).

    ``weight [out, in]`` is pruned along its inputs; ``input_norm [in]`` is ``||X_:j||_2`` over calibration text, for
    "wanda" (arXiv 2306.11695).
    """
    mask = composed.survivors(weight, pattern, input_norm if CRITERIA[name].data else None)
    return torch.where(mask, weight, weight.new_zeros(()))


CRITERIA = {
    "act": Criterion(),
    "clact": Criterion(by_sequence=True),
    "wina": Criterion(_column_norm),
    "variance": Criterion(_column_variance),
    "amber": Criterion(_amber_norm),
    "amber-channel": Criterion(_amber_channel_norm),
    "weight-magnitude": Criterion(prunes_weight=True),
    "wanda": Criterion(prunes_weight=True, data=("input_norm",)),
}
"""Criterion name -> its data."""
