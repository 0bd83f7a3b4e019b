"""``nm-act ppl``: perplexity of a model, dense and with one or several patterns, on a text."""

import csv
import dataclasses
import io
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    check_dense,
    environment,
    load,
    load_config,
    load_recipe,
    model_name,
    note,
    print_json,
    print_table,
    progress_bar,
    set_threads,
    to_json,
)

DEFAULT_PATTERNS = ("2:4", "4:8", "8:16", "16:32")

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder, .gguf file or hub id of the model.", show_default=False),
]
PatternOption = Annotated[
    list[str] | None, typer.Option("--pattern", metavar="N:M", help="Pattern, e.g. 8:16 or 2:4+1; repeatable.")
]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="Recipe (.yaml, .yml or .json); --pattern replaces its pattern."),
]
CriterionOption = Annotated[
    str | None, typer.Option("--criterion", help="How activations are scored, e.g. act, wina, amber.")
]
MitigationOption = Annotated[
    list[str] | None,
    typer.Option("--mitigation", help="Error mitigation, e.g. var; may be given several times."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs, e.g. cpu or cuda.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="CPU threads; torch's choice by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def ppl(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", help='UTF-8 text, or .jsonl with "text" fields.')],
    pattern: PatternOption = None,
    recipe: RecipeOption = None,
    criterion: CriterionOption = None,
    mitigation: MitigationOption = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibration", help="Folder written by nm-act calibrate; may be given several times."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", min=2, help="Tokens per window; 2048 or the model's context by default."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Read only that many tokens.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the result to a .json or .csv file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity in non-overlapping windows; the dense model is always measured in the same run."""
    from ..conversion.calibration import read_calibration
    from ..lab.evaluate.perplexity import check_window
    from ..lab.texts import read_text, tokenize

    _check_out(out)
    defaults = () if calibration else DEFAULT_PATTERNS
    recipes = build_recipes(recipe, pattern, criterion, mitigation, default_patterns=defaults)
    check_uncalibrated(recipes.items(), "name the folder with --calibration")
    calibration = once(calibration, "--calibration")
    for folder in calibration:
        read_calibration(folder)
    content = read_text(text)
    set_threads(threads)
    if window is not None:
        check_window(load_config(model), window)
    dense, tokenizer = load(model, dtype, device)
    check_dense(dense, model)
    tokens = tokenize(tokenizer, content, max_tokens)
    rows = measure(variants(dense, recipes, calibration), tokens, window)
    result = {
        "model": model_name(model),
        "text": str(text),
        "tokens": rows[0]["tokens"],
        "windows": rows[0]["windows"],
        "window": rows[0]["window"],
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "environment": environment(),
        "rows": rows,
    }
    if out is not None:
        _write(out, result)
    if as_json:
        print_json(result)
        return
    print_table(
        f"Perplexity of {result['model']} ({result['dtype']}) on {text.name}",
        ["", "perplexity", "change", "sparse MACs", "seconds"],
        [[row["name"], *format_quality(row), f"{row['mac_fraction']:.0%}", f"{row['seconds']:.1f}"] for row in rows],
        caption=f"{result['tokens']} tokens predicted in {result['windows']} windows of {result['window']}",
    )


def build_recipes(
    path: Path | None,
    patterns: list[str] | None,
    criterion: str | None,
    mitigation: list[str] | None,
    default_patterns: tuple[str, ...] = (),
) -> dict:
    """Name -> Recipe from the options: the file's recipe (or the default one) with the options put into it.

    Every pattern makes one recipe. Without patterns the file's recipe is taken as it is, and without a file
    `default_patterns` are.
    """
    from ..recipe import Recipe

    changes = {}
    if criterion is not None:
        changes["criterion"] = criterion
    if mitigation:
        changes["mitigation"] = mitigation
    if path is not None and not patterns:
        return {path.stem: dataclasses.replace(load_recipe(path), **changes)}
    names = once([_spelled(name) for name in patterns or default_patterns], "--pattern")
    if path is None:
        return {name: Recipe(pattern=name, **changes) for name in names}
    base = load_recipe(path)
    return {f"{path.stem} {name}": dataclasses.replace(base, pattern=name, **changes) for name in names}


def once(values: list | None, option: str) -> list:
    """The values of a repeatable option, each of them once, with a note where one was given again."""
    found = list(dict.fromkeys(values or ()))
    if len(found) < len(values or ()):
        note(
            f"{option} names {', '.join(v for v in map(str, found) if [*map(str, values)].count(v) > 1)} twice: one row"
        )
    return found


def _spelled(pattern: str) -> str:
    from ..recipe import DENSE, as_pattern

    return pattern if pattern == DENSE else str(as_pattern(pattern))


def check_uncalibrated(recipes: Iterable, remedy: str) -> None:
    """Refuse a (name, recipe) that needs calibrated data, before a model is loaded for it."""
    from ..lab.evaluate.study import resolved
    from ..methods.mitigations import data_of

    for name, recipe in recipes:
        needs = next((str(spec) for spec in sorted(resolved(recipe), key=str) if data_of(spec)), None)
        if needs is not None:
            raise ValueError(
                f"expected recipes that need no calibration, got {needs!r} in {name!r}; make its data with "
                f"nm-act calibrate and {remedy}"
            )


def variants(dense, recipes: dict, calibrations: Iterable[Path] = ()) -> Iterator[dict]:
    """The dense model, then a sparse copy for each recipe and calibration, made when its turn comes."""
    from ..conversion.calibration import check_calibration
    from ..conversion.sparsify import check_recipe
    from ..lab.evaluate.variants import calibrated_copy, sparse_copy

    for recipe in recipes.values():
        check_recipe(dense, recipe)  # before minutes are spent on the dense model
    for folder in calibrations:
        check_calibration(dense, folder)
    yield {"name": "dense", "model": dense, "mac_fraction": 0.0, "recipe": None}
    makers = {name: (sparse_copy, recipe) for name, recipe in recipes.items()}
    for folder in calibrations:
        name = folder.name if folder.name not in makers else str(folder)
        makers[name] = (calibrated_copy, folder)
    for name, (make, source) in makers.items():
        report = make(dense, source)
        made = {
            "name": name,
            "model": report.model,
            "mac_fraction": report.mac_fraction,
            "recipe": report.recipe.to_dict(),
        }
        del report
        yield made
        del made


def measure(models: Iterable[dict], tokens, window: int | None = None) -> list[dict]:
    """Perplexity of every variant as a row of plain data; all are compared with the first one, dense."""
    from ..lab.evaluate.perplexity import check_finite

    rows = []
    for variant in models:
        rows.append(_measure_one(variant, tokens, window))
        check_finite(rows[0]["perplexity"])
        del variant  # before the next one is made: weights of one sparse copy at a time
    for row in rows[1:]:
        row["change_percent"] = 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)
    return rows


def format_quality(row: dict) -> list[str]:
    """Perplexity and its change against dense, as table cells."""
    change = "" if row["change_percent"] is None else f"{row['change_percent']:+.1f} %"
    return [f"{row['perplexity']:.2f}", change]


def _measure_one(variant: dict, tokens, window: int | None) -> dict:
    from ..lab.evaluate.perplexity import perplexity

    label = f"perplexity, {variant['name']}"
    note(label)
    start = time.perf_counter()
    with progress_bar(label) as update:
        result = perplexity(
            variant["model"],
            tokens,
            window=window,
            progress=lambda done, total, value: update(done, total, f"{value:.2f}"),
        )
    return {
        "name": variant["name"],
        "perplexity": result.value,
        "change_percent": None,
        "tokens": result.tokens,
        "windows": result.windows,
        "window": result.window,
        "mac_fraction": variant["mac_fraction"],
        "seconds": time.perf_counter() - start,
        "recipe": variant["recipe"],
    }


def _check_out(out: Path | None) -> None:
    from ..files import check_writable

    if out is None:
        return
    if out.suffix not in (".json", ".csv"):
        raise ValueError(f"expected --out to end in .json or .csv, got {str(out)!r}")
    check_writable(out)


def _write(out: Path, result: dict) -> None:
    from ..files import write_atomic

    if out.suffix == ".json":
        write_atomic(out, to_json(result) + "\n")
        return
    columns = ("model", "text", "dtype", "device")
    measured = (
        "name",
        "perplexity",
        "change_percent",
        "tokens",
        "windows",
        "window",
        "mac_fraction",
        "seconds",
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *measured])
    for row in result["rows"]:
        writer.writerow([*(result[key] for key in columns), *(row[key] for key in measured)])
    write_atomic(out, text.getvalue())
