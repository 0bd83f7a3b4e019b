"""Lifting a weight: columns are duplicated so that 2:4+1 over the weight becomes 2:4 over the lifted one.

``csrc/kernels/format/windows.h`` says where each column lies; ``docs/kernels/windows.md`` explains windows.
"""

import torch
from torch import Tensor

from ..patterns import WINDOW_SPAN, NMPattern


def is_lifted(pattern: NMPattern | str) -> bool:
    """Whether the sparse tensor cores run the pattern over a lifted weight: only 2:4+1."""
    return len(NMPattern(pattern).extra_columns) == 1


def lifted_features(pattern: NMPattern | str, in_features: int) -> int:
    """Columns of a lifted weight, 1.25 times in_features; in_features itself for a pattern that is not lifted."""
    return in_features + in_features // 4 if is_lifted(pattern) else in_features


def lifted_columns(pattern: NMPattern | str, in_features: int) -> Tensor:
    """Index ``[lifted in_features]`` of the weight's column that each column of the lifted weight repeats.

    The first ``in_features`` columns are those of the weight; those of the extra windows follow, four for every sixteen
    features. Raises ValueError if the pattern is not 2:4+1, or 16 does not divide in_features.
    """
    if not is_lifted(pattern):
        raise ValueError(f"expected 2:4+1, got {pattern}; pass the weight as it is with any other pattern")
    if in_features % WINDOW_SPAN:
        raise ValueError(f"expected in_features divisible by {WINDOW_SPAN}, got {in_features}; pad the features")
    features = torch.arange(in_features)
    return torch.cat([features, features[NMPattern(pattern).extra_columns[0] :: 4]])


def lift_weight(weight: Tensor, pattern: NMPattern | str) -> Tensor:
    """Append the columns that the extra window of 2:4+1 reads a second time, once per weight, for ``sparse_linear``.

    The first ``in_features`` columns of the result equal ``weight``: use the view ``lifted[:, :in_features]`` as the
    weight, so that memory holds one copy.

    Parameters
    ----------
    weight : Tensor [out_features, in_features]
        Any dtype and either stride order, both kept; in_features divisible by 16.
    pattern : NMPattern or str
        "2:4+1", with any column.

    Returns
    -------
    Tensor [out_features, 1.25 in_features]

    Raises
    ------
    ValueError
        If the pattern is not 2:4+1, or the weight's shape does not fit.

    Examples
    --------
    >>> import torch, nm_act
    >>> weight = torch.randn(8, 64)
    >>> lifted = nm_act.lift_weight(weight, "2:4+1")
    >>> lifted.shape, torch.equal(lifted[:, :64], weight)
    (torch.Size([8, 80]), True)
    """
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"expected weight as a torch.Tensor, got {type(weight).__name__}; convert it with torch.as_tensor"
        )
    if weight.dim() != 2:
        raise ValueError(f"expected weight of shape [out_features, in_features], got {list(weight.shape)}; reshape it")
    columns = lifted_columns(pattern, weight.shape[1]).to(weight.device)
    # torch has no index_select for e4m3: select its bytes.
    bits = weight.view(torch.uint8) if weight.element_size() == 1 else weight
    if weight.stride(1) != 1 and weight.stride(0) == 1:
        lifted = bits.t().index_select(0, columns).t()
    else:
        lifted = bits.index_select(1, columns)
    return lifted.view(weight.dtype)


def unlift(operand: Tensor, pattern: NMPattern | str, in_features: int) -> Tensor:
    """The pruned activation ``[tokens, in_features]`` of a lifted operand, to the bit.

    Parameters
    ----------
    operand : Tensor [tokens, lifted in_features]
        Decompressed, any floating dtype: each survivor is in one of its columns, the others hold +0.0.
    pattern : NMPattern or str
        "2:4+1", with the column of the operand.
    in_features : int
        Of the activation.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[operand.element_size()]
    columns = lifted_columns(pattern, in_features).to(operand.device)
    # Add bit patterns, not floats: at most one of a feature's columns has a bit set, and -0.0 keeps its sign.
    bits = torch.zeros(operand.shape[0], in_features, dtype=integer, device=operand.device)
    return bits.index_add_(1, columns, operand.contiguous().view(integer)).view(operand.dtype)
