"""Runs of a study: every (variant, task) is one result file, so that a stopped run can continue."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...conversion.sparsify import resolved_specs
from ...layers.linear import sparse_layers
from ...version import commit
from ..cost import places_of
from .folder import PERPLEXITY, RunFolder
from .perplexity import check_finite, check_window, context_length, perplexity
from .tasks import GENERATION, harness_model, run_task
from .variants import Variant


@dataclass(frozen=True)
class Study:
    """Variants of a dense model and the tasks that they are measured on."""

    dense: nn.Module
    variants: list[Variant]
    folder: RunFolder
    tokenizer: object  # transformers.PreTrainedTokenizerBase
    tokens: Any  # torch.Tensor [tokens], int64: text of the perplexity; None leaves it out
    tasks: dict[str, Any]  # name -> lm_eval's task

    @property
    def _names(self) -> list[str]:
        return ([PERPLEXITY] if self.tokens is not None else []) + list(self.tasks)

    def announcement(self) -> str:
        """A line on how long the missing results will take."""
        missing = {name: sum(not self.folder.has(each, name) for each in self.variants) for name in self._names}
        work = {name: self._tokens_of(name) for name, count in missing.items() if count}
        if not work:
            return "every result is there already"
        duration = _duration(estimate(self.dense, sum(work[name] * missing[name] for name in work)))
        parts = ", ".join(f"{name} {missing[name]} x {count} tokens" for name, count in work.items())
        return f"estimated time: {duration} ({parts}; generated tokens are an upper bound and slower)"

    def _tokens_of(self, name: str) -> int:
        if name == PERPLEXITY:
            return int(self.tokens.numel())
        return request_tokens(self.tasks[name], self.tokenizer, self.folder.identity["limit"])

    def run(self, progress: Callable[[str], None], batch_size: int = 8) -> None:
        """Measure every variant on every task, except for results that the folder already has; `progress` gets their
        lines.

        A variant is made only if a result is missing, and released before the next one is made. A criterion that reads
        whole sequences gets a `batch_size` of 1: the harness pads the sequences of a batch to one length without a
        mask. Raises RuntimeError if the dense model's perplexity is not finite.
        """
        commit()  # of the code that is loaded now, even if the checkout changes during the run
        for variant in self.variants:
            missing = [name for name in self._names if not self.folder.has(variant, name)]
            if not missing:
                continue
            model = variant.make(self.dense).model
            facts = model_facts(model)
            at_once = 1 if _reads_sequences(model) else batch_size
            for name in missing:
                progress(f"{variant.name}: {name}")
                start = time.perf_counter()
                if name == PERPLEXITY:
                    result = perplexity_result(model, self.tokens, self.folder.identity["window"])
                    if variant.recipe is None:
                        check_finite(result["value"])
                else:
                    wrapped = harness_model(model, self.tokenizer, at_once)
                    found = run_task(self.tasks[name], wrapped, self.folder.identity["limit"])
                    result = {**vars(found), "samples": len(found.scores)}
                seconds = round(time.perf_counter() - start, 1)
                self.folder.write(variant, name, {**result, **facts, "seconds": seconds})
            del model


def _reads_sequences(model: nn.Module) -> bool:
    return any(layer.spec.scoring.by_sequence for layer in sparse_layers(model).values())


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What predicting a result's speed needs besides its recipe."""
    places = places_of(model)
    return {"layers": len({place.layer for place in places}), "width": places[0].in_features}


def perplexity_result(model: nn.Module, tokens: torch.Tensor, window: int | None) -> dict[str, Any]:
    """A perplexity as a result, with the loss of every window."""
    found = perplexity(model, tokens, window=window)
    return {
        "metric": "ppl",
        "value": found.value,
        "stderr": found.stderr,
        "samples": found.tokens,
        "scores": found.window_losses,
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(model: nn.Module, tokens: int) -> float:
    """Seconds for that many tokens, from one timed forward of the dense model."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, min(256, check_window(model, None)), dtype=torch.int64, device=device)
    with torch.inference_mode():
        model(input_ids=ids[:, :8], use_cache=False)  # the first call pays for set-up
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
    return (time.perf_counter() - start) / ids.numel() * tokens


def request_tokens(task: Any, tokenizer: Any, limit: int | None, sample: int = 16) -> int:
    """Approximate number of tokens that a task makes a model read (scored answers) or at most write (generation)."""
    documents = list(task.eval_docs)
    count = len(documents) if limit is None else min(limit, len(documents))
    if task.OUTPUT_TYPE == "generate_until":
        return count * _generated_tokens(task)
    documents = documents[: min(count, sample)]
    return sum(_choice_tokens(task, document, tokenizer) for document in documents) * count // len(documents)


def check_context(name: str, task: Any, model: nn.Module) -> None:
    """Raise a ValueError if a task writes more tokens than the model's context holds."""
    context = context_length(model)
    if task.OUTPUT_TYPE == "generate_until" and context is not None and _generated_tokens(task) >= context:
        raise ValueError(
            f"expected a context of more than the {_generated_tokens(task)} tokens that {name} writes, got {context}; "
            f"leave {name} out"
        )


def check_scored(dense: nn.Module, variant: Variant, tasks: list[str]) -> None:
    """Raise a ValueError if a variant prunes only in decode and a task scores given answers, which is prefill."""
    scored = next((task for task in tasks if task not in GENERATION), None)
    if scored is None or variant.recipe is None:
        return
    if {spec.phase for spec in resolved_specs(dense, variant.recipe).values()} == {"decode"}:
        raise ValueError(
            f"expected recipes that prune in prefill, where {scored} is scored, got only phase decode in "
            f"{variant.name!r}; use a generating task ({', '.join(sorted(GENERATION))})"
        )


def _generated_tokens(task: Any) -> int:
    return int(task.config.generation_kwargs.get("max_gen_toks", 256))


def _choice_tokens(task: Any, document: Any, tokenizer: Any) -> int:
    context, choices = task.doc_to_text(document), task.doc_to_choice(document)
    shared = context if isinstance(context, str) else task.doc_to_target(document)
    return sum(len(tokenizer(f"{shared} {choice}")["input_ids"]) for choice in choices)
