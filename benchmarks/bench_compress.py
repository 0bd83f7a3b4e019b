"""2:4 compression, alone and fused with RMSNorm and SiLU, against the device's copy bandwidth.

The baseline `copy` is the time that the call's bytes (read + written) take at the speed of a large copy, measured
alternately, so `speedup` is the fraction of the copy bandwidth. Stage prune is the selection kernel with dense output.
The producers have a second row, `<name>/dense_floor`: the bytes of the same fused operator with a dense output of x's
type. With --others: `cusparselt_bf16` is `torch._cslt_compress` of an already pruned operand, and
`cutlass_compressor` is CUTLASS's kernel for the same operand (building it with nvcc takes longer than a quick run).

    python benchmarks/bench_compress.py --csv benchmarks/results/h100/compress.csv
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cutlass_compressor import compress as cutlass_compress
from gpu_timer import DeviceCopy, common_arguments, copies_for, interleaved, require_kernels
from timer import Rows, percentiles, relative_error

import nm_act
from nm_act import NMPattern, reference

FEATURES = (4096, 8192, 14336, 28672)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK = {"features": (4096, 14336), "tokens": (64, 512, 4096, 16384)}
PRUNED = ("2:4", "4:8", "8:16", "16:32")  # stage prune: the selection kernel with a dense output
OTHERS_TOKENS = 1024  # with fewer, the host time of the other compressors would be measured
E4M3 = torch.float8_e4m3fn
# Per cent of the copy bandwidth from 4096 x 4096 on.
BARS = {
    **{f"compress {label}": 85 for label in ("bf16", "e4m3")},
    **{f"compress+{statistic} {label}": 85 for statistic in ("variance", "mean") for label in ("bf16", "e4m3")},
    **{f"compress+median {label}": 60 for label in ("bf16", "e4m3")},
    "compress+channel_scale e4m3": 85,
    **{f"prune {text}": 90 for text in ("8:16", "16:32")},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel: how it is called, and how many dense tensors it reads and writes."""

    name: str
    dtype: torch.dtype
    fp8: bool
    call: Callable[["Operands"], tuple[torch.Tensor, ...]]
    reads: int = 1
    writes: int = 0
    produces: Callable[["Operands"], torch.Tensor] | None = None  # plain torch, for the producers

    @property
    def label(self) -> str:
        return "e4m3" if self.fp8 else {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def bytes(self, tokens: int, features: int) -> int:
        values = features // 2 * (1 if self.fp8 else 2)
        return tokens * (features * 2 * (self.reads + self.writes) + values + features // 8 + (4 if self.fp8 else 0))

    def dense_bytes(self, tokens: int, features: int) -> int:
        return tokens * features * 2 * (self.reads + self.writes + 1)


class Operands:
    """One set of inputs for every variant of a dtype."""

    def __init__(self, tokens: int, features: int, dtype: torch.dtype):
        self.x, self.other = (torch.randn(tokens, features, device="cuda", dtype=dtype) for _ in range(2))
        self.weight = torch.ones(features, device="cuda", dtype=dtype)
        self.scale = torch.ones(features, device="cuda")


def rms_norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (h.float() * torch.rsqrt(h.float().square().mean(dim=-1, keepdim=True) + 1e-6)).to(h.dtype) * weight


def prune(x: torch.Tensor, text: str) -> torch.Tensor:
    pattern = NMPattern(text)
    return nm_act.prune(x, pattern)


def variants() -> list[Variant]:
    half = torch.bfloat16
    result = [
        Variant("compress", torch.float16, False, lambda o: nm_act.compress_packed(o.x)),
        Variant("compress_neutral", half, False, lambda o: nm_act.compress(o.x)),
    ]
    for fp8 in (False, True):
        dtype = torch.float8_e4m3fn if fp8 else None

        def packed(operands, dtype=dtype, **options):
            return nm_act.compress_packed(operands.x, activation_dtype=dtype, **options)

        def normed(operands, residual=None, dtype=dtype):
            return nm_act.rms_norm_compress(operands.x, operands.weight, 1e-6, residual, activation_dtype=dtype)

        def gated(operands, dtype=dtype):
            return nm_act.silu_mul_compress(operands.x, operands.other, activation_dtype=dtype)

        result += [
            Variant("compress", half, fp8, packed),
            Variant("compress+channel_scale", half, fp8, lambda o, packed=packed: packed(o, channel_scale=o.scale)),
            Variant("compress+variance", half, fp8, lambda o, packed=packed: packed(o, variance_correction=True)),
            Variant("compress+mean", half, fp8, lambda o, packed=packed: packed(o, token_shift="mean")),
            Variant("compress+median", half, fp8, lambda o, packed=packed: packed(o, token_shift="median")),
            Variant("rms_norm_compress", half, fp8, normed, produces=lambda o: rms_norm(o.x, o.weight)),
            Variant(
                "rms_norm_residual_compress",
                half,
                fp8,
                lambda o, normed=normed: normed(o, o.other),
                reads=2,
                writes=1,
                produces=lambda o: rms_norm(o.x + o.other, o.weight),
            ),
            Variant("silu_mul_compress", half, fp8, gated, reads=2, produces=lambda o: F.silu(o.x) * o.other),
        ]
    return result


def verify(variant: Variant, features: int) -> None:
    """Compare the values with the oracle's; called before timing."""
    operands = Operands(70, features, variant.dtype)
    values, *_ = variant.call(operands)
    produced = variant.produces(operands) if variant.produces else operands.x
    token_shift = next((shift for shift in ("mean", "median") if shift in variant.name), "none")
    expected = reference.compress(produced, token_shift=token_shift)[0].double()
    got = values.double()
    if variant.fp8:
        got = got * (expected.abs().amax(dim=-1, keepdim=True) / 448)
    error = relative_error(got, expected)
    limit = 4e-2 if variant.fp8 else 2e-2 if variant.produces else 0.0
    if not error <= limit:
        raise SystemExit(
            f"expected {variant.name} {variant.label} within {limit} of the oracle, got {error}: not timed"
        )


def verify_prune(text: str, features: int) -> None:
    x = torch.randn(70, features, device="cuda").bfloat16()
    pattern = NMPattern(text)
    if not torch.equal(prune(x, text), reference.prune(x, pattern)):
        raise SystemExit(f"expected prune {text} to equal the oracle, got other bits: not timed")


# Compressors of an already pruned operand: their time does not include the pruning.
OTHERS: dict[str, Callable[[torch.Tensor], object]] = {
    "cusparselt_bf16": torch._cslt_compress,
    "cutlass_compressor": cutlass_compress,
}


def other_compressors(xs: list[torch.Tensor], report: "Report") -> dict[str, list[Callable]]:
    """Calls by baseline; a baseline that cannot run is reported with its reason."""
    pruned = [nm_act.prune(x, "2:4") for x in xs]
    calls = {}
    for name, compress in OTHERS.items():
        try:
            compress(pruned[0])
            torch.cuda.synchronize()
        except Exception as error:  # whatever prevents it from running is printed
            report.reasons.add(f"{name}: no row, {str(error).splitlines()[0][:160]}")
            continue
        calls[name] = [lambda x=x, compress=compress: compress(x) for x in pruned]
    return calls


class Report:
    """What the summary needs, besides the CSV."""

    def __init__(self):
        self.fractions: list[tuple[float, str, int, int, float, str]] = []
        self.reasons: set[str] = set()

    def print(self) -> None:
        for name, bar in BARS.items():
            large = [e for e in self.fractions if e[5] == "copy" and e[1] == name and min(e[2], e[3]) >= 4096]
            if large:
                fraction, _, tokens, features, *_ = min(large)
                print(f"{name}: worst {fraction:.0%} of copy at {tokens} x {features} (bar {bar} %)")
        for _, name, tokens, features, us, kind in self.fractions:
            if kind == "copy" and name in ("compress bf16", "compress e4m3") and (tokens, features) == (64, 4096):
                print(f"{name}, 64 x 4096: {us:.1f} us (bar 4 us)")
        producers = [entry for entry in self.fractions if entry[5] == "dense_floor" and entry[2] >= 4096]
        for name in sorted({entry[1] for entry in producers}):
            worst = min(entry for entry in producers if entry[1] == name)
            print(f"{name}, >= 4096 tokens: worst {1 / worst[0]:.2f}x of the dense-output kernel's bytes (bar 1.10x)")
        for reason in sorted(self.reasons):
            print(reason)


def bench(
    rows: Rows, report: Report, copy: DeviceCopy, tokens: int, features: int, seconds: float, others: bool
) -> None:
    chosen = variants()
    copies = max(2, copies_for(2 * chosen[0].bytes(tokens, features)))
    calls: dict[str, list[Callable]] = {"copy": [copy]}
    operands = {
        dtype: [Operands(tokens, features, dtype) for _ in range(copies)] for dtype in (torch.bfloat16, torch.float16)
    }
    for index, variant in enumerate(chosen):
        calls[str(index)] = [lambda o=o, variant=variant: variant.call(o) for o in operands[variant.dtype]]
    baselines = {}
    if others and tokens >= OTHERS_TOKENS:
        baselines = other_compressors([o.x for o in operands[torch.bfloat16]], report)
    calls |= baselines
    prunes = {text: [lambda o=o, text=text: prune(o.x, text) for o in operands[torch.bfloat16]] for text in PRUNED}
    calls |= {f"prune {text}": prunes[text] for text in PRUNED}
    # The copy is launched without a graph too: as a graph node it ran at 2.75 TB/s on an H200, too weak a baseline.
    times = interleaved(calls, seconds, eager=("copy", "cusparselt_bf16"))
    speed = copy.bytes_per_us(times["copy"])
    line = []
    for index, variant in enumerate(chosen):
        moved, mine = variant.bytes(tokens, features), times[str(index)]
        median = percentiles(mine)[1]
        common = {
            "dtype": variant.label,
            "pattern": "2:4",
            "stage": "compress",
            "tokens": tokens,
            "in_features": features,
        }
        floors = [("copy", variant.name, moved)]
        if variant.produces:
            floors.append(("dense_floor", f"{variant.name}/dense_floor", variant.dense_bytes(tokens, features)))
        for kind, name, amount in floors:
            gbps = f"{moved / median / 1e3:.1f}"
            rows.add(mine, [amount / speed], **common, variant=name, baseline="copy", gbps=gbps)
            fraction = amount / speed / median
            report.fractions.append((fraction, f"{variant.name} {variant.label}", tokens, features, median, kind))
        line.append(f"{variant.name} {variant.label} {median:.1f} us {moved / speed / median:.0%}")
        if variant.name == "compress" and variant.label == "bf16":
            for name in [name for name in baselines if name in times]:
                rows.add(mine, times[name], **common, variant=variant.name, baseline=name)
                line.append(f"{name} {percentiles(times[name])[1]:.0f} us")
    moved = 4 * tokens * features
    common = {"dtype": "bf16", "stage": "prune", "tokens": tokens, "in_features": features, "baseline": "copy"}
    for text in PRUNED:
        mine = times[f"prune {text}"]
        median = percentiles(mine)[1]
        rows.add(mine, [moved / speed], variant="prune", pattern=text, gbps=f"{moved / median / 1e3:.1f}", **common)
        report.fractions.append((moved / speed / median, f"prune {text}", tokens, features, median, "copy"))
        line.append(f"prune {text} {median:.1f} us {moved / speed / median:.0%}")
    print(f"{tokens:>5} x {features:<5} copy {speed / 1e6:.2f} TB/s; " + "; ".join(line), flush=True)


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--features", nargs="+", type=int)
    parser.add_argument("--others", action="store_true", help="time cuSPARSELt's and CUTLASS's compressors too")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    tokens = arguments.tokens or (QUICK["tokens"] if arguments.quick else TOKENS)
    features = arguments.features or (QUICK["features"] if arguments.quick else FEATURES)
    torch.manual_seed(0)
    for variant in variants():
        verify(variant, min(features))
    for text in PRUNED:
        verify_prune(text, min(features))
    rows, report, copy = (
        Rows(arguments.csv, bench="compress", device=device, commit=arguments.commit),
        Report(),
        DeviceCopy(),
    )
    for count in features:
        for token_count in tokens:
            seconds = arguments.seconds / (2 if arguments.quick else 1)
            bench(rows, report, copy, token_count, count, seconds, arguments.others)
    report.print()


if __name__ == "__main__":
    main()
