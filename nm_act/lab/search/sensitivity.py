"""How much a model's predictions move when one group of projections becomes sparse.

Sensitivity = mean over calibration tokens of ``KL(p || q)``, p the dense model's next-token distribution and q that of
the model in which only this group is sparse, in nats. Unlike a difference of losses it is never negative and needs few
tokens; unlike the relative error of a layer's output it counts what the rest of the model makes of that error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...conversion.calibration import set_layers
from ...conversion.sparsify import decoder_linears
from ...files import read_json_lines, write_json_lines
from ...layers.linear import NMLinear
from ...recipe import LinearSpec
from .options import CalibratedData

__all__ = ["Group", "groups_of", "sensitivities"]


@dataclass(frozen=True)
class Group:
    """Projections that get one choice together: those that read the same input, of consecutive layers.

    Attributes
    ----------
    layers : tuple of int
    projections : tuple of str
    shapes : tuple of (int, int)
        in_features and out_features of each of its layers.
    names : tuple of str
        Module names.
    """

    layers: tuple[int, ...]
    projections: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    names: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token."""
        return sum(in_features * out_features for in_features, out_features in self.shapes)

    @property
    def key(self) -> str:
        """Name in result files, "3-4:gate_proj"."""
        return "-".join(map(str, self.layers)) + ":" + "+".join(self.projections)


def groups_of(model: nn.Module, projections: tuple[str, ...], layers_together: int = 1) -> list[Group]:
    """Groups of a dense model: one a projection and `layers_together` consecutive layers."""
    cells: dict[tuple[int, str], list[tuple[int, str, nn.Linear]]] = {}
    for name, (layer, projection, linear) in decoder_linears(model).items():
        if projection in projections:
            cells.setdefault((layer // layers_together, projection), []).append((layer, name, linear))
    return [
        Group(
            layers=tuple(layer for layer, _, _ in members),
            projections=(projection,),
            shapes=tuple((linear.in_features, linear.out_features) for _, _, linear in members),
            names=tuple(name for _, name, _ in members),
        )
        for (_, projection), members in sorted(cells.items())
    ]


@torch.inference_mode()
def sensitivities(
    model: nn.Module,
    windows: torch.Tensor,
    groups: list[Group],
    specs: dict[str, LinearSpec],
    store: Path,
    progress: Callable[[int, int], None] | None = None,
    calibrated: dict[str, CalibratedData] | None = None,
) -> dict[str, dict[str, float]]:
    """KL divergence per token for every group and spec, on calibration text.

    Decoder layers in front of a group are not run again: their dense output is kept, one window at a time.

    Parameters
    ----------
    model : nn.Module
        Dense Transformers model with its decoder layers in ``get_decoder().layers``; it is as before afterwards.
    windows : Tensor [windows, tokens], int64
    groups : list of Group
    specs : dict of str to LinearSpec
        What each group is tried with.
    store : Path
        JSON-lines file, a line a window and group; what is in it is not measured again.
    progress : callable, optional
        Called with measurements done and their total.
    calibrated : dict of str to CalibratedData, optional
        By spec name, the data of specs that need some.

    Returns
    -------
    dict
        group key -> spec name -> mean KL in nats a token.

    Raises
    ------
    ValueError
        If the model has no ``get_decoder().layers``.
    RuntimeError
        If a divergence is not finite.
    """
    layers = _decoder_layers(model)
    found = _read(store)
    calibrated = calibrated or {}
    digests = {name: calibrated[name].digest if name in calibrated else "" for name in specs}
    total, done = len(windows) * len(groups), 0
    linears = {name: linear for name, (_, _, linear) in decoder_linears(model).items()}
    for index, ids in enumerate(windows):
        missing = [g for g in groups if not all((index, g.key, *key) in found for key in digests.items())]
        done += len(groups) - len(missing)
        if not missing:
            continue
        ids = ids[None].to(next(model.parameters()).device)
        with _recorded(layers) as outputs:
            dense = _log_probabilities(model, ids)
        for group in missing:
            for name, spec in specs.items():
                if (index, group.key, name, digests[name]) in found:
                    continue
                sparse = {m: NMLinear.from_linear(linears[m], spec) for m in group.names}
                if name in calibrated:
                    set_layers(model, sparse, calibrated[name].tensors)
                with _replayed(layers, outputs, min(group.layers)), _swapped(model, sparse):
                    value = _divergence(dense, _log_probabilities(model, ids))
                found[index, group.key, name, digests[name]] = value
            done += 1
            _write(store, found)
            if progress is not None:
                progress(done, total)
    return {
        g.key: {n: sum(found[i, g.key, n, d] for i in range(len(windows))) / len(windows) for n, d in digests.items()}
        for g in groups
    }


def _log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(dim=-1)


def _divergence(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    value = nn.functional.kl_div(sparse, dense, log_target=True, reduction="sum").item() / dense.shape[0]
    if not value == value or value in (float("inf"), -float("inf")):
        raise RuntimeError(f"expected a finite divergence, got {value}; load the model with --dtype float32")
    return max(value, 0.0)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"expected a model with get_decoder().layers, got {type(model).__name__}; search needs those")
    return layers


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list]:
    outputs: list = [None] * len(layers)

    def keep(index):
        def hook(module, args, output):
            outputs[index] = output

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(layers: nn.ModuleList, outputs: list, first: int) -> Iterator[None]:
    """Layers before `first` give their recorded output without computing it."""
    for index in range(first):
        layers[index].forward = lambda *args, _output=outputs[index], **kwargs: _output
    try:
        yield
    finally:
        for index in range(first):
            del layers[index].forward


@contextmanager
def _swapped(model: nn.Module, sparse: dict[str, nn.Module]) -> Iterator[None]:
    dense = {name: model.get_submodule(name) for name in sparse}
    try:
        for name, module in sparse.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in dense.items():
            model.set_submodule(name, module)


def _read(store: Path) -> dict[tuple[int, str, str, str], float]:
    rows = read_json_lines(store, ("window", "group", "spec", "kl"))
    return {(row["window"], row["group"], row["spec"], row.get("calibration", "")): row["kl"] for row in rows}


def _write(store: Path, found: dict[tuple[int, str, str, str], float]) -> None:
    rows = [
        {"window": w, "group": g, "spec": s, **({"calibration": d} if d else {}), "kl": value}
        for (w, g, s, d), value in found.items()
    ]
    write_json_lines(store, rows)
