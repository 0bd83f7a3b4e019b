"""The paper's training, decoder block by decoder block, with both passes of a step as one CUDA graph.

What `nm_act.lab.calibrate` does for learned data (256 windows, one step each, AdamW 1e-4, plain squared error of the
block's output, its inputs those of the sparse blocks in front), through the plain Llama of quality_training.py, where a
step is a replay of a graph. A test compares both.
"""

import dataclasses
import time
from collections.abc import Callable

import torch
from quality_session import Session, calibrated, everywhere
from quality_training import Linear, Llama, _step, linears_of
from torch import Tensor, nn

from nm_act.lab.calibrate.run import CalibrationSettings
from nm_act.lab.calibrate.training import BETAS, LARGEST_GRADIENT, block_loss, linear_schedule, passes
from nm_act.lab.evaluate.variants import resolved, sparse_copy
from nm_act.layers.linear import sparse_layers
from nm_act.methods.mitigations import learned_data_of, rank_of
from nm_act.recipe import Recipe

TEXTS = ("wikitext2", "c4", "code")
AT_ONCE = 16
"""Windows in a forward pass without training."""


def starting(dense: nn.Module, recipe: Recipe) -> nn.Module:
    """The sparse model with learned data where training starts: no shift, a scale of 1, the weight's own pair."""
    model = sparse_copy(dense, recipe).model
    for layer in sparse_layers(model).values():
        if layer.data():
            data = {key: torch.full_like(value, float(key == "column_scale")) for key, value in layer.data().items()}
            if "low_rank_in" in data:
                pair = leading_pair(layer.weight.detach(), rank_of(layer.spec.mitigation))
                data["low_rank_in"], data["low_rank_out"] = pair
            layer.set_data(**data)
    return model


def leading_pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`nm_act.methods.mitigations.low_rank_of` by an eigendecomposition, which a GPU computes sooner."""
    w = weight.double()
    wide = w.shape[1] > w.shape[0]
    vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w).eigenvectors[:, -rank:]
    images = w.T @ vectors if wide else w @ vectors
    root = torch.linalg.vector_norm(images, dim=0).clamp_min(1e-30).sqrt()
    inner, outer = (images / root, vectors * root) if wide else (vectors * root, images / root)
    return inner.T.float().contiguous(), outer.float().contiguous()


def train_blocks(
    model: nn.Module,
    dense: nn.Module,
    windows: Tensor,
    settings: CalibrationSettings,
    progress: Callable[[int, float, float], None],
) -> None:
    """Train the learned data of a sparse Llama in place; `progress` gets each block, its first and its last losses."""
    device = next(model.parameters()).device
    layers, linears = linears_of(model)
    length = windows.shape[1]
    teacher, student = Llama(dense, length, torch.float32, {}), Llama(dense, length, torch.float32, dict(linears))
    hidden = torch.nn.functional.embedding(windows.to(device), teacher.embedding)
    steps = max(1, round(len(windows) * settings.epochs))
    for index in range(len(teacher.norms)):
        own = {name: linear for name, linear in linears.items() if name.split(".")[0] == str(index)}
        with torch.no_grad():
            targets = torch.cat([teacher.block(index, some) for some in hidden.split(AT_ONCE)])
        losses = _train_block(student, index, own, hidden, targets, steps, settings)
        for name, linear in own.items():
            layers[name].set_data(**{key: value.detach() for key, value in linear.data.items()})
        with torch.no_grad():
            hidden = torch.cat([student.block(index, some) for some in hidden.split(AT_ONCE)])
        tenth = max(1, steps // 10)
        first, last = losses[:tenth].mean().item(), losses[-tenth:].mean().item()
        if not (losses.isfinite().all() and hidden.isfinite().all()):
            raise ValueError(f"expected a finite loss and hidden states, got others in block {index}; lower the rate")
        progress(index, first, last)


def _train_block(
    student: Llama,
    index: int,
    own: dict[str, Linear],
    hidden: Tensor,
    targets: Tensor,
    steps: int,
    settings: CalibrationSettings,
) -> Tensor:
    """The losses of all steps."""
    device = hidden.device
    parameters = []
    for linear in own.values():
        for key in learned_data_of(linear.layer.spec):
            linear.data[key] = linear.data[key].float().requires_grad_()
            parameters.append(linear.data[key])
    if not parameters:
        return torch.zeros(1, device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0, fused=device.type == "cuda"
    )
    x, target = hidden[:1].clone(), targets[:1].clone()
    forward_backward = _step(lambda: block_loss(student.block(index, x), target, settings.loss), parameters, device)
    losses = []
    for step, window in enumerate(passes(len(hidden), steps, settings.seed + index).tolist()):
        x.copy_(hidden[window : window + 1])
        target.copy_(targets[window : window + 1])
        losses.append(forward_backward().clone())
        optimizer.param_groups[0]["lr"] = settings.learning_rate * linear_schedule(step, steps)
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return torch.stack(losses)


def measure_trained(session: Session, variant, windows: int, tasks: list[str]) -> None:
    """Train a variant's data as the paper does, and measure all its rows, so that they are of one training."""
    variant = calibrated(variant, windows)
    session.need(35)
    model = starting(session.dense, everywhere(variant.recipe))
    settings, start = CalibrationSettings(), time.perf_counter()
    found: list[tuple[float, float]] = []

    def progress(index: int, first: float, last: float) -> None:
        session.need(0)
        found.append((first, last))

    train_blocks(model, session.dense, session.windows[:windows], settings, progress)
    session.fact(
        f"blocks {variant.name}",
        losses=found,
        settings=dataclasses.asdict(settings),
        seconds=time.perf_counter() - start,
    )
    session.done = {row for row in session.done if row[1] != variant.name}
    session.measure(variant, model, [text for text in TEXTS if text in session.texts])
    if tasks:
        session.measure(variant, model, ["wikitext2"], tasks, dtype="bfloat16")


def is_learned(variant) -> bool:
    """Whether a variant's recipe trains something."""
    return variant.recipe is not None and any(learned_data_of(spec) for spec in resolved(variant.recipe))
