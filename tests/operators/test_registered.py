"""Every operator is listed, and has a kernel, a refusal, a fake and a gradient or its refusal, each where it is due."""

import pytest
import torch

import nm_act.ops  # noqa: F401  (it registers)
from nm_act.ops.library import OPERATORS

HAS = torch._C._dispatch_has_kernel_for_dispatch_key
REMEDY = {
    "Autograd": "register its gradient, or name it in WITHOUT_GRADIENT, in nm_act/ops/autograd.py",
    "Meta": "register its fake in nm_act/ops/operators.py",
    "CPU": "list its source in CMakeLists.txt and build, or refuse it as nm_act/ops/fused.py does",
    "CUDA": "refuse it at the end of nm_act/ops/operators.py, where this build or every build has no CUDA kernel",
}
"""Dispatch key of torch -> what to do for an operator without a kernel there."""


def test_the_list_has_every_operator():
    declared = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nm_act::")}
    listed = {"e4m3_linear", *OPERATORS}
    assert declared == listed, f"OPERATORS of nm_act/ops/library.py lacks {declared - listed or 'none'}"


@pytest.mark.parametrize("key", REMEDY)
def test_every_operator_has_a_kernel_or_a_refusal(key):
    operators = {"e4m3_linear", *OPERATORS}
    if key != "Autograd":  # what tunes kernels is private, and has those of its device only
        operators -= {"_tune_gather", "_tune_sparse_gemm"}
    lacking = sorted(name for name in operators if not HAS(f"nm_act::{name}", key))
    assert not lacking, f"expected a kernel for {key}, got none of {', '.join(lacking)}; {REMEDY[key]}"
