"""Transformers' tensor parallelism: checks, before loading, whether a model with sparse layers can be split as planned.

Transformers does the splitting (``tp_plan``); :class:`~nm_act.NMLinear` detects that its weight is a DTensor.
"""

import re
from collections.abc import Iterator
from typing import Any

from ..layers.linear import sparse_layers
from ..parallel import Part, check_size, check_split, part_of

_KINDS = {"rowwise": "row", "colwise": "column"}
_GATHERED = ("colwise_gather_output", "colwise_rep")
"""Column styles whose outputs are gathered again on every rank, so that attention sees whole heads."""

_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}


def check_plan(model: Any) -> None:
    """Check that the tensor-parallel plan of a Transformers model that is being loaded cuts no group.

    Does nothing without such a plan. Raises ValueError if the size does not divide a sparse layer into whole groups and
    attention heads (the error names the layer and the sizes that work), if a layer's method cannot be split, or if FSDP
    is requested.
    """
    distributed: Any = getattr(model.config, "distributed_config", None)
    _refuse_fsdp(distributed)
    size = getattr(distributed, "tp_size", None) or 1
    if size == 1:
        return
    plan = dict(model.tp_plan or {})
    if isinstance(distributed.tp_plan, dict):
        plan = plan | distributed.tp_plan if distributed.tp_plan else {}  # an empty plan has no rules
    check_size(size, _parts(model, plan))


def _refuse_fsdp(distributed: Any) -> None:
    # FSDP splits every weight by rows, as column parallelism does, but gathers it again for each call.
    for field in ("fsdp_size", "dp_replicate_size", "dp_size"):
        ranks = getattr(distributed, field, None) or 1
        if ranks > 1:
            raise ValueError(
                f"expected a sparse model without FSDP, got a DistributedConfig with {field} {ranks}; use tensor "
                "parallelism alone (tp_size)"
            )


def _parts(model: Any, plan: dict[str, str]) -> Iterator[Part]:
    config = model.config.get_text_config()
    for name, module in sparse_layers(model).items():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), plan.get(name, ""))
        kind = next((kind for word, kind in _KINDS.items() if word in style), None)
        if kind is None:
            continue
        check_split(name, module.spec, kind)
        yield part_of(name, module.spec, kind, module.in_features, module.out_features)
        if kind == "column" and style not in _GATHERED:
            heads = getattr(config, _HEADS.get(name.rpartition(".")[2], ""), None)
            if isinstance(heads, int):
                yield Part(name, "attention heads", heads)
