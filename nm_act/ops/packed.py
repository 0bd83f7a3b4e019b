"""2:4 operands packed for the sparse tensor cores of the current device (CUDA), and their product.

``compress_packed`` and the fused producers write the layout that this device's sparse GEMM reads, once for all
consumers of an activation; ``sparse_gemm`` multiplies. :func:`nm_act.sparse_linear` does both in one call, and falls
back to other products where these operators refuse.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..patterns import NMPattern
from . import formulas, library, operators
from .legacy import not_packed, takes_activation_dtype, takes_operand, takes_pattern
from .lifting import is_lifted, lifted_features, unlift

_PLAIN = NMPattern(2, 4)
_TILES = {"sm80_16bit": (32, 32), "sm90_16bit_t64": (64, 64), "sm90_8bit": (64, 128)}
"""Tokens and features of a metadata tile of each layout (csrc/kernels/format/metadata.h)."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed 2:4 operand: its tensors and a description of them, which every consumer checks.

    Iteration gives the tensors in the order ``values, metadata, row_scale, eta`` and, if there is one, ``hidden``.

    Attributes
    ----------
    values : Tensor [tokens, in_features / 2], dtype of the input or float8_e4m3fn
        For 2:4+1, half of the lifted in_features.
    metadata : Tensor [bytes], uint8, in ``layout`` (:func:`nm_act.unpack_metadata` reads it)
    row_scale : Tensor [tokens] or [0], float32: variance factor times e4m3 scale
    eta : Tensor [tokens] or [0], float32: per-token shift
    pattern : NMPattern
        2:4 or 2:4+1.
    in_features : int
        Of the activation.
    layout : str
        One of ``METADATA_LAYOUTS``: the one that this device's sparse GEMM reads for this dtype.
    tokens : int
    hidden : Tensor [..., in_features], optional
        Of :func:`rms_norm_compress`: ``x + residual`` (``x`` itself without one), the next residual.
    """

    values: Tensor = field(repr=False)
    metadata: Tensor = field(repr=False)
    row_scale: Tensor = field(repr=False)
    eta: Tensor = field(repr=False)
    pattern: NMPattern
    in_features: int
    layout: str
    tokens: int
    hidden: Tensor | None = field(default=None, repr=False)

    def to_dense(self) -> Tensor:
        """The values at their places in the activation, ``[tokens, in_features]`` with zeros between, for inspection.

        ``row_scale`` and ``eta``, which the product applies, are not applied. The metadata is read on the host.
        """
        features = lifted_features(self.pattern, self.in_features)
        metadata = operators.unpack_metadata(self.metadata.cpu(), self.tokens, features, self.layout)
        # e4m3 values are moved as bytes, because torch's scatter does not take e4m3.
        bits = self.values.view(torch.uint8) if self.values.element_size() == 1 else self.values
        dense = formulas.decompress(bits, metadata.to(bits.device)).view(self.values.dtype)
        return unlift(dense, self.pattern, self.in_features) if is_lifted(self.pattern) else dense

    def __iter__(self) -> Iterator[Tensor]:
        tensors = (self.values, self.metadata, self.row_scale, self.eta)
        return iter(tensors if self.hidden is None else (*tensors, self.hidden))


def _packed(tensors: Sequence[Tensor], x: Tensor, pattern: NMPattern, hidden: Tensor | None = None) -> Packed:
    """The operand that an operator made from ``x``."""
    values, metadata, row_scale, eta = tensors
    layout, tokens = _layout(values.dtype, values.device), x.numel() // x.shape[-1]
    return Packed(values, metadata, row_scale, eta, pattern, x.shape[-1], layout, tokens, hidden)


def _layout(dtype: torch.dtype, device: torch.device) -> str:
    """The metadata layout that the device's sparse GEMM reads for values of this dtype."""
    if dtype == torch.float8_e4m3fn:
        return "sm90_8bit"
    return "sm90_16bit_t64" if library.is_sm90(device) else "sm80_16bit"


@takes_activation_dtype
@takes_pattern
def compress_packed(
    x: Tensor,
    pattern: NMPattern | str = "2:4",
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    variance_correction: bool = False,
    activation_dtype: torch.dtype | None = None,
) -> Packed:
    """Select and pack for this device's sparse GEMM, in one pass over ``x``.

    2:4 is packed as it is; 2:4+1 becomes the 2:4 operand of the lifted weight, with the in_features of
    :func:`nm_act.lift_weight`.

    Parameters
    ----------
    x : Tensor [..., in_features], bfloat16 or float16, on CUDA
        in_features divisible by 16 (in e4m3 by 32), for 2:4+1 by four times that; at most 32768 in e4m3 or with a
        per-token statistic.
    pattern : NMPattern or str
        2:4 or 2:4+1.
    channel_scale, shift, token_shift
        The selection, as in :func:`nm_act.prune`.
    variance_correction : bool
        Put VAR's factor into ``row_scale``.
    activation_dtype : torch.dtype, optional
        torch.float8_e4m3fn casts the survivors to e4m3 with one dynamic scale per token, max|Z| / 448. Default: the
        dtype of ``x``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or option does not fit.
    NotImplementedError
        If ``x`` is not on CUDA, or a row is too long for its statistics.
    """
    pattern = pattern if isinstance(pattern, NMPattern) else NMPattern(pattern)
    tensors = library.call(
        "compress_packed",
        x,
        pattern.keep,
        pattern.group,
        channel_scale=channel_scale,
        shift=shift,
        token_shift=token_shift,
        variance_correction=variance_correction,
        activation_dtype=activation_dtype,
        extra_columns=pattern.extra_columns,
    )
    return _packed(tensors, x, pattern)


@takes_activation_dtype
def rms_norm_compress(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    variance_correction: bool = False,
    activation_dtype: torch.dtype | None = None,
    unit_offset: bool = False,
    x_weight: Tensor | None = None,
) -> Packed:
    """``compress_packed(RMSNorm(x + residual) * weight)`` in one kernel, with ``hidden``, the next residual.

    Parameters
    ----------
    x, residual : Tensor [..., in_features], bfloat16 or float16
    weight : Tensor [in_features], dtype of x
    eps : float
    channel_scale, shift, token_shift, variance_correction, activation_dtype
        As in :func:`compress_packed`; the pattern is 2:4.
    unit_offset, x_weight
        As in :func:`nm_act.ops.fused.rms_norm_prune`.
    """
    *tensors, hidden = library.call(
        *("rms_norm_compress", x, weight, eps, residual),
        channel_scale=channel_scale,
        shift=shift,
        token_shift=token_shift,
        variance_correction=variance_correction,
        activation_dtype=activation_dtype,
        unit_offset=unit_offset,
        x_weight=x_weight,
    )
    return _packed(tensors, x, _PLAIN, x if residual is None else hidden)


@takes_activation_dtype
def silu_mul_compress(
    gate: Tensor,
    up: Tensor,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    variance_correction: bool = False,
    activation_dtype: torch.dtype | None = None,
    activation: str = "silu",
) -> Packed:
    """``compress_packed(activation(gate) * up)`` in one kernel.

    Parameters
    ----------
    gate, up : Tensor [..., in_features], bfloat16 or float16
        The halves of a merged projection are read in place.
    channel_scale, shift, token_shift, variance_correction, activation_dtype
        As in :func:`compress_packed`; the pattern is 2:4.
    activation : {"silu", "gelu_tanh"}
        "gelu_tanh" is GELU with the tanh approximation.
    """
    tensors = library.call(
        *("silu_mul_compress", gate, up),
        channel_scale=channel_scale,
        shift=shift,
        token_shift=token_shift,
        variance_correction=variance_correction,
        activation_dtype=activation_dtype,
        activation=activation,
    )
    return _packed(tensors, gate, _PLAIN)


@takes_operand
def sparse_gemm(
    operand: Packed,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift_out: Tensor | None = None,
    column_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``(row_scale * P @ weight.t() + eta (x) shift_out) * column_scale + bias`` on sparse tensor cores.

    Parameters
    ----------
    operand : Packed
        Packed on this device.
    weight : Tensor [out_features, in_features], dtype of the operand's values
        16-bit: either stride order; e4m3: contiguous. For 2:4+1, :func:`nm_act.lift_weight` of it.
    bias : Tensor [out_features], optional
    shift_out, column_scale : Tensor [out_features], optional
        An operand with a per-token shift needs ``shift_out``, the row sums of the weight.
    out_dtype : torch.dtype, optional
        Dtype of the result: that of 16-bit values; bfloat16 (default) or float16 for e4m3.
    residual : Tensor [tokens, out_features], dtype of the result, optional
        Added to the rounded result, in the same kernel if one tile fills the device.

    Returns
    -------
    Tensor [tokens, out_features], accumulated in float32

    Raises
    ------
    TypeError
        If the operand is no Packed.
    ValueError
        If the operand is on another device, or of another pattern or size, or its tensors are not the ones packed.
    NotImplementedError
        If no compiled kernel takes the combination; the sentence lists what is compiled.
    """
    _check_operand(operand, weight)
    if operand.eta.numel() and shift_out is None:
        raise ValueError(
            "expected shift_out for an operand with a per-token shift, got none; give the row sums of the weight"
        )
    y: Tensor = library.call(
        "sparse_gemm",
        operand.values,
        operand.metadata,
        operand.layout,
        weight,
        bias,
        row_scale=operand.row_scale,
        eta=operand.eta,
        shift_out=shift_out,
        column_scale=column_scale,
        out_dtype=out_dtype,
        residual=residual,
    )
    return y


def sparse_gemm_silu_mul(operand: Packed, weight: Tensor, *, activation: str = "silu") -> Packed:
    """The packed 2:4 operand of ``activation(gate) * up``, in one kernel with ``[gate, up] = operand @ weight.t()``.

    The result is bit for bit that of :func:`silu_mul_compress`; gate, up and their product never reach memory.

    Parameters
    ----------
    operand : Packed
        2:4 in 16 bits, packed on this device, without a per-token shift or a variance factor.
    weight : Tensor [2 * outputs, in_features], dtype of the operand's values
        The weights of gate and up, concatenated, stored [in, out]; outputs divisible by 16.
    activation : {"silu", "gelu_tanh"}

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.
    NotImplementedError
        If the device does not have compute capability 9.0, or the weight is stored in another layout.
    """
    _check_operand(operand, weight)
    if operand.eta.numel() or (operand.row_scale.numel() and operand.values.dtype != torch.float8_e4m3fn):
        raise ValueError(
            "expected an operand without a per-token shift or factor, got "
            f"{operand.eta.numel()} shifts and {operand.row_scale.numel()} factors; use sparse_gemm and "
            "silu_mul_compress"
        )
    values, metadata = library.call(
        *("sparse_gemm_silu_mul", operand.values, operand.metadata, operand.layout, weight), activation=activation
    )
    outputs, eta = weight.shape[0] // 2, operand.eta
    return Packed(values, metadata, eta, eta, _PLAIN, outputs, operand.layout, operand.tokens)


def _check_operand(operand: Packed, weight: Tensor) -> None:
    """Raise a TypeError or ValueError in one sentence unless the operand is whole and the weight fits it."""
    if not isinstance(operand, Packed):
        raise not_packed(operand)
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected weight as a torch.Tensor, got {type(weight).__name__}; pass the layer's own")
    features = lifted_features(operand.pattern, operand.in_features)
    if operand.values.shape != (operand.tokens, features // 2) or not operand.values.is_contiguous():
        raise ValueError(
            f"expected an operand with contiguous values [{operand.tokens}, {features // 2}] for {operand.tokens} "
            f"tokens of {operand.in_features} features in {operand.pattern}, got {list(operand.values.shape)} with "
            f"strides {operand.values.stride()}; compress the part of x that is wanted"
        )
    if weight.dim() != 2 or weight.shape[1] != features:
        lifted = "; use nm_act.lift_weight(weight, pattern)" if is_lifted(operand.pattern) else "; use the layer's own"
        raise ValueError(
            f"expected weight of shape [out_features, {features}] for an operand of {operand.in_features} features in "
            f"{operand.pattern}, got {list(weight.shape)}{lifted}"
        )


@torch.library.register_fake("nm_act::compress_packed")
@torch.library.register_fake("nm_act::silu_mul_compress")
def _fake_packed(
    x: Tensor,
    *_others: Any,
    token_shift: str = "none",
    variance_correction: bool = False,
    activation_dtype: torch.dtype | None = None,
    extra_columns: Sequence[int] = (),
    **_options: Any,
) -> tuple[Tensor, ...]:
    tokens, in_features = x.numel() // x.shape[-1], lifted_features(NMPattern(2, 4, extra_columns), x.shape[-1])
    dtype = activation_dtype or x.dtype
    tile_tokens, tile_features = _TILES[_layout(dtype, x.device)]
    rounded = (tokens + tile_tokens - 1) // tile_tokens * tile_tokens
    metadata = rounded * ((in_features + tile_features - 1) // tile_features * tile_features) // 8
    return (
        x.new_empty((tokens, in_features // 2), dtype=dtype),
        x.new_empty((metadata,), dtype=torch.uint8),
        x.new_empty((tokens if variance_correction or dtype == torch.float8_e4m3fn else 0,), dtype=torch.float32),
        x.new_empty((tokens if token_shift != "none" else 0,), dtype=torch.float32),
    )


@torch.library.register_fake("nm_act::rms_norm_compress")
def _(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    return *_fake_packed(x, **options), x.new_empty((0,) if residual is None else x.shape)


@torch.library.register_fake("nm_act::sparse_gemm")
def _(
    values: Tensor,
    metadata: Tensor,
    layout: str,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    **_vectors: Tensor | None,
) -> Tensor:
    library.check_devices("sparse_gemm", values, metadata=metadata, weight=weight, bias=bias)
    dtype = out_dtype or (torch.bfloat16 if values.dtype == torch.float8_e4m3fn else values.dtype)
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("nm_act::sparse_gemm_silu_mul")
def _(
    values: Tensor, metadata: Tensor, layout: str, weight: Tensor, *, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    packed, packed_metadata, *_ = _fake_packed(values.new_empty((values.shape[0], weight.shape[0] // 2)))
    return packed, packed_metadata


library.only_on_cuda("compress_packed", "rms_norm_compress", "silu_mul_compress", "sparse_gemm", "sparse_gemm_silu_mul")
