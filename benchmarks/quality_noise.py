"""The noise of rounding, within which a difference of perplexities means nothing.

Rounding of 1e-6 flips near ties of a selection, and later layers amplify that. Two implementations of one formula
therefore differ in perplexity, and differences within that noise are no ranking.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nm_act.lab.evaluate.perplexity import perplexity

PERTURBATION = 1e-6
"""Relative size of the perturbation of the embeddings: the rounding of float32, amplified by one product."""


@contextmanager
def perturbed(model: nn.Module, seed: int, size: float = PERTURBATION) -> Iterator[None]:
    """Within it, the model's embeddings are multiplied by ``1 + size * n`` with n from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)

    def change(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output.device)
        return (output.double() * (1 + size * noise.double())).to(output.dtype)

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


def noise_floor(model: nn.Module, tokens: torch.Tensor, window: int, seeds: int = 4) -> tuple[float, float]:
    """Standard deviation over seeds of the mean loss, in nats per token, and its largest difference from unperturbed.

    Parameters
    ----------
    model : nn.Module
    tokens : Tensor [tokens], int64
    window : int
    seeds : int
        Number of perturbed runs, at least 2.
    """
    if seeds < 2:
        raise ValueError(f"expected at least 2 seeds to estimate noise from, got {seeds}; use more")
    plain = _mean_loss(model, tokens, window)
    found = []
    for seed in range(seeds):
        with perturbed(model, seed):
            found.append(_mean_loss(model, tokens, window))
    mean = math.fsum(found) / seeds
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (seeds - 1))
    return deviation, max(abs(value - plain) for value in found)


def _mean_loss(model: nn.Module, tokens: torch.Tensor, window: int) -> float:
    found = perplexity(model, tokens, window=window)
    return found.nll / found.tokens
