"""Device time of CUDA calls: CUDA graphs over rotated buffers, with the functions taking turns.

So neither host time, nor a warm L2, nor a drifting clock favours one of them.
"""

import argparse
import collections
import math
import time
from collections.abc import Callable, Sequence

import torch
from timer import percentiles

from nm_act.version import commit

Calls = Sequence[Callable[[], object]]
L2_BYTES = 60 << 20
WORKING_SET = 3 * L2_BYTES
MAX_COPIES = 256
REPLAY_US = 1000.0  # microseconds of work per replay, against which a launch (some 5 us) is negligible
MAX_INNER = 512
COPY_BYTES = 512 << 20


def copies_for(bytes_per_call: int) -> int:
    """How many sets of operands successive calls must rotate over so that none finds its own in the L2."""
    return max(1, min(MAX_COPIES, math.ceil(WORKING_SET / max(bytes_per_call, 1))))


def _record() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def run_calls(calls: Calls, count: int) -> None:
    """So many calls, with one set of operands after the other."""
    # As many results as operands are kept alive: one that reused the last one's memory would be written to the L2 only.
    alive: collections.deque = collections.deque(maxlen=len(calls))
    for i in range(count):
        alive.append(calls[i % len(calls)]())


def _one_call_us(calls: Calls) -> float:
    """A rough time, which determines the number of calls per replay."""
    for _ in range(2):  # the first call compiles, loads and chooses algorithms
        run_calls(calls, min(len(calls), 2))
    torch.cuda.synchronize()
    count = max(4, min(len(calls), 8))
    start = _record()
    run_calls(calls, 1)
    first = _record()
    torch.cuda.synchronize()
    if start.elapsed_time(first) * 1e3 > REPLAY_US:
        return start.elapsed_time(first) * 1e3
    start = _record()
    run_calls(calls, count)
    end = _record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) * 1e3 / count, 0.5)


class _Replay:
    """``inner`` calls as one launch: a graph, or the calls themselves if they cannot be captured."""

    def __init__(self, calls: Calls, graph: bool, pool, stream: torch.cuda.Stream):
        self.calls, self.graph, self.pool, self.stream = calls, None, pool, stream
        self._set_time(_one_call_us(calls))
        self.host_us = 0.0 if graph else self._one_call_on_the_host_us()
        if graph:
            self._capture()
            # Launched one by one, short calls take the host's time; the graph measures their own.
            events = [self() for _ in range(2)]
            torch.cuda.synchronize()
            before, replay_us = self.inner, events[1][0].elapsed_time(events[1][1]) * 1e3
            self._set_time(max(replay_us / before, 0.5))
            if self.inner > 1.5 * before:
                self._capture()
            else:
                self.inner = before

    def _one_call_on_the_host_us(self) -> float:
        """Measured with an idle device and so few launches that its queue does not fill and block the host."""
        torch.cuda.synchronize()
        count, began = min(self.inner, 8), time.perf_counter()
        run_calls(self.calls, count)
        host_us = (time.perf_counter() - began) * 1e6 / count
        torch.cuda.synchronize()
        return host_us

    def _set_time(self, one_us: float) -> None:
        self.one_us = one_us
        self.inner = max(len(self.calls), min(MAX_INNER, math.ceil(REPLAY_US / one_us)))

    def _capture(self) -> None:
        # Not the context manager torch.cuda.graph: it empties the cache at every capture, which takes longer than the
        # measurement.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                run_calls(self.calls, self.inner)
            finally:
                graph.capture_end()
        # Not earlier: the shared pool would be freed with its last graph.
        self.graph = graph

    def __call__(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start = _record()
        if self.graph is not None:
            self.graph.replay()
        else:
            run_calls(self.calls, self.inner)
        return start, _record()


def interleaved(
    functions: dict[str, Calls], seconds: float, *, eager: Sequence[str] = (), warmup: float = 0.05, rounds: int = 7
) -> dict[str, list[float]]:
    """Microseconds a call on the device, by function.

    A function that cannot be captured, and that keeps the host busy for as long as the device, is left out with a
    line that says so, because its device time cannot be measured.

    Parameters
    ----------
    functions : dict of str to sequence of callables
        One callable per copy of the operands; successive calls use successive copies. Results are discarded.
    seconds : float
        Measuring time for all functions together; at least `rounds` samples of each are taken.
    eager : sequence of str
        Functions that cannot be captured.
    warmup : float
        Seconds of replays before the first sample.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    replays = {name: _Replay(calls, name not in eager, pool, stream) for name, calls in functions.items()}
    round_us = sum(replay.one_us * replay.inner for replay in replays.values())
    for _ in range(max(1, math.ceil(warmup * 1e6 / round_us))):
        for replay in replays.values():
            replay()
    events = {name: [] for name in replays}
    for index in range(max(rounds, min(200, math.ceil(seconds * 1e6 / round_us)))):
        order = list(replays) if index % 2 == 0 else list(replays)[::-1]
        for name in order:
            events[name].append(replays[name]())
    torch.cuda.synchronize()
    times = {
        name: [start.elapsed_time(end) * 1e3 / replays[name].inner for start, end in pairs]
        for name, pairs in events.items()
    }
    for name, replay in replays.items():
        if replay.host_us > 0.9 * percentiles(times[name])[1] and not isinstance(replay.calls[0], DeviceCopy):
            print(f"{name}: no row, a call takes the host {replay.host_us:.1f} us, as long as the device")
            del times[name]
    replays.clear()
    torch.cuda.empty_cache()
    return times


class DeviceCopy:
    """The baseline of memory-bound kernels: a large device-to-device copy, timed alternately with them."""

    def __init__(self):
        self.source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)

    @staticmethod
    def bytes_per_us(times: list[float]) -> float:
        """Bytes read plus written, per microsecond."""
        return 2 * COPY_BYTES / percentiles(times)[1]


def common_arguments(description: str) -> argparse.ArgumentParser:
    """Options that all CUDA benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the rows to this file")
    parser.add_argument("--commit", default=commit(), help="what the column commit says, where there is no git")
    parser.add_argument("--seconds", type=float, default=0.4, help="measuring time of one shape and token count")
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter measurements")
    return parser


def require_kernels(build_info: dict) -> str:
    """The device's name; exits with a sentence if there is nothing to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none: this benchmark measures CUDA kernels")
    if not build_info.get("cuda"):
        raise SystemExit(f"expected CUDA kernels in this build, found none: {build_info.get('why_no_cuda', '')}")
    return torch.cuda.get_device_name()


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
