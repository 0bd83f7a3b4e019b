"""The vLLM plug-in, as far as it needs no vLLM: which layers are sparse, what is said and refused, its registration."""

import importlib
import logging
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nm_act import LinearSpec, Recipe, Rule, integrations
from nm_act.integrations import vllm as plugin
from nm_act.integrations import vllm_plan as plan
from nm_act.supported import supported

LLAMA = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


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
        ({"projections": ["gate_proj", "up_porj"]}, r"projections that the model has \(gate_proj, .*, v_proj\), got 'up_porj'"),
        ({"projections": ["q_proj", "gate_up_proj"]}, r"projections .* got 'gate_up_proj'; correct the recipe"),
        ({"skip_layers": [99]}, r"layers that the model has \(layers 0 to 0\), got 99; correct the recipe"),
        ({"rules": [Rule(layers=[1], pattern="dense")]}, "layers that the model has .* got 1; correct the recipe"),
    ],
    ids=["typo", "merged", "skipped layer", "layer of a rule"],
)  # fmt: skip
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
    # Importing it raises ImportError, even if an earlier test has.
    monkeypatch.setitem(sys.modules, "nm_act.integrations.vllm_linear", None)
    monkeypatch.delattr(integrations, "vllm_linear", raising=False)
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
    with pytest.raises(
        ImportError, match=r"expected vLLM, got none; install it with: pip install -e '\.\[vllm\]' in a checkout"
    ):
        importlib.import_module("nm_act.integrations.vllm_linear")


def test_entry_point_names_the_function():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"nm_act": f"{plugin.register.__module__}:{plugin.register.__name__}"}
