"""Weights in the layout that oneDNN's product reads, on CPUs."""

import torch
from torch import Tensor

_BUILT = torch.backends.mkldnn.is_available()


def why_not_prepacked(weight: Tensor) -> str:
    """Why oneDNN has no prepacked product for a weight; empty if it has."""
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device.type}, and oneDNN computes on CPUs"
    if not _BUILT:
        return "this torch was built without oneDNN"
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    if not supported.get(weight.dtype, False):
        return f"oneDNN has no product in {str(weight.dtype).removeprefix('torch.')} on this processor"
    return ""


def prepack_weight(weight: Tensor) -> Tensor:
    """A copy of ``weight [out, in]``, of either stride order, in oneDNN's layout, if `why_not_prepacked` allows it.

    The copy is opaque: it can be passed to ``torch.ops.nm_act.sparse_linear_prepacked``, but neither read nor saved. It
    takes about as many bytes as the weight.
    """
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return copy
