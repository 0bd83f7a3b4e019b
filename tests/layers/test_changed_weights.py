"""Weights that change under a layer: whatever derives from one follows, by every way to change it, for every recipe."""

import copy
import pickle

import pytest
import torch
from conftest import needs
from tiny_families import family, logits, sparse, sparse_layers
from torch import nn
from weight_cases import SIZES, SPECS, X
from weight_cases import check_follows as _check
from weight_cases import dense_layer as _dense
from weight_cases import random_data as _data
from weight_cases import sparse_layer as _layer

from nm_act import NMLinear, Recipe, deoptimize, optimize, sparsify

OTHER = _dense(1).weight.detach() * 2


def _in_place(layer, weight):
    with torch.no_grad():
        layer.weight.copy_(weight)


def _data_in_place(layer, weight):
    layer.weight.data += weight - layer.weight.data


def _data_set(layer, weight):
    layer.weight.data = weight.clone()


def _data_of_parameters(layer, weight, tell=NMLinear.eval):
    next(iter(layer.parameters())).data.copy_(weight)
    tell(layer)


def _data_of_parameters_then_refresh(layer, weight):
    _data_of_parameters(layer, weight, NMLinear.refresh)


def _parameter(layer, weight):
    layer.weight = nn.Parameter(weight.clone())


def _optimizer(layer, weight):
    parameter = next(iter(layer.parameters()))
    parameter.grad = (parameter - weight).detach()
    torch.optim.SGD([parameter], lr=1.0).step()


def _set_module_tensor(layer, weight):
    utils = pytest.importorskip("accelerate.utils")
    utils.set_module_tensor_to_device(layer, "weight", "cpu", value=weight.clone())


WAYS = [_in_place, _data_in_place, _data_set, _data_of_parameters, _data_of_parameters_then_refresh]
WAYS += [_parameter, _optimizer, _set_module_tensor]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_changed_weight_is_followed(name, change, layout):
    layer, weight = _layer(name, _dense(0), layout), OTHER
    with torch.no_grad():
        layer(X)
    change(layer, weight)
    _check(layer, weight, name)


@pytest.mark.parametrize("name", SPECS)
def test_a_copy_of_a_changed_layer_follows_too(name):
    layer, weight = _layer(name, _dense(0)), OTHER
    layer.weight.data += weight - layer.weight.data
    for each in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        _check(each, weight, name)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_functional_call(name, kind):
    """The lent weight's own data, for that call; the layer is as before afterwards."""
    layer, weight = _layer(name, _dense(0)), OTHER
    dense = _dense(0)
    with torch.no_grad():
        before = layer(X)
        dense.weight.copy_(weight)
        lent = weight.clone() if kind is torch.Tensor else nn.Parameter(weight.clone())
        called = torch.func.functional_call(layer, {"weight": lent}, (X,))
        torch.testing.assert_close(called, _layer(name, dense)(X), rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(X), before)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_tied_layers_follow_each_others_writes(name, layout):
    layer, other = _layer(name, _dense(0), layout), _layer(name, _dense(0), layout)
    other.weight = layer.weight
    if name != "lifted":
        other.refresh()
        assert other.weight is layer.weight
    weight = OTHER
    with torch.no_grad():
        other(X)
        layer.weight.copy_(weight)
    _check(layer, weight, name)
    _check(other, weight, name)


@needs("peft")
@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_lora(name):
    """The adapter beside the sparse base; merged, a layer of the merged weight; unmerged, the first one again."""
    import peft

    base = nn.ModuleDict({"proj": _layer(name, _dense(0))})
    before = base["proj"](X)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"]))
    lora = model.base_model.model["proj"]
    torch.manual_seed(3)
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    b.normal_()
    torch.testing.assert_close(lora(X), before + X @ a.t() @ b.t() * 2, rtol=1e-4, atol=1e-4)
    merged = _dense(0).weight + 2 * b @ a
    for _ in range(2):
        model.merge_adapter()
        _check(lora, merged, name)
        model.unmerge_adapter()
        lora.merge()
        _check(lora, merged, name)
        lora.unmerge()
        with model.disable_adapter():
            torch.testing.assert_close(lora(X), before, rtol=1e-4, atol=1e-4)
    _check(model.merge_and_unload()["proj"], merged, name)


def test_derived_data_has_no_gradient_of_its_own():
    """wina: the scale chooses survivors only, so the gradient of a weight is that of the product with the mask."""
    layer = _layer("wina", _dense(0))
    layer(X).sum().backward()
    scores = X.abs() * _dense(0).weight.detach().square().sum(dim=0).sqrt()
    kept = scores.view(3, 5, 4, 16).topk(8, dim=-1).indices
    survivors = X.view(3, 5, 4, 16) * torch.zeros(3, 5, 4, 16).scatter(-1, kept, 1.0)
    expected = survivors.sum(dim=(0, 1)).flatten().expand(24, 64)  # the sum of survivors, for every output feature
    torch.testing.assert_close(layer._parameters["weight"].grad, expected, rtol=1e-5, atol=1e-5)
    assert not layer.channel_scale.requires_grad


def test_the_check_is_made_once():
    layer = _layer("wina", _dense(0))
    with torch.no_grad():
        layer(X)
        scale = layer.channel_scale
        assert layer.weight.shape == (24, 64)
        layer(X)
    assert layer.channel_scale is scale
    assert not layer._handed_out


@torch.no_grad()
def test_a_compiled_layer_follows():
    layer, weight = _layer("dpts-mean", _dense(0)), OTHER
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(X)
    layer.weight.data += weight - layer.weight.data
    expected = copy.deepcopy(layer)(X)
    torch.testing.assert_close(compiled(X), expected)


@torch.no_grad()
def test_a_compiled_layer_derives_anew_only_until_an_eager_call():
    layer = _layer("dpts-mean", _dense(0))
    nodes = []

    def backend(graph, _inputs):
        nodes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    assert repr(layer)
    torch.compile(layer, backend=backend, fullgraph=True)(X)
    assert layer.weight.shape == (24, 64)
    torch.compiler.reset()
    torch.compile(layer, backend=backend, fullgraph=True)(X)
    layer(X)
    torch.compiler.reset()
    torch.compile(layer, backend=backend, fullgraph=True)(X)
    assert nodes[0] == nodes[2] < nodes[1]


def test_calibrated_data_is_float32_under_another_default_dtype():
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer = NMLinear(64, 24, spec=SPECS["spts"])
        taken = NMLinear.from_linear(nn.Linear(64, 24), SPECS["spts"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.shift.dtype == taken.shift.dtype == torch.float32


@pytest.mark.parametrize("name", ["wina", "lifted", "rsparse-4"])
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_a_state_dict_goes_into_safetensors_as_it_is(name, layout, tmp_path):
    from safetensors.torch import load_file, save_file

    layer = _layer(name, _dense(0), layout)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert torch.equal(load_file(tmp_path / "layer.safetensors")["weight"], _dense(0).weight)


@needs("accelerate")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_offloaded_before_or_after_it_becomes_sparse(name, buffers, autocast):
    import accelerate

    dense = _dense(0)
    expected = _layer(name, dense)
    options = {"execution_device": "cpu", "offload_buffers": buffers}
    first = accelerate.cpu_offload(nn.Sequential(copy.deepcopy(dense)), **options)
    first[0] = NMLinear.from_linear(first[0], SPECS[name])
    first[0].set_data(**expected.data())
    after = accelerate.cpu_offload(nn.Sequential(copy.deepcopy(expected)), **options)
    for model in (first, after):
        assert model[0].weight.is_meta
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(2):
                torch.testing.assert_close(model(X), expected(X), rtol=1e-4, atol=1e-5)
        assert model[0].weight.is_meta


# ---- whole models ---------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("criterion", ["act", "wina", "weight-magnitude"])
def test_tied_layers_stay_tied(criterion):
    model = family()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    sparsify(model, Recipe("2:4", criterion=criterion))
    assert second.up_proj.weight is first.up_proj.weight
    model.double().float()
    assert second.up_proj.weight is first.up_proj.weight


@torch.no_grad()
@needs("accelerate")
@pytest.mark.parametrize("recipe", [Recipe("2:4"), Recipe("8:16", criterion="wina", mitigation=["dpts-mean"])], ids=str)
def test_a_model_that_is_offloaded_first(recipe):
    import accelerate

    model = family()
    expected = logits(sparsify(copy.deepcopy(model), recipe).model)
    accelerate.cpu_offload(model, execution_device="cpu")
    sparsify(model, recipe)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()


LOST_WRITES = [
    lambda w: w.add_(1),
    lambda w: w.data.mul_(2),
    lambda w: w.__setitem__(0, 1.0),
    lambda w: w.narrow(0, 0, 1).mul_(2),
    lambda w: w.t().flatten().mul_(2),
    lambda w: w.T.mul_(2),
    lambda w: w.unbind()[0].mul_(2),
    lambda w: w.t().contiguous().mul_(2),
    lambda w: torch.add(torch.ones_like(w), 1, out=w),
    lambda w: torch.mul(1, 2 * torch.ones(()), out=w[0, 0]),
    lambda w: w.set_(torch.ones_like(w)),
    lambda w: torch._foreach_mul_([w], 2),
    lambda w: torch.nn.functional.relu(w, inplace=True),
]

REFUSED = r"expected no write to the [\w ]+ of an optimized layer, got .*; call nm_act\.deoptimize\(model\)"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["e4m3", "part"])
def test_lost_writes_are_refused(kind):
    model = sparse(mitigation=["dpts-mean"])
    optimize(model, fp8="decode" if kind == "e4m3" else None)
    layer = model.model.layers[0].mlp.up_proj if kind == "part" else model.model.layers[0].mlp.down_proj
    before, delta = logits(model), torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.weight = nn.Parameter(delta)
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.weight.data = delta
    if kind == "e4m3":
        for write in LOST_WRITES:
            with pytest.raises(RuntimeError, match=REFUSED):
                write(layer.weight)
        with pytest.raises(RuntimeError, match=REFUSED):
            layer.weight.data += delta
        assert torch.equal(logits(model), before)
        assert type(layer.weight + 1) is torch.Tensor
        return
    with pytest.raises(RuntimeError, match=REFUSED):
        layer.weight.set_(delta)
    layer.weight.data += 0.5 * delta
    changed = logits(model)
    assert (changed - before).abs().max() > 0.01
    torch.testing.assert_close(logits(deoptimize(model)), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["wina", "weight-magnitude", "dpts-mean"])
@pytest.mark.parametrize("change", [_in_place, _data_in_place, _parameter, _set_module_tensor])
def test_a_weight_that_came_after_the_layer_is_followed(name, change):
    layer, weight = NMLinear(*SIZES, spec=SPECS[name], device="meta").eval(), OTHER
    layer.weight, layer.bias = _dense(0).weight, _dense(0).bias
    if layer.data():
        layer.set_data(**_data(layer))
    with torch.no_grad():
        layer(X)
    change(layer, weight)
    _check(layer, weight, name)


@needs("peft")
@pytest.mark.parametrize("criterion", ["wina", "weight-magnitude"])
@torch.no_grad()
def test_a_merged_model_is_one_of_the_merged_weights(criterion):
    import peft

    recipe, dense = Recipe("2:4", criterion=criterion, mitigation=["dpts-mean"] * (criterion == "wina")), family()
    model = sparsify(copy.deepcopy(dense), recipe).model
    before = logits(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    merged = model.merge_and_unload()
    dense.load_state_dict(merged.state_dict())
    expected = logits(sparsify(dense, recipe).model)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_write_to_the_bias_of_a_merged_layer_reaches_it_or_is_refused():
    model = family()
    for layer in model.model.layers:
        layer.mlp.up_proj.bias, layer.mlp.gate_proj.bias = nn.Parameter(torch.zeros(96)), nn.Parameter(torch.zeros(96))
    sparsify(model, Recipe("2:4"))
    optimize(model)
    before, bias = logits(model), model.model.layers[0].mlp.up_proj.bias
    with pytest.raises(RuntimeError, match=REFUSED):
        bias.data = torch.ones(96)
    assert torch.equal(logits(model), before)
    bias.data.add_(1)
    assert not torch.equal(logits(model), before)


@needs("peft")
def test_only_weights_with_two_owners_keep_their_layout():
    import peft

    model = family()
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    sparsify(model, Recipe("2:4"))
    layouts = {name: layer.weight_layout for name, layer in model.named_modules() if isinstance(layer, NMLinear)}
    assert {layout for name, layout in layouts.items() if "up_proj" in name} == {"out_in"}
    assert {layout for name, layout in layouts.items() if "up_proj" not in name} == {"in_out"}
    assert sum("base_layer" in name for name in layouts) == 4


@torch.no_grad()
def test_an_optimized_model_has_no_layer_left_to_check():
    model = sparse(criterion="wina")
    optimize(model)
    layers = sparse_layers(model)
    assert layers
    assert not any(layer._handed_out or layer._unchecked for layer in layers)
