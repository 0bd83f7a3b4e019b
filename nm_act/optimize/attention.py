"""Attention with one kernel for the rotary embedding and the update of the cache (CUDA, 16 bits).

The attention itself remains the implementation that the model's config names.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import autograd
from ..ops.attention import attends, decode_attention, norms_heads, rotary, rotary_cache
from . import operands
from .eligible import has_hooks, why_stays
from .families import Family
from .merged import MergedLinear, Product, SharesProducts

QKV = ("q_proj", "k_proj", "v_proj")


def merged_qkv(attention: nn.Module) -> MergedLinear | None:
    """The merged layer that computes q, k and v of an attention; None if they are not merged."""
    children = (child for child in attention.children() if isinstance(child, MergedLinear))
    return next((child for child in children if child.names == QKV), None)


class FusedAttention(SharesProducts):
    """An attention with merged q, k and v layers, whose embedding and cache update are one kernel where possible."""

    head_dim: int
    o_proj: Any

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        nm_act_product: Product | None = None,
        nm_act_residual: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """The stock forward's ``(output [batch, tokens, hidden], weights)``; with a residual, their sum.

        ``nm_act_product`` is the product of q, k and v if it is already computed. A residual is given only if
        :func:`~nm_act.optimize.operands.why_unfused` of the output projection is empty.
        """
        if args or position_embeddings is None or not fuses(self, hidden_states, position_embeddings):
            stock = (hidden_states, position_embeddings, attention_mask, *args)
            y, weights = super().forward(*stock, nm_act_product=nm_act_product, **kwargs)
            return (y if nm_act_residual is None else nm_act_residual + y), weights
        cache = kwargs.pop("cache", None)
        cache = kwargs.pop("past_key_values", None) if cache is None else cache
        merged: Any = merged_qkv(self)
        product = Product(merged) if nm_act_product is None else nm_act_product
        q, k, v = (
            product.take(hidden_states, index).view(*hidden_states.shape[:-1], -1, self.head_dim) for index in range(3)
        )
        norms = _head_norms(self, q)
        if not norms:
            q, k = (_normed(self, name, heads) for name, heads in (("q_norm", q), ("k_norm", k)))
        y, weights = _attention(self, q, k, v, position_embeddings, attention_mask, cache, norms, kwargs)
        y = y.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if nm_act_residual is None:
            return self.o_proj(y), weights
        return operands.plus_residual(self.o_proj, y, nm_act_residual), weights


def fuses(attention: Any, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> bool:
    """Whether this call computes the embedding in one kernel."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if attention.training or torch.is_autocast_enabled(x.device.type) or _interface(attention) is None:
        return False
    parts = [getattr(attention, name) for name in QKV]
    if any(has_hooks(part) for part in parts) or merged_qkv(attention) is None or attention.head_dim % 16:
        return False
    cos = position_embeddings[0]
    fits = cos.dtype == x.dtype and cos.ndim == 3 and cos.shape[0] in (1, x.shape[0]) and x.ndim == 3
    fits = fits and cos.shape[1] == x.shape[1] and cos.shape[2] == attention.head_dim
    return fits and not autograd.needs_gradient(x, *attention.parameters())


def _interface(attention: Any) -> Any:
    """The attention implementation of the config; None for Transformers' eager one, which its module keeps."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, None)


def _normed(attention: Any, name: str, heads: Tensor) -> Tensor:
    norm = getattr(attention, name, None)
    return heads if norm is None else norm(heads)


def mark_attention(attention: Any, family: Family) -> None:
    """Store on a FusedAttention where its window is, and whether its kernels can normalise the heads of q and k."""
    norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    facts = None
    if None not in norms and norms_heads(attention.head_dim) and not any(why_stays(norm) for norm in norms):
        known = {operands.norm_facts(norm) for norm in norms}
        shapes = {tuple(norm.weight.shape) for norm in norms}
        facts = known.pop() if len(known) == 1 and shapes == {(attention.head_dim,)} else None
    attention.nm_act_head_norms = facts
    attention.nm_act_window_in_config = family.window_in_config


def _window(attention: Any) -> dict[str, Any]:
    """The layer's window, as its own forward passes it on; empty if it passes none."""
    holder = attention.config if attention.nm_act_window_in_config else attention
    return {"sliding_window": holder.sliding_window} if hasattr(holder, "sliding_window") else {}


def _head_norms(attention: Any, q: Tensor) -> dict[str, Any]:
    """What the rotary kernels need to normalise the heads of q and k; empty if they do not."""
    if attention.nm_act_head_norms is None:
        return {}
    norms = (attention.q_norm, attention.k_norm)
    if any(has_hooks(norm) or norm.weight.dtype != q.dtype for norm in norms):
        return {}
    eps, unit_offset = attention.nm_act_head_norms
    return {"q_norm": norms[0].weight, "k_norm": norms[1].weight, "eps": eps, "unit_offset": unit_offset}


def _attention(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
    norms: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, Any]:
    """``[batch, tokens, heads, head_dim]``, given q, k and v of that shape, not rotated yet; and the attention weights.

    ``norms`` of the heads come before the rotation.
    """
    lengths = options.get("nm_act_lengths")
    if cache is not None and lengths is not None:  # StaticDecoder's: a plain static cache
        layer = cache.layers[attention.layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        window = _window(attention).get("sliding_window") or 0
        if q.shape[1] == 1 and attends(q.shape[2], k.shape[2], attention.head_dim, q.device):
            cached = (layer.keys, layer.values, lengths)
            options = {"scaling": attention.scaling, "window": window, **norms}
            return decode_attention(q, k, v, *angles, *cached, **options), None
        query = rotary_cache(q, k, v, *angles, layer.keys, layer.values, lengths, **norms).transpose(1, 2)
        key, value = layer.keys, layer.values
    else:
        query, key = (heads.transpose(1, 2) for heads in rotary(q, k, *angles, **norms))
        value = v.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
    options = {"dropout": 0.0, "scaling": attention.scaling, **options, **_window(attention)}
    result: tuple[Tensor, Any] = _interface(attention)(attention, query, key, value, mask, **options)
    return result
