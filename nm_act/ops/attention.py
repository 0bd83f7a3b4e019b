"""Rotary embedding, update of a static cache, and attention of a decode step, in one kernel each (CUDA, 16 bits).

:mod:`nm_act.ops.fused` exports them too, beside the products of a layer.
"""

from typing import Any

import torch
from torch import Tensor

from . import library
from .library import _C


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys in one kernel: ``x * cos + rotate_half(x) * sin``.

    Parameters
    ----------
    q, k : Tensor [batch, tokens, heads, head_dim], bfloat16 or float16, on CUDA
        head_dim divisible by 16; parts of a merged projection are read in place.
    cos, sin : Tensor [1 or batch, tokens, head_dim], dtype of q
    q_norm, k_norm : Tensor [head_dim], dtype of q, optional
        Weights of an RMSNorm of each head before the embedding; for head_dim 16, 32, 64, 128, 256 and 512.
    eps : float, optional
        Required with ``q_norm`` or ``k_norm``, and allowed only then.
    unit_offset : bool
        For these norms, as in :func:`nm_act.ops.fused.rms_norm_prune`.

    Returns
    -------
    q, k : Tensor, contiguous, of the given shapes; rounded at the same points as in Transformers' embedding
    """
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "unit_offset": unit_offset}
    rotated: tuple[Tensor, Tensor] = library.call("rotary", q, k, cos, sin, **norms)
    return rotated


def rotary_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float | None = None,
    unit_offset: bool = False,
) -> Tensor:
    """:func:`rotary`, which also writes keys and values into a static cache; returns the queries.

    Parameters
    ----------
    q, k, v : Tensor [batch, tokens, heads, head_dim]
    cos, sin : Tensor [1 or batch, tokens, head_dim]
    keys, values : Tensor [batch, heads, max_tokens, head_dim], contiguous
        Written at the last ``tokens`` places before ``lengths``, but never beyond the cache.
    lengths : Tensor [batch], int32
        Tokens of each sequence, the new ones included.
    q_norm, k_norm, eps, unit_offset
        As in :func:`rotary`.
    """
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "unit_offset": unit_offset}
    y: Tensor = library.call("rotary_cache", q, k, v, cos, sin, keys, values, lengths, **norms)
    return y


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    window: int = 0,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float | None = None,
    unit_offset: bool = False,
) -> Tensor:
    """Attention of one new token per sequence over a static cache, with :func:`rotary_cache` in the same kernel.

    Parameters
    ----------
    q, k, v : Tensor [batch, 1, heads, head_dim], bfloat16 or float16
        At most eight query heads per key head; head_dim 64, 128 or 256.
    cos, sin, keys, values
        As in :func:`rotary_cache`.
    lengths : Tensor [batch], int32
        As in :func:`rotary_cache`. A sequence whose length is outside 1 to max_tokens writes nothing, and its outputs
        are NaN; other sequences are not affected.
    scaling : float
        Factor of the scores.
    window : int
        Number of tokens to attend to, including the new one; 0 for all.
    q_norm, k_norm, eps, unit_offset
        As in :func:`rotary`.

    Returns
    -------
    Tensor [batch, 1, q_heads, head_dim]

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or option does not fit.
    NotImplementedError
        If the device does not have compute capability 9.0, or the heads are not supported.
    """
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps, "unit_offset": unit_offset}
    cached = (keys, values, lengths, scaling, window)
    y: Tensor = library.call("decode_attention", q, k, v, cos, sin, *cached, **norms)
    return y


def attends(q_heads: int, k_heads: int, head_dim: int, device: torch.device) -> bool:
    """Whether :func:`decode_attention` supports these heads on this device."""
    return library.is_sm90(device) and _C.decode_attention_supports(q_heads, k_heads, head_dim)


def norms_heads(head_dim: int) -> bool:
    """Whether :func:`rotary` and the operators that contain it can normalise heads of this size."""
    return _C.head_norms_support(head_dim)


@torch.library.register_fake("nm_act::rotary")
def _(q: Tensor, k: Tensor, *_others: Tensor, **norms: Any) -> tuple[Tensor, Tensor]:
    _check_head_norms("rotary", **norms)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_queries(op: str) -> None:
    @torch.library.register_fake(f"nm_act::{op}")
    def _(q: Tensor, *_others: Any, **norms: Any) -> Tensor:
        _check_head_norms(op, **norms)
        return q.new_empty(q.shape)


_fake_queries("rotary_cache")
_fake_queries("decode_attention")


def _check_head_norms(
    op: str,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float | None = None,
    unit_offset: bool = False,
) -> None:
    normed = q_norm is not None or k_norm is not None
    library.check_norm_options(op, "q_norm or k_norm", normed, eps, unit_offset)


library.only_on_cuda("rotary", "rotary_cache", "decode_attention")
