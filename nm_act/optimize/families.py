"""The families of Transformers that optimize() knows: what their code computes, and thus what may replace it."""

from dataclasses import dataclass

from torch import nn

PRE_NORM = ("input_layernorm", "post_attention_layernorm")
"""Norms of a layer ``h = x + attention(norm(x)); h + mlp(norm(h))``, as ``FusedLayer`` computes it."""

SANDWICH = (*PRE_NORM, "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Norms of a layer ``h = x + norm(attention(norm(x))); h + norm(mlp(norm(h)))``, as ``FusedSandwichLayer`` does."""


@dataclass(frozen=True)
class Family:
    """A family whose attention and MLP call each projection once, on the same input, without changing the outputs of
    q, k and v but by ``q_norm`` and ``k_norm`` of each head, the rotary embedding in halves, and the cache.
    """

    # ``PRE_NORM`` or ``SANDWICH`` if its layers are of that form, without factors between; else none, and norms stay.
    norms: tuple[str, ...] = ()
    # Whether attention reads ``config.sliding_window``; in others it has an attribute ``sliding_window``, or no window.
    window_in_config: bool = False


FAMILIES = {
    "llama": Family(PRE_NORM),
    "mistral": Family(PRE_NORM, window_in_config=True),
    "qwen2": Family(PRE_NORM),
    "qwen3": Family(PRE_NORM),
    "gemma3": Family(SANDWICH),
}
"""Folder under transformers.models -> the family."""


def folder_of(module: nn.Module) -> str:
    """The folder under transformers.models that defines a module's class; empty for classes from elsewhere."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 3 else ""
