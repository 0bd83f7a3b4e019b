"""The CPU's sparse_linear against torch.nn.functional.linear and oneDNN's prepacked product, with weights of 32 MiB and
more.

Per shape and dtype, interleaved in one run: the dense layer as models store it ([out, in]), the dense layer with a
weight that oneDNN has prepacked (what serving engines run; the stronger baseline), the sparse layer (selection
included), the sparse layer with a prepacked copy (`optimize(prepack=True)`), our kernel reading every row (which shows
the part due to sparsity) and a plain read of memory. Above 4 tokens (8 in fp32) the sparse layer prunes and runs a
dense product, so one of its baselines is dense + prune, for both storages of the weight. The load of the machine is in
the last line of the output: a thread that has to wait for a core shows in every row.

    python benchmarks/bench_cpu_decode.py --tokens 1 2 4 8 16 64 256 --csv benchmarks/results/cpu/decode.csv
    python benchmarks/bench_cpu_decode.py --tokens 1 2 3 4 8 16 64 --threads 1 \
        --csv benchmarks/results/cpu/prepacked.csv
    python benchmarks/bench_cpu_decode.py --patterns 2:4 4:8 8:16 16:32 2:4+1 2:4+2 6:8 --dtypes bf16 \
        --csv benchmarks/results/cpu/patterns.csv
"""

import argparse
import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from shapes import LLAMA_3_8B
from timer import Rows, interleaved, percentiles, relative_error

import nm_act
from nm_act.ops.prepack import prepack_weight, why_not_prepacked

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
READ_BYTES = 256 << 20
DECODE_TOKENS = {"bf16": 4, "fp16": 4, "fp32": 8}
"""Up to so many tokens sparse_linear reads only the rows of survivors."""


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return (names[0].strip() if names else platform.processor()).replace(",", " ")


def verify(x, weight, selection) -> None:
    """Compare with float64; called before timing."""
    exact = nm_act.reference.sparse_linear(x, weight[:256], **selection)
    error = relative_error(nm_act.sparse_linear(x, weight, **selection)[..., :256], exact)
    limit = 1e-5 if x.dtype == torch.float32 else 1e-2
    if not error < limit:
        raise SystemExit(f"expected a relative error below {limit}, got {error}: not timed")


def bench(rows: Rows, name: str, shape, tokens: int, pattern, seconds: float, read_buffer) -> None:
    dtype, (out_features, in_features) = DTYPES[name], shape
    selection = {"pattern": pattern}
    stock = torch.randn(out_features, in_features, dtype=torch.float32).to(dtype)
    weight = stock.t().contiguous().t()
    x = torch.randn(tokens, in_features).to(dtype)
    verify(x, weight, selection)
    calls = {
        "dense": lambda: F.linear(x, stock),
        "sparse": lambda: nm_act.sparse_linear(x, weight, **selection),
        "prune": lambda: nm_act.prune(x, **selection),
        "read": read_buffer.sum,
    }
    packed = None if why_not_prepacked(stock) else prepack_weight(stock)
    if packed is not None:
        made = nm_act.NMPattern(str(pattern))
        arguments = (x, weight, packed, None, made.keep, made.group)
        linear, sparse = torch.ops.mkldnn._linear_pointwise, torch.ops.nm_act.sparse_linear_prepacked
        # Each behind a read, so that neither finds the copy in the cache.
        calls = {
            "evict": read_buffer.sum,
            "prepacked": lambda: linear(x, packed, None, "none", [], ""),
            **calls,
            "sparse_prepacked": lambda: sparse(*arguments, extra_columns=made.extra_columns),
        }
    if tokens <= DECODE_TOKENS[name]:
        calls["every_row"] = lambda: nm_act.gather_linear(x, weight)
    else:
        calls["dense_in_out"] = lambda: F.linear(x, weight)
        calls["sparse_out_in"] = lambda: nm_act.sparse_linear(x, stock, **selection)
    times = interleaved(calls, seconds)
    read = READ_BYTES / percentiles(times["read"])[1] / 1e3
    common = {"dtype": name, "tokens": tokens, "out_features": out_features, "in_features": in_features}

    def add(variant: str, share: float, baseline: str, baseline_times: list[float], kept: str) -> str:
        median = percentiles(times[variant])[1]
        gbps = stock.nbytes * share / median / 1e3
        row = rows.add(
            times[variant],
            baseline_times,
            **common,
            variant=variant,
            pattern=kept,
            stage="op",
            baseline=baseline,
            gbps=f"{gbps:.1f}",
            tflops=f"{2 * tokens * out_features * in_features / median / 1e6:.3f}",
        )
        return f"{variant} {median / 1e3:.2f} ms = {row['speedup']}x, {gbps / read:.0%} of {read:.0f} GB/s"

    if tokens <= DECODE_TOKENS[name]:
        # Several tokens need the union of their rows, four tokens per pass: count what is really read.
        passes = (nm_act.prune(x, **selection) != 0).split(4)
        needed = sum(rows.any(0).float().mean().item() for rows in passes)
        report = [add("sparse", needed, "F.linear", times["dense"], str(pattern))]
        report.append(add("every_row", len(passes), "F.linear", times["dense"], "dense"))
    else:
        plus_prune = {
            name: [dense + prune for dense, prune in zip(times[name], times["prune"], strict=True)]
            for name in ("dense", "dense_in_out")
        }
        report = [
            add("sparse_out_in", 1.0, "F.linear+prune", plus_prune["dense"], str(pattern)),
            add("sparse", 1.0, "F.linear[in,out]+prune", plus_prune["dense_in_out"], str(pattern)),
            add("sparse", 1.0, "F.linear+prune", plus_prune["dense"], str(pattern)),
        ]
    if packed is not None:
        for variant in ("prepacked", "sparse", "sparse_prepacked"):
            report.append(add(variant, 1.0, "prepacked", times["prepacked"], str(pattern)))
    rows.add(times["read"], times["read"], **common, variant="read", stage="read", gbps=f"{read:.1f}")
    dense = percentiles(times["dense"])[1] / 1e3
    print(
        f"{name} {pattern} {out_features:>5}x{in_features:<5} {tokens:>3} tokens: dense {dense:.2f} ms; "
        + "; ".join(report),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--patterns", nargs="+", default=["8:16"], type=nm_act.NMPattern)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time for each row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = f"{processor()} x{arguments.threads} {nm_act.build_info()['cpu_isa']}"
    print(device)
    rows = Rows(arguments.csv, bench="cpu_decode", device=device)
    read_buffer = torch.ones(READ_BYTES // 4)
    for name in arguments.dtypes:
        for tokens in arguments.tokens:
            for pattern in arguments.patterns:
                for shape in LLAMA_3_8B.values():
                    bench(rows, name, shape, tokens, pattern, arguments.seconds, read_buffer)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
