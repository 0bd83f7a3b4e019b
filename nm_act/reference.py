"""The oracle: every operator in plain torch, written for clarity, one formula a function.

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
whole output NaN, as dense arithmetic would, and an infinity is never lost to a finite value: with at most ``n``
non-finite values a group, the output has the infinities and NaNs of dense arithmetic, with more it is still non-finite.

Per-token shifts are float32: the mean is summed in float64 and rounded once (the order of the sum is not part of the
contract: it can change the mean of about one token in 10^9), the median is the lower of the two middle values (as
``torch.median``) with -0.0 read as 0.0. Both are NaN if the token holds a NaN.
"""

import torch

from .patterns import NMPattern, TopKPattern

TOKEN_SHIFTS = ("none", "mean", "median")
"""Names accepted by ``token_shift``."""

_FLOAT32_MAX = torch.finfo(torch.float32).max


def token_shift_values(x: torch.Tensor, token_shift: str) -> torch.Tensor:
    """Per-token shift eta ``[..., 1]`` of ``x [..., in]`` for ``token_shift`` "mean" or "median" (D-PTS).

    Float32; of a float64 ``x`` float64.
    """
    if token_shift == "mean":
        eta = x.double().mean(dim=-1, keepdim=True).to(_wide(x))
    elif token_shift == "median":
        eta = x.to(_wide(x)).median(dim=-1, keepdim=True).values
    else:
        raise ValueError(f'expected token_shift "mean" or "median", got {token_shift!r}')
    return eta + 0.0


def shifted(x: torch.Tensor, shift: torch.Tensor | None, token_shift: str) -> torch.Tensor:
    """``Z = X - eta`` in the dtype of ``x``; ``x`` itself without a shift."""
    if token_shift != "none":
        return (x.to(_wide(x)) - token_shift_values(x, token_shift)).to(x.dtype)
    if shift is not None:
        return (x.to(_wide(x)) - shift.to(_wide(x))).to(x.dtype)
    return x


def _wide(x: torch.Tensor) -> torch.dtype:
    # Float32 by contract; float64 is no dtype of the operators, but the one in which derivatives are checked.
    return torch.promote_types(x.dtype, torch.float32)


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


def scores(z: torch.Tensor, channel_scale: torch.Tensor | None) -> torch.Tensor:
    """Float64 keys of the contract."""
    magnitude = z.float().abs()
    score = magnitude if channel_scale is None else (magnitude * channel_scale.float()).abs()
    score = torch.where(score.isnan(), _FLOAT32_MAX, score).clamp(max=_FLOAT32_MAX).double()
    # Classes above the finite scores, in float64 so that they stay apart from the largest float32.
    score = torch.where(z.isinf(), 2.0 * _FLOAT32_MAX, score)
    return torch.where(z.isnan(), 4.0 * _FLOAT32_MAX, score)


def _greedy_mask(units: torch.Tensor, extra_columns: tuple[int, ...]) -> torch.Tensor:
    """What the windows can hold of ``units [..., 16]`` of keys, taken from the highest key down."""
    mask = torch.zeros_like(units, dtype=torch.bool)
    for index in units.argsort(dim=-1, descending=True, stable=True).split(1, dim=-1):
        grown = mask.scatter(-1, index, True)
        mask = torch.where(_fits_windows(grown, extra_columns).unsqueeze(-1), grown, mask)
    return mask


def _fits_windows(mask: torch.Tensor, extra_columns: tuple[int, ...]) -> torch.Tensor:
    """Whether quads and extra windows, two places each, can hold the features in ``mask [..., 16]``."""
    quads = mask.unflatten(-1, (4, 4))
    excess = (quads.sum(dim=-1) - 2).clamp(min=0)  # what a quad has to hand on
    takes = quads[..., list(extra_columns)].int()  # [..., 4, extra windows]: what they could take of it
    fits = (excess <= takes.sum(dim=-1)).all(dim=-1) & (excess.sum(dim=-1) <= 2 * len(extra_columns))
    for window in range(len(extra_columns)):
        others = takes.sum(dim=-1) - takes[..., window]
        fits &= (excess - others).clamp(min=0).sum(dim=-1) <= 2  # what none but this window can take
    return fits


def prune(x, n, m, *, channel_scale=None, shift=None, token_shift="none", extra_columns=()):
    """Oracle of :func:`nm_act.prune`: ``P(X - eta)``, same shape and dtype as ``x``, pruned entries +0.0."""
    z = shifted(x, shift, token_shift)
    # where, not z * mask: a product would keep the sign of -0.0 and turn a pruned inf into NaN.
    return torch.where(selection_mask(z, NMPattern(n, m, extra_columns), channel_scale), z, z.new_zeros(()))


def compress(x, *, channel_scale=None, shift=None, token_shift="none"):
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


def decompress(values, metadata):
    """Oracle of :func:`nm_act.decompress`: the dense ``[..., in]`` tensor that :func:`compress` packed."""
    groups = values.shape[-1] // 2
    nibbles = torch.stack([metadata & 15, metadata >> 4], dim=-1).flatten(-2)[..., :groups].long()
    index = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
    dense = values.new_zeros(*values.shape[:-1], groups, 4)
    return dense.scatter_(-1, index, values.unflatten(-1, (-1, 2))).flatten(-2)


def variance_ratio(z: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """VAR factor ``nu = sqrt(Var(Z) / Var(P))`` per token, float64 ``[..., 1]``; 1 where ``Var(P)`` is 0."""
    total, kept = (_variance(values.double()) for values in (z, pruned))
    return ratio_root(total, kept)


def ratio_root(total: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``sqrt(total / kept)``, 1 where ``kept`` is 0; with gradient 0 there and where ``total`` is 0."""
    # Chosen before the division and the root, whose infinite derivatives would make the gradient 0 * inf.
    ratio = torch.where(kept == 0, 1.0, total) / torch.where(kept == 0, 1.0, kept)
    return torch.where(ratio == 0, 0.0, torch.where(ratio == 0, 1.0, ratio).sqrt())


def _variance(values: torch.Tensor) -> torch.Tensor:
    # Not Tensor.var, which warns when there is no token.
    return (values - values.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True)


def sparse_linear(
    x,
    weight,
    bias=None,
    n=2,
    m=4,
    *,
    channel_scale=None,
    shift=None,
    token_shift="none",
    shift_out=None,
    variance_correction=False,
    column_scale=None,
    weight_scale=None,
    extra_columns=(),
    compute_dtype=torch.float64,
):
    """Oracle of :func:`nm_act.sparse_linear`; products, sums and the result are in ``compute_dtype``."""
    selection = {"channel_scale": channel_scale, "shift": shift, "token_shift": token_shift}
    pruned = prune(x, n, m, extra_columns=extra_columns, **selection)
    return linear_of_pruned(
        x,
        pruned,
        weight,
        bias,
        shift=shift,
        token_shift=token_shift,
        shift_out=shift_out,
        variance_correction=variance_correction,
        column_scale=column_scale,
        weight_scale=weight_scale,
        compute_dtype=compute_dtype,
    )


def linear_of_pruned(
    x,
    pruned,
    weight,
    bias=None,
    *,
    shift=None,
    token_shift="none",
    shift_out=None,
    variance_correction=False,
    column_scale=None,
    weight_scale=None,
    compute_dtype=torch.float64,
):
    """The rest of :func:`sparse_linear` once the selection ``pruned = P(x - eta)`` is made; differentiable."""
    w = weight.to(compute_dtype)
    if weight_scale is not None:
        w = (weight.double() * weight_scale.double()[:, None]).to(compute_dtype)
    y = pruned.to(compute_dtype) @ w.t()
    if variance_correction:
        y = y * variance_ratio(shifted(x, shift, token_shift), pruned).to(compute_dtype)
    if token_shift != "none":
        row_sums = w.sum(dim=1) if shift_out is None else shift_out.to(compute_dtype)
        y = y + token_shift_values(x, token_shift).to(compute_dtype) * row_sums
    elif shift is not None:
        y = y + (w @ shift.to(compute_dtype) if shift_out is None else shift_out.to(compute_dtype))
    if column_scale is not None:
        y = y * column_scale.to(compute_dtype)
    if bias is not None:
        y = y + bias.to(compute_dtype)
    return y
