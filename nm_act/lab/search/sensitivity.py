"""How much a model's predictions move when one group of projections becomes sparse.

Sensitivity = mean over calibration tokens of ``KL(p || q)`` in nats, where p is the dense model's next-token
distribution and q that of the model in which only this group is sparse. Unlike a difference of losses it is never
negative and needs few tokens; unlike the relative error of a layer's output it includes the effect on all later layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...conversion.calibration import set_layers
from ...conversion.sparsify import decoder_linears
from ...layers.linear import NMLinear
from ...recipe import LinearSpec
from ..measured import Place, merged_with
from .options import CalibratedData
from .store import ResultLines


@dataclass(frozen=True)
class Group:
    """Linear layers that get the same option: one projection, or one merged product, of consecutive decoder layers."""

    layers: tuple[int, ...]  # of each linear layer
    projections: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]  # in_features and out_features of each linear layer
    names: tuple[str, ...]  # of the modules

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token."""
        return sum(place.macs for place in self.places)

    @property
    def places(self) -> list[Place]:
        """The linear layers, for the cost."""
        projections = [name.rpartition(".")[2] for name in self.names] if len(self.projections) > 1 else None
        each = zip(self.layers, projections or self.projections * len(self.layers), self.shapes, strict=True)
        return [Place(layer, projection, *shape) for layer, projection, shape in each]

    @property
    def is_whole_product(self) -> bool:
        """Whether no layer outside the group shares the input, so that an optimized model packs the operand once."""
        return set(merged_with(self.projections[0])) <= set(self.projections)

    @property
    def key(self) -> str:
        """Name in result files, "3-4:gate_proj"."""
        return "-".join(map(str, dict.fromkeys(self.layers))) + ":" + "+".join(self.projections)


def groups_of(
    model: nn.Module, projections: tuple[str, ...], layers_together: int = 1, *, merged: bool = False
) -> list[Group]:
    """Groups of a dense model: one per projection or `merged` product, and `layers_together` consecutive layers."""
    cells: dict[tuple[int, tuple[str, ...]], list[tuple[int, str, nn.Linear]]] = {}
    for name, (layer, projection, linear) in decoder_linears(model).items():
        if projection in projections:
            together = tuple(each for each in merged_with(projection) if each in projections)
            key = layer // layers_together, together if merged else (projection,)
            cells.setdefault(key, []).append((layer, name, linear))
    return [
        Group(
            layers=tuple(layer for layer, _, _ in members),
            projections=together,
            shapes=tuple((linear.in_features, linear.out_features) for _, _, linear in members),
            names=tuple(name for _, name, _ in members),
        )
        for (_, together), members in sorted(cells.items())
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
    """KL divergence for every group and spec on calibration text: group key -> spec name -> nats per token.

    Decoder layers before a group are not run again: their dense output is kept, one window at a time.

    ``model`` is a dense Transformers model with its decoder layers in ``get_decoder().layers`` (else ValueError), and
    is unchanged afterwards. ``windows`` is int64 ``[windows, tokens]``. Each group is tried with every spec. ``store``
    is a JSON-lines file with one line per window, group and spec, whose measurements are not repeated; ``progress`` is
    called with the number of finished ones and their total. ``calibrated`` has the data of the specs that need some.
    """
    layers = _decoder_layers(model)
    known = ResultLines(store, ("window", "group", "spec", "calibration"), ("kl",))
    calibrated = calibrated or {}
    digests = {name: calibrated[name].digest if name in calibrated else None for name in specs}
    linears = {name: linear for name, (_, _, linear) in decoder_linears(model).items()}
    total, done = len(windows) * len(groups), 0
    for index, ids in enumerate(windows):
        missing = [group for group in groups if any((index, group.key, *key) not in known for key in digests.items())]
        done += len(groups) - len(missing)
        if not missing:
            continue
        ids = ids[None].to(next(model.parameters()).device)
        dense, outputs = _dense_run(model, layers, ids)
        for group in missing:
            for name, digest in digests.items():
                if (index, group.key, name, digest) in known:
                    continue
                sparse = {m: NMLinear.from_linear(linears[m], specs[name]) for m in group.names}
                if name in calibrated:
                    set_layers(model, sparse, calibrated[name].tensors)
                front = zip(layers[: min(group.layers)], outputs, strict=False)
                with _replaced(model, sparse, front):
                    value = _divergence(dense, _log_probabilities(model, ids))
                known.add(window=index, group=group.key, spec=name, calibration=digest, kl=value)
            done += 1
            known.write()
            if progress is not None:
                progress(done, total)

    def mean(group: Group, name: str) -> float:
        keys = ((index, group.key, name, digests[name]) for index in range(len(windows)))
        return float(sum(known[key]["kl"] for key in keys) / len(windows))

    return {group.key: {name: mean(group, name) for name in specs} for group in groups}


def _log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float().log_softmax(dim=-1)


def _divergence(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    value: float = nn.functional.kl_div(sparse, dense, log_target=True, reduction="sum").item() / dense.shape[0]
    if not math.isfinite(value):
        raise RuntimeError(f"expected a finite divergence, got {value}; load the model with --dtype float32")
    return max(value, 0.0)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    get_decoder: Any = getattr(model, "get_decoder", lambda: None)
    decoder = get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"expected a model with get_decoder().layers, got {type(model).__name__}; search needs those")
    return layers


def _dense_run(model: nn.Module, layers: nn.ModuleList, ids: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Log-probabilities of the dense model, and the outputs of its decoder layers."""
    outputs: list[Any] = []
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda module, args, output: outputs.append(output)))
        return _log_probabilities(model, ids), outputs


@contextmanager
def _replaced(model: nn.Module, sparse: Mapping[str, nn.Module], front: Any) -> Iterator[None]:
    """The model with the sparse modules in place; the (layer, output) pairs of `front` are not computed again."""
    dense, front = {name: model.get_submodule(name) for name in sparse}, list(front)
    try:
        for layer, output in front:
            layer.forward = lambda *args, _output=output, **kwargs: _output
        for name, module in sparse.items():
            model.set_submodule(name, module)
        yield
    finally:
        for layer, _ in front:
            vars(layer).pop("forward", None)
        for name, module in dense.items():
            model.set_submodule(name, module)
