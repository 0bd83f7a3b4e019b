"""End-to-end training on the dense model's outputs: what is trained, what is kept, and what is refused."""

import json

import pytest
import tiny_model
import torch
from commands import ok, refused

import nm_act
from nm_act.integrations.checkpoints import load_model
from nm_act.lab.calibrate.distill import DistillSettings, distill, divergence, held_out_losses
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.recipe import Recipe


def sparse_model(dense, **fields):
    model = sparse_copy(dense, Recipe("2:4", **fields)).model
    for layer in model.modules():
        if isinstance(layer, nm_act.NMLinear) and layer.data():
            start = {
                name: torch.full_like(value, float(name == "column_scale")) for name, value in layer.data().items()
            }
            layer.set_data(**start)
    return model


@pytest.mark.parametrize(
    ("mitigation", "train"), [(["ls", "lpts", "var"], "data"), (["var"], "weights"), (["ls"], "both")]
)
def test_training_lowers_the_held_out_loss(dense, mitigation, train):
    model = sparse_model(dense, mitigation=mitigation)
    layers = [module for module in model.modules() if isinstance(module, nm_act.NMLinear)]
    weights = [layer.weight.clone() for layer in layers]
    teacher = {name: value.clone() for name, value in dense.state_dict().items()}
    settings = DistillSettings(steps=40, batch=4, train=train, learning_rate=2e-3, weight_rate=2e-4, checks=4)
    steps = []
    found = distill(
        model, dense, tiny_model.windows(160, 0), tiny_model.windows(6, 1), settings, lambda *each: steps.append(each)
    )
    assert found.kept, str(found)
    assert found.difference < -2 * found.stderr
    after = held_out_losses(model, dense, tiny_model.windows(6, 1))
    assert sum(after) / 6 == pytest.approx(found.after, rel=1e-5)
    assert found.after < found.before
    assert [step for step, _, _ in steps] == list(range(1, 41))
    changed = [not torch.equal(layer.weight, before) for layer, before in zip(layers, weights, strict=True)]
    assert all(changed) if train != "data" else not any(changed)
    assert all(torch.equal(value, teacher[name]) for name, value in dense.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "kept" in str(found)


def test_what_does_not_help_is_kept_out(dense):
    """A rate that destroys the model: the values from before come back, to the bit."""
    model = sparse_model(dense, mitigation=["ls", "lpts"])
    before = model(tiny_model.windows(1, 3)).logits
    settings = DistillSettings(steps=4, batch=1, learning_rate=30.0, checks=2)
    found = distill(model, dense, tiny_model.windows(4, 0), tiny_model.windows(3, 1), settings)
    assert not found.kept
    assert "kept out" in str(found)
    assert torch.equal(model(tiny_model.windows(1, 3)).logits, before)


def test_divergence_of_the_same_model_is_zero(dense):
    assert divergence(dense, dense, tiny_model.windows(2, 0)).abs().max() < 1e-6


def test_refusals(dense):
    plain = sparse_model(dense)
    with pytest.raises(ValueError, match=r"expected something to train \(data\), got sparse layers without it"):
        distill(plain, dense, tiny_model.windows(2, 0), tiny_model.windows(2, 1))
    with pytest.raises(ValueError, match="expected held-out windows apart from those trained on"):
        distill(plain, dense, tiny_model.windows(4, 0), tiny_model.windows(2, 0)[:2])
    with pytest.raises(ValueError, match="at least 1 window to train on and 2 held out, got 4 and 1"):
        distill(plain, dense, tiny_model.windows(4, 0), tiny_model.windows(1, 1))
    with pytest.raises(ValueError, match="expected to train data, weights, both, got 'all'"):
        DistillSettings(train="all")
    with pytest.raises(ValueError, match="expected positive, finite numbers"):
        DistillSettings(steps=0)
    broken = sparse_model(dense, mitigation=["ls"])
    broken.model.embed_tokens = torch.nn.Embedding.from_pretrained(torch.full_like(dense.lm_head.weight, torch.nan))
    with pytest.raises(ValueError, match="expected a finite loss, got nan at step 1"):
        distill(broken, dense, tiny_model.windows(4, 0), tiny_model.windows(2, 1))


def test_command(folder, tmp_path):
    """Data end to end: a calibration. Weights: a checkpoint of its own, which loads sparse."""
    words, text = tiny_model.TEXT.split(), tmp_path / "text.txt"
    text.write_text(" ".join(words[index] for index in torch.randperm(len(words)).tolist()))  # no window twice
    small = ("--data", text, "--windows", 12, "--length", 32, "--distill", 2)
    (tmp_path / "data.yaml").write_text("pattern: 2:4\nmitigation: [ls, lpts]\n")
    made = tmp_path / "data"
    ok("calibrate", folder, "--recipe", tmp_path / "data.yaml", *small, "--output", made, "--no-checkpoint")
    facts = json.loads((made / "calibration.json").read_text())
    assert facts["windows"] == 12
    assert facts["end_to_end"]["steps"] == 2
    assert {"kept", "before", "after", "difference", "stderr"} <= set(facts["end_to_end"])
    nm_act.load_calibration(load_model(folder)[0], made)
    (tmp_path / "plain.yaml").write_text("pattern: 2:4\nmitigation: [var]\n")
    made = tmp_path / "weights"
    options = ("--recipe", tmp_path / "plain.yaml", *small, "--train", "weights")
    assert "a checkpoint with its own weights" in ok("calibrate", folder, *options, "--output", made)
    assert not (made / "calibration.safetensors").exists()
    model, _ = load_model(made)
    assert any(isinstance(module, nm_act.NMLinear) for module in model.modules())
    assert "expected a checkpoint for the weights" in refused(
        "calibrate", folder, *options, "--output", tmp_path / "x", "--no-checkpoint"
    )
    plain = ("calibrate", folder, "--recipe", tmp_path / "plain.yaml", "--data", text, "--output", tmp_path / "x")
    assert "expected --distill beside --train weights, got none" in refused(*plain, "--train", "weights")
    assert "expected a recipe with something to calibrate" in refused(*plain, "--distill", 2)
    few = ("--windows", 2, "--length", 32, "--distill", 2, "--train", "weights")
    assert "expected at least 3 windows, 2 of them held out, got 2" in refused(*plain, *few)
