"""Draws the end-to-end speed-ups from rows of bench_inference.py.

python benchmarks/plot_inference.py benchmarks/results/h100/inference.csv docs/images/inference.png
"""

from pathlib import Path

from plotting import plot_command

METRICS = {"ttft_ms": "time to first token", "decode_tok_s": "decode tokens/s"}


def draw(rows: list[dict], target: str | Path) -> None:
    """One panel per metric: speed-up over dense bf16 by prompt length, one line per mode and batch."""
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


if __name__ == "__main__":
    plot_command(draw, __doc__, "bench_inference.py")
