"""The tensors that the forward of a vLLM layer reads, and how its weight is stored; nothing here needs vLLM."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from .. import parallel
from ..layers.linear import NMLinear
from ..layers.work import LinearWork, compiled_operator, work_of
from ..methods import mitigations
from ..ops.e4m3 import E4M3Weight, check_layout
from ..ops.prepack import why_not_prepacked
from ..optimize.eligible import unfit_for_fp8
from ..patterns import NMPattern
from ..recipe import LinearSpec
from .vllm_packed import PackedCall, PackedPart, Prepacked
from .vllm_plan import STORAGE_KEYS, Segment


@dataclass
class Storage:
    """The storage that ``quantization_config`` asks for, and what was stored so."""

    prepack: bool = False  # keep a second copy of the weights in oneDNN's layout, on CPUs
    fp8: str | None = None  # keep the weights in e4m3, in a layout of :func:`nm_act.optimize`
    prepacked_bytes: int = 0  # of the second copies on this rank
    e4m3: int = 0  # layers with e4m3 weights
    # Sparse layers that are stored as if ``prepack`` or ``fp8`` had not been given, with the reason.
    kept: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Storage":
        """From an entry in config.json; ValueError if it asks for an unknown storage."""
        known = ("quant_method", "recipe", *STORAGE_KEYS)
        other = next((key for key in config if key not in known), None)
        if other is not None and "recipe" in config:  # without that key they are the recipe's own
            raise ValueError(
                f"expected the keys of quantization_config among {', '.join(known)}, got {other!r}; remove it, or "
                "upgrade nm_act if a newer one wrote it"
            )
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

        ``sizes`` are the output features of each projection on this rank, ``weight [out, in]`` is this rank's part, and
        ``split`` says whether the inputs are split over ranks.
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
            self.kept.append((name, why))
        else:
            self.e4m3 += 1
        return not why

    def takes_copies(
        self, name: str, specs: Sequence[LinearSpec | None], sizes: Sequence[int], weight: torch.Tensor, split: bool
    ) -> bool:
        """Whether a layer's weights are kept in oneDNN's layout, with the parameters of :meth:`takes_e4m3`; counts it.

        For projections whose inputs are pruned, this is a second copy; others are stored in that layout alone.
        """
        if not self.prepack:
            return False
        why = "its inputs are split over ranks" if split else why_not_prepacked(weight)
        if why:
            self.kept.append((name, why))
        else:
            rows = sum(size for spec, size in zip(specs, sizes, strict=True) if _prunes_inputs(spec))
            self.prepacked_bytes += rows * weight.shape[1] * weight.itemsize
        return not why

    def check_some_e4m3(self) -> None:
        """Raise a ValueError if ``fp8`` was asked for and no layer can have it."""
        if self.fp8 is not None and not self.e4m3 and self.kept:
            name, why = self.kept[0]
            raise ValueError(
                f'expected layers whose weights can be e4m3 for fp8="{self.fp8}", got none ({name}: {why}); leave fp8 '
                "out or choose another recipe"
            )

    def sentence(self) -> str:
        """What the log message after loading says about the storage."""
        text, kept = "", "have none"
        if self.prepack:
            text = f"; the second copies of prepack take {self.prepacked_bytes / 2**20:.1f} MiB a rank"
        if self.e4m3:
            text, kept = f'; {self.e4m3} of the layers have e4m3 weights (fp8="{self.fp8}")', "stay in 16 bits"
        if text and self.kept:
            name, why = self.kept[0]
            text += f", {len(self.kept)} {kept} ({name}: {why})"
        return text


def _prunes_inputs(spec: LinearSpec | None) -> bool:
    """Whether a projection's product is sparse; it is dense without a spec, or if the weight is pruned."""
    return spec is not None and not spec.scoring.prunes_weight


def _not_e4m3(spec: LinearSpec, size: int, weight: torch.Tensor, layout: str, split: bool) -> str:
    """Why a projection cannot have e4m3 weights; empty if it can."""
    if split and (spec.token_shift != "none" or spec.variance_correction):
        return f"{spec} needs statistics of the whole token, and its inputs are split over ranks"
    halves = (torch.bfloat16, torch.float16) if str(spec.pattern) == "2:4" else (torch.bfloat16,)
    if layout != "decode" and weight.dtype not in halves:
        return f"{spec.pattern} in {str(weight.dtype).removeprefix('torch.')}"
    meta = NMLinear(weight.shape[1], size, False, spec=spec, device="meta", dtype=weight.dtype)
    return unfit_for_fp8(meta, layout)


@dataclass(frozen=True, eq=False)
class Product:
    """One segment's product, with everything that does not depend on its input, so that calls need not recompute it."""

    work: Callable[..., torch.Tensor]  # ``(x, weight, bias) -> y``
    weight: torch.Tensor | None  # in place of the layer's
    added_bias: torch.Tensor | None
    start: int  # of the output features
    stop: int

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [tokens, in] -> [tokens, stop - start]``, given the layer's weight and the segment's bias."""
        weight = weight if self.weight is None else self.weight
        if self.added_bias is not None:
            added = self.added_bias.to(x.dtype)
            bias = added if bias is None else bias + added
        return self.work(x, weight, bias)


@dataclass(frozen=True)
class Operands:
    """The tensors that the forward of a layer reads; a reload fills the same ones."""

    parameter: torch.nn.Parameter  # the layer's weight, to tell it from that of a reload
    segments: list[Segment]
    weights: list[torch.Tensor | None]  # of each segment, [in, out]; None: the parameter, or a copy is in its place
    shift_outs: list[torch.Tensor | None]  # images of the shifts
    copies: list[Any]  # Prepacked, E4M3Weight or None: of each segment's weight, beside it or in its place
    products: list[Product]  # of the above
    calls: list[PackedCall]  # those that the products make: one of all segments where their work allows it

    @classmethod
    def of(
        cls,
        parameter: torch.nn.Parameter,
        segments: list[Segment],
        shard: parallel.Shard | None,
        *,
        fp8: str | None = None,
        prepack: Callable[[torch.Tensor], Prepacked] | None = None,
    ) -> "Operands":
        """From a layer whose ``parameter [out, in]`` is loaded; `prepack` makes a copy, which a shard must not have."""
        operator: Callable[..., torch.Tensor] = compiled_operator
        if shard is not None:
            operator = functools.partial(parallel.row_sparse_linear, shard)
        held = cls(parameter, segments, [], [], [], [], [])
        for each in segments:
            part = parameter.data[each.start : each.stop]
            spec, read = each.spec, part
            copy: Prepacked | E4M3Weight | None = prepack(part) if prepack else None
            weight = None
            if fp8 and spec is not None:
                copy = e4m3 = E4M3Weight.quantised(part, fp8)
                if mitigations.has_shift(spec):
                    read = e4m3.dequantised(torch.float32)
            elif copy is None or _prunes_inputs(spec):
                weight = read = parallel.stored_in_out(part)
            shift_out = None if spec is None else mitigations.shift_image(spec, read, each.data)
            held.weights.append(weight)
            held.shift_outs.append(shift_out)
            held.copies.append(copy)
            # One segment's weight becomes the parameter.
            own = weight if len(segments) > 1 else None
            if isinstance(copy, Prepacked):
                work, call = _packed_work(each, shift_out, copy, weight, part.new_empty((0, part.shape[1])))
                held.calls.append(call)
            else:
                work = _work(each, shift_out, operator if copy is None else copy.linear)
            held.products.append(Product(work, own, each.data.get("added_bias"), each.start, each.stop))
        if held.products and all(isinstance(each.work, PackedCall) for each in held.products):
            held._join()
        if len(segments) == 1 and held.weights[0] is not None:
            parameter.data, held.weights[0] = held.weights[0], None  # which vLLM copies in a reload
        else:
            parameter.data = parameter.new_empty(0)
        return held

    def _join(self) -> None:
        """One call for all segments, instead of one for each."""
        biases = [product.added_bias for product in self.products]
        self.calls[:] = [self.calls[0].joined(self.calls[1:], biases)]
        self.products[:] = [Product(self.calls[0], None, None, 0, self.products[-1].stop)]

    def run(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [tokens, in] -> [tokens, out]``, given the layer's own parameters."""
        if len(self.products) == 1:
            return self.products[0](x, weight, bias)
        biases = [None if bias is None else bias[each.start : each.stop] for each in self.products]
        return torch.cat([each(x, weight, own) for each, own in zip(self.products, biases, strict=True)], dim=-1)

    def copy_(self, other: "Operands") -> None:
        """Copy the values of another layer with the same segments to the addresses of this one."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(new)
        for copy, later in zip(self.copies, other.copies, strict=True):
            if isinstance(copy, Prepacked):
                copy.take(later)
        for call in self.calls:
            call.renew()

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that stay at their addresses, except the parameter."""
        held = [
            value for each in self.segments for value in (each.channel_scale, *map(each.data.get, sorted(each.data)))
        ]
        stored = [tensor for each in self.copies if isinstance(each, E4M3Weight) for tensor in each.tensors()]
        return [tensor for tensor in (*held, *self.weights, *self.shift_outs, *stored) if tensor is not None]


def _work(
    segment: Segment, shift_out: torch.Tensor | None, operator: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """The product of a segment, given the layer's weight and bias or replacements for them."""
    if not _prunes_inputs(segment.spec):
        return functional.linear
    assert segment.spec is not None
    derived = {"channel_scale": segment.channel_scale, "shift_out": shift_out}
    return work_of(segment.spec, segment.data, operator, derived)


def _packed_work(
    segment: Segment, shift_out: torch.Tensor | None, copy: Prepacked, weight: torch.Tensor | None, like: torch.Tensor
) -> tuple[Callable[..., torch.Tensor], PackedCall]:
    """The same over a copy, and the call that it makes: itself, unless the input or the output needs more."""
    outputs = segment.stop - segment.start
    if weight is None:
        call = PackedCall([PackedPart(copy, outputs)], like)
        return call, call
    work = _work(segment, shift_out, compiled_operator)
    assert isinstance(work, LinearWork)
    assert isinstance(work.pattern, NMPattern)
    call = PackedCall([PackedPart(copy, outputs, weight, None, work.pattern, work.options)], like)
    if work.rotation is None and work.low_rank is None:
        return call, call
    return replace(work, operator=call.operator), call
