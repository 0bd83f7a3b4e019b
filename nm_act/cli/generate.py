"""``nm-act generate``: continue a prompt, dense or sparse, and show the text as it comes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .common import load, model_name, note, print_json, set_threads
from .ppl import (
    CriterionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MitigationOption,
    ModelArgument,
    RecipeOption,
    ThreadsOption,
    build_recipes,
    check_uncalibrated,
)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.", show_default=False)],
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", metavar="N:M", help="Pattern, e.g. 2:4+1; without one the model stays as it is."),
    ] = None,
    recipe: RecipeOption = None,
    criterion: CriterionOption = None,
    mitigation: MitigationOption = None,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Merge projections and fuse norms; the text stays the same.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to add at most.")] = 128,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt greedily and stream the text to stdout."""
    if max_new_tokens < 1:
        raise ValueError(f"expected --max-new-tokens of at least 1, got {max_new_tokens}")
    if not prompt:
        raise ValueError("expected a prompt with at least one character, got an empty one")
    if (criterion is not None or mitigation) and pattern is None and recipe is None:
        raise ValueError("expected --pattern or --recipe with --criterion and --mitigation, got neither; add one")
    recipes = build_recipes(recipe, None if pattern is None else [pattern], criterion, mitigation)
    check_uncalibrated(recipes.items(), "name the model that it writes, without --recipe")
    set_threads(threads)
    network, tokenizer = load(model, dtype, device)
    name = "as loaded"
    if recipes:
        from ..conversion.sparsify import sparsify

        [(name, chosen)] = recipes.items()
        sparsify(network, chosen)
    if optimize:
        from ..optimize import optimize as merge_and_fuse

        merge_and_fuse(network)
        name += ", optimized"
    start = time.perf_counter()
    text, count = continue_text(network, tokenizer, prompt, max_new_tokens, stream=not as_json)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "model": model_name(model),
                "variant": name,
                "prompt": prompt,
                "text": text,
                "new_tokens": count,
                "seconds": seconds,
            }
        )
    else:
        note(f"{count} tokens in {seconds:.1f} s ({name})")


def continue_text(network, tokenizer, prompt: str, max_new_tokens: int, stream: bool = False) -> tuple[str, int]:
    """Greedy continuation of `prompt` and its number of tokens; `stream` also writes all text to stdout.

    Of the model's generation_config only the tokens that end a text count: beams, penalties and the like would make
    of it something else than the most probable next token, each time.
    """
    import torch
    from transformers import TextStreamer

    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError("expected a prompt that makes at least one token, got none; write more text")
    with torch.inference_mode(), _greedy(network):
        output = network.generate(
            input_ids=inputs["input_ids"].to(network.device),
            attention_mask=inputs["attention_mask"].to(network.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=_pad_token(tokenizer),
            streamer=TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True) if stream else None,
        )
    if stream:
        sys.stdout.flush()
    new = output[0, length:]
    return tokenizer.decode(new, skip_special_tokens=True), int(new.numel())


@contextmanager
def _greedy(network) -> Iterator[None]:
    """The model without its generation_config's settings: Transformers fills in those that a call leaves out."""
    from transformers import GenerationConfig

    own = network.generation_config
    ends = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network.generation_config = GenerationConfig(**ends)
    try:
        yield
    finally:
        network.generation_config = own


def _pad_token(tokenizer) -> int | None:
    """Any id will do for one prompt; naming one keeps Transformers from warning."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
