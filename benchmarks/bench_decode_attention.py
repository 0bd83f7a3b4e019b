"""decode_attention, one kernel a layer's decode step, against torch's scaled_dot_product_attention over the same cache.

The kernel embeds the query and key and writes key and value into the cache too. The baseline `sdpa_cache_write` gets
them embedded: it writes them with two copies and attends to a cache of exactly the filled length, which only the host
knows then. Both run in CUDA graphs over rotated caches, so that every cache is cold, and are compared with the oracle
(nm_act.reference) before they are timed. gbps counts the keys and values read.

    python benchmarks/bench_decode_attention.py --csv benchmarks/results/h100/decode_attention.csv
"""

import dataclasses

import torch
import torch.nn.functional as F
from gpu_timer import common_arguments, copies_for, geometric_mean, interleaved, require_kernels
from timer import Rows, percentiles, relative_error

import nm_act
from nm_act import reference
from nm_act.ops import fused

COLUMNS = (
    *("bench", "device", "variant", "dtype", "model", "q_heads", "k_heads", "head_dim", "sequences", "tokens"),
    *("us_p20", "us_p50", "us_p80", "baseline", "baseline_us_p50", "speedup", "gbps"),
    *("torch", "cuda", "commit", "date"),
)
LAYOUTS = {"llama-3-8b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128), "gemma-3-4b": (8, 4, 256)}
"""Query heads, key heads and their features, by model."""
SEQUENCES = (1, 2, 4, 8)
TOKENS = (512, 4161, 16385)
LIMIT = 5e-3


@dataclasses.dataclass
class Step:
    """The operands of one decode step over a full cache, and both ways to compute it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    rotated: tuple[torch.Tensor, torch.Tensor]

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.cos, self.sin, self.keys, self.values, self.lengths

    @property
    def scaling(self) -> float:
        return self.q.shape[-1] ** -0.5

    def kernel(self) -> torch.Tensor:
        return fused.decode_attention(*self.arguments, scaling=self.scaling)

    def baseline(self) -> torch.Tensor:
        query, key = self.rotated
        self.keys[:, :, -1] = key[:, 0]
        self.values[:, :, -1] = self.v[:, 0]
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2), self.keys, self.values, scale=self.scaling, enable_gqa=True
        )
        return y.transpose(1, 2)

    def verify(self, what: str) -> None:
        caches = [cache.clone() for cache in (self.keys, self.values)]
        exact = reference.decode_attention(*self.arguments[:5], *caches, self.lengths, scaling=self.scaling)
        for way in (self.baseline, self.kernel):
            for cache in (self.keys, self.values):
                cache[:, :, -1] = torch.nan
            error = relative_error(way(), exact)
            same = all(map(torch.equal, (self.keys, self.values), caches))
            if not (error < LIMIT and same):
                raise SystemExit(
                    f"expected the {way.__name__} of {what} within {LIMIT} of float64 and the token in the cache, got "
                    f"{error} and {'the same' if same else 'another'} cache: not timed"
                )


def draw_step(layout: tuple[int, int, int], sequences: int, tokens: int) -> Step:
    q_heads, k_heads, dim = layout
    merged = torch.randn(sequences, 1, q_heads + 2 * k_heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = merged.split([q_heads, k_heads, k_heads], dim=2)
    angles = 3 * torch.randn(1, 1, dim, device="cuda")
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    caches = torch.randn(2, sequences, k_heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((sequences,), tokens, dtype=torch.int32, device="cuda")
    return Step(q, k, v, cos, sin, caches[0], caches[1], lengths, fused.rotary(q, k, cos, sin))


def bench(rows: Rows, model: str, sequences: int, tokens: int, seconds: float) -> None:
    q_heads, k_heads, dim = LAYOUTS[model]
    moved = 2 * 2 * sequences * tokens * k_heads * dim
    steps = [draw_step(LAYOUTS[model], sequences, tokens) for _ in range(copies_for(moved))]
    steps[0].verify(f"{model}, {sequences} x {tokens}")
    times = interleaved({"sdpa": [step.baseline for step in steps], "kernel": [step.kernel for step in steps]}, seconds)
    median = percentiles(times["kernel"])[1]
    row = rows.add(
        times["kernel"],
        times["sdpa"],
        variant="decode_attention",
        dtype="bf16",
        model=model,
        q_heads=q_heads,
        k_heads=k_heads,
        head_dim=dim,
        sequences=sequences,
        tokens=tokens,
        baseline="sdpa_cache_write",
        gbps=f"{moved / median / 1e3:.1f}",
    )
    print(
        f"{model:>10} {sequences} x {tokens:<6} {row['us_p50']:>7} us  {row['gbps']:>7} GB/s  {row['speedup']}x of "
        f"{row['baseline_us_p50']} us",
        flush=True,
    )


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--sequences", nargs="+", type=int)
    parser.add_argument("--tokens", nargs="+", type=int, help="filled tokens of each cache, the new one included")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    for q_heads, k_heads, dim in LAYOUTS.values():
        if not fused.attends(q_heads, k_heads, dim, torch.device("cuda")):
            raise SystemExit(f"expected a device of compute capability 9.0, got {device}: decode_attention needs one")
    sequences = arguments.sequences or ((1, 8) if arguments.quick else SEQUENCES)
    tokens = arguments.tokens or ((4161,) if arguments.quick else TOKENS)
    torch.manual_seed(0)
    rows = Rows(arguments.csv, COLUMNS, bench="decode_attention", device=device, commit=arguments.commit)
    for model in arguments.models:
        for count in sequences:
            for length in tokens:
                bench(rows, model, count, length, arguments.seconds)
    mean = geometric_mean([float(row["speedup"]) for row in rows.rows])
    worst = min(rows.rows, key=lambda row: float(row["speedup"]))
    print(f"\n{mean:.2f}x in the geometric mean; worst {worst['speedup']}x, {worst['model']}", end=" ")
    print(f"{worst['sequences']} x {worst['tokens']}")


if __name__ == "__main__":
    main()
