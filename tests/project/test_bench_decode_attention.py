"""The benchmark of decode attention: what its check before the timing accepts, and its refusal without CUDA."""

import sys

import bench_decode_attention as bench
import pytest
import torch

from nm_act import reference


@pytest.fixture
def step(monkeypatch):
    """A small step on a CPU, where the oracle stands for the kernel."""
    tensors = [torch.randn(2, 1, heads, 64).bfloat16() for heads in (6, 2, 2)]
    angles = torch.randn(1, 1, 64)
    angles = [angles.cos().bfloat16(), angles.sin().bfloat16()]
    caches = [torch.randn(2, 2, 9, 64).bfloat16() for _ in range(2)]
    rotated = tuple(reference._rotated(x, *angles) for x in tensors[:2])
    step = bench.Step(*tensors, *angles, *caches, torch.full((2,), 9, dtype=torch.int32), rotated)
    monkeypatch.setattr(bench.fused, "decode_attention", reference.decode_attention)
    return step


def test_both_ways_agree_with_the_oracle(step):
    step.verify("a small step")


def test_a_wrong_output_is_not_timed(step, monkeypatch):
    monkeypatch.setattr(bench.fused, "decode_attention", lambda *a, **k: 1.1 * reference.decode_attention(*a, **k))
    with pytest.raises(SystemExit, match=r"expected the kernel of a small step within .* the same cache: not timed"):
        step.verify("a small step")


def test_a_cache_that_is_not_written_is_not_timed(step):
    step.rotated = step.rotated[0], step.rotated[1] + 1
    with pytest.raises(SystemExit, match=r"expected the baseline of a small step .* another cache: not timed"):
        step.verify("a small step")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal without CUDA")
def test_without_a_device(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_decode_attention.py"])
    with pytest.raises(SystemExit, match=r"expected a CUDA device, found none"):
        bench.main()
