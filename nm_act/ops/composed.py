"""sparse_linear as torch operations around the selection, for per-token top-k, calibration and torch.func.

Inference and training run the compiled operator, :func:`nm_act.sparse_linear`. This module adds what that operator
lacks: forward-mode derivatives, and float64, in which the tests check derivatives.
"""

from typing import Any

import torch
from torch import Tensor

from ..patterns import NMPattern, TopKPattern
from . import formulas, operators

_OPERATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max
_BITS_OF_LARGEST = 0x7F7FFFFF


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: NMPattern | TopKPattern,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    **epilogue: Any,
) -> Tensor:
    """:func:`nm_act.sparse_linear`, differentiable in every argument.

    The gradient treats the mask of survivors as a constant, as in the training recipe of arXiv 2509.22166.

    Parameters
    ----------
    x, weight, bias, channel_scale, shift, token_shift, **epilogue
        As in :func:`nm_act.sparse_linear`; float64 is allowed too.
    pattern : NMPattern or TopKPattern

    Returns
    -------
    Tensor [..., out_features], dtype of x
    """
    pruned = select(formulas.shifted(x, shift, token_shift), pattern, channel_scale)
    y = formulas.linear_of_pruned(
        x, pruned, weight, bias, shift=shift, token_shift=token_shift, compute_dtype=_compute_dtype(x), **epilogue
    )
    return y.to(x.dtype)


def select(z: Tensor, pattern: NMPattern | TopKPattern, channel_scale: Tensor | None) -> Tensor:
    """``P(z)``: ``z`` with all but its survivors set to zero; every survivor passes its gradient on."""
    if isinstance(pattern, NMPattern) and not torch.is_grad_enabled() and z.dtype in _OPERATOR_DTYPES:
        return operators.prune(z, pattern, channel_scale=channel_scale)
    return torch.where(survivors(z, pattern, channel_scale), z, z.new_zeros(()))


def survivors(z: Tensor, pattern: NMPattern | TopKPattern, channel_scale: Tensor | None) -> Tensor:
    """Mask of the survivors of ``z [..., in]``, bool, without a gradient; also True for survivors that are 0."""
    z = z.detach()
    channel_scale = None if channel_scale is None else channel_scale.detach()
    if not isinstance(pattern, NMPattern):
        return _top_mask(z, pattern.keep_of(z.shape[-1]), channel_scale)
    # Prune the keys instead of z, each raised to the next float, so that no surviving key is 0. (The largest float has
    # no finite successor: it stays, equal to the raised key below it.)
    raised = _finite_keys(z, channel_scale).view(torch.int32) + 1
    keys = raised.clamp(max=_BITS_OF_LARGEST).view(torch.float32)
    keys = torch.where(z.isfinite(), keys, z.float())
    kept = operators.prune(keys, pattern)
    return kept.view(torch.int32) != 0


def _finite_keys(z: Tensor, channel_scale: Tensor | None) -> Tensor:
    """Float32 keys of the contract (:mod:`nm_act.reference`) for the finite entries of ``z``."""
    key = z.float().abs()
    if channel_scale is None:
        return key
    # fmin maps a NaN product to the largest float too.
    return torch.fmin((key * channel_scale.float()).abs(), key.new_tensor(_LARGEST))


def _top_mask(z: Tensor, keep: int, channel_scale: Tensor | None) -> Tensor:
    """`reference.selection_mask` of top-k without sorting, which takes 2.7 times as long on a CPU (2048 x 1536)."""
    score = formulas.scores(z, channel_scale)
    threshold = score.topk(keep, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, equal = score > threshold, score == threshold
    room = keep - above.sum(dim=-1, keepdim=True)  # of equal keys, those of lowest index
    return above | (equal & (equal.cumsum(dim=-1) <= room))


def _compute_dtype(x: Tensor) -> torch.dtype:
    # A GPU multiplies 16-bit operands with float32 sums; on a CPU 16-bit products are slow in training.
    halves_on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if halves_on_cpu else x.dtype
