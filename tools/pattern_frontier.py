"""What every pattern keeps, costs and gains, from committed result files.

    python tools/pattern_frontier.py docs/images/patterns.png

draws perplexity against speed-up; `summary()` is the table of the same figures in docs/results.md. A speed-up is the
geometric mean over the measured shapes, of the fastest variant. What was not measured is missing in the plot and a
dash in the table.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from result_files import geometric_mean, measured_rows, perplexities, times, with_error

from nm_act.files import write_atomic
from nm_act.lab.evaluate.results import markdown_table
from nm_act.ops.lifting import is_lifted, lifted_features
from nm_act.patterns import WINDOW_SPAN, TopKPattern, as_pattern

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "2:4+1", "2:4+2", "6:8", "50%")


@dataclass(frozen=True)
class Speed:
    """A speed-up that benchmarks measure for several patterns, and where their CSV files have it."""

    title: str
    paths: tuple[str, ...]
    dtype: str
    baseline: str
    tokens: str

    def by_pattern(self) -> dict[str, float]:
        """Geometric mean over the shapes by pattern, the fastest variant's."""
        wanted = {"stage": "op", "dtype": self.dtype, "baseline": self.baseline, "tokens": self.tokens}
        groups: dict[tuple[str, ...], list[float]] = {}
        for path in self.paths:
            for row in measured_rows(path):
                if all(row[name] == value for name, value in wanted.items()):
                    groups.setdefault((row["pattern"], path, row["variant"]), []).append(float(row["speedup"]))
        means: dict[str, float] = {}
        for (pattern, *_), values in groups.items():
            means[pattern] = max(geometric_mean(values), means.get(pattern, 0.0))
        return means


PREFILL = tuple(f"benchmarks/results/h100/{name}.csv" for name in ("patterns", "sparse_linear"))
SPEEDS = (
    Speed("prefill, H100, bf16", PREFILL, "bf16", "cublas_bf16", "4096"),
    Speed("prefill, H100, e4m3", PREFILL, "e4m3", "scaled_mm_fp8", "4096"),
    Speed("decode, H100, bf16", ("benchmarks/results/h100/decode.csv",), "bf16", "cublas_bf16", "1"),
    Speed("decode, CPU, bf16", ("benchmarks/results/cpu/patterns.csv",), "bf16", "F.linear", "1"),
)


def lifted(text: str) -> str:
    """Extra weight memory that the pattern needs on sparse tensor cores."""
    pattern = as_pattern(text)
    if text == "2:4":
        return "0 %"
    if isinstance(pattern, TopKPattern) or not is_lifted(pattern):
        return "–"
    return f"{100 * (lifted_features(pattern, WINDOW_SPAN) / WINDOW_SPAN - 1):g} %"


def perplexity_by_pattern() -> dict[str, dict[str, str]]:
    """Rows of plain ACT in every layer, and the dense row."""
    rows = perplexities()
    return {row["pattern"]: row for row in rows if row["layers"] == "all" and row["method"] in ("act", "dense")}


def summary() -> str:
    """A line per pattern: kept fraction, perplexity, extra weight memory, speed-ups."""
    quality, speeds = perplexity_by_pattern(), [speed.by_pattern() for speed in SPEEDS]
    lines = []
    for text in PATTERNS:
        row = quality.get(text)
        value = "–" if row is None else with_error(row)
        gains = [times(speed.get(text)) for speed in speeds]
        lines.append([text, f"{100 * as_pattern(text).kept_fraction:g} %", value, lifted(text), *gains])
    header = ["pattern", "kept", "perplexity", "extra weight memory", *(speed.title for speed in SPEEDS)]
    dense = quality["dense"]
    origin = (
        f"Perplexity of {dense['model']} (dense {float(dense['value']):.2f}), plain ACT in every layer. Extra weight "
        "memory: of the windows that put the pattern on sparse tensor cores; a dash: it has none. Speed-ups: geometric "
        "means over Llama-3's projections, selection included, of 4096 tokens (prefill) and one (decode), over dense "
        "bf16 or dense e4m3; a dash: not measured."
    )
    own = speeds[-1].get("dense")
    if own is not None:
        origin += f" On the CPU our loop over all rows, without sparsity, is {times(own)} already."
    return f"{markdown_table(header, lines)}\n\n{origin}"


def draw(target: Path) -> None:
    """Perplexity against speed-up, a series for every speed-up that is measured."""
    from matplotlib.figure import Figure

    quality = {text: float(row["value"]) for text, row in perplexity_by_pattern().items()}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, speed in enumerate(SPEEDS):
        measured = {text: gain for text, gain in speed.by_pattern().items() if text in quality}
        if measured:
            axes.scatter(
                list(measured.values()), [quality[text] for text in measured], color=f"C{index}", label=speed.title
            )
        for text, gain in measured.items():
            label = "no sparsity, our loop" if text == "dense" else text
            # Below the point for every other series, so that equal patterns at nearly equal speed-ups stay readable.
            offset = (4, -11) if index % 2 else (4, 3)
            axes.annotate(label, (gain, quality[text]), xytext=offset, textcoords="offset points", fontsize=8)
    axes.axhline(quality["dense"], color="grey", linewidth=0.8, label="dense")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes.set(xlabel="speed-up over dense, selection included", ylabel="perplexity, plain ACT in every layer")
    axes.legend(loc="center left")
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    write_atomic(target, image.getvalue())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("expected the path of the image to draw; see the head of this file")
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    draw(target)
