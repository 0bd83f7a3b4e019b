"""Gradients in whatever way a program needs them: autocast, checkpoints, compile, second derivatives, torch.func."""

import itertools
import warnings

import pytest
import torch
from conftest import assert_same_bits
from gradient_cases import (
    IN,
    LAYOUTS,
    OPS,
    OUT,
    SHIFTS,
    assert_near,
    formula,
    gradients,
    in_float64,
    kind_of,
    loss_of,
    operator,
    tensors,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import nm_act
from nm_act.patterns import NMPattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 3), (2, 10)])
def test_values_are_the_same_bits_with_and_without_a_gradient(tokens, dtype):
    for shift, layout in itertools.product(SHIFTS, LAYOUTS):
        named = tensors(shift, tokens=tokens, layout=layout, dtype=dtype)
        y = operator(named, NMPattern("2:4"), kind_of(shift), True)
        assert y.requires_grad
        with torch.no_grad():
            assert_same_bits(y.detach(), operator(named, NMPattern("2:4"), kind_of(shift), True))


def test_only_what_is_needed_is_multiplied():
    """One product of 2 * tokens * in * out operations for x, one for the weight, none for a bias."""
    from torch.utils.flop_counter import FlopCounterMode

    product = 2 * 60 * IN * OUT
    for needed, products in ((["x"], 1), (["weight"], 1), (["bias"], 0), (["x", "weight", "bias"], 2)):
        named = {name: value.detach() for name, value in tensors("none", tokens=(3, 20)).items()}
        for name in needed:
            named[name].requires_grad_()
        y = operator(named, NMPattern("2:4"), "none", False)
        with FlopCounterMode(display=False) as counter:
            y.backward(torch.ones_like(y))
        assert counter.get_total_flops() == products * product
        assert {name for name, value in named.items() if value.grad is not None} == set(needed)


def test_what_is_kept_is_x_and_the_weight():
    named = tensors("mean", tokens=(3, 20))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
        operator(named, NMPattern("8:16"), "mean", True)
    expected = [named[name] for name in ("x", "weight", "column_scale")]
    assert {each.data_ptr() for each in kept} == {each.data_ptr() for each in expected}
    assert len(kept) == 3


def test_gradients_that_are_not_contiguous_and_inputs_of_any_rank():
    weight = torch.randn(OUT, IN)
    for shape in ((IN,), (4, IN), (2, 1, 3, 2, IN), (0, IN), (2, 0, IN)):
        x = torch.randn(shape, requires_grad=True)
        y = OPS.sparse_linear(x, weight, variance_correction=True, token_shift="mean")
        upstream = torch.randn(*shape[:-1], OUT, 2)[..., 0]
        (actual,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(y, x, upstream.contiguous())
        assert torch.equal(actual, expected)
        assert actual.shape == shape
    x = torch.randn(3, IN, requires_grad=True)
    OPS.sparse_linear(x, weight).sum().backward()  # an expanded gradient, of strides 0
    (expected,) = torch.autograd.grad(OPS.sparse_linear(x, weight), x, torch.ones(3, OUT))
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(use_reentrant):
    named = tensors("mean", tokens=(2, 10))
    expected = gradients(operator(named, NMPattern("8:16"), "mean", True), named)

    def function(*values):
        return operator(dict(zip(named, values, strict=True)), NMPattern("8:16"), "mean", True)

    loss_of(checkpoint(function, *named.values(), use_reentrant=use_reentrant)).backward()
    for name, leaf in named.items():
        assert torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize("backward_inside", [False, True])
def test_a_backward_pass_under_autocast_keeps_float32(backward_inside):
    named = tensors("none")
    expected = gradients(operator(named, NMPattern("2:4"), "none", False), named)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(operator(named, NMPattern("2:4"), "none", False))
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    for name, leaf in named.items():
        assert torch.equal(leaf.grad, expected[name])


@pytest.mark.parametrize("shift", SHIFTS)
def test_second_derivatives(shift):
    named, token_shift = tensors(shift, tokens=(2, 10)), kind_of(shift)
    with torch.no_grad():
        named["x"].view(-1, IN)[0] = torch.randn(IN, generator=torch.Generator().manual_seed(5))
    exact = in_float64(named)
    found = []
    for leaves, y in (
        (named, operator(named, NMPattern("2:4"), token_shift, True)),
        (exact, formula(exact, NMPattern("2:4"), token_shift, True)),
    ):
        first = torch.autograd.grad((y * y).sum(), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum((each * each).sum() for each in first), list(leaves.values())))
    for name, actual, expected in zip(named, *found, strict=True):
        assert_near(actual, expected, 1e-4, name)


def test_a_compiled_training_step_is_one_graph():
    weight, scale = torch.randn(OUT, IN), torch.rand(OUT)

    def step(x, weight):
        y = OPS.sparse_linear(
            torch.relu(x), weight, None, 8, 16, token_shift="mean", variance_correction=True, column_scale=scale
        )
        return (y * OPS.prune(y, 2, 4)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 9, 21):
        x = torch.randn(tokens, IN)
        found = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            found.append(torch.autograd.grad(function(*leaves), leaves))
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_operators_that_record_a_gradient_pass_opcheck():
    named = tensors("mean given", tokens=(2, 3))
    options = {"token_shift": "mean", "shift_out": named["shift_out"], "variance_correction": True}
    arguments = (named["x"], named["weight"], named["bias"], 8, 16)
    torch.library.opcheck(OPS.sparse_linear.default, arguments, options | {"column_scale": named["column_scale"]})
    torch.library.opcheck(OPS.prune.default, (named["x"], 2, 4), {"token_shift": "mean", "extra_columns": [1]})
    torch.library.opcheck(OPS.gather_linear.default, (named["x"], named["weight"], named["bias"]))
    torch.library.opcheck(OPS.dense_linear.default, (named["x"], named["weight"].contiguous(), named["bias"]))


# ---- torch.func and forward mode ---------------------------------------------------------------------------------------
FUNCTIONS = {
    "sparse_linear": lambda x, weight: OPS.sparse_linear(x, weight, token_shift="mean", variance_correction=True),
    "gather_linear": lambda x, weight: OPS.gather_linear(x, weight),
    "dense_linear": lambda x, weight: OPS.dense_linear(x, weight.contiguous()),
    "prune": lambda x, weight: OPS.prune(x, 2, 4, token_shift="median") @ weight.t(),
    "nm_act.sparse_linear": lambda x, weight: nm_act.sparse_linear(x, weight, None, "8:16"),
}


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    x, tangent = (torch.randn(2, 3, IN, generator=generator) for _ in range(2))
    return x, tangent, torch.randn(IN, OUT, generator=generator).t()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_torch_func_agree_with_backward(name, problem):
    x, tangent, weight = problem
    loss = lambda x: FUNCTIONS[name](x, weight).square().sum()  # noqa: E731
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_near(torch.func.grad(loss)(x), expected, 1e-5)
    along = (expected * tangent).sum()
    assert_near(torch.func.jvp(loss, (x,), (tangent,))[1], along, 1e-4)
    with torch.no_grad():
        assert_near(torch.func.jvp(loss, (x,), (tangent,))[1], along, 1e-4)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x, tangent))
        assert_near(forward_ad.unpack_dual(dual).tangent, along, 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: it calls the operator once per sample
        assert_near(torch.vmap(torch.func.grad(loss))(x), expected, 1e-5)
        function = lambda x: FUNCTIONS[name](x, weight)  # noqa: E731
        torch.testing.assert_close(torch.vmap(function)(x), function(x))
        rows, columns = (mode(function)(x[0]) for mode in (torch.func.jacrev, torch.func.jacfwd))
    assert rows.abs().sum() > 0
    torch.testing.assert_close(rows, columns, rtol=1e-4, atol=1e-5)
