"""N:M activation sparsity for LLM inference in PyTorch: prune activations on the fly, without retraining."""

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
from .patterns import NMPattern
from .version import __version__

__all__ = [
    "NMPattern",
    "__version__",
    "build_info",
    "compress",
    "decompress",
    "gather_linear",
    "pack_metadata",
    "prune",
    "sparse_linear",
    "support_table",
    "unpack_metadata",
]
