"""sparse_linear as torch operations around the selection: with a gradient, for training, and for per-token top-k.

The compiled operator (:func:`nm_act.sparse_linear`) is what runs in inference; this one exists for what it lacks.
"""

import torch
from torch import Tensor

from . import ops, reference
from .patterns import NMPattern, TopKPattern


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: NMPattern | TopKPattern,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    **epilogue,
) -> Tensor:
    """:func:`nm_act.sparse_linear` in which every argument but the selection has a gradient.

    The mask is a constant in the gradient, as in the training recipe of arXiv 2509.22166.

    Parameters
    ----------
    x, weight, bias, channel_scale, shift, token_shift, **epilogue
        As in :func:`nm_act.sparse_linear`.
    pattern : NMPattern or TopKPattern

    Returns
    -------
    Tensor [..., out_features], dtype of x
    """
    pruned = _Select.apply(reference.shifted(x, shift, token_shift), pattern, channel_scale)
    y = reference.linear_of_pruned(
        x, pruned, weight, bias, shift=shift, token_shift=token_shift, compute_dtype=_compute_dtype(x), **epilogue
    )
    return y.to(x.dtype)


def select(z: Tensor, pattern: NMPattern | TopKPattern, channel_scale: Tensor | None) -> Tensor:
    """``P(z)``: ``z`` with all but its survivors set to zero."""
    if isinstance(pattern, NMPattern):
        return ops.prune(
            z, pattern.keep, pattern.group, channel_scale=channel_scale, extra_columns=pattern.extra_columns
        )
    return torch.where(_top_mask(z, pattern.keep_of(z.shape[-1]), channel_scale), z, z.new_zeros(()))


def _top_mask(z: Tensor, keep: int, channel_scale: Tensor | None) -> Tensor:
    """`reference.selection_mask` of top-k without sorting, which takes 2.7 times as long on a CPU (2048 x 1536)."""
    score = reference.scores(z, channel_scale)
    threshold = score.topk(keep, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, equal = score > threshold, score == threshold
    room = keep - above.sum(dim=-1, keepdim=True)  # of equal keys, those of lowest index
    return above | (equal & (equal.cumsum(dim=-1) <= room))


def _compute_dtype(x: Tensor) -> torch.dtype:
    # Half precision on a GPU multiplies as it is, with float32 sums; a CPU has no fast half-precision training.
    return torch.float32 if x.device.type == "cpu" else x.dtype


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, pattern, channel_scale):
        pruned = select(z, pattern, channel_scale)
        # Every survivor passes its gradient on, one that is exactly 0 too: only the slow oracle tells those apart.
        mask = reference.selection_mask(z, pattern, channel_scale) if (z == 0).any() else pruned != 0
        ctx.save_for_backward(mask)
        return pruned

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return torch.where(mask, gradient, gradient.new_zeros(())), None, None
