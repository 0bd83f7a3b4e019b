"""Draws the path of a token: a layer's kernels in order, and what a whole decode step consists of.

python benchmarks/plot_steps.py benchmarks/results/h100/inference_steps*.csv docs/images/inference_steps.png

The rows are those of ``bench_inference.py --profile FILE``, in inference_steps_before.csv those of the first fused
version; of several runs of a mode, each is a bar of its own.
"""

from pathlib import Path

from plotting import plot_command

PRODUCTS = ("norm, select, q/k/v", "select, output, residual", "norm, select, gate/up", "activation, select, down")
"""What the products of a layer compute together, in their order."""

LAYERS = 32
"""Of llama-3-8b, for the rows that hold a step's whole time and a layer's kernels alone."""


def named(parts: list[str]) -> list[str]:
    """What the kernels of a layer do, where there is one product for each of PRODUCTS; else their own names."""
    products = [i for i, part in enumerate(parts) if part == "decode_linear"]
    if len(products) != len(PRODUCTS):
        return parts
    names = {i: name for i, name in zip(products, PRODUCTS, strict=True)}
    return [
        names.get(i, "rope, cache, attention" if part == "decode_attention" else part) for i, part in enumerate(parts)
    ]


def groups(rows: list[dict], phase: str) -> dict[tuple[str, str], list[tuple[str, float]]]:
    """(mode, commit) -> its parts with microseconds, in order, of one phase; a layer's kernels may be of several."""
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row in sorted((row for row in rows if row["phase"] == phase), key=lambda row: int(row["position"])):
        commit = "" if phase == "decode layer" else row["commit"]
        found.setdefault((row["mode"], commit), []).append((row["part"], float(row["us"])))
    return found


def stacks(rows: list[dict]) -> dict[str, list[tuple[str, float]]]:
    """Bars of whole steps: parts by kind where they were profiled, else the layers' kernels and what is left over."""
    layers = {mode: parts for (mode, _), parts in groups(rows, "decode layer").items()}
    bars = {}
    for (mode, commit), parts in groups(rows, "decode step").items():
        known, wall = dict(parts), dict(parts).pop("wall", 0.0)
        known.pop("wall", None)
        if not known and mode in layers:
            names = named([part for part, _ in layers[mode]])
            known = {name: LAYERS * us for name, (_, us) in zip(names, layers[mode], strict=True)}
            known["output head, the rest"] = max(0.0, wall - sum(known.values()))
        bars[f"{mode}\n{commit}"] = list((known or {"whole step": wall}).items())
    return dict(sorted(bars.items(), key=lambda bar: -sum(us for _, us in bar[1])))


def draw(rows: list[dict], target: str | Path) -> None:
    """Above: a layer as a line of kernels, one line a mode. Below: whole decode steps, stacked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {
        mode: list(zip(named([part for part, _ in parts]), [us for _, us in parts], strict=True))
        for (mode, _), parts in groups(rows, "decode layer").items()
    }
    steps = stacks(rows)
    kinds = dict.fromkeys(part for bars in (lines, steps) for parts in bars.values() for part, _ in parts)
    colours = {kind: plt.get_cmap("tab20")(i % 20) for i, kind in enumerate(kinds)}
    figure, (above, below) = plt.subplots(
        *(2, 1),
        figsize=(10, 2.8 + 0.5 * (len(lines) + len(steps))),
        layout="constrained",
        height_ratios=[len(lines) + 1, len(steps) + 1],
    )
    _bars(above, lines, 1.0, colours)
    above.set(xlabel="microseconds", title="One layer of a decode step, kernel by kernel")
    _bars(below, steps, 1e-3, colours)
    below.set(xlabel="milliseconds", title="A whole decode step")
    below.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colour, label=kind) for kind, colour in colours.items()],
        **{"fontsize": 7, "ncols": 5, "loc": "upper center", "bbox_to_anchor": (0.5, -0.16)},
    )
    first = rows[0]
    figure.suptitle(f"{first['model']}, {first['prompt']} tokens of prompt, {first['device']}")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


def _bars(axes, bars: dict[str, list[tuple[str, float]]], unit: float, colours: dict[str, tuple]) -> None:
    for place, parts in enumerate(bars.values()):
        start = 0.0
        for part, us in parts:
            width = us * unit
            axes.barh(place, width, left=start, color=colours[part], edgecolor="white")
            axes.text(start + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=7)
            start += width
        axes.text(start, place, f" {start:.4g}", va="center", fontsize=8, weight="bold")
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)


if __name__ == "__main__":
    plot_command(draw, __doc__, "bench_inference.py --profile")
