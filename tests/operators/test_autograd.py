"""Gradients of the operators: against formulas in float64, their edges, refusals, torch.func, compile, checkpointing."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import assert_same_bits
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import nm_act
from nm_act import reference
from nm_act.ops import composed
from nm_act.patterns import NMPattern, TopKPattern

OPS = torch.ops.nm_act
IN, OUT = 32, 24
PATTERNS = ("2:4", "8:16", "2:4+1")
LAYOUTS = ("in_out", "out_in")
SHIFTS = ("none", "mean", "median", "static", "static given", "mean given")


def kind_of(shift):
    """The operator's token_shift in a case of SHIFTS."""
    return "none" if "static" in shift else shift.split()[0]


def tensors(shift, *, tokens=(2, 3), layout="in_out", dtype=torch.float32, out=OUT):
    """Operands of sparse_linear; one token has a single value that is not 0."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x = draw(*tokens, IN)
    x.view(-1, IN)[0] = torch.where(torch.arange(IN) == 5, 1.5, 0.0)
    weight = draw(IN, out).t() if layout == "in_out" else draw(out, IN)
    named = {"x": x, "weight": weight, "bias": draw(out), "column_scale": draw(out)}
    if "static" in shift:
        named["shift"] = draw(IN)
    if "given" in shift:
        named["shift_out"] = draw(out)
    return {name: value.to(dtype).requires_grad_() for name, value in named.items()}


def formula(named, pattern, token_shift, variance_correction, scale=None):
    """sparse_linear in float64 from its definition, the mask from the oracle."""
    x, weight = named["x"], named["weight"]
    eta, image = None, named.get("shift_out")
    if token_shift == "mean":
        eta, image = x.mean(dim=-1, keepdim=True), weight.sum(dim=1) if image is None else image
    elif token_shift == "median":
        eta, image = x.median(dim=-1, keepdim=True).values, weight.sum(dim=1) if image is None else image
    elif "shift" in named:
        image = weight @ named["shift"] if image is None else image
    z = x - (named.get("shift", 0.0 if eta is None else eta))
    p = z * reference.selection_mask(z.detach().float(), pattern, scale)
    y = p @ weight.t()
    if variance_correction:
        total, kept = z.var(dim=-1, correction=0, keepdim=True), p.var(dim=-1, correction=0, keepdim=True)
        y = y * (total / kept).sqrt()
    if image is not None:
        y = y + (image if eta is None else eta * image)
    return y * named["column_scale"] + named["bias"]


def operator(named, pattern, token_shift, variance_correction, scale=None, **options):
    keywords = {name: named[name] for name in ("shift", "shift_out", "column_scale") if name in named}
    return OPS.sparse_linear(
        named["x"],
        named["weight"],
        named["bias"],
        pattern.keep,
        pattern.group,
        channel_scale=scale,
        token_shift=token_shift,
        variance_correction=variance_correction,
        extra_columns=pattern.extra_columns,
        **keywords,
        **options,
    )


def loss_of(y):
    """Not linear in y."""
    return (y * y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view(y.shape)).sum()


def gradients(y, named):
    return dict(zip(named, torch.autograd.grad(loss_of(y), list(named.values())), strict=True))


def assert_near(actual, expected, limit, what=""):
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < limit, f"{what}: relative error {error:.1e}"


def in_float64(named):
    return {name: value.detach().double().requires_grad_() for name, value in named.items()}


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


# ---- in whatever way it is asked for -----------------------------------------------------------------------------------
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


def test_every_operator_either_has_a_gradient_or_refuses():
    from nm_act.ops import e4m3  # noqa: F401  (it defines one of its own)
    from nm_act.ops.autograd import WITHOUT_GRADIENT
    from nm_act.ops.library import OPERATORS

    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("nm_act::")}
    assert names == {"prune", "sparse_linear", "gather_linear", "dense_linear", *WITHOUT_GRADIENT}
    assert names == {"e4m3_linear", *OPERATORS}
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nm_act::{name}", "Autograd")


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
