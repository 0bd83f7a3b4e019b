"""Weights refitted to pruned inputs: the solution, what is kept, and what is refused."""

import pytest
import tiny_model
import torch
from quality_refit import RefitSettings, refit, ridge

import nm_act
from nm_act.lab.evaluate.variants import sparse_copy
from nm_act.recipe import Recipe

WINDOWS = torch.randint(0, 300, (14, 32), generator=torch.Generator().manual_seed(0))


def test_ridge_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(0)
    p, t = torch.randn(200, 16, generator=generator).double(), torch.randn(200, 4, generator=generator).double()
    weight = torch.randn(4, 16, generator=generator).double()
    found = ridge(weight, p.t() @ p, (t - p @ weight.t()).t() @ p, 1e-9)
    assert torch.allclose(found, torch.linalg.lstsq(p, t).solution.t(), atol=1e-6)
    assert torch.allclose(ridge(weight, p.t() @ p, (t - p @ weight.t()).t() @ p, 1e9), weight, atol=1e-6)


@pytest.mark.parametrize("settings", [{"target": "own"}, {"target": "dense", "relative": True}, {"first_tokens": 1}])
def test_layers_errors_fall_and_only_those_that_do_are_kept(settings):
    dense, _ = tiny_model.build()
    model, reference = (sparse_copy(dense, Recipe("2:4")).model for _ in range(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    report = refit(model, reference, WINDOWS, RefitSettings(held_out=4, **settings), lambda *each: done.append(each))
    assert done == [(1, 2), (2, 2)]
    assert len(report) == 14
    assert any(row["kept"] for row in report)
    for row in report:
        assert row["kept"] == (row["difference"] < -2 * row["stderr"])
        assert torch.equal(model.get_submodule(row["layer"]).weight, before[f"{row['layer']}.weight"]) != row["kept"]
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_a_refit_that_raises_the_held_out_error_is_kept_out():
    """A fit of 96 inputs to as many tokens."""
    dense, _ = tiny_model.build()
    model, reference = (sparse_copy(dense, Recipe("2:4")).model for _ in range(2))
    report = refit(model, reference, WINDOWS[:7], RefitSettings(strength=1e-4, target="own", held_out=4))
    assert not all(row["kept"] for row in report)
    for row in report:
        if not row["kept"]:
            layer = model.get_submodule(row["layer"])
            assert torch.equal(layer.weight, dense.get_submodule(row["layer"]).weight)
            assert isinstance(layer, nm_act.NMLinear)


def test_refusals():
    weight, eye = torch.zeros(2, 4), torch.eye(4).double()
    with pytest.raises(ValueError, match="expected finite Gram matrices, got infinities or NaN"):
        ridge(weight, eye * torch.nan, torch.zeros(2, 4).double(), 1.0)
    with pytest.raises(ValueError, match="expected a Gram matrix that its ridge makes invertible, got a singular one"):
        ridge(weight, eye * 0, torch.zeros(2, 4).double(), 1.0)
    with pytest.raises(ValueError, match="expected a positive, finite strength of the ridge, got 0"):
        RefitSettings(strength=0)
    with pytest.raises(ValueError, match="expected a target among own, dense, got 'mine'"):
        RefitSettings(target="mine")
    dense, _ = tiny_model.build()
    model = sparse_copy(dense, Recipe("2:4")).model
    with pytest.raises(ValueError, match="at least 96 tokens to fit as many inputs, got 12 and 64"):
        refit(model, model, WINDOWS, RefitSettings(held_out=12))
