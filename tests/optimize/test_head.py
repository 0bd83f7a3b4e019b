"""optimize(head=...): the output head in 8 bits, tied to the embedding or not; its checkpoint, and how to undo it."""

import copy
import pickle

import pytest
import torch
from tiny_families import IDS, assert_close, family, logits
from torch.nn import functional as F

import nm_act
from nm_act.optimize.head import QuantisedHead


def hidden(model):
    with torch.no_grad():
        return model.model(input_ids=IDS, use_cache=False).last_hidden_state


def rounded(weight, kind):
    largest = weight.abs().amax(1, keepdim=True).clamp(min=1e-12)  # a row of zeros is the padding word
    if kind == "int8":
        return (weight / (largest / 127)).round() * (largest / 127)
    return (weight / (largest / 448)).to(torch.float8_e4m3fn).float() * (largest / 448)


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_rounded_weight(tied, kind):
    model = family(tie_word_embeddings=tied)
    weight = model.lm_head.weight.detach().clone()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    report = nm_act.optimize(model, head=kind)
    assert isinstance(model.lm_head, QuantisedHead)
    assert_close(logits(model), F.linear(hidden(model), rounded(weight, kind)))
    assert_close(model.lm_head.weight.as_subclass(torch.Tensor), rounded(weight, kind))
    assert torch.equal(model.model.embed_tokens.weight, weight) or not tied
    assert (report.head, report.head_bytes) == ("lm_head", weight.numel() + 4 * len(weight))
    assert report.head_saved == (0 if tied else weight.nbytes) - report.head_bytes
    said = "beside the weight of the tied embedding" if tied else "MiB less than before"
    assert said in str(report)


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_keep_the_stock_names(tied, kind, tmp_path):
    model = family(tie_word_embeddings=tied)
    stock = copy.deepcopy(model.state_dict())
    nm_act.optimize(model, head=kind)
    state = model.state_dict()
    assert state.keys() == stock.keys()
    # The embedding keeps the weight of a tied head: its checkpoint has nothing that was rounded.
    expected = stock["lm_head.weight"] if tied else rounded(stock["lm_head.weight"], kind)
    assert_close(state["lm_head.weight"], expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert_close(again.lm_head.weight.detach(), expected)
    model.load_state_dict(stock)
    assert_close(model.lm_head.dequantised(torch.float32), rounded(stock["lm_head.weight"], kind))
    with pytest.raises(RuntimeError, match=r"lm_head\.weight of shape"):
        model.load_state_dict(stock | {"lm_head.weight": torch.zeros(3, 64)})


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_undone(tied, kind):
    model = family(tie_word_embeddings=tied)
    nm_act.sparsify(model, nm_act.Recipe("2:4"))
    expected, weight = logits(model), model.lm_head.weight.detach().clone()
    nm_act.optimize(model, head=kind)
    with pytest.raises(ValueError, match="expected a model that is not optimized"):
        nm_act.optimize(model)
    nm_act.deoptimize(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    if tied:
        assert_close(logits(model), expected)
    else:
        assert_close(model.lm_head.weight.detach(), rounded(weight, kind))


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_and_pickles(tied, kind):
    model = family(tie_word_embeddings=tied)
    nm_act.optimize(model, head=kind)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(logits(other), expected)
        assert other.lm_head.tied is (other.model.embed_tokens if tied else None)
    # Its scales stay float32, and its codes bytes, in a model of another dtype.
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert (half.lm_head.weight_scale.dtype, half.lm_head.rows.dtype) == (torch.float32, torch.uint8)
    assert half.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_generate_and_compile(kind):
    model = family()
    nm_act.optimize(model, head=kind)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(IDS, **options)
    nm_act.deoptimize(model)
    assert torch.equal(model.generate(IDS, **options), tokens)
    nm_act.optimize(model, head=kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(input_ids=IDS, use_cache=False).logits, logits(model))


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_gradients_reach_the_hidden_state(kind):
    model = family()
    nm_act.optimize(model, head=kind)
    x = torch.randn(2, 3, 64, requires_grad=True)
    model.lm_head(x).sum().backward()
    assert_close(x.grad, model.lm_head.dequantised(torch.float32).sum(0).expand(2, 3, 64), atol=1e-4)


def test_what_cannot_be_stored_stays_and_says_why():
    model, kind = family(), "int8"
    with pytest.raises(ValueError, match="expected head among e4m3, int8, got True; choose one of those"):
        nm_act.optimize(model, head=True)
    with pytest.raises(ValueError, match="expected a model with an output head for head='int8', got LlamaModel"):
        nm_act.optimize(model.model, head=kind)
    assert not nm_act.optimize.__globals__["is_optimized"](model.model)
    with pytest.raises(RuntimeError, match="expected no write to the weight"):
        nm_act.optimize(model, head=kind) and setattr(model.lm_head, "weight", None)
    hooked, odd = family(), family(vocab_size=90)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    for model, why in ((hooked, "it has hooks"), (odd, "its 90 outputs are not divisible by 16")):
        report = nm_act.optimize(model, head=kind)
        assert isinstance(model.lm_head, torch.nn.Linear)
        assert ("lm_head", f"the output head stays as it is: {why}") in report.kept
        assert report.head == ""
