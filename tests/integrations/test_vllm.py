"""The vLLM plug-in: its plan without vLLM; its layers, model and engine where vLLM is installed."""

import importlib
import json
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tp_cases
from conftest import needs
from ranks import run_ranks

from nm_act import LinearSpec, NMPattern, Recipe, Rule, optimize, sparse_linear
from nm_act.integrations import vllm as plugin
from nm_act.integrations import vllm_plan as plan
from nm_act.supported import supported

LLAMA = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
needs_vllm = needs("vllm")


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("model.layers.12.self_attn.qkv_proj", (12, "qkv_proj")),
        ("language_model.model.layers.0.mlp.down_proj", (0, "down_proj")),
        ("transformer.h.3.mlp.c_fc", (3, "c_fc")),
        ("llm.model.layers.2.mlp.gate_up_proj", (2, "gate_up_proj")),
        ("model.language_model.layers.4.self_attn.o_proj", (4, "o_proj")),
        ("thinker.model.layers.1.mlp.down_proj", (1, "down_proj")),
        ("transformer.encoder.layers.5.self_attention.dense", (5, "dense")),
        ("model.encoder.layers.5.self_attn.q_proj", None),
        ("model.audio_tower.layers.5.self_attn.q_proj", None),
        ("model.mtp.layers.0.mlp.down_proj", None),
        ("model.layers.3.mlp.experts.7.w1", None),  # a mixture's experts have a kernel of their own
        ("visual.blocks.3.attn.qkv", None),
        ("vision_tower.encoder.layers.2.mlp.up_proj", None),
        ("lm_head", None),
    ],
)
def test_place(prefix, expected):
    assert plan.place(prefix) == expected


def test_specs_of_merged_layers():
    recipe = Recipe("8:16", skip_layers=[0], rules=[Rule(projections=["up_proj"], pattern="dense")])
    name = "model.layers.{}.self_attn.qkv_proj"
    assert plan.specs_of(recipe, name.format(0), LLAMA, 64) == []
    assert [each for each, _ in plan.specs_of(recipe, name.format(1), LLAMA, 64)] == ["q_proj", "k_proj", "v_proj"]
    assert plan.specs_of(recipe, name.format(1), LLAMA, 72) == []  # as sparsify: 16 does not divide 72
    gate, up = plan.specs_of(recipe, "model.layers.1.mlp.gate_up_proj", LLAMA, 64)
    assert gate == ("gate_proj", LinearSpec("8:16"))
    assert up == ("up_proj", None)
    assert plan.specs_of(recipe, "lm_head", LLAMA, 64) == []


def _spans(specs, sizes, scales=None, data=None):
    found = plan.segments(specs, sizes, scales or [None] * len(specs), data or [{} for _ in specs])
    return [(each.start, each.stop, each.spec) for each in found]


def test_segments():
    act, other = LinearSpec("8:16"), LinearSpec("2:4")
    assert _spans([act, act, act], [8, 4, 4]) == [(0, 16, act)]
    assert _spans([act, None, None], [8, 4, 4]) == [(0, 8, act), (8, 16, None)]
    assert _spans([act, other], [8, 8]) == [(0, 8, act), (8, 16, other)]
    assert _spans([act, act], [8, 8], [torch.ones(4), torch.zeros(4)]) == [(0, 8, act), (8, 16, act)]


def test_segments_after_a_reload():
    """Their ends stay: what was apart stays apart, what was one product has to remain one."""
    specs, sizes, one, two = [LinearSpec("8:16")] * 2, [8, 8], torch.ones(4), torch.zeros(4)
    assert [each.stop for each in plan.segments(specs, sizes, [one, one], [{}, {}], [8, 16])] == [8, 16]
    assert [each.stop for each in plan.segments(specs, sizes, [one, one], [{}, {}], [16])] == [16]
    with pytest.raises(ValueError, match=r"before the reload \(1 products\), got different calibrated data \(2\)"):
        plan.segments(specs, sizes, [one, two], [{}, {}], [16])


def test_segments_with_data():
    """Data over the inputs has to be the same in a product, data over the outputs is put together."""
    spec, one, two = LinearSpec("8:16", mitigation=["spts", "ls"]), torch.ones(4), torch.zeros(4)
    data = [{"shift": shift, "column_scale": torch.full((8,), scale)} for shift, scale in ((one, 1.0), (one, 2.0))]
    (segment,) = plan.segments([spec, spec], [8, 8], [None, None], data)
    assert segment.data["column_scale"].tolist() == [1.0] * 8 + [2.0] * 8
    assert segment.data["shift"] is one
    assert _spans([spec, spec], [8, 8], data=[data[0], data[1] | {"shift": two}]) == [(0, 8, spec), (8, 16, spec)]


def _census(recipe, *prefixes):
    found = plan.Census()
    for prefix in prefixes:
        found.add(prefix, LLAMA, plan.specs_of(recipe, prefix, LLAMA, 64))
    return found


BLOCK = [f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")]


def test_what_is_said_after_loading():
    """Of a merged layer each projection counts."""
    recipe = Recipe("8:16", rules=[Rule(projections=["up_proj"], pattern="dense")])
    assert _census(recipe, *BLOCK, "visual.proj").sentence() == (
        logging.INFO,
        "nm_act: 5 projections are sparse, 2 are dense, in 4 linear layers",
    )
    level, text = _census(recipe, "visual.proj", "visual.out").sentence()
    assert level == logging.WARNING
    assert "got 2 others (such as visual.proj), so the model is served dense" in text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"projections": ["gate_proj", "up_porj"]},
            r"projections that the model has \(gate_proj, .*, v_proj\), got 'up_porj'",
        ),
        ({"projections": ["q_proj", "gate_up_proj"]}, r"projections .* got 'gate_up_proj'; correct the recipe"),
        ({"skip_layers": [99]}, r"layers that the model has \(layers 0 to 0\), got 99; correct the recipe"),
        ({"rules": [Rule(layers=[1], pattern="dense")]}, "layers that the model has .* got 1; correct the recipe"),
    ],
    ids=["typo", "merged", "skipped layer", "layer of a rule"],
)
def test_names_that_the_model_does_not_have(fields, sentence):
    recipe = Recipe("8:16", **fields)
    with pytest.raises(ValueError, match="expected " + sentence):
        _census(recipe, *BLOCK).check(recipe)


def test_names_that_are_not_known():
    """Those in a mixture's experts, and all names of a model whose layers are not found."""
    recipe = Recipe("8:16", projections=["q_proj", "w1"])
    found = _census(recipe, *BLOCK)
    found.add_other("model.layers.0.self_attn.attn")
    with pytest.raises(ValueError, match="got 'w1'"):
        found.check(recipe)
    found.add_other("model.layers.0.mlp.experts")
    found.check(recipe)
    _census(recipe, "visual.proj").check(recipe)


def test_what_a_server_cannot_follow():
    plan.check_servable(Recipe("8:16", mitigation=["var"]))
    for fields, sentence in (
        ({"phase": "prefill"}, "with phase both for vLLM, .* got phase prefill"),
        ({"rules": [Rule(layers=[0], phase="prefill")]}, "with phase both for vLLM, .* got phase prefill"),
        ({"dense_first_tokens": 4}, "with dense_first_tokens 0 for vLLM, .* got 4"),
        ({"criterion": "clact"}, "without clact and top-k for vLLM, got clact"),
        ({"rules": [Rule(pattern="50%")]}, "without clact and top-k for vLLM, got 50%"),
    ):
        with pytest.raises(ValueError, match=f"expected a recipe {sentence}; save"):
            plan.check_servable(Recipe("8:16", **fields))


@pytest.mark.parametrize(
    ("module", "version"), [(SimpleNamespace(__version__="9.1"), "9.1"), (None, "one without version")]
)
def test_another_interface_is_one_warning(monkeypatch, caplog, module, version):
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "nm_act.integrations.vllm_linear", None)  # importing it raises ImportError
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (record,) = caplog.records
    versions = supported("vllm")[0].versions
    assert record.message.startswith(f"nm_act expected the interface of vLLM {versions}, got {version} (")
    assert record.message.endswith(f"install vllm{versions} or another nm_act")
    assert "\n" not in record.message


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "nm_act.integrations.vllm_linear", raising=False)
    with pytest.raises(ImportError, match=r"expected vLLM, got none; install it with: pip install 'nm_act\[vllm\]'"):
        importlib.import_module("nm_act.integrations.vllm_linear")


def test_entry_point_names_the_function():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"nm_act": f"{plugin.register.__module__}:{plugin.register.__name__}"}


# ---- with the real vLLM ----

RECIPES = {
    "act": Recipe("2:4", mitigation=["dpts-mean"]),
    "mixed": Recipe(
        "8:16", criterion="wina", mitigation=["var"], rules=[Rule(projections=["v_proj", "up_proj"], pattern="2:4")]
    ),
    "amber-median": Recipe("4:8", criterion="amber", mitigation=["dpts-median", "var"]),
    "windows": Recipe("2:4+1", criterion="wina", mitigation=["dpts-mean"]),
    "spts-ls-var": Recipe("8:16", criterion="wina", mitigation=["spts", "ls", "var"]),
    "low-rank-pcs-lpts": Recipe("2:4", criterion="amber", mitigation=["rsparse-4", "pcs", "lpts"]),
    "rest": Recipe(
        "4:8",
        criterion="wanda",
        rules=[
            Rule(projections=["q_proj", "k_proj"], criterion="act", mitigation=["larosa", "ls"]),
            Rule(projections=["gate_proj"], criterion="wina", mitigation=["rsparse-4-fit", "ls", "permute"]),
            Rule(projections=["o_proj"], criterion="weight-magnitude"),
        ],
    ),
}

PREPACKED = {name: RECIPES[name] for name in ("act", "mixed", "low-rank-pcs-lpts")} | {
    "dense projections": Recipe("8:16", rules=[Rule(projections=["k_proj", "v_proj", "up_proj"], pattern="dense")]),
    "weight-magnitude": Recipe("8:16", criterion="weight-magnitude"),
}

ENGINE = ("act", "amber-median", "low-rank-pcs-lpts")
"""Those that the whole engine runs."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("vllm")
    return {name: tp_cases.save(place / name, recipe) for name, recipe in RECIPES.items()}


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_layers_equal_the_transformers_model(folders, size):
    import vllm_cases

    run_ranks(vllm_cases.layers, list(folders.values()), size=size, timeout=400)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_reload(folders, tmp_path, size):
    import vllm_cases

    others = {name: tp_cases.save(tmp_path / name, RECIPES[name], seed=1) for name in folders}
    run_ranks(vllm_cases.reloads, [(folders[name], others[name]) for name in folders], size=size, timeout=400)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", PREPACKED)
def test_prepacked_layers_equal_the_transformers_model(tmp_path, name):
    import vllm_cases

    recipe = PREPACKED[name]
    folder, other = (tp_cases.save(tmp_path / str(seed), recipe, seed=seed) for seed in (0, 1))
    run_ranks(vllm_cases.prepacked, folder, other, recipe.to_dict(), size=1, timeout=400)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("size", "expected"), [(1, 8), (2, 4)])
def test_e4m3_layers_equal_fp8_linear(folders, tmp_path, size, expected):
    """With two ranks the row-parallel ones keep 16 bits: dpts needs the whole token."""
    import vllm_cases

    recipe = RECIPES["act"]
    other = tp_cases.save(tmp_path / "other", recipe, seed=1)
    run_ranks(vllm_cases.e4m3, folders["act"], other, recipe.to_dict(), expected, size=size, timeout=400)


@needs_vllm
@pytest.mark.slow
def test_e4m3_layers_split_by_rows(tmp_path):
    import vllm_cases

    recipe = Recipe("8:16")
    folder, other = (tp_cases.save(tmp_path / str(seed), recipe, seed=seed) for seed in (0, 1))
    run_ranks(vllm_cases.e4m3, folder, other, recipe.to_dict(), 8, size=2, timeout=400)


@needs_vllm
@pytest.mark.slow
def test_reloads_that_fail_leave_a_model_that_serves(folders):
    import vllm_cases

    run_ranks(vllm_cases.reloads_that_fail, folders["low-rank-pcs-lpts"], folders["act"], size=1, timeout=400)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "mode", "fp8"),
    [
        *((name, size, "eager", None) for name in ENGINE for size in (1, 2)),
        ("amber-median", 2, "compiled", None),
        ("act", 1, "compiled", "decode"),
    ],
)
def test_the_engine_generates_what_transformers_does(name, size, mode, fp8, folders):
    """In float32, with no near tie: then the order of sums decides nothing. One rank, compiled: test_examples.py."""
    model, prompt = tp_cases.load(folders[name]), torch.tensor([[5, 7, 11, 13]])
    overrides = {}
    if fp8 is not None:
        optimize(model, fp8=fp8)
        quantization = {"quant_method": "nm_act", "recipe": RECIPES[name].to_dict(), "fp8": fp8}
        overrides = {"quantization_config": quantization}
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    with torch.no_grad():
        best = model(torch.tensor([tokens[:-1]])).logits[0, 3:].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3
    run = subprocess.run(
        [
            sys.executable,
            Path(__file__).parents[1] / "vllm_cases.py",
            folders[name],
            str(size),
            mode,
            json.dumps(overrides),
        ],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert f"generated {tokens[4:]}" in run.stdout, run.stderr[-3000:]


@needs_vllm
@pytest.mark.slow
def test_what_loading_says(tmp_path):
    import vllm_cases

    folders = (
        tp_cases.save(tmp_path / "sparse", Recipe("8:16", skip_layers=[0])),
        tp_cases.save(tmp_path / "dense", Recipe("8:16", skip_layers=[0, 1])),
        tp_cases.save(tmp_path / "uncalibrated", Recipe("8:16", mitigation=["spts"]), calibrated=False),
    )
    run_ranks(vllm_cases.loading_says, *folders, size=1, timeout=400)


@needs_vllm
def test_config_of_a_newer_version():
    from nm_act.integrations.vllm_linear import NMActVLLMConfig

    with pytest.raises(ValueError, match="expected recipe version 1, got 2; upgrade nm_act"):
        NMActVLLMConfig.from_config(json.loads('{"quant_method": "nm_act", "recipe": {"version": 2, "new": 1}}'))


@needs_vllm
@pytest.mark.parametrize(
    ("stored", "recipe", "arguments", "sentence"),
    [
        ({}, None, {"quantization": "nm_act"}, "expected a recipe for the quantization nm_act, got a checkpoint without one; serve it without .* --hf-overrides"),
        ({}, {"version": 1, "pattern": "8:16", "phase": "prefill"}, {}, "expected a recipe with phase both for vLLM, .* got phase prefill; save"),
        ({}, {"version": 2}, {}, "expected recipe version 1, got 2; upgrade nm_act"),
        ({}, {"version": 1, "pattern": "9:16", "criterion": "best"}, {}, "expected a criterion among .*, got 'best'"),
        ({}, {"version": 1, "pattern": "8:16"}, {"quantization": "fp8"}, r"nm_act\) does not match the quantization method specified .* \(fp8\)"),
        ({"quant_method": "fp8"}, {"version": 1, "pattern": "8:16"}, {}, "expected a dense checkpoint for .* nm_act, got one that is quantised as 'fp8'"),
        ({"producer": {"name": "modelopt"}}, {"version": 1, "pattern": "8:16"}, {}, "expected a dense checkpoint for .* quantised as 'an unnamed method'"),
    ],
    ids=["none", "not servable", "newer", "unknown criterion", "second quantisation", "quantised", "quantised, unnamed"],
)  # fmt: skip
def test_what_an_engine_does_not_start_with(tmp_path, monkeypatch, stored, recipe, arguments, sentence):
    """A dense checkpoint and --hf-overrides; vLLM wraps what is raised in an error of its own, with the sentence."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tp_cases.build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | ({"quantization_config": stored} if stored else {})))
    overrides = {} if recipe is None else {"quantization_config": {"quant_method": "nm_act", "recipe": recipe}}
    engine = EngineArgs(str(tmp_path), hf_overrides=overrides, skip_tokenizer_init=True, max_model_len=32, **arguments)
    with pytest.raises(ValueError, match=sentence):
        engine.create_engine_config()


@needs_vllm
def test_an_interface_that_differs_is_noticed(monkeypatch):
    from nm_act.integrations import vllm_linear

    monkeypatch.setattr(vllm_linear.LinearMethodBase, "create_weights", lambda self, layer, sizes: None)
    with pytest.raises(TypeError, match="create_weights takes self, layer, sizes"):
        vllm_linear._check_interface()
    monkeypatch.undo()
    monkeypatch.setattr(vllm_linear.NMActVLLMConfig, "__abstractmethods__", frozenset({"new_one", "another"}))
    with pytest.raises(TypeError, match=r"^new abstract methods another, new_one$"):
        vllm_linear._check_interface()


@needs_vllm
@torch.no_grad()
def test_a_strided_bias_of_vllms_product():
    """vLLM's kernel reads a bias as if it were contiguous; and only its own plug-in may pass an address."""
    from nm_act.integrations.vllm_linear import _prepacked
    from nm_act.integrations.vllm_packed import PackedCall, PackedPart

    if not hasattr(torch.ops._C, "create_onednn_mm_handler"):
        pytest.skip("this vLLM was built without oneDNN")
    weight, bias = torch.randn(48, 64).t().contiguous().t(), torch.randn(96)[::2]
    copy = _prepacked(weight)
    call = PackedCall([PackedPart(copy, 48, weight, pattern=NMPattern("8:16"))], weight.new_empty((0, 64)))
    for reloaded in (False, True):
        if reloaded:
            weight.mul_(-3)
            copy.take(_prepacked(weight))
            call.renew()
        for tokens in (1, 3, 9, 33):
            x = torch.randn(tokens, 64)
            expected = sparse_linear(x, weight, bias, "8:16")
            torch.testing.assert_close(call(x, None, bias), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expected prepacked_weight as oneDNN's layout of the weight"):
        torch.ops.nm_act.sparse_linear_prepacked(x, weight, copy.copy, bias, 8, 16)


def _method(spec, *names):
    from nm_act.integrations.vllm_linear import NMActLinearMethod

    return NMActLinearMethod([(name, spec) for name in names], lambda: None)


@needs_vllm
@pytest.mark.parametrize(
    ("spec", "names", "sizes", "sentence"),
    [
        (LinearSpec("2:4", mitigation=["larosa"]), ["o_proj"], (48, [64], 96, 64), r"expected a\.o_proj, whose in_features are split over ranks, without a"),
        (LinearSpec("16:32"), ["o_proj"], (48, [64], 96, 64), "expected a tensor-parallel size among 1, 3, got 2, which would cut the 96 in_features of a"),
        (LinearSpec("2:4"), ["q_proj", "k_proj"], (64, [64, 32, 32], 64, 128), r"expected 3 projections in a\.o_proj, got q_proj, k_proj; leave this layer "),
    ],
    ids=["rotation", "group", "other number of projections"],
)  # fmt: skip
def test_layers_that_cannot_be_split_or_told_apart(spec, names, sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        _method(spec, *names).create_weights(SimpleNamespace(prefix="a.o_proj"), *sizes, torch.float32)


@needs_vllm
@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (LinearSpec("2:4", mitigation=["spts"]), "calibrated data for up_proj in a.up_proj, got no shift; load "),
        (LinearSpec("2:4", criterion="wina"), "the weight of up_proj in a.up_proj from a checkpoint, from which the criterion 'wina' .*, got none"),
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_are_not_a_checkpoints(spec, sentence, monkeypatch):
    """vLLM's dummy weights, which its own loader never sees."""
    from vllm.model_executor import parameter

    for name, value in (("rank", 0), ("world_size", 1)):  # vLLM's group of one, without a group
        monkeypatch.setattr(parameter, f"get_tensor_model_parallel_{name}", lambda value=value: value)
    method = _method(spec, "up_proj")
    layer = torch.nn.Module()
    layer.prefix = "a.up_proj"
    method.create_weights(layer, 64, [32], 64, 32, torch.float32, weight_loader=lambda *_: None)
    with pytest.raises(RuntimeError, match="expected " + sentence):
        method.process_weights_after_loading(layer)
