"""Decides what optimize() may change, for merging, e4m3 weights and fused norms alike."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import parallel
from ..layers.linear import NMLinear
from ..methods.mitigations import data_of
from ..ops.library import _C
from ..patterns import NMPattern
from ..recipe import LinearSpec

MAX_ROW_FEATURES = _C.MAX_ROW_FEATURES
"""Longest row that the fused kernels can hold on chip."""

MAX_NORM_FEATURES = _C.MAX_NORM_FEATURES
"""Longest row of an RMSNorm that is fused with pruning."""

_DERIVED = {"channel_scale", "shift_out"}
"""Buffers of an NMLinear that are derived from its weight and spec; all others were calibrated for that layer."""

_FP8_BUFFERS = {"codes", "rows", "weight_scale", "scaled_shift_out", "like"}


class Sparse(Protocol):
    """The attributes that an NMLinear and an FP8Linear share here."""

    in_features: int
    out_features: int

    @property
    def spec(self) -> LinearSpec: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


def check_module(model: Any) -> None:
    """Raise a TypeError unless the model is one in memory."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model in memory (a torch.nn.Module), got {type(model).__name__}; load it first, with "
            "AutoModelForCausalLM.from_pretrained say"
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks besides its forward, its own or those of all modules."""
    return _has_own_hooks(module) or bool(_has_any_global_hook())


def _has_own_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def why_absent(module: nn.Module) -> str:
    """Why a layer does not have its whole weight in memory; empty if it has."""
    parameters = list(module.parameters(recurse=False))
    if any(parameter.is_meta for parameter in parameters):
        return "its weight is on the meta device (offloaded)"
    sharded = any(parallel.local_weight(parameter) is not parameter for parameter in parameters)
    if sharded or getattr(module, "shard", None) is not None:
        return "its weight is split over ranks"
    return ""


def why_stays(module: nn.Module) -> str:
    """Why a layer or norm must be neither replaced nor computed elsewhere; empty if it may be."""
    why = why_absent(module)
    if why:
        return why
    if "forward" in vars(module):
        return "its forward is replaced already"
    return "it has hooks" if _has_own_hooks(module) else ""


def calibrated(layer: Sparse) -> set[str]:
    """Names of the buffers that are not derived from the weight and the spec."""
    return {name for name, _ in layer.named_buffers()} - _DERIVED - _FP8_BUFFERS


def beyond(layer: Sparse) -> str:
    """Why the fused and e4m3 paths cannot compute a layer; empty if they can.

    They support only an N:M selection with a static channel scale, VAR and D-PTS.
    """
    spec = layer.spec
    known = not data_of(spec) and not spec.scoring.by_sequence and not spec.scoring.prunes_weight
    known = known and isinstance(spec.pattern, NMPattern) and not calibrated(layer)
    return "" if known else f"unfused method {spec}"


def not_sparse_gemm(layer: Sparse, pattern: NMPattern, step: int) -> str:
    """Why the sparse GEMM cannot multiply this pattern in steps of ``step`` inputs; empty if it can."""
    if str(pattern) != "2:4":
        return f"pattern {pattern}"
    if layer.in_features % step or layer.in_features > MAX_ROW_FEATURES or layer.out_features % 16:
        return f"{layer.in_features} inputs and {layer.out_features} outputs do not fit the sparse GEMM"
    return beyond(layer)


def not_pruned_alone(layer: Sparse, pattern: NMPattern) -> str:
    """Why a pruned activation and a product do not suffice for a layer, or the kernel cannot prune it; else empty."""
    why = beyond(layer)
    if why:
        return why
    if pattern.extra_columns or layer.spec.token_shift != "none" or layer.spec.variance_correction:
        return f"unfused method {layer.spec}"
    if layer.in_features % 8 or layer.in_features > MAX_ROW_FEATURES:
        return f"{layer.in_features} inputs do not fit the pruning kernel"
    return ""


def not_dense_e4m3(layer: Sparse, pattern: NMPattern) -> str:
    """Why a layer cannot run this pattern as a dense e4m3 product over a pruned activation; empty if it can."""
    why = not_pruned_alone(layer, pattern)
    if why:
        return why
    if layer.spec.scoring.formula is not None:
        return f"a channel scale ({layer.spec.criterion})"
    fits = layer.in_features % 16 == 0 and layer.out_features % 16 == 0
    return "" if fits else f"{layer.in_features} inputs and {layer.out_features} outputs do not fit fp8 tensor cores"


def not_fp8(layer: NMLinear, layout: str) -> str:
    """Why a layer's weight cannot be stored in e4m3 for "prefill", "decode" or "both"; empty if it can."""
    return why_stays(layer) or unfit_for_fp8(layer, layout)


def unfit_for_fp8(layer: NMLinear, layout: str) -> str:
    """As :func:`not_fp8`, but by spec and sizes only: the layer may be on the meta device."""
    if layer.token_context is not None:
        return "first tokens are dense"
    if layer.spec.phase == "prefill":
        return "dense in decode"  # dense decode would dequantise the weight at every step
    if beyond(layer):
        return str(layer.spec)
    if layout == "decode":
        return ""
    if layer.spec.phase == "decode":
        return "dense in prefill"
    # More than a few sequences decode over the copy of prefill.
    patterns: set[Any] = {layer.spec.pattern_in(decode) for decode in (False, True)}  # no top-k: see beyond
    for pattern in patterns:
        halves = (torch.bfloat16, torch.float16) if str(pattern) == "2:4" else (torch.bfloat16,)
        if layer.weight.device.type != "cpu" and layer.weight.dtype not in halves:  # a CPU has neither product
            return f"{pattern} in {str(layer.weight.dtype).removeprefix('torch.')}"
        why = not_sparse_gemm(layer, pattern, 32) if str(pattern) == "2:4" else not_dense_e4m3(layer, pattern)
        if why:
            return why
    return ""
