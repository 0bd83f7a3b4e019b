"""Channel scales against formulas written anew in numpy."""

import numpy as np
import pytest
import torch
from criterion_formulas import FORMULAS

from nm_act.methods import criteria


def _weight(seed=0, out=48, features=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, features, generator=generator) * torch.rand(features, generator=generator)


def test_every_formula_is_written_anew():
    assert list(FORMULAS) == [name for name, each in criteria.CRITERIA.items() if each.formula is not None]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formula(name, dtype):
    weight = _weight().to(dtype)
    scale = criteria.channel_scale(name, weight)
    assert scale.dtype == torch.float32
    np.testing.assert_allclose(scale.numpy(), FORMULAS[name](weight.double().numpy()), rtol=2e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_scale_is_independent_of_the_memory_layout(name):
    weight = _weight(1, 256, 128)
    transposed = weight.t().contiguous().t()
    assert torch.equal(criteria.channel_scale(name, weight), criteria.channel_scale(name, transposed))


@pytest.mark.parametrize("alpha", [3.0, 1e-3])
@pytest.mark.parametrize("name", ["amber", "amber-channel"])
def test_amber_is_invariant_to_the_scale_of_the_weight(name, alpha):
    weight = _weight(2)
    expected = criteria.channel_scale(name, weight)
    torch.testing.assert_close(criteria.channel_scale(name, weight * alpha), expected, rtol=1e-5, atol=0)


def test_amber_of_a_constant_weight_ranks_all_channels_alike():
    for name in ("amber", "amber-channel"):
        assert torch.equal(criteria.channel_scale(name, torch.full((4, 8), 0.5)), torch.ones(8))


@pytest.mark.parametrize("name", ["act", "clact", "weight-magnitude", "wanda"])
def test_no_scale_derives_from_the_weight(name):
    assert criteria.channel_scale(name, _weight()) is None


@pytest.mark.parametrize("order", ["descending", "organ pipe"])
def test_quantiles_beyond_the_size_that_torch_takes_and_in_an_unlucky_order(order):
    count = 2**24 + 2
    values = torch.arange(count, dtype=torch.float32).flip(0)
    if order == "organ pipe":
        values = torch.cat([values[::2].flip(0), values[1::2]])
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.25)
    assert criteria._quantiles(values, (0.25, 1.0)) == [0.25 * (count - 1), count - 1]


def test_scale_of_a_parameter_needs_no_gradient():
    assert not criteria.channel_scale("wina", torch.nn.Parameter(_weight())).requires_grad


@pytest.mark.parametrize("name", ["CLACT", "ACT", None, ["act"]])
def test_unknown_criterion(name):
    with pytest.raises(ValueError, match=r"expected a criterion among act, clact, wina, .*, wanda, got .*; choose"):
        criteria.channel_scale(name, _weight())


def test_weight_is_a_matrix():
    with pytest.raises(ValueError, match=r"expected a weight \[out, in\], got 1 dimensions"):
        criteria.channel_scale("wina", torch.zeros(8))
