"""How much a selection could gain that sees the weight's correlations: a ceiling for every cheaper score.

Pruning the inputs S of a token costs ``e G e`` in the layer's output, e = the pruned values and ``G = W W'`` over the
merged layers. Scores by the diagonal of G are WINA's. Here the whole of G counts: starting there, the groups are chosen
anew in turns (a quarter at a time), each input by what pruning it adds to the error of all other pruned inputs.
"""

import math

import torch
from quality_session import Session
from quality_stack import Stack, tensors_of
from torch import Tensor

import nm_act
from nm_act.patterns import NMPattern

SWEEPS = 2
TURNS = 4


class Correlated(Stack):
    """A stack whose products select by a part of G: "identity", "diagonal" or "whole"."""

    def use(self, pattern: NMPattern, part: str) -> "Correlated":
        """Prune every product by this pattern and part."""
        self.pattern, self.part = pattern, part
        self.errors: list[Tensor] = []
        return self

    def product(self, index: int, place: int, x: Tensor, pattern) -> Tensor:
        """One product; the stack's own pattern counts."""
        weight, x = self.weight(index, place).float(), x.float()
        if self.part == "identity":
            kept = nm_act.prune(x, self.pattern) != 0
        else:
            kept = selected(x, weight.T @ weight, self.pattern, SWEEPS if self.part == "whole" else 0)
        lost = torch.where(kept, 0.0, x) @ weight.T
        self.errors.append(lost.square().sum() / (x @ weight.T).square().sum())
        return torch.where(kept, x, 0.0).to(self.head.dtype) @ self.weight(index, place).T


def selected(x: Tensor, gram: Tensor, pattern: NMPattern, sweeps: int) -> Tensor:
    """The inputs ``[..., in]`` to keep, as a mask; without sweeps those of the largest ``x² diag(G)``.

    Examples
    --------
    >>> gram, x = torch.eye(8), torch.tensor([[1.1, 1.1, 1.0, 0.9, 1.0, 1.1, 1.1, 0.9]])
    >>> gram[0, 4] = gram[4, 0] = -0.9  # what inputs 0 and 4 give nearly cancels
    >>> selected(x, gram, NMPattern("2:4"), 0).int().tolist()
    [[1, 1, 0, 0, 0, 1, 1, 0]]
    >>> selected(x, gram, NMPattern("2:4"), 2).int().tolist()
    [[0, 1, 1, 0, 0, 1, 1, 0]]
    """
    diagonal = gram.diagonal()
    cost = x.square() * diagonal
    pruned = torch.where(_kept(cost, pattern), 0.0, x)
    if not sweeps:
        return _kept(cost, pattern)
    groups = torch.arange(x.shape[-1], device=x.device) // pattern.group
    best, least = pruned, _error(pruned, gram)
    for turn in range(sweeps * TURNS):
        others = pruned @ gram - pruned * diagonal
        new = torch.where(_kept(cost + 2 * x * others, pattern), 0.0, x)
        pruned = torch.where(groups % min(TURNS, int(groups[-1]) + 1) == turn % TURNS, new, pruned)
        error = _error(pruned, gram)
        best = torch.where(error < least, pruned, best)
        least = torch.minimum(error, least)
    return (best == 0) | (x == 0)


def _kept(cost: Tensor, pattern: NMPattern) -> Tensor:
    groups = cost.unflatten(-1, (-1, pattern.group))
    chosen = groups.topk(pattern.keep, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, chosen, True).flatten(-2)


def _error(pruned: Tensor, gram: Tensor) -> Tensor:
    return ((pruned @ gram) * pruned).sum(dim=-1, keepdim=True)


@torch.no_grad()
def correlated(session: Session) -> None:
    """Perplexity and mean error of a layer by what the selection sees, untrained, all layers."""
    window = session.options.window
    stack = Correlated(session.dense, window, torch.float32, tensors_of(session.dense))
    for pattern in ("2:4", "8:16"):
        for part in ("identity", "diagonal", "whole"):
            name = f"selection {pattern} {part}"
            if name in session.facts:
                continue
            found = {}
            for text in ("wikitext2", "c4"):
                session.need(8)
                tokens = session.tensors[f"text.{text}"].long()[: session.options.tokens].to(session.device)
                losses, errors = [], []
                for ids in tokens.split(window):
                    stack.use(NMPattern(pattern), part)
                    logits = torch.nn.functional.linear(stack.hidden(ids[None])[0, :-1], stack.head)
                    losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
                    errors.append(torch.stack(stack.errors).mean().item())
                found[text] = math.exp(torch.cat(losses).double().mean().item())
                found[f"{text} error"] = sum(errors) / len(errors)
            session.fact(name, **found)
