"""``nm-act eval``: perplexity and zero-shot tasks of a model, dense and with any number of recipes; resumable."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    check_dense,
    environment,
    load,
    load_config,
    model_name,
    note,
    print_json,
    print_table,
    set_threads,
    to_json,
)
from .ppl import (
    CriterionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MitigationOption,
    ModelArgument,
    PatternOption,
    ThreadsOption,
    build_recipes,
    check_uncalibrated,
    once,
)

DEFAULT_TASKS = "wikitext2,arc_easy,boolq,piqa,winogrande"


def evaluate(
    model: ModelArgument,
    pattern: PatternOption = None,
    recipe: Annotated[
        list[Path] | None, typer.Option("--recipe", help="Recipe; --pattern replaces its pattern. Repeatable.")
    ] = None,
    criterion: CriterionOption = None,
    mitigation: MitigationOption = None,
    study: Annotated[
        Path | None, typer.Option("--study", help="YAML file with many rows; see docs/evaluate.md.")
    ] = None,
    calibrated: Annotated[
        Path | None,
        typer.Option("--calibrated", help="Folder of the calibrations that a study's calibrated rows name."),
    ] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option("--calibration", help="Folder written by nm-act calibrate. Repeatable.")
    ] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Comma-separated; wikitext2 is a perplexity.")] = DEFAULT_TASKS,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the data; the hub without it.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Only so many documents a task.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Only so many tokens of text.")] = None,
    window: Annotated[int | None, typer.Option("--window", min=2, help="Tokens a window; 2048 or the context.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests at once.")] = 8,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    output: Annotated[Path, typer.Option("--output", help="Folder of the run; the same one again resumes it.")] = Path(
        "evaluation"
    ),
    as_json: JsonOption = False,
) -> None:
    """Evaluate the dense model and sparse variants; relative drops, standard errors, JSON, CSV, Markdown and plots."""
    from ..conversion.fingerprint import weights_fingerprint
    from ..lab.evaluate.calibrated import calibrated_row, of_calibration
    from ..lab.evaluate.folder import PERPLEXITY, RunFolder, check_output
    from ..lab.evaluate.perplexity import check_window
    from ..lab.evaluate.run import check_context, run_study
    from ..lab.evaluate.study import DENSE_VARIANT, from_recipe, load_study, row_variant
    from ..lab.evaluate.tasks import build_task, check_available
    from ..recipe import Recipe

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise ValueError("expected at least one task, got none; name some with --tasks")
    check_available([name for name in names if name != PERPLEXITY])
    check_output(output)
    variants = [row_variant(row) for row in load_study(study)] if study is not None else []
    compared = study is not None or bool(calibration)
    variants += [from_recipe(made, name) for name, made in _recipes(recipe, pattern, criterion, mitigation, compared)]
    if calibrated is not None and not any(variant.calibrated for variant in variants):
        raise ValueError("expected --study with calibrated rows beside --calibrated, got none; leave --calibrated out")
    rows = [calibrated_row(each, calibrated) if each.calibrated else (each, None) for each in variants]
    rows += [(of_calibration(path), path) for path in once(calibration, "--calibration")]
    _check_names([variant for variant, _ in rows])
    check_uncalibrated(
        ((each.name, Recipe.from_dict(each.recipe)) for each, folder in rows if folder is None),
        "name the folder with --calibration",
    )
    text, source = _text(data) if PERPLEXITY in names else (None, None)
    built = {name: build_task(name, data) for name in names if name != PERPLEXITY}
    if data is not None:
        note("data: " + ", ".join(f"{name} {each['file']}" for name, each in _files(source, built).items()))
    set_threads(threads)
    if window is not None and text is not None:
        check_window(load_config(model), window)
    dense, tokenizer = load(model, dtype, device)
    check_dense(dense, model)
    for name, (task, _) in built.items():
        check_context(name, task, dense)
    made = list(_models(dense, rows, names))
    tokens, window = _tokens(tokenizer, text, max_tokens, window, dense) if text is not None else (None, None)
    folder = RunFolder.open(
        output,
        {
            "model": model_name(model),
            "weights": weights_fingerprint(dense),
            "dtype": str(dense.dtype).removeprefix("torch."),
            "limit": limit,
            "tokens": None if tokens is None else tokens.numel(),
            "window": window,
            "data": dict(sorted(_files(source, built).items())),
        },
    )
    harness = {name: task for name, (task, _) in built.items()}
    models = [(DENSE_VARIANT, lambda: dense), *made]
    _announce(dense, tokenizer, models, folder, tokens, harness, limit)
    run_study(models, folder, tokenizer, tokens=tokens, tasks=harness, progress=note, batch_size=batch_size)
    _finish(output, folder, as_json)


def unfinished_evaluation(output: Path) -> bool:
    """Whether a stopped run left a result in its folder."""
    return any((output / "rows").glob("*.json"))


def _recipes(paths, patterns, criterion, mitigation, compared: bool) -> list[tuple]:
    """(name or None, recipe) of the options; recipes of a file are named after it."""
    if paths:
        return [
            item
            for path in once(paths, "--recipe")
            for item in build_recipes(path, patterns, criterion, mitigation).items()
        ]
    if patterns:
        return [(None, made) for made in build_recipes(None, patterns, criterion, mitigation).values()]
    if not compared:
        raise ValueError(
            "expected something to compare with dense, got nothing; add --pattern, --recipe, --calibration or --study"
        )
    if criterion or mitigation:
        raise ValueError(
            "expected --criterion and --mitigation beside --pattern or --recipe, got neither; add --pattern"
        )
    return []


def _check_names(variants: list) -> None:
    slugs: dict[str, str] = {"dense": "dense"}
    for variant in variants:
        if variant.slug in slugs:
            raise ValueError(f"expected every row once, got two named {variant.name!r}; rename a recipe or drop one")
        slugs[variant.slug] = variant.name


def _files(source: dict | None, built: dict) -> dict[str, dict]:
    from ..lab.evaluate.folder import PERPLEXITY

    return {**({PERPLEXITY: source} if source else {}), **{name: each for name, (_, each) in built.items()}}


def _text(data: Path | None) -> tuple[str, dict]:
    from ..lab.evaluate.folder import PERPLEXITY
    from ..lab.texts import load_text

    text, source = load_text(PERPLEXITY, data)
    return text, {"file": source, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _tokens(tokenizer, text: str, max_tokens: int | None, window: int | None, model):
    """The tokens that are read, whole windows, and how many make a window."""
    from ..lab.evaluate.perplexity import check_window
    from ..lab.texts import tokenize

    tokens = tokenize(tokenizer, text, max_tokens)
    window = check_window(model, window)
    if tokens.numel() < window:
        raise ValueError(
            f"expected a text of at least one window of {window} tokens, got {tokens.numel()}; use --window"
            + ("" if max_tokens is None else " or more --max-tokens")
        )
    return tokens[: tokens.numel() // window * window], window


def _models(dense, rows: list[tuple], tasks: list[str]):
    """(variant, how to make its model) of every (variant, calibration or None), after all of them were looked at."""
    import functools

    from ..conversion.calibration import check_calibration
    from ..conversion.sparsify import check_recipe, decoder_linears
    from ..lab.evaluate.tasks import GENERATION
    from ..recipe import Recipe

    scored = next((task for task in tasks if task not in GENERATION), None)
    for variant, folder in rows:
        recipe = Recipe.from_dict(variant.recipe)
        check_recipe(dense, recipe)
        specs = {recipe.resolve(layer, projection) for layer, projection, _ in decoder_linears(dense).values()} - {None}
        if scored is not None and {spec.phase for spec in specs} == {"decode"}:
            raise ValueError(
                f"expected recipes that prune in prefill, where {scored} is scored, got only phase decode in "
                f"{variant.name!r}; use a generating task ({', '.join(sorted(GENERATION))})"
            )
        if folder is not None:
            check_calibration(dense, folder)
            yield variant, functools.partial(_calibrated, dense, folder)
            continue
        yield variant, functools.partial(_sparse, dense, recipe)


def _sparse(dense, recipe):
    from ..lab.evaluate.variants import sparse_copy

    return sparse_copy(dense, recipe).model


def _calibrated(dense, folder: Path):
    from ..lab.evaluate.variants import calibrated_copy

    return calibrated_copy(dense, folder).model


def _announce(dense, tokenizer, models, folder, tokens, harness: dict, limit: int | None) -> None:
    """Say how long the missing results will take, before the first one starts."""
    from ..lab.evaluate.folder import PERPLEXITY
    from ..lab.evaluate.run import estimate, request_tokens

    work = {PERPLEXITY: tokens.numel()} if tokens is not None else {}
    work |= {name: request_tokens(task, tokenizer, limit) for name, task in harness.items()}
    missing = {name: sum(not folder.has(variant, name) for variant, _ in models) for name in work}
    total = sum(work[name] * count for name, count in missing.items())
    if not total:
        note("every result is there already")
        return
    seconds = estimate(dense, total, 1)
    parts = ", ".join(f"{name} {count} x {work[name]} tokens" for name, count in missing.items() if count)
    note(f"estimated time: {_duration(seconds)} ({parts}; generated tokens are an upper bound and slower)")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _lines(rows: list, name: str, averages: dict) -> list[list[str]]:
    """Table of one variant: a line a task, and the average drop."""
    lines = []
    for row in rows:
        if row.name == name:
            fields = row.fields
            change = "" if row.is_dense else f"{row.drop:.1f} % (± {row.drop_stderr:.1f})"
            spread = f"{fields['value']:.4g} ± {fields['stderr']:.2g}"
            lines.append([fields["task"], fields["metric"], spread, str(fields["samples"]), change])
    if name in averages:
        value, error, count = averages[name]
        lines.append(["average", "", "", f"{count} tasks", f"{value:.1f} % (± {error:.1f})"])
    return lines


def _finish(output: Path, folder, as_json: bool) -> None:
    from ..files import write_atomic
    from ..lab.evaluate.results import average_drops, collect, draw, to_csv, to_markdown

    rows = collect([output])
    averages = average_drops(rows)
    result = {
        "identity": folder.identity,
        "environment": environment(),
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
        print_json(result)
        return
    print(f"{folder.identity['model']}: relative drop against dense, in pairs\n")
    for name in dict.fromkeys(row.name for row in rows):
        print_table(name, ["", "metric", "value", "samples", "drop"], _lines(rows, name, averages))
    print(f"wrote {', '.join(files)} in {output}")
