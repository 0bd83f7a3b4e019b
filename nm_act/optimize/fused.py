"""Decoder layers whose norms and activations are computed with the product after them (CUDA).

Before attention runs, the product of its merged q/k/v layer is computed from the norm and handed to it for this call.
"""

from torch import Tensor, nn

from . import operands
from .attention import FusedAttention, merged_qkv
from .changed import Changed, change, restore
from .eligible import has_hooks, why_stays
from .merged import Product, SharesProducts

_MARKS = ("nm_act_gate_up", "nm_act_gates", "nm_act_norms", "nm_act_adds")
"""Attributes that fusing adds to Transformers' modules."""


def fuse_mlp(mlp: nn.Module, gate_up: str) -> bool:
    """Call merged gate and up layers as one; returns whether SiLU(gate) * up is computed with the down layer."""
    mlp.nm_act_gate_up = gate_up  # the name only: the module is already registered
    silu = isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation"
    mlp.nm_act_gates = silu and not why_stays(mlp.act_fn) and not operands.why_unfused(mlp.down_proj)
    change(mlp, FusedMLP)
    return mlp.nm_act_gates


class FusedMLP(SharesProducts):
    """An MLP that computes gate and up in one product."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        if _parts_have_hooks(self):
            return super().forward(x)
        return _mlp_tail(self, [getattr(self, self.nm_act_gate_up)(x)])


def _parts_have_hooks(mlp: nn.Module) -> bool:
    return any(has_hooks(getattr(mlp, name)) for name in getattr(mlp, mlp.nm_act_gate_up).names)


def _mlp_tail(mlp: nn.Module, products: list[Tensor], residual: Tensor | None = None) -> Tensor:
    """The output of the MLP, plus the residual if there is one, from the only element of ``products``.

    That is the concatenated output of gate and up, the largest tensor of a model: taken out of the list, it is freed
    before the down layer runs.
    """
    gate, up = products.pop().split(getattr(mlp, mlp.nm_act_gate_up).sizes, dim=-1)
    way = operands.way_of(mlp.down_proj, gate) if mlp.nm_act_gates else ""
    if not way:
        x = gated(mlp.act_fn, gate, up)
        del gate, up
        y = mlp.down_proj(x)
        return y if residual is None else residual + y
    step = operands.Gated(way, mlp.down_proj, gate, up, residual)
    del gate, up
    return step.product(residual)


def gated(act_fn: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """The activation of an MLP where it is not fused; benchmarks compile it for the dense model too."""
    return act_fn(gate) * up


def fuse_layer(layer: nn.Module) -> list[str]:
    """Compute the norms of a pre-norm decoder layer with the products after them; returns which ones."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = merged_qkv(attention)
    gate_up = vars(mlp).get("nm_act_gate_up")
    after = {
        "input_layernorm": None if qkv is None else qkv.linear,
        # The fused path does not call the MLP itself.
        "post_attention_layernorm": None if gate_up is None or has_hooks(mlp) else getattr(mlp, gate_up).linear,
    }
    norms = [name for name, linear in after.items() if linear is not None and _fits(layer, name, linear)]
    if norms:
        layer.nm_act_norms = norms
        # Whether the output projection may add the residual.
        layer.nm_act_adds = isinstance(attention, FusedAttention) and not operands.why_unfused(attention.o_proj)
        change(layer, FusedLayer)
    return norms


def _fits(layer: nn.Module, name: str, linear: nn.Module) -> bool:
    norm = getattr(layer, name)
    return not why_stays(norm) and not operands.why_unfused(linear) and operands.takes_norm(norm, linear)


class FusedLayer(Changed):
    """A pre-norm decoder layer, ``h = x + attention(norm(x)); h + mlp(norm(h))``, whose norms may be fused."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """The hidden states of the next layer, ``[batch, tokens, hidden]``."""
        qkv, gate_up = merged_qkv(self.self_attn), None
        if "post_attention_layernorm" in self.nm_act_norms:
            gate_up = getattr(self.mlp, self.mlp.nm_act_gate_up).linear
        # Hooks that were registered since must get what the stock layer would pass to them.
        way = mlp_way = ""
        if "input_layernorm" in self.nm_act_norms and not has_hooks(self.self_attn):
            way = _way_of(self.input_layernorm, qkv.linear, hidden_states)
        if gate_up is not None and not has_hooks(self.mlp) and not _parts_have_hooks(self.mlp):
            mlp_way = _way_of(self.post_attention_layernorm, gate_up, hidden_states)
        if args or not (way or mlp_way):
            return self.nm_act_stock.forward(self, hidden_states, *args, **kwargs)
        residual = hidden_states
        if way:
            y, _ = operands.norm_product(way, self.input_layernorm, qkv.linear, hidden_states)
            # Attention reads only the shape of this input: called with it, q, k and v are parts of y.
            kwargs["nm_act_product"] = Product(qkv, hidden_states, y)
            del y
        else:
            hidden_states = self.input_layernorm(hidden_states)
        if mlp_way == "decode" and self.nm_act_adds and not has_hooks(self.self_attn):
            hidden, _ = self.self_attn(hidden_states=hidden_states, nm_act_residual=residual, **kwargs)
            products = [operands.norm_product(mlp_way, self.post_attention_layernorm, gate_up, hidden)[0]]
            return _mlp_tail(self.mlp, products, hidden)
        attention, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        if self._gates_in_product(mlp_way, gate_up, attention):
            norm, down = self.post_attention_layernorm, self.mlp.down_proj
            return operands.norm_gated_product(norm, gate_up, down, attention, residual)
        if mlp_way:
            products = list(operands.norm_product(mlp_way, self.post_attention_layernorm, gate_up, attention, residual))
            hidden = products.pop()
            return _mlp_tail(self.mlp, products, hidden)
        hidden = residual + attention
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _gates_in_product(self, way: str, gate_up: nn.Module | None, x: Tensor) -> bool:
        gates = way and vars(self.mlp).get("nm_act_gates")
        return bool(gates) and operands.gates_in_product(way, gate_up, self.mlp.down_proj, x)


def _way_of(norm: nn.Module, linear: nn.Module, x: Tensor) -> str:
    return "" if has_hooks(norm) else operands.way_of(linear, x, norm.weight)


def unfuse(module: nn.Module) -> None:
    """Restore the forward of a module that was fused or shares a merged layer."""
    restore(module)
    for name in _MARKS:
        vars(module).pop(name, None)
