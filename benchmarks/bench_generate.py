"""Decode speed of Transformers' generate() on a GPU: eager, compiled with a static cache, and StaticDecoder.

A model has random weights of published shapes, cut to a few layers. The time of a step is the difference of two calls
that generate different numbers of tokens; device is the part of it in which kernels ran. A step of generate() takes the
host's time plus the device's, because it reads a flag back from the device after every step.

    python benchmarks/bench_generate.py --model llama-3-8b --layers 4 --prompt 4096 \
        --csv benchmarks/results/h100/generate.csv
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from inference_models import CONFIGS, Mode, build, compile_parts
from timer import Rows

import nm_act
from nm_act.optimize.static_attention import ATTENTION

COLUMNS = (
    *("bench", "device", "model", "layers", "mode", "batch", "prompt", "step_ms", "device_ms", "tok_s", "speedup"),
    *("graphs", "graph_breaks", "cudagraph_skips", "first_s", "torch", "cuda", "commit", "date"),
)
FEW = 16
"""Tokens of the shorter call: the compiler and the graphs are done before its last."""

WAYS = ("eager", "static", "static-nm_act", "StaticDecoder", "StaticDecoder-parts")
"""generate() with a dynamic cache; with a compiled static one; with that and our attention; StaticDecoder, and with the
elementwise parts compiled as in bench_inference.py."""


def caller(way: str, model: torch.nn.Module, ids: torch.Tensor, longest: int) -> Callable[[int], object]:
    """A function of the number of new tokens."""
    if way.startswith("StaticDecoder"):
        decoder = nm_act.StaticDecoder(model, batch=ids.shape[0], max_tokens=longest)
        return lambda tokens: decoder.generate(ids, tokens)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if way != "eager":
        options |= {"cache_implementation": "static", "max_cache_len": longest}
    model.set_attn_implementation(ATTENTION if way.endswith("nm_act") else "sdpa")
    mask = torch.ones_like(ids)
    return lambda tokens: model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)


def seconds(function: Callable[[], object], cuda: bool) -> float:
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_seconds(function: Callable[[], object]) -> float:
    """Time in which kernels ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def measure(way: str, model: torch.nn.Module, ids: torch.Tensor, tokens: int, repeat: int) -> dict[str, str]:
    """The columns of one way of decoding."""
    from torch._dynamo.utils import counters

    cuda, steps = ids.is_cuda, tokens - FEW
    torch._dynamo.reset()
    counters.clear()
    undo = compile_parts(model) if way.endswith("parts") else lambda: None
    try:
        call = caller(way, model, ids, ids.shape[1] + tokens)
        first = seconds(lambda: call(FEW), cuda)
        call(FEW)
        found = [seconds(lambda: call(tokens), cuda) - seconds(lambda: call(FEW), cuda) for _ in range(repeat)]
        step = sorted(found)[len(found) // 2] / steps
        row = {"step_ms": f"{1e3 * step:.3f}", "tok_s": f"{len(ids) / step:.1f}", "first_s": f"{first:.1f}"}
        if cuda:
            kernels = device_seconds(lambda: call(tokens)) - device_seconds(lambda: call(FEW))
            row["device_ms"] = f"{1e3 * kernels / steps:.3f}"
        row["graphs"] = str(counters["stats"].get("unique_graphs", 0))
        row["graph_breaks"] = str(sum(counters["graph_break"].values()))
        row["cudagraph_skips"] = str(counters["inductor"].get("cudagraph_skips", 0))
        return row
    finally:
        undo()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", choices=list(CONFIGS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=144, help=f"of the longer call; the shorter one has {FEW}")
    parser.add_argument("--pattern", default="8:16")
    parser.add_argument("--way", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--csv", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    cuda = arguments.device.startswith("cuda")
    CONFIGS["cut"] = CONFIGS[arguments.model] | {"num_hidden_layers": arguments.layers}
    shape = (arguments.batch, arguments.prompt)
    ids = torch.randint(0, CONFIGS["cut"]["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    ids = ids.to(arguments.device)
    where = {"layers": arguments.layers, "batch": arguments.batch, "prompt": arguments.prompt}
    device = torch.cuda.get_device_name() if cuda else "cpu"
    rows = Rows(arguments.csv, COLUMNS, bench="generate", device=device, model=arguments.model)
    baseline = 0.0
    for mode in (Mode("dense", None), Mode(f"nm-{arguments.pattern}", nm_act.Recipe(arguments.pattern))):
        longest = arguments.prompt + arguments.tokens
        model = build("cut", mode, arguments.device, getattr(torch, arguments.dtype), longest)
        for way in arguments.way:
            row = measure(way, model, ids, arguments.tokens, arguments.repeat)
            baseline = baseline or float(row["tok_s"])
            row["speedup"] = f"{float(row['tok_s']) / baseline:.2f}"
            rows.append(mode=f"{mode.name} {way}", **where, **row)
            print(f"{mode.name:8} {way:20}", "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        del model


if __name__ == "__main__":
    main()
