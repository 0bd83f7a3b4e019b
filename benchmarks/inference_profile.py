"""Where the device's time goes in a prefill and in a decode step, by kind of kernel."""

import re
from collections import Counter

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

KINDS = (
    ("compress", r"compress|prune|select|quantise|rms_norm_compress|silu_mul_compress"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("linear", r"gemm|gemv|cutlass|cublas|splitk|nvjet|sparse_linear|gather|addmm|::mm|::bmm|::linear"),
    ("norm", r"norm|rsqrt|_mean"),
)
"""Kind and what its kernels' names contain, the first match wins; the rest is "other"."""

STEPS = 8


def kind_of(name: str) -> str:
    """Kind of a kernel (of an operator on a CPU)."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile(title: str, decoder, ids, device) -> dict[str, dict[str, float]]:
    """Print and return milliseconds a prefill and a decode step by kind; "gaps" is what no kernel accounts for."""
    decoder.prefill(ids)
    decoder.step()
    phases = {
        "prefill": (lambda: decoder.prefill(ids), 1),
        "decode step": (lambda: [decoder.step() for _ in range(STEPS)], STEPS),
    }
    result = {}
    if decoder.length + STEPS > decoder.max_tokens:
        phases.pop("decode step")
    for name, (function, times) in phases.items():
        wall = device.seconds(function) * 1e3 / times
        decoder.prefill(ids)
        activity = ProfilerActivity.CUDA if device.cuda else ProfilerActivity.CPU
        with torch_profile(activities=[activity]) as trace:
            function()
            device.synchronize()
        spent: Counter = Counter()
        for event in trace.key_averages():
            micros = event.self_device_time_total if device.cuda else event.self_cpu_time_total
            spent[kind_of(event.key)] += micros / 1e3 / times
        result[name] = {"wall": wall, **spent, "gaps": max(0.0, wall - spent.total())}
        parts = ", ".join(f"{kind} {value:.3f}" for kind, value in result[name].items())
        print(f"profile of {title}, {name}, ms: {parts}", flush=True)
        for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[: 8 if device.cuda else 0]:
            print(
                f"    {event.self_device_time_total / 1e3 / times:8.3f} ms  {kind_of(event.key):<9} {event.key[:100]}"
            )
    return result
