"""What a difference of perplexities means: paired errors, and the noise of rounding."""

import math

import pytest
import tiny_model
import torch
from quality_noise import noise_floor, perturbed

from nm_act.lab.evaluate.perplexity import paired_difference
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.recipe import Recipe

TOKENS = torch.arange(256) % 300


def test_pairs_remove_what_windows_have_in_common():
    theirs = [1.0, 2.0, 3.0, 4.0]
    mean, stderr = paired_difference([value + 0.1 + 0.01 * i for i, value in enumerate(theirs)], theirs)
    assert mean == pytest.approx(0.115)
    assert stderr == pytest.approx(math.sqrt(sum((0.01 * i - 0.015) ** 2 for i in range(4)) / 3) / 2)
    assert stderr < 0.01  # the losses alone spread by 1.3


def test_perturbations_are_seeded_small_and_removed():
    model, _ = tiny_model.build()
    plain = model(TOKENS[None, :32]).logits
    found = []
    for seed in (0, 0, 1):
        with perturbed(model, seed):
            found.append(model(TOKENS[None, :32]).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert 0 < (found[0] - plain).abs().max() < 1e-4
    assert torch.equal(model(TOKENS[None, :32]).logits, plain)


def test_a_sparse_model_amplifies_rounding():
    """Near ties that flip: the noise of a selection exceeds that of the dense model."""
    dense, _ = tiny_model.build()
    dense.lm_head.weight.data *= 100
    sparse = sparse_copy(dense, Recipe("8:16")).model
    with perturbed(sparse, 0, size=1e-3):  # a few ties, in so small a model
        changed = sparse(TOKENS[None, :64]).logits
    assert torch.isfinite(changed).all()
    deviation, largest = noise_floor(dense, TOKENS, 64, seeds=3)
    assert 0 <= deviation <= 2 * largest < 1e-3
    with pytest.raises(ValueError, match="expected at least 2 seeds"):
        noise_floor(dense, TOKENS, 64, seeds=1)
