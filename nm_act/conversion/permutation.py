"""Static order of input channels [ours]: strong channels spread over the groups, folded into the layers in front.

N:M keeps N of each M neighbours, so two strong channels in one group compete while another group keeps weak ones. An
order that deals the channels out by their energy, one of each strength to every group, makes the groups alike. It costs
nothing at run time where the layer in front can produce its outputs in that order: down_proj's input comes channel by
channel from gate_proj and up_proj, o_proj's within a head from v_proj (all query heads that share a value head get one
order). The dense function stays the same; the inputs of q, k, v, gate and up come from the residual stream and keep
their order.
"""

import torch
from torch import nn

from ..layers.linear import NMLinear


def channel_order(energy: torch.Tensor, group: int) -> torch.Tensor:
    """Order ``[in]`` (int64) that gives every group one channel of each strength.

    With G groups, position ``g * group + k`` gets the channel of rank ``k * G + g``; in every other round the groups
    take their turn backwards, so that none always comes first.

    Parameters
    ----------
    energy : Tensor [in]
        E[X_j^2] over calibration text.
    group : int
        M, a divisor of ``in``.

    Examples
    --------
    >>> channel_order(torch.tensor([9.0, 8.0, 2.0, 1.0]), 2)
    tensor([0, 3, 1, 2])
    """
    rounds = energy.argsort(descending=True, stable=True).view(group, -1).clone()
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.t().flatten()


def find_order(block: nn.Module, name: str, energy: torch.Tensor) -> torch.Tensor:
    """Order of a layer's input channels that can be folded into ``block``; the identity where none can.

    Parameters
    ----------
    block : nn.Module
    name : str
        Name inside the block of an :class:`~nm_act.NMLinear`, e.g. "mlp.down_proj".
    energy : Tensor [in]
    """
    layer = block.get_submodule(name)
    group = layer.spec.pattern.span
    identity = torch.arange(layer.in_features, device=energy.device)
    heads = _value_heads(block, name)
    if heads is not None:
        value_heads, head_dim = heads
        if head_dim % group:
            return identity
        shared = energy.view(value_heads, -1, head_dim)
        orders = [channel_order(head, group) for head in shared.sum(dim=1)]
        inside = torch.stack(orders).repeat_interleave(shared.shape[1], dim=0).flatten()
        return inside + identity // head_dim * head_dim
    return channel_order(energy, group) if _gate_and_up(block, name) else identity


@torch.no_grad()
def fold_order(block: nn.Module, name: str, order: torch.Tensor) -> None:
    """Put a layer's input channels into ``order``, and the outputs of the layers in front likewise.

    Every changed weight is a new parameter: a copy of the model that shares the old ones is left alone.

    Raises
    ------
    ValueError
        If the order is none, or is not the identity and cannot be folded here.
    """
    check_order(block, name, order)
    order = order.long()
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return
    heads, pair = _value_heads(block, name), _gate_and_up(block, name)
    layer = block.get_submodule(name)
    _set_weight(layer, layer.weight[:, order.to(layer.weight.device)])
    if heads is None:
        for module in pair:
            _reorder_outputs(module, order)
        return
    value_heads, head_dim = heads
    # The first query head of each value head says how that value head's rows go.
    inside = order.view(value_heads, -1, head_dim)[:, 0] % head_dim
    start = torch.arange(value_heads, device=order.device).unsqueeze(1) * head_dim
    _reorder_outputs(_sibling(block, name, "v_proj"), (inside + start).flatten())


def check_order(block: nn.Module, name: str, order: torch.Tensor) -> None:
    """Raise what :func:`fold_order` would raise, and change nothing."""
    identity = torch.arange(len(order), dtype=order.dtype, device=order.device)
    if not torch.equal(order.sort().values, identity):
        raise ValueError(f"expected every input channel once in the order for {name}, got another; calibrate again")
    if torch.equal(order, identity) or _value_heads(block, name) is not None or _gate_and_up(block, name):
        return
    raise ValueError(
        f"expected gate_proj and up_proj, or v_proj, in front of {name} to fold its input order into, got none; "
        "the calibration belongs to another model"
    )


def _value_heads(block: nn.Module, name: str) -> tuple[int, int] | None:
    """Value heads and their size for an attention output projection, None for any other layer."""
    value = _sibling(block, name, "v_proj")
    attention = block.get_submodule(name.rpartition(".")[0])
    head_dim = getattr(attention, "head_dim", None)
    if name.rpartition(".")[2] != "o_proj" or value is None or not isinstance(head_dim, int):
        return None
    fits = value.out_features % head_dim == 0 and block.get_submodule(name).in_features % value.out_features == 0
    return (value.out_features // head_dim, head_dim) if fits else None


def _gate_and_up(block: nn.Module, name: str) -> list[nn.Linear]:
    pair = [_sibling(block, name, other) for other in ("gate_proj", "up_proj")]
    width = block.get_submodule(name).in_features
    fits = name.rpartition(".")[2] == "down_proj" and all(m is not None and m.out_features == width for m in pair)
    return pair if fits else []


def _sibling(block: nn.Module, name: str, other: str) -> nn.Linear | None:
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
