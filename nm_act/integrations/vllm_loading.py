"""The state of a vLLM layer while its weights are read, and what is derived from them; nothing here needs vLLM."""

from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..layers.linear import FOLLOW_WEIGHT
from ..methods import mitigations
from ..ops.e4m3 import E4M3Weight
from ..recipe import LinearSpec


class Loading:
    """The projections of one layer while they arrive, in any order and each with its calibrated data.

    ``names`` and ``specs`` are those of the projections; a spec of None is dense. ``rows [out]``, int64, has the output
    features of each projection that this rank has: an index vector that vLLM's loader slices like the weight, and no
    parameter of the layer, because no checkpoint contains it. ``fp8`` is the layout of e4m3 weights.
    """

    def __init__(
        self, prefix: str, names: list[str], specs: list[LinearSpec | None], rows: torch.nn.Parameter, fp8: str | None
    ):
        self.prefix, self.names, self.specs, self.rows, self.fp8 = prefix, names, specs, rows, fp8
        self.arrived: set[int] = set()
        self.waiting: list[tuple[Any, ...]] = []  # weights that arrived before their data
        self._scales: list[Tensor | None] = [None] * len(specs)  # over the whole inputs
        self._data: list[dict[str, Tensor]] = [{} for _ in specs]  # of the whole projections

    def set_data(self, index: int, name: str, value: Tensor, weight: Tensor) -> None:
        """Keep a projection's whole calibrated data, on the device of the weight."""
        dtype = weight.dtype if name in FOLLOW_WEIGHT else torch.float32
        self._data[index][name] = value.to(weight.device, dtype, copy=True)

    def missing(self, index: int) -> str:
        """Name of a calibrated tensor that a projection still lacks."""
        spec, data = self.specs[index], self._data[index]
        return "" if spec is None else next((name for name in mitigations.data_of(spec) if name not in data), "")

    def derive(self, index: int, part: Tensor, like: Tensor) -> Tensor:
        """Set a projection's channel scale; return its operand weight (``part`` itself if no method replaces it)."""
        spec, data = self.specs[index], self._data[index]
        if spec is None:
            return part
        for name, value in data.items():
            shape = mitigations.shape_of(name, part.shape[1], part.shape[0], mitigations.rank_of(spec.mitigation))
            if value.shape != shape or value.isnan().any():
                got = "no values" if value.shape == shape else list(value.shape)
                raise ValueError(
                    f"expected calibrated data for {self.names[index]} in {self.prefix}, {name} {list(shape)}, got "
                    f"{got}; calibrate with nm-act calibrate and save the model again"
                )
        operand = read = part
        if mitigations.reads_weight(spec):
            operand = read = part.to(like.device, like.dtype)
            if self.fp8 is not None:  # the scale is that of the weight as stored, which no method replaces here
                operand = read = E4M3Weight.quantised(read, self.fp8).dequantised(torch.float32)
            else:
                operand = mitigations.operand_weight(spec, read, data)
        self._scales[index] = mitigations.selection_scale(spec, read, operand, data)
        return part if operand is read else operand

    def check(self) -> None:
        """Raise a RuntimeError if something is missing that :meth:`scales` or :meth:`data` needs."""
        absent = [name for index, name in enumerate(self.names) if index not in self.arrived]
        if absent and self.arrived:
            raise RuntimeError(
                f"expected the weights of {', '.join(self.names)} in {self.prefix}, got none of {', '.join(absent)}; "
                "load them together"
            )
        for index, (name, spec, scale) in enumerate(zip(self.names, self.specs, self._scales, strict=True)):
            missing = self.missing(index)
            if missing:
                raise RuntimeError(
                    f"expected calibrated data for {name} in {self.prefix}, got no {missing}; load a checkpoint that "
                    "nm-act calibrate wrote"
                )
            if spec is not None and scale is None and spec.scoring.formula is not None:
                raise RuntimeError(
                    f"expected the weight of {name} in {self.prefix} from a checkpoint, from which the criterion "
                    f"{spec.criterion!r} computes its channel scale, got none; load the checkpoint itself"
                )

    def scales(self, shard: parallel.Shard | None) -> list[Tensor | None]:
        """The part of each projection's channel scale that the forward on this rank reads."""
        return [scale if shard is None or scale is None else shard.part(scale, ("in",)) for scale in self._scales]

    def data(self, sizes: list[int], shard: parallel.Shard | None) -> list[dict[str, Tensor]]:
        """The part of each projection's calibrated data that the forward on this rank reads."""
        local, rows = [], self.rows.data.split(sizes)
        for data, mine in zip(self._data, rows, strict=True):
            part = {}
            for name, value in data.items():
                if mitigations.DATA[name][0] == "out":
                    part[name] = value[mine.to(value.device)]
                elif name not in ("smoothing", "input_norm", "input_order"):  # these were applied while loading
                    part[name] = value if shard is None else shard.part(value, mitigations.DATA[name])
            if shard is not None and shard.rank > 0:
                part.pop("added_bias", None)  # the outputs of the ranks are summed
            local.append(part)
        return local
