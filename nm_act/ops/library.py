"""Loads ``nm_act._C``, which registers ``torch.ops.nm_act.*``, and holds what the operators' wrappers share."""

import re
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..version import __version__

try:
    from .. import _C as _C  # every other module takes it from here, so that all of them raise this sentence
except ImportError as error:
    raise ImportError(
        f"expected the compiled part of nm_act for this Python and torch, got: {error}; build it with: pip install -e ."
    ) from error

OPERATORS = (
    *("prune", "compress", "decompress", "sparse_linear", "sparse_linear_prepacked", "gather_linear", "dense_linear"),
    *("compress_packed", "rms_norm_compress", "silu_mul_compress", "sparse_gemm", "sparse_gemm_silu_mul"),
    *("rms_norm_prune", "silu_mul_prune", "e4m3_product", "rms_norm_add", "decode_linear", "sandwich_linear"),
    *("rotary", "rotary_cache", "decode_attention", "_tune_gather", "_tune_sparse_gemm", "_packed_layer"),
)
"""The operators that ``csrc/ops/schemas.cpp`` declares."""

_missing = [name for name in OPERATORS if not hasattr(torch.ops.nm_act, name)]
if _missing:  # before anything is registered, so that each later import says the same
    raise ImportError(
        f"expected the compiled part of this version of nm_act, got an older one without {', '.join(_missing)}; build "
        "it again with: pip install --no-build-isolation -e ."
    )


def build_info() -> dict[str, object]:
    """What was compiled, for which torch, and which instruction set is in use."""
    info: dict[str, Any] = {"version": __version__, **_C.build_info()}
    info["torch_cuda"] = info["torch_cuda"] or None
    info["cpu_isas"] = info["cpu_isas"].split(",")
    info["cuda_archs"] = [arch for arch in info["cuda_archs"].split(",") if arch]
    info["why_no_cuda"] = info["why_no_cuda"] or None
    info["cutlass"] = info["cutlass"] or None
    return info


def is_sm90(device: torch.device) -> bool:
    """Whether a device has compute capability 9; some kernels are compiled for it only."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def support_table() -> list[dict[str, str]]:
    """Which operator runs where, with which dtypes and patterns, and how; one dict per row."""
    return _C.support_table()


def call(op: str, *arguments: Any, **options: Any) -> Any:
    """Call an operator; for a wrong argument, a one-sentence TypeError replaces torch's message about the schema."""
    function = getattr(torch.ops.nm_act, op)
    if torch.compiler.is_compiling():
        return function(*arguments, **options)
    try:
        return function(*arguments, **options)
    except RuntimeError as error:
        refused = _OTHER_KIND.search(str(error))
        if refused is None:
            raise
        wanted, name, found = refused.groups()
        if (name, found) == ("bias", "str"):
            raise TypeError(
                f"nm_act::{op} expected bias as a Tensor or None, got a str; give a pattern as pattern="
            ) from None
        wanted = "torch.Tensor" if "Tensor" in wanted else "torch.dtype" if name.endswith("dtype") else wanted
        raise TypeError(f"nm_act::{op} expected {name} of type {wanted}, got {found}; convert it first") from None


_OTHER_KIND = re.compile(r"Expected a value of type '(.+?)' for argument '(.+?)' but instead found type '(.+?)'")


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError for tensors on different devices: torch may dispatch them to a kernel that does not check."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(
                f"nm_act::{op} expected {name} on the device of x, {x.device}, got {other.device}; move it there"
            )


def check_norm_options(op: str, weights: str, normed: bool, eps: float | None, unit_offset: bool) -> None:
    """Raise a ValueError as check_norm_options of csrc/ops/cuda/common.h does, for calls that are compiled."""
    if normed and eps is None:
        raise ValueError(f"nm_act::{op} expected eps along with {weights}, got none; give the epsilon of the norm")
    if not normed and (eps is not None or unit_offset):
        option = "unit_offset" if eps is None else "eps"
        raise ValueError(
            f"nm_act::{op} expected {weights} along with {option}, got none; leave the option out or give the weight"
        )


def refuse(op: str, device: str) -> None:
    """Register an error for an operator that has no kernel for the CPU or, in this build, for CUDA."""
    wanted = "CUDA" if device == "CPU" else "CPU"

    def refused(*_arguments: Any, **_options: Any) -> NoReturn:
        reason = build_info()["why_no_cuda"]
        built = f" (this build has no CUDA kernels: {reason})" if reason else ""
        raise NotImplementedError(
            f"nm_act::{op} expected {wanted} tensors, got {device} tensors{built}; nm-act info lists what runs where"
        )

    torch.library.impl(f"nm_act::{op}", device)(refused)


def only_on_cuda(*ops: str) -> None:
    """Register the errors for operators that have only a CUDA kernel: on a CPU, and in a build without CUDA."""
    for op in ops:
        refuse(op, "CPU")
        if not _C.build_info()["cuda"]:
            refuse(op, "CUDA")
