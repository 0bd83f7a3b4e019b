"""Whole models that take turns: time to first token and decode speed of modes that are all in memory at once.

bench_inference.py measures one mode after another, on a card whose clock depends on what it did in the seconds before.
Here every round runs each mode once, in rotated order, and a speed-up is the median of the rounds' ratios: what changes
slowly changes both sides of a ratio. ttft_ms is of single prompts after an idle time each. For ttft_busy_ms a mode runs
back to back for --seconds before it is timed for as long, so that the clock is the one that its own power leaves.

    python benchmarks/bench_turns.py --mode dense nm-2:4 nm-8:16 --csv benchmarks/results/h100/inference_turns.csv
    python benchmarks/bench_turns.py --mode dense dense-fp8-gather nm-2:4/8:16-fp8 \
        --csv benchmarks/results/h100/inference_turns.csv

Rows are appended to the file, one for each baseline, and written after each batch and prompt. Peak memory and energy
cannot be told apart here: bench_inference.py has them.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from bench_inference import (
    COLUMNS,
    GRAPH_TOKENS,
    HIGHER_IS_BETTER,
    Device,
    busy,
    decoding,
    heat,
    label_of,
    random_ids,
    warm_up,
)
from inference_models import BASELINES, CONFIGS, Mode, build, compile_parts, parse_modes
from timer import Rows, percentiles

import nm_act
from nm_act.version import commit

STEPS = 16
"""Decode steps in one turn."""


def rounds(turns: Sequence[Callable[[], float]], count: int) -> list[list[float]]:
    """What each of the turns returned in each round; every round starts with another of them."""
    samples: list[list[float]] = [[] for _ in turns]
    for i in range(count):
        for j in range(len(turns)):
            which = (i + j) % len(turns)
            samples[which].append(turns[which]())
    return samples


def ratio(samples: Sequence[float], baseline: Sequence[float], higher_is_better: bool) -> float:
    """Median of the rounds' speed-ups."""
    pairs = zip(samples, baseline, strict=True)
    return statistics.median(a / b if higher_is_better else b / a for a, b in pairs)


def after_idle(seconds_of: Callable[[], float], idle: float) -> float:
    """Milliseconds of one run after `idle` seconds without work."""
    time.sleep(idle)
    return 1e3 * seconds_of()


def back_to_back(seconds_of: Callable[[], float], seconds: float) -> float:
    """Median milliseconds of a run, over `seconds` of runs that follow as many seconds of them."""
    return 1e3 * statistics.median(busy(seconds_of, seconds))


class Runner:
    """One mode's model with its cache and graphs for a batch and a prompt length."""

    def __init__(self, model: torch.nn.Module, device: Device, batch: int, prompt: int):
        self.batch, self.device = batch, device
        self.decoder = nm_act.StaticDecoder(model, batch=batch, max_tokens=prompt + STEPS + 1)
        self.ids = random_ids(model, batch, prompt, device.torch)
        if device.cuda and batch * prompt <= GRAPH_TOKENS:
            self.decoder.capture_prefill(prompt)
        self.decoder.prefill(self.ids)
        self.decoder.step()
        self.block = decoding(self.decoder, prompt, STEPS)
        self.block()

    def prefill(self) -> float:
        return self.device.seconds(lambda: self.decoder.prefill(self.ids))

    def decode(self) -> float:
        return STEPS * self.batch / self.device.seconds(self.block)


def measure(runners: dict[str, Runner], arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Samples of each metric and mode."""
    names, result = list(runners), {}
    turns = {
        "ttft_ms": (
            arguments.rounds,
            [functools.partial(after_idle, r.prefill, arguments.idle) for r in runners.values()],
        ),
        "ttft_busy_ms": (
            max(3, arguments.rounds // 3),
            [functools.partial(back_to_back, r.prefill, arguments.seconds) for r in runners.values()],
        ),
        "decode_tok_s": (arguments.rounds, [r.decode for r in runners.values()]),
    }
    for metric, (count, functions) in turns.items():
        result[metric] = dict(zip(names, rounds(functions, count), strict=True))
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help=f"{', '.join(CONFIGS)}, or a folder or hub id")
    parser.add_argument("--prompt", type=int, nargs="+", default=[4096])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--mode", nargs="+", default=["dense", "nm-2:4", "nm-8:16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--idle", type=float, default=0.4, metavar="SECONDS", help="before each single prompt")
    parser.add_argument("--seconds", type=float, default=0.6, help="of prompts back to back, before a timing and in it")
    parser.add_argument("--heat", type=float, default=20.0, metavar="SECONDS", help="of work before the first round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--csv", help="append the rows to this file")
    parser.add_argument("--commit", default=commit(), help="what the column commit says, where there is no git")
    arguments = parser.parse_args(argv)
    if min(*arguments.prompt, *arguments.batch, arguments.rounds) < 1:
        parser.error("expected prompts, batches and rounds of at least 1")
    try:
        arguments.modes = parse_modes(arguments.mode, add_baselines=False)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not any(mode.recipe is None for mode in arguments.modes):
        parser.error("expected a dense mode to compare with; add dense or dense-fp8-gather")
    return arguments


def build_all(arguments: argparse.Namespace, device: Device) -> dict[Mode, torch.nn.Module]:
    longest = max(arguments.prompt) + STEPS + 1
    models = {}
    for mode in arguments.modes:
        models[mode] = build(arguments.model, mode, arguments.device, getattr(torch, arguments.dtype), longest)
        device.forget_peak()
    return models


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = Device(arguments.device)
    common = {"device": device.name, "model": label_of(arguments.model), "commit": arguments.commit}
    table = Rows(arguments.csv, COLUMNS, append=True, bench="inference_turns", **common)
    models = build_all(arguments, device)
    undo = compile_parts(next(iter(models.values()))) if device.cuda else lambda: None
    try:
        for model in models.values():
            warm_up(model, device)
        if device.cuda:
            heat(device, arguments.heat)
        for batch, prompt in itertools.product(arguments.batch, sorted(arguments.prompt)):
            runners = {mode.name: Runner(model, device, batch, prompt) for mode, model in models.items()}
            for metric, samples in measure(runners, arguments).items():
                add(table, arguments.modes, batch, prompt, metric, samples)
            del runners
            device.forget_peak()
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; {len(table.rows)} rows are kept") from None
    finally:
        undo()


def add(
    table: Rows, modes: Sequence[Mode], batch: int, prompt: int, metric: str, samples: dict[str, list[float]]
) -> None:
    """A row for each mode and each dense mode that it may be compared with."""
    baselines = [mode.name for mode in BASELINES.values() if mode.name in samples]
    for mode in modes:
        low, median, high = percentiles(samples[mode.name])
        for dense in baselines:
            speedup = ratio(samples[mode.name], samples[dense], metric in HIGHER_IS_BETTER)
            base = percentiles(samples[dense])[1]
            row = {"mode": mode.name, "batch": batch, "prompt": prompt, "metric": metric, "baseline": dense}
            row |= {"p20": f"{low:.4g}", "p50": f"{median:.4g}", "p80": f"{high:.4g}"}
            table.append(**row, baseline_p50=f"{base:.4g}", speedup=f"{speedup:.3f}")
            print(
                f"{mode.name:>16} {batch:3} x {prompt:<6} {metric:<12} {median:9.2f} ({low:.2f} - {high:.2f})  "
                f"{speedup:.3f}x {dense}",
                flush=True,
            )


if __name__ == "__main__":
    main()
