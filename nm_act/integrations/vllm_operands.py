"""What the forward of a vLLM layer reads, and how its weight is stored; nothing here needs vLLM."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops, parallel
from ..layers.linear import NMLinear
from ..layers.work import compiled_operator
from ..methods import mitigations
from ..ops.e4m3 import E4M3Weight, check_layout
from ..ops.prepack import prepack_weight, why_not_prepacked
from ..optimize.eligible import unfit_for_fp8
from ..recipe import LinearSpec
from .vllm_plan import Segment


@dataclass
class Storage:
    """The storage that ``quantization_config`` asks for, and what came of it.

    Attributes
    ----------
    prepack : bool
        Keep a second copy of the weights in oneDNN's layout, on CPUs.
    fp8 : {"prefill", "decode", "both"}, optional
        Keep the weights in e4m3, as :func:`nm_act.optimize` names the copies.
    prepacked_bytes : int
    e4m3 : int
        Layers with e4m3 weights.
    in_16_bits : list of (str, str)
        Sparse layers that stay in 16 bits despite ``fp8``, and why.
    """

    prepack: bool = False
    fp8: str | None = None
    prepacked_bytes: int = 0
    e4m3: int = 0
    in_16_bits: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Storage":
        """Of an entry in config.json; ValueError if it asks for what there is not."""
        prepack, fp8 = config.get("prepack", False), config.get("fp8")
        if not isinstance(prepack, bool):
            raise ValueError(f"expected prepack as true or false in quantization_config, got {prepack!r}; write one")
        if fp8 is not None:
            check_layout(fp8)
            if prepack:
                raise ValueError(
                    "expected prepack or fp8 in quantization_config, got both; prepack is for CPUs, fp8 for GPUs"
                )
        return cls(prepack, fp8)

    def check_device(self, device: str, capability: tuple[int, int] | None) -> None:
        """Raise a ValueError if the device has no e4m3 products; "decode" dequantises where it has none."""
        if self.fp8 not in (None, "decode") and (device != "cuda" or capability is None or capability[0] != 9):
            got = device if capability is None else f"{device} with {capability[0]}.{capability[1]}"
            raise ValueError(
                f'expected a GPU of compute capability 9.0 (H100, H200) for fp8="{self.fp8}", got {got}; choose '
                'fp8="decode" or leave fp8 out'
            )

    def takes_e4m3(
        self, name: str, specs: Sequence[LinearSpec | None], sizes: Sequence[int], weight: torch.Tensor, split: bool
    ) -> bool:
        """Whether a layer's sparse projections get e4m3 weights; counts it.

        Parameters
        ----------
        name : str
        specs : sequence of LinearSpec or None
        sizes : sequence of int
            Output features of each projection on this rank.
        weight : Tensor [out, in]
            Of this rank.
        split : bool
            Whether the inputs are split over ranks.
        """
        if self.fp8 is None:
            return False
        whys = (
            _not_e4m3(spec, size, weight, self.fp8, split)
            for spec, size in zip(specs, sizes, strict=True)
            if spec is not None
        )
        why = next(filter(None, whys), "")
        if why:
            self.in_16_bits.append((name, why))
        else:
            self.e4m3 += 1
        return not why

    def check_some_e4m3(self) -> None:
        """Raise a ValueError if ``fp8`` was asked for and no layer can have it."""
        if self.fp8 is not None and not self.e4m3 and self.in_16_bits:
            name, why = self.in_16_bits[0]
            raise ValueError(
                f'expected layers whose weights can be e4m3 for fp8="{self.fp8}", got none ({name}: {why}); leave fp8 '
                "out or choose another recipe"
            )

    def sentence(self) -> str:
        """What the message after loading adds."""
        text = ""
        if self.prepacked_bytes:
            text = f"; prepack keeps a second copy of their weights, {self.prepacked_bytes / 2**20:.0f} MiB a rank"
        if self.e4m3:
            text = f'; {self.e4m3} of them have e4m3 weights (fp8="{self.fp8}")'
            if self.in_16_bits:
                name, why = self.in_16_bits[0]
                text += f", {len(self.in_16_bits)} stay in 16 bits ({name}: {why})"
        return text


def _not_e4m3(spec: LinearSpec, size: int, weight: torch.Tensor, layout: str, split: bool) -> str:
    """Why a projection cannot have e4m3 weights; empty if it can."""
    if split and (spec.token_shift != "none" or spec.variance_correction):
        return f"{spec} needs statistics of the whole token, and its inputs are split over ranks"
    halves = (torch.bfloat16, torch.float16) if str(spec.pattern) == "2:4" else (torch.bfloat16,)
    if layout != "decode" and weight.dtype not in halves:
        return f"{spec.pattern} in {str(weight.dtype).removeprefix('torch.')}"
    meta = NMLinear(weight.shape[1], size, False, spec=spec, device="meta", dtype=weight.dtype)
    return unfit_for_fp8(meta, layout)


@dataclass(frozen=True)
class Operands:
    """What the forward of a layer reads; a reload fills the same tensors.

    Attributes
    ----------
    parameter : Parameter
        The layer's weight, to tell it from that of a reload.
    segments : list of Segment
    weights : list of Tensor or None
        Of each segment, stored [in, out]; None is the parameter, or nothing where there are e4m3 copies.
    shift_outs : list of Tensor or None
        Images of the shifts.
    operator : callable
        With the signature of :func:`nm_act.sparse_linear`; it takes a prepacked weight besides if there are some.
    prepacked : list of Tensor or None
        Of each segment's weight, a copy in oneDNN's layout.
    e4m3 : list of E4M3Weight or None
        Of each segment, in place of its weight.
    """

    parameter: torch.nn.Parameter
    segments: list[Segment]
    weights: list[torch.Tensor | None]
    shift_outs: list[torch.Tensor | None]
    operator: Callable[..., torch.Tensor]
    prepacked: list[torch.Tensor | None]
    e4m3: list[E4M3Weight | None]

    @classmethod
    def of(
        cls,
        parameter: torch.nn.Parameter,
        segments: list[Segment],
        shard: parallel.Shard | None,
        *,
        fp8: str | None = None,
        prepack: bool = False,
    ) -> "Operands":
        """Of a layer whose ``parameter [out, in]`` is loaded."""
        rows = [parameter.data[each.start : each.stop] for each in segments]
        e4m3 = [
            E4M3Weight.quantised(part, fp8) if fp8 and each.spec is not None else None
            for each, part in zip(segments, rows, strict=True)
        ]
        weights = [
            parallel.stored_in_out(part) if stored is None else None for part, stored in zip(rows, e4m3, strict=True)
        ]
        shift_outs = []
        for each, part, stored in zip(segments, rows, e4m3, strict=True):
            shifted = each.spec is not None and mitigations.has_shift(each.spec)
            read = part if stored is None or not shifted else stored.dequantised(torch.float32)
            shift_outs.append(mitigations.shift_image(each.spec, read, each.data) if shifted else None)
        operator: Callable[..., torch.Tensor] = ops.sparse_linear
        prepacked: list[torch.Tensor | None] = [None] * len(segments)
        if shard is not None:
            operator = functools.partial(parallel.row_sparse_linear, shard)
        elif prepack:
            operator = compiled_operator
            prepacked = [
                None if each.spec is None or each.spec.scoring.prunes_weight else prepack_weight(part)
                for each, part in zip(segments, weights, strict=True)
            ]
        return cls(parameter, segments, weights, shift_outs, operator, prepacked, e4m3)

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [tokens, in] -> [tokens, out]``, given the layer's own parameters."""
        outputs = [
            each.run(
                x,
                weight if part is None else part,
                None if bias is None else bias[each.start : each.stop],
                shift_out,
                self.operator if stored is None else stored.linear,
                prepacked,
            )
            for each, part, shift_out, prepacked, stored in zip(
                self.segments, self.weights, self.shift_outs, self.prepacked, self.e4m3, strict=True
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def copy_(self, other: "Operands") -> None:
        """Take the values of another layer of the same segments, at the addresses of this one."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(new)
        self.prepacked[:] = other.prepacked  # opaque tensors of CPUs, which no graph was captured with

    def tensors(self) -> list[torch.Tensor]:
        """All that stays at its address, but the parameter."""
        held = [
            value for each in self.segments for value in (each.channel_scale, *map(each.data.get, sorted(each.data)))
        ]
        stored = [tensor for each in self.e4m3 if each is not None for tensor in each.tensors()]
        return [tensor for tensor in (*held, *self.weights, *self.shift_outs, *stored) if tensor is not None]


def prepacked_size(weight: torch.Tensor) -> int:
    """Bytes of a second copy in oneDNN's layout; 0 where there is none."""
    return 0 if why_not_prepacked(weight) else weight.nbytes
