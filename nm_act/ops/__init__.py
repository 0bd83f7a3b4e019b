"""The compiled operators; importing this package registers ``torch.ops.nm_act.*`` with their fakes and gradients."""

from . import autograd, e4m3, fused, packed  # noqa: F401  (they register)
from .library import build_info, support_table
from .operators import (
    METADATA_LAYOUTS,
    compress,
    decompress,
    gather_linear,
    pack_metadata,
    prune,
    sparse_linear,
    sparse_linear_fp8,
    unpack_metadata,
)

__all__ = [
    "METADATA_LAYOUTS",
    "build_info",
    "compress",
    "decompress",
    "gather_linear",
    "pack_metadata",
    "prune",
    "sparse_linear",
    "sparse_linear_fp8",
    "support_table",
    "unpack_metadata",
]
