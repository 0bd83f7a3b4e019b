"""Writes docs/evaluation.md, its plots and docs/evaluation/results.csv from docs/evaluation/rows.jsonl.

    python tools/evaluation_report.py [RUN...] [--rates CSV] [--out docs]

Folders of nm-act eval and files of benchmarks/quality_gpu.py are added to rows.jsonl first, in place of the same rows
of the same run. Every table is a selection of the rows, so methods that a study adds appear without a change here.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

from nm_act.files import read_json_lines, write_atomic, write_json_lines
from nm_act.lab.cost import Rates
from nm_act.lab.evaluate import results
from nm_act.lab.evaluate.folder import PERPLEXITY, RunFolder
from nm_act.lab.evaluate.perplexity import paired_difference
from nm_act.lab.tables import DEFAULT_DEVICE
from nm_act.methods.criteria import CRITERIA

WEIGHT_PRUNING = {name for name, criterion in CRITERIA.items() if criterion.prunes_weight}

NOISE = "noise.csv"
"""Standard deviations of the loss under rounding, by variant, in the folder of the rows."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--rates", type=Path, help="CSV of speed-ups, as for nm-act search")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    options = parser.parse_args(arguments)
    try:
        rates = None if options.rates is None else Rates.load(options.rates)
        store = options.out / "evaluation" / "rows.jsonl"
        results.collect([run for run in options.runs if run.is_dir()], rates)  # refuses a row that two of them have
        runs = merged(read_rows_file(store), [each for run in options.runs for each in read_run(run)])
        rows = results.collect_runs([(str(store), *run) for run in runs], rates)
        if not rows:
            raise ValueError(f"expected results in {str(store)!r} or a RUN, got none; run nm-act eval")
    except (ValueError, OSError) as error:
        print(f"evaluation_report: {error}", file=sys.stderr)
        return 2
    folder = options.out / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    write_rows_file(store, runs)
    plots = plots_of(rows)
    for name, content in plots.items():
        write_atomic(folder / name, content)
    write_atomic(folder / "results.csv", results.to_csv(rows))
    write_atomic(options.out / "evaluation.md", report(rows, rates, sorted(plots), folder))
    return 0


def read_run(path: Path) -> list[tuple[dict, list[dict]]]:
    """Identities and results in a file of rows, or in a folder of nm-act eval."""
    return read_rows_file(path) if path.is_file() else [RunFolder.read(path)]


def read_rows_file(path: Path) -> list[tuple[dict, list[dict]]]:
    """Identities and results of the runs in a file of `write_rows_file`; none if there is no such file."""
    runs: list[tuple[dict, list[dict]]] = []
    for line in read_json_lines(path, ()):
        if "identity" in line:
            runs.append((line["identity"], []))
        elif not runs:
            raise ValueError(f"expected the identity of a run in the first line of {str(path)!r}, got something else")
        else:
            scores = line["scores"]
            runs[-1][1].append({**line, "scores": [*map(float, scores)] if isinstance(scores, str) else scores})
    return runs


def write_rows_file(path: Path, runs: list[tuple[dict, list[dict]]]) -> None:
    """Write runs as JSON lines: an identity, then its results; right and wrong answers are the digits 1 and 0."""
    lines: list[dict] = []
    for identity, rows in runs:
        lines.append({"identity": identity})
        for result in rows:
            scores = result["scores"]
            digits = "".join("01"[int(score)] for score in scores) if set(scores) <= {0.0, 1.0} else scores
            lines.append({**result, "scores": digits})
    write_json_lines(path, lines)


def merged(runs: list[tuple[dict, list[dict]]], more: list[tuple[dict, list[dict]]]) -> list[tuple[dict, list[dict]]]:
    """Runs with the results of others, which take the place of those of the same variant and task."""
    found = [(identity, {_key(result): result for result in rows}) for identity, rows in runs]
    for identity, rows in more:
        same = next((own for own in found if results.comparable(own[0]) == results.comparable(identity)), None)
        if same is None:
            same = identity, {}
            found.append(same)
        same[1].update({_key(result): result for result in rows})
    return [(identity, list(rows.values())) for identity, rows in found]


def _key(result: dict) -> tuple[str, str]:
    return result["variant"]["name"], result["task"]


def runs_of(rows: list[results.Row]) -> list[list[results.Row]]:
    """Rows by run; only rows of one run (model, weights, settings, data) are compared with each other."""
    runs: dict[str, list[results.Row]] = {}
    for row in rows:
        runs.setdefault(row.run, []).append(row)
    return list(runs.values())


def plots_of(rows: list[results.Row]) -> dict[str, bytes]:
    """Plots of every run, numbered."""
    made = {}
    for index, run in enumerate(runs_of(rows), 1):
        made |= {f"run{index}-{name}": content for name, content in results.draw(run).items()}
    return made


def report(rows: list[results.Row], rates: Rates | None, plots: list[str], folder: Path) -> str:
    """The whole document; `folder` has the measured noise."""
    parts = [
        "# Evaluation",
        "Generated by `python tools/evaluation_report.py`; all figures are also in "
        "[evaluation/results.csv](evaluation/results.csv). How they are measured: [evaluate.md](evaluate.md).",
    ]
    for index, run in enumerate(runs_of(rows), 1):
        parts += [f"## {run[0].fields['model']}", f"{protocol(run[0].identity)}; {dates(run)}."]
        parts += sections(run, noise_of(folder / NOISE))
        parts += [f"![{name}](evaluation/{name})" for name in plots if name.startswith(f"run{index}-")]
    parts += ["## Predicted speed-up", speedup_note(rates)]
    return "\n\n".join(parts) + "\n"


def noise_of(path: Path) -> float:
    """Largest standard deviation of the loss under rounding among the measured variants, nats per token; 0 without."""
    if not path.is_file():
        return 0.0
    with path.open(newline="", encoding="utf-8") as file:
        return max(float(row["deviation"]) for row in csv.DictReader(file))


def ranking(run: list[results.Row], noise: float) -> str:
    """Perplexities from the best, each with its paired difference from the row above it; no rank without one."""
    rows = sorted(
        (row for row in run if row.fields["task"] == PERPLEXITY and row.scores), key=lambda r: r.fields["value"]
    )
    lines, rank = [], 0
    for index, row in enumerate(rows):
        difference = "–"
        apart = True
        if index:
            mean, stderr = paired_difference(row.scores, rows[index - 1].scores)
            apart = mean > 2 * max(stderr, math.sqrt(2) * noise)
            difference = f"{mean:+.4f} ± {stderr:.4f}"
        rank = index + 1 if apart else rank
        speed = [f"{row.fields[name]:.2f}x" for name in ("predicted_speedup", "predicted_decode")]
        lines.append([str(rank), row.name, *speed, results.cell(row), difference])
    if not lines:
        return ""
    header = ["rank", "", "prefill", "decode", "perplexity", "nats above the row above"]
    return results.markdown_table(header, lines, right=2) + (
        "\n\nDifferences are means over the same windows ± their standard error. Rows share a rank with the row above "
        "if the difference is below twice its error or twice the noise of rounding, which is "
        f"{math.sqrt(2) * noise:.4f} nats for a difference "
        "([how it is measured](evaluate.md#how-small-a-difference-means-something))."
    )


def sections(run: list[results.Row], noise: float = 0.0) -> list[str]:
    """Tables of the paper in miniature, then everything; a table without rows is left out."""
    dense = [row for row in run if row.is_dense]
    sparse = [row for row in run if not row.is_dense]
    activations = [row for row in sparse if row.fields["method"].split("+")[0] not in WEIGHT_PRUNING]
    everywhere = [row for row in activations if row.fields["layers"] == "all"]
    mitigated = [row for row in everywhere if "+" in row.fields["method"]]
    plain = [row for row in everywhere if "+" not in row.fields["method"]]
    act = [row for row in plain if row.fields["method"] == "act"]
    structured = [row for row in plain if "%" not in row.fields["pattern"]]
    unstructured = [row for row in everywhere if "%" in row.fields["pattern"]]
    weights = [row for row in sparse if row not in activations]
    subsets = [row for row in activations if row.fields["layers"] != "all"]
    tables = {
        "Criteria by pattern": by_pattern(structured, dense),
        "Mitigations by pattern": by_pattern(mitigated and act + mitigated, dense, speedup=True),
        "Weights against activations": by_pattern(weights and act + weights, dense),
        "Layer subsets": listing(dense, subsets),
        "Unstructured reference": by_pattern(unstructured, dense),
        "Calibrations": calibrations(sparse),
        "Ranking": ranking(run, noise),
        "Texts": other_texts(run),
        "Every row": results.to_markdown(run),
    }
    return [part for title, table in tables.items() if table for part in (f"### {title}", table)]


def by_pattern(rows: list[results.Row], dense: list[results.Row], *, speedup: bool = False) -> str:
    """A line per method, a column per pattern: perplexity, average drop over the tasks, and predicted speed-up."""
    patterns = sorted({row.fields["pattern"] for row in rows}, key=lambda text: (len(text), text))
    averages = results.average_drops(rows)
    lines = [["dense", *[reference(dense)] * len(patterns)]] if rows else []
    labels = seed_labels(rows)
    for label in dict.fromkeys(labels):
        cells = []
        for pattern in patterns:
            pairs = zip(rows, labels, strict=True)
            found = [row for row, own in pairs if own == label and row.fields["pattern"] == pattern]
            rate = f"; {found[0].fields['predicted_speedup']:.2f}x" if speedup and found else ""
            cells.append(summary(found, averages) + rate)
        lines.append([label, *cells])
    if not lines:
        return ""
    note = " After the semicolon: predicted speed-up, what the mitigation adds included." if speedup else ""
    return results.markdown_table(["", *patterns], lines) + f"\n\n{caption([*dense, *rows])}{note}"


def other_texts(run: list[results.Row]) -> str:
    """Perplexities on every text, each over the dense model's, for the variants that were measured on several."""
    values: dict[str, dict[str, float]] = {}
    for row in run:
        if row.fields["metric"] == "ppl":
            values.setdefault(row.name, {})[row.fields["task"]] = row.fields["value"] / row.fields["dense_value"]
    texts = list(dict.fromkeys(text for found in values.values() for text in found))
    lines = [
        [name, *(f"{found[text]:.2f}x" if text in found else "–" for text in texts)]
        for name, found in sorted(values.items(), key=lambda item: item[1].get(PERPLEXITY, math.inf))
        if len(found) > 1
    ]
    if len(texts) < 2:
        return ""
    table = results.markdown_table(["over dense", *texts], lines)
    return f"{table}\n\nWhat the texts are, and how to make them: [evaluate.md](evaluate.md#texts-of-another-kind)."


def seed_labels(rows: list[results.Row]) -> list[str]:
    """The method of every row, with its seed if the method was measured with several."""
    seeds: dict[str, set] = {}
    for row in rows:
        seeds.setdefault(row.fields["method"], set()).add(row.fields["seed"])
    methods = [row.fields["method"] for row in rows]
    return [
        method if len(seeds[method]) == 1 else f"{method}, seed {row.fields['seed']}"
        for method, row in zip(methods, rows, strict=True)
    ]


def calibrations(rows: list[results.Row]) -> str:
    """A line per calibrated variant: calibrated on what, and with which seed."""
    found = {row.name: [row.name, on, str(row.fields["seed"])] for row in rows if (on := row.fields["calibrated_on"])}
    return results.markdown_table(["", "calibrated on", "seed"], list(found.values()), right=3) if found else ""


def caption(rows: list[results.Row]) -> str:
    """Explains the cells of `summary`."""
    return f"Perplexity ± standard error (average drop ± standard error). {results.averaged_note(rows)}"


def reference(dense: list[results.Row]) -> str:
    """The dense model's perplexity."""
    return next((results.cell(row) for row in dense if row.fields["metric"] == "ppl"), "–")


def summary(rows: list[results.Row], averages: dict) -> str:
    """Perplexity of one variant and its average drop."""
    perplexity = next((results.cell(row) for row in rows if row.fields["metric"] == "ppl"), "–")
    average = next((averages[row.name] for row in rows if row.name in averages), None)
    return perplexity if average is None else f"{perplexity} ({results.average_cell(average)})"


def listing(dense: list[results.Row], rows: list[results.Row]) -> str:
    """A line per variant, dense first: layers, method, pattern, predicted speed-up, perplexity and average drop."""
    if not rows:
        return ""
    averages = results.average_drops(rows)
    lines = []
    for name in dict.fromkeys(row.name for row in [*dense, *rows]):
        found = [row for row in [*dense, *rows] if row.name == name]
        fields = found[0].fields
        speedup = f"{fields['predicted_speedup']:.3f}x"
        lines.append([name, fields["layers"], fields["method"], fields["pattern"], speedup, summary(found, averages)])
    header = ["", "layers", "method", "pattern", "predicted speed-up", "perplexity (average drop)"]
    return results.markdown_table(header, lines, right=4) + f"\n\n{caption([*dense, *rows])}"


def protocol(identity: dict) -> str:
    """Settings of a run, as text."""
    settings = ("device", "dtype", "limit", "tokens", "window")
    return ", ".join(f"{key} {value}" for key, value in identity.items() if key in settings)


def dates(run: list[results.Row]) -> str:
    """When and at which commits the rows were measured."""
    days = sorted({row.fields["date"] for row in run})
    commits = sorted({row.fields["commit"] for row in run})
    return f"measured {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") + f" at {', '.join(commits)}"


def speedup_note(rates: Rates | None) -> str:
    """What the predictions are based on."""
    if rates is None:
        return (
            f"Of {results.PREDICTED_MODEL} on the {DEFAULT_DEVICE.upper()} with the row's recipe, in as many layers as "
            "the evaluated model has: prefill of 4096 tokens and a decode step, from the measured tables of products. "
            "How, and how far from measured whole models: [search.md](search.md#predicted-speed-up)."
        )
    lines = [[pattern, f"{speedup:.3f}x", source] for pattern, (speedup, source) in rates.table.items()]
    table = results.markdown_table(["pattern", "speed-up", "source"], lines, right=3)
    what = (
        f"Of the linear layers of {results.PREDICTED_MODEL} in prefill, weighted by multiply-accumulates; the matrix "
        "products that a mitigation adds run at the dense speed. 2:4+r without a row is the 2:4 row / (1 + r/4); other "
        "patterns without one count as 1."
    )
    return f"{what}\n\n{table}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
