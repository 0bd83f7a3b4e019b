"""Energy of steady work on an NVIDIA GPU, from the driver's counter.

The driver updates the counter every 20 to 100 ms, so that one read says little about a millisecond of work. An interval
therefore begins and ends where the counter has just changed, with the device idle at neither end, and lasts seconds. A
mean power that the card cannot draw is no measurement: it is left out, with a line that says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

STUCK_SECONDS = 5.0
"""A counter that does not change for so long, beside what a single run takes, does not count."""

TOLERANCE = 1.03
"""Of the power limit: the card regulates to it, and may exceed it by a little for some milliseconds."""


@dataclass(frozen=True)
class Interval:
    """What was used between two changes of the counter, and how many runs were finished in between."""

    joules: float
    seconds: float
    runs: int

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


def steady(
    run: Callable[[], object],
    joules: Callable[[], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Interval | None:
    """Repeat ``run``, which waits for the device, for at least ``seconds``; None if the counter stands still."""
    start = _first_change(run, joules, clock)
    if start is None:
        return None
    begin, last, runs = clock(), start, 0
    changed = begin
    while True:
        run()
        runs += 1
        now, value = clock(), joules()
        if value != last and now - begin >= seconds:
            return Interval(value - start, now - begin, runs)
        if value == last and now - changed > seconds + STUCK_SECONDS:
            return None
        changed = changed if value == last else now
        last = value


def _first_change(run: Callable[[], object], joules: Callable[[], float], clock: Callable[[], float]) -> float | None:
    """The counter where it has changed after a run; None if it does not."""
    begin, before, runs = clock(), joules(), 0
    while runs < 2 or clock() - begin < STUCK_SECONDS:
        run()
        runs += 1
        value = joules()
        if value != before:
            return value
    return None


def why_impossible(interval: Interval | None, limit_watts: float) -> str:
    """Why an interval is no measurement; empty if it is one."""
    if interval is None:
        return "the energy counter stands still"
    if interval.watts > TOLERANCE * limit_watts:
        return f"{interval.watts:.0f} W is more than the card's limit of {limit_watts:.0f} W"
    return ""


class EnergyCounter:
    """The energy counter and the power limit of one device, by its UUID."""

    def __init__(self, uuid: str):
        import pynvml

        pynvml.nvmlInit()
        self._library, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self.joules()
        self.limit_watts = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3

    def joules(self) -> float:
        """Used since the driver was loaded."""
        return self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
