"""End-to-end inference of whole models: time to first token, decode tokens/s, peak memory, energy.

Every mode runs the same way: projections merged, elementwise parts compiled, a static cache, prefills of up to 8192
tokens and all decode steps under CUDA graphs. The baselines of the same run are dense_bf16 and, for fp8 modes, two in
e4m3: dense_fp8 (per-token quantisation in one kernel, not fused with the norm before it as in the sparse modes; the
dense e4m3 product of the sparse modes; its output head stays in bf16, as there) and dense_fp8_gather (the same, but up
to four tokens run in the gather kernel without a selection, over a second copy stored [in, out]). The stronger one of a
metric is what counts; both have rows. A named model has random weights of the published shapes, built on the device:
speed does not depend on them, quality is not measured. Rows are written after every measurement, so that an interrupted
run keeps them; what fails is named, left out, and told by the exit status.

Products at full rate reach a card's power limit within tens of milliseconds, and its clock falls by a quarter. So
ttft_ms is of prompts after an idle time each, and ttft_busy_ms of prompts back to back after a second of them: a state
in between, such as right after a hotter mode, would compare clocks. Before the first mode the card is heated, since a
cold one clocks higher at the same power.

    python benchmarks/bench_inference.py --model llama-3-8b --prompt 512 4096 16384 --decode 128 --batch 1 8 \
        --mode dense nm-2:4 nm-2:4-fp8 nm-8:16 --csv benchmarks/results/h100/inference.csv

speedup is above 1 where a mode is better than the baseline, for every metric (peak_gib: less memory).
"""

import argparse
import functools
import gc
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from energy import EnergyCounter, steady, why_impossible
from inference_models import BASELINES, CONFIGS, Mode, build, compile_parts, parse_modes
from inference_profile import COLUMNS as STEP_COLUMNS
from timer import Rows, percentiles

import nm_act
from nm_act.version import commit

COLUMNS = (
    *("bench", "device", "model", "mode", "batch", "prompt", "metric", "p20", "p50", "p80"),
    *("baseline", "baseline_p50", "speedup", "torch", "cuda", "commit", "date"),
)
HIGHER_IS_BETTER = ("decode_tok_s",)
GRAPH_TOKENS = 8192
"""Longer prefills keep the device busy for longer than their launches take."""

WARM_TOKENS = 16

IDLE_SECONDS, IDLE_RUNS = 0.4, 5

BLOCK = 8
"""Decode steps in one sample."""


class Device:
    """What differs between a GPU and a CPU: synchronising, peak memory, energy."""

    def __init__(self, name: str):
        self.torch = torch.device(name)
        self.cuda = self.torch.type == "cuda"
        self.name = torch.cuda.get_device_name(self.torch) if self.cuda else "cpu"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def seconds(self, function: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def forget_peak(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.torch) / 2**30 if self.cuda else None

    def energy_counter(self) -> EnergyCounter | None:
        """None, with a line that says why, where the device does not tell its energy."""
        if not self.cuda:
            return None
        try:
            return EnergyCounter(torch.cuda.get_device_properties(self.torch).uuid)
        except Exception as error:  # no package, no library, or a device that does not tell
            print(f"no energy: {type(error).__name__}: {error}")
            return None


def label_of(model: str) -> str:
    """What the column model says."""
    return f"{model} (random weights)" if model in CONFIGS else model


class Report:
    """Rows with their baselines, written as they come."""

    def __init__(self, arguments: argparse.Namespace, device: Device):
        label = label_of(arguments.model)
        self.rows = Rows(
            arguments.csv,
            COLUMNS,
            bench="inference",
            device=device.name,
            model=label,
            commit=arguments.commit,
        )
        self.steps = Rows(
            arguments.profile or None,
            STEP_COLUMNS,
            device=device.name,
            model=label,
            commit=arguments.commit,
        )
        self.energy = device.energy_counter() if arguments.energy else None
        self.medians: dict[tuple, float] = {}
        self.failed: list[str] = []

    def add(self, mode: Mode, batch: int, prompt: int, metric: str, samples: Sequence[float]) -> None:
        low, median, high = percentiles(list(samples))
        where = (batch, prompt, metric)
        self.medians[mode.name, *where] = median
        for baseline in BASELINES.values():
            dense = self.medians.get((baseline.name, *where))
            if dense is None or (baseline.fp8 and not mode.fp8):
                continue
            speedup = median / dense if metric in HIGHER_IS_BETTER else dense / median
            row = {"mode": mode.name, "batch": batch, "prompt": prompt, "metric": metric, "baseline": baseline.name}
            row |= {"p20": f"{low:.4g}", "p50": f"{median:.4g}", "p80": f"{high:.4g}"}
            self.rows.append(**row, baseline_p50=f"{dense:.4g}", speedup=f"{speedup:.3f}")
            print(
                f"{mode.name:>16} {batch:3} x {prompt:<6} {metric:<12} {median:9.2f} ({low:.2f} - {high:.2f})  "
                f"{speedup:.2f}x {baseline.name}",
                flush=True,
            )

    def joules(self, run: Callable[[], object], seconds: float, units: int = 1) -> float | None:
        """Joules of one of the units that a run makes; None, with a line that says why, if that is no measurement."""
        assert self.energy is not None
        interval = steady(run, self.energy.joules, seconds)
        why = why_impossible(interval, self.energy.limit_watts)
        if why or interval is None:
            print(f"{'':>16} no energy: {why}", flush=True)
            return None
        print(f"{'':>16} {interval.watts:.0f} W over {interval.seconds:.1f} s, {interval.runs} runs", flush=True)
        return interval.joules / interval.runs / units


def measure(report: Report, mode: Mode, model, device: Device, batch: int, prompt: int, arguments) -> None:
    """All metrics of one model, batch and prompt length."""
    device.forget_peak()
    decoder = nm_act.StaticDecoder(model, batch=batch, max_tokens=prompt + arguments.decode + 1)
    ids = random_ids(model, batch, prompt, device.torch)
    if device.cuda and batch * prompt <= GRAPH_TOKENS:
        decoder.capture_prefill(prompt)
    decoder.prefill(ids)  # the first of a shape compiles and plans
    prefill = functools.partial(device.seconds, lambda: decoder.prefill(ids))
    alone = after_idling(prefill, IDLE_SECONDS if device.cuda else 0.0)
    for metric, times in {"ttft_ms": alone, "ttft_busy_ms": busy(prefill, arguments.seconds)}.items():
        report.add(mode, batch, prompt, metric, [1e3 * seconds for seconds in times])
    decoder.step()  # captures it, and uploads the graph
    steps = min(BLOCK, arguments.decode)
    block = decoding(decoder, prompt, steps)
    speeds = [steps * batch / device.seconds(block) for _ in range(max(1, arguments.decode // BLOCK))]
    report.add(mode, batch, prompt, "decode_tok_s", speeds)
    metrics = {"peak_gib": device.peak_gib()}
    if report.energy is not None:
        metrics["ttft_j"] = report.joules(prefill, arguments.energy)
        metrics["decode_j_tok"] = report.joules(lambda: device.seconds(block), arguments.energy, steps * batch)
    for metric, value in metrics.items():
        if value:
            report.add(mode, batch, prompt, metric, [value])
    if arguments.profile is not None:
        from inference_profile import profile, rows_of

        for row in rows_of(*profile(f"{mode.name}, {batch} x {prompt}", decoder, ids, device)):
            report.steps.append(mode=mode.name, batch=batch, prompt=prompt, source="bench_inference.py", **row)


def random_ids(model, batch: int, prompt: int, device: torch.device) -> torch.Tensor:
    """The same prompts for every mode: `[batch, prompt]`, int64."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, prompt), generator=generator).to(device)


def after_idling(seconds_of: Callable[[], float], idle: float) -> list[float]:
    """Seconds of single runs, each after `idle` seconds without work: a request to a server that waits for one."""
    times: list[float] = []
    while len(times) < (IDLE_RUNS if sum(times) < 1 else 2):
        time.sleep(idle)
        times.append(seconds_of())
    return times


def busy(seconds_of: Callable[[], float], seconds: float) -> list[float]:
    """Seconds of runs back to back, once `seconds` of them are over: of a server at its power limit."""
    settling = 0.0
    while settling < seconds:
        settling += seconds_of()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        times.append(seconds_of())
    return times


def decoding(decoder: nm_act.StaticDecoder, prompt: int, steps: int) -> Callable[[], None]:
    """A function that decodes so many tokens a sequence, from behind the prompt again where the cache is full."""

    @torch.inference_mode()
    def block() -> None:
        if decoder.length + steps > decoder.max_tokens:
            decoder._rewind(prompt)
            decoder.length = prompt
        for _ in range(steps):
            decoder.step()

    return block


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b", help=f"{', '.join(CONFIGS)}, or a folder or hub id")
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--decode", type=int, default=128, help="decoded tokens after each prompt")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--mode", nargs="+", default=["dense", "nm-2:4", "nm-2:4-fp8", "nm-8:16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of prefills back to back, before they are measured and while"
    )
    parser.add_argument(
        "--energy",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="of steady work for each energy (two for each mode, batch and prompt); 0: none",
    )
    parser.add_argument(
        "--heat", type=float, default=30.0, metavar="SECONDS", help="of work before the first mode, on CUDA"
    )
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--plot", help="draw the speed-ups into this .png")
    parser.add_argument("--commit", default=commit(), help="what the column commit says, where there is no git")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="CSV",
        help="print where the device's time goes, by kind of kernel and in a layer; with a name, write it to this file",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave elementwise parts uncompiled")
    arguments = parser.parse_args(argv)
    if min(*arguments.prompt, *arguments.batch, arguments.decode) < 1:
        parser.error("expected prompts, batches and decoded tokens of at least 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"expected a device that torch {torch.__version__} can use here, got cuda; use --device cpu")
    try:
        arguments.modes = parse_modes(arguments.mode)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not arguments.device.startswith("cuda") and any(mode.fp8 for mode in arguments.modes):
        parser.error("expected a CUDA device for fp8 modes, got cpu; leave them out")
    if arguments.dtype != "bfloat16" and any(mode.fp8 for mode in arguments.modes):
        parser.error(
            f"expected bfloat16 for fp8 modes, whose baseline gives that, got {arguments.dtype}; leave them out"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = Device(arguments.device)
    report = Report(arguments, device)
    longest = max(arguments.prompt) + arguments.decode + 1
    cells = list(itertools.product(arguments.batch, sorted(arguments.prompt)))
    if device.cuda:
        heat(device, arguments.heat)
    try:
        for mode in arguments.modes:
            _run_mode(report, mode, device, cells, longest, arguments)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; {len(report.rows.rows)} rows are kept") from None
    if arguments.plot:
        from plot_inference import draw

        draw(report.rows.rows, arguments.plot)
    if report.failed:
        raise SystemExit(f"{len(report.failed)} measurements failed, see above; {len(report.rows.rows)} rows are kept")


def heat(device: Device, seconds: float) -> None:
    """Multiply at full rate, so that the first mode finds the card as warm as the last one."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device.torch)
    b = torch.empty_like(a)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        device.seconds(lambda: [torch.mm(a, a, out=b) for _ in range(32)])


def _run_mode(report, mode, device, cells, longest, arguments) -> None:
    start, model = time.perf_counter(), None
    with _confined(f"{mode.name}: not built", report):
        model = build(arguments.model, mode, arguments.device, getattr(torch, arguments.dtype), longest)
    if model is None:
        return
    undo = compile_parts(model) if device.cuda and not arguments.no_compile else lambda: None
    print(f"{mode.name}: built in {time.perf_counter() - start:.1f} s", flush=True)
    try:
        # Before the first peak: kernels are compiled and tuned in buffers that are no part of a model's memory.
        with _confined(f"{mode.name}: no warm-up", report):
            warm_up(model, device)
        for batch, prompt in cells:
            with _confined(f"{mode.name} {batch} x {prompt}: left out", report):
                measure(report, mode, model, device, batch, prompt, arguments)
    finally:
        undo()


def warm_up(model, device: Device) -> None:
    decoder = nm_act.StaticDecoder(model, max_tokens=WARM_TOKENS + 2)
    decoder.prefill(torch.zeros(1, WARM_TOKENS, dtype=torch.long, device=device.torch))
    decoder.step()


@contextmanager
def _confined(what: str, report: Report) -> Iterator[None]:
    """A failure costs its own cell only: one line, and a status other than 0 at the end."""
    try:
        yield
    except Exception as error:  # out of memory, a kernel without a plan, a shape that an operator refuses
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        print(f"{what} ({type(error).__name__}: {reason[:160]})", flush=True)
        traceback.print_exc()
        report.failed.append(what)


if __name__ == "__main__":
    main()
