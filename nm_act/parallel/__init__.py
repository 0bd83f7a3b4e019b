"""Layers whose weight is split over the ranks of a process group: what each rank holds and must exchange."""

from .row import row_sparse_linear
from .shard import Shard, check_plain, local_weight, refuse_sharded, shard_of, stored_in_out, whole_weight
from .sizes import Part, check_size, check_split, part_of

__all__ = [
    "Part",
    "Shard",
    "check_plain",
    "check_size",
    "check_split",
    "local_weight",
    "part_of",
    "refuse_sharded",
    "row_sparse_linear",
    "shard_of",
    "stored_in_out",
    "whole_weight",
]
