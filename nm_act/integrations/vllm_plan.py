"""Decides which layers of a vLLM model become sparse, and how a merged layer is computed; nothing here needs vLLM.

vLLM merges linear layers (q, k and v; gate and up). Neighbours in a merged layer that have the same selection are one
product, whose input is selected and compressed once. If the criterion reads the weight, or a projection has its own
data, each projection makes its own selection, as in Transformers.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..conversion.sparsify import check_names
from ..methods import mitigations
from ..methods.criteria import CRITERIA
from ..recipe import DEFAULT_PROJECTIONS, LinearSpec, Recipe, Rule, in_state_space

_TEXT_STACKS = (
    *("model", "language_model", "llm", "lm", "language", "text", "text_model", "thinker", "backbone"),
    *("transformer", r"transformer\.encoder", "gpt_neox", "decoder", "layers", "layer", "blocks", "h"),
)
"""Name components before a text decoder's layers in vLLM; others may belong to a tower, projector or draft head."""

_DECODER = re.compile(rf"(?:(?:{'|'.join(_TEXT_STACKS)})\.)+(\d+)\.(?:[a-zA-Z_]\w*\.)*([a-zA-Z_]\w*)")

_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Projections that the experts in a checkpoint may have; vLLM fuses them, and they stay dense."""

STORAGE_KEYS = ("prepack", "fp8")
"""Keys of ``quantization_config`` for vLLM besides the recipe; Transformers ignores them."""

NO_RECIPE = (
    "expected a recipe for the quantization nm_act, got a checkpoint without one; serve it without "
    "--quantization and with "
    """--hf-overrides '{"quantization_config": {"quant_method": "nm_act", """
    """"recipe": {"version": 1, "pattern": "8:16"}}}'"""
)
"""What ``--quantization nm_act`` alone says."""


def check_servable(recipe: Recipe) -> None:
    """Raise a ValueError for methods that fail in a server, where one call mixes the tokens of many sequences."""
    phases = {recipe.phase, *(rule.phase or "both" for rule in recipe.rules)} - {"both"}
    if phases:
        raise ValueError(
            f"expected a recipe with phase both for vLLM, which computes prefill and decode tokens in one call, got "
            f"phase {sorted(phases)[0]}; save the model with phase both"
        )
    parts: tuple[Recipe | Rule, ...] = (recipe, *recipe.rules)
    if any(each.decode_pattern for each in parts):
        raise ValueError(
            "expected a recipe with one pattern for vLLM, which computes prefill and decode tokens in one call, got a "
            "decode_pattern; save the model without it"
        )
    if recipe.dense_first_tokens:
        raise ValueError(
            f"expected a recipe with dense_first_tokens 0 for vLLM, whose layers do not know a token's position, got "
            f"{recipe.dense_first_tokens}; save the model without it"
        )
    patterns = {each.pattern for each in parts if each.pattern and each.pattern.endswith("%")}
    refused = sorted({name for each in parts if (name := each.criterion) and CRITERIA[name].by_sequence} | patterns)
    if refused:
        raise ValueError(
            f"expected a recipe without clact and top-k for vLLM, got {refused[0]}; save the model without it"
        )


def check_dense(model: str, revision: str | None = None) -> None:
    """Raise a ValueError if the files of a folder or hub name say that its weights are quantised."""
    from transformers import PretrainedConfig

    def stored(name: str) -> dict[str, Any]:
        try:
            return PretrainedConfig.get_config_dict(model, revision=revision, _configuration_file=name)[0]
        except OSError:  # there is no such file, or vLLM found its configuration elsewhere
            return {}

    config = stored("config.json")
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    entries = [part.get(key) for key in ("quantization_config", "compression_config") for part in parts]
    entries.append(stored("hf_quant_config.json"))  # of ModelOpt
    found = [entry for entry in entries if isinstance(entry, dict) and entry]
    methods = [each.get("quant_method") or each.get("quant_algo") or "an unnamed method" for each in found]
    other = next((method for method in methods if method != "nm_act"), None)
    if other is not None:
        raise ValueError(
            f"expected a dense checkpoint for the quantization nm_act, got one that is quantised as {other!r}; serve "
            "the model that it was made from"
        )


def place(prefix: str) -> tuple[int, str] | None:
    """Decoder layer and projection of a vLLM layer's name; None outside the text decoder.

    Examples
    --------
    >>> place("model.layers.3.self_attn.qkv_proj"), place("visual.blocks.3.attn.qkv"), place("lm_head")
    ((3, 'qkv_proj'), None, None)
    """
    match = _DECODER.fullmatch(prefix)
    return None if match is None else (int(match[1]), match[2])


def specs_of(
    recipe: Recipe, prefix: str, packed: dict[str, list[str]], in_features: int
) -> list[tuple[str, LinearSpec | None]]:
    """Names and specs of the projections in one vLLM layer, in its order; [] if none is sparse.

    ``packed`` is vLLM's mapping of merged layers to the projections of the checkpoint; ``in_features`` is that of the
    whole layer. As in :func:`nm_act.sparsify`, a layer whose in_features the group does not divide stays dense.
    """
    where = place(prefix)
    if where is None or (recipe.projections == DEFAULT_PROJECTIONS and in_state_space(prefix)):
        return []
    layer, merged = where
    specs = [(name, recipe.resolve(layer, name)) for name in packed.get(merged, [merged])]
    specs = [(name, None if spec and in_features % spec.span else spec) for name, spec in specs]
    return specs if any(spec for _, spec in specs) else []


@dataclass
class Census:
    """The layers of a model, as vLLM creates them."""

    layers: int = 0  # linear ones, merged ones counted once
    sparse: int = 0  # their projections of each kind
    dense: int = 0
    example: str = ""  # name of a dense layer
    # Decoder layer and name of every projection, those in fused experts included.
    places: set[tuple[int, str]] = field(default_factory=set)

    def add(self, prefix: str, packed: dict[str, list[str]], specs: Sequence[tuple[str, LinearSpec | None]]) -> None:
        """Count a linear layer, with its names and specs from :func:`specs_of`."""
        last = prefix.rpartition(".")[2]
        parts = packed.get(last, [last])
        sparse = sum(spec is not None for _, spec in specs)
        self.layers += 1
        self.sparse += sparse
        self.dense += len(parts) - sparse
        self.example = self.example or ("" if specs else prefix)
        where = place(prefix)
        if where is not None:
            self.places.update((where[0], part) for part in parts)

    def add_other(self, prefix: str) -> None:
        """Add the names of projections inside a layer of another class, such as a mixture's experts."""
        where = place(prefix)
        if where is not None and where[1] == "experts":
            self.places.update((where[0], name) for name in ("experts", *_EXPERTS))

    def check(self, recipe: Recipe) -> None:
        """Raise the ValueError of :func:`nm_act.sparsify` for a projection or layer that the model does not have."""
        if self.places:
            check_names(recipe, self.places)

    def sentence(self) -> tuple[int, str]:
        """Level and text of the message after loading."""
        if self.sparse:
            return logging.INFO, (
                f"nm_act: {self.sparse} projections are sparse, {self.dense} are dense, in {self.layers} linear layers"
            )
        return logging.WARNING, (
            f"nm_act expected linear layers that the checkpoint's recipe names, got {self.layers} others (such as "
            f"{self.example}), so the model is served dense; serve it with Transformers, or report its architecture"
        )


@dataclass(frozen=True)
class Segment:
    """Output features ``start`` to ``stop`` of a merged layer, which read the same (pruned) input.

    ``data`` is the calibrated data, by name, of these output features and of the inputs on this rank.
    """

    start: int
    stop: int
    spec: LinearSpec | None
    channel_scale: Tensor | None = None
    data: dict[str, Tensor] = field(default_factory=dict)

    def reads_as(self, other: "Segment") -> bool:
        """Whether both have the same operand: the same selection of the same inputs."""
        if self.spec != other.spec or not _same(self.channel_scale, other.channel_scale):
            return False
        shared = [name for name in self.data if mitigations.DATA[name][0] != "out"]
        return all(_same(self.data[name], other.data[name]) for name in shared)

    def joined(self, other: "Segment") -> "Segment":
        """This segment and its neighbour, joined."""
        data = {
            name: torch.cat([value, other.data[name]]) if mitigations.DATA[name][0] == "out" else value
            for name, value in self.data.items()
        }
        return Segment(self.start, other.stop, self.spec, self.channel_scale, data)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def segments(
    specs: Sequence[LinearSpec | None],
    sizes: Sequence[int],
    scales: Sequence[Tensor | None],
    data: Sequence[dict[str, Tensor]],
    before: Sequence[int] | None = None,
) -> list[Segment]:
    """Join neighbours of a merged layer that have the same selection.

    ``specs``, ``sizes`` (output features on this rank), ``scales [in]`` and calibrated ``data`` are those of each
    projection. ``before`` has the ends of the segments before a reload, which do not change, because compiled code
    relies on them. Raises ValueError if the projections of such a segment no longer make the same selection.
    """
    joined: list[Segment] = []
    start = 0
    for spec, size, scale, own in zip(specs, sizes, scales, data, strict=True):
        segment = Segment(start, start + size, spec, scale, own)
        if joined and start not in (before or ()) and joined[-1].reads_as(segment):
            segment = joined.pop().joined(segment)
        joined.append(segment)
        start += size
    ends = [each.stop for each in joined]
    if before is not None and ends != before:
        raise ValueError(
            f"expected projections that select alike, as before the reload ({len(before)} products), got different "
            f"calibrated data ({len(ends)}); start a new engine"
        )
    return joined
