"""The benchmark of modes that take turns, on a tiny model and a CPU."""

import bench_inference
import bench_turns
import pytest
from conftest import csv_rows

TINY = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--rounds", "3", "--idle", "0", "--seconds", "0"]


def test_every_round_starts_with_another_mode():
    order = []
    turns = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    samples = bench_turns.rounds(turns, 4)
    assert "".join(order) == "abcbcacababc"
    assert samples == [[1, 6, 8, 10], [2, 4, 9, 11], [3, 5, 7, 12]]


def test_a_speed_up_is_the_median_of_the_rounds():
    """Not the ratio of the medians, 1.5: every round was at a clock of its own."""
    assert bench_turns.ratio([1.0, 2.0, 8.0], [2.0, 3.0, 8.0], higher_is_better=False) == 1.5
    assert bench_turns.ratio([1.0, 4.0, 6.0], [2.0, 2.0, 6.0], higher_is_better=True) == 1.0
    with pytest.raises(ValueError, match="longer"):
        bench_turns.ratio([1.0], [1.0, 2.0], higher_is_better=True)


def test_rows_are_appended(tmp_path):
    out = tmp_path / "turns.csv"
    for prompt in ("5", "8"):
        bench_turns.main([*TINY, "--prompt", prompt, "--mode", "dense", "nm-2:4", "--csv", str(out)])
    rows = csv_rows(out)
    assert tuple(rows[0]) == bench_inference.COLUMNS
    metrics = ("ttft_ms", "ttft_busy_ms", "decode_tok_s")
    expected = [(p, m, mode) for p in ("5", "8") for m in metrics for mode in ("dense_bf16", "nm-2:4")]
    assert [(row["prompt"], row["metric"], row["mode"]) for row in rows] == expected
    for row in rows:
        assert row["baseline"] == "dense_bf16"
        assert row["mode"] != "dense_bf16" or row["speedup"] == "1.000"
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "nm-2:4"], "expected a dense mode to compare with"),
        (["--mode", "dense", "fast"], "expected a mode such as dense"),
        (["--rounds", "0"], "expected prompts, batches and rounds of at least 1"),
    ],
)
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_turns.main(["--model", "tiny", "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
