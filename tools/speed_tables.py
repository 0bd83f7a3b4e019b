"""Tables of measured and predicted speeds, for tools/readme.py."""

import json
from collections import Counter

import pattern_frontier
from result_files import EVALUATION, ROOT, geometric_mean, measured_rows, read_rows, times

import nm_act
from nm_act.lab.cost import places_of, predictions
from nm_act.lab.evaluate.results import markdown_table as table
from nm_act.lab.measured import Measured, shapes_of
from nm_act.lab.shapes import SHAPES

INFERENCE, TURNS = "benchmarks/results/h100/inference.csv", "benchmarks/results/h100/inference_turns.csv"
GENERATE = "benchmarks/results/cpu/generate.csv"
SERVED = "benchmarks/results/cpu/vllm.csv"
METRICS = {"prefill": "ttft_busy_ms", "decode": "decode_tok_s"}
"""What measures a phase of a whole model."""


def predicted() -> str:
    """Predicted and measured speed-ups of whole models, one sequence."""
    phases = {metric: phase for phase, metric in METRICS.items()}
    lines = []
    for row in read_rows(TURNS):
        name, mode, phase = row["model"].split(" (")[0], row["mode"], phases.get(row["metric"])
        if phase is None or (row["baseline"], row["batch"]) != ("dense_bf16", "1") or not mode.startswith("nm-"):
            continue
        if "-head-" in mode:  # predictions are of models whose head stays as it is
            continue
        pattern, _, decode = mode.removeprefix("nm-").removesuffix("-fp8").partition("/")
        recipe = nm_act.Recipe(pattern, decode_pattern=decode or None)
        dtype = "e4m3" if mode.endswith("-fp8") else "bf16"
        prompt, measured = int(row["prompt"]), float(row["speedup"])
        cost = Measured("h100", shapes_of(name), name, dtype, (phase,), prompt, prompt)
        found = predictions(cost, places_of(name, SHAPES[name][0]), recipe)[phase]
        numbers = f"{found:.2f}x", f"{measured:.2f}x", f"{100 * (found / measured - 1):+.1f} %"
        lines.append([name, mode, phase, str(prompt), *numbers])
    return table(["model", "mode", "phase", "prompt", "predicted", "measured", "difference"], lines, right=3)


def support() -> str:
    header = ["op", "when", "device", "dtypes", "patterns", "how"]
    return table(header, [[row[name] for name in header] for row in nm_act.support_table()], right=len(header))


def demo() -> str:
    result = json.loads((ROOT / "docs/demo/demo.json").read_text())
    rows = []
    for row in result["rows"]:
        speed, ratio = row["decode_tokens_per_second"], row["decode_speedup"]
        rows.append(
            [
                row["name"],
                f"{row['perplexity']:.2f}",
                "–" if row["name"] == "dense" else f"{row['change_percent']:+.0f} %",
                f"{speed['median']:.1f}",
                "–" if row["name"] == "dense" else f"{ratio['median']:.2f}x",
            ]
        )
    machine = result["environment"]
    caption = (
        f"{result['model']}, {result['dtype']}, {result['rows'][0]['tokens']} tokens of {result['text']['source']}; "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {result['date'][:10]}."
    )
    header = ["pattern", "perplexity", "change", "decode tokens/s", "speed-up"]
    return f"{table(header, rows)}\n\n{caption}\n\n![perplexity and decode speed by pattern](demo/demo.png)"


GPU_PAIRS = (
    ("bf16", "sparse_linear_out_in", "cublas_bf16", "bf16 over cuBLAS bf16"),
    ("e4m3", "sparse_linear_fp8", "scaled_mm_fp8", "e4m3 over dense e4m3"),
    ("e4m3", "sparse_linear_fp8", "cublas_bf16", "e4m3 over cuBLAS bf16"),
)


def gpu_speed() -> str:
    rows = [row for row in read_rows("benchmarks/results/h100/sparse_linear.csv") if row["stage"] == "op"]
    speedup = {
        (row["tokens"], row["out_features"], row["in_features"], row["dtype"], row["variant"], row["baseline"]): float(
            row["speedup"]
        )
        for row in rows
    }
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}, key=int):
        shapes = dict.fromkeys((row["out_features"], row["in_features"]) for row in rows if row["tokens"] == tokens)
        columns = [[speedup.get((tokens, *shape, *pair[:3])) for shape in shapes] for pair in GPU_PAIRS]
        means = [geometric_mean([value for value in column if value]) for column in columns]
        worst = [min((value for value in column if value), default=None) for column in columns]
        lines.append(
            [
                tokens,
                str(len(shapes)),
                *(f"{times(mean)} ({times(low)})" for mean, low in zip(means, worst, strict=True)),
            ]
        )
    header = ["tokens", "shapes", *(pair[3] for pair in GPU_PAIRS)]
    first = rows[0]
    origin = (
        f"{first['device']}, torch {first['torch']}, CUDA {first['cuda']}, {first['date']}: geometric means over the "
        "shapes, the worst shape in brackets; `benchmarks/results/h100/sparse_linear.csv`."
    )
    return f"{table(header, lines, right=0)}\n\n{origin}"


DECODE, PREPACKED = "benchmarks/results/cpu/decode.csv", "benchmarks/results/cpu/prepacked.csv"


def decode_rows() -> list[dict[str, str]]:
    return [row for row in read_rows(DECODE) if row["baseline"] != "prepacked"]


def caption(rows: list[dict[str, str]], source: str = DECODE) -> str:
    first = rows[0]
    return f"{first['device']}, torch {first['torch']}, {first['date']}, medians; `{source}`."


def cpu_prepacked() -> str:
    """The sparse layer without and with a prepacked copy, over a prepacked dense one: 20th percentiles, in rows of one
    run, because whatever else runs on the machine only ever adds time."""
    if not (ROOT / PREPACKED).exists():
        return f"All shapes on an idle machine: not measured yet (`benchmarks/bench_cpu_decode.py --csv {PREPACKED}`)."
    rows = [row for row in read_rows(PREPACKED) if row["baseline"] == "prepacked"]
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        cells.setdefault(key(row), {})[row["variant"]] = float(row["us_p20"])
    lines = []
    for (dtype, tokens, outputs, inputs), found in cells.items():
        times = [found[variant] for variant in ("prepacked", "sparse", "sparse_prepacked")]
        ratios = [f"{times[0] / time:.2f}x" for time in times[1:]]
        shown = [milliseconds(str(time)) for time in times]
        lines.append([f"{outputs} × {inputs}", dtype, tokens, *shown, *ratios])
    header = [
        "out × in",
        "dtype",
        "tokens",
        "prepacked dense ms",
        "sparse ms",
        "with a copy ms",
        "sparse",
        "with a copy",
    ]
    note = caption(rows, PREPACKED).replace("medians", "20th percentiles")
    return f"{table(header, lines, right=2)}\n\n{note}"


def cpu_decode() -> str:
    rows = [row for row in decode_rows() if row["tokens"] == "1"]
    every_row = {key(row): row for row in rows if row["variant"] == "every_row"}
    read = {key(row): float(row["gbps"]) for row in rows if row["variant"] == "read"}
    lines = []
    for row in rows:
        if row["variant"] != "sparse":
            continue
        whole = every_row[key(row)]
        lines.append(
            [
                f"{row['out_features']} × {row['in_features']}",
                row["dtype"],
                row["pattern"],
                milliseconds(row["baseline_us_p50"]),
                milliseconds(whole["us_p50"]),
                milliseconds(row["us_p50"]),
                f"{float(row['speedup']):.2f}x",
                f"{float(whole['us_p50']) / float(row['us_p50']):.2f}x",
                row["gbps"],
                f"{float(row['gbps']) / read[key(row)]:.0%}",
            ]
        )
    header = [
        "out × in",
        "dtype",
        "pattern",
        "F.linear ms",
        "every row ms",
        "sparse ms",
        "speed-up",
        "from skipping rows",
        "GB/s",
        "share of a plain read",
    ]
    return f"{table(header, lines, right=3)}\n\n{caption(rows)}"


def cpu_tokens() -> str:
    rows = decode_rows()
    lines = [
        [
            f"{row['out_features']} × {row['in_features']}",
            row["dtype"],
            row["tokens"],
            row["variant"],
            row["baseline"],
            milliseconds(row["baseline_us_p50"]),
            milliseconds(row["us_p50"]),
            f"{float(row['speedup']):.2f}x",
        ]
        for row in rows
        if row["variant"] != "read"
    ]
    header = ["out × in", "dtype", "tokens", "variant", "baseline", "baseline ms", "ms", "baseline / ours"]
    return f"{table(header, lines, right=5)}\n\n{caption(rows)}"


def key(row: dict[str, str]) -> tuple[str, ...]:
    return row["dtype"], row["tokens"], row["out_features"], row["in_features"]


def milliseconds(microseconds: str) -> str:
    return f"{float(microseconds) / 1e3:.2f}"


INFERENCE_METRICS = {"ttft_ms": "time to first token, ms", "ttft_busy_ms": "the same, back to back"}
INFERENCE_METRICS |= {"decode_tok_s": "decode tokens/s", "peak_gib": "peak GiB"}
ENERGIES = {"ttft_j": "J a prefill", "decode_j_tok": "J a decoded token"}

MOST_WATTS = dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 1.03 * 700)
"""Mean power that a card can draw: its limit, and as much above it as benchmarks/energy.py lets pass."""


def watts(rows: list[dict[str, str]], metric: str) -> list[float]:
    """Mean power that each energy of a whole-model run implies with the time measured beside it."""
    where = "model", "mode", "batch", "prompt"
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in where), {})[row["metric"]] = float(row["p50"])
    if metric == "ttft_j":
        prefills = [cell for cell in cells.values() if metric in cell]
        return [cell[metric] / cell.get("ttft_busy_ms", cell["ttft_ms"]) * 1e3 for cell in prefills]
    return [cell[metric] * cell["decode_tok_s"] for cell in cells.values() if metric in cell]


def possible_energies(rows: list[dict[str, str]]) -> dict[str, str]:
    """ENERGIES of a run, if the card can draw the power of each; one that it cannot draw discredits the method."""
    most = min(MOST_WATTS.get(row["device"], 0.0) for row in rows)
    found = {metric: watts(rows, metric) for metric in ENERGIES}
    if max((power for powers in found.values() for power in powers), default=0.0) > most:
        return {}
    return {metric: ENERGIES[metric] for metric, powers in found.items() if powers}


def against(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of one measurement, by baseline: the one over dense bf16, and the one over the stronger dense e4m3."""
    rows = [row for row in rows if row["baseline"] != row["mode"]]
    e4m3 = [row for row in rows if row["baseline"].startswith("dense_fp8") and not row["mode"].startswith("dense")]
    stronger = min(e4m3, key=lambda row: float(row["speedup"]), default=None)
    return [row for row in rows if row["baseline"] == "dense_bf16" or row is stronger]


def dense_e4m3(rows: list[dict[str, str]]) -> str:
    """The dense e4m3 baselines of a run, in words."""
    names = sorted({row["baseline"] for row in rows if row["baseline"].startswith("dense_fp8")})
    return names[0] if len(names) == 1 else f"the faster of {' and '.join(names)}"


def whole_models(source: str) -> str:
    """One row per mode, batch and prompt; each metric with its ratio to dense bf16 and to the stronger dense e4m3."""
    measured = measured_rows(source)
    if not measured:
        return "Whole models on a GPU: not measured yet (`benchmarks/bench_inference.py`)."
    cells: dict[tuple[object, ...], dict[str, list[dict[str, str]]]] = {}
    runs: Counter[tuple[str, ...]] = Counter()
    for row in measured:
        where = (row["model"], row["mode"], row["batch"], row["prompt"], row["commit"])
        repeated = (*where, row["metric"], row["baseline"])  # by another run of that commit
        cells.setdefault((*where, runs[repeated]), {}).setdefault(row["metric"], []).append(row)
        runs[repeated] += 1
    found = {row["metric"] for row in measured}
    titles = {metric: title for metric, title in INFERENCE_METRICS.items() if metric in found}
    lines, titles = [], titles | possible_energies(measured)
    for where, metrics in cells.items():
        line = [str(name) for name in where[:-2]]
        for metric in titles:
            rows = metrics.get(metric, [])
            ratios = [f"{row['speedup']}x of {row['baseline']}" for row in against(rows)]
            value = f"{float(rows[0]['p50']):.{2 if metric in ENERGIES else 1}f}" if rows else "–"
            line.append(f"{value} ({', '.join(ratios)})" if ratios else value)
        lines.append(line)
    first = measured[0]
    caption = (
        f"{first['device']}, torch {first['torch']}, CUDA {first['cuda']}, {first['date']}, medians; "
        "ratios above 1 are better"
    )
    header = ["model", "mode", "batch", "prompt", *titles.values()]
    return f"{table(header, lines, right=2)}\n\n{caption}; `{source}`."


def inference() -> str:
    """Modes one after another."""
    return whole_models(INFERENCE)


def turns() -> str:
    """Modes that take turns."""
    return whole_models(TURNS)


def results() -> str:
    """One row per mode: gains over dense of modes that took turns, memory, and the perplexity of its pattern."""
    quality = pattern_frontier.perplexity_by_pattern()
    first, *_ = measured = measured_rows(TURNS)
    where = [(name, first[name]) for name in ("model", "batch", "prompt")]
    measured = [row for row in measured if all(row[name] == value for name, value in where)]
    peaks = [row for row in measured_rows(INFERENCE) if row["metric"] == "peak_gib"]
    peaks = [row for row in peaks if all(row[name] == value for name, value in where)]
    cells: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in measured + peaks:
        cells.setdefault(row["mode"], {}).setdefault(row["metric"], []).append(row)
    cells = {mode: metrics for mode, metrics in cells.items() if "ttft_ms" in metrics}
    lines = []
    for mode, metrics in cells.items():
        pattern = "dense" if mode.startswith("dense") else mode.split("-")[1]
        gains = [gain(metrics[name]) for name in ("ttft_ms", "decode_tok_s")]
        perplexity = f"{float(quality[pattern]['value']):.1f}" if pattern in quality else "–"
        peak = f"{float(metrics['peak_gib'][0]['p50']):.1f} GiB" if "peak_gib" in metrics else "–"
        lines.append([first["model"], mode, *gains, peak, perplexity])
    cpu = [row for row in read_rows(GENERATE) if row["dtype"] == "float32"]
    longest = max((row for row in cpu if row["metric"] == "prefill_ms"), key=lambda row: int(row["prompt"]))["prompt"]
    for mode in dict.fromkeys(row["mode"] for row in cpu):
        pattern = mode.split()[0].removeprefix("nm-")
        perplexity = f"{float(quality[pattern]['value']):.1f}"
        mine = {(row["metric"], row["prompt"]): f"{float(row['speedup']):.2f}x" for row in cpu if row["mode"] == mode}
        decode = next(value for (metric, _), value in mine.items() if metric == "generate_tok_s")
        lines.append(["SmolLM2-135M, CPU", mode, mine["prefill_ms", longest], decode, "–", perplexity])
    header = ["model", "mode", "prefill", "decode", "memory", "perplexity of the pattern"]
    origin = (
        f"{first['device']}, {first['prompt']} tokens of prompt, batch {first['batch']}, over dense bf16 (in brackets "
        f"over {dense_e4m3(measured)}) with the same CUDA graphs, in turns (`{TURNS}`); {cpu[0]['device']}, float32, "
        f"{longest} tokens of prompt (`{GENERATE}`). Perplexity: "
        f"SmolLM2-135M, WikiText-2, float32, the pattern in every linear layer, no mitigation (`{EVALUATION}`)."
    )
    return f"{table(header, lines, right=2)}\n\n{origin}"


def gain(rows: list[dict[str, str]]) -> str:
    """Over dense bf16 and, in brackets, over the stronger dense e4m3."""
    if not against(rows):  # dense bf16 itself
        return "1.00x"
    over_bf16, *over_e4m3 = (f"{float(row['speedup']):.2f}x" for row in against(rows))
    return f"{over_bf16} ({over_e4m3[0]})" if over_e4m3 else over_bf16


def generate() -> str:
    rows, units = read_rows(GENERATE), {"generate_tok_s": "tokens/s", "prefill_ms": "ms of prefill"}
    lines = [
        [
            *(row["dtype"], row["prompt"], row["mode"], f"{row['p50']} {units[row['metric']]}"),
            *(f"{row['p20']} to {row['p80']}", f"{float(row['speedup']):.2f}x"),
        ]
        for row in rows
    ]
    first = rows[0]
    origin = (
        f"{first['model']}, {first['tokens']} generated tokens or a prefill alone, medians of {first['rounds']} "
        f"rounds, the speed-up that of the rounds' ratios; {first['device']}, torch {first['torch']}, {first['date']}"
    )
    header = ["dtype", "prompt", "mode", "median", "20th to 80th percentile", "speed-up"]
    return f"{table(header, lines, right=3)}\n\n{origin}; `{GENERATE}`."


def served() -> str:
    """vLLM's engines by the number of requests at once."""
    rows = read_rows(SERVED)
    names = list(dict.fromkeys(row["engine"] for row in rows))
    titles = {"sparse": rows[0]["pattern"], "prepack": f'{rows[0]["pattern"]}, `"prepack": true`'}
    titles["balanced"] = '`balanced`, `"prepack": true`'
    lines = []
    for requests, metric in dict.fromkeys((row["requests"], row["metric"]) for row in rows):
        found = {row["engine"]: row for row in rows if (row["requests"], row["metric"]) == (requests, metric)}
        prefill = metric.startswith("prefill")
        line = [f"a prompt of {found['dense']['prompt']}" if prefill else requests]
        for name in names:
            line.append(
                f"{float(found[name]['p50']):.0f} ({float(found[name]['p20']):.0f}–{float(found[name]['p80']):.0f})"
            )
            if name != "dense":
                line.append(f"{float(found[name]['speedup']):.2f}x")
        lines.append(line)
    header = ["requests"]
    for name in names:
        header += [f"{titles.get(name, name)}, tokens/s", *([] if name == "dense" else ["over dense"])]
    first = rows[0]
    loads = [float(row["load"]) for row in rows]
    origin = (
        f"{first['model']}, {first['dtype']}, {first['prompt']} tokens in and {first['generated']} out a request; "
        f"medians (20th to 80th percentile) of {first['rounds']} rounds, the engines in turn; {first['device']}, "
        f"vLLM {first['vllm']}, torch {first['torch']}, {first['date']}, load {min(loads)} to {max(loads)}, commit "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}; `{SERVED}`."
    )
    return f"{table(header, lines, right=1)}\n\n{origin}"
