"""e4m3 products of a few tokens on a GPU: where row skipping pays, and how the dense product is computed best.

For each shape of a layer and number of tokens, over the same weights: ``gather`` (8:16 selected in the kernel, over an
[in, out] copy), ``gather dense`` (every row), ``one scale`` and ``row-wise`` (torch's dense products, their operand
given), ``e4m3_product`` (ours, which is one of them), and ``sparse`` (the 2:4 tensor-core product, its operand given).
CUDA graphs over rotated weights, the functions taking turns. Sums over the shapes follow; kOneScaleTokens
(csrc/kernels/matmul/config.h), SKIPPING_TOKENS and MOST_ROWS (nm_act/ops/e4m3.py) are chosen from them.

    python benchmarks/bench_few_tokens.py --csv benchmarks/results/h100/few_tokens.csv
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence

import torch
from gpu_timer import copies_for, interleaved, require_kernels
from shapes import LLAMA_3_8B
from timer import COLUMNS, Rows, percentiles

import nm_act
from nm_act.ops.e4m3 import E4M3, FEW_TOKENS, quantise_rows
from nm_act.ops.packed import compress_packed, sparse_gemm


def calls(tokens: int, out_features: int, in_features: int) -> dict[str, list]:
    """The ways to compute one product; each a list of calls over different copies of the weight."""
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    values, row_scale = quantise_rows(nm_act.prune(x, "8:16"))
    packed = compress_packed(x, activation_dtype=E4M3)
    codes, scale = quantise_rows(torch.randn(out_features, in_features, device="cuda"))
    weights = [codes.clone() for _ in range(copies_for(codes.numel()))]
    rows = [weight.t().contiguous().t() for weight in weights]
    one = torch.ones(1, device="cuda")
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}

    def one_scale(weight):
        y = torch._scaled_mm(values, weight.t(), one, one, **options)
        return y.mul_(row_scale[:, None]).mul_(scale)  # two launches where the operator has one

    def row_wise(weight):
        return torch._scaled_mm(values, weight.t(), row_scale[:, None], scale[None], **options)

    ways = {
        "one scale": (one_scale, weights),
        "row-wise": (row_wise, weights),
        "sparse": (lambda w: sparse_gemm(packed, w, column_scale=scale, out_dtype=torch.bfloat16), weights),
        "e4m3_product": (lambda w: torch.ops.nm_act.e4m3_product(values, row_scale, w, scale), weights),
    }
    if tokens <= FEW_TOKENS:
        ways["gather"] = (lambda w: nm_act.sparse_linear(x, w, None, "8:16", weight_scale=scale), rows)
        ways["gather dense"] = (lambda w: nm_act.gather_linear(x, w, weight_scale=scale), rows)
    return {name: [lambda w=w, way=way: way(w) for w in each] for name, (way, each) in ways.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=0.3, help="of each shape and number of tokens")
    parser.add_argument("--csv", help="write the rows to this file")
    arguments = parser.parse_args(argv)
    device = require_kernels(nm_act.build_info())
    rows = Rows(arguments.csv, COLUMNS, bench="few_tokens", device=device, dtype="e4m3")
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for tokens in arguments.tokens:
        for out_features, in_features in LLAMA_3_8B.values():
            times = interleaved(calls(tokens, out_features, in_features), arguments.seconds)
            for name, each in times.items():
                pattern = {"gather dense": "", "sparse": "2:4"}.get(name, "8:16")
                size = {"tokens": tokens, "out_features": out_features, "in_features": in_features}
                rows.add(each, times["row-wise"], variant=name, pattern=pattern, baseline="row-wise", **size)
                sums[tokens][name] += percentiles(each)[1]
            torch.cuda.empty_cache()
        line = ", ".join(f"{name} {us:.1f}" for name, us in sorted(sums[tokens].items(), key=lambda item: item[1]))
        print(f"{tokens} tokens, us of a layer's products: {line}", flush=True)


if __name__ == "__main__":
    main()
