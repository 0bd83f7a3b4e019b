"""Draws the speed-up of sparse_linear over dense products against the number of tokens, from the committed CSV.

python benchmarks/plot_sparse_linear.py benchmarks/results/h100/sparse_linear.csv docs/images/sparse_linear.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from gpu_timer import geometric_mean
from plotting import plot_command

LINES = {
    "bf16 2:4 / bf16 cuBLAS": ("bf16", "sparse_linear_out_in", "cublas_bf16"),
    "e4m3 2:4 / e4m3 dense": ("e4m3", "sparse_linear_fp8", "scaled_mm_fp8"),
    "e4m3 2:4 / bf16 cuBLAS": ("e4m3", "sparse_linear_fp8", "cublas_bf16"),
}


def draw(rows: list[dict[str, str]], target: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for index, (label, want) in enumerate(LINES.items()):
        speedups: dict[int, list[float]] = {}
        for row in rows:
            if row["stage"] == "op" and (row["dtype"], row["variant"], row["baseline"]) == want:
                speedups.setdefault(int(row["tokens"]), []).append(float(row["speedup"]))
        tokens = sorted(speedups)
        axes.plot(tokens, [geometric_mean(speedups[t]) for t in tokens], marker="o", color=f"C{index}", label=label)
        lows, highs = [min(speedups[t]) for t in tokens], [max(speedups[t]) for t in tokens]
        axes.fill_between(tokens, lows, highs, color=f"C{index}", alpha=0.15, linewidth=0)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens", ylabel="speed-up (selection included)", title=f"sparse_linear, {rows[0]['device']}")
    axes.legend(title="geometric mean and range over the shapes")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    plot_command(draw, __doc__, "bench_sparse_linear.py")
