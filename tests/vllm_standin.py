"""A stand-in for the parts of vLLM that nm_act's plug-in imports, for machines without vLLM: one rank, no engine.

Its layers load, compute and reload as vLLM's do with one rank; test_vllm_standin.py compares them with vLLM's own where
that is installed.
"""

import contextlib
import importlib
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from nm_act import NMLinear, integrations
from nm_act.optimize import FP8Linear

PLUGIN, RELOAD = "nm_act.integrations.vllm_linear", "nm_act.integrations.vllm_reload"
LAYERWISE = SimpleNamespace(
    LAYERWISE_INFO={},
    LOADING_LAYERS=set(),
    _place_kernel_tensors=None,
    LayerReloadingInfo=SimpleNamespace(can_load=None, reset=None),
)
PLATFORM = SimpleNamespace(device_type="cpu", get_device_capability=lambda: None)


class Parameter(nn.Parameter):
    """vLLM's BasevLLMParameter, ModelWeightParameter and ChannelQuantScaleParameter, of which one rank uses this."""

    def __new__(cls, data, **_options):
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data, weight_loader, output_dim=0, input_dim=None):
        self.weight_loader, self.output_dim, self.input_dim = weight_loader, output_dim, input_dim


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...

    def process_weights_after_loading(self, layer):
        return None


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_parameter("weight", Parameter(data, weight_loader=extra_weight_attrs["weight_loader"]))

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """A layer of some projections over one input; ``shards`` are their names in vLLM's loader."""

    def __init__(self, input_size, output_sizes, shards, *, params_dtype, quant_config, prefix):
        super().__init__()
        self.input_size, self.output_sizes, self.shards, self.prefix = input_size, output_sizes, shards, prefix
        self.output_size, self.params_dtype, self.tp_size, self.tp_rank = sum(output_sizes), params_dtype, 1, 0
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self._create()

    def _create(self):
        sizes = (self.input_size, self.output_sizes, self.input_size, self.output_size, self.params_dtype)
        self.quant_method.create_weights(self, *sizes, weight_loader=self.weight_loader_v2)

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id=None):
        if loaded_shard_id is None:
            return param.data.copy_(loaded_weight)
        index = self.shards.index(loaded_shard_id)
        return param.data.split(self.output_sizes)[index].copy_(loaded_weight)

    def load(self, weights):
        """Weights of the projections, through the loaders, then what follows loading; a reload keeps addresses."""
        again = getattr(self, "loaded", False)
        if again:
            kept, device = self.weight, weights[0].device
            data = torch.empty(self.output_size, self.input_size, dtype=self.params_dtype, device=device)
            self.weight = Parameter(data, weight_loader=kept.weight_loader)
        for shard, weight in zip(self.shards, weights, strict=True):
            self.weight.weight_loader(self.weight, weight, *(() if shard is None else (shard,)))
        self.quant_method.process_weights_after_loading(self)
        if again:
            kept.data.copy_(self.weight.data)
            self.weight = kept
        self.loaded = True

    def forward(self, x, bias=None):
        return self.quant_method.apply(self, x, bias)


class QKVParallelLinear(LinearBase):
    def __init__(self, input_size, output_sizes, shards, **options):
        self.head_size = output_sizes[1]
        self.total_num_heads, self.total_num_kv_heads = output_sizes[0] // output_sizes[1], 1
        super().__init__(input_size, output_sizes, shards, **options)


class RowParallelLinear(LinearBase):
    pass


_MODULES = {
    "vllm": {"__version__": "stand-in", "_custom_ops": SimpleNamespace()},
    "vllm.distributed": {
        "get_pp_group": lambda: SimpleNamespace(world_size=1),
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
        "tensor_model_parallel_all_gather": lambda tensor, dim=-1: tensor,
    },
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "QKVParallelLinear": QKVParallelLinear,
        "RowParallelLinear": RowParallelLinear,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
        "register_weight_loader_v2_supported_method": lambda cls: cls,
    },
    "vllm.model_executor.layers.quantization": {"register_quantization_config": lambda name: lambda cls: cls},
    "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    "vllm.model_executor.model_loader": {},
    "vllm.model_executor.model_loader.reload": {"layerwise": LAYERWISE},
    "vllm.model_executor.parameter": {
        "BasevLLMParameter": Parameter,
        "ChannelQuantScaleParameter": Parameter,
        "ModelWeightParameter": Parameter,
    },
    "vllm.model_executor.utils": {
        "set_weight_attrs": lambda weight, attrs: [setattr(weight, *item) for item in (attrs or {}).items()]
    },
    "vllm.platforms": {"current_platform": PLATFORM},
}


@contextlib.contextmanager
def plugin():
    """The plug-in's module, imported over the stand-in."""
    kept = {name: sys.modules.pop(name, None) for name in (*_MODULES, PLUGIN, RELOAD)}
    for name, contents in _MODULES.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    try:
        yield importlib.import_module(PLUGIN)
    finally:
        for name in (PLUGIN, RELOAD):
            vars(integrations).pop(name.rpartition(".")[2], None)
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


LAYERS = {
    "qkv_proj": (QKVParallelLinear, ("q", "k", "v"), (4, 1, 1)),
    "gate_up_proj": (LinearBase, (0, 1), (4, 4)),
    "down_proj": (RowParallelLinear, (None,), (4,)),
}
"""Class, shards and sizes over a fourth of the input's."""


def layers(config, in_features, dtype, device):
    """One layer of each kind under vLLM's names."""
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    made = {}
    for name, (kind, shards, parts) in LAYERS.items():
        sizes = [part * in_features // 4 for part in parts]
        with torch.device(device):
            made[name] = kind(
                in_features,
                sizes,
                shards,
                params_dtype=dtype,
                quant_config=config,
                prefix=f"model.layers.0.{'self_attn' if name == 'qkv_proj' else 'mlp'}.{name}",
            )
    return made


def own(layer, spec, fp8, seed, *, merged):
    """What nm_act's own layers compute from the same weights: merged, or one for each of the layer's projections."""
    parts, made = weights(layer, seed), []
    for part in [torch.cat(parts)] if merged else parts:
        dense = nn.Linear(layer.input_size, part.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(part, requires_grad=False)
        sparse = NMLinear.from_linear(dense, spec)
        made.append(FP8Linear(sparse, fp8) if fp8 else sparse)
    return lambda x: torch.cat([each(x) for each in made], dim=-1)


def weights(layer, seed):
    """Random weights of a layer's projections."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, layer.input_size, generator=generator) / 16 for size in layer.output_sizes]
    return [each.to(layer.weight.device, layer.params_dtype) for each in made]
