"""Runs of a study: every (variant, task) is one result file, so that a killed run goes on where it was."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import nn

from ...layers.linear import NMLinear
from ...version import commit
from ..cost import extra_macs, macs_by_pattern
from .folder import PERPLEXITY, RunFolder
from .perplexity import check_finite, check_window, context_length, perplexity
from .study import Variant
from .tasks import harness_model, run_task

__all__ = ["run_study"]


def run_study(
    models: Iterable[tuple[Variant, Callable[[], nn.Module]]],
    folder: RunFolder,
    tokenizer,
    *,
    tokens: torch.Tensor | None,
    tasks: dict,
    progress: Callable[[str], None],
    batch_size: int = 8,
) -> None:
    """Measure what is missing of every variant on every task.

    Parameters
    ----------
    models : iterable of (Variant, callable)
        The callable makes the variant's model; it is called only if a result is missing, and its model is released
        before the next one is made.
    folder : RunFolder
    tokenizer : transformers.PreTrainedTokenizerBase
    tokens : Tensor [tokens], int64, optional
        Text of the perplexity; None leaves it out.
    tasks : dict of str to lm_eval Task
        Tasks of the harness.
    progress : callable
        Called with a line before each measurement.
    batch_size : int
        Of the harness's requests; 1 is used with a criterion that reads whole sequences: the harness pads those of a
        batch to one length and does not say so.

    Raises
    ------
    RuntimeError
        If the dense model's perplexity is not finite.
    """
    names = ([PERPLEXITY] if tokens is not None else []) + list(tasks)
    commit()  # of the code that is loaded now, whatever happens to the checkout later
    for variant, make in models:
        missing = [name for name in names if not folder.has(variant, name)]
        if not missing:
            continue
        model = make()
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
                result = {
                    "metric": found.metric,
                    "value": found.value,
                    "stderr": found.stderr,
                    "samples": len(found.scores),
                    "scores": found.scores,
                }
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
        # Mean loss a window: what paired differences are taken of.
        "scores": [loss * found.windows / found.tokens for loss in found.window_nll],
    }


def estimate(model: nn.Module, tokens: int, rows: int) -> float:
    """Seconds that `rows` models would take for `tokens` tokens each, from one timed forward of the dense model."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, min(256, check_window(model, None)), dtype=torch.int64, device=device)
    with torch.inference_mode():
        model(input_ids=ids[:, :8], use_cache=False)  # the first call pays for set-up
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
    return (time.perf_counter() - start) / ids.numel() * tokens * rows


def request_tokens(task, tokenizer, limit: int | None, sample: int = 16) -> int:
    """About how many tokens a task makes a model read (scored answers) or write at most (generation)."""
    documents = list(task.eval_docs)
    count = len(documents) if limit is None else min(limit, len(documents))
    documents = documents[: min(count, sample)]
    if task.OUTPUT_TYPE == "generate_until":
        return count * _generated_tokens(task)
    read = sum(_choice_tokens(task, document, tokenizer) for document in documents)
    return read * count // len(documents)


def check_context(name: str, task, model: nn.Module) -> None:
    """Raise a ValueError if a task writes more tokens than the model's context holds."""
    context = context_length(model)
    if task.OUTPUT_TYPE == "generate_until" and context is not None and _generated_tokens(task) >= context:
        raise ValueError(
            f"expected a context of more than the {_generated_tokens(task)} tokens that {name} writes, got {context}; "
            f"leave {name} out"
        )


def _generated_tokens(task) -> int:
    return int(task.config.generation_kwargs.get("max_gen_toks", 256))


def _choice_tokens(task, document, tokenizer) -> int:
    context, choices = task.doc_to_text(document), task.doc_to_choice(document)
    shared = context if isinstance(context, str) else task.doc_to_target(document)
    return sum(len(tokenizer(f"{shared} {choice}")["input_ids"]) for choice in choices)
