"""tools/pattern_frontier.py: speed-ups by pattern from benchmark rows, and what windows cost in memory."""

from pathlib import Path

import pattern_frontier
import pytest
import torch

import nm_act

HEADER = "variant,dtype,pattern,stage,tokens,baseline,speedup\n"


def speed(path: Path) -> pattern_frontier.Speed:
    return pattern_frontier.Speed("prefill", (str(path), str(path) + ".missing"), "bf16", "cublas_bf16", "4096")


def test_the_fastest_variant_counts_by_its_mean_over_shapes(tmp_path):
    path = tmp_path / "patterns.csv"
    path.write_text(
        HEADER
        + "lifted,bf16,2:4+1,op,4096,cublas_bf16,1.0\nlifted,bf16,2:4+1,op,4096,cublas_bf16,1.21\n"
        + "prune+dense,bf16,2:4+1,op,4096,cublas_bf16,0.9\nprune+dense,bf16,8:16,op,4096,cublas_bf16,0.8\n"
        # other token counts, types, baselines and stages are other figures
        + "lifted,bf16,2:4+1,op,1024,cublas_bf16,9\nlifted,e4m3,2:4+1,op,4096,cublas_bf16,9\n"
        + "lifted,bf16,2:4+1,op,4096,copy,9\nlifted,bf16,2:4+1,gemm,4096,cublas_bf16,9\n"
    )
    assert speed(path).by_pattern() == pytest.approx({"2:4+1": 1.1, "8:16": 0.8})


def test_nothing_measured_is_nothing_claimed(tmp_path):
    assert speed(tmp_path / "none.csv").by_pattern() == {}


def test_memory_of_windows_is_what_lifting_allocates():
    pattern, weight = "2:4+1", torch.randn(8, 64)
    lifted = nm_act.lift_weight(weight, pattern)
    assert torch.equal(lifted[:, :64], weight)  # one copy is enough
    assert pattern_frontier.lifted(pattern) == f"{100 * (lifted.numel() / weight.numel() - 1):g} %"
    assert [pattern_frontier.lifted(other) for other in ("2:4", "2:4+2", "8:16", "50%")] == ["0 %", "–", "–", "–"]


def test_every_speed_names_columns_that_benchmarks_write():
    for one in pattern_frontier.SPEEDS:
        for rows in map(pattern_frontier.measured_rows, one.paths):
            assert (
                not rows or {"stage", "dtype", "baseline", "tokens", "pattern", "variant", "speedup"} <= rows[0].keys()
            )
