"""vLLM plug-in: ``vllm serve`` of a saved nm_act checkpoint, nothing to be written by the user.

vLLM loads :func:`register` in each of its processes through the entry point group ``vllm.general_plugins``. What is
here needs no vLLM; the classes that plug into it are in :mod:`nm_act.integrations.vllm_linear`.

vLLM merges linear layers (q, k and v; gate and up). Neighbours in a merged layer that prune alike are one product, for
which the input is selected and compressed once: always so without a criterion that derives from the weight. With one,
each projection has a channel scale of its own and selects by it, as it does in Transformers.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..criteria import WEIGHT_PRUNING
from ..mitigations import mitigation
from ..recipe import LinearSpec, Recipe

TESTED_VLLM = "0.32.0"
"""The version of vLLM that the tests ran with; see the README."""

_DECODER = re.compile(
    r"(?:(?:model|language_model|transformer|decoder|layers|blocks|h)\.)+(\d+)\.(?:[a-zA-Z_]\w*\.)*([a-zA-Z_]\w*)"
)


def register() -> None:
    """Entry point: make vLLM know the quantisation method "nm_act"; warns in one sentence where it cannot.

    It must not raise: vLLM calls it for every model, whether that is sparse or not.
    """
    try:
        from . import vllm_linear  # noqa: F401
    except Exception as error:  # whatever it is: other models must still be served
        logging.getLogger("vllm.nm_act").warning(interface_sentence(error))


def interface_sentence(error: Exception) -> str:
    """What to tell the user of a vLLM whose interface is another."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = "one without version"  # a CPU build goes by another name
    reason = " ".join(str(error).split())
    return (
        f"nm_act expected the interface of vLLM {TESTED_VLLM}, got {found} ({reason}), so sparse checkpoints cannot be "
        f"served; install vllm=={TESTED_VLLM} or another nm_act"
    )


def check_servable(recipe: Recipe) -> None:
    """Raise a ValueError for what a server cannot follow, because it mixes the tokens of many sequences in one call."""
    phases = {recipe.phase, *(rule.phase or "both" for rule in recipe.rules)} - {"both"}
    if phases:
        raise ValueError(
            f"expected a recipe with phase both for vLLM, which computes prefill and decode tokens in one call, got "
            f"phase {sorted(phases)[0]}; save the model with phase both"
        )
    if recipe.dense_first_tokens:
        raise ValueError(
            f"expected a recipe with dense_first_tokens 0 for vLLM, whose layers do not know a token's position, got "
            f"{recipe.dense_first_tokens}; save the model without it"
        )
    criteria = {recipe.criterion, *(rule.criterion for rule in recipe.rules)} & {"clact", *WEIGHT_PRUNING}
    methods = {name for part in (recipe, *recipe.rules) for name in part.mitigation or ()}
    calibrated = {name for name in methods if mitigation(name).data}
    patterns = {each.pattern for each in (recipe, *recipe.rules) if each.pattern and each.pattern.endswith("%")}
    refused = sorted(criteria | calibrated | patterns)
    if refused:
        raise ValueError(
            f"expected a recipe of static criteria, var and dpts for vLLM, got {refused[0]}; save the model without it"
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
    """Names and specs of the projections in one vLLM layer, in its order; [] where nothing is sparse.

    Parameters
    ----------
    recipe : Recipe
    prefix : str
        The layer's name in vLLM.
    packed : dict
        vLLM's mapping of merged layers to the projections of the checkpoint.
    in_features : int
        Of the whole layer. As in :func:`nm_act.sparsify`, one that the group does not divide stays dense.
    """
    where = place(prefix)
    if where is None:
        return []
    layer, merged = where
    specs = [(name, recipe.resolve(layer, name)) for name in packed.get(merged, [merged])]
    specs = [(name, None if spec and in_features % spec.pattern.span else spec) for name, spec in specs]
    return specs if any(spec for _, spec in specs) else []


@dataclass(frozen=True)
class Segment:
    """Neighbouring output features ``start`` to ``stop`` of a merged layer that read the same (pruned) input."""

    start: int
    stop: int
    spec: LinearSpec | None
    channel_scale: Tensor | None

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, shift_out: Tensor | None, sparse: Callable) -> Tensor:
        """The segment's outputs; ``sparse`` has the signature of :func:`nm_act.sparse_linear`."""
        from torch.nn import functional as F

        if self.spec is None:
            return F.linear(x, weight, bias)
        return sparse(
            x,
            weight,
            bias,
            self.spec.pattern.keep,
            self.spec.pattern.group,
            channel_scale=self.channel_scale,
            token_shift=self.spec.token_shift,
            shift_out=shift_out,
            variance_correction=self.spec.variance_correction,
            extra_columns=self.spec.pattern.extra_columns,
        )


def segments(
    specs: Sequence[LinearSpec | None], sizes: Sequence[int], scales: Sequence[Tensor | None]
) -> list[Segment]:
    """Join the neighbours of a merged layer that prune alike.

    Parameters
    ----------
    specs : sequence of LinearSpec or None
        One for each projection; None is dense.
    sizes : sequence of int
        Output features of each on this rank.
    scales : sequence of Tensor [in] or None
        Channel scales. Those of two projections are never the same, so only projections without one are joined.
    """
    joined: list[Segment] = []
    start = 0
    for spec, size, scale in zip(specs, sizes, scales, strict=True):
        last = joined[-1] if joined else None
        if last is not None and last.spec == spec and last.channel_scale is None and scale is None:
            joined[-1] = Segment(last.start, start + size, spec, None)
        else:
            joined.append(Segment(start, start + size, spec, scale))
        start += size
    return joined
