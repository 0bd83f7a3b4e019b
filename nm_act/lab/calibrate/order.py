"""Search for a static order of input channels [ours] that distributes strong channels over the groups of a pattern.

N:M keeps N of each M neighbours, so two strong channels in one group compete while another group keeps weak ones. With
one channel of each strength in every group, the groups are alike.
"""

from typing import Any

import torch
from torch import nn

from ...conversion.permutation import gate_and_up, value_heads


def channel_order(energy: torch.Tensor, group: int) -> torch.Tensor:
    """Order ``[in]`` (int64) that gives every group of M channels one channel of each strength, given E[X_j^2]
    ``[in]``.

    With G groups, position ``g * M + k`` gets the channel of rank ``k * G + g``; in every other round the groups take
    turns backwards, so that none is always first.

    Examples
    --------
    >>> channel_order(torch.tensor([9.0, 8.0, 2.0, 1.0]), 2)
    tensor([0, 3, 1, 2])
    """
    rounds = energy.argsort(descending=True, stable=True).view(group, -1).clone()
    rounds[1::2] = rounds[1::2].flip(-1)
    return rounds.t().flatten()


def find_order(block: nn.Module, name: str, energy: torch.Tensor) -> torch.Tensor:
    """Order of the input channels of a block's layer, e.g. "mlp.down_proj", that can be folded into the block.

    It is `channel_order` of the energy ``[in]``, for an output projection within each head; the identity if none can be
    folded.
    """
    layer: Any = block.get_submodule(name)  # an NMLinear
    group = layer.spec.pattern.span
    heads = value_heads(block, name)
    if heads is not None and heads[1] % group == 0:
        count, head_dim = heads
        shared = energy.view(count, -1, head_dim)  # value heads, query heads of each
        orders = torch.stack([channel_order(head, group) for head in shared.sum(dim=1)])
        start = torch.arange(0, layer.in_features, head_dim, device=energy.device).unsqueeze(1)
        return (orders.repeat_interleave(shared.shape[1], dim=0) + start).flatten()
    if heads is None and gate_and_up(block, name):
        return channel_order(energy, group)
    return torch.arange(layer.in_features, device=energy.device)
