"""The vLLM plug-in in vLLM: its layers, model and engine, and what they refuse."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import tp_cases
import vllm_cases
from conftest import needs
from ranks import run_ranks

from nm_act import LinearSpec, NMPattern, Recipe, Rule, optimize, sparse_linear

pytestmark = needs("vllm")

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


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_layers_equal_the_transformers_model(folders, size):
    run_ranks(vllm_cases.layers, list(folders.values()), size=size, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_reload(folders, tmp_path, size):
    others = {name: tp_cases.save(tmp_path / name, RECIPES[name], seed=1) for name in folders}
    run_ranks(vllm_cases.reloads, [(folders[name], others[name]) for name in folders], size=size, timeout=400)


def two_of(recipe, tmp_path):
    """Folders of two checkpoints with this recipe and other weights."""
    return [tp_cases.save(tmp_path / str(seed), recipe, seed=seed) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPACKED)
def test_prepacked_layers_equal_the_transformers_model(tmp_path, name):
    recipe = PREPACKED[name]
    run_ranks(vllm_cases.prepacked, *two_of(recipe, tmp_path), recipe.to_dict(), size=1, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "size", "expected"),
    [(RECIPES["act"], 1, 8), (RECIPES["act"], 2, 4), (Recipe("8:16"), 2, 8)],
    ids=["one rank", "statistics across ranks", "split by rows"],
)
def test_e4m3_layers_equal_fp8_linear(tmp_path, recipe, size, expected):
    """With two ranks the row-parallel ones keep 16 bits for dpts, which needs the whole token."""
    run_ranks(vllm_cases.e4m3, *two_of(recipe, tmp_path), recipe.to_dict(), expected, size=size, timeout=400)


@pytest.mark.slow
def test_reloads_that_fail_leave_a_model_that_serves(folders):
    run_ranks(vllm_cases.reloads_that_fail, folders["low-rank-pcs-lpts"], folders["act"], size=1, timeout=400)


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
        [sys.executable, vllm_cases.__file__, folders[name], str(size), mode, json.dumps(overrides)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert f"generated {tokens[4:]}" in run.stdout, run.stderr[-3000:]


@pytest.mark.slow
def test_what_loading_says(tmp_path):
    folders = (
        tp_cases.save(tmp_path / "sparse", Recipe("8:16", skip_layers=[0])),
        tp_cases.save(tmp_path / "dense", Recipe("8:16", skip_layers=[0, 1])),
        tp_cases.save(tmp_path / "uncalibrated", Recipe("8:16", mitigation=["spts"]), calibrated=False),
    )
    run_ranks(vllm_cases.loading_says, *folders, size=1, timeout=400)


def test_config_of_a_newer_version():
    from nm_act.integrations.vllm_linear import NMActVLLMConfig

    with pytest.raises(ValueError, match="expected recipe version 1, got 2; upgrade nm_act"):
        NMActVLLMConfig.from_config(json.loads('{"quant_method": "nm_act", "recipe": {"version": 2, "new": 1}}'))


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


def test_an_interface_that_differs_is_noticed(monkeypatch):
    from nm_act.integrations import vllm_linear

    monkeypatch.setattr(vllm_linear.LinearMethodBase, "create_weights", lambda self, layer, sizes: None)
    with pytest.raises(TypeError, match="create_weights takes self, layer, sizes"):
        vllm_linear._check_interface()
    monkeypatch.undo()
    monkeypatch.setattr(vllm_linear.NMActVLLMConfig, "__abstractmethods__", frozenset({"new_one", "another"}))
    with pytest.raises(TypeError, match=r"^new abstract methods another, new_one$"):
        vllm_linear._check_interface()


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
