"""Training of learned mitigations: eta, s, b', A and B of one decoder block against its dense output."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ...layers.linear import NMLinear
from ...methods import mitigations
from .blocks import BlockRunner, switched

LOSSES = ("relative", "mse")
"""Names of losses: the squared error of every token, over its mean square or plain."""

BETAS = (0.9, 0.95)
WARM_UP = 0.03
LARGEST_GRADIENT = 1.0


def train_block(
    runner: BlockRunner,
    index: int,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    settings: Any,
    device: torch.device,
    progress: Callable[[int, int, float], None],
) -> dict[str, float]:
    """Train the learned data of a block in place: AdamW, linear schedule, batch 1, at least one step.

    `inputs` are the outputs of the sparse blocks in front, `targets` those of the dense block for them, both
    ``[windows, length, hidden]``; `settings` are the run's, and `progress` is called with step, steps and loss.

    Returns the mean loss over the first and the last tenth of the steps; nothing if nothing is learned. A loss that is
    not finite is a ValueError.
    """
    layers = runner.layers(index)
    parameters = [master(layer, name) for layer in layers.values() for name in mitigations.learned_data_of(layer.spec)]
    steps = max(1, round(len(inputs) * settings.epochs))
    if not parameters:
        return {}
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, steps))
    losses = []
    try:
        with switched(layers.values(), "differentiable"):
            for step, window in enumerate(passes(len(inputs), steps, settings.seed + index).tolist(), 1):
                output = runner.run(index, inputs[window : window + 1].to(device))
                loss = block_loss(output, targets[window : window + 1].to(device), settings.loss)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise ValueError(
                        f"expected a finite loss, got {losses[-1]} in block {index} at step {step} of {steps}; "
                        "lower --lr, or check the model for infinities"
                    )
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
                optimizer.step()
                schedule.step()
                progress(step, steps, losses[-1])
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
    for layer in layers.values():
        layer.refresh()
    tenth = max(1, steps // 10)
    return {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}


def master(layer: NMLinear, name: str) -> torch.Tensor:
    """A layer's learned data as float32, which keeps steps of a millionth; refresh() rounds them at the end."""
    setattr(layer, name, layer.get_buffer(name).float().requires_grad_())
    return layer.get_buffer(name)


def block_loss(output: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Squared error of a block's output, float32.

    The paper's loss is plain ("mse"). A few tokens of a language model, whose hidden states are a thousand times larger
    than all others, dominate it; "relative" gives every token the same weight.
    """
    error = (output.float() - target.float()).square().mean(dim=-1)
    if kind == "relative":
        error = error / target.float().square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return error.mean()


def linear_schedule(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up + 1)))


def passes(windows: int, count: int, seed: int) -> torch.Tensor:
    """Indices ``[count]`` of windows: all windows in a new order before any is repeated."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(math.ceil(count / windows))])[:count]
