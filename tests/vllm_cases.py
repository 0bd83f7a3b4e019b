"""What each rank does in test_vllm.py: vLLM's own model, read by its own loader, against the Transformers model."""

import itertools
import json
import logging
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import tp_cases
from conftest import assert_same_bits

from nm_act import NMLinear
from nm_act.ops.prepack import why_not_prepacked
from nm_act.optimize import FP8Linear

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a layer's largest output


@torch.no_grad()
def layers(folders) -> None:
    """Every linear layer of vLLM's Llama, on the Transformers model's own inputs."""
    for folder, dtype in itertools.product(folders, TOLERANCES):
        model = _vllm_model(folder, dtype)
        whole = tp_cases.load(folder, dtype=dtype)
        inputs = tp_cases.inputs(whole)
        _compare_all(folder, model, whole, inputs)
        _column_layer(folder, model, whole, inputs)


@torch.no_grad()
def reloads(pairs) -> None:
    """New weights in a model that serves: its layers are those of the new checkpoint, at their old addresses."""
    for folder, other in pairs:
        model = _vllm_model(folder, torch.float32)
        addresses = _addresses(model)
        for new in (other, folder):
            _reload(model, new)
            whole = tp_cases.load(new, dtype=torch.float32)
            _compare_all(new, model, whole, tp_cases.inputs(whole))
            assert _addresses(model) == addresses


@torch.no_grad()
def prepacked(folder, other, recipe) -> None:
    """A copy of every weight for vLLM's own product: the same outputs, after a reload too, at the same addresses."""
    override = {"quantization_config": {"quant_method": "nm_act", "recipe": recipe, "prepack": True}}
    for dtype in (dtype for dtype in TOLERANCES if not why_not_prepacked(torch.empty(1, dtype=dtype))):
        records = []
        with mock.patch.object(logging.getLogger("vllm.nm_act"), "handle", records.append):
            model = _vllm_model(folder, dtype, hf_overrides=override)
        assert "; the second copies of prepack take " in records[0].getMessage()
        addresses, has_product = _addresses(model), hasattr(torch.ops._C, "create_onednn_mm_handler")
        for name, layer, parts, inputs in _layers_before_and_after_a_reload(model, folder, other, dtype):
            assert all((each.handler is not None) == has_product for each in layer.nm_act_operands.copies)
            for tokens in (1, 18):
                x = inputs.flatten(0, -2)[:tokens]
                expected = torch.cat([part(x) for part in parts], dim=-1)
                tolerance = TOLERANCES[dtype] * expected.abs().max().item()
                torch.testing.assert_close(
                    layer(x)[0], expected, rtol=0, atol=tolerance, msg=f"{name} {dtype} {tokens}"
                )
        assert _addresses(model) == addresses


@torch.no_grad()
def e4m3(folder, other, recipe, expected) -> None:
    """e4m3 weights: the outputs of FP8Linear, after a reload too, at the same addresses; one line says how many."""
    records = []
    override = {"quantization_config": {"quant_method": "nm_act", "recipe": recipe, "fp8": "decode"}}
    with mock.patch.object(logging.getLogger("vllm.nm_act"), "handle", records.append):
        model = _vllm_model(folder, torch.float32, hf_overrides=override)
    if dist.get_rank() == 0:
        assert f"; {expected} of the layers have e4m3 weights" in records[0].getMessage()
    addresses = _addresses(model)
    for name, layer, parts, inputs in _layers_before_and_after_a_reload(model, folder, other):
        for tokens in (1, 18):
            _compare_e4m3(name, layer, parts, inputs, tokens)
    assert _addresses(model) == addresses


def _layers_before_and_after_a_reload(model, folder, other, dtype=torch.float32):
    """Each of the plug-in's layers with its name, Transformers' layers that it merges, and their input."""
    for new in (folder, other):
        if new is other:
            _reload(model, new)
        whole = tp_cases.load(new, dtype=dtype)
        inputs = tp_cases.inputs(whole)
        for name, layer in model.named_modules():
            if getattr(layer, "nm_act_operands", None) is None:
                continue
            parent, _, last = name.rpartition(".")
            parts = [f"{parent}.{each}" for each in MERGED.get(last, (last,))]
            yield name, layer, [whole.get_submodule(part) for part in parts], inputs[parts[0]]


def _compare_e4m3(name, layer, parts, inputs, tokens) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    x = inputs.flatten(0, -2)[:tokens]
    if type(layer).__name__ == "RowParallelLinear":
        (part,) = parts
        slices = zip(part.weight.chunk(size, dim=1), x.chunk(size, dim=-1), strict=True)
        # Each rank quantises its own slice, or keeps 16 bits where its statistics cross ranks.
        stored = layer.nm_act_fp8 is not None
        expected = sum(_fp8(part, weight)(mine) for weight, mine in slices) + part.bias if stored else part(x)
        x = x.chunk(size, dim=-1)[rank].contiguous()
    else:
        expected = torch.cat([(_fp8(part, part.weight)(x) + part.bias).chunk(size, -1)[rank] for part in parts], -1)
    tolerance = TOLERANCES[x.dtype] * expected.abs().max().item()
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def _fp8(part, weight) -> FP8Linear:
    dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    return FP8Linear(NMLinear.from_linear(dense, part.spec), "decode")


@torch.no_grad()
def reloads_that_fail(calibrated, plain) -> None:
    """The loader of a layer that serves, a part of a layer, weights without their calibrated data."""
    from vllm.model_executor.model_loader.reload import layerwise

    from nm_act.integrations.vllm_reload import undo_reload

    with pytest.raises(RuntimeError, match=r"expected new weights of model\.layers\.0.* through vLLM's reload_weights"):
        _vllm_model(plain, torch.float32).load_weights(_weights(plain))
    model = _vllm_model(calibrated, torch.float32)
    whole = tp_cases.load(calibrated, dtype=torch.float32)
    weights = dict(_weights(calibrated))
    part = {name: value for name, value in weights.items() if "q_proj" in name or "layers" not in name}
    for given, sentence in (
        (part, r"expected the weights of q_proj, k_proj, v_proj in .*, got none of k_proj, v_proj; load them together"),
        (dict(_weights(plain)), "expected calibrated data for .*_proj in .*, got no .*; load a checkpoint that"),
        ({name: value[:, :64] if value.ndim == 2 else value for name, value in weights.items()}, ""),
    ):
        with pytest.raises((RuntimeError, AssertionError), match=sentence):
            _load(model, given)
        assert undo_reload() is not None
        assert not any(info.can_load() for info in layerwise.LAYERWISE_INFO.values())
        assert not any(parameter.is_meta for parameter in model.parameters())
    _load(model, weights)
    _compare_all(calibrated, model, whole, tp_cases.inputs(whole))


def _load(model, weights) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import reload

    config = model.nm_act_test_config
    with set_current_vllm_config(config):  # as reload_weights of vLLM's model runner does
        reload.initialize_layerwise_reload(model)
        model.load_weights(iter(weights.items()))
        reload.finalize_layerwise_reload(model, config.model_config)


def _reload(model, folder) -> None:
    _load(model, dict(_weights(folder)))


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").items()


def _addresses(model) -> dict[str, list[int]]:
    """Where each sparse layer's tensors are."""
    found = {}
    for name, layer in model.named_modules():
        operands = getattr(layer, "nm_act_operands", None)
        if operands is not None:
            handlers = [each.copy for each in operands.copies if getattr(each, "handler", None) is not None]
            found[name] = [tensor.data_ptr() for tensor in (layer.weight, *operands.tensors(), *handlers)]
    return found


def _compare_all(folder, model, whole, inputs) -> None:
    seen = set()
    for name, layer in model.named_modules():
        if type(layer).__name__ in ("QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"):
            seen.add(type(layer).__name__)
            for tokens in (18, 1):
                _compare(f"{folder.name} {whole.dtype} {name} {tokens}", name, layer, whole, inputs, tokens)
    assert seen == {"QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"}


def loading_says(sparse, dense, uncalibrated) -> None:
    """One line about what is sparse; one sentence for a checkpoint whose mitigations were never calibrated."""
    expected = {
        sparse: (logging.INFO, "nm_act: 7 projections are sparse, 7 are dense, in 8 linear layers"),
        dense: (
            logging.WARNING,
            "got 8 others (such as model.layers.0.self_attn.qkv_proj), so the model is served dense",
        ),
    }
    for folder, (level, text) in expected.items():
        records = []
        with mock.patch.object(logging.getLogger("vllm.nm_act"), "handle", records.append):
            _vllm_model(folder, torch.float32)
        assert [(record.levelno, text in record.getMessage()) for record in records] == [(level, True)]
    with pytest.raises(ValueError, match=r"expected calibrated data for \w+_proj in .*, shift \[\d+\], got no values"):
        _vllm_model(uncalibrated, torch.float32)


def _compare(what, name, layer, whole, inputs, tokens) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    parent, _, last = name.rpartition(".")
    parts = [whole.get_submodule(f"{parent}.{each}") for each in MERGED.get(last, (last,))]
    x = inputs[f"{parent}.{MERGED.get(last, (last,))[0]}"].flatten(0, -2)[:tokens]
    assert type(layer.quant_method).__name__ == "NMActLinearMethod"
    by_row = type(layer).__name__ == "RowParallelLinear"
    got, selected = _selections(layer, layer, x.chunk(size, dim=-1)[rank].contiguous() if by_row else x)
    expected, wanted = zip(*(_selections(layer, part, x) for part in parts), strict=True)
    wanted = [pruned for each in wanted for pruned in each]
    assert len(wanted) == sum(not part.spec.scoring.prunes_weight for part in parts)
    if by_row:
        expected, wanted = expected[0], [pruned.chunk(size, dim=-1)[rank] for pruned in wanted]
    else:
        expected = torch.cat([each.chunk(size, dim=-1)[rank] for each in expected], dim=-1)
    if len(parts) > 1 and all(_reads_as(part, parts[0]) for part in parts):
        assert len(selected) <= 1, f"{what}: the input is compressed once"
        selected = selected * len(wanted)
    assert len(selected) == len(wanted)
    for pruned, theirs in zip(selected, wanted, strict=True):
        assert_same_bits(pruned, theirs, what=what)
    tolerance = TOLERANCES[x.dtype] * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


def _reads_as(one: NMLinear, other: NMLinear) -> bool:
    """Whether two projections of one input select alike, by nothing of their own."""
    return str(one.spec) == str(other.spec) and one.channel_scale is None and not one.data()


def _selections(vllm_layer, layer, x) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output of a layer and its pruned inputs, one for each product."""
    with tp_cases.selections() as pruned:
        output = layer(x)
    return output[0] if isinstance(output, tuple) else output, pruned


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
    assert layer.nm_act_load.__name__ == "weight_loader_v2"
    layer.weight.weight_loader(layer.weight, dense.weight.detach())  # waits for the data that comes after it
    for key, value in dense.data().items():
        getattr(layer, key).weight_loader(getattr(layer, key), value)
    layer.bias.weight_loader(layer.bias, dense.bias.detach())
    layer.quant_method.process_weights_after_loading(layer)
    expected = dense(inputs[name]).chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]
    tolerance = TOLERANCES[expected.dtype] * expected.abs().max().item()
    torch.testing.assert_close(layer(inputs[name])[0], expected, rtol=0, atol=tolerance)


def _vllm_model(folder, dtype, **options):
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    identity = [os.urandom(8).hex()]
    dist.broadcast_object_list(identity)
    os.environ["VLLM_DIST_IDENT"] = identity[0]  # names the shared memory of the ranks
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
        **options,
    )
    config = arguments.create_engine_config()  # this loads the plug-in through its entry point
    with set_current_vllm_config(config):
        if not model_parallel_is_initialized():
            init_distributed_environment(size, rank, "env://", rank, "gloo")
            initialize_model_parallel(size)
            dist.barrier()
            for left in Path("/dev/shm").glob(f"{identity[0]}-*"):  # mapped by now, and vLLM does not remove it
                left.unlink(missing_ok=True)
        with mock.patch.object(torch.accelerator, "empty_cache"):  # vLLM's CPU worker does the same
            model = get_model(vllm_config=config)
    model.nm_act_test_config = config
    return model


if __name__ == "__main__":  # vLLM's ranks import this file again
    import sys

    from vllm import LLM, SamplingParams

    folder, size, mode, overrides = sys.argv[1:]
    arguments = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "skip_tokenizer_init": True}
    arguments["hf_overrides"] = json.loads(overrides)
    llm = LLM(folder, tensor_parallel_size=int(size), enforce_eager=mode == "eager", **arguments)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [5, 7, 11, 13]}], sampling)
    print("generated", list(output.outputs[0].token_ids))
