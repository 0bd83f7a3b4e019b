"""Runs of a study: every (variant, task) is one result file, so that a stopped run continues where it was."""

import time
from collections.abc import Callable

import torch
from torch import nn

from ...conversion.sparsify import resolved_specs
from ...layers.linear import NMLinear
from ...version import commit
from ..cost import extra_macs, macs_by_pattern
from .folder import PERPLEXITY, RunFolder
from .perplexity import check_finite, check_window, context_length, perplexity
from .tasks import GENERATION, harness_model, run_task
from .variants import Variant

__all__ = ["announce", "check_context", "check_scored", "run_study"]


def run_study(
    dense: nn.Module,
    variants: list[Variant],
    folder: RunFolder,
    tokenizer,
    *,
    tokens: torch.Tensor | None,
    tasks: dict,
    progress: Callable[[str], None],
    batch_size: int = 8,
) -> None:
    """Measure every variant on every task, except for results that the folder has.

    Parameters
    ----------
    dense : nn.Module
    variants : list of Variant
        Each is made only if a result is missing, and released before the next one is made.
    folder : RunFolder
    tokenizer : transformers.PreTrainedTokenizerBase
    tokens : Tensor [tokens], int64, optional
        Text of the perplexity; None leaves it out.
    tasks : dict of str to lm_eval Task
        Tasks of the harness.
    progress : callable
        Called with a line before each measurement.
    batch_size : int
        Of the harness's requests. A criterion that reads whole sequences gets 1: the harness pads the sequences of a
        batch to one length without a mask.

    Raises
    ------
    RuntimeError
        If the dense model's perplexity is not finite.
    """
    names = ([PERPLEXITY] if tokens is not None else []) + list(tasks)
    commit()  # of the code that is loaded now, even if the checkout changes during the run
    for variant in variants:
        missing = [name for name in names if not folder.has(variant, name)]
        if not missing:
            continue
        model = variant.make(dense).model
        macs = {"macs": macs_by_pattern(model), "extra_macs": extra_macs(model)}
        for name in missing:
            progress(f"{variant.name}: {name}")
            start = time.perf_counter()
            if name == PERPLEXITY:
                result = _perplexity(model, tokens, folder.identity["window"])
                if variant.recipe is None:
                    check_finite(result["value"])
            else:
                at_once = 1 if _reads_sequences(model) else batch_size
                found = run_task(tasks[name], harness_model(model, tokenizer, at_once), folder.identity["limit"])
                result = {**vars(found), "samples": len(found.scores)}
            folder.write(variant, name, {**result, **macs, "seconds": round(time.perf_counter() - start, 1)})
        del model


def _reads_sequences(model: nn.Module) -> bool:
    return any(isinstance(module, NMLinear) and module.spec.criterion == "clact" for module in model.modules())


def _perplexity(model, tokens: torch.Tensor, window: int | None) -> dict:
    found = perplexity(model, tokens, window=window)
    return {
        "metric": "ppl",
        "value": found.value,
        "stderr": found.stderr,
        "samples": found.tokens,
        "scores": found.window_losses,
    }


def announce(
    dense: nn.Module,
    variants: list[Variant],
    folder: RunFolder,
    tokenizer,
    *,
    tokens: torch.Tensor | None,
    tasks: dict,
    limit: int | None,
) -> str:
    """A line on how long the missing results will take; the arguments are those of `run_study`."""
    work = {PERPLEXITY: tokens.numel()} if tokens is not None else {}
    work |= {name: request_tokens(task, tokenizer, limit) for name, task in tasks.items()}
    missing = {name: sum(not folder.has(variant, name) for variant in variants) for name in work}
    total = sum(work[name] * count for name, count in missing.items())
    if not total:
        return "every result is there already"
    parts = ", ".join(f"{name} {count} x {work[name]} tokens" for name, count in missing.items() if count)
    duration = _duration(estimate(dense, total))
    return f"estimated time: {duration} ({parts}; generated tokens are an upper bound and slower)"


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


def request_tokens(task, tokenizer, limit: int | None, sample: int = 16) -> int:
    """About how many tokens a task makes a model read (scored answers) or write at most (generation)."""
    documents = list(task.eval_docs)
    count = len(documents) if limit is None else min(limit, len(documents))
    if task.OUTPUT_TYPE == "generate_until":
        return count * _generated_tokens(task)
    documents = documents[: min(count, sample)]
    return sum(_choice_tokens(task, document, tokenizer) for document in documents) * count // len(documents)


def check_context(name: str, task, model: nn.Module) -> None:
    """Raise a ValueError if a task writes more tokens than the model's context holds."""
    context = context_length(model)
    if task.OUTPUT_TYPE == "generate_until" and context is not None and _generated_tokens(task) >= context:
        raise ValueError(
            f"expected a context of more than the {_generated_tokens(task)} tokens that {name} writes, got {context}; "
            f"leave {name} out"
        )


def check_scored(dense: nn.Module, variant: Variant, tasks: list[str]) -> None:
    """Raise a ValueError if a variant prunes in decode only, and a task scores given answers, which is prefill."""
    scored = next((task for task in tasks if task not in GENERATION), None)
    if scored is not None and {spec.phase for spec in resolved_specs(dense, variant.recipe).values()} == {"decode"}:
        raise ValueError(
            f"expected recipes that prune in prefill, where {scored} is scored, got only phase decode in "
            f"{variant.name!r}; use a generating task ({', '.join(sorted(GENERATION))})"
        )


def _generated_tokens(task) -> int:
    return int(task.config.generation_kwargs.get("max_gen_toks", 256))


def _choice_tokens(task, document, tokenizer) -> int:
    context, choices = task.doc_to_text(document), task.doc_to_choice(document)
    shared = context if isinstance(context, str) else task.doc_to_target(document)
    return sum(len(tokenizer(f"{shared} {choice}")["input_ids"]) for choice in choices)
