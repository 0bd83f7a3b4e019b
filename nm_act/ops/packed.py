"""2:4 operands packed for the sparse tensor cores of the device at hand (CUDA), and their product.

``compress_packed`` and the fused producers write the layout that this device's sparse GEMM reads, once for all
consumers of an activation; ``sparse_gemm`` multiplies. :func:`nm_act.sparse_linear` does both in one call and falls
back where these refuse.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..patterns import NMPattern
from .lifting import lifted_features


class Packed(NamedTuple):
    """A packed 2:4 operand.

    Attributes
    ----------
    values : Tensor [tokens, in_features / 2], dtype of the input or float8_e4m3fn
    metadata : Tensor [bytes], uint8, in the layout of the device's GEMM (:func:`nm_act.unpack_metadata` reads it)
    row_scale : Tensor [tokens] or [0], float32: variance factor times fp8 scale
    eta : Tensor [tokens] or [0], float32: per-token shift
    """

    values: Tensor
    metadata: Tensor
    row_scale: Tensor
    eta: Tensor


def compress_packed(
    x: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    variance_correction: bool = False,
    fp8: bool = False,
    extra_columns: Sequence[int] = (),
) -> Packed:
    """Select and pack for this device's sparse GEMM, in one pass over ``x``.

    2:4 is packed as it is; 2:4+1 becomes the 2:4 operand of the lifted weight, with the in_features of
    :func:`nm_act.lift_weight`.

    Parameters
    ----------
    x : Tensor [..., in_features], bfloat16 or float16, on CUDA
        in_features divisible by 16, with ``fp8`` by 32, for 2:4+1 by four times that; at most 32768 with fp8 or a
        per-token statistic.
    n, m : int
        The pattern.
    channel_scale, shift, token_shift
        The selection, as in :func:`nm_act.prune`.
    variance_correction : bool
        Put VAR's factor into ``row_scale``.
    fp8 : bool
        Cast the survivors to e4m3 with one dynamic scale a token, max|Z| / 448.
    extra_columns : sequence of int
        As in :func:`nm_act.prune`.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or option does not fit.
    NotImplementedError
        If ``x`` is not on CUDA, or a row is too long for its statistics.
    """
    return Packed(
        *ops.call(
            "compress_packed",
            x,
            n,
            m,
            channel_scale=channel_scale,
            shift=shift,
            token_shift=token_shift,
            variance_correction=variance_correction,
            fp8=fp8,
            extra_columns=extra_columns,
        )
    )


def rms_norm_compress(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``compress_packed(RMSNorm(x + residual) * weight)`` in one kernel.

    Parameters
    ----------
    x, residual : Tensor [..., in_features], bfloat16 or float16
    weight : Tensor [in_features], dtype of x
    eps : float
    **options
        As in :func:`compress_packed`.

    Returns
    -------
    values, metadata, row_scale, eta : Tensor
        The fields of a :class:`Packed`.
    hidden : Tensor
        ``x + residual`` (``x`` itself without one), the next residual.
    """
    *packed, hidden = ops.call("rms_norm_compress", x, weight, eps, residual, **options)
    return *packed, x if residual is None else hidden


def silu_mul_compress(gate: Tensor, up: Tensor, **options) -> Packed:
    """``compress_packed(SiLU(gate) * up)`` in one kernel.

    Parameters
    ----------
    gate, up : Tensor [..., in_features], bfloat16 or float16
        The halves of a merged projection are read in place.
    **options
        As in :func:`compress_packed`.
    """
    return Packed(*ops.call("silu_mul_compress", gate, up, **options))


def sparse_gemm(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    eta: Tensor | None = None,
    shift_out: Tensor | None = None,
    column_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(row_scale * P @ weight.t() + eta (x) shift_out) * column_scale + bias`` on sparse tensor cores.

    Parameters
    ----------
    values, metadata
        A packed operand of this device.
    weight : Tensor [out_features, in_features], dtype of values
        16-bit: either stride order; e4m3: contiguous.
    bias : Tensor [out_features], optional
    row_scale, eta : Tensor [tokens], optional
        Length 0 counts as absent, so that the fields of a :class:`Packed` can be passed as they are.
    shift_out, column_scale : Tensor [out_features], optional
    out_dtype : torch.dtype, optional
        Dtype of the result; that of 16-bit values, bfloat16 (or float16) for e4m3.

    Returns
    -------
    Tensor [tokens, out_features], accumulated in float32

    Raises
    ------
    NotImplementedError
        If no compiled kernel takes the combination; the sentence lists what is compiled.
    """
    return ops.call(
        "sparse_gemm",
        values,
        metadata,
        weight,
        bias,
        row_scale=row_scale,
        eta=eta,
        shift_out=shift_out,
        column_scale=column_scale,
        out_dtype=out_dtype,
    )


def sparse_linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    **options,
) -> Tensor:
    """:func:`nm_act.sparse_linear` with 2:4 and e4m3 on both sides: per-token dynamic x per-output-channel scales.

    Parameters
    ----------
    x : Tensor [..., in_features], bfloat16 or float16, on CUDA (sm_90)
    weight : Tensor [out_features, in_features], float8_e4m3fn, contiguous
        ``W / weight_scale`` rounded.
    weight_scale : Tensor [out_features], float32
    bias : Tensor [out_features], dtype of x, optional
    **options
        channel_scale, shift, token_shift, shift_out, variance_correction, column_scale as in
        :func:`nm_act.sparse_linear`; ``shift_out`` is the image under the dequantised weight.

    Returns
    -------
    Tensor [..., out_features], dtype of x
    """
    return ops.call("sparse_linear_fp8", x, weight, weight_scale, bias, **options)


def _fake_packed(
    x: Tensor, variance_correction: bool, fp8: bool, token_shift: str, pattern: str | NMPattern = "2:4"
) -> Packed:
    tokens = x.numel() // x.shape[-1]
    in_features = lifted_features(pattern, x.shape[-1])
    wide_tiles = fp8 or torch.cuda.get_device_capability(x.device)[0] == 9
    tile_tokens, tile_features = (64, 128) if wide_tiles else (32, 32)
    rounded = (tokens + tile_tokens - 1) // tile_tokens * tile_tokens
    metadata = rounded * ((in_features + tile_features - 1) // tile_features * tile_features) // 8
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    return Packed(
        x.new_empty((tokens, in_features // 2), dtype=dtype),
        x.new_empty((metadata,), dtype=torch.uint8),
        x.new_empty((tokens if variance_correction or fp8 else 0,), dtype=torch.float32),
        x.new_empty((tokens if token_shift != "none" else 0,), dtype=torch.float32),
    )


@torch.library.register_fake("nm_act::compress_packed")
def _(
    x,
    n=2,
    m=4,
    *,
    channel_scale=None,
    shift=None,
    token_shift="none",
    variance_correction=False,
    fp8=False,
    extra_columns=(),
):
    return _fake_packed(x, variance_correction, fp8, token_shift, NMPattern(n, m, extra_columns))


@torch.library.register_fake("nm_act::rms_norm_compress")
def _(
    x,
    weight,
    eps,
    residual=None,
    *,
    channel_scale=None,
    shift=None,
    token_shift="none",
    variance_correction=False,
    fp8=False,
):
    hidden = x.new_empty((0,) if residual is None else x.shape)
    return *_fake_packed(x, variance_correction, fp8, token_shift), hidden


@torch.library.register_fake("nm_act::silu_mul_compress")
def _(gate, up, *, channel_scale=None, shift=None, token_shift="none", variance_correction=False, fp8=False):
    return _fake_packed(gate, variance_correction, fp8, token_shift)


@torch.library.register_fake("nm_act::sparse_gemm")
def _(values, metadata, weight, bias=None, *, out_dtype=None, **_vectors):
    dtype = out_dtype or (torch.bfloat16 if values.dtype == torch.float8_e4m3fn else values.dtype)
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("nm_act::sparse_linear_fp8")
def _(x, weight, weight_scale, bias=None, **_options):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


for _name in ("compress_packed", "rms_norm_compress", "silu_mul_compress", "sparse_gemm", "sparse_linear_fp8"):
    ops.refuse(_name, "CPU")
    if not ops.build_info()["cuda"]:
        ops.refuse(_name, "CUDA")
