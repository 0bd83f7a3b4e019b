"""The product of a sparse layer together with the operator before it, where one kernel computes both (CUDA, 16 bits).

Each call of a layer takes one of these paths:

``decode``  one to four tokens (with both e4m3 copies as many as row skipping pays for): one kernel from the norm (or
            gate and up) to the output, residual included
``packed``  2:4 on the sparse tensor cores: the producer writes the packed operand
``pruned``  any other N:M, or too few tokens: the producer writes the pruned activation for a dense product
``""``      none: the producer, the selection and the product run one after another
"""

import torch
from torch import Tensor, nn

from ..layers.linear import NMLinear
from ..layers.stale import parameter_of
from ..layers.work import is_decode
from ..ops import autograd
from ..ops.e4m3 import E4M3, FEW_TOKENS, skipping_tokens
from ..ops.explain import gathers
from ..ops.fused import (
    Pruned,
    decode_linear,
    pruned_product,
    rms_norm_add,
    rms_norm_prune,
    sandwich_linear,
    silu_mul_prune,
)
from ..ops.library import _C, is_sm90
from ..ops.packed import (
    Packed,
    compress_packed,
    rms_norm_compress,
    silu_mul_compress,
    sparse_gemm,
    sparse_gemm_silu_mul,
)
from ..patterns import NMPattern
from .eligible import MAX_NORM_FEATURES, has_hooks, not_pruned_alone, not_sparse_gemm, why_stays
from .fp8 import FP8Linear

PACKED_TOKENS = _C.SPARSE_GEMM_TOKENS
"""Smallest number of tokens for which a packed 16-bit product pays."""


def why_unfused(linear: nn.Module) -> str:
    """Why no call of a layer can be computed together with the operator before it; empty if some calls can."""
    if not isinstance(linear, (NMLinear, FP8Linear)):
        return "not sparse"
    why = why_stays(linear)
    if why:
        return why
    if isinstance(linear, NMLinear) and linear.token_context is not None:
        return "first tokens are dense"
    patterns = [linear.spec.pattern_in(decode) for decode in (False, True)]
    if not all(isinstance(pattern, NMPattern) for pattern in patterns):
        return f"pattern {linear.spec.pattern}"
    reasons = [_not_packed(linear, pattern) and not_pruned_alone(linear, pattern) for pattern in patterns]
    return reasons[0] if all(reasons) else ""


def way_of(linear: nn.Module, x: Tensor, *others: Tensor) -> str:
    """How this call of a layer, of which :func:`why_unfused` is empty, is computed; ``x [..., in]`` is its input.

    ``others`` are the other tensors that the producer reads.
    """
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type):
        return ""
    if linear._is_dense_phase(x) or has_hooks(linear) or any(other.dtype != x.dtype for other in others):
        return ""
    fp8 = isinstance(linear, FP8Linear)
    if (linear.like if fp8 else parameter_of(linear, "weight")).dtype != x.dtype:
        return ""
    # None of these paths has a gradient: while gradients are recorded, the layers run one by one.
    if autograd.needs_gradient(x, *others) or autograd.trains(linear):
        return ""
    tokens, pattern = x.shape[:-1].numel(), linear.spec.pattern_in(is_decode(x))
    plain = not not_pruned_alone(linear, pattern)
    if plain and 1 <= tokens <= FEW_TOKENS and _gathers(linear, tokens, pattern, x.dtype, x.device):
        return "decode"
    if fp8 and linear.codes is None:
        return ""
    if (fp8 or tokens >= PACKED_TOKENS) and not _not_packed(linear, pattern):
        return "packed"
    return "pruned" if plain and linear.channel_scale is None and (not fp8 or x.dtype == torch.bfloat16) else ""


def norm_product(
    way: str,
    norm: nn.Module,
    linear: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    after: nn.Module | None = None,
):
    """``linear(norm(hidden))`` and ``hidden = x + residual``, ``[..., out]`` and ``[..., in]``.

    With ``after``, a norm like ``norm``, ``hidden = after(x) + residual``.
    """
    weight, (eps, unit_offset) = norm.weight, norm_facts(norm)
    if way == "decode":
        if after is not None:
            given, options = _decode_options(linear, x)
            return sandwich_linear(x, after.weight, residual, weight, eps, *given, unit_offset=unit_offset, **options)
        hidden = x if residual is None else x + residual
        return _decode(linear, hidden, norm_weight=weight, eps=eps, unit_offset=unit_offset), hidden
    options = {"unit_offset": unit_offset, "x_weight": None if after is None else after.weight}
    if way == "packed":
        derived = _derived(linear)
        options |= _packing(linear, derived["channel_scale"])
        packed = rms_norm_compress(x, weight, eps, residual, **options)
        return _packed_product(linear, packed, x.shape, derived["shift_out"]), packed.hidden
    options |= _pruning(linear)
    pruned = rms_norm_prune(x, weight, eps, residual, linear.spec.pattern_in(is_decode(x)), **options)
    return _pruned_product(linear, pruned, x.shape), pruned.hidden


def takes_norm(norm: nn.Module, features: int) -> bool:
    """Whether the fused kernels compute this norm of rows of this length."""
    return features <= MAX_NORM_FEATURES and features % 8 == 0 and norm_facts(norm) is not None


def norm_facts(norm: nn.Module) -> tuple[float, bool] | None:
    """A norm's epsilon, and whether 1 is added to its weight (Gemma); None for an unknown norm."""
    eps = getattr(norm, "variance_epsilon", None)
    if eps is not None:
        return eps, False
    return (norm.eps, True) if type(norm).__name__ in UNIT_OFFSET_NORMS else None


UNIT_OFFSET_NORMS = ("Gemma2RMSNorm", "Gemma3RMSNorm")
"""Classes of Transformers whose forward is ``RMSNorm(x) * (1 + weight)``, rounded once."""


def adds_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether :func:`norm_plus` computes this call of a norm that :func:`takes_norm` accepts."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type):
        return False
    weight = norm.weight
    return weight.dtype == x.dtype and not has_hooks(norm) and not autograd.needs_gradient(x, weight)


def norm_plus(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``norm(x) + residual`` in one kernel."""
    eps, unit_offset = norm_facts(norm)
    return rms_norm_add(x, norm.weight, eps, residual, unit_offset=unit_offset)


def gates_in_product(way: str, gate_up: nn.Module, down: nn.Module, x: Tensor) -> bool:
    """Whether one kernel can compute gate, up and the packed ``SiLU(gate) * up`` of this call, in 16 bits."""
    if way != "packed" or not is_sm90(x.device):
        return False
    if any(isinstance(linear, FP8Linear) or not _selects_plainly(linear) for linear in (gate_up, down)):
        return False
    if parameter_of(gate_up, "bias") is not None or _derived(gate_up)["shift_out"] is not None:
        return False
    fits = gate_up.out_features % 32 == 0 and parameter_of(gate_up, "weight").stride(0) == 1
    # Of the down layer's input only tokens, dtype and device matter here, and those are x's.
    return fits and way_of(down, x) == "packed"


def _selects_plainly(linear: nn.Module) -> bool:
    """Whether a layer's selection needs only the magnitudes within each group."""
    spec = linear.spec
    return _derived(linear)["channel_scale"] is None and spec.token_shift == "none" and not spec.variance_correction


def norm_gated_operand(
    norm: nn.Module,
    gate_up: nn.Module,
    x: Tensor,
    residual: Tensor | None,
    activation: str,
    after: nn.Module | None = None,
) -> tuple[Packed, Tensor]:
    """The operand of the down layer from one product with gate and up, and ``hidden`` as of :func:`norm_product`."""
    eps, unit_offset = norm_facts(norm)
    options = {"unit_offset": unit_offset, "x_weight": None if after is None else after.weight}
    packed = rms_norm_compress(x, norm.weight, eps, residual, **options)
    return sparse_gemm_silu_mul(packed, parameter_of(gate_up, "weight"), activation=activation), packed.hidden


def gated_product(down: nn.Module, operand: Packed, shape: torch.Size, residual: Tensor | None = None) -> Tensor:
    """The output of the MLP from its operand, plus the residual if there is one."""
    return _packed_product(down, operand, shape, _derived(down)["shift_out"], residual)


class Gated:
    """``linear(activation(gate) * up)`` in two steps, so that the caller can free gate and up in between."""

    def __init__(
        self,
        way: str,
        linear: nn.Module,
        gate: Tensor,
        up: Tensor,
        residual: Tensor | None = None,
        activation: str = "silu",
    ):
        self.linear, self.shape = linear, gate.shape
        self.shift_out: Tensor | None = None
        self.operand: Tensor | Packed | Pruned
        if way == "decode":
            self.operand = _decode(linear, gate, up=up, residual=residual, activation=activation)
        elif way == "packed":
            derived = _derived(linear)
            self.shift_out = derived["shift_out"]
            options = _packing(linear, derived["channel_scale"])
            self.operand = silu_mul_compress(gate, up, activation=activation, **options)
        else:
            pattern = linear.spec.pattern_in(is_decode(gate))
            self.operand = silu_mul_prune(gate, up, pattern, activation=activation, **_pruning(linear))

    def product(self, residual: Tensor | None = None) -> Tensor:
        """``[..., out]``, with the residual, which "decode" added before."""
        if isinstance(self.operand, Tensor):
            return self.operand
        if isinstance(self.operand, Packed):
            return _packed_product(self.linear, self.operand, self.shape, self.shift_out, residual)
        y = _pruned_product(self.linear, self.operand, self.shape)
        return y if residual is None else residual + y


def adds_residual(linear: nn.Module, x: Tensor) -> bool:
    """Whether :func:`plus_residual` is one kernel, for a layer of which :func:`why_unfused` is empty.

    Of ``x``, only tokens, dtype and device matter.
    """
    way = way_of(linear, x)
    return way == "decode" or (way == "packed" and is_sm90(x.device))


def plus_residual(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + linear(x)``."""
    way = way_of(linear, x, residual)
    if way == "decode":
        return _decode(linear, x, residual=residual)
    if way != "packed":
        y: Tensor = linear(x)
        return residual + y
    derived = _derived(linear)
    packed = compress_packed(x, **_packing(linear, derived["channel_scale"]))
    return _packed_product(linear, packed, x.shape, derived["shift_out"], residual)


def _decode(linear: nn.Module, x: Tensor, **around) -> Tensor:
    given, options = _decode_options(linear, x)
    return decode_linear(x, *given, **options, **around)


def _decode_options(linear: nn.Module, x: Tensor) -> tuple[tuple, dict[str, Tensor | None]]:
    """The weight, bias and pattern of a layer's decode step, and its vectors by name."""
    options = {"channel_scale": _derived(linear)["channel_scale"]}
    if isinstance(linear, FP8Linear):
        options["weight_scale"] = linear.weight_scale
    return (_rows(linear), parameter_of(linear, "bias"), linear.spec.pattern_in(is_decode(x))), options


def _rows(linear: nn.Module) -> Tensor | None:
    """The weight that the gather kernel reads, stored [in, out]; None for e4m3 weights without that copy."""
    return linear.e4m3_rows if isinstance(linear, FP8Linear) else parameter_of(linear, "weight")


def _gathers(linear: nn.Module, tokens: int, pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gather kernel serves these tokens, as the operator itself would choose."""
    weight = _rows(linear)
    if weight is None or pattern.extra_columns:
        return False
    if isinstance(linear, FP8Linear) and linear.codes is not None and tokens > skipping_tokens(pattern):
        return False
    return gathers(tokens, pattern, dtype, device, weight)


def remember(linear: nn.Module) -> None:
    """Find out which decode steps of a layer on CUDA the gather kernel takes, for later compiled calls."""
    like = linear.like if isinstance(linear, FP8Linear) else parameter_of(linear, "weight")
    if like.is_cuda and not why_unfused(linear):
        for tokens in range(1, FEW_TOKENS + 1):
            _gathers(linear, tokens, linear.spec.pattern_in(True), like.dtype, like.device)


def _not_packed(linear: nn.Module, pattern: NMPattern) -> str:
    if isinstance(linear, FP8Linear):
        return "no [out, in] copy" if linear.codes is None else not_sparse_gemm(linear, pattern, 32)
    return not_sparse_gemm(linear, pattern, 16)


def _derived(linear: nn.Module) -> dict[str, Tensor | None]:
    """The tensors that a layer's selection and epilogue read, for its weight in this call."""
    mine = None if isinstance(linear, FP8Linear) else linear.derived_for_call()
    if mine is not None:
        return mine
    shift_out = linear.scaled_shift_out if isinstance(linear, FP8Linear) else linear.shift_out
    return {"channel_scale": linear.channel_scale, "shift_out": shift_out}


def _packing(linear: nn.Module, channel_scale: Tensor | None) -> dict:
    return {
        "channel_scale": channel_scale,
        "token_shift": linear.spec.token_shift,
        "variance_correction": linear.spec.variance_correction,
        **_pruning(linear),
    }


def _pruning(linear: nn.Module) -> dict:
    return {"activation_dtype": E4M3 if isinstance(linear, FP8Linear) else None}


def _packed_product(
    linear: nn.Module, operand: Packed, shape: torch.Size, shift_out: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    if isinstance(linear, FP8Linear):
        weight, scale, dtype = linear.e4m3, linear.weight_scale, linear.like.dtype
    else:
        weight = parameter_of(linear, "weight")
        scale, dtype = None, weight.dtype
    bias = parameter_of(linear, "bias")
    options = {"shift_out": shift_out, "column_scale": scale, "out_dtype": dtype}
    if residual is not None:
        options["residual"] = residual.reshape(operand.tokens, linear.out_features)
    y = sparse_gemm(operand, weight, bias, **options)
    return y.view(*shape[:-1], linear.out_features)


def _pruned_product(linear: nn.Module, operand: Pruned, shape: torch.Size) -> Tensor:
    bias = parameter_of(linear, "bias")
    if isinstance(linear, FP8Linear):
        y = pruned_product(operand, linear.e4m3, bias, linear.weight_scale)
    else:
        y = pruned_product(operand, parameter_of(linear, "weight"), bias)
    return y.view(*shape[:-1], linear.out_features)
