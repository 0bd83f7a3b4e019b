"""Predictions from the measured tables: against the whole models that were measured, and what was not measured."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model

from nm_act.lab import measured, tables
from nm_act.lab.cost import Place, Rates, cost_of, places_of, predictions, shapes_of
from nm_act.lab.measured import ALONE, InModel, Measured
from nm_act.lab.search.sensitivity import groups_of
from nm_act.lab.shapes import SHAPES
from nm_act.lab.tables import devices, load_tables
from nm_act.recipe import LinearSpec, Recipe, Rule

LLAMA = shapes_of("llama-3-8b")
BOTH = ("prefill", "decode")
ROOT = Path(__file__).resolve().parents[2]


MEASURED = [("llama-3-8b", "2:4", 512), ("llama-3-8b", "2:4", 4096), ("llama-3-8b", "2:4", 16384)]
MEASURED += [("llama-3-8b", "8:16", prompt) for prompt in (512, 4096, 16384)]
MEASURED += [("qwen2.5-7b", "2:4", 4096), ("gemma-3-4b", "2:4", 4096), ("gemma-3-4b", "8:16", 4096)]
MEASURED += [(model, "2:4/8:16-fp8", 4096) for model in ("llama-3-8b", "qwen2.5-7b", "gemma-3-4b")]


@pytest.mark.parametrize(("model", "mode", "prompt"), MEASURED)
@pytest.mark.parametrize("phase", BOTH)
def test_whole_models_are_predicted(model, mode, phase, prompt):
    """They are what two numbers a phase are fitted to."""
    pattern, _, decode = mode.removesuffix("-fp8").partition("/")
    dtype = "e4m3" if mode.endswith("fp8") else "bf16"
    cost = Measured("h100", shapes_of(model), model, dtype, (phase,), tokens=prompt, decode_prompt=prompt)
    recipe = Recipe(pattern, decode_pattern=decode or None)
    found = predictions(cost, places_of(model, SHAPES[model][0]), recipe)[phase]
    times = [cost.tables.whole(model, each, phase, prompt) for each in ("dense_bf16", f"nm-{mode}")]
    # Gemma's and Qwen's products were measured at 4284 tokens, and one dense product of Llama's at 16384 took longer than
    # in other tables (docs/search.md). Two numbers for three models leave 2.01 % in one row of decode.
    loose = {("llama-3-8b", "2:4", 16384), ("qwen2.5-7b", "2:4/8:16-fp8", 4096)}
    loose |= {("gemma-3-4b", "2:4", 4096), ("gemma-3-4b", "8:16", 4096)}
    tolerance = (0.035 if (model, mode, prompt) in loose else 0.025) if phase == "prefill" else 0.0205
    assert found == pytest.approx(times[0] / times[1], rel=tolerance)
    assert not cost.notes or model != "llama-3-8b"


@pytest.mark.parametrize(("model", "tolerance"), [("llama-3-8b", 0.045), ("qwen2.5-7b", 0.04), ("gemma-3-4b", 0.065)])
def test_models_that_the_fit_has_not_seen(model, tolerance):
    """Gemma's layers have four norms; without Llama, four prefills determine two numbers, one of them Qwen's in e4m3."""
    others = [other for other in ("llama-3-8b", "qwen2.5-7b", "gemma-3-4b") if other != model]
    for phase in BOTH:
        inside = measured._fit(measured._whole_models("h100", phase, others))
        for products, around, both, whole in measured._whole_models("h100", phase, [model]):
            predicted = whole - both + inside.products * products + inside.rest * around
            assert predicted == pytest.approx(whole, rel=tolerance)


@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
@pytest.mark.parametrize("model", SHAPES)
def test_prompts_and_models_that_were_not_measured(model, dtype):
    """No product takes less than half of its time alone, and what is taken over is part of the model's time."""
    recipe = Recipe("2:4", decode_pattern="8:16")
    for prompt in (128, 512, 2048, 4096, 65536):
        cost = Measured("h100", shapes_of(model), model, dtype, BOTH, tokens=prompt, decode_prompt=prompt)
        alone = replace(cost, in_model=ALONE, notes={})
        places = places_of(model, SHAPES[model][0])
        for phase, speedup in predictions(cost, places, recipe).items():
            spec = LinearSpec("2:4" if phase == "prefill" else "8:16")
            times = [[each.time(phase, place, spec, fused=True) for place in places[:7]] for each in (cost, alone)]
            assert all(inside >= own / 2 > 0 for inside, own in zip(*times, strict=True))
            # Of what a dense model spends around its products, no more than a third is taken over.
            assert speedup < 1.4 * predictions(alone, places, recipe)[phase]
    note = f"{model} was not measured whole with 65536 tokens"
    assert any(each.startswith((note, "no whole model")) for each in cost.notes)


def test_nothing_is_fitted_to_one_model():
    assert measured._fit([(1.0, 1.0, 1.5, 2.0)]) == InModel() == InModel(1.0, 1.0)


def test_a_product_is_merged_and_fused_only_where_its_layers_have_one_spec():
    cost = Measured("h100", LLAMA, "llama-3-8b")
    places = places_of("llama-3-8b", 1)
    everything = predictions(cost, places, Recipe("2:4"))["prefill"]
    other = Recipe("2:4", rules=[Rule(projections=["k_proj"], mitigation=["var"])])
    assert predictions(cost, places, other)["prefill"] < everything
    [q] = [place for place in places if place.projection == "q_proj"]
    spec = LinearSpec("2:4")
    assert cost.time("prefill", q, spec, fused=True) < cost.time("prefill", q, spec) < cost.time("prefill", q, None)
    shares = [
        cost.time("prefill", place, None) for place in places if place.projection in ("q_proj", "k_proj", "v_proj")
    ]
    assert sum(shares) == pytest.approx(cost.tables.dense("prefill", (6144, 4096, 4096)).us)


def test_phases_are_predicted_apart():
    cost = Measured("h100", LLAMA, "llama-3-8b", phases=BOTH)
    places = places_of("llama-3-8b", 32)
    found = {phase: predictions(cost, places, Recipe("8:16", phase=phase)) for phase in ("both", *BOTH)}
    assert found["decode"]["prefill"] == 1
    assert found["prefill"]["decode"] == 1
    assert found["both"] == {"prefill": found["prefill"]["prefill"], "decode": found["decode"]["decode"]}
    assert predictions(cost, places, None) == {"prefill": 1, "decode": 1}
    assert predictions(cost, places, Recipe("2:4", criterion="wanda")) == {"prefill": 1, "decode": 1}


def test_each_phase_is_predicted_with_its_own_pattern():
    cost = Measured("h100", LLAMA, "llama-3-8b", phases=BOTH)
    places = places_of("llama-3-8b", 32)
    alone = {pattern: predictions(cost, places, Recipe(pattern)) for pattern in ("2:4", "12:16")}
    mixed = predictions(cost, places, Recipe("2:4", decode_pattern="12:16"))
    assert mixed == {"prefill": alone["2:4"]["prefill"], "decode": alone["12:16"]["decode"]}
    assert mixed["decode"] < alone["2:4"]["decode"]


def test_what_mitigations_and_first_tokens_add():
    cost, places = Measured("h100", LLAMA, "llama-3-8b"), places_of("llama-3-8b", 32)

    def speedup(**fields):
        return predictions(cost, places, Recipe("2:4", **fields))["prefill"]

    assert speedup(mitigation=["var"]) == speedup() > speedup(mitigation=["var", "lpts"])  # no operand packed in front
    assert (
        speedup(mitigation=["lpts"])
        == speedup(mitigation=["ls", "lpts"])
        > speedup(mitigation=["rsparse-32"])
        > speedup(mitigation=["rsparse-128"])
    )
    wider = predictions(cost, places, Recipe("2:4", mitigation=["rsparse-32"]), rank_factor=4)["prefill"]
    assert wider == pytest.approx(speedup(mitigation=["rsparse-128"]))
    assert predictions(cost, places, Recipe("50%")) == {"prefill": 1}  # no kernel serves it
    assert speedup(mitigation=["lpts"]) < speedup(dense_first_tokens=4) < speedup()


def test_only_what_runs_on_sparse_tensor_cores_is_credited_in_a_model():
    """2:4+2 is a pruned operand in the dense product, which takes as long in a model as alone, unfused."""
    cost, places = Measured("h100", LLAMA, "llama-3-8b"), places_of("llama-3-8b", 32)
    before = {pattern: predictions(cost, places, Recipe(pattern))["prefill"] for pattern in ("2:4", "2:4+1", "2:4+2")}
    assert all(0 < share < 1.01 for phase in BOTH for share in vars(cost.shares(phase)).values())
    alone = replace(cost, in_model=ALONE)
    after = {pattern: predictions(alone, places, Recipe(pattern))["prefill"] for pattern in before}
    assert [before[pattern] > after[pattern] for pattern in before] == [True, True, False]
    assert after["2:4+2"] == before["2:4+2"] < 1


def test_a_wheel_has_every_table_that_predictions_read():
    setup = (ROOT / "setup.py").read_text()
    [listed] = re.findall(r"^MEASURED = \(([^)]*)\)", setup, re.MULTILINE)
    [shipped] = re.findall(
        r"^recursive-include benchmarks/results (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE
    )
    read = {*tables._FILES, tables._WHOLE_MODELS}
    assert set(re.findall(r'"([^"]+)"', listed)) == set(shipped.split()) == read


def test_kept_shares_in_decode():
    tables = load_tables("h100")
    times = [tables.product("decode", pattern, (6144, 4096, 1)) for pattern in ("4:16", "8:16", "11:16", "14:16")]
    assert [each.us for each in times] == sorted(each.us for each in times)
    assert not times[1].note
    assert "68.8% kept in decode was not measured" in times[2].note


def test_the_nearest_shape_is_taken_and_said():
    tables = load_tables("h100")
    exact, near = (tables.product("prefill", "2:4", (out, 4096, 4096)) for out in (4096, 4000))
    assert near.us == pytest.approx(exact.us * 4000 / 4096)
    assert near.note == (
        "4096 x 4000 x 4096 (tokens, out, in) was not measured in prefill: the nearest is 4096 x 4096 x 4096"
    )
    assert (
        "3:8 in prefill was not measured: 8:16 stands for it"
        in tables.product("prefill", "3:8", (4096, 4096, 4096)).note
    )
    assert tables.product("prefill", "8:16", (4096, 4096, 4096)).us > exact.dense_us


def test_models_of_other_families_and_shapes():
    model, _ = tiny_model.build()
    cost = cost_of(model, "h100", phases=BOTH)
    found = predictions(cost, places_of(model), Recipe("2:4"))
    assert all(value > 0 for value in found.values())
    assert "no whole model of these shapes was measured: the speed-up is that of the linear layers" in cost.notes
    named = Measured("h100", LLAMA, "llama-3-8b")
    merged = named.time("prefill", Place(0, "gate_up_proj", 4096, 28672), None)  # as Phi-3 calls it
    assert merged == pytest.approx(named.tables.dense("prefill", (28672, 4096, 4096)).us)
    with pytest.raises(ValueError, match=r"expected projections among q_proj.*, got 'mixer'"):
        named.time("prefill", Place(0, "mixer", 4096, 4096), None)


def test_merged_groups():
    model, _ = tiny_model.build()
    groups = groups_of(model, ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), merged=True)
    assert [group.key for group in groups[:3]] == ["0:down_proj", "0:o_proj", "0:q_proj+k_proj+v_proj"]
    assert [place.projection for place in groups[2].places] == ["q_proj", "k_proj", "v_proj"]
    assert groups[2].macs == 64 * 64 + 2 * 64 * 32
    assert all(group.is_whole_product for group in groups)
    assert not groups_of(model, ("q_proj",))[0].is_whole_product


def test_unknown_devices_and_shapes_are_refused():
    assert "h100" in devices()
    with pytest.raises(ValueError, match=r"expected a measured device among .*h100.*, got 'h900'"):
        Measured("h900", LLAMA)
    with pytest.raises(ValueError, match=r"expected shapes among llama-3-8b, .*, got 'gpt'"):
        shapes_of("gpt")
    assert Rates.load().speedup("2:4")[1].startswith("NVIDIA H100")


def test_decode_is_predicted_between_patterns_of_one_m():
    tables = load_tables("h100")
    sizes = 6144, 4096, 1
    small, large = (tables.product("decode", pattern, sizes) for pattern in ("2:4", "16:32"))
    assert small.us < large.us  # the rows differ, though the kept share does not
    assert tables.product("decode", "20:32", sizes).us > tables.product("decode", "16:32", sizes).us
    least = tables.product("decode", "8:32", sizes)
    assert tables.product("decode", "4:32", sizes).us == pytest.approx(least.us / 2)


def test_layers_that_do_not_merge_cost_a_product_of_their_own():
    cost, places = Measured("h100", LLAMA, "llama-3-8b", phases=BOTH), places_of("llama-3-8b", 32)
    found = {criterion: predictions(cost, places, Recipe("2:4", criterion=criterion)) for criterion in ("act", "wina")}
    assert all(found["act"][phase] > found["wina"][phase] > 1.2 for phase in BOTH)
    single = [
        predictions(cost, places, Recipe("2:4", criterion=criterion, projections=["down_proj"]))
        for criterion in ("act", "wina")
    ]
    assert single[0] == single[1]
    learned = predictions(cost, places, Recipe("2:4", mitigation=["lpts"]))
    assert learned["decode"] < found["act"]["decode"]
