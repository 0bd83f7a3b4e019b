"""Layers whose weight is split over the ranks of a process group: what each rank holds and what it has to exchange."""

from .row import row_sparse_linear
from .shard import Shard, local_weight, refuse_sharded, shard_of, stored_in_out, whole_channel_scale
from .sizes import Part, check_size, refusal, splits

__all__ = [
    "Part",
    "Shard",
    "check_size",
    "local_weight",
    "refusal",
    "refuse_sharded",
    "row_sparse_linear",
    "shard_of",
    "splits",
    "stored_in_out",
    "whole_channel_scale",
]
