"""Formulas that the operators, their gradients, the layers and the oracle share, in plain torch.

The selection itself is implemented in the kernels, and in their oracle :mod:`nm_act.reference`, which also states the
contract.
"""

import torch

FLOAT32_MAX = torch.finfo(torch.float32).max


def token_shift_values(x: torch.Tensor, token_shift: str) -> torch.Tensor:
    """Per-token shift eta ``[..., 1]`` of ``x [..., in]`` for ``token_shift`` "mean" or "median" (D-PTS).

    Returned in float32, or in float64 if ``x`` is float64.
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
    # Float32 by contract. The operators do not take float64; tests check derivatives in it.
    return torch.promote_types(x.dtype, torch.float32)


def scores(z: torch.Tensor, channel_scale: torch.Tensor | None) -> torch.Tensor:
    """Keys of the contract (:mod:`nm_act.reference`), float64."""
    magnitude = z.float().abs()
    score = magnitude if channel_scale is None else (magnitude * channel_scale.float()).abs()
    score = torch.where(score.isnan(), FLOAT32_MAX, score).clamp(max=FLOAT32_MAX).double()
    # Infinities and NaNs rank above the finite scores; float64 keeps them apart from the largest float32.
    score = torch.where(z.isinf(), 2.0 * FLOAT32_MAX, score)
    return torch.where(z.isnan(), 4.0 * FLOAT32_MAX, score)


def variance_ratio(z: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """VAR factor ``nu = sqrt(Var(Z) / Var(P))`` per token, float64 ``[..., 1]``; 1 where ``Var(P)`` is 0."""
    total, kept = (_variance(values.double()) for values in (z, pruned))
    return ratio_root(total, kept)


def ratio_root(total: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``sqrt(total / kept)``, 1 where ``kept`` is 0; its gradient is 0 there, and where ``total`` is 0."""
    # torch.where before the division and the root: behind them, their infinite derivatives would give 0 * inf.
    ratio = torch.where(kept == 0, 1.0, total) / torch.where(kept == 0, 1.0, kept)
    return torch.where(ratio == 0, 0.0, torch.where(ratio == 0, 1.0, ratio).sqrt())


def _variance(values: torch.Tensor) -> torch.Tensor:
    # Not Tensor.var, which warns when there is no token.
    return (values - values.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True)


def linear_of_pruned(
    x: torch.Tensor,
    pruned: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    shift: torch.Tensor | None = None,
    token_shift: str = "none",
    shift_out: torch.Tensor | None = None,
    variance_correction: bool = False,
    column_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """:func:`nm_act.sparse_linear` from the selected operand ``pruned = P(x - eta)`` on; differentiable."""
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


def decompress(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """Formula of :func:`nm_act.decompress`: the dense ``[..., in]`` tensor that :func:`compress` packed."""
    groups = values.shape[-1] // 2
    nibbles = torch.stack([metadata & 15, metadata >> 4], dim=-1).flatten(-2)[..., :groups].long()
    index = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
    dense = values.new_zeros(*values.shape[:-1], groups, 4)
    return dense.scatter_(-1, index, values.unflatten(-1, (-1, 2))).flatten(-2)
