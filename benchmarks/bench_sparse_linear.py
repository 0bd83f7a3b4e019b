"""2:4 sparse_linear against dense products: the whole operator (stage op) and the product alone (stage gemm).

Baselines of the same run, in turn with ours:
  cublas_bf16      torch.mm in bf16 over the weight as models store it, [out, in]; also the baseline of fp16
  scaled_mm_fp8    torch._scaled_mm, row-wise; its per-token quantisation (fused, in Triton) is counted in stage op only
  cusparselt_*     torch._cslt_sparse_mm with its algorithm searched, from 1024 tokens on; stage op adds
                   _cslt_compress of an already pruned (and quantised) operand, so the pruning is not counted

    python benchmarks/bench_sparse_linear.py --csv benchmarks/results/h100/sparse_linear.csv
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from gpu_timer import common_arguments, copies_for, geometric_mean, interleaved, require_kernels
from shapes import LLAMA_3_8B, LLAMA_3_70B
from timer import Rows, percentiles, relative_error

import nm_act
from nm_act import reference
from nm_act.ops.e4m3 import quantise_rows

SHAPES = (*LLAMA_3_8B.values(), *LLAMA_3_70B.values())
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (1, 16, 64, 256, 4096, 16384)
KINDS = ("bf16", "bf16_in_out", "fp16", "e4m3")
QUICK_KINDS = ("bf16", "bf16_in_out", "e4m3")
CSLT_TOKENS, GEMM_TOKENS = 1024, 64
LIMITS = {"bf16": 5e-3, "fp16": 1e-3, "e4m3": 6e-3}
BARS = (
    ("bf16", "cublas_bf16", {4096: 1.35, 16384: 1.42}),
    ("e4m3", "scaled_mm_fp8", {4096: 1.35, 16384: 1.40}),
    ("e4m3", "cublas_bf16", {4096: 2.3, 16384: 2.5}),
)


class Weights:
    """The weight of one shape in the requested storages, in as many copies as the rotation needs."""

    def __init__(self, out_features: int, in_features: int, copies: int, kinds: Sequence[str]):
        def draw(_):
            return torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) / in_features**0.5

        self.stock = [draw(i) for i in range(copies)]
        self.by_kind = {
            "bf16": self.stock,
            "bf16_in_out": [w.t().contiguous().t() for w in self.stock] if "bf16_in_out" in kinds else [],
            "fp16": [w.half() for w in self.stock] if "fp16" in kinds else [],
        }
        self.fp8 = [quantise_rows(w) for w in self.stock] if "e4m3" in kinds else []


@dataclasses.dataclass
class Case:
    """One shape and token count: what is timed, and which results are compared with which."""

    tokens: int
    out_features: int
    in_features: int
    xs: list[torch.Tensor]
    weights: Weights
    calls: dict[str, list[Callable]] = dataclasses.field(default_factory=dict)
    ours: list[dict] = dataclasses.field(default_factory=list)

    def check(self, name: str, call: Callable, exact: Callable, limit: float) -> None:
        """Compare some outputs of some tokens (among them the last) with float64; called before timing."""
        rows = torch.randperm(self.tokens, device="cuda")[:64]
        rows[0] = self.tokens - 1
        columns = min(256, self.out_features)
        expected = exact(self.xs[0][rows], columns)
        error = relative_error(call()[rows, :columns], expected)
        if not error < limit:
            where = f"{self.tokens} x {self.out_features} x {self.in_features}"
            raise SystemExit(f"expected {name} at {where} within {limit} of float64, got {error}: not timed")

    def add_ours(self, key: str, calls: list[Callable], exact: Callable, **row) -> None:
        self.check(key, calls[0], exact, LIMITS[row["dtype"]])
        self.calls[key] = calls
        self.ours.append({"key": key, **row})


def add_16_bit(case: Case, kind: str) -> None:
    weights, dtype = case.weights.by_kind[kind], kind.split("_")[0]
    layout = "in_out" if kind.endswith("in_out") else "out_in"
    xs = [x.half() for x in case.xs] if dtype == "fp16" else case.xs
    pairs = [(x, weights[i % len(weights)]) for i, x in enumerate(xs)]
    baselines = ["cublas_bf16", *(["cusparselt_bf16"] if dtype == "bf16" else [])]

    def exact(rows, columns):
        return reference.sparse_linear(rows.to(xs[0].dtype), weights[0][:columns])

    calls = [lambda x=x, w=w: nm_act.sparse_linear(x, w) for x, w in pairs]
    common = {"dtype": dtype, "baselines": baselines}
    case.add_ours(f"op {kind}", calls, exact, stage="op", variant=f"sparse_linear_{layout}", **common)
    if case.tokens >= GEMM_TOKENS:
        packed = [(nm_act.compress_packed(x), w) for x, w in pairs]
        calls = [lambda p=p, w=w: nm_act.sparse_gemm(p, w) for p, w in packed]
        case.add_ours(f"gemm {kind}", calls, exact, stage="gemm", variant=f"sparse_gemm_{layout}", **common)


def add_fp8(case: Case) -> None:
    import dense_fp8  # imported here: only this baseline needs Triton

    pairs = [(x, *case.weights.fp8[i % len(case.weights.fp8)]) for i, x in enumerate(case.xs)]
    w8, scale = case.weights.fp8[0]
    baselines = ["cublas_bf16", "scaled_mm_fp8", "cusparselt_fp8"]

    def dequantised(columns):
        return w8[:columns].double() * scale[:columns].double()[:, None]

    def exact(rows, columns):
        quantised, row_scale = quantise_rows(reference.prune(rows, "2:4"))
        return (quantised.double() * row_scale.double()[:, None]) @ dequantised(columns).t()

    e4m3 = {"activation_dtype": torch.float8_e4m3fn}
    calls = [lambda x=x, w=w, s=s: nm_act.sparse_linear(x, w, weight_scale=s, **e4m3) for x, w, s in pairs]
    common = {"dtype": "e4m3", "baselines": baselines}
    case.add_ours("op e4m3", calls, exact, stage="op", variant="sparse_linear_fp8", **common)
    if case.tokens >= GEMM_TOKENS:
        packed = [(nm_act.compress_packed(x, activation_dtype=torch.float8_e4m3fn), w, s) for x, w, s in pairs]
        calls = [lambda p=p, w=w, s=s: nm_act.sparse_gemm(p, w, column_scale=s) for p, w, s in packed]
        case.add_ours("gemm e4m3", calls, exact, stage="gemm", variant="sparse_gemm_fp8", **common)
    op = [lambda x=x, w=w, s=s: dense_fp8.product(*dense_fp8.quantise(x), w, s) for x, w, s in pairs]
    case.check("scaled_mm_fp8", op[0], lambda rows, columns: rows.double() @ dequantised(columns).t(), 6e-2)
    quantised = [(*dense_fp8.quantise(x), w, s) for x, w, s in pairs]
    case.calls["op scaled_mm_fp8"] = op
    case.calls["gemm scaled_mm_fp8"] = [lambda a=arguments: dense_fp8.product(*a) for arguments in quantised]


def add_cusparselt(case: Case, kind: str, reasons: dict[str, str]) -> None:
    """Adds the baseline, or the reason why it is not available."""
    name = "cusparselt_bf16" if kind == "bf16" else "cusparselt_fp8"
    try:
        pruned, weights, options = [nm_act.prune(x, "2:4") for x in case.xs], case.weights.stock, {}
        if kind == "e4m3":
            pruned, weights = [quantise_rows(x)[0] for x in pruned], [w for w, _ in case.weights.fp8]
            options = {"out_dtype": torch.bfloat16}
        compressed = [torch._cslt_compress(x) for x in pruned]
        best = torch._cslt_sparse_mm_search(compressed[0], weights[0].t(), **options)

        def product(operand, weight):
            return torch._cslt_sparse_mm(operand, weight.t(), alg_id=best, **options)

        def exact(rows, columns):
            sparse = reference.prune(rows, "2:4")
            sparse = quantise_rows(sparse)[0] if kind == "e4m3" else sparse
            return sparse.double() @ weights[0][:columns].double().t()

        pairs = [(x, c, weights[i % len(weights)]) for i, (x, c) in enumerate(zip(pruned, compressed, strict=True))]
        calls = [lambda c=c, w=w: product(c, w) for _, c, w in pairs]
        case.check(name, calls[0], exact, 1e-2)
    except (Exception, SystemExit) as error:  # a baseline that fails is reported and left out
        reasons[name] = str(error).splitlines()[0][:160]
        return
    case.calls[f"gemm {name}"] = calls
    case.calls[f"op {name}"] = [lambda x=x, w=w: product(torch._cslt_compress(x), w) for x, _, w in pairs]


def fill(case: Case, kinds: Sequence[str], reasons: dict[str, str], *, cusparselt: bool) -> None:
    stock = case.weights.stock
    pairs = [(x, stock[i % len(stock)]) for i, x in enumerate(case.xs)]
    case.calls["cublas_bf16"] = [lambda x=x, w=w: torch.mm(x, w.t()) for x, w in pairs]
    for kind in kinds:
        if kind == "e4m3":
            add_fp8(case)
        else:
            add_16_bit(case, kind)
        if cusparselt and case.tokens >= CSLT_TOKENS and kind in ("bf16", "e4m3"):
            add_cusparselt(case, kind, reasons)


def measure(rows: Rows, case: Case, seconds: float) -> None:
    eager = [key for key in case.calls if "cusparselt" in key]
    times = interleaved(case.calls, seconds, eager=eager)
    flops = 2 * case.tokens * case.out_features * case.in_features
    line = [f"cublas_bf16 {percentiles(times['cublas_bf16'])[1]:.1f} us"]
    for entry in case.ours:
        row_facts = {name: value for name, value in entry.items() if name not in ("key", "baselines")}
        key, mine = entry["key"], times[entry["key"]]
        median = percentiles(mine)[1]
        speedups = []
        for baseline in entry["baselines"]:
            other = times.get(baseline) or times.get(f"{entry['stage']} {baseline}")
            if other is None:
                continue
            row = rows.add(
                mine,
                other,
                **row_facts,
                pattern="2:4",
                baseline=baseline,
                tokens=case.tokens,
                out_features=case.out_features,
                in_features=case.in_features,
                tflops=f"{flops / median / 1e6:.1f}",
            )
            speedups.append(f"{row['speedup']}x {baseline.split('_')[0]}")
        line.append(f"{key} {median:.1f} us {' '.join(speedups)}")
    print(f"{case.tokens:>5} x {case.out_features:<5} x {case.in_features:<5} " + "; ".join(line), flush=True)


def summary(rows: list[dict], reasons: dict[str, str]) -> None:
    """Geometric means with their goals, the product against cuSPARSELt's, and the worst slowdown."""

    def speedups(dtype, stage, baseline, tokens, layout="out_in"):
        want = (dtype, stage, baseline, tokens)
        chosen = [row for row in rows if (row["dtype"], row["stage"], row["baseline"], row["tokens"]) == want]
        return [float(row["speedup"]) for row in chosen if dtype != "bf16" or row["variant"].endswith(layout)]

    print("\ngeometric means over the shapes")
    for dtype, baseline, bars in BARS:
        for tokens, bar in bars.items():
            op = speedups(dtype, "op", baseline, tokens)
            if op:
                gemm = geometric_mean(speedups(dtype, "gemm", baseline, tokens))
                line = f"  {dtype} against {baseline}, {tokens} tokens: op {geometric_mean(op):.3f}x (bar {bar}x)"
                line += f" over {len(op)} shapes, worst {min(op):.2f}x, gemm {gemm:.3f}x"
                in_out = speedups(dtype, "op", baseline, tokens, "in_out") if dtype == "bf16" else []
                print(line + (f", op in_out {geometric_mean(in_out):.3f}x" if in_out else ""))
    for name in ("cusparselt_bf16", "cusparselt_fp8"):
        gemms = [row for row in rows if row["baseline"] == name and row["stage"] == "gemm"]
        if gemms:
            worst = min(gemms, key=lambda row: float(row["speedup"]))
            where = f"{worst['tokens']} x {worst['out_features']} x {worst['in_features']} {worst['variant']}"
            print(f"  gemm against {name}: worst {worst['speedup']}x at {where} (bar 1x)")
    for name, reason in reasons.items():
        print(f"  {name}: unavailable, {reason}")
    for baseline, dtypes in (("cublas_bf16", ("bf16", "fp16")), ("scaled_mm_fp8", ("e4m3",))):
        compared = [
            row for row in rows if (row["stage"], row["baseline"]) == ("op", baseline) and row["dtype"] in dtypes
        ]
        if compared:
            worst = max(compared, key=excess)
            where = f"{worst['tokens']} x {worst['out_features']} x {worst['in_features']} {worst['variant']}"
            verdict = "within" if excess(worst) <= 0 else "BEYOND"
            times = f"{worst['us_p50']} us against {worst['baseline_us_p50']} us"
            print(f"  worst slowdown against {baseline}: {times} at {where}, {verdict} 5 % + 5 us")


def excess(row: dict) -> float:
    """Microseconds beyond the operator's limit, which is 5 % + 5 us more than the dense product."""
    return float(row["us_p50"]) - 1.05 * float(row["baseline_us_p50"]) - 5


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="dtype of the activation, storage of the weight")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="instead of Llama-3's, such as 4096x14336")
    parser.add_argument("--no-cusparselt", action="store_true", help="leave out that baseline and its long search")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    kinds = arguments.kinds or (QUICK_KINDS if arguments.quick else KINDS)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes] if arguments.shapes else SHAPES
    torch.manual_seed(0)
    rows = Rows(arguments.csv, bench="sparse_linear", device=device, commit=arguments.commit)
    reasons: dict[str, str] = {}
    for out_features, in_features in shapes:
        # Enough copies for the smallest storage, e4m3.
        weights = Weights(out_features, in_features, copies_for(out_features * in_features), kinds)
        for count in tokens:
            copies = copies_for(out_features * in_features + count * in_features)
            xs = [torch.randn(count, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            case = Case(count, out_features, in_features, xs, weights)
            fill(case, kinds, reasons, cusparselt=not arguments.no_cusparselt)
            measure(rows, case, arguments.seconds / (2 if arguments.quick else 1))
        del weights, case
    summary(rows.rows, reasons)


if __name__ == "__main__":
    main()
