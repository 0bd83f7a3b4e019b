"""``nm-act generate``: continue a prompt, dense or sparse, and show the text as it comes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from . import common
from . import options as opt
from .recipes import build_recipes, check_uncalibrated


def generate(
    model: opt.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.", show_default=False)],
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", metavar="N:M", help="Pattern, e.g. 2:4+1; without one the model stays as it is."),
    ] = None,
    recipe: opt.Recipe = None,
    criterion: opt.Criterion = None,
    mitigation: opt.Mitigations = None,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Merge projections and fuse norms; the text stays the same.")
    ] = False,
    fp8: Annotated[
        str | None,
        typer.Option("--fp8", metavar="PHASES", help="With --optimize: e4m3 weights for prefill, decode or both."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="KIND", help="With --optimize: the output head in int8 or e4m3."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to add at most.")] = 128,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
) -> None:
    """Continue a prompt greedily and stream the text to stdout."""
    from ..lab.evaluate.variants import from_recipe

    if not prompt:
        raise ValueError("expected a prompt with at least one character, got an empty one")
    if not optimize and (fp8 is not None or head is not None):
        raise ValueError("expected --optimize with --fp8 and --head, got none; add it")
    _check_8_bits(fp8, head)
    recipes = build_recipes(recipe, None if pattern is None else [pattern], criterion, mitigation)
    variants = [from_recipe(made, name) for name, made in recipes.items()]
    check_uncalibrated(variants, "name the model that it writes, without --recipe")
    common.set_threads(threads)
    config = common.load_config(model)
    if variants:
        common.check_not_sparse(config, model)
    tokenizer = _check_context(config, model, prompt, max_new_tokens)
    network, tokenizer = common.load(model, dtype, device, config=config, tokenizer=tokenizer)
    name = "as loaded"
    if variants:
        from ..conversion.sparsify import sparsify

        name = variants[0].name
        sparsify(network, next(iter(recipes.values())))
    if optimize:
        from ..optimize import optimize as merge_and_fuse

        merge_and_fuse(network, fp8=fp8, head=head)
        name += ", optimized"
        name += f", weights in e4m3 for {fp8}" if fp8 else ""
        name += f", head in {head}" if head else ""
    start = time.perf_counter()
    text, count = continue_text(network, tokenizer, prompt, max_new_tokens, stream=not as_json)
    seconds = time.perf_counter() - start
    if as_json:
        result = {"model": common.model_name(model), "variant": name, "prompt": prompt, "text": text}
        common.print_json({**result, "new_tokens": count, "seconds": seconds})
    else:
        common.note(f"{count} tokens in {seconds:.1f} s ({name})")


def _check_8_bits(fp8: str | None, head: str | None) -> None:
    """Raise the ValueError of `nm_act.optimize` for an unknown layout or kind."""
    if fp8 is not None:
        from ..ops.e4m3 import check_layout

        check_layout(fp8)
    if head is not None:
        from ..optimize.head import check_kind

        check_kind(head)


_SPECIAL = 16  # tokens that a tokenizer adds to a prompt, at most


def _check_context(config: Any, model: str, prompt: str, new: int) -> Any:
    """Raise a ValueError if prompt and new tokens exceed the context; a token of the prompt is a byte at least.

    Returns the tokenizer if it had to be read.
    """
    from ..integrations.checkpoints import load_tokenizer
    from ..lab.evaluate.perplexity import context_length

    context = context_length(config)
    if context is None or len(prompt.encode()) + _SPECIAL + new <= context:
        return None
    tokenizer = load_tokenizer(model)
    length = 0 if tokenizer is None else len(tokenizer(prompt)["input_ids"])
    if length + new > context:
        raise ValueError(
            f"expected prompt and new tokens within the model's context of {context} tokens, got {length} and {new}; "
            "use --max-new-tokens or shorten the prompt"
        )
    return tokenizer


def continue_text(
    network: Any, tokenizer: Any, prompt: str, max_new_tokens: int, stream: bool = False
) -> tuple[str, int]:
    """Greedy continuation of `prompt` and its number of tokens; `stream` also writes all text to stdout.

    Only the special tokens of the model's generation_config apply: with beams, penalties and the like, the next token
    would not be the most probable one.
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
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True) if stream else None,
        )
    if stream:
        sys.stdout.flush()
    new = output[0, length:]
    return tokenizer.decode(new, skip_special_tokens=True), int(new.numel())


@contextmanager
def _greedy(network: Any) -> Iterator[None]:
    """The model with only the special tokens of its generation_config, whose other settings would affect a call."""
    import transformers

    config: Any = transformers.GenerationConfig

    own = network.generation_config
    ends = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network.generation_config = config(**ends)
    try:
        yield
    finally:
        network.generation_config = own
