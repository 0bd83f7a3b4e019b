"""What the kernels of fused layers compute, in plain torch."""

import dataclasses

import torch
from torch.nn import functional as F

import nm_act
from nm_act import reference
from nm_act.layers.work import is_decode
from nm_act.ops import autograd
from nm_act.ops.fused import Pruned
from nm_act.optimize import model, operands
from nm_act.optimize.eligible import has_hooks


def norm(x, weight, eps, unit_offset):
    return F.rms_norm(x, (x.shape[-1],), weight + unit_offset, eps)


def activated(gate, activation):
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


# ---- attention
def normed(q, k, *, q_norm=None, k_norm=None, eps=None, unit_offset=None):
    """The norms of the heads, if there are any."""
    if q_norm is None:
        return q, k
    return tuple(norm(x, w, eps, unit_offset) for x, w in ((q, q_norm), (k, k_norm)))


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


# ---- packed and pruned operands
def compressed(
    x, calls, name, *, token_shift="none", variance_correction=False, channel_scale=None, activation_dtype=None
):
    """A "packed" operand whose values are the pruned activation itself."""
    calls.append(name)
    flat = x.reshape(-1, x.shape[-1])
    pruned = reference.prune(flat, "2:4", channel_scale=channel_scale, token_shift=token_shift)
    empty = flat.new_empty(0)
    shifted = reference.shifted(flat, None, token_shift)
    nu = reference.variance_ratio(shifted, pruned).flatten().float() if variance_correction else empty
    eta = reference.token_shift_values(flat, token_shift).flatten() if token_shift != "none" else empty
    return nm_act.Packed(pruned, empty, nu, eta, nm_act.NMPattern("2:4"), x.shape[-1], "neutral", flat.shape[0])


def _pruned(x, pattern, hidden=None):
    return Pruned(reference.prune(x.reshape(-1, x.shape[-1]), pattern), x.new_empty(0), hidden)


def _hidden_of(x, eps, residual, unit_offset, x_weight):
    """And what was added, in words."""
    if residual is None:
        return x, ""
    if x_weight is None:
        return x + residual, " + residual"
    return norm(x, x_weight, eps, unit_offset) + residual, " + normed residual"


def _way_on_a_cpu(linear, x, *others):
    """The way of a layer with a pattern of its own, as on CUDA with many tokens."""
    if linear._is_dense_phase(x) or has_hooks(linear):
        return ""
    if autograd.needs_gradient(x, *others, *linear.parameters()):
        return ""
    pattern = linear.spec.pattern_in(is_decode(x))
    return "pruned" if operands._not_packed(linear, pattern) else "packed"


def packed_on_a_cpu(monkeypatch) -> list[str]:
    """Let optimize() take the CUDA operators of many tokens, these formulas in their place; the list has their calls."""
    made = []

    def rms_norm_compress(x, weight, eps, residual=None, *, unit_offset, x_weight, **options):
        hidden, added = _hidden_of(x, eps, residual, unit_offset, x_weight)
        packed = compressed(norm(hidden, weight, eps, unit_offset), made, f"norm{added}", **options)
        return dataclasses.replace(packed, hidden=hidden)

    def silu_mul_compress(gate, up, *, activation, **options):
        return compressed(activated(gate, activation) * up, made, activation.removesuffix("_tanh"), **options)

    def rms_norm_prune(x, weight, eps, residual=None, pattern="2:4", *, unit_offset, x_weight, activation_dtype=None):
        hidden, added = _hidden_of(x, eps, residual, unit_offset, x_weight)
        made.append(f"pruned norm{added}")
        return _pruned(norm(hidden, weight, eps, unit_offset), pattern, hidden)

    def silu_mul_prune(gate, up, pattern="2:4", *, activation, activation_dtype=None):
        made.append(f"pruned {activation.removesuffix('_tanh')}")
        return _pruned(activated(gate, activation) * up, pattern)

    def rms_norm_add(x, weight, eps, residual, *, unit_offset):
        made.append("added norm")
        return norm(x, weight, eps, unit_offset) + residual

    def adds_norm(norm, x):
        return not has_hooks(norm) and not autograd.needs_gradient(x, norm.weight)

    def sparse_gemm(operand, weight, bias, *, shift_out, column_scale, out_dtype, residual=None):
        assert out_dtype == torch.float32
        row_scale, eta = operand.row_scale, operand.eta
        y = operand.values @ weight.float().t()
        y = y * row_scale[:, None] if row_scale.numel() else y
        y = y + eta[:, None] * shift_out if eta.numel() else y
        y = y if column_scale is None else y * column_scale
        y = y if bias is None else y + bias
        return y if residual is None else residual + y

    kernels = (rms_norm_compress, silu_mul_compress, rms_norm_prune, silu_mul_prune, rms_norm_add, sparse_gemm)
    for replaced in (*kernels, adds_norm):
        monkeypatch.setattr(operands, replaced.__name__, replaced)
    monkeypatch.setattr(model, "_check_prefill_device", lambda device, fp8: None)
    monkeypatch.setattr(operands, "way_of", _way_on_a_cpu)
    linear = torch.ops.nm_act.sparse_linear  # dequantises the weight where the activations are not e4m3 too
    stored = lambda *a, activation_dtype=None, **options: linear(*a, **options)  # noqa: E731
    monkeypatch.setattr(torch.ops.nm_act, "sparse_linear", stored)
    return made
