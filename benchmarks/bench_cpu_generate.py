"""Tokens per second of Transformers' generate() on a CPU, and the time of a prefill: dense, sparse, and optimized.

One sample is one call of generate, prompt included, or one forward of a prompt of random tokens. The models take turns,
and the speed-up is the median over the rounds of the ratio to dense in the same round. All models generate the same
number of tokens. With one thread its own time is measured, which other processes do not lengthen. "dense optimized"
shows what nm_act.optimize gives without sparsity.

    python benchmarks/bench_cpu_generate.py MODEL --csv benchmarks/results/cpu/generate.csv
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from bench_cpu_decode import processor
from bench_inference import COLUMNS as INFERENCE_COLUMNS
from timer import Rows, percentiles

import nm_act
from nm_act.integrations.checkpoints import demo_model_path, load_model

COLUMNS = (*INFERENCE_COLUMNS, "dtype", "tokens", "rounds")
PROMPT = "The history of the city begins with"


def models_of(dense: torch.nn.Module, pattern: str) -> dict[str, torch.nn.Module]:
    """Mode -> model; no weights are shared, and all are copies: memory that a loader filled may be faster."""
    modes = {"dense": None, f"nm-{pattern}": pattern, f"nm-{pattern} optimized": pattern, "dense optimized": None}
    models = {}
    for mode, sparse in modes.items():
        models[mode] = copy.deepcopy(dense)
        if sparse:
            nm_act.sparsify(models[mode], nm_act.Recipe(sparse))
        if "optimized" in mode:
            nm_act.optimize(models[mode])
    return models


def clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    start = clock()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return clock() - start


@torch.no_grad()
def prefill_seconds(model: torch.nn.Module, prompt: torch.Tensor) -> float:
    start = clock()
    model(input_ids=prompt, logits_to_keep=1, use_cache=True)
    return clock() - start


def turns(models: dict[str, torch.nn.Module], rounds: int, sample: Callable) -> dict[str, list[float]]:
    """Mode -> seconds of each round; a first call of each warms up."""
    found: dict[str, list[float]] = {mode: [] for mode in models}
    for index in range(rounds + 1):
        for mode, model in models.items():
            taken = sample(model)
            if index:
                found[mode].append(taken)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, .gguf file or hub id; the demo's model if left out")
    parser.add_argument("--pattern", default="8:16")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens")
    parser.add_argument("--prefill", type=int, nargs="*", default=[16, 64, 256], help="tokens of prompts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    path = str(arguments.model or demo_model_path())
    device = f"{processor()} x{arguments.threads} {nm_act.build_info()['cpu_isa']}"
    rows = Rows(arguments.csv, COLUMNS, bench="cpu_generate", device=device, model=path.rsplit("/", 1)[-1])
    for dtype in arguments.dtype:
        dense, tokenizer = load_model(path, dtype=dtype)
        models = models_of(dense, arguments.pattern)
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
        taken = turns(models, arguments.rounds, lambda model, p=prompt: seconds(model, p, arguments.tokens))
        speeds = {mode: [arguments.tokens / each for each in times] for mode, times in taken.items()}
        common = {"dtype": dtype, "batch": 1, "rounds": arguments.rounds}
        _report(rows, speeds, prompt=prompt.shape[1], metric="generate_tok_s", tokens=arguments.tokens, **common)
        for tokens in arguments.prefill:
            ids = torch.randint(0, dense.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
            taken = turns(models, arguments.rounds, lambda model, ids=ids: prefill_seconds(model, ids))
            times = {mode: [1e3 * each for each in found] for mode, found in taken.items()}
            _report(rows, times, prompt=tokens, metric="prefill_ms", **common)


def _report(rows: Rows, found: dict[str, list[float]], **fields: object) -> None:
    faster_is_more = fields["metric"] == "generate_tok_s"
    base = percentiles(found["dense"])[1]
    for mode, values in found.items():
        p20, p50, p80 = percentiles(values)
        pairs = zip(values, found["dense"], strict=True)
        speedup = statistics.median(a / b if faster_is_more else b / a for a, b in pairs)
        spread = {"p20": f"{p20:.2f}", "p50": f"{p50:.2f}", "p80": f"{p80:.2f}"}
        spread |= {"baseline": "dense", "baseline_p50": f"{base:.2f}", "speedup": f"{speedup:.3f}"}
        rows.append(mode=mode, **fields, **spread)
        what = f"{fields['dtype']} {fields['metric']} {fields['prompt']:4}"
        print(f"{what} {mode:20} {p50:7.2f} ({p20:.2f} to {p80:.2f}), {speedup:.2f}x dense", flush=True)


if __name__ == "__main__":
    main()
