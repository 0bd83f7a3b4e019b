"""The benchmarks' timer, its device replaced: which functions get a time; the rows of a second run."""

import csv

import gpu_timer
import pytest
import timer
import torch


class Event:
    def __init__(self, at: float):
        self.at = at

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


class Replay:
    """Ten microseconds a call on the device."""

    inner, one_us = 4, 10.0

    def __init__(self, calls, graph, _pool, _stream):
        self.calls = calls
        self.host_us = 0.0 if graph else calls[0].host_us

    def __call__(self) -> tuple[Event, Event]:
        return Event(0.0), Event(10.0 * self.inner / 1e3)


class Call:
    def __init__(self, host_us: float):
        self.host_us = host_us


class Yardstick(gpu_timer.DeviceCopy):
    host_us = 50.0

    def __init__(self):
        pass


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    monkeypatch.setattr(gpu_timer, "_Replay", Replay)
    for name in ("graph_pool_handle", "Stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


def test_what_the_host_cannot_keep_up_with_is_left_out(capsys):
    calls = {"ours": [Call(50.0)], "quick": [Call(3.0)], "slow": [Call(9.5)], "copy": [Yardstick()]}
    times = gpu_timer.interleaved(calls, 1e-3, eager=("quick", "slow", "copy"))
    assert list(times) == ["ours", "quick", "copy"]
    assert times["quick"] == pytest.approx([10.0] * len(times["quick"]))
    assert capsys.readouterr().out == "slow: no row, a call takes the host 9.5 us, as long as the device\n"


def test_rows_of_a_second_run(tmp_path):
    path = tmp_path / "rows.csv"
    for append, kept in ((False, ["1"]), (True, ["1", "2"]), (False, ["3"])):
        timer.Rows(str(path), append=append).append(variant=kept[-1])
        assert [row["variant"] for row in csv.DictReader(path.read_text().splitlines())] == kept
