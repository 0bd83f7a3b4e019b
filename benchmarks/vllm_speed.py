"""Tokens per second of vLLM, dense and sparse, for 1 to 16 requests at once; both engines take turns.

python benchmarks/vllm_speed.py MODEL [--recipe JSON] [--dtype bfloat16] [--requests 1 2 4 8 16]

The dense checkpoint is served twice, the second time with the recipe as --hf-overrides. Generation: 32 tokens
in, 64 out. Prefill: one request of 512 tokens, one out. The median of the rounds; a line says the machine's load.
"""

import argparse
import json
import os
import statistics
import time

from nm_act import Recipe

PREFILL = 512


def seconds(llm, requests: int, prompt: int, generated: int, seed: int) -> float:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [100 + seed + 7 * row + i % 1000 for i in range(prompt)]} for row in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", type=json.loads, default={"pattern": "8:16"})
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    sparse = {"quantization_config": {"quant_method": "nm_act", "recipe": Recipe(**arguments.recipe).to_dict()}}
    options = {"dtype": arguments.dtype, "max_model_len": 1024, "max_num_seqs": 16, "enable_prefix_caching": False}
    engines = [LLM(arguments.model, hf_overrides=overrides, **options) for overrides in ({}, sparse)]
    cases = [(n, 32, arguments.generated, n * arguments.generated) for n in arguments.requests] + [
        (1, PREFILL, 1, PREFILL)
    ]
    print(f"load at the start {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n")
    print(f"| requests | tokens in, out | dense, tokens/s | {arguments.recipe} | ratio |\n|---|---|---|---|---|")
    for requests, prompt, generated, counted in cases:
        for engine in engines:
            seconds(engine, requests, prompt, generated, 0)
        rounds = [
            [seconds(each, requests, prompt, generated, n) for each in engines] for n in range(1, arguments.rounds + 1)
        ]
        dense, ours = (counted / statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"| {requests} | {prompt}, {generated} | {dense:.0f} | {ours:.0f} | {ours / dense:.2f} |", flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
