"""N:M activation sparsity for LLM inference in PyTorch: prune activations on the fly, without retraining."""

from . import reference
from .calibrate import load_calibration
from .explain import Explanation, explain
from .integrations import register_with_transformers
from .lifting import lift_weight, unlift
from .linear import NMLinear
from .ops import (
    build_info,
    compress,
    decompress,
    gather_linear,
    pack_metadata,
    prune,
    sparse_linear,
    support_table,
    unpack_metadata,
)
from .optimize import FP8Linear, OptimizeReport, StaticDecoder, deoptimize, optimize
from .packed import Packed, compress_packed, rms_norm_compress, silu_mul_compress, sparse_gemm, sparse_linear_fp8
from .patterns import NMPattern
from .recipe import LinearSpec, Recipe, Rule
from .sparsify import SparsifyReport, sparsify
from .version import __version__

__all__ = [
    "Explanation",
    "FP8Linear",
    "LinearSpec",
    "NMActConfig",
    "NMLinear",
    "NMPattern",
    "OptimizeReport",
    "Packed",
    "Recipe",
    "Rule",
    "SparsifyReport",
    "StaticDecoder",
    "__version__",
    "build_info",
    "compress",
    "compress_packed",
    "decompress",
    "deoptimize",
    "explain",
    "gather_linear",
    "lift_weight",
    "load_calibration",
    "optimize",
    "pack_metadata",
    "prune",
    "reference",
    "rms_norm_compress",
    "silu_mul_compress",
    "sparse_gemm",
    "sparse_linear",
    "sparse_linear_fp8",
    "sparsify",
    "support_table",
    "unlift",
    "unpack_metadata",
]

register_with_transformers()


def __getattr__(name: str):
    # NMActConfig needs Transformers, whose import takes seconds: only those who use it wait for it.
    if name == "NMActConfig":
        from .integrations.transformers import NMActConfig

        return NMActConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
