"""The gather kernel's choice of a configuration, against the times of benchmarks/tune_decode.py on a device."""

import itertools
from collections import defaultdict
from pathlib import Path

import pytest
import tune_decode_layers
from conftest import csv_rows

import nm_act

TABLE = Path(__file__).parents[2] / "benchmarks/results/h100/decode_tuning.csv"
MULTIPROCESSORS = 132  # of the device that the table is from
DENSE = ("cublas_bf16", "dense_e4m3")


def times() -> dict[tuple, dict]:
    """Microseconds by (dtype, tokens, out_features, in_features), then by configuration or baseline."""
    table = defaultdict(dict)
    for row in csv_rows(TABLE):
        job = (row["dtype"], *(int(row[name]) for name in ("tokens", "out_features", "in_features")))
        names = ("lanes", "splits", "threads", "ahead")
        key = row["variant"] if row["variant"] in DENSE else tuple(int(row[name]) for name in names)
        table[job][key] = float(row["us_p50"])
    return table


def choice(job: tuple) -> tuple:
    dtype, *sizes = job
    return tuple(map(int, nm_act._C.gather_configs(*sizes, dtype != "bf16", 8, 16, 9, MULTIPROCESSORS)[0]))


def loss(job: tuple, measured: dict) -> float:
    """The choice's time over the fastest; both without lines fetched ahead where the choice was timed so only."""
    config = choice(job)
    ahead = config in measured
    rivals = [us for key, us in measured.items() if key not in DENSE and (ahead or key[3] == 0)]
    return measured[config if ahead else (*config[:3], 0)] / min(rivals)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "e4m3", "int8"])
def test_choice_is_near_the_fastest(dtype, tokens):
    jobs = {job: measured for job, measured in times().items() if job[:2] == (dtype, tokens)}
    if dtype == "int8" and tokens > 1:
        assert not jobs
        return
    assert len(jobs) == (24 if tokens == 1 else 4)
    losses = {job: loss(job, measured) for job, measured in jobs.items()}
    assert max(losses.values()) <= 1.10, losses
    assert sum(losses.values()) / len(losses) <= 1.03, losses


def test_bf16_loses_little_to_dense():
    jobs = {job: measured for job, measured in times().items() if job[0] == "bf16"}
    assert jobs
    for job, measured in jobs.items():
        config = choice(job)
        us = measured.get(config) or measured[*config[:3], 0]
        assert us <= 1.05 * measured["cublas_bf16"] + 5, job


def test_choice_within_a_layer_is_near_the_fastest():
    """decode_linear's choice, by the time of a whole layer's decode step in four models."""
    steps = defaultdict(dict)
    for row in csv_rows(TABLE.parent / "decode_layers.csv"):
        sizes = (int(row["out_features"]), int(row["in_features"]))
        config = tuple(int(row[name]) for name in ("lanes", "splits", "threads", "ahead"))
        steps[row["model"], row["dtype"], row["pattern"], *sizes][config] = float(row["us_p50"])
    assert len([case for case in steps if case[1:3] == ("bf16", "8:16")]) == 16
    for case, measured in steps.items():
        _, dtype, pattern, *sizes = case
        kind = (dtype == "e4m3", *map(int, pattern.split(":")), 9, MULTIPROCESSORS)
        chosen = nm_act._C.gather_configs(1, *sizes, *kind, in_layer=True)[0]
        chosen = tuple(map(int, chosen))
        if case[1:3] == ("bf16", "8:16") or chosen in measured:  # elsewhere only the choices of then were timed
            assert measured[chosen] <= 1.014 * min(measured.values()), case
    others = (((True, 8, 16), 132), ((False, 4, 16), 132), ((False, 8, 16), 114))  # 8 bits, a share, a device
    for kind, multiprocessors in others:  # that were not measured
        alone, layer = (
            nm_act._C.gather_configs(1, 4096, 4096, *kind, 9, multiprocessors, in_layer=each)[0]
            for each in (False, True)
        )
        assert alone == layer


def test_what_is_timed_within_a_layer():
    """The fastest alone twice, the choice where it is another, and in the first case all others of at least four slices."""
    shapes = tune_decode_layers.products("llama-3-8b")
    assert shapes == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    configs = tune_decode_layers.candidates((28672, 4096), "bf16", "8:16", (9, MULTIPROCESSORS))
    assert configs["alone"] == configs["again"] != configs["chosen"] == (128, 4, 512, 1)
    all_of_512 = set(itertools.product((16, 32, 64, 128), range(4, 9), (512,), (0, 1)))
    assert set(configs.values()) == all_of_512 | {configs["alone"]}
    confirmed = tune_decode_layers.candidates((28672, 4096), "fp16", "8:16", (9, MULTIPROCESSORS))
    assert list(confirmed) == ["alone", "again", "chosen"]
    assert list(tune_decode_layers.candidates((6144, 4096), "bf16", "2:4", (9, MULTIPROCESSORS))) == ["alone", "again"]


def test_a_gain_is_more_than_what_two_captures_of_one_configuration_differ_by():
    configs = {"alone": (32, 6, 512, 1), "again": (32, 6, 512, 1), "chosen": (64, 8, 512, 0)}
    times = {"alone": (117.9, 118.0, 118.1), "again": (117.5, 117.6, 117.7), "chosen": (113.9, 114.0, 114.1)}
    line = tune_decode_layers.summary("m", "bf16", "8:16", (4096, 4096), configs, times)
    assert "noise 0.40 (0.3 %), best (64, 8, 512, 0) +4.00: gains; chosen +4.00" in line
    times["chosen"] = (117.6, 117.7, 117.8)
    assert "within noise; chosen +0.30" in tune_decode_layers.summary("m", "", "", (1, 1), configs, times)
