"""A problem of benchmarks/tune.py: its operands and exact result, and the calls that are timed, with their clock."""

import collections
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_timer import copies_for, run_calls
from timer import percentiles, relative_error

import nm_act
from nm_act import reference
from nm_act.ops.e4m3 import quantise_rows

DIFFERENCE = {"bf16": 5e-3, "e4m3": 1e-2}  # between two tiles; sums of e4m3 tensor cores depend on a tile's split
E4M3_FLOOR = 6e-3  # of the error that is allowed: bench_sparse_linear's
GRAPH_US = 150.0
LONG_US = 1000.0  # from here on, calls are enqueued one by one, and fewer samples are enough
# Calls of a sample, at least, and of long calls: as many of cuSPARSELt, which no graph holds, as of all that take turns
# with it, since the clock falls in the first milliseconds after a rest.
SAMPLE_CALLS = 4
LAUNCH_CYCLES = 150_000
Problem = collections.namedtuple("Problem", "part dtype storage tokens out_features in_features")
CUTS = {1: "tokens", 2: "outputs"}
Calls = list[Callable[[], object]]


class Config(NamedTuple):
    """Numbers of csrc/kernels/matmul/config.h: of a product in one launch, or cut into two."""

    name: str
    tile: int
    raster: int
    swizzle: int
    splits: int
    paced: bool = False
    cut: int = 0
    at: int = 0
    second: tuple[int, ...] = ()

    @classmethod
    def of(cls, plan: tuple[int, ...], tiles: list[dict]) -> "Config":
        """The plan of _C.select_gemm_plan."""
        names = {tile["tile"]: tile["name"] for tile in tiles}
        if len(plan) == 6:
            return cls(names[plan[0]], *plan[:4], plan[5])
        return cls(f"{names[plan[0]]}+{names[plan[8]]}", *plan[:4], *plan[5:8], tuple(plan[8:]))

    def numbers(self, overlapped: bool) -> list[int]:
        """Those of _tune_sparse_gemm; the second launch starts as it does in a plan."""
        cut = [self.cut, self.at, *self.second] if self.cut else []
        return [*map(int, (self.tile, self.raster, self.swizzle, self.splits, overlapped, self.paced, *cut))]

    def columns(self) -> dict[str, object]:
        cut = f"{CUTS[self.cut]} {self.at}" if self.cut else ""
        steps = {"raster": self.raster, "swizzle": self.swizzle, "splits": self.splits}
        return steps | {"cut": cut, "paced": "paced" if self.paced else ""}


class Clock:
    """Device time: calls captured in a graph, long enough that its launch is lost in them."""

    def __init__(self):
        self.rest = LAUNCH_CYCLES  # before every sample, of all that take turns: a card that rested has a higher clock
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.keeper = self.captured([lambda: torch.empty(1, device="cuda")], 1)  # keeps the pool

    def captured(self, calls: Calls, count: int) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                run_calls(calls, count)
            finally:
                graph.capture_end()
        return graph

    def timer(self, calls: Calls, estimate_us: float) -> Callable[[], tuple]:
        """A function that enqueues one sample and returns its events and number of calls."""
        if estimate_us > LONG_US:
            return self.in_a_row(calls)
        count = max(len(calls), SAMPLE_CALLS, math.ceil(GRAPH_US / estimate_us))
        return self.sample_of(count, self.captured(calls, count).replay)

    def behind_a_sleep(self, calls: Calls, host_us: float) -> Callable[[], tuple]:
        """For calls that cannot be captured: enqueued while the device sleeps, so that the host's time is hidden."""
        self.rest = int(2000 * 2 * SAMPLE_CALLS * max(host_us, 100))  # 2 GHz, twice the host's time
        return self.in_a_row(calls)

    def in_a_row(self, calls: Calls) -> Callable[[], tuple]:
        return self.sample_of(SAMPLE_CALLS, lambda: run_calls(calls, SAMPLE_CALLS))

    def sample_of(self, count: int, launch: Callable[[], object]) -> Callable[[], tuple]:
        def sample():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self.rest)  # the host runs ahead, so its launch is not in the time
            start.record()
            launch()
            end.record()
            return start, end, count

        return sample

    def medians(self, samples: dict[str, Callable], rounds: int) -> dict[str, float]:
        """Of samples that take turns; the next ones rest as at first."""
        for sample in samples.values():
            sample()
        events = {name: [] for name in samples}
        for index in range(rounds):
            for name in list(samples)[:: 1 if index % 2 == 0 else -1]:
                events[name].append(samples[name]())
        torch.cuda.synchronize()
        self.rest = LAUNCH_CYCLES
        return {
            name: percentiles([start.elapsed_time(end) * 1e3 / count for start, end, count in entries])[1]
            for name, entries in events.items()
        }


class Case:
    """The operands of one problem, its exact result on some rows, and every function that is timed."""

    def __init__(self, problem: Problem):
        self.problem, self.fp8 = problem, problem.dtype == "e4m3"
        tokens, out_features, in_features = problem[3:]
        copies = copies_for((out_features * in_features + tokens * in_features) * (1 if self.fp8 else 2))
        copies = min(copies, max(1, int(8e9 / (out_features * in_features * 2))))
        self.xs = [torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        self.stock = [
            torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) / in_features**0.5
            for _ in range(copies)
        ]
        self.weights = self.stock
        self.options: list[dict] = [{} for _ in range(copies)]
        if problem.storage == "in_out":
            self.weights = [w.t().contiguous().t() for w in self.stock]
        if self.fp8:
            quantised = [quantise_rows(w) for w in self.stock]
            self.weights = [w for w, _ in quantised]
            self.options = [{"column_scale": s, "out_dtype": torch.bfloat16} for _, s in quantised]
        self.packed: list[nm_act.Packed] = []
        self.anchor = None
        flops, moved = 2 * tokens * out_features * in_features, out_features * in_features * (1 if self.fp8 else 2)
        self.estimate_us = max(flops / (1.8e9 if self.fp8 else 0.95e9), moved / 2.8e6, 4.0)
        self._exact()

    def _exact(self) -> None:
        """A float64 product of the pruned input, one row of every 64 and the last, and torch's error against it."""
        tokens = self.problem.tokens
        blocks = torch.arange(0, tokens, 64)
        rows = (blocks + torch.randint(0, 64, blocks.shape)).clamp(max=tokens - 1)
        self.rows = torch.unique(torch.cat([rows, torch.tensor([tokens - 1])])).cuda()
        pruned = reference.prune(self.xs[0][self.rows], "2:4")
        if self.fp8:
            quantised, scale = quantise_rows(pruned)
            weight_scale = self.options[0]["column_scale"]
            left = quantised.double() * scale.double()[:, None]
            self.exact = (left @ self.weights[0].double().t()) * weight_scale.double()
            torchs = scaled_mm(quantised, scale[:, None], self.weights[0], weight_scale)
        else:
            self.exact = pruned.double() @ self.stock[0].double().t()
            torchs = torch.mm(pruned, self.stock[0].t())
        self.torch_error = relative_error(torchs, self.exact)
        self.limit = max(2 * self.torch_error, E4M3_FLOOR) if self.fp8 else 2 * self.torch_error

    def pack(self, x: torch.Tensor) -> nm_act.Packed:
        return nm_act.compress_packed(x, activation_dtype=torch.float8_e4m3fn if self.fp8 else None)

    def product(self, packed: nm_act.Packed, index: int, config: Config, overlapped: bool = False) -> torch.Tensor:
        operand = packed.values, packed.metadata, packed.layout, self.weights[index]
        options = {"row_scale": packed.row_scale, **self.options[index]}
        return torch.ops.nm_act._tune_sparse_gemm(*operand, config.numbers(overlapped), **options)

    def gemm(self, config: Config) -> Calls:
        if not self.packed:
            self.packed = [self.pack(x) for x in self.xs]
        return [lambda p=p, i=i: self.product(p, i, config) for i, p in enumerate(self.packed)]

    def operator(self, config: Config, overlapped: bool) -> Calls:
        return [lambda x=x, i=i: self.product(self.pack(x), i, config, overlapped) for i, x in enumerate(self.xs)]

    def error_of(self, y: torch.Tensor) -> tuple[float, str]:
        """The error on the exact rows, and a complaint if y may not be timed: the rest is compared with other tiles."""
        error = relative_error(y[self.rows], self.exact)
        if not error <= self.limit:
            return error, f"wrong: error {error:.2e}, limit {self.limit:.2e}"
        if self.anchor is None:
            self.anchor = y
        norm = torch.linalg.vector_norm
        difference = (norm(y - self.anchor, dtype=torch.float32) / norm(self.anchor, dtype=torch.float32)).item()
        if not difference <= DIFFERENCE[self.problem.dtype]:
            return error, f"wrong: {difference:.2e} from another tile"
        return error, ""


def scaled_mm(quantised, scale, weight, weight_scale):
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(quantised, weight.t(), scale_a=scale, scale_b=weight_scale[None], **options)
