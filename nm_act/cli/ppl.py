"""``nm-act ppl``: perplexity of a model, dense and with one or several patterns, on a text."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from . import common
from . import options as opt


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
    """Measure perplexity in non-overlapping windows, always of the dense model, too."""
    from ..lab.evaluate.calibrated import of_calibration
    from ..lab.evaluate.compare import compare
    from ..lab.evaluate.perplexity import check_window
    from ..lab.evaluate.variants import DENSE_VARIANT, from_recipe
    from ..lab.texts import read_text, tokenize

    _check_out(out)
    recipes = build_recipes(recipe, pattern, criterion, mitigation, () if calibration else opt.DEFAULT_PATTERNS)
    variants = [from_recipe(each, name) for name, each in recipes.items()]
    check_uncalibrated(variants, "name the folder with --calibration")
    for folder in once(calibration, "--calibration"):
        found = of_calibration(folder)
        variants.append(dataclasses.replace(found, name=str(folder)) if found.name in recipes else found)
    content = read_text(text)
    common.set_threads(threads)
    if window is not None:
        check_window(common.load_config(model), window)
    dense, tokenizer = common.load_dense(model, dtype, device)
    tokens = tokenize(tokenizer, content, max_tokens)
    for variant in variants:
        variant.check(dense)
    reports = ((each.name, each.make(dense)) for each in (DENSE_VARIANT, *variants))
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
    """Name -> Recipe from the options, which replace fields of the file's recipe or the default one.

    Every pattern makes one recipe. Without patterns the file's recipe keeps its own, and without a file the patterns
    are `default_patterns`.
    """
    from ..recipe import DENSE, Recipe, as_pattern

    changes = {"criterion": criterion} if criterion is not None else {}
    changes |= {"mitigation": mitigation} if mitigation else {}
    base = None if path is None else Recipe.load(path)
    if base is not None and not patterns:
        return {path.stem: dataclasses.replace(base, **changes)}
    spelled = [name if name == DENSE else str(as_pattern(name)) for name in patterns or default_patterns]
    names = once(spelled, "--pattern")
    if base is None:
        return {name: Recipe(pattern=name, **changes) for name in names}
    return {f"{path.stem} {name}": dataclasses.replace(base, pattern=name, **changes) for name in names}


def once(values: list | None, option: str) -> list:
    """The values of a repeatable option without duplicates, which a note names."""
    values = values or []
    found = list(dict.fromkeys(values))
    if len(found) < len(values):
        common.note(f"{option} names {', '.join(str(each) for each in found if values.count(each) > 1)} twice: one row")
    return found


def check_uncalibrated(variants: Iterable, remedy: str) -> None:
    """Raise a ValueError for a variant that needs calibrated data and has none."""
    from ..lab.evaluate.variants import resolved
    from ..methods.mitigations import data_of

    for variant in variants:
        needs = sorted(str(spec) for spec in resolved(variant.recipe) if data_of(spec))
        if needs and variant.folder is None:
            raise ValueError(
                f"expected recipes that need no calibration, got {needs[0]!r} in {variant.name!r}; make its data with "
                f"nm-act calibrate and {remedy}"
            )


def format_quality(row: dict) -> list[str]:
    """Perplexity and its change against dense, as table cells."""
    change = "" if row["change_percent"] is None else f"{row['change_percent']:+.1f} %"
    return [f"{row['perplexity']:.2f}", change]


def _check_out(out: Path | None) -> None:
    from ..files import check_writable

    if out is None:
        return
    if out.suffix not in (".json", ".csv"):
        raise ValueError(f"expected --out to end in .json or .csv, got {str(out)!r}")
    check_writable(out)


def _write(out: Path, result: dict) -> None:
    from ..files import write_atomic
    from ..lab.output import to_csv, write_json

    if out.suffix == ".json":
        write_json(out, result)
        return
    run = {key: result[key] for key in ("model", "text", "dtype", "device")}
    rows = [{**run, **row} for row in result["rows"]]
    write_atomic(out, to_csv(rows, [key for key in rows[0] if key != "recipe"]))
