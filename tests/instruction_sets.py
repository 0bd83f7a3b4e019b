"""Calls of every CPU kernel, each instruction set of which must give the same: ``python instruction_sets.py OUT.pt``."""

import sys

import torch

import nm_act

OPS = torch.ops.nm_act


def selected() -> dict[str, torch.Tensor]:
    """What a selection alone decides about: the same bits."""
    x, out = torch.randn(9, 96), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out |= {f"prune mean {dtype}": nm_act.prune(x.to(dtype), "8:16", token_shift="mean")}
        out |= {f"prune {m} {dtype}": OPS.prune(x.to(dtype), m // 2, m) for m in (2, 4, 8, 16, 32)}
        out |= {f"prune 2:4+{r} {dtype}": nm_act.prune(x.to(dtype), f"2:4+{r}") for r in (1, 2)}
        out |= dict(zip((f"values {dtype}", f"metadata {dtype}"), nm_act.compress(x.to(dtype)), strict=True))
    return out


def multiplied(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Sums, whose order differs: the same within rounding. Float16 takes our own dense product on every processor."""
    in_out, few, many = torch.randn(64, 24).to(dtype).t(), torch.randn(2, 64).to(dtype), torch.randn(16, 64).to(dtype)
    out_in = in_out.contiguous()
    return {
        "gather": nm_act.sparse_linear(few, in_out, pattern="3:8"),
        "dot": OPS.dense_linear(few, out_in),
        "gemm": nm_act.sparse_linear(many, in_out, pattern="3:8"),
        "epilogue": nm_act.sparse_linear(many, out_in, pattern="3:8", variance_correction=True, shift=few[0]),
    }


def results() -> list[dict[str, torch.Tensor]]:
    """One dict for each of ``ROUNDING``."""
    torch.manual_seed(0)
    return [selected(), multiplied(torch.float32), multiplied(torch.float16)]


ROUNDING = (0.0, 1e-5, 2e-3)

if __name__ == "__main__":
    torch.save((nm_act.build_info()["cpu_isa"], *results()), sys.argv[1])
