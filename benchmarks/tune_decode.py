"""Times the configurations of the gather kernel over 24 layer shapes, for csrc/kernels/gather/config.h to be fitted to.

One row a configuration, written as soon as it is timed, besides two baselines of the same run: cublas_bf16
(torch.nn.functional.linear) and dense_e4m3 (torch._scaled_mm, its input quantised before). Everything is a CUDA graph
over rotated operands, so that every weight is cold; what is wrong against float32 is not timed. Each shape, type of
weight and number of tokens is given its share of --seconds: all configurations once (stage "all"), then the fastest in
turn (stage "final"), whose times are the ones to compare.

    python benchmarks/tune_decode.py --seconds 230 --csv decode_tuning.csv
"""

import argparse
import csv
import dataclasses
import itertools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_decode import KINDS, in_out
from gpu_timer import geometric_mean, require_kernels
from shapes import DECODE_SHAPES
from timer import percentiles, relative_error

import nm_act
from nm_act.ops.e4m3 import quantise_rows
from nm_act.version import commit

COLUMNS = (
    *("device", "stage", "dtype", "pattern", "tokens", "out_features", "in_features", "variant", "lanes", "splits"),
    *("threads", "ahead", "us_min", "us_p50", "chosen", "note", "torch", "cuda", "commit"),
)
KEEP, GROUP = 8, 16
SEVERAL_TOKENS = ((4096, 4096), (28672, 4096), (4096, 14336), (5120, 5120))
COLD_BYTES = 150e6  # read between two uses of the same weight; the L2 holds 50 to 60 MB
MAX_COPIES = 64
REPLAY_US = 700.0
LIMIT = 5e-3
FINALISTS = 10
Config = tuple[int, int, int, bool]


@dataclasses.dataclass(frozen=True)
class Job:
    shape: tuple[int, int]
    kind: str
    tokens: int


class Operands:
    """One weight in memory as often as the rotation needs it; the copies hold the same values."""

    def __init__(self, job: Job):
        out_features, in_features = job.shape
        weight = torch.randn(job.shape, device="cuda", dtype=torch.bfloat16) / in_features**0.5
        values, self.scale = (weight, None) if job.kind == "bf16" else quantise_rows(weight, KINDS[job.kind])
        del weight
        first = in_out(values)
        read = out_features * in_features * first.element_size() * (1 - (1 - KEEP / GROUP) ** job.tokens)
        copies = max(2, min(MAX_COPIES, math.ceil(COLD_BYTES / read)))
        self.weights = [first, *(first.t().clone().t() for _ in range(copies - 1))]
        self.xs = [torch.randn(job.tokens, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        self.exact = self._exact()

    def _exact(self) -> torch.Tensor:
        """float32 of the first operands, in parts that fit the memory."""
        x = nm_act.reference.prune(self.xs[0], KEEP, GROUP).float()
        parts = [F.linear(x, part.float()) for part in self.weights[0].split(4096)]
        exact = torch.cat(parts, dim=1)
        return exact if self.scale is None else exact * self.scale

    def gather(self, config: Config) -> list[Callable]:
        op, numbers = torch.ops.nm_act._tune_gather, [*map(int, config)]
        return [
            lambda x=x, w=w: op(x, w, None, KEEP, GROUP, numbers, weight_scale=self.scale)[0]
            for x, w in zip(self.xs, self.weights, strict=True)
        ]

    def dense(self) -> list[Callable]:
        """The baseline of this type, over the same memory seen as [out, in]: only its time counts."""
        weights = [w.t().view(w.shape) for w in self.weights]
        if weights[0].dtype == torch.bfloat16:
            return [lambda x=x, w=w: F.linear(x, w) for x, w in zip(self.xs, weights, strict=True)]
        one = torch.ones(1, device="cuda")
        xs = [x.to(torch.float8_e4m3fn) for x in self.xs]
        return [
            lambda x=x, w=w: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
            for x, w in zip(xs, weights, strict=True)
        ]


class Graph:
    """All copies in turn, as often as fill a replay of REPLAY_US."""

    def __init__(self, calls: list[Callable], expected_us: float, stream: torch.cuda.Stream, pool):
        self.count = len(calls) * max(1, round(REPLAY_US / (expected_us * len(calls))))
        graph, results = torch.cuda.CUDAGraph(), []
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool)
            try:
                for i in range(self.count):
                    results.append(calls[i % len(calls)]())
            finally:
                graph.capture_end()
        self.graph, self.calls = graph, calls  # whose operands the graph reads

    def __call__(self, replays: int) -> list[float]:
        """Microseconds a call, of each replay."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            self.graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 / self.count for a, b in itertools.pairwise(events)]


class Table:
    """The CSV, written row by row."""

    def __init__(self, path: str, **common: object):
        self.file = open(path, "w", newline="")  # noqa: SIM115  closed with the process, rows are flushed
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="", lineterminator="\n")
        self.writer.writeheader()
        self.common = {"torch": torch.__version__, "cuda": torch.version.cuda or "", **common}

    def add(self, job: Job, variant: str, stage: str, config: Config | None, times: list[float], **rest) -> None:
        names = ("lanes", "splits", "threads", "ahead")
        row = {
            "stage": stage,
            "dtype": job.kind,
            "pattern": f"{KEEP}:{GROUP}",
            "tokens": job.tokens,
            "out_features": job.shape[0],
            "in_features": job.shape[1],
            "variant": variant,
            **(dict(zip(names, map(int, config), strict=True)) if config else {}),
            **({"us_min": f"{min(times):.2f}", "us_p50": f"{percentiles(times)[1]:.2f}"} if times else {}),
        }
        self.writer.writerow({**self.common, **row, **rest})
        self.file.flush()


def candidates(job: Job, best: dict[tuple, list[Config]]) -> tuple[Config, list[Config]]:
    """The chosen configuration, and those that could win: int8's are the fastest of e4m3, whose kernel is alike."""
    out_features, in_features = job.shape
    properties = torch.cuda.get_device_properties(0)
    multiprocessors = properties.multi_processor_count
    eight = job.kind != "bf16"
    listed = nm_act._C.gather_configs(
        job.tokens, out_features, in_features, eight, KEEP, GROUP, properties.major, multiprocessors
    )
    alike = best.get((job.shape, "e4m3", job.tokens))
    if job.kind == "int8" and alike:
        return listed[0], alike

    def blocks(config: Config) -> int:
        return math.ceil(out_features / (config[0] * (16 if eight else 8))) * config[1]

    enough = min(0.6 * multiprocessors, 0.4 * max(map(blocks, listed)))

    def fits(config: Config) -> bool:
        waves = blocks(config) * config[2] / (2048 * multiprocessors)
        return blocks(config) >= enough and waves <= 3

    # Many slices first: they win most often, should time run out.
    few = [config for config in listed if fits(config)] or listed
    return listed[0], sorted(few, key=lambda config: (-config[1], not config[3]))


class Sweep:
    def __init__(self, table: Table):
        self.table = table
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.best: dict[tuple, list[Config]] = {}
        self.keeper = None

    def graph(self, calls: list[Callable], expected_us: float) -> Graph:
        graph = Graph(calls, expected_us, self.stream, self.pool)
        self.keeper = self.keeper or graph  # with its last graph the pool would go, and be made again
        return graph

    def first(self, job: Job, operands: Operands, config: Config, expected_us: float) -> float:
        """Verified, then timed in few replays; infinity with a row that says why."""
        try:
            calls = operands.gather(config)
            error = relative_error(calls[0](), operands.exact)
            if not error < LIMIT:
                raise ValueError(f"expected an error below {LIMIT}, got {error}")
            times = self.graph(calls, expected_us)(4)[1:]
        except (RuntimeError, ValueError) as failure:
            torch.cuda.synchronize()  # a fault of the device ends the run here
            print(f"{job} {config}: {failure}", flush=True)
            self.table.add(job, "gather", "all", config, [], note=str(failure).splitlines()[0][:200])
            return math.inf
        self.table.add(job, "gather", "all", config, times)
        return min(times)

    def run(self, job: Job, seconds: float) -> float:
        """Times a job; returns the chosen configuration's time over the fastest one's."""
        began = time.perf_counter()
        operands = Operands(job)
        chosen, configs = candidates(job, self.best)
        element = operands.weights[0].element_size()
        expected_us = 4 + job.shape[0] * job.shape[1] * element * 0.6 / 2.5e6
        times = {chosen: self.first(job, operands, chosen, expected_us)}
        for config in configs:
            if config in times:
                continue
            if time.perf_counter() - began > 0.75 * seconds:
                print(f"{job}: out of time after {len(times)} of {len(configs)} configurations")
                break
            times[config] = self.first(job, operands, config, expected_us)
        ranked = [config for config in sorted(times, key=times.get) if times[config] < math.inf]
        if not ranked:
            return math.nan
        self.best[job.shape, job.kind, job.tokens] = ranked[:40]
        finalists = list(dict.fromkeys([*ranked[:FINALISTS], *(c for c in ranked if c == chosen)]))
        return self.final(job, operands, finalists, chosen, expected_us)

    def final(self, job: Job, operands: Operands, finalists: list[Config], chosen: Config, expected_us: float) -> float:
        graphs = {config: self.graph(operands.gather(config), expected_us) for config in finalists}
        baseline = "cublas_bf16" if job.kind == "bf16" else "dense_e4m3"
        if job.kind != "int8":
            try:
                operands.dense()[0]()
                graphs[baseline] = self.graph(operands.dense(), 2 * expected_us)
            except RuntimeError as failure:
                self.table.add(job, baseline, "final", None, [], note=str(failure).splitlines()[0][:200])
        samples = {name: [] for name in graphs}
        for turn in range(5):
            for name in list(graphs)[:: 1 if turn % 2 else -1]:
                samples[name] += graphs[name](3)[1:]
        for name, times in samples.items():
            if name == baseline:
                self.table.add(job, baseline, "final", None, times)
            else:
                self.table.add(job, "gather", "final", name, times, chosen=int(name == chosen))
        medians = {name: percentiles(times)[1] for name, times in samples.items()}
        dense = medians.pop(baseline, math.nan)
        best = min(medians, key=medians.get)
        loss = medians.get(chosen, math.nan) / medians[best]
        shape = f"{job.tokens} x {job.shape[0]} x {job.shape[1]} {job.kind}"
        print(f"{shape}: best {best} {medians[best]:.2f} us, chosen {loss:.3f}x, dense {dense:.2f} us", flush=True)
        return loss


def jobs_of(shapes: list[tuple[int, int]], kinds: list[str], several: list[tuple[int, int]]) -> list[Job]:
    one = [Job(shape, kind, 1) for shape in shapes for kind in kinds]
    return one + [
        Job(shape, kind, tokens) for shape in several for tokens in (2, 4) for kind in kinds if kind != "int8"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True, help="write the rows to this file")
    parser.add_argument("--commit", default=commit(), help="what the column commit says, where there is no git")
    parser.add_argument("--seconds", type=float, default=230, help="time for everything, started processes left out")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="dtype of the weight")
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="instead of the 24, such as 4096x14336")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or ()] or list(DECODE_SHAPES)
    jobs = jobs_of(shapes, list(arguments.kinds), [] if arguments.shapes else list(SEVERAL_TOKENS))
    torch.manual_seed(0)
    sweep = Sweep(Table(arguments.csv, device=device, commit=arguments.commit))
    end, losses = time.perf_counter() + arguments.seconds, []
    for done, job in enumerate(jobs):
        share = (end - time.perf_counter()) / (len(jobs) - done)
        if share < 0.2:
            print(f"out of time: {len(jobs) - done} of {len(jobs)} jobs are left out")
            break
        losses.append(sweep.run(job, share))
    losses = [loss for loss in losses if loss == loss]
    print(
        f"chosen over fastest: {geometric_mean(losses):.3f}x in the mean, {max(losses, default=math.nan):.3f}x at worst"
    )


if __name__ == "__main__":
    main()
