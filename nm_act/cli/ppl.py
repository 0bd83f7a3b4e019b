"""``nm-act ppl``: perplexity of a model, dense and with one or several patterns, on a text."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from . import options as opt
from .recipes import build_recipes, check_uncalibrated, once


def ppl(
    model: opt.Model,
    text: Annotated[Path, typer.Option("--text", help='UTF-8 text, or .jsonl with "text" fields.')],
    pattern: opt.Patterns = None,
    recipe: opt.Recipe = None,
    criterion: opt.Criterion = None,
    mitigation: opt.Mitigations = None,
    calibration: opt.Calibrations = None,
    window: opt.Window = None,
    max_tokens: opt.MaxTokens = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the result to a .json or .csv file.")] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure the perplexity of the dense model and its sparse variants in non-overlapping windows.

    Layers whose phase is decode are sparse for every token here, as the name of the row says.
    """
    from ..lab.evaluate.calibrated import of_calibration
    from ..lab.evaluate.compare import compare
    from ..lab.evaluate.variants import DENSE_VARIANT, every_token_sparse, from_recipe, prunes_in_decode_only
    from ..lab.texts import read_text, tokenize

    _check_out(out)
    recipes = build_recipes(recipe, pattern, criterion, mitigation, () if calibration else opt.DEFAULT_PATTERNS)
    variants = [from_recipe(each, name) for name, each in recipes.items()]
    check_uncalibrated(variants, "name the folder with --calibration")
    for folder in once(calibration, "--calibration"):
        found = of_calibration(folder)
        taken = found.name in (variant.name for variant in variants)
        variants.append(dataclasses.replace(found, name=str(folder)) if taken else found)
    for index, variant in enumerate(variants):  # a window is prefill, where layers of phase decode would be dense
        if prunes_in_decode_only(variant.recipe):
            variants[index] = dataclasses.replace(variant, name=f"{variant.name}, every token sparse")
    content = read_text(text)
    common.set_threads(threads)
    dense, tokenizer = common.load_dense(model, dtype, device, window)
    tokens = tokenize(tokenizer, content, max_tokens)
    for variant in variants:
        variant.check(dense)
    reports = ((each.name, every_token_sparse(each.make(dense))) for each in (DENSE_VARIANT, *variants))
    rows = compare(reports, tokens, window, note=common.note, bar=common.progress_bar)
    result = {
        "model": common.model_name(model),
        "text": str(text),
        **{key: rows[0][key] for key in ("tokens", "windows", "window")},
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "environment": common.environment(),
        "rows": rows,
    }
    if out is not None:
        _write(out, result)
    if as_json:
        common.print_json(result)
        return
    common.print_table(
        f"Perplexity of {result['model']} ({result['dtype']}) on {text.name}",
        ["", "perplexity", "change", "sparse MACs", "seconds"],
        [
            [row["name"], *common.format_quality(row), f"{row['mac_fraction']:.0%}", f"{row['seconds']:.1f}"]
            for row in rows
        ],
        caption=f"{result['tokens']} tokens predicted in {result['windows']} windows of {result['window']}",
    )


def _check_out(out: Path | None) -> None:
    from ..files import check_writable

    if out is None:
        return
    if out.suffix not in (".json", ".csv"):
        raise ValueError(f"expected --out to end in .json or .csv, got {str(out)!r}; rename it")
    check_writable(out)


def _write(out: Path, result: dict[str, Any]) -> None:
    from ..files import write_atomic
    from ..lab.output import to_csv, write_json

    if out.suffix == ".json":
        write_json(out, result)
        return
    run = {key: result[key] for key in ("model", "text", "dtype", "device")}
    rows = [{**run, **row} for row in result["rows"]]
    write_atomic(out, to_csv(rows, [key for key in rows[0] if key != "recipe"]))
