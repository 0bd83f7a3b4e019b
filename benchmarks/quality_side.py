"""Two ways to keep more of a merged product at a cost of its own: a low-rank pair, and channels that stay dense.

Both on the stack of quality_stack.py, so that q, k and v share a pair or a set of channels, and gate and up. A pair of
rank R costs ``R (in + out)`` multiply-accumulates at the dense speed, k dense channels ``k out``. `shared_prediction`
says what that makes of a Llama-3-8B.
"""

import itertools
import math

import torch
from quality_fused import DENSE, SHAPES, Fused
from quality_session import Session, everywhere, tf32
from quality_stack import PRODUCTS, TENSORS, Stack, patterns_of, tensors_of
from torch import Tensor
from torch.nn import functional as F

from nm_act.lab.cost import Measured, layer_time, places_of, pruned, shapes_of
from nm_act.methods.mitigations import fitted_low_rank_of
from nm_act.patterns import NMPattern
from nm_act.recipe import Recipe, Rule

SHARES = (36, 18, 9)
"""One of so many channels stays dense."""
RATE = 1e-3
LAYERS = 32


class SidePath(Stack):
    """Products with a low-rank pair, ``P(x) V' + (x A') B'``; behind the stack's tensors come A and B of each."""

    def __init__(self, model, length: int, dtype: torch.dtype, tensors: list[Tensor]):
        layers = model.config.num_hidden_layers
        super().__init__(model, length, dtype, tensors[: TENSORS * layers])
        self.tensors += [each.detach().to(dtype).clone() for each in tensors[TENSORS * layers :]]

    def product(self, index: int, place: int, x: Tensor, pattern: NMPattern | None) -> Tensor:
        """One product."""
        start = TENSORS * self.layers + 2 * (len(PRODUCTS) * index + PRODUCTS.index(place))
        inner, outer = self.tensors[start : start + 2]
        return super().product(index, place, x, pattern) + F.linear(F.linear(x, inner), outer)


class Lost(Stack):
    """The dense stack, which adds up what selection would drop of every product's input."""

    def watch(self, patterns) -> "Lost":
        """Patterns of `patterns_of`; "lost" is ``R'R`` of the dropped part of tokens of root mean square 1."""
        self.watched = patterns
        self.lost: dict[tuple[int, int], Tensor] = {}
        self.energy: dict[tuple[int, int], Tensor] = {}
        return self

    def product(self, index: int, place: int, x: Tensor, pattern: NMPattern | None) -> Tensor:
        """One product, dense."""
        watched = self.watched[index][PRODUCTS.index(place)]
        rows = x.flatten(0, -2).float()
        size = rows.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
        dropped = (rows - self._pruned(rows, watched)) / size
        key = index, place
        self.lost[key] = self.lost.get(key, 0) + dropped.T @ dropped
        self.energy[key] = self.energy.get(key, 0) + rows.square().sum(dim=0)
        return super().product(index, place, x, None)


def watched(shared: Fused, patterns, tensors: list[Tensor]) -> Lost:
    """What selection by these patterns drops in 8 windows of C4."""
    stack = Lost(shared.session.dense, shared.length, torch.float32, tensors).watch(patterns)
    with torch.no_grad():
        for ids in shared.c4[:8].split(4):
            stack.hidden(ids, [DENSE] * stack.layers)
    return stack


def with_pairs(shared: Fused, patterns, rank: int) -> list[Tensor]:
    """The folded tensors less the fitted pairs of their products, then the pairs."""
    stack = watched(shared, patterns, shared.folded)
    tensors, pairs = [each.clone() for each in shared.folded], []
    for index, place in itertools.product(range(stack.layers), PRODUCTS):
        weight = tensors[TENSORS * index + place]
        inner, outer = fitted_low_rank_of(weight, stack.lost[index, place], rank)
        weight -= outer @ inner
        pairs += [inner, outer]
    return tensors + pairs


class DenseChannels(Stack):
    """Products of which some channels stay dense; selection is among the others."""

    def use(self, channels: dict[tuple[int, int], Tensor]) -> "DenseChannels":
        """Masks ``[in]`` by layer and place."""
        self.channels = channels
        return self

    def product(self, index: int, place: int, x: Tensor, pattern: NMPattern | None) -> Tensor:
        """One product."""
        chosen = self.channels[index, place]
        kept = self._pruned(x.masked_fill(chosen, 0), pattern)
        return F.linear(torch.where(chosen, x, kept), self.weight(index, place))


def evaluated(session: Session, stack: Stack, patterns) -> dict[str, object]:
    """Perplexity of every text, and the mean losses of its windows."""
    found: dict[str, object] = {}
    for text in (name for name in ("wikitext2", "c4", "code") if name in session.texts):
        tokens = session.tensors[f"text.{text}"].long()[: session.options.tokens].to(session.device)
        losses = []
        with torch.no_grad():
            for ids in tokens.split(session.options.window):
                logits = F.linear(stack.hidden(ids[None], patterns)[0, :-1], stack.head)
                losses.append(F.cross_entropy(logits.float(), ids[1:]).item())
        found[text] = math.exp(math.fsum(losses) / len(losses))
        found[f"{text} windows"] = losses
    return found


def shared_prediction(recipe: Recipe, rank: int = 0, dense_channels: float = 0.0) -> dict[str, float]:
    """Speed-ups of a Llama-3-8B by phase, its merged products with pairs of a rank or a share of dense channels."""
    cost = Measured("h100", shapes_of(SHAPES), SHAPES, phases=("prefill", "decode"))
    found = {}
    for phase in cost.phases:
        dense = sparse = cost.rest(phase, LAYERS)
        for place in places_of(SHAPES, LAYERS):
            alone, spec = cost.time(phase, place, None), recipe.resolve(place.layer, place.projection)
            dense += alone
            sparse += layer_time(cost, phase, place, spec, alike=True)
            if pruned(spec, phase) is not None:
                # The pair's inner product is shared: it counts once, with the first layer of a merged product.
                first = place.projection not in ("k_proj", "v_proj", "up_proj")
                added = rank * (place.out_features + place.in_features * first) / place.macs + dense_channels
                sparse += alone * added
        found[phase] = dense / sparse
    return found


@torch.no_grad()
def channels(session: Session) -> None:
    """Channels of the largest energy times weight stay dense in every product, untrained; and those that lose most."""
    shared = Fused(session)
    tensors = tensors_of(session.dense)
    for pattern, phase in (("2:4", "both"), ("16:32", "decode")):
        recipe = Recipe(pattern, phase=phase)
        patterns = patterns_of(everywhere(recipe), shared.teacher.layers)
        stack = watched(shared, patterns, tensors)
        dense = DenseChannels(session.dense, session.options.window, torch.float32, tensors)
        for share, kind in ((0, "largest"), *((share, "largest") for share in SHARES), (SHARES[1], "lost")):
            name = f"dense channels {pattern} 1/{share} {kind}" if share else f"dense channels {pattern} none"
            if name in session.facts:
                continue
            session.need(6)
            masks = {}
            for key, energy in stack.energy.items():
                weight = dense.weight(*key)
                size = stack.lost[key].diagonal() if kind == "lost" else energy
                size = size * weight.float().square().sum(dim=0)
                masks[key] = torch.zeros_like(size, dtype=torch.bool)
                if share:
                    masks[key][size.topk(max(1, len(size) // share)).indices] = True
            predicted = shared_prediction(recipe, dense_channels=1 / share if share else 0.0)
            session.fact(name, predicted=predicted, **evaluated(session, dense.use(masks), patterns))


def side(session: Session) -> None:
    """2:4 with pairs of small rank, trained end to end on C4 with the weights, beside what costs about as much."""
    shared = Fused(session)
    shared.train_on_c4()
    spared = Recipe("2:4", rules=[Rule(projections=("o_proj",), pattern="dense")])
    scale = 4096 / session.dense.config.hidden_size
    jobs = [("2:4", Recipe("2:4"), 0), ("2:4, o dense", spared, 0), ("2:4", Recipe("2:4"), 16)]
    jobs += [("2:4", Recipe("2:4"), 32), ("2:4", Recipe("2:4"), 8), ("2:4", Recipe("2:4"), 64)]
    steps, seconds = session.options.side_steps, 0.0
    for title, recipe, rank in jobs:
        name = f"side {title} rank {rank}"
        rank = min(rank, 4) if session.options.tiny else rank
        if name in session.facts:
            continue
        session.need(seconds or 40)
        patterns = patterns_of(everywhere(recipe), shared.teacher.layers)
        tensors = with_pairs(shared, patterns, rank) if rank else shared.folded
        kind = SidePath if rank else Stack
        untrained = evaluated(session, kind(session.dense, session.options.window, torch.float32, tensors), patterns)
        before = session.left
        with tf32(session.device):
            trained, facts = shared.train(name, recipe, 0, RATE, kind=kind, tensors=tensors, steps=steps)
        seconds = 1.1 * (before - session.left) + 8
        found = evaluated(session, kind(session.dense, session.options.window, torch.float32, trained), patterns)
        predicted = shared_prediction(recipe, round(rank * scale))
        session.fact(name, predicted=predicted, untrained=untrained, trained=found, **facts)
        del trained, tensors
