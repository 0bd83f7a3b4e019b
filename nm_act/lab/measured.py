"""Times of a decoder's products on a measured device, by the shapes of a model.

A layer that shares its input with others (q/k/v, gate/up) costs its share of the merged product that
:func:`nm_act.optimize` makes, if the layers have one spec without scores or data of their own; otherwise it costs a
product of its own. If the norm or the activation in front writes the operand of a product, the time is that of the
sparse GEMM for a packed 2:4 operand, and that of the dense product for a pruned one. Otherwise, and for ``o_proj``, it
is that of the whole operator.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ..patterns import NMPattern
from ..recipe import DEFAULT_PROJECTIONS, ROLES, LinearSpec
from .shapes import SHAPES
from .tables import Tables, load_tables

MERGED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections of one product of an optimized decoder block."""

REFERENCE_PROMPT = 512
_WHOLE = {
    "prefill": (("nm-2:4", "2:4", "bf16"), ("nm-2:4/8:16-fp8", "2:4", "e4m3")),
    "decode": (("nm-2:4", "2:4", "bf16"), ("nm-8:16", "8:16", "bf16"), ("nm-2:4/8:16-fp8", "8:16", "e4m3")),
}
"""Phase -> the modes of measured whole models that :class:`InModel` is fitted to, with their pattern and dtype."""


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """Projection -> (in_features, out_features) of a model in `SHAPES`; ValueError for any other model.

    Examples
    --------
    >>> shapes_of("llama-3-8b")["k_proj"]
    (4096, 1024)
    """
    if name not in SHAPES:
        raise ValueError(f"expected shapes among {', '.join(SHAPES)}, got {name!r}; or leave --shapes out")
    _, hidden, inner, queries, keys = SHAPES[name]
    sizes = (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, inner), (hidden, inner)
    return dict(zip(DEFAULT_PROJECTIONS, (*sizes, (inner, hidden)), strict=True))


def merged_with(projection: str) -> tuple[str, ...]:
    """The projections that share a product with a projection, including itself.

    Examples
    --------
    >>> merged_with("up_proj"), merged_with("fc2")
    (('gate_proj', 'up_proj'), ('fc2',))
    """
    return next((names for names in MERGED if projection in names), (projection,))


@dataclass(frozen=True)
class Place:
    """A linear layer of a decoder."""

    layer: int
    projection: str
    in_features: int
    out_features: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per token."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class InModel:
    """What a phase of a whole sparse model takes, as shares of what was measured apart.

    `products` is of the sparse products alone: inside a model, prefills run at the clock that their power leaves, and
    the launches of a decode step overlap. `rest` is of `Measured._around`, part of which sparse products compute too
    (norms, activations, residuals).
    """

    products: float = 1.0
    rest: float = 1.0


ALONE = dict.fromkeys(_WHOLE, InModel())
"""By phase, for a :class:`Measured` whose parts take as long in a model as alone; the fit is made against that."""


@dataclass
class Measured:
    """Times on one device in microseconds, for the shapes of one model; ValueError if the device was not measured."""

    device: str  # a folder of the measured tables, e.g. "h100"
    shapes: dict[str, tuple[int, int]]  # projection -> in_features, out_features
    model: str = ""  # name of the shapes, for what a whole model spends outside its products
    dtype: str = "bf16"  # or "e4m3": of the sparse layers; dense ones are in bfloat16
    phases: tuple[str, ...] = ("prefill",)  # or "decode"
    tokens: int = 4096  # of the prompt whose prefill is predicted
    # Prompt of the whole model whose decode step is predicted: the shortest measured, where attention takes least.
    decode_prompt: int = REFERENCE_PROMPT
    in_model: dict[str, InModel] | None = None  # by phase; by default, fitted to the whole models of the device
    notes: dict[str, None] = field(default_factory=dict)  # sentences on what was not measured as asked, each once

    def __post_init__(self) -> None:
        self.tables: Tables = load_tables(self.device)

    def time(
        self, phase: str, place: Place, spec: LinearSpec | None, *, fused: bool = False, merged: bool = True
    ) -> float:
        """Microseconds of a projection's share of its product, by the name of its `place`; a spec of None is dense.

        `merged` says that the sparse layer shares one product with the layers that read its input, and `fused` that the
        operand of that product comes packed, or pruned without a shift or `var`.
        """
        projection = place.projection
        names = (projection,) if projection in self.shapes else ROLES.get(projection, (projection,))
        missing = next((name for name in names if name not in self.shapes), None)
        if missing is not None:
            raise ValueError(
                f"expected projections among {', '.join(self.shapes)}, got {missing!r}; search with --rates FILE"
            )
        return sum(self._time(phase, name, spec, fused, merged or len(names) > 1) for name in names)

    def _time(self, phase: str, name: str, spec: LinearSpec | None, fused: bool, merged: bool = True) -> float:
        together = [other for other in merged_with(name) if other in self.shapes]
        in_features, out_features = self.shapes[name]
        together = together if merged or spec is None else [name]
        width = sum(self.shapes[other][1] for other in together)
        tokens = self.tokens if phase == "prefill" else 1
        sizes = width, in_features, tokens
        found = dense = self.tables.dense(phase, sizes)
        time = dense.us
        if spec is not None:
            dtype = self.dtype if phase == "decode" or str(spec.pattern) == "2:4" else "bf16"
            plain = not spec.variance_correction and spec.token_shift == "none"
            fused = fused and (plain or (phase == "prefill" and str(spec.pattern) == "2:4"))
            found = self.tables.product(phase, str(spec.pattern), sizes, dtype, fused=fused and name != "o_proj")
            time *= found.us / found.dense_us  # tables were measured at different clocks
            if phase == "decode" or self.tables.has_sparse_gemm(str(spec.pattern), dtype):  # else the dense product
                inside = self.shares(phase)
                saved = fused * (1 - inside.rest) * self._around[phase]
                time = max(time * inside.products - saved, time / 2)
        if found.note:
            self.notes[found.note] = None
        return time * out_features / width

    def shares(self, phase: str) -> InModel:
        """What a whole model takes of the times that were measured apart."""
        return (_fitted(self.device) if self.in_model is None else self.in_model)[phase]

    @cached_property
    def _around(self) -> dict[str, float]:
        """What a dense model spends around each product, without the attention that grows with the prompt, by phase.

        That is what it spends outside its products at the shortest prompt that was measured, in prefill for each token.
        """
        prompts = self._prompts()
        return {phase: self._rest_at(min(prompts), phase, 1) / len(MERGED) if prompts else 0.0 for phase in self.phases}

    def block(self, phase: str, spec: LinearSpec | None) -> float:
        """Microseconds of all products of one decoder block with one spec."""
        return math.fsum(self._time(phase, name, spec, True) for name in self.shapes)

    def rest(self, phase: str, layers: int) -> float:
        """Microseconds that a model of so many of these blocks spends outside the products; 0 if not measured.

        A prompt that was not measured takes the nearest one's, in prefill for each token.
        """
        prompts = self._prompts()
        if not prompts:
            return 0.0
        prompt = self.tokens if phase == "prefill" else self.decode_prompt
        nearest = min(prompts, key=lambda other: abs(math.log(other / prompt)))
        if nearest != prompt:
            self.notes[f"{self.model} was not measured whole with {prompt} tokens: {nearest} stand for it"] = None
        return self._rest_at(nearest, phase, layers)

    def _prompts(self) -> list[int]:
        """Prompts at which the whole dense model was measured."""
        prompts = self.tables.prompts(self.model, "dense_bf16") if self.model in SHAPES else []
        if not prompts:
            self.notes["no whole model of these shapes was measured: the speed-up is that of the linear layers"] = None
        return prompts

    def _rest_at(self, prompt: int, phase: str, layers: int) -> float:
        """`rest` as it was measured at a prompt, in prefill for each token."""
        there = replace(self, tokens=prompt, decode_prompt=prompt)
        whole = self.tables.whole(self.model, "dense_bf16", phase, prompt)
        measured = SHAPES[self.model][0]
        rest = 0.0 if whole is None else max(0.0, whole - measured * there.block(phase, None)) * layers / measured
        return rest * (self.tokens / prompt if phase == "prefill" else 1.0)


@functools.cache
def _fitted(device: str) -> dict[str, InModel]:
    """By phase, the least squares of the relative errors over all whole models that were measured."""
    return {phase: _fit(_whole_models(device, phase)) for phase in _WHOLE}


def _whole_models(
    device: str, phase: str, models: Iterable[str] = SHAPES
) -> Iterator[tuple[float, float, float, float]]:
    """Times of measured sparse models: of products alone, around dense products, of these two, of the whole."""
    for model, (mode, pattern, dtype) in itertools.product(models, _WHOLE[phase]):
        for prompt in load_tables(device).prompts(model, mode):
            alone = Measured(device, shapes_of(model), model, dtype, (phase,), prompt, prompt, ALONE)
            whole = alone.tables.whole(model, mode, phase, prompt)
            layers = SHAPES[model][0]
            rest = alone.rest(phase, layers)
            if whole is not None and rest:
                around = layers * len(MERGED) * alone._around[phase]
                products = layers * alone.block(phase, LinearSpec(NMPattern(pattern)))
                yield products, around, whole - rest + around, whole


def _fit(models: Iterable[tuple[float, float, float, float]]) -> InModel:
    """Nothing is assumed to change if fewer than two models were measured."""
    rows = torch.tensor([*models], dtype=torch.float64)
    if len(rows) < 2:
        return InModel()
    relative = rows[:, :3] / rows[:, 3:]
    products, rest = torch.linalg.lstsq(relative[:, :2], relative[:, 2:]).solution.flatten().tolist()
    return InModel(products, rest)
