"""Gradients of the operators: against formulas in float64, their edges, refusals."""

import itertools
import subprocess
import sys

import pytest
import torch
from conftest import assert_same_bits
from gradient_cases import (
    IN,
    LAYOUTS,
    OPS,
    OUT,
    PATTERNS,
    SHIFTS,
    assert_near,
    formula,
    gradients,
    in_float64,
    kind_of,
    operator,
    tensors,
)

import nm_act
from nm_act import reference
from nm_act.ops import composed
from nm_act.patterns import NMPattern, TopKPattern


# ---- right -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("variance_correction", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient_of_every_argument_equals_the_formula_in_float64(pattern, variance_correction, shift):
    pattern, token_shift = NMPattern(pattern), kind_of(shift)
    scales = (None, torch.rand(IN, generator=torch.Generator().manual_seed(1)))
    for layout, tokens, scale in itertools.product(LAYOUTS, ((1, 1), (2, 3), (2, 10)), scales):
        named = tensors(shift, tokens=tokens, layout=layout)
        exact = in_float64(named)
        expected = gradients(formula(exact, pattern, token_shift, variance_correction, scale), exact)
        actual = gradients(operator(named, pattern, token_shift, variance_correction, scale), named)
        for name, gradient in actual.items():
            assert gradient.shape == named[name].shape
            assert_near(gradient, expected[name], 1e-5, name)
        assert actual["weight"].stride() == named["weight"].stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", ["none", "mean", "static"])
def test_gradient_in_16_bits(dtype, shift):
    token_shift = kind_of(shift)
    named = tensors(shift, tokens=(2, 10), dtype=dtype)
    exact = in_float64(named)
    z = reference.shifted(named["x"].detach(), named.get("shift"), token_shift)
    unrounded = reference.shifted(exact["x"], exact.get("shift"), token_shift)
    masks = [reference.selection_mask(each, NMPattern("2:4")) for each in (z, unrounded)]
    assert torch.equal(*masks)  # or the formula would choose others
    expected = gradients(formula(exact, NMPattern("2:4"), token_shift, True), exact)
    actual = gradients(operator(named, NMPattern("2:4"), token_shift, True), named)
    for name, gradient in actual.items():
        assert gradient.dtype == named[name].dtype
        assert_near(gradient, expected[name], 2e-2 if dtype == torch.bfloat16 else 3e-3, name)


def test_a_gradient_by_hand():
    x = torch.tensor([[1.0, -3.0, 2.0, 0.5]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    OPS.sparse_linear(x, weight, bias).backward(torch.tensor([[1.0, 10.0]]))
    assert x.grad.tolist() == [[0.0, 62.0, 73.0, 0.0]]
    assert weight.grad.tolist() == [[0.0, -3.0, 2.0, 0.0], [0.0, -30.0, 20.0, 0.0]]
    assert bias.grad.tolist() == [1.0, 10.0]


@pytest.mark.parametrize("pattern", [*PATTERNS, "50%"])
@pytest.mark.parametrize("variance_correction", [False, True])
@pytest.mark.parametrize("shift", SHIFTS)
def test_gradcheck_of_the_composed_form_in_float64(shift, variance_correction, pattern):
    named = in_float64(tensors(shift, tokens=(2, 1), out=4))
    with torch.no_grad():  # a step of gradcheck must not move a survivor: no ties
        named["x"].add_(torch.linspace(0.1, 0.9, IN).double().square())
    pattern = TopKPattern(50) if pattern == "50%" else NMPattern(pattern)
    options = {"token_shift": kind_of(shift), "variance_correction": variance_correction}

    def function(*values):
        given = dict(zip(named, values, strict=True))
        x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
        return composed.sparse_linear(x, weight, bias, pattern, **options, **given)

    assert torch.autograd.gradcheck(function, tuple(named.values()), check_forward_ad=True)


@pytest.mark.parametrize("token_shift", ["none", "mean", "median"])
def test_gradient_of_prune(token_shift):
    x = torch.randn(3, 2, IN, requires_grad=True)
    upstream = torch.randn(3, 2, IN)
    (actual,) = torch.autograd.grad(OPS.prune(x, 8, 16, token_shift=token_shift), x, upstream)
    exact = x.detach().double().requires_grad_()
    z = reference.shifted(exact, None, token_shift)
    mask = reference.selection_mask(z.detach().float(), NMPattern("8:16"))
    (expected,) = torch.autograd.grad(z * mask, exact, upstream.double())
    assert_near(actual, expected, 1e-5)
    if token_shift == "none":
        assert torch.equal(actual, upstream * mask)


@pytest.mark.parametrize("op", ["gather_linear", "dense_linear"])
def test_gradient_of_few_tokens_is_that_of_a_dense_layer(op):
    x, weight, bias = torch.relu(torch.randn(2, 3, IN)), torch.randn(IN, OUT).t(), torch.randn(OUT)
    weight = weight.contiguous() if op == "dense_linear" else weight
    named = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}
    exact = in_float64(named)
    expected = gradients(torch.nn.functional.linear(*exact.values()), exact)
    for name, gradient in gradients(getattr(OPS, op)(*named.values()), named).items():
        assert_near(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_mask_counts_survivors_that_are_zero(pattern, scaled):
    generator = torch.Generator().manual_seed(2)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3e38, 1e-45, -1.0, -float("inf")]).repeat(IN // 8)
    z = torch.stack([
        torch.zeros(IN), odd, *torch.randint(-2, 3, (9, IN), generator=generator).float(), odd.flip(0), 1e-40 * odd,
    ])  # fmt: skip
    scale = torch.randint(0, 3, (IN,), generator=generator).float() * 1e2 if scaled else None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = composed.survivors(z.to(dtype), NMPattern(pattern), scale)
        assert torch.equal(mask, reference.selection_mask(z.to(dtype), NMPattern(pattern), scale))


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_variance_correction_of_a_constant_token_has_a_finite_gradient(value):
    x = torch.full((2, IN), value)
    x[1] = torch.linspace(-1, 1, IN)
    weight = torch.randn(OUT, IN)
    for function in (
        lambda x: OPS.sparse_linear(x, weight, variance_correction=True),
        lambda x: composed.sparse_linear(x, weight, None, NMPattern("2:4"), variance_correction=True),
    ):
        leaf = x.clone().requires_grad_()
        function(leaf).sum().backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1].abs().sum() > 0


# ---- refused -----------------------------------------------------------------------------------------------------------
REFUSED = {
    "compress": (lambda x: nm_act.compress(x)[0], "nm_act.prune"),
    "decompress": (lambda x: nm_act.decompress(x, torch.full((2, 3, 8), 0x44, dtype=torch.uint8)), "nm_act.prune"),
    "sparse_linear with weight_scale": (
        lambda x: nm_act.sparse_linear(x, torch.ones(OUT, IN, dtype=torch.int8), weight_scale=torch.ones(OUT)),
        "nm_act.sparse_linear with a weight in the dtype of x",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_says_so(name):
    function, instead = REFUSED[name]
    x = torch.randn(2, 3, IN, requires_grad=True)
    sentence = f"expected no gradient through nm_act::{name}, got an input that requires one; use {instead}"
    y = function(x)
    assert y.requires_grad
    with pytest.raises(RuntimeError, match=sentence):
        y.sum().backward()
    for transform in (torch.func.grad, lambda f: torch.func.jvp(f, (x.detach(),), (x.detach(),))):
        with pytest.raises(RuntimeError, match=sentence):
            transform(lambda x: function(x).sum())(x.detach())
    assert not function(x.detach()).requires_grad
    with torch.no_grad():
        assert_same_bits(function(x), y.detach())


def test_the_operators_have_their_gradient_whatever_else_is_imported():
    program = (
        "import torch, nm_act\n"
        "x, w = torch.randn(3, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)\n"
        "nm_act.sparse_linear(x, w).sum().backward()\n"
        "kept = nm_act.prune(x.detach(), '2:4') != 0\n"
        "assert torch.allclose(x.grad, torch.where(kept, w.detach().sum(0), 0.0), atol=1e-6), x.grad\n"
        "x.grad = None\n"
        "nm_act.prune(x, '2:4').sum().backward()\n"
        "assert torch.equal(x.grad, kept.float()), x.grad\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_gradient_of_a_column_scale_does_not_overflow_in_float16():
    x, weight = torch.full((5, 64), 250.0).half(), torch.full((16, 64), 10.0).half()
    scale = torch.full((16,), 0.25, requires_grad=True)
    y = nm_act.sparse_linear(x, weight, pattern="8:16", column_scale=scale)
    y.backward(torch.full_like(y, 0.01))
    # 32 survivors x 250 x 10 is 80 000, beyond float16; five tokens, each with a gradient of 0.01 in float16.
    expected = 5 * 80_000.0 * torch.tensor(0.01).half().float()
    torch.testing.assert_close(scale.grad, expected.expand(16), rtol=1e-5, atol=0.0)
