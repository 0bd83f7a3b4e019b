"""End-to-end training on the dense model's output distribution: learned data, weights, or both.

Block-wise training (:mod:`.training`) makes each block's output resemble the dense one's. Here the whole sparse model
runs, and the loss is ``KL(p || q)`` per token between the dense and the sparse next-token distributions, so errors may
cancel between layers. The trained values cost nothing at run time: scales, shifts and biases are data of the operator,
and changed weights replace the old ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...layers.linear import NMLinear, sparse_layers
from ...methods import mitigations
from ..evaluate.perplexity import paired_difference
from .blocks import switched
from .training import BETAS, LARGEST_GRADIENT, linear_schedule, master, passes

TRAINED = ("data", "weights", "both")
"""What can be trained: the learned data of mitigations, the sparse layers' weights, or both."""

_AT_ONCE = 4  # held-out windows in one call: bounds the float32 copies of their logits


@dataclass(frozen=True)
class DistillSettings:
    """Settings of `distill`; ValueError if a number is not positive and finite, or ``train`` is unknown."""

    steps: int = 256  # of AdamW, with a linear schedule after 3 % of warm-up
    batch: int = 4  # windows in one step
    train: str = "data"  # one of `TRAINED`
    learning_rate: float = 1e-3  # of learned data
    weight_rate: float = 1e-4
    checks: int = 8  # how often the held-out loss is measured on the way
    seed: int = 0  # of the order of the windows

    def __post_init__(self) -> None:
        numbers = self.steps, self.batch, self.learning_rate, self.weight_rate, self.checks
        if not all(value > 0 and math.isfinite(value) for value in numbers):
            raise ValueError(f"expected positive, finite numbers, got {numbers}; 256 steps of 4 windows are usual")
        if self.train not in TRAINED:
            raise ValueError(f"expected to train {', '.join(TRAINED)}, got {self.train!r}; choose one of those")


@dataclass(frozen=True)
class Distilled:
    """What `distill` did."""

    kept: bool  # whether the trained values are in the model; else the ones from before are
    before: float  # held-out loss, nats per token
    after: float  # of the best trained values
    difference: float  # after - before, mean over held-out windows
    stderr: float  # of the difference, paired by window
    history: list[dict[str, Any]]  # step, training loss and held-out loss at every check

    def __str__(self) -> str:
        change = f"{self.before:.4f} -> {self.after:.4f} nats ({self.difference:+.4f} ± {self.stderr:.4f})"
        return f"held-out loss {change}: " + ("kept" if self.kept else "not lower by more than its error, so kept out")


def distill(
    model: nn.Module,
    dense: nn.Module,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    settings: DistillSettings | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Distilled:
    """Train a sparse model in place towards the dense one; kept only if that lowers the held-out loss.

    The best values of all checks are kept, but only if the held-out loss falls by more than twice its standard error
    over windows; otherwise the model is left unchanged.

    ``model`` is a sparse Transformers model, calibrated if its recipe needs data, whose sparse layers' weights are its
    own; ``dense`` is the dense model on the same device. ``windows`` and ``held_out`` are int64 ``[windows, length]``:
    training text, and text that is not in it. ``progress`` is called with step, steps and loss.

    Raises ValueError if there is nothing to train, fewer than two held-out windows, a held-out window that is also
    trained on, or a loss is not finite.
    """
    settings = settings or DistillSettings()
    layers = sparse_layers(model)
    _check_windows(windows, held_out)
    data, weights = _trained(layers, settings.train)
    if not data and not weights:
        raise ValueError(
            f"expected something to train ({settings.train}), got sparse layers without it; add ls or lpts to the "
            "recipe, or train weights"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    device = next(model.parameters()).device
    before = held_out_losses(model, dense, held_out)
    start = _values(layers, data, weights)
    best = math.fsum(before), start, before
    masters = [master(layers[name], key) for name, key in data]
    for name in weights:
        layers[name].weight.requires_grad_(True)
    groups = [
        {"params": masters, "lr": settings.learning_rate},
        {"params": [layers[name].weight for name in weights], "lr": settings.weight_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, weight_decay=0.0)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, settings.steps))
    history: list[dict[str, Any]] = []
    order = passes(len(windows), settings.steps * settings.batch, settings.seed).view(settings.steps, settings.batch)
    every = max(1, settings.steps // settings.checks)
    try:
        for step in range(1, settings.steps + 1):
            with switched(layers.values() if data else (), "differentiable"):
                loss = divergence(model, dense, windows[order[step - 1]].to(device)).mean()
                if not loss.isfinite():
                    raise ValueError(f"expected a finite loss, got {loss.item()} at step {step}; lower the rate")
                optimizer.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step, settings.steps, loss.item())
            if step % every == 0 or step == settings.steps:
                _refresh(layers)
                found = held_out_losses(model, dense, held_out)
                history.append({"step": step, "loss": loss.item(), "held_out": math.fsum(found) / len(found)})
                if math.fsum(found) < best[0]:
                    best = math.fsum(found), _values(layers, data, weights), found
    finally:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None
    difference, stderr = paired_difference(best[2], before)
    kept = difference < -2 * stderr
    _restore(layers, best[1] if kept else start)
    count = len(before)
    return Distilled(kept, math.fsum(before) / count, best[0] / count, difference, stderr, history)


def divergence(model: nn.Module, dense: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """``KL(p || q)`` ``[windows]`` in nats per token for ``ids [windows, length]``, where p is the dense model's."""
    with torch.no_grad():
        wanted = dense(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)
    found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)
    return nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def held_out_losses(model: nn.Module, dense: nn.Module, windows: torch.Tensor) -> list[float]:
    """`divergence` of every window."""
    device = next(model.parameters()).device
    parts = (divergence(model, dense, some.to(device)).tolist() for some in windows.split(_AT_ONCE))
    return [value for part in parts for value in part]


def _check_windows(windows: torch.Tensor, held_out: torch.Tensor) -> None:
    if len(held_out) < 2 or len(windows) < 1:
        raise ValueError(
            f"expected at least 1 window to train on and 2 held out, got {len(windows)} and {len(held_out)}; give more "
            "text"
        )
    seen = {tuple(window) for window in windows.tolist()}
    if any(tuple(window) in seen for window in held_out.tolist()):
        raise ValueError("expected held-out windows apart from those trained on, got one of them; split the text")


def _trained(layers: dict[str, NMLinear], what: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(layer, name) of the learned data, and layers of the weights, that are trained."""
    learned = [(name, key) for name, layer in layers.items() for key in mitigations.learned_data_of(layer.spec)]
    weights = [name for name, layer in layers.items() if not layer.spec.scoring.prunes_weight]
    return learned if what != "weights" else [], weights if what != "data" else []


def _refresh(layers: dict[str, NMLinear]) -> None:
    for layer in layers.values():
        layer.refresh()


def _values(layers: dict[str, NMLinear], data: Any, weights: Any) -> dict[tuple[str, str], torch.Tensor]:
    found = {(name, key): layers[name].get_buffer(key).detach().clone() for name, key in data}
    return found | {(name, "weight"): layers[name].weight.detach().clone() for name in weights}


@torch.no_grad()
def _restore(layers: dict[str, NMLinear], values: dict[tuple[str, str], torch.Tensor]) -> None:
    for (name, key), value in values.items():
        if key == "weight":
            layers[name].weight.copy_(value)
        else:
            setattr(layers[name], key, value)
    _refresh(layers)
