"""Results of studies as rows, CSV, Markdown and plots. Everything here is computed from result files alone."""

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..cost import Rates, predicted_speedup
from .folder import PERPLEXITY, RunFolder
from .study import DENSE_VARIANT
from .tasks import mean_and_stderr

__all__ = ["COLUMNS", "Row", "average_drops", "collect", "draw", "to_csv"]

COLUMNS = (
    *("model", "method", "pattern", "layers", "predicted_speedup", "task", "metric", "value", "stderr"),
    *("samples", "dense_value", "seed", "commit", "date"),
)


AVERAGED = ("arc_easy", "boolq", "piqa", "winogrande")
"""The tasks of the paper's averages; others are shown but not averaged."""

_COMPARABLE = ("model", "weights", "dtype", "limit", "tokens", "window", "data")


@dataclass(frozen=True)
class Row:
    """One result beside the dense model's of the same run.

    Attributes
    ----------
    fields : dict
        The `COLUMNS`.
    name : str
        Variant's name.
    drop, drop_stderr : float
        Relative drop in per cent, ``100 (dense - value) / dense`` (a perplexity's rise counts as a drop), and the
        standard error of the paired differences document by document. NaN for the dense row.
    protocol : str
        Settings of the run, to be read.
    identity : dict
        Of the run, from its folder.
    calibrated_on : str
        Text and training of the row's calibration, "" without one.
    """

    fields: dict
    name: str
    drop: float
    drop_stderr: float
    protocol: str = ""
    identity: dict = field(default_factory=dict, repr=False)
    calibrated_on: str = ""

    @property
    def run(self) -> str:
        """What rows have in common that may be compared: model, weights, settings, and data."""
        return json.dumps([self.identity.get(key) for key in _COMPARABLE], sort_keys=True)

    @property
    def is_dense(self) -> bool:
        """Whether it is the reference row."""
        return self.fields["method"] == DENSE_VARIANT.method


def collect(folders: list[str | Path], rates: Rates | None = None) -> list[Row]:
    """Rows of one or several run folders, dense first, then in the order of names.

    Of several folders of one run (`Row.run`) the dense rows, which every folder has, are taken once.

    Raises
    ------
    ValueError
        If a folder is no run, has no dense result for a task, or holds a row that another one of the same run holds
        too, the dense ones with another value.
    """
    rates = rates or Rates.load()
    rows: dict[tuple[str, str, str], Row] = {}
    for folder in folders:
        for row in _folder_rows(Path(folder), rates):
            key = row.run, row.name, row.fields["task"]
            first = rows.setdefault(key, row)
            if first is not row and not (row.is_dense and first.fields["value"] == row.fields["value"]):
                raise ValueError(
                    f"expected every row once, got {row.name!r} on {row.fields['task']} of {row.fields['model']} again "
                    f"in {str(folder)!r}; leave one of the folders out"
                )
    return list(rows.values())


def _folder_rows(folder: Path, rates: Rates) -> list[Row]:
    identity, results = RunFolder.read(folder)
    dense = {result["task"]: result for result in results if result["variant"]["name"] == DENSE_VARIANT.name}
    lacking = next((result["task"] for result in results if result["task"] not in dense), None)
    if lacking is not None or not dense:
        raise ValueError(
            f"expected a dense result for {lacking or 'every task'} in {str(folder)!r}, got none; "
            "run nm-act eval again with the same --output to complete it"
        )
    results.sort(key=lambda r: (r["variant"]["name"] != DENSE_VARIANT.name, r["task"] != PERPLEXITY, r["task"]))
    return [_row(result, dense[result["task"]], identity, rates) for result in results]


def _row(result: dict, dense: dict, identity: dict, rates: Rates) -> Row:
    variant = result["variant"]
    speedup = predicted_speedup(result["macs"], rates, result["extra_macs"])
    fields = {
        "model": identity["model"],
        "method": variant["method"],
        "pattern": variant["pattern"],
        "layers": variant["layers"],
        "predicted_speedup": round(speedup, 4),
        "task": result["task"],
        "metric": result["metric"],
        "value": result["value"],
        "stderr": result["stderr"],
        "samples": result["samples"],
        "dense_value": dense["value"],
        "seed": variant["seed"],
        "commit": result["commit"],
        "date": result["date"],
    }
    drop, stderr = (math.nan, math.nan) if result is dense else _drop(result, dense)
    text = ", ".join(
        f"{key} {value}" for key, value in identity.items() if key in ("dtype", "limit", "tokens", "window")
    )
    return Row(fields, variant["name"], drop, stderr, text, identity, variant.get("calibrated_on", ""))


def _drop(result: dict, dense: dict) -> tuple[float, float]:
    pairs = zip(result["scores"], dense["scores"], strict=True)
    mean, stderr = mean_and_stderr([ours - theirs for ours, theirs in pairs])
    if result["metric"] == "ppl":  # scores are losses: the ratio of perplexities is the exponential of their difference
        ratio = math.exp(mean) if mean < 700 else math.inf
        return 100 * (ratio - 1), 100 * ratio * stderr
    if dense["value"] == 0:
        return math.nan, math.nan
    return 0.0 - 100 * mean / dense["value"], 100 * stderr / dense["value"]


def average_drops(rows: list[Row]) -> dict[str, tuple[float, float, int]]:
    """Variant -> mean of the relative drops over its tasks among `AVERAGED`, its standard error, and how many tasks.

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
    """CSV with the columns of `COLUMNS`; what is undefined is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(["" if _undefined(row.fields[name]) else row.fields[name] for name in COLUMNS])
    return text.getvalue()


def _undefined(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell(row: Row | None) -> str:
    """Value ± standard error for a table, an accuracy in per cent."""
    if row is None:
        return "–"
    numbers = [row.fields["value"]] + ([] if _undefined(row.fields["stderr"]) else [row.fields["stderr"]])
    if row.fields["metric"] == "ppl":
        return " ± ".join(f"{number:.2f}" if numbers[0] < 1000 else f"{number:.3g}" for number in numbers)
    return " ± ".join(f"{100 * number:.1f}" for number in numbers)


def markdown_table(header: list[str], lines: list[list[str]], right: int = 1) -> str:
    """A Markdown table; columns from index `right` on are right-aligned."""
    rule = ["---:" if index >= right else "---" for index in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def to_markdown(rows: list[Row]) -> str:
    """One table: a line a variant, a column a task, the average relative drop at the end."""
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
    """An average drop ± standard error and over how many tasks."""
    return f"{average[0]:.1f} ± {average[1]:.1f} %, n = {average[2]}"


def averaged_note(rows: list[Row]) -> str:
    """What the averages are over, and how many samples every task has."""
    samples = {row.fields["task"]: row.fields["samples"] for row in rows}
    text = ", ".join(f"{task} {count}" for task, count in samples.items())
    averages = f"Averages are over n tasks among {', '.join(AVERAGED)}. " if samples.keys() & set(AVERAGED) else ""
    return f"{averages}Samples: {text}."


def _with_drop(row: Row | None) -> str:
    return cell(row) if row is None or row.is_dense or math.isnan(row.drop) else f"{cell(row)} ({-row.drop:+.1f} %)"


def draw(rows: list[Row]) -> dict[str, bytes]:
    """File name -> PNG: perplexity of every variant, and the average drop, with standard errors."""
    plots = {}
    measured = [row for row in rows if row.fields["metric"] == "ppl"]
    if measured:
        perplexities = {row.name: row.fields["value"] for row in measured}
        errors = [0.0 if _undefined(row.fields["stderr"]) else row.fields["stderr"] for row in measured]
        dense = measured[0].fields["dense_value"]
        plots["perplexity.png"] = _bars(perplexities, errors, f"{PERPLEXITY} perplexity ± standard error", dense)
    averages = average_drops(rows)
    if averages:
        values = {name: mean for name, (mean, _, _) in averages.items()}
        errors = [error for _, error, _ in averages.values()]
        plots["drop.png"] = _bars(values, errors, "average relative drop ± standard error, %", None)
    return plots


def _bars(values: dict[str, float], errors: list[float], label: str, reference: float | None) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.28 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(values), list(values.values()), xerr=errors, color="C0", capsize=2)
    if reference is not None:
        axes.axvline(reference, color="0.4", linestyle=":")
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
