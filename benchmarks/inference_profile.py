"""Where the device's time goes in a prefill and a decode step: by kind of kernel, and by kernel in a layer."""

import re
from collections import Counter

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

KINDS = (
    ("compress", r"compress|prune|select|quantise|rms_norm_compress|silu_mul_compress"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("linear", r"gemm|gemv|cutlass|cublas|splitk|nvjet|sparse_linear|gather|addmm|::mm|::bmm|::linear|scale_product"),
    ("norm", r"norm|rsqrt|_mean"),
)
"""Kind and what its kernels' names contain, the first match wins; the rest is "other"."""

STEPS = 8

COLUMNS = (
    *("device", "model", "mode", "batch", "prompt", "phase", "position", "part", "us"),
    *("torch", "cuda", "commit", "date", "source"),
)
"""Of the rows that ``bench_inference.py --profile FILE`` writes and plot_steps.py draws. ``phase`` is "prefill" or
"decode step", with kinds as parts, or "decode layer", with a layer's kernels in order."""

_SHORT = (("gather_kernel", "decode_linear"), ("_kernel", ""), ("nm_act::", ""), ("(anonymous namespace)::", ""))


def short(name: str) -> str:
    """A kernel's name without templates, arguments and namespaces."""
    name = re.sub(r"^void ", "", name)
    for old, new in _SHORT:
        name = name.replace(old, new)
    return re.split(r"[<(]", name, maxsplit=1)[0][:40]


def layer_of(kernels: list[tuple[str, float]], layers: int) -> list[tuple[str, float]]:
    """The kernels of one layer with their mean microseconds, from those of a whole step; empty if no order repeats."""
    names = [name for name, _ in kernels]
    period = sum(count // layers for count in Counter(names).values())
    for start in range(len(names) - period * layers + 1) if period else ():
        part = kernels[start : start + period * layers]
        if all(name == part[i % period][0] for i, (name, _) in enumerate(part)):
            return [(part[i][0], sum(us for _, us in part[i::period]) / layers) for i in range(period)]
    return []


def in_order(trace) -> list[tuple[str, float]]:
    """`alone` of the kernels of a trace."""
    events = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    return alone([(event.name, event.time_range.start, event.time_range.end) for event in events])


def alone(kernels: list[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Kernels (name, start, end) in the order of their ends, with the time for which none before them ran.

    Launches overlap (programmatic dependent launch), so that the times of all kernels add up to more than a step takes;
    these do not.
    """
    times, before = [], 0.0
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[2]):
        times.append((name, end - max(start, before)))
        before = end
    return times


def step_layer(kernels: list[tuple[str, float]], layers: int) -> list[tuple[str, float]]:
    """`layer_of` the mean of STEPS equal steps."""
    size, rest = divmod(len(kernels), STEPS)
    steps = [kernels[i * size : (i + 1) * size] for i in range(STEPS)]
    if rest or any([name for name, _ in step] != [name for name, _ in steps[0]] for step in steps):
        return []
    return layer_of([(step[0][0], sum(us for _, us in step) / STEPS) for step in zip(*steps, strict=True)], layers)


def rows_of(result: dict[str, dict[str, float]], layer: list[tuple[str, float]]) -> list[dict]:
    """Rows of COLUMNS, without what is common to them."""
    rows = [
        {"phase": phase, "position": i, "part": part, "us": f"{1e3 * ms:.4g}"}
        for phase, parts in result.items()
        for i, (part, ms) in enumerate(parts.items())
    ]
    rows += [
        {"phase": "decode layer", "position": i, "part": short(name), "us": f"{us:.4g}"}
        for i, (name, us) in enumerate(layer, 1)
    ]
    return rows


def kind_of(name: str) -> str:
    """Kind of a kernel (of an operator on a CPU)."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile(title: str, decoder, ids, device) -> tuple[dict[str, dict[str, float]], list[tuple[str, float]]]:
    """Print and return milliseconds a prefill and a decode step by kind; "gaps" is what no kernel accounts for.

    And a layer's kernels in a decode step on CUDA, with microseconds.
    """
    decoder.prefill(ids)
    decoder.step()
    phases = {
        "prefill": (lambda: decoder.prefill(ids), 1),
        "decode step": (lambda: [decoder.step() for _ in range(STEPS)], STEPS),
    }
    result, layer = {}, []
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
        on_cpu = [] if device.cuda else [(event.key, event.self_cpu_time_total) for event in trace.key_averages()]
        for kernel, micros in in_order(trace) or on_cpu:
            spent[kind_of(kernel)] += micros / 1e3 / times
        result[name] = {"wall": wall, **spent, "gaps": max(0.0, wall - spent.total())}
        parts = ", ".join(f"{kind} {value:.3f}" for kind, value in result[name].items())
        print(f"profile of {title}, {name}, ms: {parts}", flush=True)
        for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[: 8 if device.cuda else 0]:
            print(
                f"    {event.self_device_time_total / 1e3 / times:8.3f} ms  {kind_of(event.key):<9} {event.key[:100]}"
            )
        if name == "decode step" and device.cuda:
            layer = step_layer(in_order(trace), decoder.model.config.get_text_config().num_hidden_layers)
            print("    a layer, us: " + ", ".join(f"{short(kernel)} {us:.1f}" for kernel, us in layer), flush=True)
    return result, layer
