"""Energy of steady work: intervals between changes of a counter, on a simulated card."""

import energy
import pytest


class Card:
    """Draws constant power; its counter shows the energy of whole periods only."""

    def __init__(self, watts: float, period: float = 0.1, run_seconds: float = 0.007, shows: bool = True):
        self.watts, self.period, self.run_seconds, self.shows, self.now = watts, period, run_seconds, shows, 0.0

    def run(self) -> None:
        self.now += self.run_seconds

    def joules(self) -> float:
        return self.watts * self.period * (self.now // self.period) if self.shows else 5.0

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(("run_seconds", "error"), [(0.007, 0.006), (0.25, 0.07), (4.0, 0.03)])
def test_power_of_steady_work(run_seconds, error):
    card = Card(watts=600, run_seconds=run_seconds)
    interval = energy.steady(card.run, card.joules, 3.0, card.clock)
    assert interval.seconds >= 3.0
    assert interval.runs == round(interval.seconds / run_seconds)
    assert interval.watts == pytest.approx(600, rel=error)
    assert interval.joules / interval.runs == pytest.approx(600 * run_seconds, rel=error)


@pytest.mark.parametrize("run_seconds", [0.007, 4.0, 20.0])
def test_a_counter_that_stands_still(run_seconds):
    card = Card(watts=600, run_seconds=run_seconds, shows=False)
    assert energy.steady(card.run, card.joules, 3.0, card.clock) is None
    assert card.now <= max(energy.STUCK_SECONDS, 2 * run_seconds) + run_seconds


def test_a_counter_that_stops():
    card = Card(watts=600)

    def run() -> None:
        card.run()
        card.shows = card.now < 1.0

    assert energy.steady(run, card.joules, 3.0, card.clock) is None
    assert 8 < card.now < 10


def test_impossible_power_is_told():
    assert energy.why_impossible(energy.Interval(2100.0, 3.0, 9), 700) == ""
    assert "995 W is more than the card's limit of 700 W" in energy.why_impossible(energy.Interval(2985, 3, 9), 700)
    assert energy.why_impossible(None, 700) == "the energy counter stands still"
