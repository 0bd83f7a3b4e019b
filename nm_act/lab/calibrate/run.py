"""A calibration run, block by block; finished blocks are on disk, so that a stopped run can continue."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...conversion.calibration import dense_weights, set_layers
from ...conversion.permutation import fold_order
from ...conversion.sparsify import SparsifyReport, resolved_specs, sparsify
from ...layers.linear import sparse_layers
from ...methods import mitigations
from ...recipe import LinearSpec, Recipe
from ...version import __version__
from .blocks import BlockRunner, switched
from .data import check_seed
from .order import find_order
from .state import RunState
from .static import check_statistics, collect, initial_data
from .training import LOSSES, train_block


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings for training learned data; ValueError if one is not positive and finite, or unknown."""

    learning_rate: float = 1e-4  # of AdamW, after warm-up
    epochs: float = 1.0  # passes over the windows in each block
    loss: str = "mse"  # the paper's, or "relative": every token has the same weight
    seed: int = 0  # of the order of the windows; from 0, below 2**63

    def __post_init__(self) -> None:
        if not all(value > 0 and math.isfinite(value) for value in (self.learning_rate, self.epochs)):
            raise ValueError(
                "expected a positive, finite learning rate and number of epochs, got "
                f"{self.learning_rate} and {self.epochs}; the paper trains one epoch at 1e-4"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"expected a loss among {', '.join(LOSSES)}, got {self.loss!r}; choose one of those")
        check_seed(self.seed)


def calibrate(
    model: nn.Module,
    recipe: Recipe,
    windows: torch.Tensor,
    *,
    settings: CalibrationSettings | None = None,
    device: str | torch.device = "cpu",
    state: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[SparsifyReport, list[dict[str, Any]]]:
    """Make a dense model sparse and calibrate what its recipe needs.

    Each block first runs dense on the output of the sparse blocks before it, which yields the statistics for the static
    data and the target of training; then it is trained, and its sparse output is the input of the next block. One block
    is on ``device`` at a time; the hidden states between two blocks, [windows, length, hidden], stay in memory.

    Parameters
    ----------
    model : nn.Module
        A dense decoder-only Transformers model, on the CPU; changed in place.
    recipe : Recipe
    windows : Tensor [windows, length], int64
        Token ids, as from :func:`calibration_windows`.
    settings : CalibrationSettings, optional
    device : str or torch.device
        Where blocks run.
    state : path, optional
        Folder for finished blocks; if it is that of a stopped run, the run is continued. None stores nothing.
    progress : callable, optional
        Called with the number of finished blocks, their total, and the current step as text.

    Returns
    -------
    report : SparsifyReport
        With the calibrated model as ``.model``.
    history : list of dict
        For every block its index, the losses of :func:`~nm_act.lab.calibrate.training.train_block`, and its seconds.

    Raises
    ------
    ValueError
        If the recipe does not fit the model or needs no calibration, the state is another run's, or a loss is not
        finite.
    """
    settings = settings or CalibrationSettings()
    device = torch.device(device)
    check_needed(resolved_specs(model, recipe).values())
    original = dense_weights(model)
    identity = {
        "version": __version__,
        "recipe": recipe.to_dict(),
        "model": original["weights"],
        "dtype": str(next(model.parameters()).dtype),  # the fingerprint is that of the model in any dtype
        "windows": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
        "settings": dataclasses.asdict(settings),
    }
    store = RunState(state, identity)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    report = sparsify(model.eval(), recipe)
    sparse: Any = report.model
    sparse.nm_act_dense_weights = original
    with switched(sparse_layers(model).values(), "bypass"):
        runner = BlockRunner(model, windows[0])
        hidden = runner.first_inputs(windows)
    history = []
    total = len(runner.names)
    for index in range(total):

        def note(text: str, index: int = index) -> None:
            if progress is not None:
                progress(index, total, text)

        runner.block(index).to(device)
        start = time.perf_counter()
        finished = store.load(index)
        if finished is not None:
            note("reading")
            tensors, facts = finished
            set_layers(model, runner.layers(index), tensors)
        else:
            facts = _calibrate_block(runner, index, hidden, settings, device, note)
        note("output")
        hidden = runner.run_all(index, hidden, device)
        if not hidden.isfinite().all():
            raise ValueError(
                f"expected finite hidden states, got infinities or NaN after block {index}; lower --lr, or use float32"
            )
        if finished is None:
            facts = {**facts, "seconds": round(time.perf_counter() - start, 3)}
            store.save(index, runner.layers(index), facts)
        history.append({"block": index, **facts})
        runner.block(index).to(hidden.device)
    if progress is not None:
        progress(total, total, "done")
    return report, history


def check_needed(specs: Collection[LinearSpec]) -> None:
    """Raise a ValueError if none of a recipe's specs has anything to calibrate."""
    if not any(mitigations.data_of(spec) for spec in specs):
        got = "nothing to calibrate in any layer" if specs else "a recipe that leaves all layers dense"
        raise ValueError(
            f"expected a recipe with something to calibrate (lpts, ls, spts, rsparse-64, ...), got {got}; "
            "correct its rules, or use it as it is, without calibration"
        )


def _calibrate_block(
    runner: BlockRunner,
    index: int,
    hidden: torch.Tensor,
    settings: Any,
    device: torch.device,
    note: Callable[..., None],
) -> dict[str, Any]:
    layers, block = runner.layers(index), runner.block(index)
    if not layers:
        return {}
    note("statistics")
    permuted = [name for name, layer in layers.items() if "input_order" in layer.data()]
    if permuted:
        # A separate pass: other data need the part that selections drop, which depends on the order.
        with switched(layers.values(), "bypass"), collect(layers, device, matrices=False) as statistics:
            runner.run_all(index, hidden, device)
        for name in permuted:
            inner = name.removeprefix(runner.names[index] + ".")
            order = find_order(block, inner, statistics[name].square)
            fold_order(block, inner, order)
            layers[name].input_order.copy_(order)
    with switched(layers.values(), "bypass"), collect(layers, device) as statistics:
        targets = runner.run_all(index, hidden, device)
    for name, layer in layers.items():
        if any(method.rank or method.matrices for method in layer.spec.methods):  # a NaN in them stops torch.linalg
            check_statistics(name, layer, statistics[name])
        layer.set_data(**initial_data(layer, statistics[name]))

    def trained(step: int, steps: int, loss: float) -> None:
        note(f"step {step}/{steps}, loss {loss:.3g}")

    return train_block(runner, index, hidden, targets, settings, device, trained)
