"""``nm-act demo``: quality and speed of a real language model with the recommended recipe and with plain patterns."""

import dataclasses
import datetime
import hashlib
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from . import options as opt
from .generate import continue_text

PROMPT = "The most important thing to remember when learning to cook is"
RECOMMENDED = "decode"
"""Name of the recommended recipe for decode, which the demo times."""

SAMPLED = ("dense", RECOMMENDED, "2:4")
SAMPLE_TOKENS = 40
DECODE_SECONDS = 60.0
"""Time after which no decode round starts: on a busy machine, the demo runs fewer rounds instead of minutes longer."""


def demo(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder, .gguf file or hub id; SmolLM2-135M by default.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Text to evaluate on; Python's own documentation by default."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of the text to read.")] = 4096,
    threads: opt.Threads = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for demo.png and demo.json.")] = Path("demo"),
    as_json: opt.AsJson = False,
) -> None:
    """Prune a small real model by the recommended recipe and by plain patterns: perplexity, decode speed, samples."""
    from ..files import check_writable, write_atomic
    from ..integrations.checkpoints import demo_model_path
    from ..lab.output import make_folder, write_json
    from ..supported import require

    require("matplotlib.figure", "demo", "the plot")  # not after minutes of work
    start = time.perf_counter()
    content, source = _text(text)
    place = str(demo_model_path()) if model is None else model
    common.set_threads(threads)
    make_folder(out, out, "--out")
    plot_path, json_path = out / "demo.png", out / "demo.json"
    for path in (plot_path, json_path):
        check_writable(path)
    dense, tokenizer = common.load_dense(place, "float32")
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": common.model_name(place),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "text": source,
        "environment": common.environment(),
        **_measure(dense, tokenizer, content, tokens),
        "seconds": time.perf_counter() - start,
    }
    plot = _draw(result)  # everything is computed before the first file appears
    write_atomic(plot_path, plot)
    write_json(json_path, result)
    if as_json:
        common.print_json(result)
        return
    _show(result)
    print(f"{result['seconds']:.0f} s; wrote {plot_path} and {json_path}")


def _measure(dense: Any, tokenizer: Any, content: str, max_tokens: int) -> dict[str, Any]:
    """Rows and samples of the dense model and a sparse copy per recipe, as plain data."""
    from ..lab.evaluate.compare import compare
    from ..lab.evaluate.decode_speed import decode_speed
    from ..lab.evaluate.variants import DENSE_VARIANT, from_recipe
    from ..lab.texts import tokenize
    from ..recipe import Recipe

    # All variants live at once, because their decode speeds are measured in turns.
    # Perplexity is measured in prefill, where the recipe for decode would prune nothing, so it is applied to all
    # tokens.
    chosen = {RECOMMENDED: dataclasses.replace(Recipe.named(RECOMMENDED), phase="both")}
    chosen |= {pattern: Recipe(pattern) for pattern in opt.DEFAULT_PATTERNS}
    variants = [DENSE_VARIANT, *(from_recipe(recipe, name) for name, recipe in chosen.items())]
    reports = {variant.name: variant.make(dense) for variant in variants}
    models = {name: report.model for name, report in reports.items()}
    tokens = tokenize(tokenizer, content, max_tokens)
    rows = compare(reports.items(), tokens, note=common.note, bar=common.progress_bar)
    common.note("decode speed, all in turns")
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with common.progress_bar("decode speed") as update:
        speeds = decode_speed(models, prompt, max_seconds=DECODE_SECONDS, progress=update)
    for row in rows:
        speed = speeds[row["name"]]
        row["decode_tokens_per_second"] = _figures(speed) | {"rounds": len(speed.samples)}
        row["decode_speedup"] = _figures(speed.speedup_over(speeds["dense"]))
    samples = []
    for name in SAMPLED:
        common.note(f"sample text, {name}")
        continuation, _ = continue_text(models[name], tokenizer, PROMPT, SAMPLE_TOKENS)
        samples.append({"name": name, "prompt": PROMPT, "text": continuation})
    return {"rows": rows, "samples": samples}


def _figures(speed: Any) -> dict[str, Any]:
    return {"median": speed.median, "p20": speed.spread[0], "p80": speed.spread[1]}


def _text(path: Path | None) -> tuple[str, dict[str, Any]]:
    """The text to evaluate on and where it is from."""
    from ..lab.texts import read_text

    if path is not None:
        content, source = read_text(path), str(path)
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError("this Python comes without pydoc_data.topics; name a text with --text FILE") from error
        # Sorted, because the order of the topics differs between Python versions.
        content = "\n\n".join(topics[key] for key in sorted(topics))
        source = f"pydoc_data.topics of Python {platform.python_version()}"
    return content, {"source": source, "sha256": hashlib.sha256(content.encode()).hexdigest()}


def _title(result: dict[str, Any]) -> str:
    machine = result["environment"]
    return f"{result['model']}, {result['dtype']}, {machine['threads']} threads on {machine['cpu']}"


def _show(result: dict[str, Any]) -> None:
    rows = []
    for row in result["rows"]:
        speed, ratio = row["decode_tokens_per_second"], row["decode_speedup"]
        spread = f"{speed['p20']:.1f} - {speed['p80']:.1f}"
        cells = [f"{speed['median']:.1f}", spread, f"{ratio['median']:.2f}x"]
        rows.append([row["name"], *common.format_quality(row), *cells])
    first = result["rows"][0]
    common.print_table(
        _title(result),
        ["", "perplexity", "change", "decode tokens/s", "p20 - p80", "speed-up"],
        rows,
        caption=f"Perplexity: {first['tokens']} tokens predicted in {first['windows']} windows of "
        f"{first['window']}, {result['text']['source']}. Decode: batch 1, all models in turns, medians. "
        f"{RECOMMENDED}: the recommended recipe; patterns: the same one in every layer, 2:4 to show what not to do.",
    )
    for sample in result["samples"]:
        print(f"[{sample['name']}] {sample['prompt']}{sample['text'].rstrip()}\n")


def _draw(result: dict[str, Any]) -> bytes:
    """PNG with two panels: perplexity and decode speed of every row of `result`."""
    from ..lab.output import new_figure, png

    rows = result["rows"]
    names = [row["name"] for row in rows]
    colours = ["0.55" if name == "dense" else "C0" for name in names]
    speeds = [row["decode_tokens_per_second"] for row in rows]
    errors = [
        [speed["median"] - speed["p20"] for speed in speeds],
        [speed["p80"] - speed["median"] for speed in speeds],
    ]
    figure = new_figure(9, 3.8)
    quality, speed = figure.subplots(1, 2)
    bars = quality.bar(names, [row["perplexity"] for row in rows], color=colours)
    quality.bar_label(bars, fmt="%.1f", padding=2)
    quality.set_title("Perplexity (lower is better)", fontsize=10)
    bars = speed.bar(names, [each["median"] for each in speeds], yerr=errors, capsize=3, color=colours)
    speed.bar_label(bars, fmt="%.1f", padding=2)
    speed.set_title("Decode tokens/s, batch 1 (higher is better; p20 - p80)", fontsize=10)
    for axes in (quality, speed):
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(result), fontsize=11)
    return png(figure)
