"""``nm-act eval``: perplexity and zero-shot tasks of a model, dense and with any number of recipes; resumable."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from . import options as opt
from .recipes import build_recipes, check_uncalibrated, once

DEFAULT_TASKS = "wikitext2,arc_easy,boolq,piqa,winogrande"


def evaluate(
    model: opt.Model,
    pattern: opt.Patterns = None,
    recipe: opt.Recipes = None,
    criterion: opt.Criterion = None,
    mitigation: opt.Mitigations = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="YAML file with many rows; see docs/evaluate.md.")
    ] = None,
    calibrated: Annotated[
        Path | None, typer.Option("--calibrated", help="Folder of the calibrations of a study's calibrated rows.")
    ] = None,
    calibration: opt.Calibrations = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated; wikitext2 is a perplexity.")] = DEFAULT_TASKS,
    data: opt.Data = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Documents per task at most.")] = None,
    max_tokens: opt.MaxTokens = None,
    window: opt.Window = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests at once.")] = 8,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the run; the same one again resumes it.")] = Path(
        "evaluation"
    ),
    as_json: opt.AsJson = False,
) -> None:
    """Evaluate the dense model and sparse variants; relative drops, standard errors, JSON, CSV, Markdown and plots."""
    from ..conversion.calibration import FACTS_FILE
    from ..conversion.fingerprint import weights_fingerprint
    from ..lab.evaluate.calibrated import calibrated_row, of_calibration
    from ..lab.evaluate.folder import PERPLEXITY, RunFolder
    from ..lab.evaluate.perplexity import check_window
    from ..lab.evaluate.run import Study, check_context, check_scored
    from ..lab.evaluate.study import load_study, row_variant
    from ..lab.evaluate.tasks import build_task, check_available
    from ..lab.evaluate.variants import DENSE_VARIANT, from_recipe
    from ..lab.output import check_output
    from ..lab.overlap import check_apart, known_fingerprints
    from ..lab.search.run import SEARCH_FILE
    from ..lab.texts import load_text, whole_windows

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise ValueError("expected at least one task, got none; name some with --tasks")
    harness = [name for name in names if name != PERPLEXITY]
    unused = [option for option, value in (("--window", window), ("--max-tokens", max_tokens)) if value is not None]
    if unused and PERPLEXITY not in names:
        raise ValueError(
            f"expected {PERPLEXITY} among --tasks beside {' and '.join(unused)}, got {', '.join(names)}; "
            f"add {PERPLEXITY} or leave {' and '.join(unused)} out"
        )
    check_available(harness)
    check_output(output)
    variants = [row_variant(row) for row in load_study(study)] if study is not None else []
    compared = study is not None or bool(calibration)
    variants += [from_recipe(made, name) for name, made in _recipes(recipe, pattern, criterion, mitigation, compared)]
    if calibrated is not None and not any(variant.calibrated for variant in variants):
        raise ValueError("expected --study with calibrated rows beside --calibrated, got none; leave --calibrated out")
    variants = [calibrated_row(each, calibrated) if each.calibrated else each for each in variants]
    variants += map(of_calibration, once(calibration, "--calibration"))
    _check_names(variants)
    check_uncalibrated(variants, "name the folder with --calibration")
    text, sources = None, {}
    if PERPLEXITY in names:
        text, source = load_text(PERPLEXITY, data)
        sources[PERPLEXITY] = {"file": source, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    built = {}
    for name in harness:
        built[name], sources[name] = build_task(name, data)
    if data is not None:
        common.note("data: " + ", ".join(f"{name} {source['file']}" for name, source in sources.items()))
    common.set_threads(threads)
    dense, tokenizer = common.load_dense(model, dtype, device, None if text is None else window)
    for name, task in built.items():
        check_context(name, task, dense)
    for variant in variants:
        variant.check(dense)
        check_scored(dense, variant, names)
    tokens = None
    if text is not None:
        window = check_window(dense, window)
        tokens = whole_windows(tokenizer, text, window, max_tokens)
        for variant in variants:
            if variant.folder is not None:
                check_apart(tokens, known_fingerprints(variant.folder / FACTS_FILE), repr(variant.name))
        for path in recipe or []:
            check_apart(tokens, known_fingerprints(path.with_name(SEARCH_FILE)), repr(str(path)))
    identity = {
        "model": common.model_name(model),
        "weights": weights_fingerprint(dense),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "limit": limit,
        "tokens": None if tokens is None else tokens.numel(),
        "window": None if tokens is None else window,
        "data": dict(sorted(sources.items())),
    }
    folder = RunFolder.open(output, identity)
    whole = Study(dense, [DENSE_VARIANT, *variants], folder, tokenizer, tokens, built)
    common.note(whole.announcement())
    whole.run(common.note, batch_size)
    _finish(output, as_json)


def _recipes(
    paths: list[Path] | None,
    patterns: list[str] | None,
    criterion: str | None,
    mitigation: list[str] | None,
    compared: bool,
) -> list[tuple[str | None, Any]]:
    """(name or None, recipe) of the options; recipes of a file are named after it."""
    options = (patterns, criterion, mitigation)
    if paths:
        return [item for path in once(paths, "--recipe") for item in build_recipes(path, *options).items()]
    if not patterns and not compared:
        raise ValueError(
            "expected something to compare with dense, got nothing; add --pattern, --recipe, --calibration or --study"
        )
    return [(None, made) for made in build_recipes(None, *options).values()]


def _check_names(variants: list[Any]) -> None:
    slugs = {"dense"}
    for variant in variants:
        if variant.slug in slugs:
            raise ValueError(f"expected every row once, got two named {variant.name!r}; rename a recipe or drop one")
        slugs.add(variant.slug)


def _lines(rows: list[Any], averages: dict[str, Any]) -> list[list[str]]:
    """Table of one variant: a line per task, and the average drop."""
    lines = []
    for row in rows:
        fields = row.fields
        change = "" if row.is_dense else f"{row.drop:.1f} % (± {row.drop_stderr:.1f})"
        spread = f"{fields['value']:.4g} ± {fields['stderr']:.2g}"
        lines.append([fields["task"], fields["metric"], spread, str(fields["samples"]), change])
    if rows[0].name in averages:
        value, error, count = averages[rows[0].name]
        lines.append(["average", "", "", f"{count} tasks", f"{value:.1f} % (± {error:.1f})"])
    return lines


def _finish(output: Path, as_json: bool) -> None:
    from ..files import write_atomic
    from ..lab.evaluate.results import average_drops, collect, draw, to_csv, to_markdown
    from ..lab.output import to_json

    rows = collect([output])
    averages = average_drops(rows)
    identity = rows[0].identity
    result = {
        "identity": identity,
        "environment": common.environment(),
        "rows": [{**row.fields, "name": row.name, "drop": row.drop, "drop_stderr": row.drop_stderr} for row in rows],
        "average_drop": {name: {"value": v, "stderr": e, "tasks": n} for name, (v, e, n) in averages.items()},
    }
    files: dict[str, bytes | str] = {
        "results.json": to_json(result) + "\n",
        "results.csv": to_csv(rows),
        "results.md": to_markdown(rows),
        **draw(rows),
    }
    for name, content in files.items():
        write_atomic(output / name, content)
    if as_json:
        common.print_json(result)
        return
    print(f"{identity['model']}: relative drop against dense, in pairs\n")
    for name in dict.fromkeys(row.name for row in rows):
        lines = _lines([row for row in rows if row.name == name], averages)
        common.print_table(name, ["", "metric", "value", "samples", "drop"], lines)
    print(f"wrote {', '.join(files)} in {output}")
