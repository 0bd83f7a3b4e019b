"""Two ways to keep more of a merged product at a cost of its own: a low-rank pair, and channels that stay dense.

Both on the stack of quality_stack.py, so that q, k and v share a pair or a set of channels, and gate and up. A pair of
rank R costs ``R (in + out)`` multiply-accumulates at the dense speed, k dense channels ``k out``. `shared_prediction`
says what that makes of a Llama-3-8B: the products stay merged, but run unfused, without the time of kernels that were
not built (an upper bound).

    python benchmarks/quality_side.py OUT/facts.jsonl

adds what quality_gpu.py found of both to docs/evaluation/side.csv, in place of the same lines, and predicts all anew.
"""

import csv
import datetime
import io
import itertools
import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import torch
from quality_fused import DENSE, SHAPES, Fused
from quality_session import Session, everywhere, tf32
from quality_stack import PRODUCTS, TENSORS, Stack, patterns_of, tensors_of
from torch import Tensor
from torch.nn import functional as F

from nm_act.files import write_atomic
from nm_act.lab.cost import Measured, layer_time, places_of, pruned, shapes_of
from nm_act.methods.mitigations import fitted_low_rank_of
from nm_act.patterns import NMPattern
from nm_act.recipe import Recipe, Rule

SHARES = (36, 18, 9)
"""One of so many channels stays dense."""
RATE = 1e-3
PAIR_RATES = (1e-3, 3e-3)
"""Learning rates of pairs alone: the better one on held-out text, at the first rank, serves the others."""
LAYERS = 32
HIDDEN = 4096
"""Of `SHAPES`."""
RECIPES = {
    "2:4": Recipe("2:4"),
    "16:32": Recipe("16:32", phase="decode"),
    "2:4, o dense": Recipe("2:4", rules=[Rule(projections=("o_proj",), pattern="dense")]),
}
"""By what the column "pattern" says."""
CSV = Path(__file__).resolve().parents[1] / "docs" / "evaluation" / "side.csv"
COLUMNS = (
    *("method", "pattern", "size", "chosen_by", "trained", "held_out", "held_out_stderr", "predicted_speedup"),
    *("predicted_decode", "wikitext2", "c4", "code", "dtype", "device", "commit", "date"),
)
"""`trained` is what was trained end to end; `held_out` the change of its loss on C4 that it did not see, in nats."""
PAIRS = "shared low-rank pair"


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


def fitted_pairs(shared: Fused, patterns, rank: int) -> list[Tensor]:
    """A and B of every product of the folded model; the leading direction is the last."""
    stack, pairs = watched(shared, patterns, shared.folded), []
    for index, place in itertools.product(range(stack.layers), PRODUCTS):
        pairs += fitted_low_rank_of(stack.weight(index, place), stack.lost[index, place], rank)
    return pairs


def with_pairs(shared: Fused, pairs: list[Tensor], rank: int) -> list[Tensor]:
    """The folded tensors less the leading pairs of their products, then these."""
    tensors, chosen = [each.clone() for each in shared.folded], []
    places = itertools.product(range(len(tensors) // TENSORS), PRODUCTS)
    for (index, place), inner, outer in zip(places, pairs[::2], pairs[1::2], strict=True):
        inner, outer = inner[-rank:], outer[:, -rank:]
        tensors[TENSORS * index + place] -= outer @ inner
        chosen += [inner.contiguous(), outer.contiguous()]
    return tensors + chosen


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
    """Perplexity of every text, and the mean losses of its windows; with what and when."""
    device = torch.cuda.get_device_name() if session.device.type == "cuda" else "CPU"
    found: dict[str, object] = {"dtype": "float32", "device": device}
    found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
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
    """Speed-ups of a Llama-3-8B by phase, its merged products with pairs of a rank or a share of dense channels.

    Nothing computes a norm or an activation with a product that has either.
    """
    plain = not rank and not dense_channels
    cost = Measured("h100", shapes_of(SHAPES), SHAPES, phases=("prefill", "decode"))
    found = {}
    for phase in cost.phases:
        dense = sparse = cost.rest(phase, LAYERS)
        for place in places_of(SHAPES, LAYERS):
            alone, spec = cost.time(phase, place, None), recipe.resolve(place.layer, place.projection)
            dense += alone
            sparse += layer_time(cost, phase, place, spec, alike=True, packed=plain)
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
    for pattern in ("2:4", "16:32"):
        patterns = patterns_of(everywhere(RECIPES[pattern]), shared.teacher.layers)
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
            row = {"method": "dense channels", "pattern": pattern, "size": f"1/{share}" if share else "0"}
            row |= {"chosen_by": kind if share else "", "trained": ""}
            session.fact(name, row=row, **evaluated(session, dense.use(masks), patterns))


def side(session: Session) -> None:
    """2:4 with pairs, trained end to end on C4, alone or with the weights, beside what costs about as much."""
    shared, ranks = Fused(session), session.options.side_ranks
    shared.train_on_c4()
    jobs = [("2:4", 0, "weights"), ("2:4", ranks[0], "pairs"), ("2:4", ranks[0], "weights and pairs")]
    jobs += [("2:4", rank, "pairs") for rank in ranks[1:]]
    jobs += [("2:4, o dense", 0, "weights")]
    jobs += [("2:4", rank, "weights and pairs") for rank in ranks[1:]]
    pairs: list[Tensor] = []
    each = 40.0  # seconds of a training
    for pattern, rank, what in jobs:
        name = f"side {pattern} rank {rank}"
        if f"{name} {what}" in session.facts or not session.wants("side", f"{pattern} rank {rank} {what}"):
            continue
        rates = rates_of(session, what)
        session.need(each * len(rates))
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        patterns = patterns_of(everywhere(RECIPES[pattern]), shared.teacher.layers)
        if rank and not pairs:
            pairs = fitted_pairs(shared, patterns, max(ranks))
        tensors, kind = (with_pairs(shared, pairs, rank), SidePath) if rank else (shared.folded, Stack)
        row = {"method": PAIRS if rank else "folded", "pattern": pattern, "chosen_by": "error" if rank else ""}
        row |= {"size": f"{rank} of {session.dense.config.hidden_size}", "trained": ""}
        before = session.left
        if f"{name} untrained" not in session.facts:
            stack = kind(session.dense, session.options.window, torch.float32, tensors)
            session.fact(f"{name} untrained", row=row, **evaluated(session, stack, patterns))
        options = {"kind": kind, "tensors": tensors, "steps": session.options.side_steps}
        options["first"] = TENSORS * shared.teacher.layers if what == "pairs" else 0
        with tf32(session.device):
            tried = [shared.train(name, RECIPES[pattern], 0, rate, **options) for rate in rates]
        found, facts = min(tried, key=lambda one: one[1]["after"])
        row["trained"] = f"{what}, {facts['steps']} steps of {facts['batch']} windows, rate {facts['rate']:g}"
        if not facts["difference"] < -2 * facts["stderr"]:
            found, row["trained"] = tensors, row["trained"] + "; not better on held-out text, kept out"
        stack = kind(session.dense, session.options.window, torch.float32, found)
        losses = {one["rate"]: one["after"] for _, one in tried}
        session.fact(
            f"{name} {what}", row=row, what=what, losses=losses, **facts, **evaluated(session, stack, patterns)
        )
        each = 1.1 * (before - session.left) / len(rates)
        del tried, found, tensors, stack


def rates_of(session: Session, what: str) -> tuple[float, ...]:
    """The learning rates to try: of pairs alone all, until one is known."""
    if what != "pairs":
        return (RATE,)
    known = [fact["rate"] for fact in session.facts.values() if fact.get("what") == what]
    return tuple(known[:1]) or PAIR_RATES


def predicted(row: dict[str, str]) -> dict[str, str]:
    """The columns of a row's predicted speed-ups."""
    size, _, hidden = row["size"].partition(" of ")
    if hidden:
        found = shared_prediction(RECIPES[row["pattern"]], rank=round(int(size) * HIDDEN / int(hidden)))
    else:
        found = shared_prediction(RECIPES[row["pattern"]], dense_channels=float(Fraction(size)))
    return {"predicted_speedup": f"{found['prefill']:.4f}", "predicted_decode": f"{found['decode']:.4f}"}


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    """What a line is about; a newer one takes its place."""
    return tuple(row.get(name) or "" for name in COLUMNS[:5])


def main(arguments: list[str]) -> int:
    with CSV.open(newline="", encoding="utf-8") as file:
        rows = {key_of(row): row for row in csv.DictReader(file)}
    for fact in (json.loads(line) for path in arguments for line in Path(path).read_text().splitlines()):
        if "row" in fact:
            row = {name: fact["row"][name] for name in ("method", "pattern", "size", "chosen_by", "trained")}
            if row["trained"]:
                row |= {"held_out": f"{fact['difference']:.4f}", "held_out_stderr": f"{fact['stderr']:.4f}"}
            row |= {text: f"{fact[text]:.4f}" for text in ("wikitext2", "c4", "code") if text in fact}
            rows[key_of(row)] = row | {name: fact[name] for name in ("dtype", "device", "commit", "date")}
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | predicted(row) for row in rows.values())
    write_atomic(CSV, file.getvalue().encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
