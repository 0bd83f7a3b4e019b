"""The plug-in's layers over a stand-in for vLLM: e4m3 weights, what is refused, reload; and the stand-in itself."""

import inspect
import json

import pytest
import torch
import vllm_standin
from conftest import needs

import nm_act
from nm_act import LinearSpec, Recipe
from nm_act.integrations.vllm_operands import Storage
from nm_act.optimize import FP8Linear

FEATURES = 64


@pytest.fixture
def plugin():
    with vllm_standin.plugin() as module:
        yield module


def served(plugin, recipe, dtype=torch.float32, **fields):
    config = plugin.NMActVLLMConfig.from_config({"recipe": recipe.to_dict(), **fields})
    return config, vllm_standin.layers(config, FEATURES, dtype, "cpu")


def own(layer, spec, fp8, seed, *, merged):
    """nm_act's own layers with the same weights."""
    parts, made = vllm_standin.weights(layer, seed), []
    for part in [torch.cat(parts)] if merged else parts:
        dense = torch.nn.Linear(FEATURES, part.shape[0], bias=False, device="meta")
        dense.weight = torch.nn.Parameter(part, requires_grad=False)
        sparse = nm_act.NMLinear.from_linear(dense, spec)
        made.append(sparse if fp8 is None else FP8Linear(sparse, fp8))
    return lambda x: torch.cat([each(x) for each in made], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("fp8", [None, "decode"])
@pytest.mark.parametrize(
    ("spec", "merged"),
    [
        (LinearSpec("8:16"), True),
        (LinearSpec("2:4", mitigation=["dpts-mean", "var"]), True),
        (LinearSpec("8:16", criterion="wina"), False),
        (LinearSpec("2:4+1"), True),
    ],
    ids=str,
)
def test_layers_equal_our_own_after_a_reload_too(plugin, fp8, spec, merged):
    recipe = Recipe(str(spec.pattern), criterion=spec.criterion, mitigation=spec.mitigation)
    config, layers = served(plugin, recipe, **({} if fp8 is None else {"fp8": fp8}))
    assert config.storage.e4m3 == (0 if fp8 is None else 3)
    addresses = None
    for seed in (0, 1):
        for name, layer in layers.items():
            layer.load(vllm_standin.weights(layer, seed))
            for tokens in (1, 4, 9):
                x = torch.randn(tokens, FEATURES)
                torch.testing.assert_close(layer(x), own(layer, spec, fp8, seed, merged=merged)(x), msg=name)
        now = [
            each.data_ptr() for layer in layers.values() for each in (layer.weight, *layer.nm_act_operands.tensors())
        ]
        assert addresses in (None, now)
        addresses = now


def test_e4m3_weights_take_half_of_the_bytes(plugin):
    _, layers = served(plugin, Recipe("8:16"), torch.bfloat16, fp8="decode")
    for layer in layers.values():
        layer.load(vllm_standin.weights(layer, 0))
        held = sum(each.nbytes for each in (layer.weight, *layer.nm_act_operands.tensors()))
        assert held == layer.input_size * layer.output_size + 4 * layer.output_size


@torch.no_grad()
def test_dense_projections_of_a_merged_layer_stay_in_16_bits(plugin):
    rules = [nm_act.Rule(projections=["up_proj"], pattern="dense")]
    config, layers = served(plugin, Recipe("8:16", rules=rules), fp8="decode")
    layer, x = layers["gate_up_proj"], torch.randn(5, FEATURES)
    layer.load(vllm_standin.weights(layer, 0))
    gate, up = vllm_standin.weights(layer, 0)
    assert torch.equal(layer(x)[:, FEATURES:], x @ up.t())
    assert not torch.equal(layer(x)[:, :FEATURES], nm_act.sparse_linear(x, gate, None, "8:16"))
    assert config.storage.sentence() == '; 3 of them have e4m3 weights (fp8="decode")'


def test_what_cannot_be_e4m3_stays_in_16_bits_and_is_said(plugin):
    rules = [nm_act.Rule(projections=["down_proj"], mitigation=["spts"])]
    config, _ = served(plugin, Recipe("8:16", rules=rules), fp8="decode")
    assert config.storage.sentence() == (
        '; 2 of them have e4m3 weights (fp8="decode"), 1 stay in 16 bits (model.layers.0.mlp.down_proj: '
        f"{LinearSpec('8:16', mitigation=['spts'])})"
    )
    config, layers = served(plugin, Recipe("8:16", mitigation=["spts"]), fp8="decode")
    layer = layers["down_proj"]
    with pytest.raises(ValueError, match=r'whose weights can be e4m3 for fp8="decode", got none \(model\.layers\.0'):
        layer.load(vllm_standin.weights(layer, 0))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"fp8": "e5m2"}, "expected fp8 among prefill, decode, both, got 'e5m2'; choose one of those"),
        ({"fp8": True}, "expected fp8 among prefill, decode, both, got True; choose one of those"),
        ({"fp8": "decode", "prepack": True}, "expected prepack or fp8 in quantization_config, got both"),
        ({"fp8": "both"}, 'expected a GPU of compute capability 9.0 .* for fp8="both", got cpu; choose fp8="decode"'),
        ({"fp88": "both"}, "among quant_method, recipe, prepack, fp8, got 'fp88'; remove it, or upgrade nm_act"),
        ({"prepack": "yes"}, "expected prepack as true or false in quantization_config, got 'yes'"),
    ],
    ids=str,
)
def test_what_is_refused(plugin, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        plugin.NMActVLLMConfig.from_config({"recipe": Recipe("8:16").to_dict(), **fields})


@pytest.mark.parametrize("place", [["quantization_config"], ["text_config", "quantization_config"]], ids="/".join)
def test_a_second_quantisation_is_refused(plugin, tmp_path, place):
    def write(method):
        entry = {"quant_method": method}
        for key in reversed(place):
            entry = {key: entry}
        (tmp_path / "config.json").write_text(json.dumps(entry))

    config = plugin.NMActVLLMConfig(Recipe("8:16"))
    write("nm_act")
    config.maybe_update_config(str(tmp_path))
    config.maybe_update_config(str(tmp_path / "nowhere"))
    write("fp8")
    with pytest.raises(ValueError, match=r"expected a dense checkpoint for the quantization nm_act, got .* as 'fp8'"):
        config.maybe_update_config(str(tmp_path), hf_config=None, revision=None)


def test_cards():
    Storage(fp8="both").check_device("cuda", (9, 0))
    Storage(fp8="decode").check_device("cuda", (8, 0))
    for capability in ((8, 0), (12, 0)):
        with pytest.raises(ValueError, match=f"got cuda with {capability[0]}.0; choose"):
            Storage(fp8="prefill").check_device("cuda", capability)


@pytest.mark.parametrize(
    ("spec", "dtype", "split", "why"),
    [
        (LinearSpec("8:16"), torch.bfloat16, False, ""),
        (LinearSpec("8:16"), torch.bfloat16, True, ""),
        (LinearSpec("2:4"), torch.float16, False, ""),
        (LinearSpec("8:16"), torch.float16, False, "8:16 in float16"),
        (LinearSpec("2:4"), torch.float32, False, "2:4 in float32"),
        (LinearSpec("2:4", mitigation=["var"]), torch.bfloat16, False, ""),
        (LinearSpec("2:4", mitigation=["var"]), torch.bfloat16, True, "statistics of the whole token"),
        (LinearSpec("8:16", criterion="wina"), torch.bfloat16, False, r"a channel scale \(wina\)"),
        (LinearSpec("2:4+1"), torch.bfloat16, False, "2:4+1"),
    ],
    ids=str,
)
def test_which_layers_have_e4m3_weights_on_tensor_cores(spec, dtype, split, why):
    storage, weight = Storage(fp8="both"), torch.empty(32, 64, dtype=dtype)
    assert storage.takes_e4m3("a", [spec, None], [16, 16], weight, split) == (not why)
    assert storage.e4m3 == (not why)
    if why:
        assert why.replace("\\", "") in storage.in_16_bits[0][1]


@torch.no_grad()
@pytest.mark.parametrize("storage", [{}, {"prepack": True}, {"fp8": "decode"}], ids=str)
@pytest.mark.parametrize("criterion", ["act", "wina"])
def test_one_graph_for_any_number_of_tokens_and_after_a_reload(plugin, criterion, storage):
    _, layers = served(plugin, Recipe("8:16", criterion=criterion), **storage)
    layer, graphs = layers["gate_up_proj"], []
    layer.load(vllm_standin.weights(layer, 0))
    torch._dynamo.reset()
    compiled = torch.compile(
        layer, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True
    )
    for seed in (0, 1):
        if seed:
            layer.load(vllm_standin.weights(layer, seed))
        for tokens in (9, 4, 2):
            x = torch.randn(tokens, FEATURES)
            assert torch.equal(compiled(x), layer(x)), (seed, tokens)
    assert len(graphs) == 1


@needs("vllm")
def test_the_stand_in_is_like_vllm():
    """What it imitates: abstract methods, and the arguments of what the plug-in calls and provides."""
    for path, contents in vllm_standin._MODULES.items():
        real = pytest.importorskip(path)
        for name, fake in contents.items():
            found = getattr(real, name)
            if inspect.isclass(fake) and hasattr(fake, "__abstractmethods__"):
                assert found.__abstractmethods__ == fake.__abstractmethods__, name
                for method in fake.__abstractmethods__:
                    theirs, ours = (list(inspect.signature(getattr(each, method)).parameters) for each in (found, fake))
                    assert theirs == ours, (name, method)
    from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, RowParallelLinear

    for kind in (MergedColumnParallelLinear, RowParallelLinear):
        theirs = list(inspect.signature(kind.weight_loader_v2).parameters)
        assert theirs == list(inspect.signature(vllm_standin.LinearBase.weight_loader_v2).parameters)[: len(theirs)]
    wanted = {"input_size", "output_size", "params_dtype", "quant_config", "prefix"}
    assert wanted <= set(inspect.signature(LinearBase).parameters)
