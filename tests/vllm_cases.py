"""What each rank does in test_vllm.py: vLLM's own model, read by its own loader, against the Transformers model."""

import itertools
import os
from unittest import mock

import torch
import torch.distributed as dist
import tp_cases
from conftest import assert_same_bits

from nm_act import NMLinear, ops

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 5e-2, "atol": 1e-1}}


@torch.no_grad()
def layers(folders) -> None:
    """Every linear layer of vLLM's Llama, on the Transformers model's own inputs."""
    for folder, dtype in itertools.product(folders, TOLERANCES):
        model = _vllm_model(folder, dtype)
        whole = tp_cases.load(folder, dtype=dtype)
        inputs = tp_cases.inputs(whole)
        seen = set()
        for name, layer in model.named_modules():
            if type(layer).__name__ in ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"):
                seen.add(type(layer).__name__)
                for tokens in (18, 1):
                    _compare(f"{folder.name} {dtype} {name} {tokens}", name, layer, whole, inputs, tokens)
        assert seen == {"QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"}
        _column_layer(folder, model, whole, inputs)


def _compare(what, name, layer, whole, inputs, tokens) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    parent, _, last = name.rpartition(".")
    parts = [whole.get_submodule(f"{parent}.{each}") for each in MERGED.get(last, (last,))]
    x = inputs[f"{parent}.{MERGED.get(last, (last,))[0]}"].flatten(0, -2)[:tokens]
    assert type(layer.quant_method).__name__ == "NMActLinearMethod"
    if type(layer).__name__ == "RowParallelLinear":
        selections = _selections(layer, x.chunk(size, dim=-1)[rank].contiguous())
        got, expected = selections.pop("output"), parts[0](x)
        assert_same_bits(selections["pruned"][0], _pruned(parts[0], x).chunk(size, dim=-1)[rank], what=what)
    else:
        selections = _selections(layer, x)
        got = selections.pop("output")
        expected = torch.cat([part(x).chunk(size, dim=-1)[rank] for part in parts], dim=-1)
        alike = len({str(part.spec) for part in parts}) == 1 and parts[0].channel_scale is None
        assert len(selections["pruned"]) == (1 if alike else len(parts)), "the input is compressed once"
        for pruned, part in zip(selections["pruned"], parts, strict=False):
            assert_same_bits(pruned, _pruned(part, x), what=what)
    torch.testing.assert_close(got, expected, **TOLERANCES[x.dtype], msg=lambda text: f"{what}: {text}")


def _selections(layer, x) -> dict:
    pruned, real = [], ops.sparse_linear

    def spy(x, weight, bias, n, m, **options):
        pruned.append(_prune(x, n, m, options))
        return real(x, weight, bias, n, m, **options)

    if layer.nm_act_operator is real:
        layer.nm_act_operator = spy
    with mock.patch.object(ops, "sparse_linear", spy):
        output = layer(x)
    if layer.nm_act_operator is spy:
        layer.nm_act_operator = real
    return {"output": output[0] if isinstance(output, tuple) else output, "pruned": pruned}


def _prune(x, n, m, options):
    selection = {key: options.get(key) for key in ("channel_scale", "shift")}
    return ops.prune(x, n, m, token_shift=options.get("token_shift", "none"), **selection)


def _pruned(layer: NMLinear, x):
    pattern = layer.spec.pattern
    options = {"channel_scale": layer.channel_scale, "token_shift": layer.spec.token_shift}
    return _prune(x, pattern.keep, pattern.group, options)


def _column_layer(folder, model, whole, inputs) -> None:
    """A plain ColumnParallelLinear, which Llama has none of."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    name = "model.layers.0.mlp.up_proj"
    dense = whole.get_submodule(name)
    with set_current_vllm_config(model.nm_act_test_config):
        layer = ColumnParallelLinear(
            dense.in_features,
            dense.out_features,
            params_dtype=dense.weight.dtype,
            quant_config=model.nm_act_test_config.quant_config,
            prefix=name,
        )
    assert layer.weight.weight_loader.args[1].__name__ == "weight_loader_v2"
    layer.weight.weight_loader(layer.weight, dense.weight.detach())
    layer.bias.weight_loader(layer.bias, dense.bias.detach())
    layer.quant_method.process_weights_after_loading(layer)
    expected = dense(inputs[name]).chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
    torch.testing.assert_close(layer(inputs[name])[0], expected, **TOLERANCES[expected.dtype])


def _vllm_model(folder, dtype):
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_DIST_IDENT"] = str(os.getppid())  # names the shared memory; all ranks come from one server
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    size, rank = dist.get_world_size(), dist.get_rank()
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        enforce_eager=True,
        max_model_len=32,
        tensor_parallel_size=size,
        distributed_executor_backend="mp",
    )
    config = arguments.create_engine_config()  # this loads the plug-in through its entry point
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(size, rank, "env://", rank, "gloo")
            initialize_model_parallel(size)
        with mock.patch.object(torch.accelerator, "empty_cache"):  # vLLM's CPU worker does the same
            model = get_model(vllm_config=config)
    model.nm_act_test_config = config
    return model
