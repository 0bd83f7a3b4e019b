"""Which tile of the sm_90a GEMMs wins where: every candidate, cuBLAS, _scaled_mm and cuSPARSELt in one process.

csrc/kernels/matmul/config.h is fitted to the CSV. A candidate is a line more in csrc/kernels/matmul/tiles.h.

A problem is scanned, then decided. Scan: every tile with both rasters and the band that it would have, the best tiles
with every band. Final: the best tiles, the baselines and the whole operator (in stream order and overlapped), in turn.
Problems of the part "turns" have one stage of that name: every tile, whole, split and streamed, in step and not, and
the chosen plan if it cuts the product in two, in turn; "paced" are those of them whose choice is kept in step.
Whatever is timed was compared with a float64 product of the pruned rows first: its error is at most twice torch's. Rows
are appended as they come. A candidate that fails costs its own row; one that breaks the device or hangs restarts the
process without it, and the run goes on where it was.

    python benchmarks/tune.py --csv gemm_tuning.csv --seconds 300
"""

import argparse
import csv
import datetime
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable

import torch
from gpu_timer import require_kernels
from shapes import FAMILY_SHAPES, LLAMA_3_8B, LLAMA_3_70B, TOKEN_COUNTS
from timer import relative_error
from tune_case import LONG_US, Calls, Case, Clock, Config, Problem, scaled_mm

import nm_act
from nm_act import _C
from nm_act.ops.e4m3 import quantise_rows
from nm_act.version import commit

LLAMA_TOKENS = (4096, 16384, 1024)
PARTS = ("bf16", "e4m3", "in_out", "crossover", "families", "turns", "paced")
CROSSOVER_TOKENS = (48, 96, 192, 256, 384, 448, 512, 640, 768, 1024, 1536)  # where the dense product may win
# Tokens of the part "turns": these, and those of the other parts from TURNS_FROM on.
TURNS_TOKENS = (112, 148, 200, 256, 300, 323, 384, 1280, 2048, 3072, 6656)
TURNS_FROM = 448
BOTH_RASTERS, BANDS, SPLITS = (1, 2), (1, 2, 4, 8), (2, 3, 4, 5, 6, 8)
STREAMED = 0  # kStreamed of csrc/kernels/matmul/config.h
COLUMNS = (
    *(*Problem._fields, "stage", "what", "raster", "swizzle", "splits", "cut", "paced"),
    *("us_p50", "error", "torch_error", "note", "device", "torch", "cuda", "commit", "date"),
)
HANG_SECONDS = 30


def restart(name: str, why: str) -> None:
    """Begin again without this candidate; rows that are written stay."""
    print(f"{name}: {why}; starting again without it", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--skip", name])


def guarded(name: str, function: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """The result of a candidate's first call, complete; None if it was refused."""
    watchdog = threading.Timer(HANG_SECONDS, restart, (name, f"hung for {HANG_SECONDS} s"))
    watchdog.start()
    try:
        result = function()
        torch.cuda.synchronize()
        return result
    except (RuntimeError, ValueError) as error:
        try:
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").item()
        except RuntimeError:
            restart(name, f"broke the device: {str(error).splitlines()[0]}")
        return None
    finally:
        watchdog.cancel()


def splits_of(problem: Problem, tile: dict) -> tuple[int, ...]:
    """How many blocks may share a tile: where a grid leaves multiprocessors idle, and each has features enough."""
    if not tile["split"]:
        return (1,)
    if problem.dtype == "e4m3":
        return (STREAMED,)
    tiles = -(-problem.tokens // tile["tokens"]) * -(-problem.out_features // tile["out_features"])
    return (STREAMED, *(s for s in SPLITS if problem.in_features >= 512 * s and tiles * (s - 1) < 400))


class Tuner:
    def __init__(self, arguments: argparse.Namespace, device: str):
        self.arguments, self.clock = arguments, Clock()
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.facts = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
        self.facts |= {"commit": arguments.commit, "date": datetime.date.today().isoformat()}
        self.tiles = {
            dtype: [tile for tile in _C.gemm_tiles(dtype) if tile["name"] not in arguments.skip]
            for dtype in ("bf16", "e4m3")
        }
        self.refused: set[tuple] = set()
        resumed = os.path.exists(arguments.csv) and os.path.getsize(arguments.csv) > 0
        self.done = set()
        if resumed:
            with open(arguments.csv, newline="") as file:
                rows = csv.DictReader(file)
                if tuple(rows.fieldnames or ()) != COLUMNS:
                    raise SystemExit(f"{arguments.csv} has other columns than these rows; give the name of a new file")
                self.done = {
                    tuple(row[c] for c in Problem._fields) for row in rows if row["stage"] in ("final", "turns")
                }
        self.file = open(arguments.csv, "a", newline="")  # noqa: SIM115 - open as long as the run
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="", lineterminator="\n")
        if not resumed:
            self.writer.writeheader()

    def row(self, problem: Problem, stage: str, what: str, **facts: object) -> None:
        self.writer.writerow({**problem._asdict(), **self.facts, "stage": stage, "what": what, **facts})
        self.file.flush()

    def verified(self, case: Case, stage: str, config: Config, errors: dict[Config, float]) -> dict[str, object] | None:
        """What a configuration's rows have in common; None, with a row that says why, if it may not be timed."""
        problem = case.problem
        if (problem.dtype, problem.storage, config.name) in self.refused:
            return None
        facts = config.columns()
        facts["torch_error"] = f"{case.torch_error:.3e}"
        y = guarded(config.name, case.gemm(config)[0])
        if y is None:
            self.refused.add((problem.dtype, problem.storage, config.name))
            self.row(problem, stage, config.name, **facts, note="refused")
            return None
        errors[config], wrong = case.error_of(y)
        facts["error"] = f"{errors[config]:.3e}"
        if wrong:
            self.row(problem, stage, config.name, **facts, note=wrong)
            print(f"{config} at {problem}: {wrong}", flush=True)
            return None
        return facts

    def scan(self, case: Case, configs: list[Config], times: dict[Config, float], errors: dict[Config, float]) -> None:
        problem = case.problem
        for config in configs:
            if config in times:
                continue
            facts = self.verified(case, "scan", config, errors)
            if facts is None:
                continue
            try:
                sample = self.clock.timer(case.gemm(config), case.estimate_us)
                times[config] = self.clock.medians({"": sample}, 2 if case.estimate_us > LONG_US else 3)[""]
            except RuntimeError as error:
                self.row(problem, "scan", config.name, **facts, note=str(error).splitlines()[0][:120])
                continue
            self.row(problem, "scan", config.name, **facts, us_p50=f"{times[config]:.2f}")

    def band_and_pace(self, problem: Problem, tile: dict) -> tuple[tuple[int, bool], ...]:
        """As the tile would be configured; if its blocks are kept in step, what else could be as fast besides."""
        _, _, band, _, _, paced = _C.configure_gemm(tile["tile"], *problem[3:], self.multiprocessors)
        return ((band, True), (band, False), (min(band, 2), False)) if paced else ((band, False),)

    def tune(self, problem: Problem) -> str:
        case = Case(problem)
        if self.arguments.chosen:
            return self.decide_chosen(case)
        tiles = {tile["name"]: tile for tile in self.tiles[problem.dtype]}

        def config(name, raster, swizzle, splits=1, paced=False):
            return Config(name, tiles[name]["tile"], raster, swizzle, splits, paced)

        times: dict[Config, float] = {}
        errors: dict[Config, float] = {}
        sizes = problem.tokens, problem.out_features
        first = [
            config(name, r, band, splits, paced)
            for name, tile in tiles.items()
            for band, paced in dict.fromkeys(self.band_and_pace(problem, tile))
            for splits in splits_of(problem, tile)
            for r in BOTH_RASTERS
        ]
        if problem.part in ("turns", "paced"):
            # Without the small tiles of many tokens, which took 1.2 to 4 times as long in the scans.
            small = {name for name, tile in tiles.items() if tile["tokens"] * tile["out_features"] < 128 * 256}
            plan = self.chosen(problem)
            whole = [c for c in first if c.name not in small or sizes[0] <= 1536]
            return self.turns(case, [*whole, plan] if plan.cut and not self.skips(plan) else whole)
        self.scan(case, first, times, errors)
        if not times:
            return f"{problem}: no candidate could be timed"
        best = self.best_of_tiles(times)
        if problem.part not in ("families", "crossover"):
            for name in list(best)[:3]:
                shortest = min(-(-problem.tokens // tiles[name]["tokens"]), -(-sizes[1] // tiles[name]["out_features"]))
                bands = [band for band in BANDS if band <= 2 * shortest]
                shared = best[name].splits, best[name].paced
                self.scan(case, [config(name, r, b, *shared) for r in BOTH_RASTERS for b in bands], times, errors)
            best = self.best_of_tiles(times)
        case.anchor = None
        return self.decide(case, [best[name] for name in list(best)[:3]], errors)

    def chosen(self, problem: Problem) -> Config:
        dtype, storage, *sizes = problem[1:]
        plan = _C.select_gemm_plan(dtype, *sizes, self.multiprocessors, weight_in_out=storage == "in_out")
        return Config.of(plan, _C.gemm_tiles(dtype))

    def skips(self, config: Config) -> bool:
        return not {config.name, *config.name.split("+")}.isdisjoint(self.arguments.skip)

    def decide_chosen(self, case: Case) -> str:
        config = self.chosen(case.problem)
        if self.skips(config):
            return f"{config.name} is left out"
        error, wrong = case.error_of(case.gemm(config)[0]())
        if wrong:
            return wrong
        case.anchor = None
        return self.decide(case, [config], {config: error})

    def turns(self, case: Case, configs: list[Config]) -> str:
        """Rows of all configurations, each verified, then timed in turn."""
        verified = {config: self.verified(case, "turns", config, {}) for config in configs}
        facts = {config: found for config, found in verified.items() if found is not None}
        if not facts:
            return "no candidate could be timed"
        samples = {c: self.clock.timer(case.gemm(c), case.estimate_us) for c in facts}
        medians = self.clock.medians(samples, 3 if case.estimate_us > LONG_US else 5)
        for config, us in medians.items():
            self.row(case.problem, "turns", config.name, **facts[config], us_p50=f"{us:.2f}")
        best = min(medians, key=medians.get)
        return f"{best} {medians[best]:.1f}"

    @staticmethod
    def best_of_tiles(times: dict[Config, float]) -> dict[str, Config]:
        """Each tile's best configuration, the fastest tile first."""
        best: dict[str, Config] = {}
        for config in sorted(times, key=times.get):
            best.setdefault(config.name, config)
        return best

    def decide(self, case: Case, contenders: list[Config], errors: dict[Config, float]) -> str:
        problem, samples, notes = case.problem, {}, {}

        def add(name: str, calls: Calls, estimate_us: float = case.estimate_us) -> None:
            if name in self.arguments.skip or guarded(name, calls[0]) is None:
                notes[name] = "refused"
                return
            try:
                samples[name] = self.clock.timer(calls, estimate_us)
            except RuntimeError as error:
                notes[name] = str(error).splitlines()[0][:120]

        for config in contenders:
            add(config.name, case.gemm(config))
        if not samples:
            return f"{problem}: no candidate could be captured"
        chosen = contenders[0]
        expected = case.product(case.packed[0], 0, chosen)
        for _ in range(0 if "op_overlapped" in self.arguments.skip else 3):
            y = guarded("op_overlapped", case.operator(chosen, True)[0])
            if y is None or not torch.equal(y, expected):
                notes["op_overlapped"] = "other bits than in stream order"
        y = expected = None
        add("op", case.operator(chosen, False))
        if "op_overlapped" not in notes:
            add("op_overlapped", case.operator(chosen, True))
        add("compress", [lambda x=x: case.pack(x) for x in case.xs], 0.1 * case.estimate_us + 2)
        self.add_baselines(case, add, samples, notes)
        rounds = 5 if case.estimate_us > 3000 else 7
        medians = self.clock.medians(samples, rounds)
        by_name = {config.name: config for config in contenders}
        for name, us in medians.items():
            facts = {"us_p50": f"{us:.2f}", "note": chosen.name if name.startswith(("op", "compress")) else ""}
            if name in by_name:
                config = by_name[name]
                facts |= config.columns()
                facts["error"] = f"{errors[config]:.3e}"
            self.row(problem, "final", name, **facts, torch_error=f"{case.torch_error:.3e}")
        for name, note in notes.items():
            self.row(problem, "final", name, note=note)
        return "; ".join(f"{name} {us:.1f}" for name, us in medians.items()) + (f"; {notes}" if notes else "")

    def add_baselines(self, case: Case, add: Callable, samples: dict, notes: dict) -> None:
        pairs = list(zip(case.xs, case.stock, strict=True))
        add("cublas_bf16", [lambda x=x, w=w: torch.mm(x, w.t()) for x, w in pairs])
        if not case.fp8:
            add("prune_cublas", [lambda x=x, w=w: torch.mm(nm_act.prune(x, "2:4"), w.t()) for x, w in pairs])
            if case.problem.part == "crossover":
                pairs = [(x, w.t().contiguous().t()) for x, w in pairs]
                name = "prune_cublas_in_out"
                add(name, [lambda x=x, w=w: torch.mm(nm_act.prune(x, "2:4"), w.t()) for x, w in pairs])
        else:
            try:
                from dense_fp8 import quantise

                quantise(case.xs[0])
            except Exception as error:  # Triton compiles here; without it the baseline is left out
                notes["quantise_scaled_mm"] = str(error).splitlines()[0][:120]

                def quantise(x):
                    q, scale = quantise_rows(x)
                    return q, scale[:, None]

            scales = [options["column_scale"] for options in case.options]
            rows = list(zip([quantise(x) for x in case.xs], case.weights, scales, strict=True))
            add("scaled_mm", [lambda q=q, w=w, s=s: scaled_mm(*q, w, s) for q, w, s in rows])
            if "quantise_scaled_mm" not in notes:
                inputs = list(zip(case.xs, case.weights, scales, strict=True))
                add("quantise_scaled_mm", [lambda x=x, w=w, s=s: scaled_mm(*quantise(x), w, s) for x, w, s in inputs])
        if case.problem.part in ("bf16", "e4m3") and not self.arguments.no_cusparselt:
            try:
                samples["cusparselt"] = self.cusparselt(case)
            except (RuntimeError, TypeError, AttributeError, ValueError) as error:
                notes["cusparselt"] = str(error).splitlines()[0][:120]

    def cusparselt(self, case: Case) -> Callable[[], tuple]:
        pruned = [nm_act.prune(x, "2:4") for x in case.xs]
        out = {"out_dtype": torch.bfloat16} if case.fp8 else {}
        if case.fp8:
            pruned = [quantise_rows(x)[0] for x in pruned]
        compressed = [torch._cslt_compress(x) for x in pruned]
        try:
            operands = compressed[0], case.weights[0].t()
            found = torch._C._cusparselt.mm_search(*operands, None, None, out.get("out_dtype"), False)
            options = dict(zip(("alg_id", "split_k", "split_k_mode"), found[:3], strict=True))
        except (AttributeError, TypeError):
            options = {"alg_id": torch._cslt_sparse_mm_search(compressed[0], case.weights[0].t(), **out)}
        calls = [
            lambda c=c, w=w: torch._cslt_sparse_mm(c, w.t(), **out, **options)
            for c, w in zip(compressed, case.weights, strict=True)
        ]
        exact = pruned[0][case.rows].double() @ case.weights[0].double().t()
        error = relative_error(calls[0]()[case.rows], exact)
        if not error <= max(case.limit, 1e-2):
            raise ValueError(f"wrong: error {error:.2e}")
        torch.cuda.synchronize()
        began = time.perf_counter()
        calls[0]()
        host_us = (time.perf_counter() - began) * 1e6
        torch.cuda.synchronize()
        return self.clock.behind_a_sleep(calls, host_us)


def problems_of(arguments: argparse.Namespace, multiprocessors: int) -> list[Problem]:
    llama = [*LLAMA_3_8B.values(), *LLAMA_3_70B.values()]
    main_parts = [(tokens, *shape) for tokens in LLAMA_TOKENS for shape in llama]
    kinds = {"bf16": ("bf16", "out_in"), "e4m3": ("e4m3", "out_in"), "in_out": ("bf16", "in_out")}
    result = [Problem(part, *kinds[part], *sizes) for part in arguments.parts if part in kinds for sizes in main_parts]
    shapes = [shape for layers in FAMILY_SHAPES.values() for shape in layers.values()]
    others = {t for t in (*CROSSOVER_TOKENS, *TOKEN_COUNTS, *LLAMA_TOKENS) if t >= TURNS_FROM}
    turns = sorted(others | set(TURNS_TOKENS))
    for part, counts in (("crossover", CROSSOVER_TOKENS), ("families", TOKEN_COUNTS), ("turns", turns)):
        drawn = [(tokens, *shape) for shape in [*shapes, *llama] for tokens in counts]
        random.Random(0).shuffle(drawn)  # so that a run cut short is not one of small layers
        both = [Problem(part, dtype, "out_in", *sizes) for sizes in drawn for dtype in ("bf16", "e4m3")]
        result += both if part in arguments.parts else []
        if part == "turns" and "paced" in arguments.parts:
            result += [problem._replace(part="paced") for problem in both if is_paced(problem, multiprocessors)]
    return result


def is_paced(problem: Problem, multiprocessors: int) -> bool:
    """Whether the chosen configuration, or the first of a cut product, keeps its blocks in step."""
    return _C.select_gemm_plan(problem.dtype, *problem[3:], multiprocessors)[5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", required=True, help="rows are appended; problems that it holds are not run again")
    parser.add_argument("--commit", default=commit(), help="what the column commit says, where there is no git")
    parser.add_argument("--parts", nargs="+", default=PARTS[:-1], choices=PARTS, help="in this order; all but paced")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no problem after this time")
    parser.add_argument("--no-cusparselt", action="store_true", help="leave out that baseline and its long search")
    parser.add_argument("--chosen", action="store_true", help="no scan: the chosen configuration beside the baselines")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave a candidate out")
    arguments = parser.parse_args()
    began = float(os.environ.setdefault("NM_ACT_TUNE_BEGAN", str(time.time())))  # a restart's time counts too
    device = require_kernels(nm_act.build_info())
    torch.manual_seed(0)
    tuner = Tuner(arguments, device)
    # Sizes that no tile divides, first: what fails is out before anything is timed.
    for dtype, storage in (("bf16", "out_in"), ("bf16", "in_out"), ("e4m3", "out_in")):
        for sizes in ((300, 528, 1088), (1, 16, 64)):
            case = Case(Problem("check", dtype, storage, *sizes))
            for tile in list(tuner.tiles[dtype]):
                config = Config(tile["name"], tile["tile"], 1, 1, STREAMED if tile["split"] else 1)
                y = guarded(config.name, case.gemm(config)[0])
                wrong = "not compiled or refused" if y is None else case.error_of(y)[1]
                if wrong:
                    print(f"check {dtype} {storage} {sizes}: {config.name}: {wrong}", flush=True)
                    if y is None:
                        tuner.refused.add((dtype, storage, config.name))
                    else:
                        tuner.tiles[dtype].remove(tile)
    for problem in problems_of(arguments, tuner.multiprocessors):
        if tuple(map(str, problem)) in tuner.done:
            continue
        if time.time() - began > arguments.seconds:
            print("out of time", flush=True)
            break
        started = time.time()
        try:
            line = tuner.tune(problem)
        except (torch.cuda.OutOfMemoryError, RuntimeError, SystemExit) as error:
            line = f"failed: {str(error).splitlines()[0][:160]}"
            tuner.row(problem, "failed", "problem", note=line)
        print(f"{' '.join(map(str, problem))} ({time.time() - started:.1f} s): {line}", flush=True)
        if torch.cuda.memory_reserved() > 40e9:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
