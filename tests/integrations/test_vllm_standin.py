"""The plug-in's layers over a stand-in for vLLM: e4m3 weights, what is refused, reload; and the stand-in itself."""

import contextlib
import importlib
import inspect
import json
import sys
import types

import pytest
import torch
import vllm_standin
from conftest import failing, needs, needs_onednn

import nm_act
from nm_act import LinearSpec, Recipe
from nm_act.integrations.vllm_operands import Storage

FEATURES = 64
UP_IS_DENSE = nm_act.Rule(projections=["up_proj"], pattern="dense")


@pytest.fixture
def plugin():
    with vllm_standin.plugin() as module:
        yield module


def served(plugin, recipe, dtype=torch.float32, **fields):
    config = plugin.NMActVLLMConfig.from_config({"recipe": recipe.to_dict(), **fields})
    return config, vllm_standin.layers(config, FEATURES, dtype, "cpu")


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
                torch.testing.assert_close(
                    layer(x), vllm_standin.own(layer, spec, fp8, seed, merged=merged)(x), msg=name
                )
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
    config, layers = served(plugin, Recipe("8:16", rules=[UP_IS_DENSE]), fp8="decode")
    layer, x = layers["gate_up_proj"], torch.randn(5, FEATURES)
    layer.load(vllm_standin.weights(layer, 0))
    gate, up = vllm_standin.weights(layer, 0)
    torch.testing.assert_close(layer(x)[:, FEATURES:], x @ up.t())  # e4m3 would be off by percents
    assert not torch.equal(layer(x)[:, :FEATURES], nm_act.sparse_linear(x, gate, None, "8:16"))
    assert config.storage.sentence() == '; 3 of the layers have e4m3 weights (fp8="decode")'


def _prepacked_copies(layer):
    """The copies in oneDNN's layout, and the bytes of those beside a weight [in, out]."""
    operands = layer.nm_act_operands
    kept = [weight if weight is not None else layer.weight for weight in operands.weights]
    sizes = [each.nbytes for each, copy in zip(kept, operands.copies, strict=True) if copy is not None]
    return [copy for copy in operands.copies if copy is not None], sum(sizes)


@torch.no_grad()
@needs_onednn
@pytest.mark.parametrize(
    ("recipe", "copies"),
    [
        (Recipe("8:16"), [1, 1, 1]),
        (Recipe("8:16", rules=[nm_act.Rule(projections=["k_proj", "v_proj", "up_proj"], pattern="dense")]), [2, 2, 1]),
        (Recipe("2:4", criterion="weight-magnitude"), [1, 1, 1]),
    ],
    ids=["sparse", "dense projections", "the weight is pruned"],
)
def test_prepack_counts_what_it_holds_and_multiplies_dense_projections_too(plugin, recipe, copies):
    """A dense projection has the copy alone, as vLLM's own dense layers; no [in, out] copy, none that counts."""
    config, layers = served(plugin, recipe, prepack=True)
    _, plain = served(plugin, recipe)
    held = 0
    for seed in (0, 1):
        held = 0
        for (name, layer), expected, count in zip(layers.items(), plain.values(), copies, strict=True):
            layer.load(vllm_standin.weights(layer, seed))
            expected.load(vllm_standin.weights(expected, seed))
            found, size = _prepacked_copies(layer)
            assert len(found) == count
            held += size
            for tokens in (1, 9):
                x = torch.randn(tokens, FEATURES)
                torch.testing.assert_close(layer(x), expected(x), msg=name)
    assert config.storage.prepacked_bytes == held
    assert config.storage.sentence() == f"; the second copies of prepack take {held / 2**20:.1f} MiB a rank"


def test_prepack_that_cannot_work_is_said(plugin, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    config, layers = served(plugin, Recipe("8:16"), torch.float16, prepack=True)
    for layer in layers.values():
        layer.load(vllm_standin.weights(layer, 0))
        assert layer.nm_act_operands.copies == [None]
    assert config.storage.sentence() == (
        "; the second copies of prepack take 0.0 MiB a rank, 3 have none (model.layers.0.self_attn.qkv_proj: oneDNN "
        "has no product in float16 on this processor)"
    )


@torch.no_grad()
@needs_onednn
def test_a_weight_that_vllms_product_does_not_take(plugin, monkeypatch):
    """vLLM's own dense layers call torch's product then."""
    fail = failing(RuntimeError("could not create a primitive descriptor for the matmul primitive"))
    monkeypatch.setattr(plugin._custom_ops, "create_onednn_mm", fail, raising=False)
    _, layers = served(plugin, Recipe("8:16"), prepack=True)
    layer, x = layers["down_proj"], torch.randn(9, FEATURES)
    layer.load(vllm_standin.weights(layer, 0))
    (copy,) = layer.nm_act_operands.copies
    assert copy.handler is None
    torch.testing.assert_close(layer(x), vllm_standin.own(layer, LinearSpec("8:16"), None, 0, merged=True)(x))


@pytest.mark.parametrize("name", ["_place_kernel_tensors", "LayerReloadingInfo.reset"])
def test_private_code_of_vllm_that_changed_is_noticed(plugin, monkeypatch, name):
    plugin._check_interface()
    monkeypatch.delattr(f"{vllm_standin.__name__}.LAYERWISE.{name}")
    with pytest.raises(AttributeError, match=name.rpartition(".")[2]):
        plugin._check_interface()


def test_a_worker_without_reloads_is_left_as_it_is(plugin, monkeypatch):
    from nm_act.integrations import vllm_reload

    worker = types.SimpleNamespace(Worker=type("Worker", (), {}))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", worker)
    vllm_reload.guard_reloads()
    assert not hasattr(worker.Worker, "reload_weights")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "of other sizes"),
        (
            ValueError("There is no module or parameter named 'layers.2'\nin LlamaModel. The available parameters are: {'a'}"),
            "There is no module or parameter named 'layers.2' in LlamaModel",
        ),
        (RuntimeError("expected calibrated data for q_proj in model.layers.0, got no shift; load a"), "expected calibrated data for q_proj in model.layers.0, got no shift; load a"),
        (KeyError(), "KeyError"),
    ],
    ids=["sizes", "names", "ours", "empty"],
)  # fmt: skip
def test_a_reload_that_fails_is_one_short_sentence(plugin, monkeypatch, error, reason):
    from nm_act.integrations import vllm_reload

    worker = type("Worker", (), {"reload_weights": failing(error)})
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", types.SimpleNamespace(Worker=worker))
    monkeypatch.setattr(vllm_reload, "undo_reload", lambda: 3)
    vllm_reload.guard_reloads()
    served = worker()
    served.vllm_config = types.SimpleNamespace(model_config=types.SimpleNamespace(model="a", revision=None))
    with pytest.raises(RuntimeError) as caught:
        served.reload_weights()
    assert str(caught.value) == (
        f"expected the weights of the model that is served, got others ({reason}); 3 layers have new weights and all "
        "others their old ones, so reload a whole checkpoint of this model"
    )


def test_what_cannot_be_e4m3_stays_in_16_bits_and_is_said(plugin):
    rules = [nm_act.Rule(projections=["down_proj"], mitigation=["spts"])]
    config, _ = served(plugin, Recipe("8:16", rules=rules), fp8="decode")
    assert config.storage.sentence() == (
        '; 2 of the layers have e4m3 weights (fp8="decode"), 1 stay in 16 bits (model.layers.0.mlp.down_proj: '
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


@pytest.mark.parametrize(("ranks", "refused"), [(1, True), (2, False)], ids=["whole model", "pipeline parallel"])
def test_a_recipe_that_names_what_the_model_does_not_have(plugin, monkeypatch, ranks, refused):
    """Known once the model is built; a rank of a pipeline has some of the layers only."""
    monkeypatch.setattr(plugin, "get_pp_group", lambda: types.SimpleNamespace(world_size=ranks))
    _, layers = served(plugin, Recipe("8:16", skip_layers=[99]))
    layer = layers["down_proj"]
    refusal = pytest.raises(ValueError, match=r"expected layers that the model has \(layers 0 to 0\), got 99; correct")
    with refusal if refused else contextlib.nullcontext():
        layer.load(vllm_standin.weights(layer, 0))


@pytest.mark.parametrize("place", [["quantization_config"], ["text_config", "quantization_config"]], ids="/".join)
def test_a_second_quantisation_is_refused(plugin, tmp_path, place):
    def write(entry, **beside):
        entry = {place[-1]: entry} | beside
        for key in place[:-1]:
            entry = {key: entry}
        (tmp_path / "config.json").write_text(json.dumps(entry))

    config = plugin.NMActVLLMConfig(Recipe("8:16"))
    write({"quant_method": "nm_act"})
    config.maybe_update_config(str(tmp_path))
    config.maybe_update_config(str(tmp_path / "nowhere"))
    other = {"quant_method": "compressed-tensors"}
    for entry, beside, method in (
        ({"quant_method": "fp8"}, {}, "fp8"),
        ({"quant_algo": "FP8"}, {"compression_config": other}, "FP8"),
        ({"producer": {"name": "modelopt"}}, {}, "an unnamed method"),
        ({}, {"compression_config": other}, "compressed-tensors"),
    ):
        write(entry, **beside)
        with pytest.raises(ValueError, match=f"a dense checkpoint for the quantization nm_act, got .* as '{method}'"):
            config.maybe_update_config(str(tmp_path), hf_config=None, revision=None)
    write({})
    config.maybe_update_config(str(tmp_path))
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}, "quantization": {}}')
    with pytest.raises(ValueError, match="got one that is quantised as 'an unnamed method'; serve the model"):
        config.maybe_update_config(str(tmp_path))


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
        assert why.replace("\\", "") in storage.kept[0][1]


@torch.no_grad()
@pytest.mark.parametrize("storage", [{}, {"prepack": True}, {"fp8": "decode"}], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"criterion": "wina"}, {"rules": [UP_IS_DENSE]}], ids=["act", "wina", "up dense"]
)
def test_one_graph_for_any_number_of_tokens_and_after_a_reload(plugin, fields, storage, graphs):
    _, layers = served(plugin, Recipe("8:16", **fields), **storage)
    layer = layers["gate_up_proj"]
    layer.load(vllm_standin.weights(layer, 0))
    compiled = torch.compile(layer, backend=graphs.backend, fullgraph=True, dynamic=True)
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
            found = getattr(real, name, None) or importlib.import_module(f"{path}.{name}")
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
