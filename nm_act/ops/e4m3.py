"""Weights in e4m3, and the linear layer over one or two copies of such a weight.

The choice of a copy by the number of tokens is an operator, because one compiled graph serves any number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patterns import NMPattern
from .autograd import refuse_gradient, unrecorded
from .explain import gathers
from .library import _C, check_devices

E4M3 = torch.float8_e4m3fn
FP8_LAYOUTS = ("prefill", "decode", "both")
"""The phases that the e4m3 copies of a weight are stored for."""

FEW_TOKENS = _C.FEW_TOKENS
"""Largest number of tokens for which skipping weight rows pays in e4m3."""


SKIPPING_TOKENS, MOST_ROWS = 2, 0.55
"""The gather kernel beats a dense e4m3 product over the other copy for up to so many tokens with any pattern, and for
more tokens if they are expected to need at most this share of the rows together. On an H100, the four products of a
Llama-3-8B layer with 8:16 took 53, 80, 109 and 118 us for one to four tokens; with every row 91, 96, 114 and 115; and
dense e4m3 products, whose operand is pruned before, 95 to 97 (benchmarks/results/h100/few_tokens.csv). The share is
interpolated for three tokens."""


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
    """A weight in e4m3 for a layout of ``FP8_LAYOUTS``; stored as bytes, because .to(dtype) would convert e4m3."""

    codes: Tensor | None  # [out, in], uint8: what fp8 tensor cores read; None for "decode"
    rows: Tensor | None  # [in, out], uint8: what few tokens read their survivors' rows from; None for "prefill"
    scale: Tensor  # [out], float32

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
        """``[out, in]`` in e4m3; contiguous if there is a copy in that layout."""
        if self.codes is not None:
            return self.codes.view(E4M3)
        assert self.rows is not None  # one of them is there
        return self.rows.view(E4M3).t()

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]`` in 16 or 32 bits, in the storage order of ``values``."""
        return self.values.float().mul_(self.scale[:, None]).to(dtype)

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [tensor for tensor in (self.codes, self.rows, self.scale) if tensor is not None]

    def linear(self, x: Tensor, _weight: Any, bias: Tensor | None, pattern: NMPattern, **options: Any) -> Tensor:
        """``x [..., in] -> [..., out]`` with this weight; the signature is that of :func:`nm_act.sparse_linear`."""
        if pattern.extra_columns:
            options["extra_columns"] = pattern.extra_columns
        stored = (self.codes, self.rows, self.scale, bias, pattern.keep, pattern.group)
        return unrecorded(torch.ops.nm_act.e4m3_linear, x, *stored, **options)


def reads_rows(
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    pattern: NMPattern,
    codes: Tensor | None,
    rows: Tensor | None,
) -> bool:
    """Whether a call of so many tokens reads the copy for row skipping and keeps its activation in 16 bits.

    With both copies: if the gather kernel takes the call and pays; any other product over ``rows`` would dequantise the
    weight.
    """
    if codes is None or rows is None:
        return codes is None
    if tokens > FEW_TOKENS:
        return False
    if device.type != "cuda" or dtype == torch.float32:  # neither kernel
        return True
    return tokens <= skipping_tokens(pattern) and gathers(tokens, pattern, dtype, device, rows.view(E4M3).t())


def skipping_tokens(pattern: NMPattern) -> int:
    """Largest number of tokens for which row skipping pays with a pattern if the [out, in] copy exists too."""
    dropped = 1 - pattern.kept_fraction
    few = [tokens for tokens in range(1, FEW_TOKENS + 1) if 1 - dropped**tokens <= MOST_ROWS]
    return max(SKIPPING_TOKENS, len(few))


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
    pattern = _check(x, codes, rows, weight_scale, bias, n, m, **options)
    few = reads_rows(x.shape[:-1].numel(), x.dtype, x.device, pattern, codes, rows)
    weight = E4M3Weight(None if few else codes, rows, weight_scale).values
    options |= {"weight_scale": weight_scale, "activation_dtype": None if few else E4M3}
    y: Tensor = torch.ops.nm_act.sparse_linear(x, weight, bias, n, m, **options)
    return y


@torch.library.register_fake("nm_act::e4m3_linear")
def _(
    x: Tensor, codes: Tensor | None, rows: Tensor | None, weight_scale: Tensor, *others: Any, **options: Any
) -> Tensor:
    _check(x, codes, rows, weight_scale, *others, **options)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def _check(
    x: Tensor,
    codes: Tensor | None,
    rows: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    *,
    channel_scale: Tensor | None = None,
    token_shift: str = "none",
    shift_out: Tensor | None = None,
    variance_correction: bool = False,
    extra_columns: Sequence[int] = (),
) -> NMPattern:
    """Raise a TypeError or ValueError in one sentence for arguments that do not fit; else the pattern.

    Eager and compiled calls give the same errors, although tracing a compiled call runs no kernel.
    """
    op = "nm_act::e4m3_linear"
    copies = {"codes": codes, "rows": rows}
    given = {name: copy for name, copy in copies.items() if copy is not None}
    if not given:
        raise ValueError(
            f"{op} expected codes [out, in], rows [in, out] or both, got neither; give a copy of the weight"
        )
    for name, copy in given.items():
        if copy.dtype != torch.uint8:
            raise TypeError(f"{op} expected {name} as the bytes of e4m3 values, uint8, got {copy.dtype}; view it so")
        if copy.dim() != 2:
            axes = "[out, in]" if name == "codes" else "[in, out]"
            raise ValueError(f"{op} expected {name} of shape {axes}, got {list(copy.shape)}; reshape it")
    out, features = rows.shape[::-1] if codes is None else codes.shape  # type: ignore[union-attr]
    if len(given) == 2 and rows.shape != (features, out):  # type: ignore[union-attr]
        raise ValueError(
            f"{op} expected rows of shape [{features}, {out}] beside codes [{out}, {features}], got "
            f"{list(rows.shape)}; give copies of one weight"  # type: ignore[union-attr]
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op} expected x in float32, bfloat16 or float16, got {x.dtype}; convert it first")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"{op} expected x of shape [..., {features}] for a weight of {features} inputs, got {list(x.shape)}; "
            "check the layer's input"
        )
    of_x = (torch.float32, x.dtype)
    _check_vector(op, "weight_scale", weight_scale, out, (torch.float32,))
    _check_vector(op, "bias", bias, out, (x.dtype,))
    _check_vector(op, "channel_scale", channel_scale, features, of_x)
    _check_vector(op, "shift_out", shift_out, out, of_x)
    others = {"weight_scale": weight_scale, "bias": bias, "channel_scale": channel_scale, "shift_out": shift_out}
    check_devices("e4m3_linear", x, **given, **others)
    if token_shift not in ("none", "mean", "median"):
        raise ValueError(
            f'{op} expected token_shift "none", "mean" or "median", got {token_shift!r}; choose one of those'
        )
    if shift_out is not None and token_shift == "none":
        raise ValueError(f"{op} expected token_shift along with shift_out, got shift_out alone; leave it out")
    pattern = NMPattern(n, m, extra_columns)
    if features % pattern.span:
        raise ValueError(
            f"{op} expected in_features divisible by {pattern.span} for {pattern}, got {features}; choose another"
        )
    return pattern


def _check_vector(op: str, name: str, vector: Tensor | None, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if vector is None:
        return
    if vector.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"{op} expected {name} in {wanted}, got {vector.dtype}; convert it first")
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{op} expected {name} of shape [{size}], got {list(vector.shape)}; give one value a channel")


refuse_gradient("e4m3_linear", "a weight in the dtype of x (nm_act.deoptimize gives such layers)")
