"""One rank's part of a weight [out, in], and what is derived from the whole weight.

A rank of a *column-parallel* layer has a slice of the output features, a rank of a *row-parallel* layer a slice of the
inputs (as usual, the names refer to the transposed weight). Vectors and low-rank factors are split accordingly: those
over the inputs (channel scale, shift) are whole in the first case and sliced in the second, those over the output
features vice versa. The image of a shift and the low-rank term of a row-parallel layer are partial sums; a bias is
added once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor
from torch.distributed import is_available

if is_available():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """Which part of a layer this rank holds."""

    kind: str  # "column" (a slice of the output features) or "row" (a slice of the inputs)
    rank: int  # in the group
    size: int  # of the group
    # ``[...] -> [size, ...]``: the tensors of all ranks, in rank order. Only row-parallel layers call it.
    gather: Callable[[Tensor], Tensor] = field(repr=False)

    def part(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        """A view of this rank's part of a tensor whose axes have these names ("in", "out" or others)."""
        split = "out" if self.kind == "column" else "in"
        if split not in axes:
            return tensor
        dim = list(axes).index(split)
        length = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * length, length)


def shard_of(weight: Tensor) -> Shard | None:
    """How a DTensor weight ``[out, in]`` is split; None for a plain tensor, ValueError for two splits at once."""
    if not _is_sharded(weight):
        return None
    split = [(dim, place) for dim, place in enumerate(weight.placements) if not place.is_replicate()]
    if not split:
        return None
    mesh_dim, placement = split[0]
    dim = getattr(placement, "dim", None)
    if len(split) > 1 or dim is None:
        raise ValueError(
            f"expected a weight that is split over one mesh dimension, got placements {tuple(weight.placements)}; "
            "use tensor parallelism alone"
        )
    mesh = weight.device_mesh
    group = mesh.get_group(mesh_dim)
    kind = "column" if dim % 2 == 0 else "row"
    return Shard(kind, mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim), lambda tensor: _gather(tensor, group))


def local_weight(weight: Tensor) -> Tensor:
    """The part of the weight on this rank; a plain tensor is returned as it is."""
    return weight.to_local() if _is_sharded(weight) else weight


def stored_in_out(weight: Tensor) -> Tensor:
    """The weight with this rank's part stored [in, out] (``.t()`` contiguous); the weight itself if it already is."""
    local = local_weight(weight)
    if local.t().is_contiguous():
        return weight
    stored = local.t().contiguous().t()
    if stored is local or not _is_sharded(weight):
        return stored
    return DTensor.from_local(
        stored,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=(1, weight.shape[0]),
    )


def whole_weight(weight: Tensor) -> Tensor:
    """The whole weight, in the storage order of this rank's part; a plain tensor is returned as it is.

    Values derived from parts would round differently than in one process, and Amber-Pruner needs quantiles of the whole
    matrix, so every rank gathers each layer once, while it loads. A collective: all ranks of the group must call it.
    """
    if not _is_sharded(weight):
        return weight
    whole = weight.full_tensor()
    # In the order of a single process, because sums depend on the order of their terms.
    return stored_in_out(whole) if local_weight(weight).t().is_contiguous() else whole


def refuse_sharded(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a ValueError for the first weight that is split over ranks, because its layer can no longer be replaced."""
    for name, weight in weights:
        shard = shard_of(weight)
        if shard is not None:
            raise ValueError(
                f"expected a whole model, got one whose {name} is split over {shard.size} ranks; give from_pretrained "
                "the recipe together with the plan, as quantization_config=NMActConfig(recipe)"
            )


def check_plain(x: Tensor) -> None:
    """Raise a NotImplementedError for an input that torch's parallel styles have turned into a DTensor."""
    if _is_sharded(x):
        raise NotImplementedError(
            "expected a plain tensor as a sparse layer's input, got a DTensor, as torch's parallelize_module gives it; "
            "split the model with Transformers' tp_plan instead"
        )


def _is_sharded(weight: Tensor) -> "TypeGuard[DTensor]":
    return is_available() and isinstance(weight, DTensor)


@torch.no_grad()
def _gather(tensor: Tensor, group: "dist.ProcessGroup") -> Tensor:
    size = dist.get_world_size(group)
    flat = tensor.new_empty((size * tensor.numel(),))
    # torch 2.13 renamed the function and warns about the old name.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(flat, tensor.contiguous().view(-1), group=group)
    return flat.view(size, *tensor.shape)
