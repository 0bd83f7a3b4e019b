"""``nm-act search``: a pattern for every projection of every layer, for a speed-up or a loss that is asked for."""

from pathlib import Path
from typing import Annotated

import typer

from . import common
from . import options as opt

DEFAULT_OPTIONS = ("2:4 wina var",)


def search(
    model: opt.Model,
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
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 512,
    layers_together: Annotated[
        int, typer.Option("--layers-together", min=1, help="Consecutive layers that get one choice.")
    ] = 1,
    rates: Annotated[
        Path | None, typer.Option("--rates", help="CSV of speed-ups: pattern,speedup,source, or a benchmark's.")
    ] = None,
    dtype: opt.Dtype = "float32",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    output: Annotated[Path, typer.Option("--output", help="Folder; the same one again resumes.")] = Path("search"),
    as_json: opt.AsJson = False,
) -> None:
    """Find a recipe: sensitivities on calibration text, costs from measured tables, and an optimal assignment."""
    from ..lab.cost import Rates
    from ..lab.evaluate.perplexity import check_window
    from ..lab.output import check_output
    from ..lab.search import run
    from ..lab.search.options import find_calibrations, parse_option
    from ..lab.texts import first_windows, load_text, read_text

    goal = run.Goal(target_speedup, max_drop)
    specs = {str(spec): spec for spec in map(parse_option, option or DEFAULT_OPTIONS)}
    table = Rates.load(rates)
    check_output(output)
    content, source = (read_text(text), text.name) if text is not None else load_text("c4", data)
    if calibrated is not None:  # without a folder, an option that is no faster than dense is refused first
        find_calibrations(specs, calibrated)
    common.set_threads(threads)
    dense, tokenizer = common.load_dense(model, dtype, device, window)
    check_window(dense, window)
    best, points, files = run.search(
        dense,
        first_windows(tokenizer, content, windows, window),
        specs,
        table,
        goal,
        output,
        identity={"search": common.model_name(model), "text": source, "dtype": dtype},
        layers_together=layers_together,
        calibrated=calibrated,
        note=common.note,
        bar=common.progress_bar,
    )
    if as_json:
        common.print_json(run.result(best, points))
        return
    cells = [
        [r["name"], f"{r['predicted_speedup']:.3f}x", f"{r['perplexity']:.2f}", f"{r['change_percent']:+.1f} %"]
        for r in run.point_rows(points)
    ]
    common.print_table("Calibration text", ["", "predicted speed-up", "perplexity", "change"], cells)
    print(f"{best.speedup:.3f}x predicted: {output / files[0]}; {', '.join(files[1:])} beside it")
