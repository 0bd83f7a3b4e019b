"""Tokens per second of Transformers' generate() on a CPU: dense, sparse, and sparse after nm_act.optimize.

One sample is one call of generate, prompt included. The models take turns, and the speed-up is the median over the
rounds of the ratio to dense in the same round. All models generate the same number of tokens.

    python benchmarks/bench_cpu_generate.py MODEL --csv benchmarks/results/cpu/generate.csv
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from bench_cpu_decode import processor
from bench_inference import COLUMNS as INFERENCE_COLUMNS
from timer import Rows, percentiles

import nm_act
from nm_act.integrations.checkpoints import demo_model_path, load_model

COLUMNS = (*INFERENCE_COLUMNS, "tokens", "rounds")
PROMPT = "The history of the city begins with"


def models_of(dense: torch.nn.Module, pattern: str) -> dict[str, torch.nn.Module]:
    """Mode -> model; no weights are shared."""
    sparse, optimized = (nm_act.sparsify(copy.deepcopy(dense), nm_act.Recipe(pattern)).model for _ in range(2))
    nm_act.optimize(optimized)
    return {"dense": dense, f"nm-{pattern}": sparse, f"nm-{pattern} optimized": optimized}


def seconds(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, .gguf file or hub id; the demo's model if left out")
    parser.add_argument("--pattern", default="8:16")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    path = str(arguments.model or demo_model_path())
    dense, tokenizer = load_model(path, dtype="float32")
    models = models_of(dense, arguments.pattern)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    speeds: dict[str, list[float]] = {mode: [] for mode in models}
    for index in range(arguments.rounds + 1):
        for mode, model in models.items():
            taken = seconds(model, prompt, arguments.tokens)
            if index:  # the first call warms up
                speeds[mode].append(arguments.tokens / taken)
    device = f"{processor()} x{arguments.threads} {nm_act.build_info()['cpu_isa']}"
    rows = Rows(arguments.csv, COLUMNS, bench="cpu_generate", device=device, model=path.rsplit("/", 1)[-1])
    for mode, values in speeds.items():
        p20, p50, p80 = percentiles(values)
        speedup = statistics.median(a / b for a, b in zip(values, speeds["dense"], strict=True))
        spread = {"p20": f"{p20:.2f}", "p50": f"{p50:.2f}", "p80": f"{p80:.2f}"}
        base = {"baseline": "dense", "baseline_p50": f"{percentiles(speeds['dense'])[1]:.2f}"}
        fields = {"mode": mode, "batch": 1, "prompt": prompt.shape[1], "metric": "generate_tok_s"}
        fields |= {"tokens": arguments.tokens, "rounds": arguments.rounds}
        rows.append(**fields, **spread, **base, speedup=f"{speedup:.3f}")
        print(f"{mode:20} {p50:6.2f} tokens/s ({p20:.2f} to {p80:.2f}), {speedup:.2f}x dense")


if __name__ == "__main__":
    main()
