"""e4m3 weights: one byte per weight and one scale per output channel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..layers.linear import NMLinear
from ..methods import mitigations
from . import readonly
from .eligible import not_fp8

E4M3 = torch.float8_e4m3fn
FP8_LAYOUTS = ("prefill", "decode")
"""The phase that the single e4m3 copy of a weight is stored for."""


def check_layout(layout: str) -> None:
    """Raise a ValueError for an unknown layout of e4m3 weights."""
    if layout not in FP8_LAYOUTS:
        raise ValueError(f"expected fp8 among {', '.join(FP8_LAYOUTS)}, got {layout!r}; choose one of those")


def quantise_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values ``[rows, columns]``, rounded to nearest, and their float32 scales ``[rows]``, ``max|row| / 448``."""
    scale = (values.float().abs().amax(dim=1) / 448).clamp(min=1e-12)
    return (values.float() / scale[:, None]).clamp(-448, 448).to(E4M3), scale


class FP8Linear(nn.Module):
    """An :class:`~nm_act.NMLinear` with its weight in float8_e4m3fn, ``W ~ weight_scale[:, None] * e4m3``.

    Parameters
    ----------
    layer : NMLinear
        Its weight is quantised per output channel: ``weight_scale = max|W| / 448``, rounded to nearest.
    layout : {"prefill", "decode"}
        "prefill" stores [out, in], which fp8 tensor cores need: any number of tokens runs in e4m3 on both sides (the
        pattern must be 2:4). "decode" stores [in, out], of which few tokens read only the rows of survivors; more
        tokens dequantise the weight to the dtype of x during the call, so they gain no fp8 speed.

    Raises
    ------
    TypeError
        If ``layer`` is not an NMLinear.
    ValueError
        If the layout is unknown; if these paths cannot compute the layer (for "prefill" any pattern but 2:4; for both
        top-k, calibrated data, a score that depends on the call, pruned weights, dense first tokens or dense decode
        steps); or if its weight is offloaded or split over ranks, or it has hooks.

    Notes
    -----
    Channel scale and row sums are those of the weight as stored: e4m3 times its scale, before any rounding to the
    model's dtype.

    ``state_dict`` contains the dequantised weight under the stock name, so a checkpoint is a stock one but includes the
    rounding to e4m3; ``load_state_dict`` quantises.
    """

    codes: Tensor
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
        self.register_buffer("codes", None, persistent=False)
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
        # In slices: a float32 copy of a whole merged weight would determine the peak memory of the process.
        scales, codes = [], []
        for rows in weight.split(4096):
            quantised, scale = quantise_rows(rows)
            scales.append(scale)
            codes.append(quantised.view(torch.uint8))
        self.weight_scale = torch.cat(scales)
        stored = torch.cat(codes)
        self.codes = stored if self.layout == "prefill" else stored.t().contiguous()
        if self.spec.token_shift == "none" and self.spec.scoring.formula is None:
            return  # nothing is derived from the weight
        operand = self.dequantised(torch.float32)
        self.channel_scale = mitigations.selection_scale(self.spec, operand, operand, {})
        self.shift_out = mitigations.shift_image(self.spec, operand, {})
        if self.shift_out is not None:
            # sparse_gemm multiplies its shift term by the column scale, which here is the weight's scale.
            self.scaled_shift_out = self.shift_out / self.weight_scale

    @property
    def e4m3(self) -> Tensor:
        """``[out, in]``, as stored."""
        codes = self.codes.view(E4M3)
        return codes if self.layout == "prefill" else codes.t()

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, dequantised to the model's dtype: a new tensor at each access that refuses writes."""
        return self.dequantised(self.like.dtype).as_subclass(readonly.Computed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            readonly.refuse_set(name)
        super().__setattr__(name, value)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]`` in 16 or 32 bits, in the storage order of the e4m3 weight."""
        return self.e4m3.float().mul_(self.weight_scale[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        options: dict[str, Any] = {
            "pattern": self.spec.pattern,
            "channel_scale": self.channel_scale,
            "token_shift": self.spec.token_shift,
            "shift_out": self.shift_out,
            "variance_correction": self.spec.variance_correction,
        }
        if self._is_dense_phase(x):
            return F.linear(x, self.dequantised(x.dtype), self.bias)
        options["weight_scale"] = self.weight_scale
        options["activation_dtype"] = E4M3 if self.layout == "prefill" else None
        return ops.sparse_linear(x, self.e4m3, self.bias, **options)

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

    def _apply(self, fn: Any, recurse: bool = True) -> "FP8Linear":
        scale, vectors = self.weight_scale, (self.shift_out, self.scaled_shift_out, self.channel_scale)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.codes.device
        self.weight_scale = scale.to(device)  # stays float32 in a bfloat16 model
        self.shift_out, self.scaled_shift_out, self.channel_scale = (
            value if value is None else value.to(device) for value in vectors
        )
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != (self.out_features, self.in_features):
            errors.append(
                f"expected {prefix}weight of shape {[self.out_features, self.in_features]}, got {list(weight.shape)}"
            )
        else:
            self.store(weight.to(self.codes.device, self.like.dtype))
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)


def _dequantised_state(layer: FP8Linear, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state[f"{prefix}weight"] = layer.dequantised(layer.like.dtype).contiguous()
