"""Weights refitted to pruned inputs: ridge least squares towards the old weight, layer by layer.

``V = W + (T - P Wᵀ)ᵀ P (PᵀP + λ m I)⁻¹`` with the pruned inputs P, the target outputs T and the mean m of the diagonal
of ``PᵀP``. A layer's new weight is kept only where it lowers the error on held-out text by more than twice its standard
error. What comes of it end to end is in docs/evaluation.md: a lower error of every layer is not a better model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nm_act import NMLinear
from nm_act.lab.calibrate.blocks import BlockRunner, at_once, switched
from nm_act.lab.evaluate.perplexity import paired_difference
from nm_act.lab.measured import MERGED
from nm_act.ops import composed, formulas

TARGETS = ("own", "dense")


@dataclass(frozen=True)
class RefitSettings:
    """Settings of `refit`.

    Parameters
    ----------
    strength : float
        λ, in units of the mean diagonal of the Gram matrix.
    target : str
        "own" is the old weight's output for the layer's unpruned input in the sparse model; "dense" that of the layer
        in the dense model.
    first_tokens : int
        Tokens at the start of every window that are left out of the fit and of its error.
    relative : bool
        Whether every token's error counts relative to the mean square of its input.
    held_out : int
        Windows at the end that are not fitted but measured.

    Raises
    ------
    ValueError
        If the strength is not positive and finite, or the target is unknown.
    """

    strength: float = 1.0
    target: str = "dense"
    first_tokens: int = 0
    relative: bool = False
    held_out: int = 16

    def __post_init__(self) -> None:
        if not (self.strength > 0 and math.isfinite(self.strength)):
            raise ValueError(f"expected a positive, finite strength of the ridge, got {self.strength}; 1 is strong")
        if self.target not in TARGETS:
            raise ValueError(f"expected a target among {', '.join(TARGETS)}, got {self.target!r}; choose one of those")


def ridge(weight: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor:
    """The refitted weight ``[out, in]``.

    Parameters
    ----------
    weight : Tensor [out, in]
    gram : Tensor [in, in], float64
        ``PᵀP``.
    cross : Tensor [out, in], float64
        ``(T - P Wᵀ)ᵀ P``.
    strength : float

    Raises
    ------
    ValueError
        If a matrix is not finite, or so singular that the ridge does not help.
    """
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise ValueError("expected finite Gram matrices, got infinities or NaN; load the model with --dtype float32")
    scale = gram.diagonal().mean()
    damped = gram + strength * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed or not scale > 0:
        raise ValueError(
            "expected a Gram matrix that its ridge makes invertible, got a singular one; use a stronger ridge or more "
            "text"
        )
    return (weight.double() + torch.cholesky_solve(cross.t(), factor).t()).to(weight.dtype)


class _Fit:
    """Gram matrix, cross products and held-out errors of one layer."""

    def __init__(self, layer: NMLinear, device: torch.device):
        size = layer.in_features
        self.weight = layer.weight.detach().clone()
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(layer.out_features, size, dtype=torch.float64, device=device)
        self.held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, pruned: torch.Tensor, target: torch.Tensor, scale: torch.Tensor | float, held: bool) -> None:
        missing = (target - pruned @ self.weight.t()) * scale
        pruned = pruned * scale
        if held:
            self.held.append((pruned, missing, (target * scale).square().sum()))
        else:
            self.gram += (pruned.t() @ pruned).double()
            self.cross += (missing.t() @ pruned).double()

    def errors(self, weight: torch.Tensor) -> list[float]:
        """Relative error of every held-out window."""
        change = (weight - self.weight).t()
        return [((missing - pruned @ change).square().sum() / size).item() for pruned, missing, size in self.held]


@torch.no_grad()
def refit(
    model: nn.Module,
    dense: nn.Module,
    windows: torch.Tensor,
    settings: RefitSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Refit the weights of a sparse model in place, block by block and product by product.

    Each product is fitted to the inputs that the refitted layers before it give.

    Parameters
    ----------
    model : nn.Module
        A sparse Transformers model without calibrated data; its sparse layers' weights must be its own.
    dense : nn.Module
        A second sparse copy of the same dense model, unchanged by this: it runs with every layer dense.
    windows : Tensor [windows, length], int64
        Calibration text, the held-out windows last.
    settings : RefitSettings, optional
    progress : callable, optional
        Called with the number of finished blocks and their total.

    Returns
    -------
    list of dict
        For every layer its name, the held-out relative error before and after, the mean and standard error of the
        difference over windows, and whether the new weight was kept.

    Raises
    ------
    ValueError
        If there are fewer than two held-out windows, or fewer fitted tokens than a layer has inputs.
    """
    settings = settings or RefitSettings()
    fitted = len(windows) - settings.held_out
    tokens = fitted * (windows.shape[1] - settings.first_tokens)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NMLinear)}
    widest = max(layer.in_features for layer in layers.values())
    if settings.held_out < 2 or tokens < widest:
        raise ValueError(
            f"expected 2 held-out windows and at least {widest} tokens to fit as many inputs, got "
            f"{settings.held_out} and {max(tokens, 0)}; give more text"
        )
    device = next(model.parameters()).device
    all_dense = [module for module in dense.modules() if isinstance(module, NMLinear)]
    with switched(all_dense, "bypass"):
        runner, reference = BlockRunner(model, windows[0]), BlockRunner(dense, windows[0])
        hidden = runner.first_inputs(windows)
        wanted = hidden
        report = []
        for index in range(len(runner.names)):
            for together in MERGED:
                chosen = {
                    full: layer
                    for full, layer in runner.layers(index).items()
                    if full.rpartition(".")[2] in together and not layer.spec.scoring.prunes_weight
                }
                report += _refit_layers(runner, reference, index, chosen, hidden, wanted, settings, device)
            hidden = runner.run_all(index, hidden, device)
            wanted = reference.run_all(index, wanted, device)
            if progress is not None:
                progress(index + 1, len(runner.names))
    return report


def _refit_layers(
    runner: BlockRunner,
    reference: Any,
    index: int,
    chosen: dict[str, NMLinear],
    hidden: torch.Tensor,
    wanted: torch.Tensor,
    settings: Any,
    device: torch.device,
) -> list[dict[str, Any]]:
    fits = {name: _Fit(layer, device) for name, layer in chosen.items()}
    if not fits:
        return []
    first = len(hidden) - settings.held_out
    parts = [*_pairs(hidden[:first], wanted[:first], at_once(device)), *_pairs(hidden[first:], wanted[first:], 1)]
    inputs: dict[str, torch.Tensor] = {}
    targets: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in chosen.items():
            hooks.enter_context(layer.register_forward_pre_hook(_keeper(inputs, name)))
            dense_layer = reference.model.get_submodule(name)
            hooks.enter_context(dense_layer.register_forward_hook(_output_keeper(targets, name)))
        fitted = math.ceil(first / at_once(device))
        for part, (own, theirs) in enumerate(parts):
            runner.run(index, own.to(device))
            if settings.target == "dense":
                reference.run(index, theirs.to(device))
            for name, layer in chosen.items():
                x = inputs[name][:, settings.first_tokens :].flatten(0, -2)
                if settings.target == "dense":
                    target = targets[name][:, settings.first_tokens :].flatten(0, -2)
                else:
                    target = x @ fits[name].weight.t()
                spec = layer.spec
                pruned = composed.select(formulas.shifted(x, None, spec.token_shift), spec.pattern, layer.channel_scale)
                scale = x.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt() if settings.relative else 1.0
                fits[name].add(pruned, target, scale, held=part >= fitted)
    report = []
    for name, fit in fits.items():
        found = ridge(fit.weight, fit.gram, fit.cross, settings.strength)
        before, after = fit.errors(fit.weight), fit.errors(found)
        mean, stderr = paired_difference(after, before)
        kept = mean < -2 * stderr
        if kept:
            chosen[name].weight.copy_(found)
            chosen[name].refresh()
        averages = sum(before) / len(before), sum(after) / len(after)
        numbers = {"before": averages[0], "after": averages[1], "difference": mean, "stderr": stderr}
        report.append({"layer": name, **numbers, "kept": kept})
    return report


def _pairs(hidden: torch.Tensor, wanted: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(hidden.split(size), wanted.split(size), strict=True)


def _keeper(store: dict[str, Any], name: str) -> Callable[..., None]:
    return lambda module, args: store.__setitem__(name, args[0].detach().float())


def _output_keeper(store: dict[str, Any], name: str) -> Callable[..., None]:
    return lambda module, args, output: store.__setitem__(name, output.detach().float())
