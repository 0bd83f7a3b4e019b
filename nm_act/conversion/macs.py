"""Multiply-accumulates per token of a decoder's modules: linear layers and everything else with weights."""

import math
from typing import Any

from torch import nn

from .adapters import adapter_is_idle

_TOP_K = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"),
    *("num_selected_experts", "moe_k"),
)
"""Names of the number of experts per token in Transformers' model families."""


def computes_itself(module: nn.Module) -> bool:
    """Whether a module that is not a linear layer has its own matrices (fused experts, a router, Conv1D)."""
    return not isinstance(module, nn.Embedding) and bool(matrices(module))


def matrices(module: nn.Module) -> list[str]:
    """Names of a module's own parameters with at least two dimensions larger than 1, without biases of experts."""
    return [
        name
        for name, value in module.named_parameters(recurse=False)
        if "bias" not in name and sum(size > 1 for size in value.shape) > 1
    ]


def macs_of(model: nn.Module, name: str) -> float | None:
    """Multiply-accumulates per token of one module of ``model`` without its children; None if unknown.

    An expert counts by the average number of its calls per token, since ``top_k`` of all experts run. A LoRA adapter
    that is merged or not active counts nothing.
    """
    module = model.get_submodule(name)
    sizes: list[Any] = [getattr(module, "in_features", None), getattr(module, "out_features", None)]
    if all(isinstance(size, int) for size in sizes):
        return 0.0 if adapter_is_idle(model, name) else math.prod(sizes) * _share(model, name)
    own: list[Any] = [module.get_parameter(each) for each in matrices(module)]
    if own and all(value.ndim == 3 for value in own) and not isinstance(module, nn.modules.conv._ConvNd):
        experts, active = own[0].shape[0], _top_k(model, name)
        if active is None or any(value.shape[0] != experts for value in own):
            return None
        return float(sum(value.numel() for value in own) * active / experts)
    # [in, out] of Conv1D, [experts, in] of a router, the kernel of a convolution over tokens: each used once per token.
    single = matrices(module) == ["weight"] and (own[0].ndim == 2 or isinstance(module, nn.Conv1d))
    return float(own[0].numel() * _share(model, name)) if single else None


def _share(model: nn.Module, name: str) -> float:
    """The fraction of all tokens that a module sees: less than 1 inside a list of experts."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part == "experts" and parts[i + 1].isdigit():
            path = ".".join(parts[: i + 1])
            active, experts = _top_k(model, path), len(list(model.get_submodule(path).children()))
            return 1.0 if active is None else active / experts
    return 1.0


def _top_k(model: nn.Module, name: str) -> int | None:
    block = model.get_submodule(name.rpartition(".")[0])
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    owners = [model.get_submodule(name), block, *block.children(), text]
    found = (getattr(owner, key, None) for owner in owners if owner is not None for key in _TOP_K)
    return next((value for value in found if type(value) is int), None)
