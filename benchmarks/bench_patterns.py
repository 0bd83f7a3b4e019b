"""Patterns richer than 2:4 in prefill: the whole layer (stage op), and what selection costs in it (compress, prune).

Stage op, over the eight Llama-3 shapes, of each pattern: `lifted` is compress_packed of 2:4+1, then the sparse GEMM
over the lifted weight (2:4 itself needs no lifting and is the variant `sparse`); `prune+dense` is the selection kernel,
then the dense product: exact for every pattern, and what `sparse_linear` falls back to. e4m3 quantises each token
dynamically, ours and the baseline; dense e4m3 has no pruned variant.
Baselines of the same run, in turn with ours: cublas_bf16 and, for e4m3, scaled_mm_fp8 (bench_sparse_linear.py).

Stage compress and prune: the kernel alone. Their baseline `copy` is the time of the call's bytes (read + written) at
the speed of a large copy measured in turn, so `speedup` is the fraction of copy bandwidth. Stage prune has every group
size.

    python benchmarks/bench_patterns.py --csv benchmarks/results/h100/patterns.csv
"""

import dataclasses
from collections.abc import Callable

import torch
from bench_sparse_linear import LIMITS, SHAPES
from gpu_timer import DeviceCopy, common_arguments, copies_for, geometric_mean, interleaved, require_kernels
from timer import Rows, percentiles, relative_error

import nm_act
from nm_act import NMPattern, reference
from nm_act.ops.e4m3 import quantise_rows
from nm_act.ops.lifting import lifted_features

PATTERNS = ("2:4", "2:4+1")
PRUNED = ("1:2", "2:4", "4:8", "8:16", "16:32", "2:4+1", "2:4+2")
TOKENS = (1024, 4096, 16384)
QUICK = {"shapes": ((4096, 4096), (28672, 4096), (4096, 14336)), "tokens": (1024, 4096)}
DTYPES = ("bf16", "e4m3")


def keywords(text: str) -> dict:
    pattern = NMPattern(text)
    return {"pattern": pattern}


@dataclasses.dataclass
class Entry:
    """One timed function and what its CSV row says."""

    calls: list[Callable]
    row: dict
    baselines: list[str]
    bytes: int = 0


class Bench:
    """All functions of one shape and token count over shared, rotated operands."""

    def __init__(self, tokens: int, out_features: int, in_features: int, dtypes: tuple[str, ...]):
        self.tokens, self.out_features, self.in_features = tokens, out_features, in_features
        copies = copies_for(out_features * in_features + tokens * in_features)
        self.xs = [torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        scale = in_features**-0.5
        weights = [torch.randn(out_features, in_features, device="cuda").mul_(scale).bfloat16() for _ in range(copies)]
        self.pairs = list(zip(self.xs, weights, strict=True))
        self.fp8 = [(x, *quantise_rows(w)) for x, w in self.pairs] if "e4m3" in dtypes else []
        self.calls: dict[str, list[Callable]] = {
            "cublas_bf16": [lambda x=x, w=w: torch.mm(x, w.t()) for x, w in self.pairs]
        }
        self.entries: dict[str, Entry] = {}
        if self.fp8:
            import dense_fp8  # here: Triton is needed for this baseline only

            self.calls["scaled_mm_fp8"] = [
                lambda x=x, w=w, s=s: dense_fp8.product(*dense_fp8.quantise(x), w, s) for x, w, s in self.fp8
            ]

    def check(self, name: str, call: Callable, text: str, dtype: str) -> None:
        """Time nothing that is wrong: float64 on some tokens, the last among them, and some outputs."""
        rows = torch.randperm(self.tokens, device="cuda")[:64]
        rows[0], columns = self.tokens - 1, min(256, self.out_features)
        pruned = reference.prune(self.xs[0][rows], **keywords(text))
        if dtype == "e4m3":
            values, row_scale = quantise_rows(pruned)
            _, weight, scale = self.fp8[0]
            left, right = values.double() * row_scale.double()[:, None], weight.double() * scale.double()[:, None]
        else:
            left, right = pruned.double(), self.pairs[0][1].double()
        expected = left @ right[:columns].t()
        error = relative_error(call()[rows, :columns], expected)
        if not error < LIMITS[dtype]:
            where = f"{self.tokens} x {self.out_features} x {self.in_features}"
            raise SystemExit(f"expected {name} at {where} within {LIMITS[dtype]} of float64, got {error}: not timed")

    def add(self, key: str, calls: list[Callable], baselines: list[str], *, moved: int = 0, **row) -> None:
        if row["stage"] == "op":
            self.check(key, calls[0], row["pattern"], row["dtype"])
        self.entries[key] = Entry(calls, row, baselines, moved)

    def add_pattern(self, text: str, dtype: str) -> None:
        options, fp8 = keywords(text), dtype == "e4m3"
        options["activation_dtype"] = torch.float8_e4m3fn if fp8 else None
        variant = "sparse" if text == "2:4" else "lifted"
        lift = (lambda w: w) if text == "2:4" else (lambda w: nm_act.lift_weight(w, text))

        def layer(x, weight, scale=None):
            packed = nm_act.compress_packed(x, **options)
            return nm_act.sparse_gemm(packed, weight, column_scale=scale)

        operands = [(x, lift(w), *rest) for x, w, *rest in (self.fp8 if fp8 else self.pairs)]
        baselines = ["cublas_bf16", *(["scaled_mm_fp8"] if fp8 else [])]
        common = {"dtype": dtype, "pattern": text}
        calls = [lambda o=o: layer(*o) for o in operands]
        self.add(f"{variant} {text} {dtype}", calls, baselines, stage="op", variant=variant, **common)
        lifted = lifted_features(text, self.in_features)
        moved = self.tokens * (2 * self.in_features + (lifted // 2 if fp8 else lifted) + lifted // 8 + 4 * fp8)
        calls = [lambda x=x: nm_act.compress_packed(x, **options) for x in self.xs]
        self.add(
            f"compress {text} {dtype}", calls, ["copy"], moved=moved, stage="compress", variant="compress", **common
        )
        if not fp8:
            calls = [lambda x=x, w=w: torch.mm(nm_act.prune(x, **keywords(text)), w.t()) for x, w in self.pairs]
            key = f"prune+dense {text}"
            self.add(key, calls, baselines, stage="op", variant="prune+dense", **common)

    def add_prune(self, text: str) -> None:
        calls = [lambda x=x: nm_act.prune(x, **keywords(text)) for x in self.xs]
        rows = torch.tensor([0, self.tokens // 2, self.tokens - 1], device="cuda")
        if not torch.equal(calls[0]()[rows], reference.prune(self.xs[0][rows], **keywords(text))):
            raise SystemExit(f"expected prune {text} to equal the oracle, got other bits: not timed")
        row = {"stage": "prune", "variant": "prune", "dtype": "bf16", "pattern": text}
        self.add(f"prune {text}", calls, ["copy"], moved=4 * self.tokens * self.in_features, **row)

    def measure(self, rows: Rows, copy: DeviceCopy, seconds: float) -> None:
        functions = {**self.calls, **{key: entry.calls for key, entry in self.entries.items()}, "copy": [copy]}
        times = interleaved(functions, seconds, eager=("copy",))
        speed = copy.bytes_per_us(times["copy"])
        line = [f"cublas_bf16 {percentiles(times['cublas_bf16'])[1]:.1f} us"]
        for key, entry in self.entries.items():
            median = percentiles(times[key])[1]
            facts = {"tokens": self.tokens, "in_features": self.in_features, **entry.row}
            if entry.row["stage"] == "op":
                flops = 2 * self.tokens * self.out_features * self.in_features
                facts |= {"out_features": self.out_features, "tflops": f"{flops / median / 1e6:.1f}"}
            else:
                facts["gbps"] = f"{entry.bytes / median / 1e3:.1f}"
            speedups = []
            for baseline in entry.baselines:
                other = [entry.bytes / speed] if baseline == "copy" else times[baseline]
                row = rows.add(times[key], other, **facts, baseline=baseline)
                speedups.append(f"{row['speedup']}x {baseline.split('_')[0]}")
            line.append(f"{key} {median:.1f} us {' '.join(speedups)}")
        where = f"{self.tokens:>5} x {self.out_features:<5} x {self.in_features:<5}"
        print(f"{where} " + "; ".join(line), flush=True)


def summary(rows: list[dict]) -> None:
    """Geometric means over the shapes, and the worst fraction of the copy bandwidth where there is enough to do."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        key = (row["stage"], row["dtype"], row["pattern"], row["variant"], row["baseline"], row["tokens"])
        groups.setdefault(key, []).append(float(row["speedup"]))
    for (stage, dtype, pattern, variant, baseline, tokens), values in groups.items():
        name = f"{variant} {pattern} {dtype}, {tokens} tokens"
        if stage == "op":
            worst = f"worst {min(values):.3f}x over {len(values)} shapes"
            print(f"{name}, against {baseline}: {geometric_mean(values):.3f}x, {worst}")
        elif tokens >= 4096:
            print(
                f"{name}: worst {min(values):.0%} of the copy bandwidth" + (" (bar 85 %)" if stage == "prune" else "")
            )


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="instead of Llama-3's, such as 4096x14336")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    shapes = QUICK["shapes"] if arguments.quick else SHAPES
    if arguments.shapes:
        shapes = tuple(tuple(map(int, shape.split("x"))) for shape in arguments.shapes)
    torch.manual_seed(0)
    rows = Rows(arguments.csv, bench="patterns", device=device, commit=arguments.commit)
    copy, pruned_at = DeviceCopy(), set()
    for out_features, in_features in shapes:
        for tokens in arguments.tokens or (QUICK["tokens"] if arguments.quick else TOKENS):
            bench = Bench(tokens, out_features, in_features, arguments.dtypes)
            for dtype in arguments.dtypes:
                for text in arguments.patterns:
                    bench.add_pattern(text, dtype)
            if (tokens, in_features) not in pruned_at:  # no weight takes part
                pruned_at.add((tokens, in_features))
                for text in PRUNED:
                    bench.add_prune(text)
            bench.measure(rows, copy, arguments.seconds * (1 if arguments.quick else 2))
            del bench
    summary(rows.rows)


if __name__ == "__main__":
    main()
