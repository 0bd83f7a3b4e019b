"""The fused attention of every family, its kernels replaced by their formulas: what it gives to them and to Transformers."""

from functools import partial

import fused_formulas
import pytest
import torch
from tiny_families import IDS, KNOWN, assert_close, logits, sparse

import nm_act
from nm_act.optimize import attention

pytestmark = pytest.mark.contract
HEAD_NORMS = ["eps", "k_norm", "q_norm", "unit_offset"]


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that were called, in place of which their formulas ran, and of the norms' arguments."""
    made = []

    def called(name, *arguments, **options):
        made.append((name, sorted(set(options) & set(HEAD_NORMS))))
        return getattr(fused_formulas, name)(*arguments, **options)

    for name in ("rotary", "rotary_cache", "decode_attention"):
        monkeypatch.setattr(attention, name, partial(called, name))
    monkeypatch.setattr(attention, "fuses", lambda *_: True)
    return made


def head_norms(model):
    return HEAD_NORMS if hasattr(model.model.layers[0].self_attn, "q_norm") else []


@pytest.mark.parametrize("name", KNOWN)
def test_transformers_attention_is_asked_for_the_same(name, calls, monkeypatch):
    """The window, which the mask has too, and whatever else the family's own attention passes on."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock, asked = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def recorded(*arguments, **options):
        asked.append({key: value for key, value in options.items() if value is not None})
        return stock(*arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", recorded)
    model = sparse(name)
    expected = logits(model)
    nm_act.optimize(model)
    assert_close(logits(model), expected)
    assert calls == [("rotary", head_norms(model))] * 2
    torch.testing.assert_close(asked[2:], asked[:2], rtol=0, atol=0)


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_static_decoding_gives_the_same_tokens(name, attends, calls, monkeypatch):
    monkeypatch.setattr(attention, "attends", lambda *_: attends)
    model = sparse(name, "8:16")
    expected = model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    nm_act.optimize(model)
    decoder = nm_act.StaticDecoder(model, batch=2, max_tokens=32)
    assert torch.equal(decoder.generate(IDS, 9), expected)
    steps = ["rotary_cache"] * 2 + ["decode_attention" if attends else "rotary_cache"] * 16
    assert calls == [(step, head_norms(model)) for step in steps]


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_hooks_on_norms_of_heads_are_called(name, calls):
    model = sparse(name)
    expected = logits(model)
    nm_act.optimize(model)
    seen = []
    model.model.layers[1].self_attn.q_norm.register_forward_hook(lambda *_: seen.append(1))
    assert_close(logits(model), expected)
    assert calls == [("rotary", HEAD_NORMS), ("rotary", [])]
    assert seen == [1]
