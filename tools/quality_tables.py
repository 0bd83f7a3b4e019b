"""Tables of perplexities, for tools/readme.py."""

import math

from evaluation_report import NOISE, noise_of, read_rows_file
from result_files import EVALUATION, ROOT, perplexities, times, with_error

from nm_act.lab.evaluate.perplexity import paired_difference
from nm_act.lab.evaluate.results import markdown_table as table
from nm_act.recipe import NAMED

STAR = "An asterisk marks what was calibrated, searched or trained."
DAGGER = "A dagger marks what is predicted to be slower than dense in prefill, by more than 2 %."


def is_slower(row: dict[str, str]) -> bool:
    """Whether a row's prefill is predicted to lose to dense by more than the predictions' error."""
    return float(row["predicted_speedup"]) < 0.98


def marked(row: dict[str, str]) -> str:
    """Name of a row with the marks of `STAR` and `DAGGER`."""
    return row["name"] + (" *" if row["calibrated_on"] else "") + (" †" if is_slower(row) else "")


def perplexity_table(rows: list[dict[str, str]]) -> str:
    lines = [
        [
            marked(row),
            row["pattern"],
            row["layers"],
            f"{float(row['predicted_speedup']):.2f}x",
            f"{float(row['predicted_decode']):.2f}x",
            with_error(row),
        ]
        for row in sorted(rows, key=lambda row: float(row["value"]))
    ]
    first = rows[0]
    header = ["recipe", "pattern", "layers", "prefill, predicted", "decode, predicted", "perplexity"]
    star = f" {STAR}" if any(row["calibrated_on"] for row in rows) else ""
    slow = f" {DAGGER}" if any(is_slower(row) for row in rows) else ""
    origin = f"{first['model']}, {first['task']}, {first['samples']} tokens; `{EVALUATION}`.{star}{slow}"
    return f"{table(header, lines, right=3)}\n\n{origin}"


def quality() -> str:
    """Plain ACT in patterns, and the rows that no other row beats in perplexity and both speeds.

    Where held-out C4 was measured, it decides which rows these are; the table shows the test's perplexity.
    """
    losses = held_out()
    points = [(row, (*speeds(row), -losses.get(row["name"], float(row["value"])))) for row in perplexities()]
    if losses:  # rows that were not measured on it cannot be compared
        points = [(row, point) for row, point in points if row["name"] in losses]
    return perplexity_table(
        [
            row
            for row, point in points
            if ((row["method"], row["layers"]) == ("act", "all") and "%" not in row["pattern"])
            or not any(beats(other, point) for _, other in points)
        ]
    )


BALANCED = "wina+var 2:4 amber"
"""The row whose recipe is that of `balanced`."""


def best() -> str:
    """The best rows by speed for the front page, named recipes, plain patterns, and a low-rank pair."""
    rows = {row["name"]: row for row in perplexities()}
    rows["balanced (recommended)"] = rows[BALANCED] | {"name": "balanced (recommended)", "layers": "rule"}
    shown = [rows["dense"], rows["act 2:4"], rows["act 8:16"], rows["act+rsparse-128-fit 8:16"]]
    shown += [rows[f"{name} (recommended)"] for name in NAMED]
    losses = held_out() or {name: float(row["value"]) for name, row in rows.items()}
    for phase, targets in ((0, (1.1, 1.2, 1.3)), (1, (1.3, 1.45))):
        for target in targets:
            fast = [row for name, row in rows.items() if name in losses and speeds(row)[phase] >= target]
            shown += sorted(fast, key=lambda row: losses[row["name"]])[:1]
    return perplexity_table(list({row["name"]: row for row in shown}.values()))


def rules() -> str:
    """Rules by projection on held-out C4, among which the recommended recipes were chosen."""
    found = [row for row in perplexities("c4") if row["layers"] == "rule" and "trained" not in row["method"]]
    alike = ("dense", "wina+var 10:16", "wina+var 9:16", "wina+var 8:16", "wina+var 2:4")
    found += [row for row in perplexities("c4") if row["name"] in alike]
    found.sort(key=lambda row: float(row["value"]))
    lines = [
        [row["name"].removeprefix("rule "), *(times(speed) for speed in speeds(row)), with_error(row)] for row in found
    ]
    header = ["sparse projections", "prefill, predicted", "decode, predicted", "perplexity"]
    origin = (
        f"SmolLM2-135M, the first {found[0]['samples']} tokens of C4's documents from 1701 on, float32, "
        f"criterion wina and mitigation var unless a row says otherwise; `decode` has act alone. `{EVALUATION}`. "
        "`10:16, in down 7:16` is `decode`'s predecessor. A decode recipe is measured as if all tokens were decoded."
    )
    return f"{table(header, lines)}\n\n{origin}"


def held_out() -> dict[str, float]:
    """Name of a row -> perplexity on C4 that no calibration saw."""
    return {row["name"]: float(row["value"]) for row in perplexities("c4")}


TEXTS = ("wikitext2", "c4", "code", "french")


def texts() -> str:
    """Perplexities over the dense model's on every text, the best on WikiText-2 first."""
    found = {name: {row["name"]: row for row in perplexities(name)} for name in TEXTS}
    rows = [row for row in found["wikitext2"].values() if all(row["name"] in found[text] for text in TEXTS[1:])]
    rows.sort(key=lambda row: float(row["value"]))
    losses, noise = windows_of(rows[0]), noise_of(ROOT / "docs" / "evaluation" / NOISE)
    lines = []
    for index, row in enumerate(rows):
        cells = []
        for text in TEXTS:
            ratio = float(found[text][row["name"]]["value"]) / float(found[text]["dense"]["value"])
            own, below = losses[row["name"], text], [losses[other["name"], text] for other in rows[index + 1 :]]
            cells.append(f"{ratio:.2f}" + (" !" if any(apart(own, other, noise) for other in below) else ""))
        lines.append([marked(row), *(times(speed) for speed in speeds(row)), *cells])
    header = ["recipe", "prefill, predicted", "decode, predicted", *TEXTS]
    note = (
        "Perplexity over the dense model's, the first 20 480 tokens of each text. `!`: a row below, which is worse on "
        "WikiText-2, is better here, by more than twice the paired error and twice the noise of rounding. "
        f"{STAR} {DAGGER} `{EVALUATION}`."
    )
    return f"{table(header, lines)}\n\n{note}"


def windows_of(row: dict[str, str]) -> dict[tuple[str, str], list[float]]:
    """Losses by window of the rows that were measured as this one was, by name and text."""
    runs = read_rows_file(ROOT / "docs" / "evaluation" / "rows.jsonl")
    alike = (results for identity, results in runs if (identity["dtype"], identity.get("device", "")) == key_of(row))
    return {(result["variant"]["name"], result["task"]): result["scores"] for results in alike for result in results}


def key_of(row: dict[str, str]) -> tuple[str, str]:
    """What distinguishes the runs of rows.jsonl."""
    return row["dtype"], row["device"]


def apart(worse: list[float], better: list[float], noise: float) -> bool:
    """Whether the first losses are above the second by more than chance and rounding."""
    mean, stderr = paired_difference(worse, better)
    return mean > 2 * max(stderr, math.sqrt(2) * noise)


def speeds(row: dict[str, str]) -> tuple[float, float]:
    """Predicted speed-ups of a row in prefill and decode."""
    return float(row["predicted_speedup"]), float(row["predicted_decode"])


def searched() -> str:
    """Searched recipes beside the fixed rules."""
    return perplexity_table([row for row in perplexities() if row["layers"] != "all" or row["method"] == "dense"])


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether a point is at least another in every coordinate, and not equal to it."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
