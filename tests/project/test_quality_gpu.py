"""The training of benchmarks/quality_training.py computes what the model does, and its data survives packing."""

from types import SimpleNamespace

import pytest
import quality_data
import quality_training
import tiny_model
import torch
from quality_session import Session
from quality_training import Linear, Llama, train_graphed

import nm_act
from nm_act.lab.calibrate.distill import held_out_losses
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.recipe import Recipe


def sparse_model(dense, pattern="2:4", mitigation=()):
    """With data that change something."""
    model = sparse_copy(dense, Recipe(pattern, criterion="wina", mitigation=mitigation)).model
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nm_act.NMLinear) and layer.data():
            noise = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in layer.data().items()}
            layer.set_data(**{key: value + float(key == "column_scale") for key, value in noise.items()})
    return model


def linears_of(model) -> dict[str, Linear]:
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nm_act.NMLinear)}
    return {
        quality_training._short(name): Linear(layer, layer.weight.detach().contiguous(), layer.data())
        for name, layer in layers.items()
    }


def test_dense_logits_are_the_models(dense):
    ids = tiny_model.windows(2, 0)
    found = Llama(dense, ids.shape[1], torch.float32, {}).logits(ids)
    assert torch.allclose(found, dense(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("mitigation", [(), ("var",), ("ls", "lpts", "var"), ("rsparse-4-fit",), ("rsparse-4", "ls")])
@pytest.mark.parametrize("pattern", ["2:4", "10:16", "2:4+1"])
def test_every_layer_computes_what_the_sparse_layer_does(dense, pattern, mitigation):
    linears = linears_of(sparse_model(dense, pattern, mitigation))
    assert len(linears) == 14
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    for linear in linears.values():
        inputs = x[..., : linear.layer.in_features]
        assert torch.allclose(linear(inputs), linear.layer(inputs), atol=1e-5)


@pytest.mark.parametrize(("mitigation", "what"), [((), "weights"), (("ls", "lpts", "var"), "data")])
def test_training_lowers_the_held_out_loss(dense, mitigation, what):
    model = sparse_model(dense, mitigation=mitigation)
    held_out = tiny_model.windows(8, 1)
    before = held_out_losses(model, dense, held_out)
    steps = []
    found = train_graphed(
        model,
        dense,
        tiny_model.windows(120, 0),
        held_out,
        steps=40,
        batch=4,
        what=what,
        rate=2e-3,
        progress=lambda *each: steps.append(each[0]),
        dtype=torch.float32,
    )
    assert steps == [1, 2, 16]
    assert found.kept
    assert found.before == pytest.approx(sum(before) / 8, rel=1e-3)
    assert sum(held_out_losses(model, dense, held_out)) / 8 == pytest.approx(found.after, rel=1e-3)
    assert found.after < found.before
    assert len(found.history) == quality_training.CHECKS


def test_what_only_names_is_wanted_and_what_is_done_is_not_left():
    session = SimpleNamespace(options=SimpleNamespace(only=r"blocks act\+ls 2:4|tasks"), done={("float32", "x", "c4")})
    assert Session.wants(session, "blocks", "act+ls 2:4")
    assert Session.wants(session, "tasks", "wanda 2:4")
    assert not Session.wants(session, "blocks", "act+ls+lpts 2:4")
    variant = SimpleNamespace(name="x")
    assert not Session.rows_left(session, variant, ["c4"], [])
    assert Session.rows_left(session, variant, ["c4"], ["piqa"])
    assert Session.rows_left(session, variant, ["c4", "code"], [])


def test_answers_survive_packing():
    answers = [[([1, 2, 3], 1), ([1, 2, 4, 5], 2)], [([7], 1), ([7, 8], 1), ([9], 1)], [([1, 2, 3], 3)]]
    tensors = {f"task.{name}": value.to(torch.uint16) for name, value in quality_data.packed(answers).items()}
    tensors["task.right"] = torch.tensor([1, 2, 0])
    assert tensors["task.ids"].numel() < sum(len(ids) for document in answers for ids, _ in document)
    assert quality_data.unpacked(tensors, "task") == (answers, [1, 2, 0])
