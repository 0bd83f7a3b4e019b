"""Decoder layers whose norms and activations write the packed 2:4 operand of the next product directly (CUDA).

Attention, with its rotary embedding, cache and masks, remains Transformers' own. Before it runs, the product of its
merged q/k/v layer is computed from the packed norm and handed to that layer for this call.
"""

import torch
from torch import Tensor, nn

from .. import _C
from ..layers.linear import NMLinear
from ..layers.stale import parameter_of
from ..ops import autograd
from ..ops.packed import Packed, rms_norm_compress, silu_mul_compress, sparse_gemm
from .changed import Changed, change, restore
from .eligible import has_hooks, not_2_4, why_stays
from .fp8 import FP8Linear
from .merged import MergedLinear, Product, SharesProducts

PACKED_TOKENS = _C.SPARSE_GEMM_TOKENS
"""Fewest tokens for which a packed 16-bit product is worthwhile."""

_MARKS = ("nm_act_gate_up", "nm_act_packs", "nm_act_qkv", "nm_act_packs_mlp")
"""Attributes that fusing adds to Transformers' modules."""


def packable(linear: nn.Module) -> str:
    """Why a layer's operand cannot be packed by its producer; empty if it can."""
    if not isinstance(linear, (NMLinear, FP8Linear)):
        return "not sparse"
    why, fp8 = why_stays(linear), isinstance(linear, FP8Linear)
    if why:
        return why
    if fp8 and linear.layout != "prefill":
        return "e4m3 weight stored for decode"
    if not fp8 and linear.token_context is not None:
        return "first tokens are dense"
    return not_2_4(linear, 32 if fp8 else 16)


def takes_packed(linear: nn.Module, x: Tensor) -> bool:
    """Whether this call of a packable layer runs on the sparse tensor cores."""
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type):
        return False
    if linear._is_dense_phase(x) or has_hooks(linear):
        return False
    if isinstance(linear, FP8Linear):
        return True
    return parameter_of(linear, "weight").dtype == x.dtype and x.shape[:-1].numel() >= PACKED_TOKENS


def derived(linear: nn.Module) -> dict[str, Tensor | None]:
    """A packable layer's weight in this call, and what is derived from it."""
    mine = None if isinstance(linear, FP8Linear) else linear.derived_for_call()
    if mine is not None:
        return mine
    shift_out = linear.scaled_shift_out if isinstance(linear, FP8Linear) else linear.shift_out
    return {"channel_scale": linear.channel_scale, "shift_out": shift_out}


def product(linear: nn.Module, operand: Packed, shape: torch.Size, shift_out: Tensor | None) -> Tensor:
    """``linear`` applied to a packed operand: ``[..., out]`` for an input of the given shape."""
    if isinstance(linear, FP8Linear):
        weight, scale, dtype = linear.e4m3, linear.weight_scale, linear.like.dtype
    else:
        weight = parameter_of(linear, "weight")
        scale, dtype = None, weight.dtype
    bias = parameter_of(linear, "bias")
    y = sparse_gemm(operand, weight, bias, shift_out=shift_out, column_scale=scale, out_dtype=dtype)
    return y.view(*shape[:-1], linear.out_features)


def options(linear: nn.Module, channel_scale: Tensor | None) -> dict:
    """Selection and statistics of a packable layer, as arguments of the producers."""
    return {
        "channel_scale": channel_scale,
        "token_shift": linear.spec.token_shift,
        "variance_correction": linear.spec.variance_correction,
        "fp8": isinstance(linear, FP8Linear),
    }


def norm_product(norm: nn.Module, linear: nn.Module, x: Tensor, residual: Tensor | None = None):
    """``linear(norm(x + residual))`` and ``x + residual``."""
    mine = derived(linear)
    taken = options(linear, mine["channel_scale"])
    operand = rms_norm_compress(x, norm.weight, norm.variance_epsilon, residual, **taken)
    return product(linear, operand, x.shape, mine["shift_out"]), operand.hidden


def fuse_mlp(mlp: nn.Module, gate_up: str) -> None:
    """Call merged gate and up layers as one, and compress SiLU(gate) * up for a packable down layer."""
    mlp.nm_act_gate_up = gate_up  # the name only: the module is already registered
    silu = isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
    mlp.nm_act_packs = silu and not why_stays(mlp.act_fn) and not packable(mlp.down_proj)
    change(mlp, FusedMLP)


class FusedMLP(SharesProducts):
    """An MLP that computes gate and up in one product."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        if _parts_have_hooks(self):
            return super().forward(x)
        return _mlp_tail(self, getattr(self, self.nm_act_gate_up)(x))


def _parts_have_hooks(mlp: nn.Module) -> bool:
    return any(has_hooks(getattr(mlp, name)) for name in getattr(mlp, mlp.nm_act_gate_up).names)


def _mlp_tail(mlp: nn.Module, y: Tensor) -> Tensor:
    """The output of the MLP, from the concatenated outputs of gate and up.

    These are the largest tensors of a model; they are freed before the down layer runs if the caller keeps no
    reference.
    """
    gate, up = y.split(getattr(mlp, mlp.nm_act_gate_up).sizes, dim=-1)
    shape = gate.shape
    if mlp.nm_act_packs and _packs_input(mlp.down_proj, gate):
        mine = derived(mlp.down_proj)
        operand = silu_mul_compress(gate, up, **options(mlp.down_proj, mine["channel_scale"]))
        del y, gate, up
        return product(mlp.down_proj, operand, shape, mine["shift_out"])
    x = gated(mlp.act_fn, gate, up)
    del y, gate, up
    return mlp.down_proj(x)


def gated(act_fn: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """The unpacked activation of an MLP; benchmarks compile it for the dense model too."""
    return act_fn(gate) * up


def fuse_layer(layer: nn.Module) -> list[str]:
    """Fuse the norms of a pre-norm decoder layer into the products after them; returns which ones."""
    attention, mlp = layer.self_attn, layer.mlp
    layer.nm_act_qkv = ""
    if not why_stays(layer.input_layernorm):
        layer.nm_act_qkv = _sole_consumer(attention, ("q_proj", "k_proj", "v_proj"))
    gate_up = vars(mlp).get("nm_act_gate_up")
    called = has_hooks(mlp) or why_stays(layer.post_attention_layernorm)  # the fused path calls neither of them
    layer.nm_act_packs_mlp = gate_up is not None and not called and not packable(getattr(mlp, gate_up).linear)
    fused = ["input_layernorm"] if layer.nm_act_qkv else []
    fused += ["post_attention_layernorm"] if layer.nm_act_packs_mlp else []
    if fused:
        change(layer, FusedLayer)
    return fused


def _sole_consumer(parent: nn.Module, names: tuple[str, ...]) -> str:
    """Name of the merged layer that computes all of ``names`` from a packed operand; empty if there is none."""
    for child, merged in parent.named_children():
        if isinstance(merged, MergedLinear) and merged.names == names and not packable(merged.linear):
            return child
    return ""


class FusedLayer(Changed):
    """A decoder layer whose norms may be packed."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """The hidden states of the next layer, ``[batch, tokens, hidden]``."""
        return _layer_forward(self, hidden_states, *args, **kwargs)


def _layer_forward(self: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """A pre-norm layer, ``h = x + attention(norm(x)); h + mlp(norm(h))``; each norm is packed if possible."""
    qkv = getattr(self.self_attn, self.nm_act_qkv) if self.nm_act_qkv else None
    packs_attention = qkv is not None and _packs(self.input_layernorm, qkv.linear, hidden_states)
    # Hooks that were registered since then must get what the stock layer would pass to them.
    packs_attention = packs_attention and not (has_hooks(self.self_attn) or has_hooks(self.input_layernorm))
    gate_up = getattr(self.mlp, self.mlp.nm_act_gate_up).linear if self.nm_act_packs_mlp else None
    packs_mlp = gate_up is not None and _packs(self.post_attention_layernorm, gate_up, hidden_states)
    packs_mlp = packs_mlp and not (has_hooks(self.mlp) or has_hooks(self.post_attention_layernorm))
    packs_mlp = packs_mlp and not _parts_have_hooks(self.mlp)
    if args or not (packs_attention or packs_mlp):
        return self.nm_act_stock.forward(self, hidden_states, *args, **kwargs)
    residual = hidden_states
    if packs_attention:
        y, _ = norm_product(self.input_layernorm, qkv.linear, hidden_states)
        # Attention reads only the shape of this input: called with it, the q, k and v layers return their parts of y.
        kwargs["nm_act_product"] = Product(qkv, hidden_states, y)
        del y
    else:
        hidden_states = self.input_layernorm(hidden_states)
    attention, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
    if packs_mlp:
        results = list(norm_product(self.post_attention_layernorm, gate_up, attention, residual))
        hidden = results.pop()
        # Popped, so that _mlp_tail holds the only reference to gate and up, the largest tensors, and can free them.
        return hidden + _mlp_tail(self.mlp, results.pop())
    hidden = residual + attention
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _packs(norm: nn.Module, linear: nn.Module, x: Tensor) -> bool:
    return norm.weight.dtype == x.dtype and _packs_input(linear, x, norm.weight)


def _packs_input(linear: nn.Module, x: Tensor, *others: Tensor) -> bool:
    # A packed operand has no gradient: while gradients are recorded, the layers run one by one.
    return not autograd.needs_gradient(x, *others, *linear.parameters()) and takes_packed(linear, x)


def unfuse(module: nn.Module) -> None:
    """Restore the forward of a module that was fused or shares a merged layer."""
    restore(module)
    for name in _MARKS:
        vars(module).pop(name, None)
