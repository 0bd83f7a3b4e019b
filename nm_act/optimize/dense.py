"""Dense layers, such as an output head, whose decode steps on a CPU run on this package's product for few tokens."""

import torch
from torch import Tensor, nn

from ..ops import autograd
from .changed import Changed, change
from .eligible import why_stays


class FewTokensLinear(Changed):
    """A linear layer that, on a CPU, reads its weight once and in order for one token each of a few sequences."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        # Sequences, not tokens, are counted: under torch.compile a prompt's length may be symbolic.
        if x.ndim > 1 and x.shape[-2] == 1 and _takes(x, self.weight, self.bias):
            y: Tensor = torch.ops.nm_act.dense_linear(x, self.weight, self.bias)
        else:
            y = self.nm_act_stock.forward(self, x)
        return y


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    most = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}.get(x.dtype, 0)  # for more, torch's is faster
    return x.shape[:-1].numel() <= most and not autograd.needs_derivative(x, weight, bias)


def change_dense(model: nn.Module) -> list[str]:
    """Change every dense layer on a CPU that can be changed; returns their names."""
    changed = []
    for name, layer in model.named_modules():
        fits = type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.stride(1) == 1
        if fits and not why_stays(layer):
            change(layer, FewTokensLinear)
            changed.append(name)
    return changed
