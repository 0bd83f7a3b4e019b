"""e4m3 weights: one byte per weight and one scale per output channel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.linear import NMLinear
from ..layers.work import LinearWork, work_of
from ..methods import mitigations
from ..ops.e4m3 import E4M3, E4M3Weight, check_layout
from . import readonly
from .eligible import not_fp8


class FP8Linear(readonly.DequantisedWeight):
    """An :class:`~nm_act.NMLinear` with its weight in float8_e4m3fn, ``W ~ weight_scale[:, None] * e4m3``.

    Parameters
    ----------
    layer : NMLinear
        Its weight is quantised per output channel: ``weight_scale = max|W| / 448``, rounded to nearest.
    layout : {"prefill", "decode", "both"}
        "prefill" stores [out, in], which fp8 tensor cores need: calls with any number of tokens have both operands in
        e4m3, 2:4 on the sparse tensor cores, other patterns on the dense ones over the pruned activation. "decode"
        stores [in, out]: calls of few tokens read only the rows of survivors; larger calls dequantise the weight to the
        dtype of x, so they gain no fp8 speed. "both" stores both, which together take the bytes of the 16-bit weight.

    Raises
    ------
    TypeError
        If ``layer`` is not an NMLinear.
    ValueError
        If the layout is unknown; if these paths cannot compute the layer (top-k, calibrated data, a score that depends
        on the call, pruned weights, dense first tokens or dense decode steps; for "prefill" and "both" also sizes that
        fp8 tensor cores do not take, 2:4+r, and with patterns other than 2:4 channel scales, D-PTS and VAR); or if its
        weight is offloaded or split over ranks, or it has hooks.

    Notes
    -----
    Channel scale and row sums are those of the weight as stored: e4m3 times its scale, before any rounding to the
    model's dtype.

    ``state_dict`` contains the dequantised weight under the stock name, so a checkpoint is a stock one but includes the
    rounding to e4m3; ``load_state_dict`` quantises.
    """

    float32 = ("weight_scale", "channel_scale", "shift_out", "scaled_shift_out")

    codes: Tensor | None
    rows: Tensor | None
    weight_scale: Tensor
    channel_scale: Tensor | None
    shift_out: Tensor | None
    scaled_shift_out: Tensor | None
    like: Tensor

    def __init__(self, layer: NMLinear, layout: str):
        check_layout(layout)
        if not isinstance(layer, NMLinear):
            raise TypeError(f"expected an NMLinear, got {type(layer).__name__}; make it with NMLinear.from_linear")
        why = not_fp8(layer, layout)
        if why:
            raise ValueError(
                f"expected a layer whose weight can be e4m3 for {layout}, got {layer.spec} ({why}); keep it in 16 bits"
            )
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.spec, self.layout = layer.spec, layout
        self.weight_layout, self.lift = layer.weight_layout, layer.lift  # of the 16-bit layer; to_nm_linear needs it
        # Stored as bytes, because .to(dtype) would convert an e4m3 buffer.
        self.register_buffer("codes", None, persistent=False)  # [out, in]
        self.register_buffer("rows", None, persistent=False)  # [in, out]
        self.register_buffer("weight_scale", None, persistent=False)
        self.register_buffer("channel_scale", None, persistent=False)
        self.register_buffer("shift_out", None, persistent=False)
        self.register_buffer("scaled_shift_out", None, persistent=False)
        self.register_buffer("like", layer.weight.new_empty(0), persistent=False)  # has the model's dtype
        self.bias = layer.bias
        self.register_state_dict_post_hook(_dequantised_state)  # type: ignore[no-untyped-call]
        self.store(layer.weight)
        self.train(layer.training)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantise ``weight [out, in]`` and compute channel scale and row sums from the stored values."""
        stored = E4M3Weight.quantised(weight, self.layout)
        self.codes, self.rows, self.weight_scale = stored.codes, stored.rows, stored.scale
        if self.spec.token_shift == "none" and self.spec.scoring.formula is None:
            return  # nothing is derived from the weight
        operand = self.dequantised(torch.float32)
        self.channel_scale = mitigations.selection_scale(self.spec, operand, operand, {})
        self.shift_out = mitigations.shift_image(self.spec, operand, {})
        if self.shift_out is not None:
            # sparse_gemm multiplies its shift term by the column scale, which here is the weight's scale.
            self.scaled_shift_out = self.shift_out / self.weight_scale

    @property
    def _stored(self) -> E4M3Weight:
        return E4M3Weight(self.codes, self.rows, self.weight_scale)

    @property
    def e4m3(self) -> Tensor:
        """``[out, in]``; contiguous if there is a copy in that layout."""
        return self._stored.values

    @property
    def e4m3_rows(self) -> Tensor | None:
        """``[out, in]``, stored [in, out] for row skipping; None if there is only the other copy."""
        return None if self.rows is None else self.rows.view(E4M3).t()

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]`` in 16 or 32 bits, in the storage order of ``e4m3``."""
        return self._stored.dequantised(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        if self._is_dense_phase(x):
            return F.linear(x, self.dequantised(x.dtype), self.bias)
        return self.work()(x, self.like, self.bias)  # the weight is its operator's

    def work(self) -> LinearWork:
        """The work of a sparse call: the stored one, or a new one if a buffer has been replaced since."""
        work, before = self._work or (None, ())
        buffers = tuple(self._buffers[name] for name in _READ)
        if work is None or any(value is not was for value, was in zip(buffers, before, strict=True)):
            derived = {"channel_scale": self.channel_scale, "shift_out": self.shift_out}
            work = work_of(self.spec, {}, self._stored.linear, derived)
            if not torch.compiler.is_compiling():  # a graph keeps no Python objects
                self._work = work, buffers
        return work

    _work: tuple[LinearWork, tuple[Tensor | None, ...]] | None = None
    bypass = differentiable = False  # calibration never sees this layer
    _is_dense_phase: Any = NMLinear._is_dense_phase

    def to_nm_linear(self) -> NMLinear:
        """A 16-bit layer with the dequantised weight."""
        options: dict[str, Any] = {"weight_layout": self.weight_layout, "lift": self.lift, "device": "meta"}
        layer = NMLinear(self.in_features, self.out_features, self.bias is not None, spec=self.spec, **options)
        layer.weight = nn.Parameter(self.dequantised(self.like.dtype), requires_grad=False)
        layer.bias = self.bias
        layer.refresh()
        layer.train(self.training)
        return layer

    def extra_repr(self) -> str:
        """Sizes, spec and storage, for printing."""
        return f"{self.in_features}, {self.out_features}, {self.spec}, e4m3 for {self.layout}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_work": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "rows" not in self._buffers:  # pickled by nm_act 0.2, which kept either copy in codes
            kept = self._buffers["codes"]
            self.register_buffer("rows", kept if self.layout == "decode" else None, persistent=False)
            self._buffers["codes"] = None if self.layout == "decode" else kept


_READ = ("codes", "rows", "weight_scale", "channel_scale", "shift_out")
"""Buffers that a sparse call reads."""


def _dequantised_state(layer: FP8Linear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state[f"{prefix}weight"] = layer.dequantised(layer.like.dtype).contiguous()
