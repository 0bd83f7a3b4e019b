"""The classes that plug into vLLM; importing this module needs vLLM and registers the method "nm_act" with it.

The weights are loaded as vLLM loads dense ones. A channel scale derives from the *whole* weight of a projection, so it
is computed while the loader has that in hand, before it is cut for this rank: no rank has to ask another, and all
select as a single process does. Every collective is vLLM's own, and ``apply`` reads nothing back from the device, so it
can be captured in a CUDA graph.
"""

import functools
import inspect
from typing import Any

import torch

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise ImportError("expected vLLM, got none; install it with: pip install 'nm_act[vllm]'") from error

from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from .. import criteria, mitigations, ops, parallel
from ..recipe import LinearSpec, Recipe
from . import vllm as plan

_SHARD_IDS = {"q": 0, "k": 1, "v": 2}


class NMActVLLMConfig(QuantizationConfig):
    """vLLM's view of the ``quantization_config`` in a saved checkpoint: the recipe."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        plan.check_servable(recipe)
        self.recipe = recipe

    def __repr__(self) -> str:
        return f"NMActVLLMConfig({self.recipe})"

    def get_name(self) -> str:
        """The method's name."""
        return "nm_act"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that the operators take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that has kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the recipe is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NMActVLLMConfig":
        """From the entry in config.json; ValueError as :meth:`nm_act.Recipe.from_dict`."""
        fields = {key: value for key, value in config.items() if key != "quant_method"}
        return cls(Recipe.from_dict(fields.get("recipe", fields)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """The sparse method for a linear layer in the recipe, vLLM's dense one for any other; None elsewhere."""
        if not isinstance(layer, LinearBase):
            return None
        specs = plan.specs_of(self.recipe, prefix, self.packed_modules_mapping, layer.input_size)
        return NMActLinearMethod(specs) if specs else UnquantizedLinearMethod()


class NMActLinearMethod(LinearMethodBase):
    """Runs one vLLM linear layer (replicated, column, row, merged, QKV) through :func:`nm_act.sparse_linear`.

    Parameters
    ----------
    specs : list of (str, LinearSpec or None)
        The projections in the layer, in order.
    """

    def __init__(self, specs: list[tuple[str, LinearSpec | None]]):
        self.names = [name for name, _ in specs]
        self.specs = [spec for _, spec in specs]

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Register the weight ``[sum(output_partition_sizes), input_size_per_partition]``.

        Raises
        ------
        ValueError
            If a shard boundary would cut a group.
        """
        size = input_size // input_size_per_partition
        units = [spec.pattern.span for spec in self.specs if spec is not None]
        parallel.check_size(size, [parallel.Part(layer.prefix, "in_features", input_size, unit) for unit in units])
        if len(self.specs) not in (1, len(output_partition_sizes)):
            raise ValueError(
                f"expected {len(output_partition_sizes)} projections in {layer.prefix}, got {', '.join(self.names)}; "
                "leave this layer out of the recipe"
            )
        layer.nm_act_scales = [None] * len(self.specs)
        load = extra_weight_attrs.pop("weight_loader")
        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=functools.partial(self._load, layer, load),
        )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        layer.nm_act_sizes = list(output_partition_sizes) if len(self.specs) > 1 else [sum(output_partition_sizes)]

    def _load(self, layer, load, param, loaded_weight: torch.Tensor, loaded_shard_id=None) -> None:
        """vLLM's loader of this layer, and the channel scales of what it is about to cut."""
        whole = loaded_weight.to(param.device, param.dtype)
        for index, part in self._projections(layer, whole, loaded_shard_id):
            spec = self.specs[index]
            if spec is not None:
                layer.nm_act_scales[index] = criteria.channel_scale(spec.criterion, part)
        load(param, loaded_weight, *(() if loaded_shard_id is None else (loaded_shard_id,)))

    def _projections(self, layer, whole: torch.Tensor, shard_id):
        """(index, weight [out, in]) of each projection in a checkpoint's tensor."""
        if len(self.specs) == 1:
            return [(0, whole)]
        if isinstance(shard_id, (int, str)):
            return [(_SHARD_IDS.get(shard_id, shard_id), whole)]
        if isinstance(layer, QKVParallelLinear):
            heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
            widths = (layer.head_size, layer.head_size, getattr(layer, "v_head_size", layer.head_size))
            sizes = [count * width for count, width in zip(heads, widths, strict=True)]
        else:
            sizes = layer.output_sizes
        indices = range(len(sizes)) if shard_id is None else shard_id
        return zip(indices, whole.split([sizes[index] for index in indices]), strict=True)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Join the projections that prune alike, and store their weights [in, out], as decoding reads them.

        Raises
        ------
        RuntimeError
            If a criterion needs the whole weight and no checkpoint was loaded (dummy weights, say).
        """
        for name, spec, scale in zip(self.names, self.specs, layer.nm_act_scales, strict=True):
            if spec is not None and scale is None and criteria.CRITERIA[spec.criterion] is not None:
                raise RuntimeError(
                    f"expected the weight of {name} in {layer.prefix} from a checkpoint, from which the criterion "
                    f"{spec.criterion!r} computes its channel scale, got none; load the checkpoint itself"
                )
        shard = self._shard(layer)
        scales = [scale if shard is None else shard.inputs(scale) for scale in layer.nm_act_scales]
        layer.nm_act_segments = plan.segments(self.specs, layer.nm_act_sizes, scales)
        weight = layer.weight.data
        parts = [parallel.stored_in_out(weight[each.start : each.stop]) for each in layer.nm_act_segments]
        # A single part stays the parameter; several are kept apart, each stored by itself, and the whole is given back.
        layer.weight.data = parts[0] if len(parts) == 1 else weight.new_empty(0)
        layer.nm_act_weights = [None] if len(parts) == 1 else parts
        layer.nm_act_shift_outs = [
            None if each.spec is None else mitigations.shift_image(each.spec, part, {})
            for each, part in zip(layer.nm_act_segments, parts, strict=True)
        ]
        layer.nm_act_operator = ops.sparse_linear
        if shard is not None:
            layer.nm_act_operator = functools.partial(parallel.row_sparse_linear, shard)

    @staticmethod
    def _shard(layer) -> parallel.Shard | None:
        """How the inputs are split; None where this rank sees them all."""
        if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
            return None
        if layer.tp_size != get_tensor_model_parallel_world_size():
            raise NotImplementedError(
                f"expected {layer.prefix} to be split over the tensor-parallel group of "
                f"{get_tensor_model_parallel_world_size()} ranks, got {layer.tp_size}; leave it out of the recipe"
            )
        return parallel.Shard("row", layer.tp_rank, layer.tp_size, _gather)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x [tokens, in] -> [tokens, out]`` of this rank; a row-parallel layer's outputs are summed by vLLM."""
        outputs = [
            each.run(
                x,
                layer.weight if part is None else part,
                None if bias is None else bias[each.start : each.stop],
                shift_out,
                layer.nm_act_operator,
            )
            for each, part, shift_out in zip(
                layer.nm_act_segments, layer.nm_act_weights, layer.nm_act_shift_outs, strict=True
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    # vLLM's collectives know no float64; a gather only moves bits.
    sent = tensor.contiguous().view(torch.float32) if tensor.dtype == torch.float64 else tensor.contiguous()
    return tensor_model_parallel_all_gather(sent.unsqueeze(0), dim=0).view(tensor.dtype)


def _check_interface() -> None:
    """TypeError where vLLM calls or abstracts something that the classes above do not know."""
    wanted = list(inspect.signature(LinearMethodBase.create_weights).parameters)
    known = list(inspect.signature(NMActLinearMethod.create_weights).parameters)
    if wanted != known:
        raise TypeError(f"create_weights takes {', '.join(wanted)}")
    missing = NMActVLLMConfig.__abstractmethods__ | NMActLinearMethod.__abstractmethods__
    if missing:
        raise TypeError(f"new abstract methods {', '.join(sorted(missing))}")


_check_interface()
register_weight_loader_v2_supported_method(NMActLinearMethod)
register_quantization_config("nm_act")(NMActVLLMConfig)
