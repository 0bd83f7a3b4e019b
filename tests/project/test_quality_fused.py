"""The stack of benchmarks/quality_stack.py computes what the model does, folded, sparse, trained or token by token."""

import pytest
import tiny_model
import torch
from quality_stack import (
    Divergence,
    Stack,
    folded,
    patterns_of,
    sparse_model,
    tensors_of,
    token_divergences,
    write_text,
)
from torch.nn import functional as F

from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.recipe import Recipe


@pytest.fixture(scope="module")
def ids():
    return tiny_model.windows(3, 0)


def folded_of(dense):
    return folded(tensors_of(dense), dense.config.num_attention_heads, dense.config.num_key_value_heads)


def logits(stack, ids, recipe=None):
    patterns = None if recipe is None else patterns_of(recipe, stack.layers)
    return F.linear(stack.hidden(ids, patterns), stack.head)


def test_dense_logits_are_the_models_folded_or_not(dense, ids):
    wanted = dense(input_ids=ids).logits
    length = ids.shape[1]
    assert torch.allclose(logits(Stack.of(dense, length, torch.float32), ids), wanted, atol=1e-4)
    assert torch.allclose(logits(Stack(dense, length, torch.float32, folded_of(dense)), ids), wanted, atol=1e-4)


def test_folded_columns_have_equal_norms(dense):
    tensors = folded_of(dense)
    for weight in (tensors[1], tensors[4], tensors[5]):
        norms = torch.linalg.vector_norm(weight, dim=0)
        assert torch.allclose(norms, norms.mean().expand_as(norms), rtol=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "18:32", "2:4+1"])
def test_sparse_logits_are_those_of_the_sparse_model(dense, ids, pattern):
    recipe = Recipe(pattern)
    for tensors in (tensors_of(dense), folded_of(dense)):
        model = sparse_model(dense, recipe, tensors)
        found = logits(Stack(dense, ids.shape[1], torch.float32, tensors), ids, recipe)
        assert torch.allclose(found, model(input_ids=ids).logits, atol=1e-3)
    assert not torch.allclose(found, sparse_copy(dense, recipe).model(input_ids=ids).logits, atol=1e-3)


def test_the_dense_model_keeps_its_own_weights(dense):
    before = [each.clone() for each in dense.parameters()]
    sparse_model(dense, Recipe("2:4", projections=("down_proj",)), [2 * each for each in tensors_of(dense)])
    assert all(torch.equal(old, new) for old, new in zip(before, dense.parameters(), strict=True))


def test_recipes_that_do_not_merge_are_refused():
    with pytest.raises(ValueError, match="one spec with act alone"):
        patterns_of(Recipe("2:4", projections=("q_proj",)), 1)
    with pytest.raises(ValueError, match="one spec with act alone"):
        patterns_of(Recipe("2:4", criterion="wina"), 1)


def test_divergence_and_its_gradient(ids):
    generator = torch.Generator().manual_seed(0)
    hidden, wanted, head = (torch.randn(*shape, generator=generator) for shape in ((5000, 8), (5000, 8), (30, 8)))
    hidden.requires_grad_()
    found = Divergence.apply(hidden, wanted, head)
    found.backward()
    own = hidden.detach().requires_grad_()
    divergences = [F.linear(each, head).log_softmax(dim=-1) for each in (own, wanted)]
    exact = F.kl_div(*divergences, log_target=True, reduction="none").sum(dim=-1)
    exact.mean().backward()
    assert found.item() == pytest.approx(exact.mean().item(), rel=1e-4)
    assert torch.allclose(hidden.grad, own.grad, atol=1e-7)
    assert torch.allclose(token_divergences(hidden, wanted, head), exact, atol=1e-4)


def test_greedy_text_is_what_the_whole_sequence_predicts(dense, ids):
    stack = Stack.of(dense, ids.shape[1], torch.float32)
    lengths = torch.tensor([1, 7, 12])
    found = write_text(stack, ids, lengths, 0.0)
    predicted = dense(input_ids=found).logits.argmax(dim=-1)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(found[row, :length], ids[row, :length])
        assert torch.equal(found[row, length:], predicted[row, length - 1 : -1])
    drawn = [write_text(stack, ids, lengths) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0][2, :12], ids[2, :12])
