"""Results of studies as rows, CSV, Markdown and plots. Everything here is computed from result files alone."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...recipe import Recipe
from .. import output
from ..cost import Cost, Rates, places_of, predictions
from ..measured import Measured, shapes_of
from ..output import is_undefined, markdown_table
from ..shapes import SHAPES
from ..tables import DEFAULT_DEVICE
from .folder import PERPLEXITY, RunFolder
from .perplexity import paired_difference
from .variants import DENSE_VARIANT

__all__ = ["COLUMNS", "Row", "average_drops", "collect", "draw", "markdown_table", "to_csv"]

COLUMNS = (
    *("model", "name", "method", "pattern", "layers", "predicted_speedup", "predicted_decode", "task", "metric"),
    *("value", "stderr", "samples", "dense_value", "seed", "calibrated_on", "dtype", "device", "commit", "date"),
)
"""predicted_speedup is that of prefill, predicted_decode that of a decode step (`predicted`)."""

PREDICTED_MODEL = "llama-3-8b"
"""The shapes that rows are predicted for: those of a model that would be deployed on the measured device."""


AVERAGED = ("arc_easy", "boolq", "piqa", "winogrande")
"""The tasks of the paper's averages; others are shown but not averaged."""

_COMPARABLE = ("model", "weights", "dtype", "limit", "tokens", "window", "data", "device")


@dataclass(frozen=True)
class Row:
    """One result beside the dense model's of the same run."""

    fields: dict[str, Any]  # the COLUMNS
    name: str  # variant's name
    drop: float  # relative drop in %, 100 (dense - value) / dense, for a perplexity its rise; NaN for the dense row
    drop_stderr: float  # standard error of the paired differences, document by document
    identity: dict[str, Any] = field(default_factory=dict, repr=False)  # of the run
    scores: tuple[float, ...] = field(default=(), repr=False)  # by window or document

    @property
    def run(self) -> str:
        """Model, weights, settings and data, which must be equal in comparable rows."""
        return comparable(self.identity)

    @property
    def is_dense(self) -> bool:
        """Whether it is the reference row."""
        return bool(self.fields["method"] == DENSE_VARIANT.method)


def comparable(identity: dict[str, Any]) -> str:
    """The fields that runs must share for their rows to be comparable."""
    return json.dumps([identity.get(key) for key in _COMPARABLE], sort_keys=True)


def collect(folders: list[str | Path], rates: Rates | None = None) -> list[Row]:
    """Rows of run folders, dense first, then in the order of names; dense rows of the same `Row.run` are taken once.

    With `rates`, prefill is predicted from them.

    Raises ValueError if a folder is no run, lacks a dense result for a task, or repeats a row of another folder of the
    same run (for dense rows: with another value).
    """
    return collect_runs([(str(folder), *RunFolder.read(folder)) for folder in folders], rates)


def collect_runs(runs: list[tuple[str, dict[str, Any], list[dict[str, Any]]]], rates: Rates | None = None) -> list[Row]:
    """`collect` for runs that were already read: their source, identity and results."""
    rows: dict[tuple[str, str, str], Row] = {}
    for folder, identity, results in runs:
        for row in _run_rows(folder, identity, results, rates):
            key = row.run, row.name, row.fields["task"]
            first = rows.setdefault(key, row)
            if first is not row and not (row.is_dense and first.fields["value"] == row.fields["value"]):
                raise ValueError(
                    f"expected every row once, got {row.name!r} on {row.fields['task']} of {row.fields['model']} again "
                    f"in {folder!r}; leave one of the folders out"
                )
    return list(rows.values())


def _run_rows(folder: str, identity: dict[str, Any], results: list[dict[str, Any]], rates: Rates | None) -> list[Row]:
    dense = {result["task"]: result for result in results if result["variant"]["name"] == DENSE_VARIANT.name}
    lacking = next((result["task"] for result in results if result["task"] not in dense), None)
    if lacking is not None or not dense:
        raise ValueError(
            f"expected a dense result for {lacking or 'every task'} in {folder!r}, got none; "
            "run nm-act eval again with the same --output to complete it"
        )
    results.sort(key=lambda r: (r["variant"]["name"] != DENSE_VARIANT.name, r["task"] != PERPLEXITY, r["task"]))
    return [_row(result, dense[result["task"]], identity, rates) for result in results]


def predicted(result: dict[str, Any], rates: Rates | None) -> dict[str, float]:
    """Speed-up by phase of a result's recipe with the shapes of `PREDICTED_MODEL`; prefill's from `rates` if given.

    An older result does not state the layers and width of its model; both are then those of `PREDICTED_MODEL`.
    """
    recipe, shapes = result["variant"]["recipe"], shapes_of(PREDICTED_MODEL)
    cost: Cost = rates or Measured(DEFAULT_DEVICE, shapes, PREDICTED_MODEL, phases=("prefill", "decode"))
    places = places_of(PREDICTED_MODEL, result.get("layers", SHAPES[PREDICTED_MODEL][0]))
    factor = places[0].in_features / result.get("width", places[0].in_features)
    return predictions(cost, places, None if recipe is None else Recipe.from_dict(recipe), rank_factor=factor)


def _row(result: dict[str, Any], dense: dict[str, Any], identity: dict[str, Any], rates: Rates | None) -> Row:
    variant = result["variant"]
    empty = dict.fromkeys(("calibrated_on", "dtype", "device"), "")
    fields = {**empty, **identity, **result, **variant, "dense_value": dense["value"]}
    speedups = predicted(result, rates)
    fields["predicted_speedup"] = round(speedups["prefill"], 4)
    fields["predicted_decode"] = round(speedups["decode"], 4) if "decode" in speedups else math.nan
    drop, stderr = (math.nan, math.nan) if result is dense else _drop(result, dense)
    fields = {name: fields[name] for name in COLUMNS}
    return Row(fields, variant["name"], drop, stderr, identity, tuple(result["scores"]))


def _drop(result: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float]:
    if not (result["scores"] and dense["scores"]):  # of a run that is not kept: without pairs
        return _unpaired_drop(result, dense)
    mean, stderr = paired_difference(result["scores"], dense["scores"])
    if result["metric"] == "ppl":  # scores are losses: the ratio of perplexities is the exponential of their difference
        ratio = math.exp(mean) if mean < 700 else math.inf
        return 100 * (ratio - 1), 100 * ratio * stderr
    if dense["value"] == 0:
        return math.nan, math.nan
    return 0.0 - 100 * mean / dense["value"], 100 * stderr / dense["value"]


def _unpaired_drop(result: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float]:
    ratio = result["value"] / dense["value"] if dense["value"] else math.nan
    error = math.hypot(result["stderr"], ratio * dense["stderr"]) / dense["value"] if dense["value"] else math.nan
    return 100 * (ratio - 1 if result["metric"] == "ppl" else 1 - ratio), 100 * error


def average_drops(rows: list[Row]) -> dict[str, tuple[float, float, int]]:
    """Variant -> mean of the relative drops over its tasks among `AVERAGED`, its standard error, and their number.

    Tasks are independent samples of documents, so the variances of their drops add.
    """
    averages = {}
    for name in dict.fromkeys(row.name for row in rows if not row.is_dense):
        drops = [row for row in rows if row.name == name and row.fields["task"] in AVERAGED]
        if drops:
            mean = sum(row.drop for row in drops) / len(drops)
            averages[name] = mean, math.sqrt(sum(row.drop_stderr**2 for row in drops)) / len(drops), len(drops)
    return averages


def to_csv(rows: list[Row]) -> str:
    """CSV with the columns of `COLUMNS`; undefined values are empty."""
    return output.to_csv([row.fields for row in rows], COLUMNS)


def cell(row: Row | None) -> str:
    """Value ± standard error for a table, an accuracy in per cent."""
    if row is None:
        return "–"
    numbers = [row.fields["value"]] + ([] if is_undefined(row.fields["stderr"]) else [row.fields["stderr"]])
    if row.fields["metric"] == "ppl":
        return " ± ".join(f"{number:.2f}" if numbers[0] < 1000 else f"{number:.3g}" for number in numbers)
    return " ± ".join(f"{100 * number:.1f}" for number in numbers)


def to_markdown(rows: list[Row]) -> str:
    """One table: a line per variant, a column per task, and the average relative drop."""
    tasks = list(dict.fromkeys(row.fields["task"] for row in rows))
    averages = average_drops(rows)
    found = {(row.name, row.fields["task"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        cells = [_with_drop(found.get((name, task))) for task in tasks]
        mean = averages.get(name)
        lines.append([name, *cells, "–" if mean is None else average_cell(mean)])
    table = markdown_table(["", *tasks, "average drop"], lines)
    return (
        f"{table}\n\nPerplexity for {PERPLEXITY} (lower is better), accuracy in per cent for the rest, ± "
        f"standard error; in brackets the relative change against dense. {averaged_note(rows)}\n"
    )


def average_cell(average: tuple[float, float, int]) -> str:
    """An average drop ± standard error, and the number of its tasks."""
    return f"{average[0]:.1f} ± {average[1]:.1f} %, n = {average[2]}"


def averaged_note(rows: list[Row]) -> str:
    """A note on which tasks the averages are over, and on how many samples every task has."""
    samples = {row.fields["task"]: row.fields["samples"] for row in rows}
    text = ", ".join(f"{task} {count}" for task, count in samples.items())
    averages = f"Averages are over n tasks among {', '.join(AVERAGED)}. " if samples.keys() & set(AVERAGED) else ""
    return f"{averages}Samples: {text}."


def _with_drop(row: Row | None) -> str:
    return cell(row) if row is None or row.is_dense or math.isnan(row.drop) else f"{cell(row)} ({-row.drop:+.1f} %)"


def draw(rows: list[Row]) -> dict[str, bytes]:
    """File name -> PNG: perplexity of every variant, and the average drop, with standard errors.

    Averages over fewer tasks than others would not compare, and are left out.
    """
    plots = {}
    measured = [row for row in rows if row.fields["task"] == PERPLEXITY]
    if measured:
        bars = {row.name: (row.fields["value"], row.fields["stderr"]) for row in measured}
        dense = measured[0].fields["dense_value"]
        plots["perplexity.png"] = _bars(bars, f"{PERPLEXITY} perplexity ± error", dense)
    averages = average_drops(rows)
    if averages:
        most = max(count for *_, count in averages.values())
        alike = {name: average for name, average in averages.items() if average[2] == most}
        plots["drop.png"] = _bars(alike, f"drop ± error, %, mean of {most} tasks")
    return plots


def _bars(bars: dict[str, tuple[Any, ...]], label: str, reference: float | None = None) -> bytes:
    """Name -> (value, standard error, ...) as horizontal bars, with a line at the reference."""
    figure = output.new_figure(7, 1.2 + 0.28 * len(bars))
    axes = figure.subplots()
    values = [bar[0] for bar in bars.values()]
    errors = [0.0 if is_undefined(bar[1]) else bar[1] for bar in bars.values()]
    axes.barh(list(bars), values, xerr=errors, color="C0", capsize=2)
    if reference is not None:
        axes.axvline(reference, color="0.4", linestyle=":")
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return output.png(figure)
