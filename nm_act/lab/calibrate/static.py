"""Statistics of the inputs of a block's layers while it runs dense, and the data computed from them in closed form."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...layers.linear import NMLinear
from ...methods import criteria, mitigations
from ...ops import composed, formulas


class InputStatistics:
    """Running statistics of one layer's input channels over calibration tokens: sums and maxima.

    ``total`` and ``square`` are the sums of X_j and X_j^2 (float64), ``largest`` is max |X_j|, each [in];
    ``covariance`` is the sum of X^T X, and ``lost`` that of R^T R for R = Z - P(Z), each token divided by its root mean
    square, each [in, in], float32, or None if not needed.
    """

    def __init__(self, in_features: int, device: torch.device | str, *, covariance: bool = False, lost: bool = False):
        self.tokens = 0
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.square = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.largest = torch.zeros(in_features, device=device)
        self.covariance = torch.zeros(in_features, in_features, device=device) if covariance else None
        self.lost = torch.zeros(in_features, in_features, device=device) if lost else None
        self._weight_scale: tuple[torch.Tensor | None] | None = None

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of ``x [..., in]``."""
        x = x.detach().flatten(0, -2).float()
        self.tokens += x.shape[0]
        self.total += x.sum(dim=0, dtype=torch.float64)
        self.square += x.square().sum(dim=0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        if self.covariance is not None:
            self.covariance.addmm_(x.t(), x)

    def add_lost(self, layer: NMLinear, x: torch.Tensor) -> None:
        """Add the part of ``x [..., tokens, in]`` that a layer's selection drops.

        A static shift is not known yet and is left out. The channel scale is that of the layer's forward; with clact it
        comes from the tokens of each sequence.
        """
        if self._weight_scale is None:  # the same in every window
            self._weight_scale = (mitigations.selection_scale(layer.spec, layer.weight, layer.weight, {}),)
        [static], lost = self._weight_scale, self.lost
        assert lost is not None  # else nobody asks
        x = x.detach()
        for tokens in x.reshape(-1, *x.shape[-2:]):
            ranks_by_call = layer.spec.scoring.by_sequence and (len(tokens) > 1 or layer.spec.token_shift != "none")
            scale = criteria.call_scale(tokens) if ranks_by_call else static
            z = formulas.shifted(tokens, None, layer.spec.token_shift)
            dropped = (z - composed.select(z, layer.spec.pattern, scale)).float()
            # Otherwise a token with a thousandfold input would dominate the sum.
            size = tokens.float().square().mean(dim=-1, keepdim=True).sqrt()
            dropped = dropped / size.clamp_min(torch.finfo(torch.float32).tiny)
            lost.addmm_(dropped.t(), dropped)

    @property
    def mean(self) -> torch.Tensor:
        """Mean of every channel, float32 [in]."""
        return (self.total / self.tokens).float()

    @property
    def centred_covariance(self) -> torch.Tensor | None:
        """Covariance of the channels, float64 [in, in], or None if it was not taken."""
        if self.covariance is None:
            return None
        mean = self.mean.double()
        return self.covariance.double() / self.tokens - torch.outer(mean, mean)

    @property
    def norm(self) -> torch.Tensor:
        """``||X_:j||_2``, float32 [in]."""
        return self.square.sqrt().float()


@contextmanager
def collect(
    layers: dict[str, NMLinear], device: torch.device | str, *, matrices: bool = True
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of the layers' inputs over all calls inside the context, by the layers' names.

    Without `matrices`, only statistics per channel are taken.
    """
    statistics = {}
    for name, layer in layers.items():
        needed = {each for method in layer.spec.methods for each in method.matrices} if matrices else ()
        statistics[name] = InputStatistics(
            layer.in_features, device, covariance="covariance" in needed, lost="lost" in needed
        )

    def add(layer: NMLinear, name: str, x: torch.Tensor) -> None:
        statistics[name].add(x)
        if statistics[name].lost is not None:
            statistics[name].add_lost(layer, x)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(lambda module, args, name=name: add(module, name, args[0]))
            hooks.enter_context(hook)
        yield statistics


def check_statistics(name: str, layer: NMLinear, statistics: InputStatistics) -> None:
    """Raise a ValueError if a layer's closed-form data cannot be computed from its weight and these statistics."""
    matrices = layer.weight, statistics.covariance, statistics.lost
    if not all(matrix is None or matrix.isfinite().all() for matrix in matrices):
        raise ValueError(
            f"expected a finite weight and finite inputs of {name}, got infinities or NaN; check the checkpoint, or "
            "use float32"
        )
    rank = mitigations.rank_of(layer.spec.mitigation)
    if statistics.lost is not None and statistics.tokens < rank:
        raise ValueError(
            f"expected at least {rank} tokens of calibration text to fit a pair of rank {rank} in {name}, got "
            f"{statistics.tokens}; give more --windows or a smaller rank"
        )


def initial_data(layer: NMLinear, statistics: InputStatistics) -> dict[str, torch.Tensor]:
    """All calibrated data of a layer before training: static ones in closed form, learned ones at their start."""
    spec, mean = layer.spec, statistics.mean
    data: dict[str, torch.Tensor] = {}
    for method in sorted(spec.methods, key=lambda each: each.slot != "basis"):  # a shift is one in that basis
        taken: dict[str, Any] = {  # each there if a mitigation names it
            "covariance": statistics.centred_covariance,
            "lost": statistics.lost,
            "input_order": layer.data().get("input_order"),  # folded into the weights already
        }
        seen = mitigations.Observed(
            weight=layer.weight.detach(),
            mean=mean @ data["rotation"] if "rotation" in data else mean,
            largest=statistics.largest,
            rank=mitigations.rank_of(spec.mitigation),
            **taken,
        )
        data.update(zip(method.data, method.start(seen), strict=True))
    if "input_norm" in spec.scoring.data:
        data["input_norm"] = statistics.norm
    return data
