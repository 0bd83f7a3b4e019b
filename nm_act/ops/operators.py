"""The documented wrappers of the compiled operators, and their fakes.

The selection contract, identical on every device, is written in ``csrc/ops/schemas.cpp`` and ``nm_act/reference.py``.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from ..patterns import NMPattern
from . import formulas
from .legacy import takes_pattern
from .library import _C, build_info, call, check_devices, refuse

METADATA_LAYOUTS = ("neutral", "sm80_16bit", "sm90_16bit_t64", "sm90_8bit")
"""Names of the 2:4 metadata layouts; tensor cores read the sm80 and sm90 ones."""


@takes_pattern
def prune(
    x: Tensor,
    pattern: NMPattern | str,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
) -> Tensor:
    """Keep the ``N`` best of every ``M`` consecutive features of each token: ``P(X - eta)``.

    Parameters
    ----------
    x : Tensor [..., in_features], float32, bfloat16 or float16
    pattern : NMPattern or str
        "N:M", where M in {2, 4, 8, 16, 32} divides in_features, or "2:4+1" or "2:4+2", where 16 does.
    channel_scale : Tensor [in_features], float32 or the dtype of x, optional
        ``c`` in the score ``|x - eta| * |c|`` (Amber-Pruner, WINA, ...); 1 if absent.
    shift : Tensor [in_features], float32 or the dtype of x, optional
        Static ``eta`` per channel (S-PTS, L-PTS), subtracted before the selection.
    token_shift : {"none", "mean", "median"}
        Dynamic ``eta`` per token (D-PTS); excludes ``shift``.

    Returns
    -------
    Tensor
        Shape and dtype of ``x``, contiguous; pruned entries are +0.0.

    Raises
    ------
    TypeError
        If a dtype is not supported.
    ValueError
        If a pattern, shape, device or option does not fit.

    Notes
    -----
    The gradient treats the mask as a constant: a survivor gets the gradient of its output, a pruned entry gets 0.
    Source: arXiv 2509.22166.

    Examples
    --------
    >>> import torch, nm_act
    >>> nm_act.prune(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), "2:4")
    tensor([[ 0., -3.,  2.,  0.]])
    """
    pattern = pattern if isinstance(pattern, NMPattern) else NMPattern(pattern)
    y: Tensor = call(
        "prune",
        x,
        pattern.keep,
        pattern.group,
        channel_scale=channel_scale,
        shift=shift,
        token_shift=token_shift,
        extra_columns=pattern.extra_columns,
    )
    return y


def compress(
    x: Tensor,
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
) -> tuple[Tensor, Tensor]:
    """Prune to 2:4 and pack: the survivors and their indices in the device-neutral format.

    Parameters are those of :func:`prune`; in_features must be divisible by 4.

    Returns
    -------
    values : Tensor [..., in_features / 2], dtype of x
        Two survivors per group of four, in index order.
    metadata : Tensor [..., ceil(in_features / 8)], uint8
        One nibble per group, ``first_index | second_index << 2``, with the lower group in the low nibble.

    Notes
    -----
    A backward pass is refused; :func:`prune` has a gradient.

    Examples
    --------
    >>> import torch, nm_act
    >>> nm_act.compress(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    (tensor([[-3.,  2.]]), tensor([[9]], dtype=torch.uint8))
    """
    values, metadata = call("compress", x, channel_scale=channel_scale, shift=shift, token_shift=token_shift)
    return values, metadata


def decompress(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense ``[..., in_features]`` tensor that :func:`compress` packed, to the bit, with zeros where it pruned.

    Examples
    --------
    >>> import torch, nm_act
    >>> nm_act.decompress(*nm_act.compress(torch.tensor([[1.0, -3.0, 2.0, 0.5]])))
    tensor([[ 0., -3.,  2.,  0.]])
    """
    x: Tensor = call("decompress", values, metadata)
    return x


@takes_pattern
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pattern: NMPattern | str = "2:4",
    *,
    channel_scale: Tensor | None = None,
    shift: Tensor | None = None,
    token_shift: str = "none",
    shift_out: Tensor | None = None,
    variance_correction: bool = False,
    column_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    lifted_weight: Tensor | None = None,
    activation_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer over an activation pruned to N:M on the fly.

    ``Y = (nu * (P(X - eta) @ W^T) + shift term) * column_scale + bias``

    Parameters
    ----------
    x : Tensor [..., in_features], float32, bfloat16 or float16
    weight : Tensor [out_features, in_features], dtype of x; float8_e4m3fn or int8 with ``weight_scale``
        Either stride order. If it is stored [in, out] (``weight.t()`` contiguous), a call of one to four tokens (eight
        in float32 on a CPU) reads only the rows whose input survived in one of them. On CUDA this needs x in 16 bits,
        out_features a multiple of 8 (16 for an 8-bit weight), rows aligned to 16 bytes and, for a 16-bit weight, a
        pattern that leaves at least 5 % of the rows unread. The weight should be finite: rows of pruned inputs may
        not be read.
    bias : Tensor [out_features], dtype of x, optional
    pattern : NMPattern or str
        "N:M", where M in {2, 4, 8, 16, 32} divides in_features, or "2:4+1", "2:4+2", where 16 does.
    channel_scale, shift, token_shift
        The selection, as in :func:`prune`.
    shift_out : Tensor [out_features], float32 or the dtype of x, optional
        Image of the shift, which compensates for its subtraction: for ``shift``, ``W @ shift`` (added as a bias); for
        ``token_shift``, the row sums ``W @ 1`` (multiplied by eta: a rank-1 term). If absent, every call computes it
        from the weight.
    variance_correction : bool
        VAR: ``nu = sqrt(Var(Z) / Var(P))`` per token, with Z = X - eta; 1 where Var(P) is 0.
    column_scale : Tensor [out_features], float32 or the dtype of x, optional
        LS: ``1 + s``.
    weight_scale : Tensor [out_features], float32, optional
        Scale of each output channel of an 8-bit weight: ``W = weight * weight_scale``. Where the gather kernel does
        not apply (more tokens, another storage order, a CPU), every call dequantises W to the dtype of x.
    lifted_weight : Tensor [out_features, lifted in_features], dtype of x, optional
        :func:`nm_act.lift_weight` of ``weight``, for 2:4+1 on the sparse tensor cores; used where it is faster, as
        :func:`nm_act.explain` reports.
    activation_dtype : torch.dtype, optional
        torch.float8_e4m3fn casts the survivors to e4m3 with one dynamic scale per token, for the fp8 tensor cores. It
        needs CUDA (sm_90), x in 16 bits and a contiguous float8_e4m3fn weight. Patterns other than 2:4 run on the dense
        fp8 tensor cores; they need x in bfloat16, without channel scale, shift, VAR or column scale. Default: the dtype
        of x.

    Returns
    -------
    Tensor [..., out_features], dtype of x

    Raises
    ------
    TypeError
        If a dtype is not supported or dtypes differ.
    ValueError
        If a pattern, shape, device or option does not fit.
    NotImplementedError
        If no fp8 kernel takes the combination; the sentence lists what is compiled.

    Notes
    -----
    The gradient is straight through the selection, with the forward's mask as a constant; autograd keeps x and the
    weight. ``channel_scale`` only affects the selection, so its gradient is 0. The whole gradient of the weight goes to
    ``weight``, none to ``lifted_weight``. A backward pass with ``weight_scale`` is refused. Under torch.func and for
    forward-mode derivatives, values may differ in rounding. Source: arXiv 2509.22166 (D-PTS, S-PTS, L-PTS, VAR, LS).

    Examples
    --------
    >>> import torch, nm_act
    >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
    >>> y = nm_act.sparse_linear(x, weight, pattern="8:16")
    >>> torch.allclose(y, nm_act.prune(x, "8:16") @ weight.t(), atol=1e-5)
    True
    """
    pattern = pattern if isinstance(pattern, NMPattern) else NMPattern(pattern)
    y: Tensor = call(
        "sparse_linear",
        x,
        weight,
        bias,
        pattern.keep,
        pattern.group,
        channel_scale=channel_scale,
        shift=shift,
        token_shift=token_shift,
        shift_out=shift_out,
        variance_correction=variance_correction,
        column_scale=column_scale,
        weight_scale=weight_scale,
        extra_columns=pattern.extra_columns,
        lifted_weight=lifted_weight,
        activation_dtype=activation_dtype,
    )
    return y


def sparse_linear_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Deprecated: :func:`nm_act.sparse_linear` with ``weight_scale`` and ``activation_dtype=torch.float8_e4m3fn``."""
    warnings.warn(
        "nm_act.sparse_linear_fp8 is deprecated; use nm_act.sparse_linear(x, weight, bias, weight_scale=weight_scale, "
        "activation_dtype=torch.float8_e4m3fn)",
        DeprecationWarning,
        stacklevel=2,
    )
    return sparse_linear(x, weight, bias, weight_scale=weight_scale, activation_dtype=torch.float8_e4m3fn, **options)


def gather_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, weight_scale: Tensor | None = None
) -> Tensor:
    """``x @ weight.t() + bias`` for one to eight tokens, reading only the weight rows whose input is not zero.

    The gather kernel of :func:`sparse_linear` without the selection, for inputs that are sparse already (ReLU, top-k).

    Parameters
    ----------
    x : Tensor [..., in_features], at most 8 tokens in all
    weight : Tensor [out_features, in_features], dtype of x, stored [in, out] (``weight.t()`` contiguous)
        Or float8_e4m3fn or int8, with a scale.
    bias : Tensor [out_features], dtype of x, optional
    weight_scale : Tensor [out_features], float32, optional
        ``W = weight * weight_scale``. On a CPU the weight is dequantised at every call.

    Examples
    --------
    >>> import torch, nm_act
    >>> weight = torch.randn(64, 32).t()
    >>> x = torch.relu(torch.randn(1, 64))
    >>> torch.allclose(nm_act.gather_linear(x, weight), x @ weight.t(), atol=1e-5)
    True
    """
    y: Tensor = call("gather_linear", x, weight, bias, weight_scale=weight_scale)
    return y


def pack_metadata(metadata: Tensor, in_features: int, layout: str) -> Tensor:
    """Reorder neutral 2:4 metadata into the layout that a tensor core reads, on the host.

    Parameters
    ----------
    metadata : Tensor [..., ceil(in_features / 8)], uint8, on the CPU
    in_features : int
        A multiple of 4; tokens and features are padded to whole tiles with the legal nibble 0x4.
    layout : str
        One of ``METADATA_LAYOUTS``.

    Returns
    -------
    Tensor [bytes], uint8
    """
    rows = metadata.shape[:-1].numel()
    return _tensor_of(_C.pack_metadata(_bytes_of(metadata), rows, in_features, layout))


def unpack_metadata(physical: Tensor, tokens: int, in_features: int, layout: str) -> Tensor:
    """Inverse of :func:`pack_metadata`: neutral metadata ``[tokens, ceil(in_features / 8)]``, uint8."""
    neutral = _C.unpack_metadata(_bytes_of(physical), tokens, in_features, layout)
    return _tensor_of(neutral).view(tokens, -(-in_features // 8))


def _bytes_of(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or tensor.dim() == 0:
        raise TypeError(
            f"expected metadata as uint8 on the CPU, got {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}; convert it first"
        )
    return tensor.contiguous().numpy().tobytes()


def _tensor_of(data: bytes) -> Tensor:
    # Of a copy that can be written; frombuffer takes no empty one.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


@torch.library.register_fake("nm_act::prune")
def _(x: Tensor, n: int, m: int, *, channel_scale: Any = None, shift: Any = None, **options: Any) -> Tensor:
    check_devices("prune", x, channel_scale=channel_scale, shift=shift)
    return x.new_empty(x.shape)


@torch.library.register_fake("nm_act::compress")
def _(x: Tensor, *, channel_scale: Any = None, shift: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    check_devices("compress", x, channel_scale=channel_scale, shift=shift)
    values = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    return values, x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("nm_act::decompress")
def _(values: Tensor, metadata: Tensor) -> Tensor:
    check_devices("decompress", values, metadata=metadata)
    return values.new_empty((*values.shape[:-1], values.shape[-1] * 2))


def _fake_linear(op: str, *names: str) -> None:
    """Register the fake of a linear operator, whose positional arguments after the weight start with ``names``."""

    def fake(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
        given = dict(zip(names, others, strict=False)) | options
        tensors = {name: each for name, each in given.items() if isinstance(each, Tensor)}
        check_devices(op, x, weight=weight, **tensors)
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    torch.library.register_fake(f"nm_act::{op}")(fake)


for _op in ("sparse_linear", "gather_linear", "dense_linear"):
    _fake_linear(_op, "bias")
_fake_linear("sparse_linear_prepacked", "prepacked_weight", "bias")


@torch.library.register_fake("nm_act::_packed_layer")
def _(x: Tensor, layer: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


for _op in ("dense_linear", "sparse_linear_prepacked", "_packed_layer"):
    refuse(_op, "CUDA")
if build_info()["cuda"]:
    torch.library.impl("nm_act::decompress", "CUDA")(formulas.decompress)
else:
    for _op in ("prune", "compress", "decompress", "sparse_linear", "gather_linear"):
        refuse(_op, "CUDA")
