"""A static order of a layer's input channels, folded into its weight and those of the preceding layers.

It costs nothing at run time if the preceding layers can produce their outputs in that order: the inputs of down_proj
come channel by channel from gate_proj and up_proj, and those of o_proj, within a head, from v_proj (all query heads
that share a value head get one order). The dense function does not change. The inputs of q, k, v, gate and up come from
the residual stream and keep their order. :mod:`nm_act.lab.calibrate.order` finds a good order.
"""

from typing import Any

import torch
from torch import nn

from ..layers.linear import NMLinear


@torch.no_grad()
def fold_order(block: nn.Module, name: str, order: torch.Tensor) -> None:
    """Put a layer's input channels into ``order``, and likewise the outputs of the preceding layers.

    Every changed weight becomes a new parameter, so copies of the model that share the old ones do not change. Raises
    ValueError if ``order`` is not a permutation, or if it is not the identity and cannot be folded into this layer.
    """
    check_order(block, name, order)
    order = order.long()
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return
    heads, pair = value_heads(block, name), gate_and_up(block, name)
    layer: Any = block.get_submodule(name)
    _set_weight(layer, layer.weight[:, order.to(layer.weight.device)])
    if heads is None:
        for module in pair:
            _reorder_outputs(module, order)
        return
    count, head_dim = heads
    # The order of the first query head of each value head is that of the value head's rows.
    inside = order.view(count, -1, head_dim)[:, 0] % head_dim
    start = torch.arange(count, device=order.device).unsqueeze(1) * head_dim
    _reorder_outputs(_sibling(block, name, "v_proj"), (inside + start).flatten())


def check_order(block: nn.Module, name: str, order: torch.Tensor) -> None:
    """Raise what :func:`fold_order` would raise, without changing anything."""
    identity = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort().values, identity):
        raise ValueError(f"expected every input channel once in the order for {name}, got another; calibrate again")
    if torch.equal(order, identity) or value_heads(block, name) is not None or gate_and_up(block, name):
        return
    raise ValueError(
        f"expected gate_proj and up_proj, or v_proj, in front of {name} to fold its input order into, got none; "
        "the calibration belongs to another model"
    )


def value_heads(block: nn.Module, name: str) -> tuple[int, int] | None:
    """Number and size of the value heads for an attention output projection; None for any other layer."""
    value = _sibling(block, name, "v_proj")
    attention = block.get_submodule(name.rpartition(".")[0])
    head_dim = getattr(attention, "head_dim", None)
    if name.rpartition(".")[2] != "o_proj" or value is None or not isinstance(head_dim, int):
        return None
    layer: Any = block.get_submodule(name)
    fits = value.out_features % head_dim == 0 and layer.in_features % value.out_features == 0
    return (value.out_features // head_dim, head_dim) if fits else None


def gate_and_up(block: nn.Module, name: str) -> list[nn.Linear]:
    """The layers before a down projection; [] for any other layer."""
    pair = [_sibling(block, name, other) for other in ("gate_proj", "up_proj")]
    width = block.get_submodule(name).in_features
    fits = name.rpartition(".")[2] == "down_proj" and all(m is not None and m.out_features == width for m in pair)
    return pair if fits else []


def _sibling(block: nn.Module, name: str, other: str) -> Any:
    module = getattr(block.get_submodule(name.rpartition(".")[0]), other, None)
    return module if isinstance(module, nn.Linear) else None


def _reorder_outputs(module: nn.Linear, order: torch.Tensor) -> None:
    order = order.to(module.weight.device)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[order], module.bias.requires_grad)
    _set_weight(module, module.weight[order])


def _set_weight(module: nn.Linear, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight, module.weight.requires_grad)
    if isinstance(module, NMLinear):
        module.refresh()
