"""What each rank does in test_tensor_parallel.py: a tiny Llama split by Transformers, against the whole one."""

import contextlib
import functools
import importlib.metadata
import re
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401  (once, for all ranks)
from conftest import assert_same_bits

from nm_act import NMLinear, NMPattern, Recipe, ops, optimize, parallel, sparsify
from nm_act.ops import composed

SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_bias": True,  # o_proj and down_proj are row-parallel: a bias added on every rank would show
    "mlp_bias": True,
}


def build(seed: int = 0):
    """A dense Llama with biases; the initial 0.02 would make all logits nearly equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for parameter in model.parameters():
        if parameter.ndim == 2 or parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def save(folder: Path, recipe: Recipe, *, calibrated: bool = True, dense=None, seed: int = 0) -> Path:
    """Write the sparse model, with arbitrary calibrated data where its recipe needs some."""
    model = sparsify(dense or build(seed), recipe).model
    generator = torch.Generator().manual_seed(3 + seed)
    for layer in model.modules():
        if calibrated and isinstance(layer, NMLinear) and layer.data():
            layer.set_data(**{name: _arbitrary(name, value.shape, generator) for name, value in layer.data().items()})
    model.save_pretrained(folder)
    return folder


def _arbitrary(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Data of the kind that calibration gives, large enough for every piece of it to show."""
    value = torch.randn(shape, generator=generator) * 0.3
    if name == "rotation":
        return torch.linalg.qr(value).Q
    if name == "input_order":  # what it did is in the weights
        return torch.arange(*shape, dtype=torch.float32)
    return value.abs() + 0.2 if name in ("smoothing", "input_norm", "column_scale") else value


def load(folder, **arguments):
    """The model of a folder; ``tp_plan="auto"`` splits it over the ranks."""
    from transformers import AutoModelForCausalLM

    if "tp_plan" in arguments and _transformers() >= (5, 18):  # the plain argument is deprecated since
        from transformers.distributed import DistributedConfig

        arguments["distributed_config"] = DistributedConfig(tp_plan=arguments.pop("tp_plan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def _transformers() -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])


def ids(tokens: int = 9) -> torch.Tensor:
    """Two sequences."""
    return torch.randint(2, 128, (2, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def every_layer_and_the_model(folders: list[Path], layout: str, dtype: torch.dtype) -> None:
    """Each layer, on the whole model's own inputs, selects the same bits; layers and logits agree to rounding."""
    with _layout(layout):
        for folder in folders:
            whole, split = load(folder, dtype=dtype), load(folder, dtype=dtype, tp_plan="auto")
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # of the layer's largest output
            seen = inputs(whole)
            kinds = set()
            for name, layer in split.named_modules():
                if isinstance(layer, NMLinear):
                    kinds.add(layer.shard.kind)
                    style = split.tp_plan[re.sub(r"\.\d+\.", ".*.", name)]
                    cut = style in ("colwise", "rowwise")
                    _compare(f"{folder.name} {name}", layer, whole.get_submodule(name), seen[name], tolerance, cut=cut)
            assert kinds == {"column", "row"}, folder.name
            if dtype == torch.float32:
                # Another order of the sums between layers may turn a near tie, so the bound is on the whole.
                expected, got = whole(ids()).logits, split(ids()).logits
                assert (got - expected).norm() < 1e-3 * expected.norm(), folder.name
                tokens = [model.generate(ids(), max_new_tokens=4, do_sample=False) for model in (whole, split)]
                assert torch.equal(*tokens), folder.name


def _compare(name, split, whole, x, tolerance, *, cut=True) -> None:
    """Without ``cut`` the plan's style cuts the inputs and puts the outputs together itself."""
    shard = split.shard
    assert split.weight.to_local().t().is_contiguous() == (split.weight_layout == "in_out")
    expected, selected = _record(whole, x)
    got, part = _record(split, shard.part(x, ("batch", "tokens", "in")) if cut else x)
    assert bool(part) == (not split.spec.scoring.prunes_weight), f"{name}: something selects, unless it is dense"
    for mine, all_of_it in zip(part, selected, strict=True):
        assert_same_bits(mine, shard.part(all_of_it, ("tokens", "in")), what=name)
    if whole.operand_weight is not None:
        assert_same_bits(split.operand_weight, shard.part(whole.operand_weight, ("out", "in")), what=name)
    # A row-parallel layer's outputs are summed already, and whole.
    expected = expected if shard.kind == "row" or not cut else shard.part(expected, ("batch", "tokens", "out"))
    atol = tolerance * expected.abs().max().item()
    # Under autocast Transformers adds a row-parallel layer's bias to the sum as it is stored, in float32.
    got = got.to(expected.dtype) if torch.is_autocast_enabled("cpu") else got
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


def _record(layer, x) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layer's output, and its pruned input, of all calls of the operator (clact makes one a sequence)."""
    with selections() as pruned:
        y = layer(x)
    return y, [part.reshape(-1, part.shape[-1]) for part in pruned]


@contextlib.contextmanager
def selections():
    """Inside, the operator and the composed one add the pruned input of each call to the list."""
    pruned, real, real_select = [], torch.ops.nm_act.sparse_linear, composed.select

    def spy(x, weight, bias, n, m, **options):
        selection = {key: options[key] for key in ("channel_scale", "shift", "token_shift") if key in options}
        pruned.append(ops.prune(x, NMPattern(n, m, options.get("extra_columns", ())), **selection))
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # vLLM's parameters would look the operator up again, and find this
            return real(x, weight, bias, n, m, **options)

    def spy_select(*arguments):
        pruned.append(real_select(*arguments))
        return pruned[-1]

    with mock.patch.object(torch.ops.nm_act, "sparse_linear", spy), mock.patch.object(composed, "select", spy_select):
        yield pruned


def inputs(model) -> dict[str, torch.Tensor]:
    """What each sparse layer sees when the model reads :func:`ids`."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
        for name, module in model.named_modules()
        if isinstance(module, NMLinear)
    ]
    model(ids())
    for hook in hooks:
        hook.remove()
    return seen


@contextlib.contextmanager
def _layout(layout: str):
    """Models made inside store their weights this way."""
    make = functools.partial(NMLinear.from_linear, weight_layout=layout)
    with mock.patch.object(NMLinear, "from_linear", make):
        yield


@torch.no_grad()
def save_and_load(folder: Path, out: Path) -> None:
    """What a split model saves is the stock checkpoint, whole and split again."""
    split = load(folder, tp_plan="auto")
    expected = split(ids()).logits
    split.save_pretrained(out)
    dist.barrier()
    assert torch.equal(load(out, tp_plan="auto")(ids()).logits, expected)
    assert (load(out)(ids()).logits - expected).norm() < 1e-3 * expected.norm()


def gradients_enabled(folder: Path) -> None:
    """Without torch.no_grad Transformers takes another path to the layers."""
    split = load(folder, tp_plan="auto")
    with torch.no_grad():
        expected = split(ids()).logits
    assert torch.equal(split(ids()).logits.detach(), expected)


def one_sentence(folder: Path, sentence: str, distributed: dict | None = None) -> None:
    """Loading stops with this error on every rank; ``distributed`` are fields of Transformers' DistributedConfig."""
    from transformers.distributed import DistributedConfig

    plan = {"distributed_config": DistributedConfig(**distributed)} if distributed else {"tp_plan": "auto"}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load(folder, **plan)


@torch.no_grad()
def pipeline(folder: Path) -> None:
    """Each rank holds some whole layers, which is none of ours to split."""
    from transformers.distributed import DistributedConfig

    whole, mine = load(folder), load(folder, distributed_config=DistributedConfig(pp_size=dist.get_world_size()))
    layers = [each for each in mine.modules() if isinstance(each, NMLinear) and not each.weight.is_meta]
    assert len(layers) == sum(isinstance(each, NMLinear) for each in whole.modules()) / dist.get_world_size()
    assert all(layer.shard is None for layer in layers)
    tokens = [model.generate(ids(), max_new_tokens=4, do_sample=False) for model in (whole, mine)]
    assert torch.equal(*tokens)


@torch.no_grad()
def optimize_changes_nothing(folder: Path) -> None:
    """No layer of a split model is merged, stored in e4m3 or fused."""
    split = load(folder, tp_plan="auto")
    expected = split(ids()).logits
    report = optimize(split, fp8="decode")
    assert (report.merged, report.fp8, report.fused) == ([], [], [])
    assert {why.removeprefix("stays in 16 bits: ") for _, why in report.kept} == {"its weight is split over ranks"}
    assert torch.equal(split(ids()).logits, expected)


def refuses_a_split_model(folder: Path) -> None:
    """sparsify() comes too late for a model that is split already."""
    model = load(folder, tp_plan="auto")
    with pytest.raises(ValueError, match=r"got one whose model\.layers\.0\.self_attn\.q_proj is split over 2 ranks; "):
        sparsify(model, Recipe("8:16"))


@torch.no_grad()
def under_autocast(folder: Path) -> None:
    """Float32 weights, bfloat16 products: layer by layer what one process gives."""
    whole, split = load(folder), load(folder, tp_plan="auto")
    with torch.autocast("cpu", torch.bfloat16):
        seen = inputs(whole)
        for name, layer in split.named_modules():
            if isinstance(layer, NMLinear):
                _compare(name, layer, whole.get_submodule(name), seen[name], 2e-2)


@torch.no_grad()
def fully_sharded(recipe: Recipe) -> None:
    """FSDP2 puts the whole weight together for each call; it takes no weight that is stored [in, out]."""
    from torch.distributed.fsdp import fully_shard

    def sharded(layout):
        with _layout(layout):
            model = sparsify(build(), recipe).model
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(NotImplementedError, match="FSDP does not support non-contiguous parameters"):
        sharded("in_out")
    model = sharded("out_in")
    assert not model.model.layers[0].mlp.up_proj.weight.placements[0].is_replicate()
    expected = sparsify(build(), recipe).model(ids()).logits
    assert (model(ids()).logits - expected).norm() < 1e-3 * expected.norm()


@torch.no_grad()
def torch_styles(recipe: Recipe) -> None:
    """torch's own parallel styles hand a layer DTensors, which its operator does not take: one sentence."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for name, style in (("up_proj", ColwiseParallel()), ("down_proj", RowwiseParallel())):
        model = sparsify(build(), recipe).model
        parallelize_module(model.model.layers[0].mlp, mesh, {name: style})
        with pytest.raises(
            NotImplementedError, match=r"expected a plain tensor .*, got a DTensor, .* tp_plan instead$"
        ):
            model(ids())


def split_twice() -> None:
    """A weight that is split over both dimensions of a mesh, as tensor parallelism over FSDP makes it."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(), 1))
    weight = distribute_tensor(torch.zeros(8, 32), mesh, [Shard(0), Shard(1)])
    with pytest.raises(ValueError, match=r"expected a weight that is split over one mesh dimension, got placements \("):
        parallel.shard_of(weight)


def dies(rank: int) -> None:
    """One rank ends without a word, while the other waits for it."""
    import os

    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hangs() -> None:
    """One rank never comes."""
    import time

    if dist.get_rank() == 1:
        time.sleep(1000)
