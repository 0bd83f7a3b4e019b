"""Learned mitigations: one decoder block's eta, s, b', A and B against its dense output."""

import math
from collections.abc import Callable

import torch

from ...layers.linear import NMLinear
from ...methods import mitigations
from .blocks import BlockRunner, differentiable

LOSSES = ("relative", "mse")
"""Names accepted for the loss: the squared error of every token over its mean square, or plain."""

BETAS = (0.9, 0.95)
WARM_UP = 0.03
LARGEST_GRADIENT = 1.0


def train_block(
    runner: BlockRunner,
    index: int,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    *,
    learning_rate: float,
    epochs: float,
    loss: str,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Train the learned data of one block in place: AdamW, no weight decay, linear schedule, batch 1.

    There is at least one step, however small ``epochs`` is.

    Parameters
    ----------
    inputs : Tensor [windows, length, hidden]
        What the sparse prefix gives.
    targets : Tensor [windows, length, hidden]
        The dense block's output for them.

    Returns
    -------
    dict
        Mean loss over the first and the last tenth of the steps; empty where nothing is learned.

    Raises
    ------
    ValueError
        If the loss is not finite.
    """
    layers = runner.layers(index)
    parameters = [_master(layer, name) for layer in layers.values() for name in mitigations.learned_data_of(layer.spec)]
    steps = max(1, round(len(inputs) * epochs))
    if not parameters:
        return {}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, steps))
    losses = []
    try:
        with differentiable(layers.values()):
            for step, window in enumerate(_order(len(inputs), steps, seed + index)):
                output = runner.run(index, inputs[window : window + 1].to(device))
                value = block_loss(output, targets[window : window + 1].to(device), loss)
                losses.append(value.item())
                if not math.isfinite(losses[-1]):
                    raise ValueError(
                        f"expected a finite loss, got {losses[-1]} in block {index} at step {step + 1} of {steps}; "
                        "lower --lr, or check the model for infinities"
                    )
                optimizer.zero_grad()
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress(step + 1, steps, losses[-1])
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    for layer in layers.values():
        layer.refresh()
    tenth = max(1, steps // 10)
    return {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}


def _master(layer: NMLinear, name: str) -> torch.Tensor:
    """A layer's learned data as float32, in which steps of a millionth are kept; refresh() rounds it at the end."""
    setattr(layer, name, layer.get_buffer(name).float().requires_grad_())
    return layer.get_buffer(name)


def block_loss(output: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Squared error of a block's output, float32.

    The paper's is plain ("mse"). A few tokens of a language model have hidden states a thousand times larger than all
    others, and plain training spends itself on these; "relative" gives every token the same weight.
    """
    error = (output.float() - target.float()).square().mean(dim=-1)
    if kind == "relative":
        error = error / target.float().square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return error.mean()


def _linear(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up + 1)))


def _order(windows: int, steps: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(windows, generator=generator) for _ in range(math.ceil(steps / windows))]
    return torch.cat(epochs)[:steps].tolist()
