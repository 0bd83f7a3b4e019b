"""Linear layers of other libraries: which of them are plain, and what PEFT has wrapped around them."""

from typing import TypeGuard

from torch import nn

BASE = "base_layer"
"""PEFT's name for the layer that it wraps."""


_PLAIN = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}
"""Subclasses of nn.Linear that compute the same."""


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is ``torch.nn.Linear``, or a subclass that is known to compute the same."""
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) in _PLAIN


def plain_linear(module: nn.Linear) -> nn.Linear:
    """The ``torch.nn.Linear`` with the same (shared) parameters."""
    if type(module) is nn.Linear:
        return module
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.weight, linear.bias = module.weight, module.bias
    return linear.train(module.training)


def projection_name(name: str) -> str:
    """The component of a layer's name that identifies the projection: ``q_proj`` for ``q_proj.base_layer``.

    Examples
    --------
    >>> projection_name("layers.0.self_attn.q_proj.base_layer"), projection_name("layers.0.self_attn.q_proj")
    ('q_proj', 'q_proj')
    """
    parent, _, last = name.rpartition(".")
    return parent.rpartition(".")[2] if last == BASE else last


def wrapper_of(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Name and module of the innermost wrapper around a module; None if nothing wraps it."""
    parts = name.split(".")
    for stop in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:stop])
        module = model.get_submodule(path)
        if isinstance(getattr(module, "_modules", {}).get(BASE), nn.Module):
            return path, module
    return None


def is_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module is an adapter beside a wrapped layer."""
    found = wrapper_of(model, name)
    return found is not None and not name.startswith(f"{found[0]}.{BASE}")


def why_wrapped_stays(model: nn.Module, name: str) -> str:
    """Why a module inside a wrapper stays dense; empty for the base layer of plain LoRA and for unwrapped modules."""
    found = wrapper_of(model, name)
    if found is None:
        return ""
    wrapper = found[1]
    if is_adapter(model, name):
        return f"adapter of PEFT's {type(wrapper).__name__}"
    # LoRA adds to the output of the wrapped layer; other methods read its weight.
    plain = type(wrapper).__module__.startswith("peft.tuners.lora.") and not getattr(wrapper, "lora_variant", None)
    return "" if plain else f"PEFT's {type(wrapper).__module__.split('.')[-2]} method reads its weight by itself"


def adapter_is_idle(model: nn.Module, name: str) -> bool:
    """Whether a linear layer is an adapter that calls do not run: merged, disabled, or not the active one."""
    found = wrapper_of(model, name)
    if found is None or not is_adapter(model, name):
        return False
    wrapper, adapter = found[1], name.rpartition(".")[2]
    off = getattr(wrapper, "merged", False) or getattr(wrapper, "disable_adapters", False)
    return bool(off) or adapter not in getattr(wrapper, "active_adapters", [adapter])
