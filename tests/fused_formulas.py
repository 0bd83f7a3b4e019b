"""What the kernels of a fused attention compute, in plain torch."""

import torch
from torch.nn import functional as F

from nm_act import reference


def normed(q, k, *, q_norm=None, k_norm=None, eps=None, unit_offset=None):
    """The norms of the heads, if there are any."""
    if q_norm is None:
        return q, k
    return tuple(F.rms_norm(x, (x.shape[-1],), w + unit_offset, eps) for x, w in ((q, q_norm), (k, k_norm)))


def rotary(q, k, cos, sin, **norms):
    halves = [x.chunk(2, dim=-1) for x in normed(q, k, **norms)]
    turned = [torch.cat((-second, first), dim=-1) for first, second in halves]
    whole = [torch.cat(pair, dim=-1) for pair in halves]
    return tuple(x * cos[:, :, None] + y * sin[:, :, None] for x, y in zip(whole, turned, strict=True))


def rotary_cache(q, k, v, cos, sin, keys, values, lengths, **norms):
    q, k = rotary(q, k, cos, sin, **norms)
    new = slice(lengths[0].item() - q.shape[1], lengths[0].item())
    for cache, heads in ((keys, k), (values, v)):
        cache[:, :, new] = heads.transpose(1, 2)
    return q


def decode_attention(q, k, v, *cached, scaling, window, **norms):
    q, k = normed(q, k, **norms)
    return reference.decode_attention(q, k, v, *cached, scaling=scaling, window=window).to(q.dtype)
