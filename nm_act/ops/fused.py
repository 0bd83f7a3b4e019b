"""The operators next to a sparse layer in a decoder block, fused with its selection or its product (CUDA, 16 bits).

The producers of the packed 2:4 operand are in :mod:`nm_act.ops.packed`; these serve every N:M.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..patterns import NMPattern
from . import library
from .library import _C

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned activation, dense with zeros, as the operand of a dense product.

    Attributes
    ----------
    values : Tensor [tokens, in_features], dtype of the input or float8_e4m3fn
    row_scale : Tensor [tokens], float32, or [0]: the scale of each token's e4m3 values
    hidden : Tensor [..., in_features], optional
        Of :func:`rms_norm_prune`: ``x + residual`` (``x`` itself without one), the next residual.
    """

    values: Tensor
    row_scale: Tensor
    hidden: Tensor | None = None


def rms_norm_prune(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    pattern: NMPattern | str = "2:4",
    *,
    activation_dtype: torch.dtype | None = None,
    unit_offset: bool = False,
    x_weight: Tensor | None = None,
) -> Pruned:
    """``prune(RMSNorm(x + residual) * weight)`` in one kernel, with ``hidden``, the next residual.

    Parameters
    ----------
    x, residual : Tensor [..., in_features], bfloat16 or float16
        in_features divisible by 8, at most 16384.
    weight : Tensor [in_features], dtype of x
    eps : float
    pattern : NMPattern or str
        N:M without extra windows.
    activation_dtype : torch.dtype, optional
        torch.float8_e4m3fn, for x in bfloat16, scales each token by its largest magnitude / 448.
    unit_offset : bool
        Gemma's norm, ``RMSNorm(x) * (1 + weight)``, rounded once as its module does.
    x_weight : Tensor [in_features], dtype of x, optional
        Of a norm of ``x`` before the residual is added, with the same eps and offset: ``hidden = norm(x) + residual``,
        as in layers with norms on both sides. Needs a residual.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or pattern does not fit.
    NotImplementedError
        If the row is too long, or ``x`` is not on CUDA.
    """
    n, m = _keep_and_group(pattern)
    values, row_scale, hidden = library.call(
        *("rms_norm_prune", x, weight, eps, residual, n, m),
        activation_dtype=activation_dtype,
        unit_offset=unit_offset,
        x_weight=x_weight,
    )
    return Pruned(values, row_scale, x if residual is None else hidden)


def silu_mul_prune(
    gate: Tensor,
    up: Tensor,
    pattern: NMPattern | str = "2:4",
    *,
    activation_dtype: torch.dtype | None = None,
    activation: str = "silu",
) -> Pruned:
    """``prune(activation(gate) * up)`` in one kernel.

    Parameters
    ----------
    gate, up : Tensor [..., in_features], bfloat16 or float16
        The halves of a merged projection are read in place; in_features divisible by 8, at most 32768.
    pattern, activation_dtype
        As in :func:`rms_norm_prune`.
    activation : {"silu", "gelu_tanh"}
        "gelu_tanh" is GELU with the tanh approximation, as in Gemma.
    """
    n, m = _keep_and_group(pattern)
    options = {"activation_dtype": activation_dtype, "activation": activation}
    return Pruned(*library.call("silu_mul_prune", gate, up, n, m, **options))


def rms_norm_add(x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, unit_offset: bool = False) -> Tensor:
    """``RMSNorm(x) * weight + residual`` in one kernel, of layers with a norm after their parts.

    Parameters
    ----------
    x, residual : Tensor [..., in_features], bfloat16 or float16, on CUDA
        in_features divisible by 8, at most 16384.
    weight : Tensor [in_features], dtype of x
    eps : float
    unit_offset : bool
        As in :func:`rms_norm_prune`.

    Returns
    -------
    Tensor like x; the norm is rounded before the addition, as in the separate modules

    Raises
    ------
    TypeError, ValueError
        If a dtype or shape does not fit.
    """
    y: Tensor = library.call("rms_norm_add", x, weight, eps, residual, unit_offset=unit_offset)
    return y


def pruned_product(
    operand: Pruned, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    """``P @ weight.t() + bias`` on dense tensor cores, ``[tokens, out_features]``.

    Parameters
    ----------
    weight : Tensor [out_features, in_features], dtype of the operand's values
        In e4m3 contiguous, with ``weight_scale`` [out_features], float32, and features divisible by 16; the result is
        bfloat16 then. Of up to 16 tokens the product is rounded to bfloat16 before it is scaled, too.
    """
    if weight_scale is None:
        return F.linear(operand.values, weight, bias)
    y: Tensor = library.call("e4m3_product", operand.values, operand.row_scale, weight, weight_scale, bias)
    return y


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pattern: NMPattern | str = "2:4",
    *,
    up: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    channel_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str | None = None,
    unit_offset: bool = False,
) -> Tensor:
    """A sparse linear layer of one to four tokens, in one kernel with the operators before and after it.

    ``round(P(x') @ W^T + bias) + residual`` with ``x' = RMSNorm(x) * norm_weight``, ``activation(x) * up`` or ``x``.

    Parameters
    ----------
    x : Tensor [..., in_features], bfloat16 or float16, on CUDA
        At most four tokens; in_features divisible by 8.
    weight : Tensor [out_features, in_features], stored [in, out]
        Dtype of x, or float8_e4m3fn or int8 with ``weight_scale`` [out_features], float32.
    bias : Tensor [out_features], dtype of x, optional
    pattern : NMPattern or str
        N:M without extra windows.
    up : Tensor like x, optional
        With ``activation``, and not without.
    norm_weight : Tensor [in_features], dtype of x, optional
        With ``eps``, and not without; not with ``up``.
    residual : Tensor [..., out_features], dtype of x, optional
    channel_scale : Tensor [in_features], float32 or the dtype of x, optional
        As in :func:`nm_act.prune`.
    activation : {"silu", "gelu_tanh"}, optional
    unit_offset : bool
        Adds 1 to ``norm_weight``, which it needs; rounded as in :func:`rms_norm_prune`.

    Returns
    -------
    Tensor [..., out_features], dtype of x

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape, pattern or option does not fit, or an option is given without its tensor.
    NotImplementedError
        If the gather kernel does not take the sizes or the storage, or ``x`` is not on CUDA.
    """
    n, m = _keep_and_group(pattern)
    options: dict[str, Any] = {"up": up, "norm_weight": norm_weight, "eps": eps, "residual": residual}
    options |= {"channel_scale": channel_scale, "weight_scale": weight_scale}
    options |= {"activation": activation, "unit_offset": unit_offset}
    y: Tensor = library.call("decode_linear", x, weight, bias, n, m, **options)
    return y


def sandwich_linear(
    x: Tensor,
    x_weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    pattern: NMPattern | str = "2:4",
    *,
    channel_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`decode_linear` of ``RMSNorm(hidden) * norm_weight`` with ``hidden = RMSNorm(x) * x_weight + residual``.

    For layers with norms on both sides of their parts; every block of the kernel computes both norms.

    Parameters
    ----------
    x, residual : Tensor [..., in_features], bfloat16 or float16, on CUDA
        At most four tokens; in_features divisible by 8.
    x_weight, norm_weight : Tensor [in_features], dtype of x
    eps : float
        Of both norms.
    weight, bias, pattern, channel_scale, weight_scale
        As in :func:`decode_linear`.
    unit_offset : bool
        Adds 1 to both norms' weights; rounded as in :func:`rms_norm_prune`.

    Returns
    -------
    y : Tensor [..., out_features], dtype of x
    hidden : Tensor like x

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`decode_linear`.
    """
    n, m = _keep_and_group(pattern)
    options = {"channel_scale": channel_scale, "weight_scale": weight_scale, "unit_offset": unit_offset}
    both: tuple[Tensor, Tensor] = library.call(
        "sandwich_linear", x, x_weight, residual, norm_weight, eps, weight, bias, n, m, **options
    )
    return both


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **norms: Any) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys in one kernel: ``x * cos + rotate_half(x) * sin``.

    Parameters
    ----------
    q, k : Tensor [batch, tokens, heads, head_dim], bfloat16 or float16, on CUDA
        head_dim divisible by 16; parts of a merged projection are read in place.
    cos, sin : Tensor [1 or batch, tokens, head_dim], dtype of q
    **norms
        ``q_norm`` and ``k_norm`` [head_dim], dtype of q, weights of an RMSNorm of each head before the embedding;
        with one of them ``eps``, and ``unit_offset`` as in :func:`rms_norm_prune`. For head_dim 16, 32, 64, 128, 256
        and 512.

    Returns
    -------
    q, k : Tensor, contiguous, of the shapes given; rounded where Transformers' own embedding rounds
    """
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
    **norms: Any,
) -> Tensor:
    """:func:`rotary`, which also writes keys and values into a static cache; returns the queries.

    Parameters
    ----------
    q, k, v : Tensor [batch, tokens, heads, head_dim]
    cos, sin : Tensor [1 or batch, tokens, head_dim]
    keys, values : Tensor [batch, heads, max_tokens, head_dim], contiguous
        Written at the last ``tokens`` places before ``lengths``; none beyond the cache.
    lengths : Tensor [batch], int32
        Tokens of each sequence, the new ones included.
    **norms
        As in :func:`rotary`.
    """
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
    **norms: Any,
) -> Tensor:
    """Attention of one new token per sequence over a static cache, with :func:`rotary_cache` in the same kernel.

    Parameters
    ----------
    q, k, v : Tensor [batch, 1, heads, head_dim], bfloat16 or float16
        At most eight query heads per key head; head_dim 64, 128 or 256.
    cos, sin, keys, values
        As in :func:`rotary_cache`.
    lengths : Tensor [batch], int32
        As in :func:`rotary_cache`. A sequence whose length is not in 1 to max_tokens writes nothing, and its outputs
        are NaN; others are not affected.
    scaling : float
        Factor of the scores.
    window : int
        Tokens to attend to, the new one included; 0: all.
    **norms
        As in :func:`rotary`.

    Returns
    -------
    Tensor [batch, 1, q_heads, head_dim]

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or option does not fit.
    NotImplementedError
        If the device is not of compute capability 9.0, or the heads are not supported.
    """
    options = {"scaling": scaling, "window": window, **norms}
    y: Tensor = library.call("decode_attention", q, k, v, cos, sin, keys, values, lengths, **options)
    return y


def attends(q_heads: int, k_heads: int, head_dim: int, device: torch.device) -> bool:
    """Whether :func:`decode_attention` supports these heads on this device."""
    supported = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return supported and _C.decode_attention_supports(q_heads, k_heads, head_dim)


def norms_heads(head_dim: int) -> bool:
    """Whether :func:`rotary` and the operators that contain it can normalise heads of this size."""
    return _C.head_norms_support(head_dim)


def _keep_and_group(pattern: NMPattern | str) -> tuple[int, int]:
    pattern = pattern if isinstance(pattern, NMPattern) else NMPattern(pattern)
    if pattern.extra_columns:
        raise ValueError(f"expected an N:M pattern without extra windows, got {pattern}; use nm_act.sparse_linear")
    return pattern.keep, pattern.group


def _fake_pruned(x: Tensor, activation_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    fp8, tokens = activation_dtype not in (None, x.dtype), x.numel() // x.shape[-1]
    values = x.new_empty((tokens, x.shape[-1]), dtype=E4M3 if fp8 else x.dtype)
    return values, x.new_empty((tokens if fp8 else 0,), dtype=torch.float32)


@torch.library.register_fake("nm_act::rms_norm_prune")
def _(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *_pattern: int, **options: Any
) -> tuple[Tensor, ...]:
    return *_fake_pruned(x, options.get("activation_dtype")), x.new_empty((0,) if residual is None else x.shape)


@torch.library.register_fake("nm_act::silu_mul_prune")
def _(gate: Tensor, up: Tensor, *_pattern: int, **options: Any) -> tuple[Tensor, ...]:
    return _fake_pruned(gate, options.get("activation_dtype"))


@torch.library.register_fake("nm_act::e4m3_product")
def _(values: Tensor, _row_scale: Tensor, weight: Tensor, *_others: Any) -> Tensor:
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=torch.bfloat16)


@torch.library.register_fake("nm_act::rms_norm_add")
def _(x: Tensor, *_others: Any, **_options: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("nm_act::decode_linear")
def _(
    x: Tensor,
    weight: Tensor,
    *_others: Any,
    up: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    activation: str | None = None,
    unit_offset: bool = False,
    **_options: Any,
) -> Tensor:
    _check_norm_options("decode_linear", "norm_weight", norm_weight is not None, eps, unit_offset)
    if (up is None) != (activation is None):
        alone = "activation" if up is None else "up"
        raise ValueError(
            f"nm_act::decode_linear expected up and activation together, got {alone} alone; give both or neither"
        )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("nm_act::sandwich_linear")
def _(
    x: Tensor,
    _x_weight: Tensor,
    _residual: Tensor,
    _norm_weight: Tensor,
    _eps: float,
    weight: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(x.shape)


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
    _check_norm_options(op, "q_norm or k_norm", normed, eps, unit_offset)


def _check_norm_options(op: str, weights: str, normed: bool, eps: float | None, unit_offset: bool) -> None:
    """As check_norm_options of csrc/ops/cuda/common.h, for calls that are compiled."""
    if normed and eps is None:
        raise ValueError(f"nm_act::{op} expected eps along with {weights}, got none; give the epsilon of the norm")
    if not normed and (eps is not None or unit_offset):
        option = "unit_offset" if eps is None else "eps"
        raise ValueError(
            f"nm_act::{op} expected {weights} along with {option}, got none; leave the option out or give the weight"
        )


library.only_on_cuda("rms_norm_prune", "silu_mul_prune", "e4m3_product", "rms_norm_add")
library.only_on_cuda("decode_linear", "sandwich_linear")
library.only_on_cuda("rotary", "rotary_cache", "decode_attention")
