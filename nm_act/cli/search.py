"""``nm-act search``: a pattern for every projection of every layer, for a speed-up or a loss that is asked for."""

import csv
import hashlib
import io
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    check_dense,
    load,
    load_config,
    model_name,
    note,
    print_json,
    print_table,
    progress_bar,
    set_threads,
    to_json,
)
from .ppl import DeviceOption, DtypeOption, JsonOption, ModelArgument, ThreadsOption

DEFAULT_OPTIONS = ("2:4 wina var",)
MEASURED_POINTS = 6


def search(
    model: ModelArgument,
    target_speedup: Annotated[
        float | None, typer.Option("--target-speedup", help="Predicted prefill speed-up of the linear layers.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Or: largest rise of perplexity on the calibration text, in %.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help='What a layer may get: "PATTERN [CRITERION] [MITIGATION ...]". Repeatable.'),
    ] = None,
    calibrated: Annotated[
        Path | None, typer.Option("--calibrated", help="Folder of the calibrations that options need.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data folder with C4; the hub without it.")] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Calibrate on this text instead of C4.")] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Calibration windows for sensitivities.")] = 2,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens a window.")] = 512,
    layers_together: Annotated[int, typer.Option("--layers-together", min=1, help="Layers that choose as one.")] = 1,
    rates: Annotated[
        Path | None, typer.Option("--rates", help="CSV of speed-ups: pattern,speedup,source, or a benchmark's.")
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    output: Annotated[Path, typer.Option("--output", help="Folder; the same one again resumes.")] = Path("search"),
    as_json: JsonOption = False,
) -> None:
    """Find a recipe: sensitivities on calibration text, costs from measured tables, and an optimal assignment."""
    from ..conversion.fingerprint import weights_fingerprint
    from ..conversion.sparsify import decoder_linears
    from ..lab.cost import Rates
    from ..lab.evaluate.folder import RunFolder, check_output
    from ..lab.evaluate.perplexity import check_window
    from ..lab.search.options import find_calibrations, option_variant, parse_option, read_data
    from ..lab.search.plan import baselines, check_reachable, measure_points, options_of
    from ..lab.search.sensitivity import groups_of, sensitivities
    from ..lab.search.solve import frontier, solve, to_recipe
    from ..recipe import DEFAULT_PROJECTIONS

    _check_goal(target_speedup, max_drop)
    specs = {str(spec): spec for spec in map(parse_option, option or DEFAULT_OPTIONS)}
    table = Rates.load(rates)
    check_output(output)
    content, source = _text(text, data)
    if calibrated is not None:  # without one, whether an option that needs data is worth calibrating is said first
        find_calibrations(specs, calibrated)
    set_threads(threads)
    check_window(load_config(model), window)
    dense, tokenizer = load(model, dtype, device)
    check_dense(dense, model)
    check_window(dense, window)
    calibration = _calibration(tokenizer, content, windows, window)
    groups = groups_of(dense, DEFAULT_PROJECTIONS, layers_together)
    if not groups:
        raise ValueError(f"expected projections among {', '.join(DEFAULT_PROJECTIONS)} in {model!r}, got none of them")
    inside = {name for group in groups for name in group.names}
    linears = decoder_linears(dense)
    other = sum(m.in_features * m.out_features for name, (_, _, m) in linears.items() if name not in inside)
    identity = {
        "search": model_name(model),
        "weights": weights_fingerprint(dense),
        "text": source,
        "windows": windows,
        "window": window,
        "token_ids": hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
    }
    check_reachable(groups, specs, table, target_speedup, other)
    option_data = read_data(dense, specs, calibrated)
    folder = RunFolder.open(output, {**identity, "dtype": dtype, "layers_together": layers_together}).path
    note(f"sensitivities of {len(groups)} groups, {len(specs)} options, {windows} windows of {window} tokens")
    with progress_bar("sensitivities") as update:
        costs = sensitivities(dense, calibration, groups, specs, folder / "sensitivities.jsonl", update, option_data)
    choices = frontier(groups, costs, specs, table, other, MEASURED_POINTS)
    picked = [to_recipe(choice, groups, specs) for choice in choices[1:]]
    chosen = None
    if target_speedup is not None:
        chosen = to_recipe(solve(groups, costs, specs, table, target_speedup, other), groups, specs)
    recipes = [("dense", None), *(("search", recipe) for recipe in [*picked, *([chosen] if chosen else [])])]
    recipes += [item for spec in specs.values() for item in baselines(spec).items()]
    tokens = calibration.flatten()
    points = measure_points(dense, tokens, window, recipes, table, folder / "points.jsonl", note, option_data)
    best = _best(points, chosen, max_drop)
    used = {name: option_data[name] for name in specs if name in option_data.keys() & options_of(best.recipe)}
    sparse = option_variant(dense, best.recipe, used) if used else None
    _finish(folder, points, best, sparse, used, as_json)


def unfinished_search(output: Path) -> bool:
    """Whether a stopped run left a measurement in its folder."""
    return any((output / name).is_file() for name in ("sensitivities.jsonl", "points.jsonl"))


def _check_goal(target_speedup: float | None, max_drop: float | None) -> None:
    if (target_speedup is None) == (max_drop is None):
        raise ValueError("expected either --target-speedup or --max-drop, got both or neither; give one of them")
    if target_speedup is not None and not target_speedup >= 1:
        raise ValueError(f"expected --target-speedup of at least 1, got {target_speedup:g}; 1.2 is 20 % faster")
    if max_drop is not None and not max_drop > 0:
        raise ValueError(f"expected --max-drop above 0 per cent, got {max_drop:g}; 20 allows a rise by a fifth")


def _text(text: Path | None, data: Path | None) -> tuple[str, str]:
    from ..lab.texts import load_text, read_text

    return (read_text(text), text.name) if text is not None else load_text("c4", data)


def _calibration(tokenizer, content: str, windows: int, window: int):
    from ..lab.texts import tokenize

    # A token is a few characters: a text much longer than what is read need not be tokenised to its end.
    ids = tokenize(tokenizer, content[: 32 * windows * window], windows * window)
    if ids.numel() < windows * window:
        raise ValueError(
            f"expected calibration text of {windows} windows of {window} tokens, got {ids.numel()} tokens; "
            "give a longer text, or fewer or shorter windows"
        )
    return ids.view(windows, window)


def _best(points: list, chosen, max_drop: float | None):
    """The point to write: the solver's for a target speed-up, else the fastest within the allowed rise."""
    dense = points[0].perplexity
    if max_drop is None:
        return next(point for point in points if point.recipe == chosen)
    allowed = [p for p in points[1:] if p.perplexity <= dense * (1 + max_drop / 100)]
    if not allowed:
        raise ValueError(f"expected a recipe within a rise of {max_drop:g} %, got none; allow more or add an --option")
    return max(allowed, key=lambda point: point.speedup)


def _finish(folder: Path, points: list, best, sparse, used: dict, as_json: bool) -> None:
    """Write the best point's recipe, its sparse model's data where options `used` some, the frontier and the plot."""
    from ..conversion.calibration import DATA_FILE, FACTS_FILE, RECIPE_FILE, save_calibration
    from ..files import write_atomic

    dense = points[0].perplexity
    rows = [{"name": p.name, "predicted_speedup": round(p.speedup, 4), "perplexity": p.perplexity} for p in points]
    rows = [{**row, "change_percent": 100 * (row["perplexity"] / dense - 1)} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    plot = draw(points, best)
    for name in (DATA_FILE, FACTS_FILE):  # of another goal's recipe
        (folder / name).unlink(missing_ok=True)
    files = "frontier.png, frontier.csv, search.json"
    if used:
        facts = {"seed": next(iter(used.values())).seed, "options": {name: each.digest for name, each in used.items()}}
        write_atomic(folder / FACTS_FILE, to_json(facts) + "\n")
        save_calibration(sparse, folder)
        files = f"{DATA_FILE}, {files}"
    else:
        best.recipe.save(folder / RECIPE_FILE)
    write_atomic(folder / "frontier.csv", text.getvalue())
    write_atomic(folder / "frontier.png", plot)
    result = {"recipe": best.recipe.to_dict(), "predicted_speedup": best.speedup, "points": rows}
    write_atomic(folder / "search.json", to_json(result) + "\n")
    if as_json:
        print_json(result)
        return
    cells = [
        [r["name"], f"{r['predicted_speedup']:.3f}x", f"{r['perplexity']:.2f}", f"{r['change_percent']:+.1f} %"]
        for r in rows
    ]
    print_table("Calibration text", ["", "predicted speed-up", "perplexity", "change"], cells)
    print(f"{best.speedup:.3f}x predicted: {folder / RECIPE_FILE}; {files} beside it")


def draw(points: list, best) -> bytes:
    """PNG of the frontier: perplexity on calibration text over predicted speed-up, baselines as single marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    line = sorted((p for p in points if p.name in ("dense", "search")), key=lambda p: p.speedup)
    axes.plot([p.speedup for p in line], [p.perplexity for p in line], "o-", color="C0", label="search")
    for index, point in enumerate(p for p in points if p.name not in ("dense", "search")):
        axes.plot(point.speedup, point.perplexity, "s^vDP*X<>"[index % 9], color=f"C{1 + index % 9}", label=point.name)
    axes.plot(best.speedup, best.perplexity, "o", markersize=13, fillstyle="none", color="k", label="written")
    axes.set_yscale("log")
    axes.set_xlabel("predicted prefill speed-up of the linear layers")
    axes.set_ylabel("perplexity, calibration text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
