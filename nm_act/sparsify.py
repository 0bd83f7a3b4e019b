"""Making a model sparse: replace the linear layers that a recipe names, and report what was done."""

import copy
import sys
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from . import mitigations, parallel
from .hooks import refuse_uncarried, take_over_hooks
from .linear import NMLinear
from .optimize.model import refuse_optimized
from .recipe import DEFAULT_PROJECTIONS, LinearSpec, Recipe
from .tokens import TokenContext


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
        Name of every layer that is sparse now, and how.
    kept : list of (str, str)
        Name of every linear layer (or other module with a projection's name) that stayed as it was, and why.
    mac_fraction : float
        Share of the multiply-accumulates of all linear layers inside decoder layers whose input is sparse
        now (in at least one phase); the output head is not counted.
    note : str
        What the caller should know about saving the model; often empty.
    """

    model: nn.Module
    recipe: Recipe
    replaced: list[tuple[str, LinearSpec]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    mac_fraction: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.kept)
        lines = [
            f"sparse: {len(self.replaced)} of {total} linear layers, "
            f"{self.mac_fraction:.1%} of the decoder's multiply-accumulates"
        ]
        lines += _table(Counter((_last(name), str(spec)) for name, spec in self.replaced))
        if self.kept:
            lines += ["dense:", *_table(Counter((_last(name), reason) for name, reason in self.kept))]
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
        With the sparse model as ``.model``, which also carries the recipe as ``nm_act_recipe``. A
        Transformers model records it in its config, so that ``save_pretrained`` and ``from_pretrained``
        give the sparse model again.

    Raises
    ------
    TypeError
        If ``recipe`` is not a Recipe.
    ValueError
        If the recipe names a layer or projection that the model lacks, or the model is sparse or optimized
        already, or it is an encoder-decoder, or a layer to be replaced has something registered that a sparse layer
        cannot take over (hooks of its state, a weight computed by a hook, a forward of its own). The model is
        unchanged then. Forward and backward hooks stay registered.

    Examples
    --------
    >>> layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 64)}) for _ in range(2))
    >>> report = sparsify(layers, Recipe("8:16", projections=["up_proj"]))
    >>> [name for name, spec in report.replaced]
    ['0.up_proj', '1.up_proj']
    """
    report = replace_linears(model if inplace else copy.deepcopy(model), recipe)
    if "transformers" in sys.modules:
        from .integrations.transformers import record_recipe

        report.note = record_recipe(report.model, recipe)
    if optimize:
        from .optimize import optimize as merge_and_fuse

        merge_and_fuse(report.model)
    return report


def replace_linears(model: nn.Module, recipe: Recipe) -> SparsifyReport:
    """The work of :func:`sparsify` on any module, in place, without touching a Transformers config."""
    candidates, places = _checked(model, recipe)
    report = SparsifyReport(model, recipe)
    macs = Counter()
    stacks = set()
    sparse_layers: dict[tuple[nn.Module, LinearSpec], NMLinear] = {}
    shared = {key for key, names in Counter(id(module) for _, module in candidates).items() if names > 1}
    weights = (getattr(module, "weight", None) for module in model.modules())
    tied = {key for key, count in Counter(id(weight) for weight in weights if weight is not None).items() if count > 1}
    candidates.reverse()
    while candidates:  # consumed, so that a replaced layer's weight is freed before the next one is copied
        name, module = candidates.pop()
        spec, reason = _decide(module, places[name], recipe)
        if places[name] is not None and isinstance(module, nn.Linear):
            macs[spec is not None] += module.in_features * module.out_features
        if spec is None:
            report.kept.append((name, reason))
            continue
        report.replaced.append((name, spec))
        stacks.add(places[name].stack)
        sparse = sparse_layers.get((module, spec))
        if sparse is None:
            # A weight that several modules share stays as it is: a copy in another layout would be no longer theirs.
            kept = {"weight_layout": "out_in", "lift": False} if id(module.weight) in tied else {}
            sparse = NMLinear.from_linear(module, spec, **kept)
            take_over_hooks(sparse, module)
        if id(module) in shared:  # under several names
            sparse_layers[module, spec] = sparse
        _replace(model, name, sparse)
    report.mac_fraction = macs[True] / macs.total() if macs else 0.0
    if recipe.needs_token_context:
        _attach_context(model, sorted(stacks), report, TokenContext(recipe.dense_first_tokens))
    model.nm_act_recipe = recipe
    return report


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Raise what :func:`sparsify` would raise for this model and recipe, and change nothing."""
    _checked(model, recipe)


def resolved_specs(model: nn.Module, recipe: Recipe) -> dict[str, LinearSpec]:
    """Name -> spec of every layer that :func:`sparsify` would make sparse, after its checks; changes nothing."""
    candidates, places = _checked(model, recipe)
    decided = {name: _decide(module, places[name], recipe)[0] for name, module in candidates}
    return {name: spec for name, spec in decided.items() if spec is not None}


def decoder_linears(model: nn.Module) -> dict[str, tuple[int, str, nn.Linear]]:
    """Name -> (layer, projection, module) of every linear layer inside the numbered decoder layers.

    Raises
    ------
    ValueError
        If the model is optimized: merged and e4m3 layers are none of its linear layers.
    """
    refuse_optimized(model)
    prefix = _decoder_prefix(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    places = {name: _place(name, prefix) for name in linears}
    return {name: (p.layer, p.projection, linears[name]) for name, p in places.items() if p is not None}


def _checked(model: nn.Module, recipe: Recipe) -> tuple[list[tuple[str, nn.Module]], dict[str, "_Place | None"]]:
    """Candidates for replacement and their places in the model, after all checks."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"expected a Recipe, got {type(recipe).__name__}; use Recipe(...) or Recipe.load(path)")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"expected a decoder-only model, got the encoder-decoder {type(model).__name__}; use a decoder"
        )
    refuse_optimized(model)
    candidates = _candidates(model, recipe)
    sparse = next((name for name, module in candidates if isinstance(module, NMLinear)), None)
    if sparse is not None:
        raise ValueError(f"expected a dense model, got one where {sparse} is sparse already; reload the dense model")
    parallel.refuse_sharded((name, module.weight) for name, module in candidates if isinstance(module, nn.Linear))
    prefix = _decoder_prefix(model)
    places = {name: _place(name, prefix) for name, _ in candidates}
    _check_names(recipe, [place for place in places.values() if place is not None])
    for name, module in candidates:
        spec, _ = _decide(module, places[name], recipe)
        _check_rank(name, module, spec)
        if spec is not None:
            refuse_uncarried(name, module)
    return candidates, places


@dataclass(frozen=True)
class _Place:
    stack: str  # name of the module that owns the list of layers
    layer: int
    projection: str


def _candidates(model: nn.Module, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """Linear layers and whatever else bears a projection's name, under each of its names."""
    return [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) or (_last(name) in recipe.projections and not list(module.children()))
    ]


def _decoder_prefix(model: nn.Module) -> str:
    """Name prefix of the text decoder: a vision tower has projections of the same names."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _place(name: str, prefix: str) -> _Place | None:
    if prefix and not name.startswith(prefix + "."):
        return None
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if number is None:
        return None
    return _Place(".".join(parts[: max(number - 1, 0)]), int(parts[number]), parts[-1])


def _decide(module: nn.Module, place: _Place | None, recipe: Recipe) -> tuple[LinearSpec | None, str]:
    if place is None:
        return None, "outside the decoder layers"
    if place.projection not in recipe.projections:
        return None, "not among the recipe's projections"
    spec = recipe.resolve(place.layer, place.projection)
    if spec is None:
        return None, "dense by the recipe"
    if type(module) is not nn.Linear:
        return None, f"{type(module).__name__} is not torch.nn.Linear"
    if module.in_features % spec.pattern.span:
        return None, f"in_features {module.in_features} is not a multiple of the group {spec.pattern.span}"
    return spec, ""


def _check_names(recipe: Recipe, places: list[_Place]) -> None:
    layers = {place.layer for place in places}
    projections = {place.projection for place in places}
    named_layers = [*recipe.skip_layers, *(layer for rule in recipe.rules for layer in rule.layers or ())]
    unknown_layers = [layer for layer in named_layers if layer not in layers]
    if unknown_layers:
        span = f"layers {min(layers)} to {max(layers)}" if layers else "no numbered layers"
        raise ValueError(f"expected layers that the model has ({span}), got {unknown_layers[0]}; correct the recipe")
    # The default list fits Llama-like models as a whole; a list that someone wrote has to fit name by name.
    named = [name for rule in recipe.rules for name in rule.projections or ()]
    if recipe.projections != DEFAULT_PROJECTIONS or not projections & set(recipe.projections):
        named += recipe.projections
    unknown = [name for name in named if name not in projections]
    if unknown:
        raise ValueError(
            f"expected projections that the model has ({', '.join(sorted(projections)) or 'none'}), "
            f"got {unknown[0]!r}; correct the recipe"
        )


def _check_rank(name: str, module: nn.Module, spec: LinearSpec | None) -> None:
    rank = 0 if spec is None else mitigations.rank_of(spec.mitigation)
    if rank and rank > min(module.in_features, module.out_features):
        raise ValueError(
            f"expected a low-rank pair of at most rank {min(module.in_features, module.out_features)} for {name}, got "
            f"rank {rank}; use a smaller one"
        )


def _replace(model: nn.Module, name: str, layer: NMLinear) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _attach_context(model: nn.Module, stacks: list[str], report: SparsifyReport, context: TokenContext) -> None:
    for stack in stacks:
        context.attach(model.get_submodule(stack))
    for name, _ in report.replaced:
        model.get_submodule(name).token_context = context


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _table(rows: Counter) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}  x {count}" for (name, text), count in rows.items()]
