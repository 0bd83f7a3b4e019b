"""Weights in e4m3, and the linear layer over one or two copies of such a weight.

The choice of the copy by the number of tokens is an operator, because a compiled graph serves any number of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..patterns import NMPattern
from .autograd import refuse_gradient, unrecorded

E4M3 = torch.float8_e4m3fn
FP8_LAYOUTS = ("prefill", "decode", "both")
"""The phases that the e4m3 copies of a weight are stored for."""

FEW_TOKENS = _C.FEW_TOKENS
"""Most tokens whose weight rows are worth skipping in e4m3."""


def check_layout(layout: object) -> None:
    """Raise a ValueError for an unknown layout of e4m3 weights."""
    if layout not in FP8_LAYOUTS:
        raise ValueError(f"expected fp8 among {', '.join(FP8_LAYOUTS)}, got {layout!r}; choose one of those")


def quantise_rows(values: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """8-bit values ``[rows, columns]``, rounded to nearest, and their float32 scales ``[rows]``.

    A scale is ``max|row| / 448`` for float8_e4m3fn, ``max|row| / 127`` for int8.
    """
    largest = 127 if dtype == torch.int8 else 448
    scale = (values.float().abs().amax(dim=1) / largest).clamp(min=1e-12)
    scaled = (values.float() / scale[:, None]).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


@dataclass(frozen=True, eq=False)
class E4M3Weight:
    """A weight in e4m3 for a layout of ``FP8_LAYOUTS``; bytes, because .to(dtype) would convert e4m3 tensors.

    Attributes
    ----------
    codes : Tensor [out, in], uint8, optional
        What fp8 tensor cores read; None for "decode".
    rows : Tensor [in, out], uint8, optional
        What few tokens read the rows of their survivors from; None for "prefill".
    scale : Tensor [out], float32
    """

    codes: Tensor | None
    rows: Tensor | None
    scale: Tensor

    @classmethod
    @torch.no_grad()
    def quantised(cls, weight: Tensor, layout: str) -> "E4M3Weight":
        """The copies of ``weight [out, in]`` for a layout."""
        # In slices: a float32 copy of a whole merged weight would determine the peak memory of the process.
        scales, codes = [], []
        for rows in weight.split(4096):
            quantised, scale = quantise_rows(rows)
            scales.append(scale)
            codes.append(quantised.view(torch.uint8))
        stored = torch.cat(codes)
        return cls(
            None if layout == "decode" else stored,
            None if layout == "prefill" else stored.t().contiguous(),
            torch.cat(scales),
        )

    @property
    def values(self) -> Tensor:
        """``[out, in]`` in e4m3; contiguous where it is stored so."""
        if self.codes is not None:
            return self.codes.view(E4M3)
        assert self.rows is not None  # one of them is there
        return self.rows.view(E4M3).t()

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]`` in 16 or 32 bits, in the storage order of ``values``."""
        return self.values.float().mul_(self.scale[:, None]).to(dtype)

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [tensor for tensor in (self.codes, self.rows, self.scale) if tensor is not None]

    def linear(self, x: Tensor, _weight: Tensor, bias: Tensor | None, pattern: NMPattern, **options: Any) -> Tensor:
        """``x [..., in] -> [..., out]``; with the signature of :func:`nm_act.sparse_linear`, whose weight this is."""
        if pattern.extra_columns:
            options["extra_columns"] = pattern.extra_columns
        stored = (self.codes, self.rows, self.scale, bias, pattern.keep, pattern.group)
        return unrecorded(torch.ops.nm_act.e4m3_linear, x, *stored, **options)


def reads_rows(tokens: int, codes: Tensor | None, rows: Tensor | None) -> bool:
    """Whether a call of so many tokens reads the copy for row skipping, and keeps its activation in 16 bits."""
    return codes is None or (rows is not None and tokens <= FEW_TOKENS)


torch.library.define(
    "nm_act::e4m3_linear",
    "(Tensor x, Tensor? codes, Tensor? rows, Tensor weight_scale, Tensor? bias, int n, int m, *, "
    "Tensor? channel_scale=None, str token_shift='none', Tensor? shift_out=None, bool variance_correction=False, "
    "int[] extra_columns=[]) -> Tensor",
)


@torch.library.impl("nm_act::e4m3_linear", ("cpu", "cuda"))
def _(
    x: Tensor,
    codes: Tensor | None,
    rows: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    **options: Any,
) -> Tensor:
    few = reads_rows(x.shape[:-1].numel(), codes, rows)
    weight = E4M3Weight(None if few else codes, rows, weight_scale).values
    options |= {"weight_scale": weight_scale, "activation_dtype": None if few else E4M3}
    y: Tensor = torch.ops.nm_act.sparse_linear(x, weight, bias, n, m, **options)
    return y


@torch.library.register_fake("nm_act::e4m3_linear")
def _(
    x: Tensor, codes: Tensor | None, rows: Tensor | None, weight_scale: Tensor, *_arguments: Any, **_options: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


refuse_gradient("e4m3_linear", "a weight in the dtype of x (nm_act.deoptimize gives such layers)")
