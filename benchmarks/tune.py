"""Times every tile, raster and swizzle of the sm_90a GEMMs and compares select_config's choice with the best.

The CSV is what csrc/kernels/matmul/config.h is fitted to: its rates and rasters are read off the summary. A build with
NM_ACT_CMAKE_ARGS=-DNM_ACT_TUNING_TILES=ON adds the candidate tiles that are not shipped. --overlapped times compression
and product together, in stream order and with a launch that overlaps the two, for the selected configuration.

    python benchmarks/tune.py --csv benchmarks/results/h200/gemm_tuning.csv
"""

import argparse
import csv
import datetime
import io
from collections import defaultdict

import torch
from bench_sparse_linear import SHAPES
from gpu_timer import copies_for, geometric_mean, interleaved, require_kernels
from timer import percentiles, relative_error

import nm_act
from nm_act import _C
from nm_act.files import write_atomic
from nm_act.optimize.fp8 import quantise_rows
from nm_act.version import commit

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
QUICK_TOKENS = (64, 1024, 4096, 16384)
RASTERS = {1: "along_tokens", 2: "along_outputs"}
SWIZZLES = (1, 2, 4, 8)
COLUMNS = (
    *("device", "dtype", "tokens", "out_features", "in_features", "tile", "raster", "swizzle", "us_p50", "selected"),
    *("torch", "cuda", "commit", "date"),
)
Config = tuple[int, int, int]


def operands(dtype: str, tokens: int, out_features: int, in_features: int) -> list[tuple[torch.Tensor, dict]]:
    """x and what sparse_gemm needs besides its packed form, as often as the rotation asks for."""
    result = []
    for _ in range(copies_for(out_features * in_features + tokens * in_features)):
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
        options = {"weight": weight}
        if dtype == "e4m3":
            quantised, scale = quantise_rows(weight)
            options = {"weight": quantised, "column_scale": scale, "out_dtype": torch.bfloat16}
        result.append((x, options))
    return result


def compress(x: torch.Tensor, dtype: str) -> dict:
    packed = nm_act.compress_packed(x, fp8=dtype == "e4m3")
    scale = {"row_scale": packed.row_scale} if dtype == "e4m3" else {}
    return {"values": packed.values, "metadata": packed.metadata, **scale}


def gemm(arguments: dict, config: Config, overlapped: bool = False) -> torch.Tensor:
    return torch.ops.nm_act.sparse_gemm(**arguments, config=[*config, int(overlapped)])


def candidates(dtype: str, tokens: int, out_features: int) -> list[Config]:
    """Every configuration whose bands are not wider than twice the grid's short side."""
    result = []
    for tile in _C.gemm_tiles(dtype):
        short_side = min(-(-tokens // tile["tokens"]), -(-out_features // tile["out_features"]))
        swizzles = [swizzle for swizzle in SWIZZLES if swizzle <= 2 * short_side]
        result += [(tile["tile"], raster, swizzle) for raster in RASTERS for swizzle in swizzles]
    return result


def check(expected: torch.Tensor, got: torch.Tensor, what: str, limit: float = 5e-3) -> None:
    error = relative_error(got, expected)
    if not error < limit:
        raise SystemExit(f"expected {what} within {limit}, got a relative error of {error}: not timed")


def agrees(expected: torch.Tensor, got: torch.Tensor, what: str, limit: float) -> bool:
    """Whether a configuration may be timed; a line says it where not."""
    error = relative_error(got, expected)
    if not error < limit:
        print(f"{what}: no row, a relative error of {error:.1e} against the selected configuration")
    return error < limit


def check_against_dense(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, dtype: str) -> None:
    """The selected configuration against float64 of the unquantised operands, on the last tokens and first outputs."""
    expected = nm_act.prune(x[-64:], 2, 4).double() @ weight[:256].double().t()
    check(expected, y[-64:, :256], f"the selected configuration in {dtype}", 6e-2 if dtype == "e4m3" else 5e-3)


def tune(dtype: str, problem: tuple[int, int, int], chosen: Config, seconds: float) -> dict[Config, float]:
    """Median microseconds of every configuration of one problem."""
    drawn = operands(dtype, *problem)
    sets = [{**options, **compress(x, dtype)} for x, options in drawn]
    configs = list(dict.fromkeys([chosen, *candidates(dtype, *problem[:2])]))
    expected = gemm(sets[0], chosen)
    x, options = drawn[0]
    scale = options.get("column_scale", torch.ones(problem[1], device="cuda"))
    check_against_dense(x, options["weight"].float() * scale[:, None], expected, dtype)
    # Sums of the e4m3 tensor cores depend on where a tile is split.
    limit = 1e-2 if dtype == "e4m3" else 5e-3
    configs = [c for c in configs if agrees(expected, gemm(sets[0], c), f"{dtype} {c} at {problem}", limit)]
    calls = {str(c): [lambda a=a, c=c: gemm(a, c) for a in sets] for c in configs}
    times = interleaved(calls, seconds, warmup=0.02, rounds=5)
    return {config: percentiles(times[str(config)])[1] for config in configs}


def time_overlap(dtype: str, problem: tuple[int, int, int], chosen: Config, seconds: float) -> dict[bool, float]:
    """Median microseconds of compression and product, in stream order and overlapped."""
    sets = operands(dtype, *problem)

    def whole(x, options, overlapped):
        return gemm({**options, **compress(x, dtype)}, chosen, overlapped)

    expected = whole(*sets[0], False)
    for x, options in sets[:1] * 20:
        check(expected, whole(x, options, True), f"an overlapped launch at {problem} in {dtype}")
    calls = {str(o): [lambda s=s, o=o: whole(*s, o) for s in sets] for o in (False, True)}
    times = interleaved(calls, seconds, warmup=0.02)
    return {overlapped: percentiles(times[str(overlapped)])[1] for overlapped in (False, True)}


def write(path: str, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def summary(rows: list[dict]) -> None:
    """The cost of select_config's choices, and each tile and raster against the best of its problem."""
    problems = defaultdict(list)
    for row in rows:
        problems[row["dtype"], row["tokens"], row["out_features"], row["in_features"]].append(row)
    regrets, relative = defaultdict(list), defaultdict(list)
    for (dtype, tokens, *_), entries in problems.items():
        best = min(float(row["us_p50"]) for row in entries)
        regrets[dtype, tokens].append(next(float(row["us_p50"]) for row in entries if row["selected"]) / best)
        for key in {(row["tile"], row["raster"]) for row in entries}:
            mine = min(float(row["us_p50"]) for row in entries if (row["tile"], row["raster"]) == key)
            relative[dtype, tokens, *key].append(mine / best)
    for (dtype, tokens), values in sorted(regrets.items()):
        print(f"{dtype} {tokens:>5} tokens: selected {geometric_mean(values):.3f}x the best, worst {max(values):.3f}x")
    for (dtype, tokens, tile, raster), values in sorted(relative.items()):
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"  {dtype} {tokens:>5} tile {tile} {raster}: {geometric_mean(values):.3f}x the best, {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the table to this file")
    parser.add_argument("--commit", default=commit(), help="what the column commit says, where there is no git")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "e4m3"], choices=["bf16", "e4m3"])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help="instead of Llama-3's, such as 4096x14336")
    parser.add_argument("--seconds", type=float, default=0.25, help="measuring time of one problem")
    parser.add_argument("--quick", action="store_true", help="fewer token counts")
    parser.add_argument("--overlapped", action="store_true", help="time overlapped launches instead of configurations")
    arguments = parser.parse_args()
    device = require_kernels(nm_act.build_info())
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes] if arguments.shapes else SHAPES
    common = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
    common |= {"commit": arguments.commit, "date": datetime.date.today().isoformat()}
    torch.manual_seed(0)
    rows: list[dict] = []
    counts = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    problems = [(tokens, *shape) for shape in shapes for tokens in counts]
    for dtype in arguments.dtypes:
        for problem in problems:
            chosen = _C.select_gemm_config(dtype, *problem, multiprocessors)
            name = f"{dtype} " + " x ".join(map(str, problem))
            if arguments.overlapped:
                order, overlap = time_overlap(dtype, problem, chosen, arguments.seconds).values()
                print(f"{name}: in stream order {order:.1f} us, overlapped {overlap:.1f} us", flush=True)
                continue
            times = tune(dtype, problem, chosen, arguments.seconds)
            sizes = dict(zip(("tokens", "out_features", "in_features"), problem, strict=True))
            for config, us in times.items():
                tile, raster, swizzle = config
                facts = {"tile": tile, "raster": RASTERS[raster], "swizzle": swizzle, "us_p50": f"{us:.2f}"}
                rows.append({**common, "dtype": dtype, **sizes, **facts, "selected": int(config == chosen)})
            if arguments.csv:
                write(arguments.csv, rows)
            best = min(times, key=times.get)
            tiles = sorted({config[0] for config in times})
            by_tile = [f"{t}: {min(us for c, us in times.items() if c[0] == t):.1f}" for t in tiles]
            selected = f"selected {chosen} {times[chosen]:.1f} us, best {best} {times[best]:.1f}"
            print(f"{name}: {selected}; tiles {' '.join(by_tile)}", flush=True)
    summary(rows)


if __name__ == "__main__":
    main()
