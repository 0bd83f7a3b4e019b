"""Layers that keep their weight in oneDNN's layout too: the same outputs, up to date, and never where they do not belong."""

import copy
import pickle

import pytest
import torch
from torch import nn

import nm_act
from nm_act.layers.work import compiled_operator
from nm_act.ops import prepack

pytestmark = pytest.mark.skipif(
    bool(prepack.why_not_prepacked(torch.empty(1))), reason="this torch was built without oneDNN"
)

SPECS = [
    nm_act.LinearSpec("8:16"),
    nm_act.LinearSpec("2:4", criterion="wina"),
    nm_act.LinearSpec("2:4+1", mitigation=["var"]),
    nm_act.LinearSpec("8:16", mitigation=["dpts-mean", "var"]),
    nm_act.LinearSpec("1:4", criterion="clact"),
]


def _dtypes():
    found = (torch.float32, torch.bfloat16, torch.float16)
    return [dtype for dtype in found if not prepack.why_not_prepacked(torch.empty(1, dtype=dtype))]


def _layer(spec, dtype=torch.float32, bias=True):
    linear = nn.Linear(64, 48, bias=bias).to(dtype).requires_grad_(False)
    return nm_act.NMLinear.from_linear(linear, spec)


def _prepacked(layer):
    layer.prepack = True
    layer.refresh()
    assert layer.prepacked_weight is not None
    return layer


@pytest.mark.parametrize("dtype", _dtypes(), ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@torch.no_grad()
def test_same_outputs_for_any_number_of_tokens(spec, bias, dtype):
    plain = _layer(spec, dtype, bias)
    layer = _prepacked(copy.deepcopy(plain))
    for tokens in (0, 1, 2, 3, 4, 5, 13, 40):
        x = torch.randn(tokens, 64, dtype=dtype)
        expected = plain(x)
        y = layer(x)
        assert y.shape == expected.shape
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_strided_bias():
    weight, bias = torch.randn(48, 64).t().contiguous().t(), torch.randn(96)[::2]
    for tokens in (1, 3, 9):
        x = torch.randn(tokens, 64)
        y = torch.ops.nm_act.sparse_linear_prepacked(x, weight, prepack.prepack_weight(weight), bias, 8, 16)
        torch.testing.assert_close(y, nm_act.sparse_linear(x, weight, bias, "8:16"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_calibrated_shift_scale_and_low_rank():
    spec = nm_act.LinearSpec("8:16", mitigation=["spts", "ls", "rsparse-4"])
    plain = _layer(spec)
    data = {name: torch.randn_like(value) for name, value in plain.data().items()}
    plain.set_data(**data)
    layer = _prepacked(copy.deepcopy(plain))
    x = torch.randn(9, 64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "dtype", "most"),
    [("8:16", torch.float32, 2), ("8:16", torch.bfloat16, 3), ("1:4", torch.bfloat16, 4), ("6:8", torch.bfloat16, 1)],
)
@torch.no_grad()
def test_rows_are_skipped_while_that_pays(pattern, dtype, most):
    """A prepacked copy of another weight shows which of the two a call multiplies."""
    if dtype not in _dtypes():
        pytest.skip("oneDNN has no product in that dtype here")
    weight = torch.randn(48, 64, dtype=dtype).t().contiguous().t()
    other = prepack.prepack_weight(torch.zeros(48, 64, dtype=dtype))
    made = nm_act.NMPattern(pattern)
    for tokens in range(1, 7):
        x = torch.randn(tokens, 64, dtype=dtype)
        y = torch.ops.nm_act.sparse_linear_prepacked(x, weight, other, None, made.keep, made.group)
        assert bool(y.any()) == (tokens <= most), tokens


@torch.no_grad()
def test_follows_the_weight():
    layer, x = _prepacked(_layer(SPECS[0])), torch.randn(9, 64)

    def expected():
        return nm_act.sparse_linear(x, layer.weight, layer.bias, "8:16")

    layer(x)
    layer._parameters["weight"].mul_(2)
    torch.testing.assert_close(layer(x), expected())
    layer.weight.data.mul_(3)
    torch.testing.assert_close(layer(x), expected())
    layer.weight = nn.Parameter(torch.randn(48, 64))
    torch.testing.assert_close(layer(x), expected())
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), expected())
    lent = {"weight": torch.randn(48, 64)}
    y = torch.func.functional_call(layer, lent, (x,))
    torch.testing.assert_close(y, nm_act.sparse_linear(x, lent["weight"], layer.bias, "8:16"))
    torch.testing.assert_close(layer(x), expected())


@torch.no_grad()
def test_follows_a_move_and_a_conversion():
    layer, x = _prepacked(_layer(SPECS[0])), torch.randn(9, 64)
    if torch.bfloat16 in _dtypes():
        layer.to(torch.bfloat16)
        assert layer.prepacked_weight.dtype == torch.bfloat16
        layer(x.bfloat16())
    layer.to("meta")
    assert layer.prepacked_weight is None


@torch.no_grad()
def test_copies_and_pickles_have_their_own():
    layer, x = _prepacked(_layer(SPECS[0])), torch.randn(9, 64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.prepacked_weight is not None
        assert torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_training_and_autocast_leave_it_aside():
    layer, x = _prepacked(_layer(SPECS[0])), torch.randn(9, 64, requires_grad=True)
    layer(x).sum().backward()  # a frozen layer in front of an adapter
    expected = torch.zeros_like(x)
    kept = nm_act.prune(x.detach(), "8:16") != 0
    expected[kept] = layer.weight.detach().sum(0).expand_as(x)[kept]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    layer.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer._parameters["weight"].grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x.detach()).dtype == torch.bfloat16


def test_compiles_to_one_graph(graphs):
    layer = _prepacked(_layer(SPECS[0]))
    compiled = torch.compile(layer, backend=graphs.backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 9, 33):
            x = torch.randn(tokens, 64)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


def test_refused_weights():
    weight, x = torch.randn(48, 64), torch.randn(9, 64)
    for wrong in (weight, prepack.prepack_weight(torch.randn(64, 64)), torch.tensor(12345)):  # not an address either
        with pytest.raises(ValueError, match="expected prepacked_weight as oneDNN's layout of the weight"):
            torch.ops.nm_act.sparse_linear_prepacked(x, weight, wrong, None, 8, 16)
    assert "oneDNN computes on CPUs" in prepack.why_not_prepacked(torch.empty(1, device="meta"))
    assert "no product in float64" in prepack.why_not_prepacked(torch.empty(1, dtype=torch.float64))


def test_is_off_by_default():
    layer = _layer(SPECS[0])
    assert layer.prepacked_weight is None
    assert layer.work(layer.weight).operator is compiled_operator
