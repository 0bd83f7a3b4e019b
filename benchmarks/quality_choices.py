"""Multiple-choice tasks without the harness: the likelihood of every answer, many documents at once.

The prompts are those that lm-evaluation-harness 0.4.13 gives these data sets, zero-shot, and the score is its ``acc``:
whether the right answer has the largest log-likelihood. A test compares both, document by document.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Question:
    """One document: (context, continuation) of each answer, and the index of the right one."""

    answers: tuple[tuple[str, str], ...]
    right: int


def _query(row: dict[str, Any]) -> Question:
    return Question(tuple((f"{row['query']}\nAnswer:", f" {choice}") for choice in row["choices"]), int(row["gold"]))


def _goal(row: dict[str, Any]) -> Question:
    answers = tuple((f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2"))
    return Question(answers, int(row["label"]))


def _endings(row: dict[str, Any]) -> Question:
    return Question(tuple((row["query"], f" {choice}") for choice in row["choices"]), int(row["label"]))


def _partial(row: dict[str, Any]) -> Question:
    answers = tuple((context, f" {row['continuation']}") for context in row["context_options"])
    return Question(answers, int(row["gold"]))


CHOICES: dict[str, Callable[[dict[str, Any]], Question]] = {
    "arc_easy": _query,
    "arc_challenge": _query,
    "boolq": _query,
    "piqa": _goal,
    "hellaswag": _endings,
    "winogrande": _partial,
}
"""Task -> its question from a row in the layout of a data folder (docs/evaluate.md)."""


def tokenized(tokenizer: Any, questions: list[Question]) -> list[list[tuple[list[int], int]]]:
    """Token ids of every answer with its context, and how many of them are the continuation."""
    found = []
    for question in questions:
        answers = []
        for context, continuation in question.answers:
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            whole = tokenizer(stripped + continuation)["input_ids"]
            answers.append((whole, len(whole) - len(tokenizer(stripped)["input_ids"])))
        found.append(answers)
    return found


@torch.inference_mode()
def score(
    model: nn.Module, answers: list[list[tuple[list[int], int]]], right: list[int], tokens: int = 16384
) -> list[float]:
    """1.0 or 0.0 for every document: whether the right answer is the likeliest.

    Parameters
    ----------
    model : nn.Module
        Causal; no criterion that reads whole sequences, because those of a batch are padded at the end.
    answers : list
        From `tokenized`.
    right : list of int
    tokens : int
        In one batch, padding included.

    Raises
    ------
    RuntimeError
        If a likelihood is NaN.
    """
    requests = [(ids, count, i, j) for i, each in enumerate(answers) for j, (ids, count) in enumerate(each)]
    requests.sort(key=lambda request: len(request[0]))
    device = next(model.parameters()).device
    likelihoods = [[0.0] * len(each) for each in answers]
    start = 0
    while start < len(requests):
        end = start + 1
        while end < len(requests) and (end + 1 - start) * (len(requests[end][0]) - 1) <= tokens:
            end += 1
        batch = requests[start:end]
        longest = len(batch[-1][0]) - 1  # the last token is only predicted
        inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
        targets = torch.full((len(batch), longest), -100)
        for row, (ids, count, _, _) in enumerate(batch):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            targets[row, len(ids) - 1 - count : len(ids) - 1] = torch.tensor(ids[-count:])
        kept = targets.ne(-100)
        first = int(kept.any(dim=0).nonzero()[0])
        logits = model(input_ids=inputs.to(device), use_cache=False, logits_to_keep=longest - first).logits
        kept, targets = kept[:, first:].to(device), targets[:, first:].to(device)
        losses = torch.zeros(kept.shape, dtype=torch.float64, device=device)
        # Only of continuations: float32 logits of every token are most of the memory.
        losses[kept] = nn.functional.cross_entropy(logits[kept].float(), targets[kept], reduction="none").double()
        sums = losses.sum(dim=-1).tolist()
        for (_, _, i, j), value in zip(batch, sums, strict=True):
            likelihoods[i][j] = -value
        start = end
    if any(value != value for each in likelihoods for value in each):
        raise RuntimeError("expected finite likelihoods from the model, got NaN; use float32")
    chosen = [max(range(len(each)), key=each.__getitem__) for each in likelihoods]
    return [float(index == wanted) for index, wanted in zip(chosen, right, strict=True)]
