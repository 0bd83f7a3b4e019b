"""Decode speed: what is timed, in which order, and how rounds become figures."""

import importlib

import pytest
import tiny_model
import torch

from nm_act.lab.evaluate.decode_speed import DecodeSpeed, decode_speed
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.recipe import Recipe

pytestmark = pytest.mark.contract

module = importlib.import_module("nm_act.lab.evaluate.decode_speed")  # as an attribute, the function hides it


@pytest.fixture(scope="module")
def prompt(tiny):
    return tiny[1](tiny_model.TEXT[:30], return_tensors="pt")["input_ids"]


def test_figures():
    speed = DecodeSpeed((10.0, 40.0, 20.0, 30.0, 50.0))
    assert speed.median == 30.0
    assert speed.spread == pytest.approx((18.0, 42.0))


def test_speedup_is_taken_round_by_round():
    dense = DecodeSpeed((10.0, 1.0, 10.0))  # the machine was busy during the second round
    sparse = DecodeSpeed((20.0, 2.0, 20.0))
    assert sparse.speedup_over(dense).samples == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="expected two results of one measurement, got 3 and 1 rounds"):
        sparse.speedup_over(DecodeSpeed((1.0,)))


def test_decodes_what_generate_does(tiny, prompt):
    model, tokenizer = tiny
    with torch.inference_mode():
        decoder = module._Decoder(model, prompt)
        tokens = [decoder.token.item()]
        for _ in range(3):
            decoder.run(2)
            tokens.append(decoder.token.item())
    expected = model.generate(
        prompt, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )[0, prompt.shape[1] :]
    assert tokens == expected[::2].tolist()


def test_models_take_turns_at_equal_cache_length(tiny, prompt, monkeypatch):
    order = []

    class Recorded:
        def __init__(self, model, input_ids):
            self.name = model

        def run(self, steps):
            order.append((self.name, steps))
            return 0.5 if self.name == "a" else 0.25

    monkeypatch.setattr(module, "_Decoder", Recorded)
    seen = []
    result = decode_speed(
        {"a": "a", "b": "b", "c": "c"}, prompt, rounds=3, steps=4, warmup=1, progress=lambda *args: seen.append(args)
    )
    assert "".join(name for name, _ in order) == "abc" + "bca" + "cab" + "abc"
    assert {steps for _, steps in order} == {4}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert list(result) == ["a", "b", "c"]
    assert result["a"].samples == (8.0, 8.0, 8.0)
    assert result["b"].speedup_over(result["a"]).median == 2.0


def test_dense_and_sparse_together(tiny, prompt):
    model, _ = tiny
    sparse = sparse_copy(model, Recipe(pattern="8:16")).model
    result = decode_speed({"dense": model, "8:16": sparse}, prompt, rounds=2, steps=2)
    for speed in result.values():
        assert len(speed.samples) == 2
        assert all(sample > 0 for sample in speed.samples)


def test_all_sequences_of_a_batch_count(tiny, prompt, monkeypatch):
    monkeypatch.setattr(module._Decoder, "run", lambda self, steps: 1.0)
    result = decode_speed({"dense": tiny[0]}, prompt.repeat(3, 1), rounds=1, steps=5)
    assert result["dense"].samples == (15.0,)


def test_time_limit_leaves_one_round(tiny, prompt):
    model, _ = tiny
    result = decode_speed({"a": model, "b": model}, prompt, rounds=50, steps=1, max_seconds=0.0)
    assert [len(speed.samples) for speed in result.values()] == [1, 1]


def test_bad_arguments(tiny, prompt):
    model, _ = tiny
    with pytest.raises(ValueError, match="expected at least one model to measure, got none"):
        decode_speed({}, prompt)
    for wrong in (prompt[0], prompt[:, :0]):
        with pytest.raises(ValueError, match=r"expected a prompt of shape \[batch, tokens\], got \["):
            decode_speed({"dense": model}, wrong)
    for counts in ({"rounds": 0}, {"steps": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match="expected rounds >= 1, steps >= 1, warmup >= 0, got"):
            decode_speed({"dense": model}, prompt, **counts)
