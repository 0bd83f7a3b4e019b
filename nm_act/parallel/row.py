"""The sparse operator of a row-parallel layer, in which each rank sees a slice of every token's features.

The selection needs nothing from other ranks, because no group is cut. A per-token shift and the variance ratio are
statistics of the whole token, so the ranks exchange data: per token one float64 for the mean, four for the variances,
or the token itself for the median. The data is combined in rank order, so every rank computes the same bits as a single
process (the mean up to the last bit of its float64 sum, as :mod:`nm_act.reference` allows).

Dynamic fp8 is the exception: each rank scales its slice of a token by the slice's own largest value. That scale is at
least as fine as that of a single process, and needs no exchange.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import autograd, formulas
from ..patterns import NMPattern
from .shard import Shard

_NO_GRADIENT = (
    "expected no gradient for the input of a layer split by rows with var or a per-token shift, whose statistics come "
    "from all ranks, got a backward pass; train the unsplit model, or choose a recipe without them"
)


def row_sparse_linear(
    shard: Shard,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: NMPattern,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    shift_out: Tensor | None = None,
    variance_correction: bool = False,
    column_scale: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """This rank's term of :func:`nm_act.sparse_linear`: the sum over the ranks is the layer's output.

    ``x``, ``weight``, ``channel_scale`` and ``shift`` are this rank's slices along ``in_features``, which the pattern's
    span divides. ``shift_out [out_features]`` is the image of the shift under this rank's weight (``weight @ 1`` or
    ``weight @ shift``), computed if absent. A bias is given on one rank only, because the terms are added. The gradient
    is that of this rank's term; where ranks exchange statistics, a backward pass that needs the gradient of ``x``
    raises a RuntimeError.
    """
    if options.get("weight_scale") is not None:
        raise ValueError(
            "expected a weight in the dtype of x in a layer split by rows, got weight_scale; dequantise it"
        )
    selection = {"channel_scale": channel_scale, **options}
    if token_shift == "none" and not variance_correction:
        return ops.sparse_linear(
            x, weight, bias, pattern, shift=shift, shift_out=shift_out, column_scale=column_scale, **selection
        )
    eta = None
    if token_shift != "none":
        eta = autograd.refuse_backward(lambda: token_shift_over_ranks(shard, x, token_shift), _NO_GRADIENT, [x])
        shift = eta
    z = x if shift is None else (x.float() - shift.float()).to(x.dtype)
    y = _float32_product(z, weight, pattern, **selection)
    if variance_correction:
        pruned = ops.prune(z, pattern, channel_scale=channel_scale)
        y = y * autograd.refuse_backward(lambda: variance_ratio_over_ranks(shard, z, pruned), _NO_GRADIENT, [z])
    if shift is not None:
        y = y + _shift_term(weight, shift, eta, shift_out)
    if column_scale is not None:
        y = y * column_scale.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _float32_product(z: Tensor, weight: Tensor, pattern: NMPattern, **selection: Any) -> Tensor:
    """``P(z) weight^T [..., out]``; in float16, rounding here could overflow although the scaled product does not."""
    if z.dtype != torch.float16:
        return ops.sparse_linear(z, weight, None, pattern, **selection).float()
    pruned = ops.prune(z, pattern, channel_scale=selection["channel_scale"]).reshape(-1, z.shape[-1])
    on_cuda = z.is_cuda
    y = torch.mm(pruned, weight.t(), out_dtype=torch.float32) if on_cuda else pruned.float() @ weight.float().t()
    return y.view(*z.shape[:-1], weight.shape[0])


@torch.no_grad()
def token_shift_over_ranks(shard: Shard, x: Tensor, token_shift: str) -> Tensor:
    """:func:`nm_act.ops.formulas.token_shift_values` of the whole token, float32 ``[..., 1]``, from slices of it."""
    if token_shift == "mean":
        sums = shard.gather(x.double().sum(dim=-1, keepdim=True))
        return (sums.sum(dim=0) / (x.shape[-1] * shard.size)).float() + 0.0
    slices = shard.gather(x)  # a median cannot be computed from the medians of parts
    return formulas.token_shift_values(slices.movedim(0, -2).flatten(-2), token_shift)


@torch.no_grad()
def variance_ratio_over_ranks(shard: Shard, z: Tensor, pruned: Tensor) -> Tensor:
    """:func:`nm_act.ops.formulas.variance_ratio` of the whole token, float32 ``[..., 1]``, from slices of it."""
    total, kept = (_square_deviations(shard, each.double()) for each in (z, pruned))
    return formulas.ratio_root(total, kept).float()


def _square_deviations(shard: Shard, values: Tensor) -> Tensor:
    # Combine each rank's mean and deviations: one exchange, instead of two with the mean over all ranks first.
    mean = values.mean(dim=-1, keepdim=True)
    square = (values - mean).square().sum(dim=-1, keepdim=True)
    means, squares = shard.gather(torch.cat([mean, square], dim=-1)).unbind(dim=-1)
    between = (means - means.mean(dim=0)).square().sum(dim=0) * values.shape[-1]
    return (squares.sum(dim=0) + between).unsqueeze(-1)


def _shift_term(weight: Tensor, shift: Tensor, eta: Tensor | None, shift_out: Tensor | None) -> Tensor:
    if shift_out is None:
        shift_out = weight.float() @ torch.ones_like(weight[0], dtype=torch.float32) if eta is not None else None
        shift_out = weight.float() @ shift.float() if shift_out is None else shift_out
    return shift_out.float() if eta is None else eta * shift_out.float()
