"""The classes that plug into vLLM; importing this module needs vLLM and registers the method "nm_act" with it.

vLLM loads the weights like dense ones. What is derived from the *whole* weight of a projection (a channel scale, a
replacement of the weight) is computed while the loader holds it, before it is sliced for this rank: ranks need not
communicate, and all select as a single process does. A weight that is loaded before its calibrated data is kept until
the data arrives. Every collective is vLLM's own, and ``apply`` reads nothing back from the device, so CUDA graphs can
capture it.

A reload (``reload_weights``, a weight update) takes the same path: vLLM calls each loader with a weight on the meta
device to count what arrives, then loads the layer into new memory and copies its parameters to their old addresses.
This module likewise copies what it derives to the old addresses, because captured graphs and compiled code read those.
"""

import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch

from ..supported import installing

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise ImportError(f"expected vLLM, got none; install it with: {installing('vllm')}") from error

from vllm import _custom_ops
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
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
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from .. import parallel
from ..methods import mitigations
from ..ops.prepack import prepack_weight
from ..recipe import LinearSpec, Recipe
from . import vllm_plan as plan
from .vllm_loading import Loading
from .vllm_operands import Operands, Storage
from .vllm_packed import Prepacked
from .vllm_reload import check_interface, guard_reloads

_SHARD_IDS = {"q": 0, "k": 1, "v": 2}


class NMActVLLMConfig(QuantizationConfig):
    """The ``quantization_config`` of a saved checkpoint, or of ``--hf-overrides`` for a dense one: the recipe.

    Raises ValueError if there is no recipe (``--quantization nm_act`` alone), or if a server cannot follow it.
    """

    def __init__(self, recipe: Recipe | None = None, storage: Storage | None = None):
        super().__init__()
        if recipe is None:
            raise ValueError(plan.NO_RECIPE)
        plan.check_servable(recipe)
        self.recipe = recipe
        self.storage = Storage() if storage is None else storage
        self._census = plan.Census()
        self._logged = False

    def __repr__(self) -> str:
        return f"NMActVLLMConfig({self.recipe})"

    def get_name(self) -> str:
        """The method's name."""
        return "nm_act"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that the operators support."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The lowest compute capability with kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the recipe is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NMActVLLMConfig":
        """From the entry in config.json; ValueError as :meth:`nm_act.Recipe.from_dict`."""
        fields = {key: value for key, value in config.items() if key not in ("quant_method", *plan.STORAGE_KEYS)}
        storage = Storage.from_config(config)
        if storage.fp8 is not None:
            storage.check_device(current_platform.device_type, current_platform.get_device_capability())
        return cls(Recipe.from_dict(fields.get("recipe", fields)), storage)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raise a ValueError for a checkpoint that is already quantised, which an override hides from vLLM."""
        plan.check_dense(model_name, revision)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """The sparse method for linear layers in the recipe, vLLM's dense one for other linear layers, else None."""
        if not isinstance(layer, LinearBase):
            self._census.add_other(prefix)
            return None
        specs = plan.specs_of(self.recipe, prefix, self.packed_modules_mapping, layer.input_size)
        self._census.add(prefix, self.packed_modules_mapping, specs)
        if specs:
            return NMActLinearMethod(specs, self._log, self.storage)
        method = UnquantizedLinearMethod()
        process = method.process_weights_after_loading

        def process_and_log(layer: torch.nn.Module) -> None:
            process(layer)
            self._log()

        # On the object instead of in a subclass: some of vLLM's models compare the type before they replace the method.
        method.process_weights_after_loading = process_and_log
        return method

    def _log(self) -> None:
        """Log once which layers are sparse, when the first layer has its weights and so all layers exist.

        Raises ValueError if the recipe names a layer or projection that the model does not have.
        """
        if self._logged:
            return
        if get_pp_group().world_size == 1:  # else this process has only a part of the layers
            self._census.check(self.recipe)
        if get_tensor_model_parallel_rank() == 0:
            level, text = self._census.sentence()
            logging.getLogger("vllm.nm_act").log(level, text + self.storage.sentence())
        self._logged = True


class NMActLinearMethod(LinearMethodBase):
    """Runs one vLLM linear layer (replicated, column, row, merged, QKV) through :func:`nm_act.sparse_linear`.

    ``specs`` are its projections in order, by name; ``loaded`` is called when a layer has its weights.
    """

    def __init__(
        self, specs: list[tuple[str, LinearSpec | None]], loaded: Callable[[], None], storage: Storage | None = None
    ):
        self._loaded = loaded
        self._storage = Storage() if storage is None else storage
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

        Raises ValueError if a shard boundary would cut a group, or a method cannot be split.
        """
        size = input_size // input_size_per_partition
        for spec in filter(None, self.specs if size > 1 else ()):
            parallel.check_split(layer.prefix, spec, "row")
            parallel.check_size(size, [parallel.part_of(layer.prefix, spec, "row", input_size, output_size)])
        if len(self.specs) not in (1, len(output_partition_sizes)):
            raise ValueError(
                f"expected {len(output_partition_sizes)} projections in {layer.prefix}, got {', '.join(self.names)}; "
                "leave this layer out of the recipe"
            )
        guard_reloads()
        layer.nm_act_load = extra_weight_attrs.pop("weight_loader")
        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=types.MethodType(self._load_weight, layer),
        )
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        layer.nm_act_sizes = list(output_partition_sizes) if len(self.specs) > 1 else [sum(output_partition_sizes)]
        layer.nm_act_operands = None
        facts = (layer.prefix, self.specs, layer.nm_act_sizes, weight, size > 1)
        layer.nm_act_fp8 = self._storage.fp8 if self._storage.takes_e4m3(*facts) else None
        layer.nm_act_prepack = _prepacked if self._storage.takes_copies(*facts) else None
        layer.nm_act_loading = self._new_loading(layer)
        whole = _whole_sizes(layer) if len(self.specs) > 1 else [output_size]
        for name in self._data_names:
            shapes = [
                mitigations.shape_of(name, input_size, out, mitigations.rank_of(spec.mitigation))
                for spec, out in zip(self.specs, whole, strict=True)
                if spec is not None and name in mitigations.data_of(spec)
            ]
            # Without memory: vLLM finds the loader by the parameter, and compares its size with the reloaded tensor's.
            place = torch.empty(sum(torch.Size(shape).numel() for shape in shapes), device="meta")
            loader = types.MethodType(self._data_loader(name), layer)
            layer.register_parameter(name, BasevLLMParameter(data=place, weight_loader=loader))

    @property
    def _data_names(self) -> list[str]:
        return sorted({name for spec in self.specs if spec is not None for name in mitigations.data_of(spec)})

    # The loaders are functions that a layer binds, because vLLM needs their name; a bound method held by vLLM would
    # keep the layer alive.

    def _data_loader(self, name: str) -> Callable[..., None]:
        """Loader of one projection's whole calibrated data; ``param`` is only the name under which vLLM finds it."""

        def load_data(layer, param, loaded_weight: torch.Tensor, loaded_shard_id=None) -> None:
            if layer.weight.is_meta:
                torch.empty_like(loaded_weight, device="meta").copy_(loaded_weight)  # this is what vLLM counts
                return
            index = 0 if len(self.specs) == 1 else _SHARD_IDS.get(loaded_shard_id, loaded_shard_id)
            loading = self._loading(layer)
            loading.set_data(index, name, loaded_weight, layer.weight)
            loading.waiting = [item for item in loading.waiting if not self._finish(layer, *item)]

        return load_data

    @property
    def _load_weight(self) -> Callable[..., None]:
        """Loader that derives what needs the whole weight, then calls vLLM's loader of this layer, which slices it."""

        def load_weight(layer, param, loaded_weight: torch.Tensor, loaded_shard_id=None) -> None:
            if param.is_meta:
                layer.nm_act_load(param, loaded_weight, *_given(loaded_shard_id))
            elif not self._finish(layer, param, loaded_weight, loaded_shard_id):
                # A copy, because it is kept longer than some of vLLM's readers keep their buffers.
                layer.nm_act_loading.waiting.append((param, loaded_weight.clone(), loaded_shard_id))

        return load_weight

    def _new_loading(self, layer) -> Loading:
        rows = torch.empty(sum(layer.nm_act_sizes), dtype=torch.int64)
        sliced = ChannelQuantScaleParameter(data=rows, output_dim=0, weight_loader=layer.nm_act_load)
        return Loading(layer.prefix, self.names, self.specs, sliced, layer.nm_act_fp8)

    def _loading(self, layer) -> Loading:
        """The layer's state while its weights are read; a reload starts with a new one.

        Raises RuntimeError if a loader is called for a layer that is already serving, outside of vLLM's reload.
        """
        if layer.nm_act_loading is None:
            if layer.weight is layer.nm_act_operands.parameter:
                raise RuntimeError(
                    f"expected new weights of {layer.prefix} through vLLM's reload_weights or a weight update, got a "
                    "call of its loader; reload with collective_rpc('reload_weights')"
                )
            layer.nm_act_loading = self._new_loading(layer)
        return layer.nm_act_loading

    def _finish(self, layer, param, loaded_weight: torch.Tensor, shard_id) -> bool:
        """Load a weight if the calibrated data of its projections has arrived."""
        loading = self._loading(layer)
        parts = list(self._projections(layer, loaded_weight, shard_id))
        loading.arrived.update(index for index, _ in parts)
        if any(loading.missing(index) for index, _ in parts):
            return False
        operands = [loading.derive(index, part, param) for index, part in parts]
        if any(operand is not part for operand, (_, part) in zip(operands, parts, strict=True)):
            loaded_weight = torch.cat([operand.to(param.device, param.dtype) for operand in operands])
        layer.nm_act_load(param, loaded_weight, *_given(shard_id))
        layer.nm_act_load(loading.rows, torch.cat([torch.arange(len(part)) for _, part in parts]), *_given(shard_id))
        return True

    def _projections(self, layer, whole: torch.Tensor, shard_id):
        """(index, weight [out, in]) of each projection in a checkpoint's tensor."""
        if len(self.specs) == 1:
            return [(0, whole)]
        if isinstance(shard_id, (int, str)):
            return [(_SHARD_IDS.get(shard_id, shard_id), whole)]
        sizes = _whole_sizes(layer)
        indices = range(len(sizes)) if shard_id is None else shard_id
        return zip(indices, whole.split([sizes[index] for index in indices]), strict=True)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Join the projections with the same selection, and store their weights [in, out], as decode reads them.

        Raises RuntimeError if a criterion needs the whole weight and no checkpoint was loaded (dummy weights, say), if
        calibrated data is missing, or if a reload contains only a part of the layer; ValueError if projections that
        share a product no longer make the same selection after a reload.
        """
        self._storage.check_some_e4m3()
        loading = self._loading(layer)
        loading.check()
        new, old = self._operands(layer, loading), layer.nm_act_operands
        for name in self._data_names:
            delattr(layer, name)
        if old is None:
            layer.nm_act_operands = new
        else:
            old.copy_(new)
        layer.nm_act_loading = None
        self._loaded()

    def _operands(self, layer, loading: Loading) -> Operands:
        """What the forward reads, computed from what was loaded."""
        shard = self._shard(layer)
        scales, data = loading.scales(shard), loading.data(layer.nm_act_sizes, shard)
        before = layer.nm_act_operands and [each.stop for each in layer.nm_act_operands.segments]
        segments = plan.segments(self.specs, layer.nm_act_sizes, scales, data, before)
        return Operands.of(layer.weight, segments, shard, fp8=layer.nm_act_fp8, prepack=layer.nm_act_prepack)

    @staticmethod
    def _shard(layer) -> parallel.Shard | None:
        """How the inputs are split; None if this rank sees all of them."""
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
        return layer.nm_act_operands.run(x, layer.weight, bias)


def _prepacked(weight: torch.Tensor) -> Prepacked:
    """A copy of ``weight [out, in]`` for the product of vLLM's dense layers, or for torch's if vLLM has none."""
    try:
        handler = _custom_ops.create_onednn_mm(weight.t(), 32)  # numbers of tokens that stay compiled, as in vLLM
    except (AttributeError, RuntimeError):  # a build without that product, or a weight that its oneDNN does not take
        return Prepacked(prepack_weight(weight))
    return Prepacked(handler.handler_tensor, handler)


def _whole_sizes(layer: torch.nn.Module) -> list[int]:
    """Output features of a merged layer's projections over all ranks."""
    if not isinstance(layer, QKVParallelLinear):
        return layer.output_sizes
    heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
    widths = (layer.head_size, layer.head_size, getattr(layer, "v_head_size", layer.head_size))
    return [count * width for count, width in zip(heads, widths, strict=True)]


def _given(shard_id) -> tuple:
    return () if shard_id is None else (shard_id,)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    # vLLM's collectives do not support float64; a gather only moves bits.
    sent = tensor.contiguous().view(torch.float32) if tensor.dtype == torch.float64 else tensor.contiguous()
    return tensor_model_parallel_all_gather(sent.unsqueeze(0), dim=0).view(tensor.dtype)


def _check_interface() -> None:
    """Raise an error if the classes above do not implement all of vLLM's interface, or if it lacks what they use."""
    wanted = list(inspect.signature(LinearMethodBase.create_weights).parameters)
    known = list(inspect.signature(NMActLinearMethod.create_weights).parameters)
    if wanted != known:
        raise TypeError(f"create_weights takes {', '.join(wanted)}")
    missing = NMActVLLMConfig.__abstractmethods__ | NMActLinearMethod.__abstractmethods__
    if missing:
        raise TypeError(f"new abstract methods {', '.join(sorted(missing))}")
    check_interface()


_check_interface()
register_weight_loader_v2_supported_method(NMActLinearMethod)
register_quantization_config("nm_act")(NMActVLLMConfig)
