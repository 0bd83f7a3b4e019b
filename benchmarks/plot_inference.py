"""Draws the end-to-end speed-ups from rows of bench_inference.py.

python benchmarks/plot_inference.py benchmarks/results/h200/inference.csv docs/images/inference.png
"""

import argparse
import csv
from pathlib import Path

METRICS = {"ttft_ms": "time to first token", "decode_tok_s": "decode tokens/s"}


def draw(rows: list[dict], target: str) -> None:
    """One panel a metric: speed-up over dense bf16 by prompt length, a line a mode and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(METRICS), figsize=(10, 4.2), layout="constrained")
    for axes, (metric, title) in zip(panels, METRICS.items(), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["metric"] == metric and row["baseline"] == "dense_bf16":
                line = lines.setdefault(f"{row['mode']}, batch {row['batch']}", {})
                line[int(row["prompt"])] = float(row["speedup"])
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="prompt tokens", ylabel="speed-up over dense bf16", title=title)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['model']}, {rows[0]['device']}")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("png")
    arguments = parser.parse_args()
    with arguments.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"expected rows in {arguments.csv}, found none; run bench_inference.py first")
    draw(rows, arguments.png)


if __name__ == "__main__":
    main()
