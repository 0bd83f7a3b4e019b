"""Times configurations of the gather kernel within decode steps, for kLayerGathers of csrc/kernels/gather/config.h.

Eight layers of a model are optimized and decode one token in a CUDA graph, as users run them; one product of the layers
at a time is given another configuration. The graphs of a product's configurations take turns. The configuration that is
fastest alone is captured twice ("alone" and "again"): what the two differ by is noise, and so is a gain that is no
larger. In bf16 (and e4m3) with 8:16 all configurations of 512 threads and at least four slices are tried, elsewhere
only the present choices.

    python benchmarks/tune_decode_layers.py --csv benchmarks/results/h100/decode_layers.csv
"""

import argparse
import time
from collections.abc import Sequence

import torch
from inference_models import CONFIGS, Mode, build
from timer import Rows, percentiles

import nm_act
from nm_act.lab.shapes import SHAPES
from nm_act.optimize import operands

COLUMNS = (
    *("device", "model", "dtype", "pattern", "tokens", "cached", "out_features", "in_features"),
    *("lanes", "splits", "threads", "ahead", "choice", "us_p20", "us_p50", "us_p80", "repeats"),
    *("torch", "cuda", "commit", "date"),
)
LAYERS, STEPS, CACHED = 8, 16, 4096
CASES = (("bf16", "8:16"), ("fp16", "8:16"), ("bf16", "2:4"))
"""dtype and pattern; the first with all configurations, the others to confirm."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.bfloat16}
Config = tuple[int, int, int, int]


def products(model: str) -> list[tuple[int, int]]:
    """(out_features, in_features) of a layer's merged products, in their order."""
    _, hidden, inner, queries, keys = SHAPES[model]
    return [(queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner)]


def candidates(shape: tuple[int, int], dtype: str, pattern: str, device: tuple[int, int]) -> dict[str, Config]:
    """Configurations by what they are: "alone" and "again", the same one, "chosen" and, in the first case, others."""
    kind = (1, *shape, dtype == "e4m3", *map(int, pattern.split(":")), *device)
    alone, *others = (tuple(map(int, each)) for each in nm_act._C.gather_configs(*kind))
    chosen = tuple(map(int, nm_act._C.gather_configs(*kind, in_layer=True)[0]))
    found = {"alone": alone, "again": alone}
    if chosen != alone:
        found["chosen"] = chosen
    if (dtype, pattern) in (CASES[0], ("e4m3", CASES[0][1])):
        tried = [each for each in others if each[1] >= 4 and each[2] == 512 and each != chosen]
        found |= {f"tried {number}": each for number, each in enumerate(tried)}
    return found


class Override:
    """In place of decode_linear and sandwich_linear: products of one shape take a configuration of the caller."""

    def __init__(self):
        self.stock = operands.decode_linear, operands.sandwich_linear
        self.shape: tuple[int, int] | None = None
        self.config: Config | None = None
        operands.decode_linear, operands.sandwich_linear = self.decode_linear, self.sandwich_linear

    def undo(self) -> None:
        operands.decode_linear, operands.sandwich_linear = self.stock

    def decode_linear(self, x, weight, bias, pattern, **around):
        if tuple(weight.shape) != self.shape:
            return self.stock[0](x, weight, bias, pattern, **around)
        return self.tuned(x, weight, bias, pattern, **around)[0]

    def sandwich_linear(self, x, x_weight, residual, norm_weight, eps, weight, bias, pattern, **around):
        if tuple(weight.shape) != self.shape:
            return self.stock[1](x, x_weight, residual, norm_weight, eps, weight, bias, pattern, **around)
        around |= {"x_weight": x_weight, "x_residual": residual, "norm_weight": norm_weight, "eps": eps}
        return self.tuned(x, weight, bias, pattern, **around)

    def tuned(self, x, weight, bias, pattern, **around):
        return torch.ops.nm_act._tune_gather(x, weight, bias, pattern.keep, pattern.group, self.config, **around)


def microseconds(decoder: nm_act.StaticDecoder, graphs: dict[str, object], repeats: int) -> dict[str, list[float]]:
    """Microseconds a layer of each graph's step; the graphs take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats + 1):  # the first uploads the graphs
        for name, replay in graphs.items():
            decoder._rewind(CACHED)
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
            for _ in range(STEPS):
                replay()
            ends[1].record()
            torch.cuda.synchronize()
            times[name].append(1e3 * ends[0].elapsed_time(ends[1]) / STEPS / LAYERS)
    return {name: each[1:] for name, each in times.items()}


@torch.inference_mode()
def run(name: str, dtype: str, pattern: str, repeats: int, rows: Rows) -> None:
    """All products of one model."""
    # A head of few words: it is not what is timed.
    CONFIGS["cut"] = CONFIGS[name] | {"num_hidden_layers": LAYERS, "vocab_size": 256}
    mode = Mode("sparse", nm_act.Recipe(pattern), "decode" if dtype == "e4m3" else None)
    most = CACHED + STEPS + 1
    decoder = nm_act.StaticDecoder(build("cut", mode, "cuda", DTYPES[dtype], most), max_tokens=most)
    decoder.prefill(torch.zeros(1, CACHED, dtype=torch.long, device="cuda"))
    override = Override()
    facts = torch.cuda.get_device_properties(0)
    try:
        for shape in products(name):
            configs, graphs = candidates(shape, dtype, pattern, (facts.major, facts.multi_processor_count)), {}
            for choice, config in configs.items():
                override.shape, override.config = shape, config
                decoder.capture_step()
                graphs[choice] = decoder._step_graph
            times = {choice: percentiles(each) for choice, each in microseconds(decoder, graphs, repeats).items()}
            for choice, config in configs.items():
                low, median, high = times[choice]
                row = {"model": name, "dtype": dtype, "pattern": pattern, "tokens": 1, "cached": CACHED}
                row |= {"out_features": shape[0], "in_features": shape[1], "choice": choice.split()[0]}
                row |= dict(zip(("lanes", "splits", "threads", "ahead"), config, strict=True))
                row |= {"us_p20": f"{low:.2f}", "us_p50": f"{median:.2f}", "us_p80": f"{high:.2f}"}
                rows.append(**row, repeats=repeats)
            print(summary(name, dtype, pattern, shape, configs, times), flush=True)
    finally:
        override.undo()


def summary(name, dtype, pattern, shape, configs, times) -> str:
    """One line: the noise, and what the fastest configuration gains."""
    alone = times["alone"][1]
    noise = max(abs(times["again"][1] - alone), *(each[2] - each[0] for each in times.values()))
    best = min(times, key=lambda choice: times[choice][1])
    gain = alone - times[best][1]
    verdict = "gains" if gain > noise else "within noise"
    line = f"{name} {dtype} {pattern} {shape[0]} x {shape[1]}: alone {configs['alone']} {alone:.2f} us a layer, noise "
    line += f"{noise:.2f} ({100 * noise / alone:.1f} %), best {configs[best]} {gain:+.2f}: {verdict}"
    return line + (f"; chosen {alone - times['chosen'][1]:+.2f}" if "chosen" in times else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-3-8b", "qwen2.5-7b", "llama-3.2-1b", "gemma-3-4b"])
    parser.add_argument("--case", nargs="+", default=[f"{dtype}/{pattern}" for dtype, pattern in CASES])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    wrong = [name for name in arguments.model if name not in SHAPES or name not in CONFIGS]
    wrong += [case for case in arguments.case if case.split("/")[0] not in DTYPES or ":" not in case]
    if wrong:
        parser.error(f"expected models such as llama-3-8b and cases such as bf16/8:16 or e4m3/8:16, got {wrong[0]}")
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; run this where there is one")
    rows, start = Rows(arguments.csv, COLUMNS, device=torch.cuda.get_device_name()), time.perf_counter()
    for case in arguments.case:
        for name in arguments.model:
            run(name, *case.split("/"), arguments.repeats, rows)
            torch.cuda.empty_cache()
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
