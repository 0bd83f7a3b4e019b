"""The operators next to a sparse layer in a decoder block, fused with its selection or its product (CUDA, 16 bits).

These serve every N:M; the producers of the packed 2:4 operand are in :mod:`nm_act.ops.packed`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..patterns import NMPattern
from . import library
from .attention import attends as attends
from .attention import decode_attention as decode_attention
from .attention import norms_heads as norms_heads
from .attention import rotary as rotary
from .attention import rotary_cache as rotary_cache

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
        Weight of a norm of ``x`` before the residual is added, with the same eps and offset:
        ``hidden = norm(x) + residual``, as in layers with norms before and after their parts. Needs a residual.

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
    """``RMSNorm(x) * weight + residual`` in one kernel, for layers with a norm after attention and MLP.

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
    operand : Pruned
    weight : Tensor [out_features, in_features], dtype of the operand's values
        In e4m3: contiguous, with features divisible by 16; the result is then bfloat16. For up to 16 tokens, the
        product is also rounded to bfloat16 before it is scaled.
    bias : Tensor [out_features], dtype of the result, optional
    weight_scale : Tensor [out_features], float32, optional
        Of a weight in e4m3, which needs it.
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
        Dtype of x, or float8_e4m3fn or int8.
    bias : Tensor [out_features], dtype of x, optional
    pattern : NMPattern or str
        N:M without extra windows.
    up : Tensor like x, optional
        With ``activation``, and not without.
    norm_weight : Tensor [in_features], dtype of x, optional
        Not with ``up``.
    eps : float, optional
        With ``norm_weight``, and not without.
    residual : Tensor [..., out_features], dtype of x, optional
    channel_scale : Tensor [in_features], float32 or the dtype of x, optional
        As in :func:`nm_act.prune`.
    weight_scale : Tensor [out_features], float32, optional
        Of an 8-bit weight, which needs it.
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

    For layers with norms before and after their parts; every block of the kernel computes both norms.

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
    library.check_norm_options("decode_linear", "norm_weight", norm_weight is not None, eps, unit_offset)
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


library.only_on_cuda("rms_norm_prune", "silu_mul_prune", "e4m3_product", "rms_norm_add")
library.only_on_cuda("decode_linear", "sandwich_linear")
