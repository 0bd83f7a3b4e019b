"""``nm-act demo``: a real language model with several N:M patterns, its quality and its speed."""

import datetime
import hashlib
import io
import platform
import time
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    check_dense,
    environment,
    load,
    model_name,
    note,
    print_json,
    print_table,
    progress_bar,
    set_threads,
    to_json,
)
from .generate import continue_text
from .ppl import DEFAULT_PATTERNS, JsonOption, ThreadsOption, format_quality, measure, variants

PROMPT = "The most important thing to remember when learning to cook is"
SAMPLED = ("dense", "2:4", "8:16")
SAMPLE_TOKENS = 40
DECODE_SECONDS = 60.0
"""No further decode round after that: on a busy machine the demo ends with fewer rounds, not minutes later."""


def demo(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder, .gguf file or hub id; SmolLM2-135M by default.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Text to evaluate on; Python's own documentation by default."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of the text to read.")] = 4096,
    threads: ThreadsOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for demo.png and demo.json.")] = Path("demo"),
    as_json: JsonOption = False,
) -> None:
    """Prune a small real model with four patterns: perplexity, decode speed, sample texts, plot, JSON."""
    from ..integrations.checkpoints import demo_model_path

    start = time.perf_counter()
    content, source = _text(text)
    place = str(demo_model_path()) if model is None else model
    set_threads(threads)
    plot_path, json_path = _prepare(out)
    dense, tokenizer = load(place, "float32")
    check_dense(dense, place)
    result = run(dense, tokenizer, content, tokens)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model_name(place),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "text": source,
        "environment": environment(),
        **result,
        "seconds": time.perf_counter() - start,
    }
    _write(result, plot_path, json_path)
    if as_json:
        print_json(result)
    else:
        _show(result, plot_path, json_path)


def run(dense, tokenizer, content: str, max_tokens: int) -> dict:
    """Measure the dense model and a sparse copy for each pattern; rows and samples as plain data."""
    from ..lab.texts import tokenize
    from ..recipe import Recipe

    # All variants live at once, for their decode speeds are measured in turns.
    made = list(variants(dense, {name: Recipe(pattern=name) for name in DEFAULT_PATTERNS}))
    models = {variant["name"]: variant["model"] for variant in made}
    rows = measure(made, tokenize(tokenizer, content, max_tokens))
    speeds = _speeds(models, tokenizer)
    for row in rows:
        speed, ratio = speeds[row["name"]], speeds[row["name"]].speedup_over(speeds["dense"])
        row["decode_tokens_per_second"] = {
            "median": speed.median,
            "p20": speed.spread[0],
            "p80": speed.spread[1],
            "rounds": len(speed.samples),
        }
        row["decode_speedup"] = {"median": ratio.median, "p20": ratio.spread[0], "p80": ratio.spread[1]}
    samples = []
    for name in SAMPLED:
        note(f"sample text, {name}")
        continuation, _ = continue_text(models[name], tokenizer, PROMPT, SAMPLE_TOKENS)
        samples.append({"name": name, "prompt": PROMPT, "text": continuation})
    return {"rows": rows, "samples": samples}


def _speeds(models: dict, tokenizer) -> dict:
    from ..lab.evaluate.decode_speed import decode_speed

    note("decode speed, all in turns")
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with progress_bar("decode speed") as update:
        return decode_speed(models, prompt, max_seconds=DECODE_SECONDS, progress=update)


def _prepare(out: Path) -> tuple[Path, Path]:
    """Make the folder and find out now, not in minutes, that the files cannot be written or drawn."""
    import matplotlib.figure  # noqa: F401

    from ..files import check_writable

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise type(error)(f"cannot make the folder {str(out)!r}: {reason}; choose another --out") from error
    paths = out / "demo.png", out / "demo.json"
    for path in paths:
        check_writable(path)
    return paths


def _text(path: Path | None) -> tuple[str, dict]:
    """The text to evaluate on and where it is from."""
    if path is not None:
        from ..lab.texts import read_text

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


def _show(result: dict, plot_path: Path, json_path: Path) -> None:
    machine = result["environment"]
    rows = []
    for row in result["rows"]:
        speed, ratio = row["decode_tokens_per_second"], row["decode_speedup"]
        rows.append(
            [
                row["name"],
                *format_quality(row),
                f"{speed['median']:.1f}",
                f"{speed['p20']:.1f} - {speed['p80']:.1f}",
                f"{ratio['median']:.2f}x",
            ]
        )
    first = result["rows"][0]
    print_table(
        f"{result['model']}, {result['dtype']}, {machine['threads']} threads on {machine['cpu']}",
        ["", "perplexity", "change", "decode tokens/s", "p20 - p80", "speed-up"],
        rows,
        caption=f"Perplexity: {first['tokens']} tokens predicted in {first['windows']} windows of "
        f"{first['window']}, {result['text']['source']}. Decode: batch 1, all models in turns, medians.",
    )
    for sample in result["samples"]:
        print(f"[{sample['name']}] {sample['prompt']}{sample['text'].rstrip()}\n")
    print(f"{result['seconds']:.0f} s; wrote {plot_path} and {json_path}")


def _write(result: dict, plot_path: Path, json_path: Path) -> None:
    from ..files import write_atomic

    plot = draw(result)  # everything is computed before the first file appears
    write_atomic(plot_path, plot)
    write_atomic(json_path, to_json(result) + "\n")


def draw(result: dict) -> bytes:
    """PNG with two panels: perplexity and decode speed of every row of `result`."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    names = [row["name"] for row in rows]
    colours = ["0.55" if name == "dense" else "C0" for name in names]
    speeds = [row["decode_tokens_per_second"] for row in rows]
    medians = [speed["median"] for speed in speeds]
    errors = [
        [speed["median"] - speed["p20"] for speed in speeds],
        [speed["p80"] - speed["median"] for speed in speeds],
    ]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    bars = quality.bar(names, [row["perplexity"] for row in rows], color=colours)
    quality.bar_label(bars, fmt="%.1f", padding=2)
    quality.set_title("Perplexity (lower is better)", fontsize=10)
    bars = speed.bar(names, medians, yerr=errors, capsize=3, color=colours)
    speed.bar_label(bars, labels=[f"{median:.1f}" for median in medians], padding=2)
    speed.set_title("Decode tokens/s, batch 1 (higher is better; p20 - p80)", fontsize=10)
    for axes in (quality, speed):
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    machine = result["environment"]
    figure.suptitle(
        f"{result['model']}, {result['dtype']}, {machine['cpu']}, {machine['threads']} threads", fontsize=11
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
