"""The oracle: every operator in plain torch, written for clarity, with one formula per function.

Selection contract (the compiled kernels are tested bit for bit against it)
---------------------------------------------------------------------------
The operand is ``Z = round(float32(X) - float32(eta))`` in the dtype of ``X``; without a shift ``Z = X``, to the bit.
A value's *key* is

* ``|Z| * |c|`` in float32, one rounding, at most the largest finite float32, for a finite ``Z`` (a NaN product counts
  as that largest value);
* above every finite value if ``Z`` is infinite, and above every infinity if ``Z`` is NaN.

In each group of ``m`` consecutive features the ``n`` largest keys survive; among equal keys the lowest index wins.
With extra columns (2:4+1, 2:4+2) the survivors of every sixteen features are those that windows can hold, two places
each: the four quads, and for each extra column e the window ``{e, 4 + e, 8 + e, 12 + e}``. Features are taken by
descending key, the lowest index first, and kept if all kept ones still fit; ten or twelve of sixteen survive.

-0.0 equals 0.0 as a key and keeps its sign as a value. So exactly ``n`` of ``m`` survive; one NaN in a token makes its
whole output NaN, as in dense arithmetic, and no infinity is pruned in favour of a finite value. With at most ``n``
non-finite values per group, the output has the infinities and NaNs of dense arithmetic; with more, it is still
non-finite.

Per-token shifts are float32. The mean is summed in float64 and rounded once (the order of the sum is not part of the
contract: it can change the mean of about one token in 10^9). The median is the lower of the two middle values (as in
``torch.median``), with -0.0 read as 0.0. Both are NaN if the token holds a NaN.
"""

from typing import Any

import torch

from .ops.formulas import decompress, linear_of_pruned, ratio_root, scores, shifted, token_shift_values, variance_ratio
from .ops.legacy import takes_pattern
from .patterns import NMPattern, TopKPattern

__all__ = [
    "compress",
    "decode_attention",
    "decompress",
    "linear_of_pruned",
    "prune",
    "ratio_root",
    "scores",
    "selection_mask",
    "shifted",
    "sparse_linear",
    "token_shift_values",
    "variance_ratio",
]


def selection_mask(
    z: torch.Tensor, pattern: NMPattern | TopKPattern, channel_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Boolean mask of the survivors of ``z [..., in]`` under the contract above; exactly N of every M are True.

    Top-k is one group of all features under the same contract.
    """
    score = scores(z, channel_scale)
    if isinstance(pattern, TopKPattern):
        keep, group = pattern.keep_of(z.shape[-1]), z.shape[-1]
    elif pattern.extra_columns:
        return _greedy_mask(score.unflatten(-1, (-1, pattern.span)), pattern.extra_columns).flatten(-2)
    else:
        keep, group = pattern.keep, pattern.group
    groups = score.unflatten(-1, (-1, group))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, order[..., :keep], True)
    return mask.flatten(-2)


def _greedy_mask(units: torch.Tensor, extra_columns: tuple[int, ...]) -> torch.Tensor:
    """The features of ``units [..., 16]`` of keys that the windows can hold, taken from the highest key down."""
    mask = torch.zeros_like(units, dtype=torch.bool)
    for index in units.argsort(dim=-1, descending=True, stable=True).split(1, dim=-1):
        grown = mask.scatter(-1, index, True)
        mask = torch.where(_fits_windows(grown, extra_columns).unsqueeze(-1), grown, mask)
    return mask


def _fits_windows(mask: torch.Tensor, extra_columns: tuple[int, ...]) -> torch.Tensor:
    """Whether quads and extra windows, two places each, can hold the features in ``mask [..., 16]``."""
    quads = mask.unflatten(-1, (4, 4))
    excess = (quads.sum(dim=-1) - 2).clamp(min=0)  # features that a quad has no room for
    # [..., quad, extra window]: whether the feature of the quad that the window covers is kept.
    takes = quads[..., list(extra_columns)].int()
    fits: torch.Tensor = (excess <= takes.sum(dim=-1)).all(dim=-1) & (excess.sum(dim=-1) <= 2 * len(extra_columns))
    for window in range(len(extra_columns)):
        others = takes.sum(dim=-1) - takes[..., window]
        fits &= (excess - others).clamp(min=0).sum(dim=-1) <= 2  # must go into this window
    return fits


@takes_pattern
def prune(
    x: torch.Tensor,
    pattern: NMPattern | str,
    *,
    channel_scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    token_shift: str = "none",
) -> torch.Tensor:
    """Oracle of :func:`nm_act.prune`: ``P(X - eta)``, same shape and dtype as ``x``, pruned entries +0.0."""
    z = shifted(x, shift, token_shift)
    # where, not z * mask: a product would keep the sign of -0.0 and turn a pruned inf into NaN.
    return torch.where(selection_mask(z, NMPattern(pattern), channel_scale), z, z.new_zeros(()))


def compress(
    x: torch.Tensor,
    *,
    channel_scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    token_shift: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle of :func:`nm_act.compress`: 2:4 ``values [..., in/2]`` and ``metadata [..., ceil(in/8)]`` (uint8)."""
    z = shifted(x, shift, token_shift)
    mask = selection_mask(z, NMPattern(2, 4), channel_scale)
    leading, in_features = z.shape[:-1], z.shape[-1]
    index = mask.unflatten(-1, (-1, 4)).int().argsort(dim=-1, descending=True, stable=True)[..., :2]
    values = z.unflatten(-1, (-1, 4)).gather(-1, index).flatten(-2)
    nibbles = (index[..., 0] | index[..., 1] << 2).to(torch.uint8)
    if in_features % 8:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(*leading, 1)], dim=-1)
    pairs = nibbles.unflatten(-1, (-1, 2))
    return values, pairs[..., 0] | pairs[..., 1] << 4


@takes_pattern
def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pattern: NMPattern | str = "2:4",
    *,
    channel_scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    token_shift: str = "none",
    **epilogue: Any,
) -> torch.Tensor:
    """Oracle of :func:`nm_act.sparse_linear`; ``epilogue`` is that of :func:`linear_of_pruned`, float64 by default."""
    pruned = prune(x, pattern, channel_scale=channel_scale, shift=shift, token_shift=token_shift)
    return linear_of_pruned(x, pruned, weight, bias, shift=shift, token_shift=token_shift, **epilogue)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scaling: float,
    window: int = 0,
) -> torch.Tensor:
    """Oracle of :func:`nm_act.ops.fused.decode_attention` without norms of the heads, in float64.

    A sequence whose length is outside 1 to max_tokens leaves its cache unchanged and has NaN outputs.
    """
    most = keys.shape[2]
    valid = (lengths >= 1) & (lengths <= most)
    last = lengths[valid].long() - 1
    q, k = (_rotated(x, cos, sin) for x in (q, k))
    for cache, new in ((keys, k), (values, v)):
        cache[valid.nonzero()[:, 0], :, last] = new[valid, 0]
    place, length = torch.arange(most, device=keys.device), lengths[:, None]
    seen = valid[:, None] & (place < length) & (place >= (length - window if window else 0))
    grouped = q[:, 0].unflatten(1, (keys.shape[1], -1)).double()  # [batch, key heads, query heads of each, head_dim]
    # Values outside the length may be NaN. A softmax over nothing is NaN.
    read, weighed = (cache.double().masked_fill(~seen[:, None, :, None], 0) for cache in (keys, values))
    scores = (scaling * grouped @ read.mT).masked_fill(~seen[:, None, None], -torch.inf)
    y: torch.Tensor = scores.softmax(-1) @ weighed
    return y.flatten(1, 2)[:, None]


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of ``[batch, tokens, heads, head_dim]``, each operation rounded to the dtype."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]
