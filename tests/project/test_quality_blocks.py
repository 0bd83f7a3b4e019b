"""Block-wise training, low-rank pairs and dense channels of benchmarks/quality_*.py compute what they say."""

import csv
import json
from types import SimpleNamespace

import pytest
import quality_side
import tiny_model
import torch
from quality_blocks import leading_pair, starting, train_blocks
from quality_fused import Fused
from quality_stack import TENSORS, Stack, folded, patterns_of, tensors_of
from torch.nn import functional as F

from nm_act.lab.calibrate import CalibrationSettings, calibrate
from nm_act.lab.cost import Measured, places_of, predictions, shapes_of
from nm_act.layers.linear import NMLinear
from nm_act.methods.mitigations import low_rank_of
from nm_act.recipe import LinearSpec, Recipe


@pytest.fixture(scope="module")
def dense():
    return tiny_model.teacher()


@pytest.mark.parametrize("mitigation", [["lpts"], ["ls", "lpts", "var"], ["rsparse-4-trained", "ls"]])
def test_blocks_train_as_calibrate_does(dense, mitigation):
    recipe, windows = Recipe("2:4", mitigation=mitigation), tiny_model.windows(12, 0)
    settings = CalibrationSettings(learning_rate=1e-2)
    report, history = calibrate(tiny_model.teacher(), recipe, windows, settings=settings)
    model, losses = starting(dense, recipe), []
    before = [layer.data() for layer in model.modules() if isinstance(layer, NMLinear)]
    train_blocks(model, dense, windows, settings, lambda *each: losses.append(each))
    assert [loss[0] for loss in losses] == [0, 1]
    for (_, first, last), wanted in zip(losses, history, strict=True):
        assert first == pytest.approx(wanted["first"], rel=1e-3)
        assert last == pytest.approx(wanted["last"], rel=1e-3)
    found, wanted = ([each.data() for each in m.modules() if isinstance(each, NMLinear)] for m in (model, report.model))
    changed = 0
    for own, other, start in zip(found, wanted, before, strict=True):
        for key in own.keys() - {"low_rank_in", "low_rank_out"}:  # of which the signs are free
            assert torch.allclose(own[key], other[key], atol=2e-3)
            changed += not torch.allclose(own[key], start[key], atol=2e-3)
        if "low_rank_in" in own:
            pairs = [each["low_rank_out"] @ each["low_rank_in"] for each in (own, other)]
            assert torch.allclose(*pairs, atol=5e-3)
    assert changed


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_leading_pair_is_the_best_of_its_rank(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inner, outer = leading_pair(weight, 5)
    wanted = low_rank_of(weight, 5)
    assert torch.allclose(outer @ inner, wanted[1] @ wanted[0], atol=1e-4)
    assert inner.norm().item() == pytest.approx(wanted[0].norm().item(), rel=1e-4)


@pytest.fixture
def shared(dense):
    windows = tiny_model.windows(8, 0)
    heads = dense.config.num_attention_heads, dense.config.num_key_value_heads
    return SimpleNamespace(
        session=SimpleNamespace(dense=dense),
        length=windows.shape[1],
        c4=windows,
        folded=folded(tensors_of(dense), *heads),
    )


def test_pairs_leave_the_dense_function_and_lower_the_sparse_error(dense, shared):
    ids, patterns = tiny_model.windows(4, 1), patterns_of(Recipe("2:4"), 2)
    tensors = quality_side.with_pairs(shared, quality_side.fitted_pairs(shared, patterns, 8), 8)
    side = quality_side.SidePath(dense, shared.length, torch.float32, tensors)
    assert len(side.tensors) == 2 * (TENSORS + 8)
    plain = Stack(dense, shared.length, torch.float32, shared.folded)
    wanted = plain.hidden(ids)
    assert torch.allclose(side.hidden(ids), wanted, atol=1e-4)
    errors = [F.mse_loss(each.hidden(ids, patterns), wanted).item() for each in (side, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_pairs_of_a_rank_lead_those_of_a_higher_one(shared):
    patterns = patterns_of(Recipe("2:4"), 2)
    found = [quality_side.with_pairs(shared, quality_side.fitted_pairs(shared, patterns, r), 3) for r in (3, 8)]
    for index in range(0, 16, 2):
        one, other = (tensors[2 * TENSORS + index + 1] @ tensors[2 * TENSORS + index] for tensors in found)
        assert torch.allclose(one, other, atol=1e-4)


def test_training_leaves_the_first_tensors_as_they_are(dense, shared):
    ids, patterns = tiny_model.windows(8, 1), patterns_of(Recipe("2:4"), 2)
    fused = object.__new__(Fused)
    vars(fused).update(vars(shared), held_out=ids, dtype=torch.float32, _pool=shared.c4)
    fused.teacher = Stack.of(dense, shared.length, torch.float32)
    fused.session = SimpleNamespace(
        dense=dense, device=torch.device("cpu"), options=SimpleNamespace(fused_batch=4), say=print, left=100.0
    )
    tensors = quality_side.with_pairs(shared, quality_side.fitted_pairs(shared, patterns, 8), 8)
    first = 2 * TENSORS
    options = {"kind": quality_side.SidePath, "tensors": tensors, "steps": 12, "first": first}
    found, facts = fused.train("pairs", Recipe("2:4"), 0, 1e-2, **options)
    assert facts["after"] < facts["before"]
    assert len(found) == len(tensors)
    assert all(torch.equal(*pair) for pair in zip(found[:first], tensors[:first], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(found[first:], tensors[first:], strict=True))


def test_rows_of_the_side_paths_are_added_and_predicted(tmp_path, monkeypatch):
    file = tmp_path / "side.csv"
    monkeypatch.setattr(quality_side, "CSV", file)
    file.write_text("method,pattern,size,chosen_by,wikitext2\ndense channels,2:4,1/18,largest,63.2906\n")
    row = {"method": quality_side.PAIRS, "pattern": "2:4", "size": "16 of 576", "chosen_by": "error"}
    fact = {"wikitext2": 80.0, "dtype": "float32", "device": "CPU", "commit": "0", "date": "2026-01-01"}
    fact |= {"difference": -0.1, "stderr": 0.01}
    facts = [
        {"name": "rates"},
        fact | {"row": row | {"trained": "pairs, 300 steps"}},
        fact | {"row": row | {"trained": ""}},
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in facts))
    for _ in range(2):  # the second call changes nothing
        assert quality_side.main([str(tmp_path / "facts.jsonl")]) == 0
    rows = list(csv.DictReader(file.open()))
    assert [each["wikitext2"] for each in rows] == ["63.2906", "80.0000", "80.0000"]
    assert [each["held_out"] for each in rows] == ["", "-0.1000", ""]
    channels = quality_side.shared_prediction(Recipe("2:4"), dense_channels=1 / 18)
    pairs = quality_side.shared_prediction(Recipe("2:4"), rank=114)
    for each, wanted in zip(rows, (channels, pairs, pairs), strict=True):
        assert float(each["predicted_speedup"]) == pytest.approx(wanted["prefill"], abs=1e-4)
        assert float(each["predicted_decode"]) == pytest.approx(wanted["decode"], abs=1e-4)


def test_dense_channels_are_left_out_of_the_selection(dense, shared):
    ids, patterns = tiny_model.windows(4, 1), patterns_of(Recipe("2:4"), 2)
    tensors = tensors_of(dense)
    plain = Stack(dense, shared.length, torch.float32, tensors)
    some = quality_side.DenseChannels(dense, shared.length, torch.float32, tensors)
    sizes = {(i, p): plain.weight(i, p).shape[1] for i in range(2) for p in quality_side.PRODUCTS}
    none = {key: torch.zeros(size, dtype=torch.bool) for key, size in sizes.items()}
    assert torch.equal(some.use(none).hidden(ids, patterns), plain.hidden(ids, patterns))
    every = {key: ~value for key, value in none.items()}
    assert torch.allclose(some.use(every).hidden(ids, patterns), plain.hidden(ids), atol=1e-5)
    some.use({key: torch.arange(size) < 1 for key, size in sizes.items()})
    x = torch.tensor([[9.0, 1, 2, 3, *[0.0] * (sizes[0, 1] - 4)]])
    kept = torch.tensor([[9.0, 0, 2, 3, *[0.0] * (sizes[0, 1] - 4)]])
    assert torch.allclose(some.product(0, 1, x, patterns[0][0]), kept @ plain.weight(0, 1).T, atol=1e-5)


def test_shared_predictions_are_those_of_merged_products():
    cost = Measured("h100", shapes_of("llama-3-8b"), "llama-3-8b", phases=("prefill", "decode"))
    recipe = Recipe("2:4")
    plain = quality_side.shared_prediction(recipe)
    assert plain == pytest.approx(predictions(cost, places_of("llama-3-8b", 32), recipe))
    pairs = quality_side.shared_prediction(recipe, rank=114)
    places, spec = places_of("llama-3-8b", 32), LinearSpec("2:4")
    unfused = quality_side.shared_prediction(recipe, dense_channels=1e-9)
    for phase, found in unfused.items():  # merged, but no norm or activation writes an operand
        dense, sparse = (
            cost.rest(phase, 32) + sum(cost.time(phase, place, each) for place in places) for each in (None, spec)
        )
        assert found == pytest.approx(dense / sparse)
        assert 1 < pairs[phase] < found < plain[phase]
    decode = quality_side.shared_prediction(Recipe("16:32", phase="decode"), dense_channels=0.1)
    assert decode["prefill"] == pytest.approx(1.0)
    assert decode["decode"] < quality_side.shared_prediction(Recipe("16:32", phase="decode"))["decode"]
