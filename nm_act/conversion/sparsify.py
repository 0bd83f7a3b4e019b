"""Makes a model sparse: replaces the linear layers that a recipe names, and reports what was done."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import parallel
from ..layers.hooks import refuse_uncarried, take_over_hooks
from ..layers.linear import NMLinear, sparse_layers
from ..layers.tokens import TokenContext
from ..methods import mitigations
from ..optimize import optimize as merge_and_fuse
from ..optimize.eligible import check_module
from ..optimize.model import refuse_optimized
from ..recipe import DEFAULT_PROJECTIONS, ROLES, LinearSpec, Recipe, in_state_space
from .adapters import BASE, is_adapter, is_plain_linear, plain_linear, projection_name, why_wrapped_stays
from .macs import computes_itself, macs_of
from .undo import unchanged_on_error

RECORDERS: list[Callable[[nn.Module, Recipe], str]] = []
"""Functions that write the recipe into a model's config, for saving, or return a note if they cannot; integrations
append theirs."""

Candidates = list[tuple[str, Any]]
"""Name and module of a candidate: a linear layer that a recipe may name, or another module that a report mentions."""

Decisions = dict[str, tuple[LinearSpec | None, str]]
"""Name of a candidate -> its spec, or None and the reason why it stays dense."""


@dataclass
class SparsifyReport:
    """What :func:`sparsify` did.

    Attributes
    ----------
    model : nn.Module
        The sparse model.
    recipe : Recipe
        The recipe that was applied.
    replaced : list of (str, LinearSpec)
        Name and spec of every layer that is now sparse.
    kept : list of (str, str)
        Name of every linear layer that stayed dense, and the reason; also other modules inside the decoder layers that
        multiply by weights (fused experts, routers, Conv1D, convolutions, state-space layers).
    mac_fraction : float
        Of all multiply-accumulates by weights inside decoder layers, the fraction whose input is now sparse (in at
        least one phase). Of a mixture's experts, only the ``top_k`` of a token count; the output head and the modules
        in ``uncounted`` do not count.
    uncounted : list of str
        Name of every module in the decoder layers whose products cannot be counted, because of the form of its weights;
        they are not part of ``mac_fraction``.
    note : str
        What the caller should know about saving the model; often empty.
    """

    model: nn.Module
    recipe: Recipe
    replaced: list[tuple[str, LinearSpec]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    mac_fraction: float = 0.0
    uncounted: list[str] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.kept)
        lines = [
            f"sparse: {len(self.replaced)} of {total} linear layers, "
            f"{self.mac_fraction:.1%} of the decoder's {'counted ' if self.uncounted else ''}multiply-accumulates"
        ]
        lines += _table(Counter((projection_name(name), str(spec)) for name, spec in self.replaced))
        if self.kept:
            lines += ["dense:", *_table(Counter((projection_name(name), reason) for name, reason in self.kept))]
        if any(layer._incomplete for layer in sparse_layers(self.model).values()):
            lines.append("calibrated data are missing: run nm-act calibrate, and load_calibration in place of sparsify")
        return "\n".join(lines + ([self.note] if self.note else []))


def sparsify(model: nn.Module, recipe: Recipe, *, inplace: bool = True, optimize: bool = False) -> SparsifyReport:
    """Replace the linear layers that a recipe names by :class:`~nm_act.NMLinear`.

    Parameters
    ----------
    model : nn.Module
        A decoder-only Transformers model, or any module whose layers are numbered
        (``...layers.3.mlp.down_proj``): the first number in a name is its layer. Embeddings and the output
        head are never touched.
    recipe : Recipe
        What to make sparse, and how.
    inplace : bool
        Change ``model`` itself (default) or a deep copy.
    optimize : bool
        Also merge and fuse for inference, as :func:`nm_act.optimize` does.

    Returns
    -------
    SparsifyReport
        With the sparse model as ``.model``, whose attribute ``nm_act_recipe`` is the recipe. A Transformers model also
        records it in its config, so that a saved checkpoint loads sparse again.

    Raises
    ------
    TypeError
        If ``model`` is no module or ``recipe`` no Recipe.
    ValueError
        If the recipe names a layer or projection that the model does not have; if the model is already sparse or
        optimized, or is an encoder-decoder; if none of its projections is a ``torch.nn.Linear``; or if a layer to be
        replaced has something that a sparse layer cannot take over (hooks on its state, a weight computed by a hook, a
        replaced forward).

    Notes
    -----
    The model is unchanged after any error, even a late one (out of memory in the last layer, say). Layers that were
    already replaced are restored with bitwise equal values; a layer or weight that is referenced elsewhere is restored
    as the same object. Forward and backward hooks stay registered.

    Examples
    --------
    >>> layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 64)}) for _ in range(2))
    >>> report = sparsify(layers, Recipe("8:16", projections=["up_proj"]))
    >>> [name for name, spec in report.replaced]
    ['0.up_proj', '1.up_proj']
    """
    checked = _checked(model, recipe)
    if not inplace:
        model = copy.deepcopy(model)
        checked = _checked(model, recipe)
    with unchanged_on_error(model):
        report = _replace_linears(model, recipe, *checked)
        report.note = "".join(record(model, recipe) for record in RECORDERS)
        if optimize:
            merge_and_fuse(model)
    return report


def replace_linears(model: nn.Module, recipe: Recipe) -> SparsifyReport:
    """The work of :func:`sparsify` on any module, in place, without touching a Transformers config."""
    checked = _checked(model, recipe)
    with unchanged_on_error(model):
        return _replace_linears(model, recipe, *checked)


def _replace_linears(
    model: nn.Module, recipe: Recipe, candidates: Candidates, places: dict[str, "_Place | None"], decided: Decisions
) -> SparsifyReport:
    report = SparsifyReport(model, recipe)
    macs = {name: macs_of(model, name) for name, _ in candidates if places[name] is not None}
    report.uncounted = [name for name, count in macs.items() if count is None]
    stacks = set()
    made: dict[tuple[nn.Module, LinearSpec], NMLinear] = {}
    shared = {key for key, names in Counter(id(module) for _, module in candidates).items() if names > 1}
    # Modules that own a weight; a wrapper such as PEFT's only exposes the weight of the layer inside it.
    owned = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    tied = {key for key, count in owned.items() if count > 1}
    candidates.reverse()
    while candidates:  # consumed, so that a replaced layer's weight is freed before the next one is copied
        name, module = candidates.pop()
        place = places[name]
        spec, reason = decided[name]
        if spec is None or place is None:
            uncounted = "; its multiply-accumulates are not counted" if name in report.uncounted else ""
            report.kept.append((name, reason + uncounted))
            continue
        report.replaced.append((name, spec))
        stacks.add(place.stack)
        sparse = made.get((module, spec))
        if sparse is None:
            # A weight that several modules share keeps its layout: a copy would no longer be shared.
            linear = plain_linear(module)
            kept: dict[str, Any] = {"weight_layout": "out_in", "lift": False} if id(linear.weight) in tied else {}
            sparse = NMLinear.from_linear(linear, spec, **kept)
            take_over_hooks(sparse, module)
        if id(module) in shared:  # under several names
            made[module, spec] = sparse
        model.set_submodule(name, sparse)
    total = sum(count or 0 for count in macs.values())
    report.mac_fraction = sum(macs[name] or 0 for name, _ in report.replaced) / total if total else 0.0
    if recipe.needs_token_context:
        _attach_context(model, sorted(stacks), report, TokenContext(recipe.dense_first_tokens))
    model.nm_act_recipe = recipe  # type: ignore[assignment]
    return report


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Raise what :func:`sparsify` would raise for this model and recipe, without changing anything."""
    _checked(model, recipe)


def resolved_specs(model: nn.Module, recipe: Recipe) -> dict[str, LinearSpec]:
    """Name -> spec of every layer that :func:`sparsify` would make sparse; checks everything and changes nothing."""
    _, _, decided = _checked(model, recipe)
    return {name: spec for name, (spec, _) in decided.items() if spec is not None}


def decoder_linears(model: nn.Module) -> dict[str, tuple[int, str, nn.Linear]]:
    """Name -> (layer, projection, module) of every linear layer inside the numbered decoder layers.

    Raises ValueError if the model is optimized, because merged and e4m3 layers are not its linear layers.
    """
    refuse_optimized(model)
    prefix = _decoder_prefix(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    places = {name: _place(name, prefix) for name in linears if not is_adapter(model, name)}
    return {name: (p.layer, p.projection, linears[name]) for name, p in places.items() if p is not None}


def _checked(model: nn.Module, recipe: Recipe) -> tuple[Candidates, dict[str, "_Place | None"], Decisions]:
    """The candidates for replacement, their places in the model, and what becomes of them, after all checks."""
    check_module(model)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"expected a Recipe, got {type(recipe).__name__}; use Recipe(...), Recipe.named(...) or Recipe.load(path)"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"expected a decoder-only model, got the encoder-decoder {type(model).__name__}; use a decoder"
        )
    refuse_optimized(model)
    prefix = _decoder_prefix(model)
    candidates = _candidates(model, recipe, prefix)
    sparse = next((name for name, module in candidates if isinstance(module, NMLinear)), None)
    if sparse is not None:
        raise ValueError(f"expected a dense model, got one where {sparse} is sparse already; reload the dense model")
    parallel.refuse_sharded((name, module.weight) for name, module in candidates if isinstance(module, nn.Linear))
    places = {name: _place(name, prefix) for name, _ in candidates}
    check_names(recipe, {(place.layer, place.projection) for place in places.values() if place is not None})
    decided = {name: _decide(model, name, module, places[name], recipe) for name, module in candidates}
    _check_effect(recipe, places, decided)
    for name, module in candidates:
        spec, _ = decided[name]
        if spec is not None:
            _check_rank(name, module, spec)
            refuse_uncarried(name, module)
    return candidates, places, decided


@dataclass(frozen=True)
class _Place:
    stack: str  # name of the module that owns the list of layers
    layer: int
    projection: str


def _candidates(model: nn.Module, recipe: Recipe, prefix: str) -> Candidates:
    """Linear layers, and other modules that have a projection's name or multiply by weights, under all their names."""

    def wanted(name: str, module: nn.Module) -> bool:
        named = recipe.covers(projection_name(name)) and not list(module.children())
        return isinstance(module, nn.Linear) or named or (_place(name, prefix) is not None and computes_itself(module))

    return [(name, module) for name, module in model.named_modules(remove_duplicate=False) if wanted(name, module)]


def _decoder_prefix(model: nn.Module) -> str:
    """Name prefix of the text decoder, because a vision tower has projections of the same names."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _place(name: str, prefix: str) -> _Place | None:
    if prefix and not name.startswith(prefix + "."):
        return None
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if number is None:
        return None
    return _Place(".".join(parts[: max(number - 1, 0)]), int(parts[number]), projection_name(name))


def _decide(
    model: nn.Module, name: str, module: Any, place: _Place | None, recipe: Recipe
) -> tuple[LinearSpec | None, str]:
    if place is None:
        return None, "outside the decoder layers"
    if not recipe.covers(place.projection):
        if isinstance(module, nn.Linear):
            return None, why_wrapped_stays(model, name) or "not among the recipe's projections"
        return None, f"{type(module).__name__} is not torch.nn.Linear"
    spec = recipe.resolve(place.layer, place.projection)
    if spec is None:
        return None, "dense by the recipe"
    reason = _other_kind(module) or why_wrapped_stays(model, name)
    if recipe.projections == DEFAULT_PROJECTIONS and in_state_space(name.removesuffix(f".{BASE}")):
        reason = reason or "output of a state-space layer; list out_proj to have it"
    if reason:
        return None, reason
    if module.in_features % spec.span:
        return None, f"in_features {module.in_features} is not a multiple of the group {spec.span}"
    return spec, ""


def _other_kind(module: nn.Module) -> str:
    """Why a module is not a plain linear layer; empty if it is."""
    if not is_plain_linear(module):
        return f"{type(module).__name__} is not torch.nn.Linear"
    weight = module.weight
    if type(weight) is not nn.Parameter:  # a quantised or computed tensor
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"its weight is quantised ({str(weight.dtype).removeprefix('torch.')})"
    if weight.dtype == torch.float64:
        return "its weight is in float64; the operators take float32, bfloat16 and float16"
    return ""


def _check_effect(recipe: Recipe, places: dict[str, "_Place | None"], decided: Decisions) -> None:
    """Refuse a recipe if none of the layers that it names can be sparse."""
    inside = [(name, place) for name, place in places.items() if place is not None]
    wanted = [name for name, place in inside if recipe.resolve(place.layer, place.projection) is not None]
    if wanted and all(spec is None for spec, _ in decided.values()):
        raise ValueError(
            f"expected at least one layer that the recipe can make sparse, got none: {wanted[0]} and all others stay "
            f"dense ({decided[wanted[0]][1]}); choose another pattern, other projections, or a model whose "
            "projections are linear layers"
        )


def check_names(recipe: Recipe, places: set[tuple[int, str]]) -> None:
    """Raise a ValueError if a recipe names a layer or projection that is not among a model's (layer, projection)."""
    layers, projections = {layer for layer, _ in places}, {projection for _, projection in places}
    named_layers = [*recipe.skip_layers, *(layer for rule in recipe.rules for layer in rule.layers or ())]
    unknown_layers = [layer for layer in named_layers if layer not in layers]
    if unknown_layers:
        span = f"layers {min(layers)} to {max(layers)}" if layers else "no numbered layers"
        raise ValueError(f"expected layers that the model has ({span}), got {unknown_layers[0]}; correct the recipe")
    # The default list stands for a whole block, so a rule written for any family may name a projection that this model
    # lacks; an explicit list must match name by name.
    lists = [rule.projections or () for rule in recipe.rules]
    if recipe.projections == DEFAULT_PROJECTIONS:
        lists = [names for names in lists if projections.isdisjoint(names)]
    named = [name for names in lists for name in names]
    if recipe.projections != DEFAULT_PROJECTIONS or not any(map(recipe.covers, projections)):
        named += recipe.projections
    unknown = [name for name in named if name not in projections]
    if unknown:
        same = sorted(name for name in projections if unknown[0] in ROLES.get(name, ()))
        hint = f" (its {unknown[0]} is {' and '.join(same)})" if same else ""
        raise ValueError(
            f"expected projections that the model has ({', '.join(sorted(projections)) or 'none'}), "
            f"got {unknown[0]!r}; correct the recipe{hint}"
        )


def _check_rank(name: str, module: Any, spec: LinearSpec) -> None:
    rank, most = mitigations.rank_of(spec.mitigation), min(module.in_features, module.out_features)
    if rank > most:
        raise ValueError(
            f"expected a low-rank pair of at most rank {most} for {name}, got rank {rank}; use a smaller one"
        )


def _attach_context(model: nn.Module, stacks: list[str], report: SparsifyReport, context: TokenContext) -> None:
    for stack in stacks:
        context.attach(model.get_submodule(stack))
    for name, _ in report.replaced:
        model.get_submodule(name).token_context = context  # type: ignore[assignment]


def _table(rows: Counter[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}  x {count}" for (name, text), count in rows.items()]
