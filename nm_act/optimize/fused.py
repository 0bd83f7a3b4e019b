"""Decoder layers whose norms and activations are computed together with the product after them (CUDA).

The product of the merged q/k/v layer is computed together with the norm, before attention runs, and passed to
attention.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import autograd
from . import operands
from .attention import FusedAttention, merged_qkv
from .changed import Changed, change, restore
from .eligible import has_hooks, why_stays
from .given import Following, Given, give, has_state, take
from .merged import Product, SharesProducts

_MARKS = (
    "nm_act_gate_up",
    "nm_act_gates",
    "nm_act_norms",
    "nm_act_adds",
    "nm_act_following",
    "nm_act_head_norms",
    "nm_act_window_in_config",
)
"""Attributes that fusing adds to Transformers' modules; typed as Any, because those classes have no annotations."""


def fuse_mlp(mlp: Any, gate_up: str) -> bool:
    """Call merged gate and up layers as one; returns whether activation(gate) * up is computed with the down layer."""
    mlp.nm_act_gate_up = gate_up  # the name only: the module is already registered
    stays = why_stays(mlp.act_fn) or operands.why_unfused(mlp.down_proj)
    mlp.nm_act_gates = "" if stays else _activation(mlp.act_fn)
    change(mlp, FusedMLP)
    return bool(mlp.nm_act_gates)


def _activation(act_fn: Any) -> str:
    """The operators' name for an activation; empty for an activation that they do not know."""
    if isinstance(act_fn, nn.SiLU) or type(act_fn).__name__ == "SiLUActivation":
        return "silu"
    if isinstance(act_fn, nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else ""
    # Transformers' GELUTanh, except its variant in Python, which rounds at every step.
    compiled = type(act_fn).__name__ == "GELUTanh" and isinstance(act_fn.act, functools.partial)
    return "gelu_tanh" if compiled else ""


class FusedMLP(SharesProducts):
    """An MLP that computes gate and up in one product."""

    nm_act_gate_up: str

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x [..., in] -> [..., out]``."""
        gate_up = getattr(self, self.nm_act_gate_up)
        if _parts_have_hooks(self, gate_up):
            stock: Tensor = super().forward(x)
            return stock
        return _mlp_tail(self, [gate_up(x)])


def _parts_have_hooks(parent: nn.Module, merged: Any) -> bool:
    return any(has_hooks(getattr(parent, name)) for name in merged.names)


def _mlp_tail(mlp: Any, products: list[Tensor], residual: Tensor | None = None) -> Tensor:
    """The output of the MLP, plus the residual if there is one, from the single element of the list ``products``.

    That element is the concatenated output of gate and up, the largest tensor of a model. Because it is taken out of
    the list, it is freed before the down layer runs.
    """
    gate, up = products.pop().split(getattr(mlp, mlp.nm_act_gate_up).sizes, dim=-1)
    way = operands.way_of(mlp.down_proj, gate) if mlp.nm_act_gates else ""
    if not way:
        x = gated(mlp.act_fn, gate, up)
        del gate, up
        y: Tensor = mlp.down_proj(x)
        return y if residual is None else residual + y
    step = operands.Gated(way, mlp.down_proj, gate, up, residual, mlp.nm_act_gates)
    del gate, up
    return step.product(residual)


def gated(act_fn: Any, gate: Tensor, up: Tensor) -> Tensor:
    """The activation of an MLP that is not fused; benchmarks compile it for the dense model too."""
    y: Tensor = act_fn(gate) * up
    return y


def fuse_layer(layer: Any) -> list[str]:
    """Compute a decoder layer's norms with the products after them or with the residuals; returns the norms' names."""
    how = FusedSandwichLayer if hasattr(layer, "pre_feedforward_layernorm") else FusedLayer
    after = _merged_after(layer, how.before_mlp)
    norms = [name for name, linear in after.items() if not _why_apart(layer, name, linear)]
    if norms:
        before = getattr(layer, how.before_mlp)
        for name in how.after_parts:
            norm = getattr(layer, name)
            # One kernel may compute two norms, which share an epsilon and an offset.
            like = operands.norm_facts(norm) == operands.norm_facts(before)
            if like and not why_stays(norm) and operands.takes_norm(norm, norm.weight.shape[0]):
                norms.append(name)
        layer.nm_act_norms = norms
        # Whether the output projection may add the residual.
        attention = layer.self_attn
        adds = isinstance(attention, FusedAttention) and not operands.why_unfused(attention.o_proj)
        layer.nm_act_adds = adds and not how.after_parts
        change(layer, how)
    return norms


def _why_apart(layer: Any, name: str, linear: Any) -> str:
    """Why a norm is not computed with the product after it, which is a merged one; empty if it is."""
    norm = getattr(layer, name)
    why = (
        "projections that are not merged, or have hooks"
        if linear is None
        else why_stays(norm) or operands.why_unfused(linear)
    )
    return why or ("" if operands.takes_norm(norm, linear.in_features) else "a norm that no kernel computes")


def _merged_after(layer: Any, before_mlp: str) -> dict[str, Any]:
    """The merged product after each norm of a layer that has one; None where it is not to be computed with the norm."""
    qkv, gate_up = merged_qkv(layer.self_attn), vars(layer.mlp).get("nm_act_gate_up")
    return {
        "input_layernorm": None if qkv is None else qkv.linear,
        # The fused path does not call the MLP itself.
        before_mlp: None if gate_up is None or has_hooks(layer.mlp) else getattr(layer.mlp, gate_up).linear,
    }


class FusedLayer(Changed):
    """A pre-norm decoder layer, ``h = x + attention(norm(x)); h + mlp(norm(h))``, whose norms may be fused."""

    before_mlp = "post_attention_layernorm"
    after_parts: tuple[str, ...] = ()
    """Norms of the outputs of attention and MLP, before their residuals are added."""
    nm_act_norms: list[str]
    nm_act_adds: bool
    self_attn: Any
    mlp: Any
    input_layernorm: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states of the next layer, ``[batch, tokens, hidden]``."""
        given = take(hidden_states) if self.after_parts else None
        qkv: Any = merged_qkv(self.self_attn)
        merged: Any = None
        before_mlp: Any = getattr(self, self.before_mlp)
        if self.before_mlp in self.nm_act_norms:
            merged = getattr(self.mlp, self.mlp.nm_act_gate_up)
        gate_up: Any = None if merged is None else merged.linear
        # Hooks that were registered since must receive what the stock layer would pass to them.
        way, mlp_way = self._qkv_way(hidden_states), ""
        if merged is not None and not has_hooks(self.mlp) and not _parts_have_hooks(self.mlp, merged):
            mlp_way = _way_of(before_mlp, gate_up, hidden_states)
        if args or not (way or mlp_way):
            stock: Tensor = self.nm_act_stock.forward(self, hidden_states, *args, **kwargs)
            return stock
        entered = hidden_states
        if way:
            y = None if given is None else given.product_of(self, qkv.linear, way, hidden_states)
            given = None  # nothing but attention is to keep the product alive
            if y is None:
                y, _ = operands.norm_product(way, self.input_layernorm, qkv.linear, hidden_states)
            # Attention reads only the shape of this input: called with it, q, k and v are parts of y.
            kwargs["nm_act_product"] = Product(qkv, hidden_states, y)
            del y
        else:
            hidden_states = self.input_layernorm(hidden_states)
        residual: Tensor | None = None
        if self._adds(mlp_way, entered):  # attention returns the sum
            attention, _ = self.self_attn(hidden_states=hidden_states, nm_act_residual=entered, **kwargs)
        else:
            residual = entered
            attention, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        # It may be that only attention is trained.
        if residual is not None and (not mlp_way or autograd.needs_gradient(attention)):
            hidden = self._plus(0, attention, residual)
            return self._plus(1, self.mlp(before_mlp(hidden)), hidden)
        after = self._after(0, attention)
        if self.after_parts and after is None:
            attention = getattr(self, self.after_parts[0])(attention)
        down, gates = self.mlp.down_proj, vars(self.mlp).get("nm_act_gates")
        if gates and operands.gates_in_product(mlp_way, gate_up, down, attention):
            operand, hidden = operands.norm_gated_operand(before_mlp, gate_up, attention, residual, gates, after)
            del attention
            if not self.after_parts:
                return operands.gated_product(down, operand, hidden.shape, hidden)
            return self._leave(operands.gated_product(down, operand, hidden.shape), hidden, kwargs)
        products = list(operands.norm_product(mlp_way, before_mlp, gate_up, attention, residual, after))
        del attention
        hidden = products.pop()
        if not self.after_parts:
            return _mlp_tail(self.mlp, products, hidden)
        return self._leave(_mlp_tail(self.mlp, products), hidden, kwargs)

    def _qkv_way(self, x: Tensor) -> str:
        """How this call's first norm and product of q, k and v are computed together; empty if they are not."""
        if "input_layernorm" not in self.nm_act_norms or has_hooks(self.self_attn):
            return ""
        qkv: Any = merged_qkv(self.self_attn)
        return "" if _parts_have_hooks(self.self_attn, qkv) else _way_of(self.input_layernorm, qkv.linear, x)

    def _leave(self, y: Tensor, residual: Tensor, options: dict[str, Any]) -> Tensor:
        """The hidden states of the next layer from the output of the MLP, its residual and the call's options."""
        return self._plus(1, y, residual)

    def _adds(self, mlp_way: str, x: Tensor) -> bool:
        """Whether the output projection adds the residual, so that the norm before the MLP need not add it."""
        if mlp_way not in ("decode", "packed") or not self.nm_act_adds or has_hooks(self.self_attn):
            return False
        if autograd.trains(self.self_attn):
            return False
        return mlp_way == "decode" or operands.adds_residual(self.self_attn.o_proj, x)

    def _after(self, part: int, y: Tensor) -> Any:
        """The norm of the output of attention or MLP, if a kernel computes it in this call."""
        name = self.after_parts[part] if self.after_parts else ""
        if name not in self.nm_act_norms or not operands.adds_norm(getattr(self, name), y):
            return None
        return getattr(self, name)

    def _plus(self, part: int, y: Tensor, residual: Tensor) -> Tensor:
        """The residual plus the output of attention or MLP, which is normalised first if there is a norm."""
        norm = self._after(part, y)
        if norm is not None:
            return operands.norm_plus(norm, y, residual)
        return residual + (getattr(self, self.after_parts[part])(y) if self.after_parts else y)


class FusedSandwichLayer(FusedLayer):
    """A layer with norms on both sides, ``h = x + norm(attention(norm(x))); h + norm(mlp(norm(h)))``, as in Gemma."""

    before_mlp = "pre_feedforward_layernorm"
    after_parts = ("post_attention_layernorm", "post_feedforward_layernorm")
    nm_act_following: Following

    def _leave(self, y: Tensor, residual: Tensor, options: dict[str, Any]) -> Tensor:
        """The hidden states; where one kernel computes them and the next layer's norm, its q, k and v come along."""
        norm = self._after(1, y)
        following = None if norm is None or has_hooks(self) else self._following(y, options)
        way = "" if following is None else following._way_after(y, norm)
        if not way or following is None:
            return self._plus(1, y, residual)
        linear = merged_qkv(following.self_attn).linear  # type: ignore[union-attr]
        hidden: Tensor
        product, hidden = operands.norm_product(way, following.input_layernorm, linear, y, residual, norm)
        give(hidden, Given(following, linear, way, hidden, product))
        return hidden

    def _following(self, y: Tensor, options: dict[str, Any]) -> "FusedSandwichLayer | None":
        """The next layer, if what comes between the two would be noticed."""
        # What a compiler has traced is not to depend on what a step left behind. Inference tensors do not count their
        # changes: only StaticDecoder's calls, which nothing interrupts, are linked among those.
        if torch.compiler.is_compiling() or (y.is_inference() and "nm_act_lengths" not in options):
            return None
        if not has_state(y):
            return None
        link = vars(self).get("nm_act_following")
        following = link and link()
        return following if isinstance(following, FusedSandwichLayer) else None

    def _way_after(self, y: Tensor, after: Any) -> str:
        """How the product of q, k and v is computed if its kernel also computes ``after(y)`` and the residual."""
        if has_hooks(self) or self.input_layernorm.weight.device != y.device:
            return ""
        alike = operands.norm_facts(self.input_layernorm) == operands.norm_facts(after)
        return self._qkv_way(y) if alike else ""


def link_layers(layers: list[Any]) -> list[str]:
    """Let each of a model's fused layers with norms on both sides compute what the next one begins with.

    Returns why each of the layers but the last is not linked, as far as that is known before a call; empty if it is.
    """
    whys = []
    for layer, following in itertools.pairwise(layers):
        if isinstance(layer, FusedSandwichLayer) and isinstance(following, FusedSandwichLayer):
            layer.nm_act_following = Following(following)
        whys.append(_why_unlinked(layer, following))
    return whys


def _why_unlinked(layer: Any, following: Any) -> str:
    """Why calls of a layer with norms on both sides would not compute the product that the next one begins with."""
    if _has_any_global_hook():
        return "hooks on all modules"
    before_mlp, last = FusedSandwichLayer.before_mlp, FusedSandwichLayer.after_parts[1]
    for each, name, whose in (
        (layer, before_mlp, ""),
        (layer, last, ""),
        (following, "input_layernorm", " of the next layer"),
    ):
        if "forward" in vars(each):
            return f"the forward of the {'next ' * bool(whose)}layer is replaced already"
        if name not in vars(each).get("nm_act_norms", ()):
            linear = _merged_after(each, before_mlp).get(name)
            why = why_stays(getattr(each, name)) if name == last else _why_apart(each, name, linear)
            return f"{name}{whose}: {why or 'no kernel computes it so'}"
    if has_hooks(layer):
        return "hooks on it"
    if any(map(has_hooks, (following, following.self_attn))):
        return "hooks on the next layer or its attention"
    norms = getattr(layer, last), following.input_layernorm
    if norms[0].weight.device != norms[1].weight.device:
        return "the next layer is on another device"
    if norms[0].weight.dtype != norms[1].weight.dtype:
        return "the next layer is in another dtype"
    return "" if len(set(map(operands.norm_facts, norms))) == 1 else "the next layer's norm has another epsilon"


def _way_of(norm: Any, linear: nn.Module, x: Tensor) -> str:
    return "" if has_hooks(norm) else operands.way_of(linear, x, norm.weight)


def unfuse(module: nn.Module) -> None:
    """Restore the forward of a module that was fused or shares a merged layer."""
    restore(module)
    for name in _MARKS:
        vars(module).pop(name, None)
