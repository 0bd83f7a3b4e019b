"""The operators, their gradients, and what explains and packs for them."""

from . import autograd  # registers the gradients
from .operators import (
    _C,
    METADATA_LAYOUTS,
    build_info,
    call,
    compress,
    decompress,
    gather_linear,
    pack_metadata,
    prune,
    refuse,
    sparse_linear,
    support_table,
    unpack_metadata,
)

__all__ = [
    "METADATA_LAYOUTS",
    "_C",
    "autograd",
    "build_info",
    "call",
    "compress",
    "decompress",
    "gather_linear",
    "pack_metadata",
    "prune",
    "refuse",
    "sparse_linear",
    "support_table",
    "unpack_metadata",
]
