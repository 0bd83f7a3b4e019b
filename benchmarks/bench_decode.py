"""sparse_linear for 1 to 4 tokens with a weight stored [in, out] (the gather kernel) against cuBLAS in bf16.

The whole operator is timed, selection included, as a CUDA graph over rotated operands, so that every weight is cold.
The baseline cublas_bf16 is torch.nn.functional.linear with the weight as models store it, [out, in]. gbps counts the
bytes that the operator has to read and write; it is also printed as a share of a device-to-device copy's bandwidth.

    python benchmarks/bench_decode.py --csv benchmarks/results/h100/decode.csv
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_timer import DeviceCopy, common_arguments, geometric_mean, interleaved, require_kernels
from shapes import LLAMA_3_8B, LLAMA_3_70B
from timer import Rows, percentiles, relative_error

import nm_act
from nm_act import NMPattern, reference
from nm_act.ops.e4m3 import quantise_rows

SHAPES = (*LLAMA_3_8B.values(), *LLAMA_3_70B.values())
TOKENS = (1, 2, 4)
PATTERNS = ("2:4", "4:8", "8:16", "16:32")
KINDS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "int8": torch.int8}
HEADLINE = "8:16"
COLD_BYTES = 200e6  # bytes read between two uses of the same operands; the L2 holds 60 MB
MAX_COPIES = 64
LIMIT = 5e-3
BARS = {"bf16": 1.7, "e4m3": 3.0}
LARGE_BAR, LARGE_BYTES = 1.85, 400e6
SMALL_BAR, SMALL_SHAPE = 1.45, (4096, 4096)


def in_out(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous().t()


class Weights:
    """The weight of one shape in every storage, in as many copies as the rotation needs."""

    def __init__(self, shape: tuple[int, int], kinds: list[str]):
        out_features, in_features = shape
        smallest = out_features * in_features * (1 if set(kinds) & {"e4m3", "int8"} else 2) / 2
        self.copies = max(2, min(MAX_COPIES, math.ceil(COLD_BYTES / smallest)))
        self.shape = shape
        self.stock, self.by_kind = [], {kind: [] for kind in kinds}
        for _ in range(self.copies):
            weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) / in_features**0.5
            self.stock.append(weight)
            for kind in kinds:
                values, scale = (weight, None) if kind == "bf16" else quantise_rows(weight, KINDS[kind])
                self.by_kind[kind].append((in_out(values), scale))


@dataclasses.dataclass
class Entry:
    """One timed operator: what it reads, and how it is called for each copy of the operands."""

    kind: str
    pattern: NMPattern
    moved: float
    calls: list[Callable]


def make_entry(weights: Weights, xs: list[torch.Tensor], kind: str, pattern: NMPattern) -> Entry:
    out_features, in_features = weights.shape
    tokens = xs[0].shape[0]
    needed = [(nm_act.prune(x, pattern) != 0).any(dim=0).sum().item() for x in xs]
    rows = sum(needed) / len(needed)
    moved = rows * out_features * (2 if kind == "bf16" else 1) + 2 * tokens * (in_features + out_features)
    operands = list(zip(xs, weights.by_kind[kind], strict=True))
    calls = [
        lambda x=x, w=w, s=s: nm_act.sparse_linear(x, w, pattern=pattern, weight_scale=s) for x, (w, s) in operands
    ]
    verify(calls[0], xs[0], *weights.by_kind[kind][0], pattern, f"{kind} {pattern}")
    return Entry(kind, pattern, moved, calls)


def verify(call: Callable, x: torch.Tensor, weight: torch.Tensor, scale, pattern: NMPattern, what: str) -> None:
    """Compare 256 outputs at either end with float64; called before timing."""
    y = call()
    for columns in (slice(0, 256), slice(-256, None)):
        part = {"weight_scale": scale[columns]} if scale is not None else {}
        exact = reference.sparse_linear(x, weight[columns], pattern=pattern, **part)
        error = relative_error(y[:, columns], exact)
        if not error < LIMIT:
            raise SystemExit(
                f"expected {what} at {list(weight.shape)} within {LIMIT} of float64, got {error}: not timed"
            )


def bench(rows: Rows, weights: Weights, tokens: int, patterns: list[str], copy: DeviceCopy, seconds: float) -> None:
    out_features, in_features = weights.shape
    xs = [torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(weights.copies)]
    parsed = [NMPattern(*map(int, pattern.split(":"))) for pattern in patterns]
    entries = [make_entry(weights, xs, kind, pattern) for kind in weights.by_kind for pattern in parsed]
    calls = {"copy": [copy]}
    calls["cublas"] = [lambda x=x, w=w: F.linear(x, w) for x, w in zip(xs, weights.stock, strict=True)]
    calls |= {str(index): entry.calls for index, entry in enumerate(entries)}
    # The copy is launched without a graph: as a graph node it is slower, too weak a baseline.
    times = interleaved(calls, seconds, eager=("copy",))
    copy_speed = copy.bytes_per_us(times["copy"])
    line = [f"cublas {percentiles(times['cublas'])[1]:.1f} us"]
    for index, entry in enumerate(entries):
        mine = times[str(index)]
        median = percentiles(mine)[1]
        row = rows.add(
            mine,
            times["cublas"],
            variant="sparse_linear",
            dtype=entry.kind,
            pattern=str(entry.pattern),
            stage="op",
            tokens=tokens,
            out_features=out_features,
            in_features=in_features,
            baseline="cublas_bf16",
            gbps=f"{entry.moved / median / 1e3:.1f}",
        )
        share = entry.moved / median / copy_speed
        line.append(f"{entry.kind} {entry.pattern} {median:.1f} us {row['speedup']}x {share:.0%} of copy")
    print(f"{tokens} x {out_features} x {in_features}: " + "; ".join(line), flush=True)


def summary(rows: list[dict]) -> None:
    """Geometric means for one token with their goals, and those of other token counts and patterns, which have none."""

    def chosen(**facts):
        return [row for row in rows if all(row[name] == value for name, value in facts.items())]

    def mean(selected):
        return geometric_mean([float(row["speedup"]) for row in selected])

    print("\ngeometric means over the shapes, against cublas_bf16")
    for kind in KINDS:
        for tokens in TOKENS:
            for pattern in PATTERNS:
                selected = chosen(dtype=kind, tokens=tokens, pattern=pattern)
                if not selected:
                    continue
                bar = f" (bar {BARS[kind]}x)" if tokens == 1 and kind in BARS else ""
                worst = min(selected, key=lambda row: float(row["speedup"]))
                where = f"{worst['out_features']} x {worst['in_features']}"
                line = f"  {kind} {pattern}, {tokens} tokens: {mean(selected):.3f}x{bar}"
                print(f"{line}, worst {worst['speedup']}x {where}")
    headline = chosen(dtype="bf16", tokens=1, pattern=HEADLINE)
    large = [row for row in headline if 2 * row["out_features"] * row["in_features"] >= LARGE_BYTES]
    small = [row for row in headline if (row["out_features"], row["in_features"]) == SMALL_SHAPE]
    print(f"  bf16 {HEADLINE} of 400 MB and more: {mean(large):.3f}x (bar {LARGE_BAR}x)")
    print(f"  bf16 {HEADLINE} of 4096 x 4096: {mean(small):.3f}x (bar {SMALL_BAR}x)")


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, choices=(1, 2, 3, 4))
    parser.add_argument("--patterns", nargs="+", metavar="N:M")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="dtype of the weight")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="instead of Llama-3's, such as 4096x14336")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    short = arguments.quick
    tokens = arguments.tokens or ((1,) if short else TOKENS)
    patterns = arguments.patterns or ([HEADLINE] if short else PATTERNS)
    kinds = arguments.kinds or (("bf16", "e4m3") if short else KINDS)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes] if arguments.shapes else SHAPES
    seconds = arguments.seconds / (2 if arguments.quick else 1)
    torch.manual_seed(0)
    rows, copy = Rows(arguments.csv, bench="decode", device=device, commit=arguments.commit), DeviceCopy()
    for shape in shapes:
        weights = Weights(shape, list(kinds))
        for count in tokens:
            bench(rows, weights, count, list(patterns), copy, seconds)
        del weights
    summary(rows.rows)


if __name__ == "__main__":
    main()
