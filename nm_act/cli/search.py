"""``nm-act search``: a pattern for every projection of every layer, for a speed-up or a loss that is asked for."""

from pathlib import Path
from typing import Annotated

import typer

from ..lab.shapes import SHAPES
from . import common
from . import options as opt

DEFAULT_OPTIONS = {
    "prefill": ("2:4 wina var",),
    "decode": ("12:16 wina var", "10:16 wina var", "8:16 wina var", "6:16 wina var"),
    "both": ("2:4 wina var",),
}
"""Phase -> the default options for a layer; only 2:4 gains in both phases."""


def search(
    model: opt.Model,
    target_speedup: Annotated[
        float | None, typer.Option("--target-speedup", help="Predicted speed-up in the phase.")
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
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 512,
    layers_together: Annotated[
        int, typer.Option("--layers-together", min=1, help="Consecutive layers that get one choice.")
    ] = 1,
    merged: Annotated[
        bool, typer.Option("--merged", help="One choice for q/k/v and one for gate/up: optimize() then merges them.")
    ] = False,
    phase: Annotated[str, typer.Option("--phase", help="What is to be faster: prefill, decode, or both.")] = "prefill",
    shapes: Annotated[
        str | None, typer.Option("--shapes", help=f"Predict for a model of these shapes: {', '.join(SHAPES)}.")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option("--rates", help="Own speed-ups: CSV with pattern,speedup,source, or a benchmark's.")
    ] = None,
    dtype: opt.Dtype = "float32",
    device: Annotated[
        str, typer.Option("--device", help="Where it runs (cpu, cuda), or a measured device to predict for (h100).")
    ] = "cpu",
    threads: opt.Threads = None,
    output: Annotated[Path, typer.Option("--output", help="Folder; the same one again resumes.")] = Path("search"),
    as_json: opt.AsJson = False,
) -> None:
    """Find a recipe: sensitivities on calibration text, costs from measured tables, and an optimal assignment."""
    from ..lab.cost import Rates, cost_of
    from ..lab.evaluate.perplexity import check_window
    from ..lab.measured import shapes_of
    from ..lab.output import check_output
    from ..lab.search import run
    from ..lab.search.options import find_calibrations, parse_option
    from ..lab.tables import DEFAULT_DEVICE, devices
    from ..lab.texts import first_windows, load_text, read_text

    goal = run.Goal(target_speedup, max_drop)
    phases = _phases(phase)
    specs = {str(spec): spec for spec in map(parse_option, option or DEFAULT_OPTIONS[phase])}
    table = None if rates is None else Rates.load(rates)
    if table is not None and (phases != table.phases or shapes is not None or device in devices()):
        raise ValueError(
            "expected --rates with --phase prefill, without --shapes and without a --device to predict for, got "
            "others; leave --rates out"
        )
    if text is not None and data is not None:
        raise ValueError("expected --text or --data, got both; leave out the one that is not to be calibrated on")
    if shapes is not None:
        shapes_of(shapes)
    measured, device = (device, "cpu") if device in devices() else (DEFAULT_DEVICE, device)
    check_output(output)
    content, source = (read_text(text), text.name) if text is not None else load_text("c4", data)
    if calibrated is not None:  # without a folder, an option that is no faster than dense is refused first
        find_calibrations(specs, calibrated)
    common.set_threads(threads)
    dense, tokenizer = common.load_dense(model, dtype, device, window)
    check_window(dense, window)
    cost = cost_of(dense, measured, shapes, phases=phases) if table is None else table
    best, points, files = run.search(
        dense,
        first_windows(tokenizer, content, windows, window),
        specs,
        cost,
        goal,
        output,
        identity={"search": common.model_name(model), "text": source, "dtype": dtype},
        layers_together=layers_together,
        merged=merged,
        calibrated=calibrated,
        note=common.note,
        bar=common.progress_bar,
    )
    for sentence in getattr(cost, "notes", ()):
        common.note(sentence)
    if as_json:
        common.print_json(run.result(best, points))
        return
    cells = [
        [r["name"], f"{r['predicted_speedup']:.3f}x", f"{r['perplexity']:.2f}", f"{r['change_percent']:+.1f} %"]
        for r in run.point_rows(points)
    ]
    common.print_table("Calibration text", ["", "predicted speed-up", "perplexity", "change"], cells)
    print(f"{best.speedup:.3f}x predicted: {output / files[0]}; {', '.join(files[1:])} beside it")


def _phases(name: str) -> tuple[str, ...]:
    phases = {"prefill": ("prefill",), "decode": ("decode",), "both": ("prefill", "decode")}
    if name not in phases:
        raise ValueError(f"expected --phase {', '.join(phases)}, got {name!r}; choose one of those")
    return phases[name]
