"""Perplexity against an independent float64 computation, and against models whose perplexity is known."""

import importlib
import math
from types import SimpleNamespace

import pytest
import tiny_model
import torch
from conftest import failing
from torch import nn

from nm_act.lab.evaluate.perplexity import perplexity
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.lab.texts import tokenize
from nm_act.layers.linear import NMLinear
from nm_act.recipe import Recipe

module = importlib.import_module("nm_act.lab.evaluate.perplexity")  # as an attribute, the function hides it


class Fixed(nn.Module):
    """Gives the same logits for every token."""

    def __init__(self, logits, context=None):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.lengths = []

    def forward(self, input_ids, use_cache):
        assert not use_cache
        self.lengths.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def _expected(model, ids, window):
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        with torch.no_grad():
            logits = model(part[None]).logits[0].double()
        losses += [-logits[i].log_softmax(-1)[part[i + 1]].item() for i in range(window - 1)]
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("window", [2, 7, 32, 128])
def test_against_float64(tiny, window):
    model, tokenizer = tiny
    ids = tokenize(tokenizer, tiny_model.TEXT, 300)
    result = perplexity(model, ids, window=window)
    value, tokens = _expected(model, ids, window)
    assert result.value == pytest.approx(value, rel=1e-6)
    assert (result.tokens, result.windows, result.window) == (tokens, 300 // window, window)
    assert result.value == math.exp(result.nll / result.tokens)


def test_logits_in_parts_are_the_same(tiny, monkeypatch):
    model, tokenizer = tiny
    ids = tokenize(tokenizer, tiny_model.TEXT, 128)
    whole = perplexity(model, ids)
    monkeypatch.setattr(module, "_SCORED_AT_ONCE", 5)
    assert perplexity(model, ids).value == pytest.approx(whole.value, rel=1e-12)


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = perplexity(Fixed(torch.zeros(50)), torch.arange(40) % 50, window=10)
    assert result.value == pytest.approx(50, rel=1e-6)
    assert result.tokens == 36


def test_tail_is_left_out_and_short_text_is_one_window():
    model = Fixed(torch.zeros(10))
    assert perplexity(model, torch.zeros(25, dtype=torch.int64), window=10).windows == 2
    assert model.lengths == [10, 10]
    short = perplexity(model, torch.zeros(6, dtype=torch.int64), window=10)
    assert (short.windows, short.window, short.tokens) == (1, 6, 5)


def test_default_window_is_2048_or_the_context():
    ids = torch.zeros(5000, dtype=torch.int64)
    assert perplexity(Fixed(torch.zeros(4)), ids).window == 2048
    assert perplexity(Fixed(torch.zeros(4), context=8192), ids).window == 2048
    assert perplexity(Fixed(torch.zeros(4), context=100), ids).window == 100


def test_impossible_and_undefined_results_are_not_hidden():
    ids = torch.zeros(10, dtype=torch.int64)
    assert math.isnan(perplexity(Fixed([float("nan"), 0.0]), ids).value)
    assert perplexity(Fixed([-2000.0, 0.0]), ids).value == math.inf


def test_bfloat16_model_scores_in_float32(tiny):
    model, tokenizer = tiny
    ids = tokenize(tokenizer, tiny_model.TEXT, 256)
    low = tiny_model.build()[0].bfloat16()
    value, _ = _expected(low, ids, 128)
    assert perplexity(low, ids).value == pytest.approx(value, rel=1e-6)
    assert value == pytest.approx(perplexity(model, ids).value, rel=0.01)


def test_progress_and_training_mode():
    model = Fixed(torch.zeros(8)).train()
    seen = []
    perplexity(model, torch.zeros(30, dtype=torch.int64), window=10, progress=lambda *args: seen.append(args))
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == pytest.approx(8)
    assert model.training


def test_interrupt_passes_through_and_restores_the_model():
    model = Fixed(torch.zeros(8)).train()
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, torch.zeros(30, dtype=torch.int64), window=10, progress=failing(KeyboardInterrupt))
    assert model.training
    assert len(model.lengths) == 1


@pytest.mark.parametrize("ids", [torch.zeros(0), torch.zeros(1), torch.zeros(2, 8)])
def test_too_few_tokens(ids):
    with pytest.raises(ValueError, match="expected at least 2 tokens in one dimension, got"):
        perplexity(Fixed(torch.zeros(4)), ids.long())


def test_window_out_of_range():
    model, ids = Fixed(torch.zeros(4), context=64), torch.zeros(100, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a window of at least 2 tokens, got 1"):
        perplexity(model, ids, window=1)
    with pytest.raises(ValueError, match="within the model's context of 64 tokens, got 65; shorten it"):
        perplexity(model, ids, window=65)


def test_sparse_copy_leaves_the_dense_model_alone():
    model, tokenizer = tiny_model.build()
    ids = tokenize(tokenizer, tiny_model.TEXT, 128)
    before = perplexity(model, ids).value
    dense_weight = model.model.layers[0].mlp.down_proj.weight
    storage = dense_weight.stride(), dense_weight.data_ptr()
    report = sparse_copy(model, Recipe(pattern="2:4", projections=["down_proj"]))
    assert (dense_weight.stride(), dense_weight.data_ptr()) == storage
    copy = report.model
    assert len(report.replaced) == 2
    assert isinstance(copy.model.layers[0].mlp.down_proj, NMLinear)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert copy.lm_head.weight is model.lm_head.weight
    assert copy.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert perplexity(copy, ids).value != before
    assert perplexity(model, ids).value == before
    assert not hasattr(model, "nm_act_recipe")
    assert getattr(model.config, "quantization_config", None) is None
