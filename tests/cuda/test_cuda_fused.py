"""The operators that fuse a layer's surroundings, against the separate ones: producers and the products of a decode step."""

import pytest
import torch
import torch.nn.functional as F
from cuda_cases import E4M3, GPU_MARKS, HALVES, HOPPER, adds_after, drawn, poison, rms_norm
from fused_formulas import activated
from linear_cases import relative_error

import nm_act
from nm_act import reference
from nm_act.ops import fused

pytestmark = GPU_MARKS

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "5:8", "8:16", "3:16", "24:32"]
CLOSE = 1.5e-2


def assert_pruned(values, dense, pattern):
    """``values`` is the selection of ``dense`` up to features whose rounding differs by the order of a sum."""
    expected = reference.prune(dense.flatten(0, -2), pattern)
    assert (values.float() != expected.float()).float().mean() < 2e-3
    group = nm_act.NMPattern(pattern).group
    most = (values.view(len(values), -1, group) != 0).sum(-1).max()
    assert most <= nm_act.NMPattern(pattern).keep


@pytest.mark.parametrize("features", [256, 4096, 6144, 16384])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_norm_then_prune(features, pattern):
    for dtype, residual in ((torch.bfloat16, True), (torch.float16, False)):
        x, weight = drawn(3, 11, features, dtype=dtype), drawn(features, dtype=dtype, seed=1)
        other = drawn(3, 11, features, dtype=dtype, seed=2) if residual else None
        poison()
        pruned = nm_act.ops.fused.rms_norm_prune(x, weight, 1e-5, other, pattern)
        total = x + other if residual else x
        assert torch.equal(pruned.hidden, total)
        assert pruned.row_scale.numel() == 0
        assert_pruned(pruned.values, rms_norm(total, weight, 1e-5), pattern)


@pytest.mark.parametrize("features", [256, 2560, 16384])
@pytest.mark.parametrize("pattern", ["2:4", "5:8", "8:16"])
@pytest.mark.parametrize("dtype", HALVES)
def test_norms_of_a_sandwich_layer_then_prune(features, pattern, dtype):
    """An offset of the weights, and a norm of x before the residual; or one weight for both norms."""
    x, other = drawn(3, 11, features, dtype=dtype), drawn(3, 11, features, dtype=dtype, seed=2)
    weight, before = drawn(features, dtype=dtype, seed=1), drawn(features, dtype=dtype, seed=3)
    for unit_offset, x_weight in ((True, None), (True, before), (False, before), (True, weight)):
        poison()
        options = {"unit_offset": unit_offset, "x_weight": x_weight}
        pruned = fused.rms_norm_prune(x, weight, 1e-5, other, pattern, **options)
        total = other + (x if x_weight is None else rms_norm(x, x_weight, 1e-5, unit_offset))
        assert (pruned.hidden != total).float().mean() < 2e-3
        assert_pruned(pruned.values, rms_norm(pruned.hidden, weight, 1e-5, unit_offset), pattern)
    alone = fused.rms_norm_prune(x, weight, 1e-5, None, pattern, unit_offset=True)
    assert_pruned(alone.values, rms_norm(x, weight, 1e-5, True), pattern)


@HOPPER
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("features", [256, 2560, 10240])
def test_producers_of_gemma_are_packed(fp8, features):
    x, other, up = (drawn(70, features, seed=seed) for seed in range(3))
    weight, before, wide = drawn(features, seed=3), drawn(features, seed=4), drawn(512, features, seed=5)
    scale = None
    if fp8:
        scale = wide.float().abs().amax(1) / 448
        wide = (wide.float() / scale[:, None]).to(E4M3)

    def product(operand):
        return nm_act.sparse_gemm(operand, wide, column_scale=scale, out_dtype=torch.bfloat16)

    def separate(z):
        return product(nm_act.compress_packed(z, activation_dtype=E4M3 if fp8 else None))

    for x_weight in (None, before):
        options = {"unit_offset": True, "x_weight": x_weight, "activation_dtype": E4M3 if fp8 else None}
        packed = nm_act.rms_norm_compress(x, weight, 1e-5, other, **options)
        total = other + (x if x_weight is None else rms_norm(x, x_weight, 1e-5, True))
        assert (packed.hidden != total).float().mean() < 2e-3
        assert relative_error(product(packed), separate(rms_norm(packed.hidden, weight, 1e-5, True))) < CLOSE
    gated = nm_act.silu_mul_compress(x, up, activation="gelu_tanh", activation_dtype=E4M3 if fp8 else None)
    assert relative_error(product(gated), separate(activated(x, "gelu_tanh") * up)) < CLOSE


@pytest.mark.parametrize("features", [64, 2560, 3072, 10240, 18944, 28672])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activation_then_prune(features, pattern, activation):
    for dtype in HALVES:
        both = drawn(7, 2 * features, dtype=dtype)
        gate, up = both.split(features, dim=-1)
        poison()
        merged = fused.silu_mul_prune(gate, up, pattern, activation=activation)
        assert_pruned(merged.values, activated(gate, activation) * up, pattern)
        apart = fused.silu_mul_prune(gate.contiguous(), up.contiguous(), pattern, activation=activation)
        assert torch.equal(apart.values, merged.values)


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_far_from_zero(dtype):
    gate = torch.linspace(-30, 30, 4096, device="cuda").to(dtype)[None]
    for large in (gate, 1000 * gate):
        values = fused.silu_mul_prune(large, torch.ones_like(large), "31:32", activation="gelu_tanh").values
        exact = F.gelu(large.double(), approximate="tanh")
        kept = values != 0
        torch.testing.assert_close(values.double()[kept], exact[kept], atol=1e-5, rtol=1e-2)
        # Zeros are the one of 32 that is pruned, or values that are too small: every other one was compared.
        whole = (exact.abs() > 1e-4).view(-1, 32).all(dim=1)
        assert whole.sum() >= 64  # all positive inputs
        assert (kept.view(-1, 32).sum(dim=1)[whole] == 31).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("features", [8, 256, 2560, 5000, 16384])
@pytest.mark.parametrize("tokens", [1, 37])
def test_norm_plus_residual(dtype, unit_offset, features, tokens):
    x, residual = (drawn(tokens, features, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = drawn(features, dtype=dtype, seed=2)
    poison()
    y = fused.rms_norm_add(x, weight, 1e-5, residual, unit_offset=unit_offset)
    expected = rms_norm(x, weight, 1e-5, unit_offset) + residual
    assert (y != expected).float().mean() < 2e-3
    assert relative_error(y, expected) < 1e-3
    apart = fused.rms_norm_add(x.repeat(1, 2)[:, :features], weight, 1e-5, residual, unit_offset=unit_offset)
    assert torch.equal(apart, y)


@pytest.mark.parametrize("pattern", ["2:4", "5:8", "8:16", "24:32"])
def test_pruned_in_e4m3(pattern):
    x, weight = drawn(33, 4096), drawn(4096, seed=1)
    pruned, coarse = (
        fused.rms_norm_prune(x, weight, 1e-5, None, pattern, activation_dtype=dtype) for dtype in (None, E4M3)
    )
    largest = pruned.values.float().abs().amax(1)
    torch.testing.assert_close(coarse.row_scale, largest / 448, rtol=1e-6, atol=0)
    expected = (pruned.values.float() / coarse.row_scale[:, None]).to(E4M3)
    assert (coarse.values.float() != expected.float()).float().mean() < 1e-4  # a reciprocal instead of a division
    gate, up = drawn(33, 6144, seed=2), drawn(33, 6144, seed=3)
    gated = fused.silu_mul_prune(gate, up, pattern, activation_dtype=E4M3)
    exact = fused.silu_mul_prune(gate, up, pattern).values.float()
    assert relative_error(gated.values.float() * gated.row_scale[:, None], exact) < 0.04


@HOPPER
@pytest.mark.parametrize("pattern", ["5:8", "8:16", "16:32", "1:4"])
@pytest.mark.parametrize("tokens", [1, 16, 17, 600])
def test_dense_e4m3_product(pattern, tokens):
    x, weight, bias = drawn(tokens, 1024), drawn(512, 1024, seed=1), drawn(512, seed=2)
    scale = weight.float().abs().amax(1) / 448
    codes = (weight.float() / scale[:, None]).to(E4M3)
    y = nm_act.sparse_linear(x, codes, bias, pattern, weight_scale=scale, activation_dtype=E4M3)
    exact = reference.prune(x, pattern).float() @ (codes.float() * scale[:, None]).t() + bias.float()
    assert relative_error(y, exact) < 0.04
    assert "dense fp8 tensor cores" in nm_act.explain(x, codes, pattern, activation_dtype=E4M3).why
    options = {"weight_scale": scale, "activation_dtype": E4M3, "variance_correction": True}
    with pytest.raises(NotImplementedError, match="without a channel scale"):
        nm_act.sparse_linear(x, codes, bias, pattern, **options)


@HOPPER
@pytest.mark.parametrize("tokens", [1, 8, 16, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_e4m3_product_of_a_few_tokens(tokens, biased):
    """With one scale or row-wise ones: against float64, with scales of any size and a token of zeros."""
    values, codes = drawn(tokens, 1040).to(E4M3), drawn(2064, 1040, seed=1).to(E4M3)
    rows = torch.logspace(3, -6, tokens, device="cuda")
    if tokens > 1:
        values[-1], rows[-1] = 0, 2.0**-126  # what the producers give a token of zeros
    columns = torch.logspace(-8, 2, 2064, device="cuda")
    bias = drawn(2064, seed=2) if biased else None
    poison()
    y = torch.ops.nm_act.e4m3_product(values, rows, codes, columns, bias)
    product, scales = values.double() @ codes.double().t(), rows.double()[:, None] * columns.double()
    exact = scales * product if bias is None else scales * product + bias.double()
    assert y.dtype == torch.bfloat16
    if tokens > 1:
        assert torch.equal(y[-1], torch.zeros_like(y[-1]) if bias is None else bias)
    some = max(1, tokens - 1)
    for token in range(some):
        assert relative_error(y[token], exact[token]) < CLOSE
    if bias is None:  # each output as well as the largest; fast accumulation errs by the size of a sum
        assert relative_error((y.double() / scales)[:some], product[:some]) < CLOSE
    assert torch.equal(torch.ops.nm_act.e4m3_product(values, rows, codes, columns, bias), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = torch.ops.nm_act.e4m3_product(values, rows, codes, columns, bias)
    graph.replay()
    assert torch.equal(again, y)


def test_e4m3_product_checks_its_arguments():
    values, codes, rows, columns = drawn(2, 64).to(E4M3), drawn(32, 64).to(E4M3), drawn(2).float(), drawn(32).float()
    product = torch.ops.nm_act.e4m3_product
    assert product(values[:0], rows[:0], codes, columns).shape == (0, 32)
    for wrong, sentence in (
        ((values.bfloat16(), rows, codes, columns), "expected contiguous values .* in float8_e4m3fn"),
        ((values, rows, codes[:, :48], columns), "expected contiguous values"),
        ((values, rows[:1], codes, columns), "expected row_scale of shape"),
        ((values, rows, codes, columns[:8]), "expected weight_scale of shape"),
        ((values, rows, codes, columns, drawn(8)), "expected bias of shape .* in bfloat16"),
    ):
        with pytest.raises(ValueError, match=sentence):
            product(*wrong)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("pattern", ["2:4", "5:8", "8:16", "16:32"])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "e4m3"])
def test_decode_in_one_kernel(tokens, pattern, kind):
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    for out_features, in_features in ((256, 4096), (1040, 512), (4096, 14336)):
        weight = (0.05 * drawn(in_features, out_features, dtype=dtype, seed=1)).t()
        scale = None
        if kind == "e4m3":
            scale = weight.float().abs().amax(1) / 448
            weight = (weight.float() / scale[:, None]).to(E4M3).t().contiguous().t()
        bias, residual = drawn(out_features, dtype=dtype, seed=2), drawn(tokens, out_features, dtype=dtype, seed=3)
        both, norm = drawn(tokens, 2 * in_features, dtype=dtype, seed=4), drawn(in_features, dtype=dtype, seed=5)
        gate, up = both.split(in_features, dim=-1)

        def separate(x, weight=weight, scale=scale, bias=bias):
            return nm_act.sparse_linear(x, weight, bias, pattern, weight_scale=scale)

        poison()
        run = lambda x, **around: fused.decode_linear(x, weight, bias, pattern, weight_scale=scale, **around)  # noqa: B023, E731
        assert relative_error(run(gate), separate(gate)) < CLOSE
        # Of many survivors, sparse_linear prefers the dense product, whose sums have another order.
        assert relative_error(run(gate, residual=residual), separate(gate) + residual) < CLOSE
        assert not adds_after(lambda: run(gate, residual=residual))  # noqa: B023
        assert (
            relative_error(
                run(gate, up=up, activation="silu", residual=residual), separate(F.silu(gate) * up) + residual
            )
            < CLOSE
        )
        misaligned = torch.cat((residual.flatten()[:1], residual.flatten()))[1:].view_as(residual)
        assert torch.equal(run(gate, residual=misaligned), run(gate, residual=residual))
        normed = rms_norm(gate, norm, 1e-5)
        assert relative_error(run(gate, norm_weight=norm, eps=1e-5), separate(normed)) < CLOSE
        assert torch.equal(run(gate, norm_weight=norm, eps=1e-5), run(gate, norm_weight=norm, eps=1e-5))
        # Of Gemma.
        around = {"up": up, "activation": "gelu_tanh"}
        assert relative_error(run(gate, **around), separate(activated(gate, "gelu_tanh") * up)) < CLOSE
        around = {"norm_weight": norm, "eps": 1e-5, "unit_offset": True}
        assert relative_error(run(gate, **around), separate(rms_norm(gate, norm, 1e-5, True))) < CLOSE
        if pattern != "2:4":
            continue
        x_norm, before = drawn(in_features, dtype=dtype, seed=6), drawn(tokens, in_features, dtype=dtype, seed=7)
        for unit_offset in (False, True):
            options = {"weight_scale": scale, "unit_offset": unit_offset}
            y, hidden = fused.sandwich_linear(gate, x_norm, before, norm, 1e-5, weight, bias, pattern, **options)
            expected = fused.rms_norm_add(gate, x_norm, 1e-5, before, unit_offset=unit_offset)
            # Sums of squares have another order here: an inverse may differ in its last place.
            assert relative_error(hidden, expected) < CLOSE
            normed = rms_norm(hidden, norm, 1e-5, unit_offset)
            assert relative_error(y, separate(normed)) < CLOSE


def test_wrong_arguments_are_one_sentence():
    x, weight, norm = drawn(1, 64), drawn(64, 32).t(), drawn(64)
    wrong = [
        (ValueError, "expected either up or norm_weight, got both", {"up": x, "norm_weight": norm}),
        (ValueError, r"expected up of shape \[1, 64\]", {"up": drawn(1, 32), "activation": "silu"}),
        (ValueError, r"expected residual of shape \[1, 32\]", {"residual": x}),
        (ValueError, r"expected norm_weight of shape \[64\]", {"norm_weight": norm.float(), "eps": 1e-5}),
        (ValueError, "expected eps along with norm_weight, got none", {"norm_weight": norm}),
        (ValueError, "expected norm_weight along with eps, got none", {"eps": 1e-5}),
        (ValueError, "expected norm_weight along with unit_offset, got none", {"unit_offset": True}),
        (ValueError, "expected up and activation together, got activation alone", {"activation": "silu"}),
        (ValueError, "expected up and activation together, got up alone", {"up": x}),
    ]
    for error, message, around in wrong:
        with pytest.raises(error, match=message):
            fused.decode_linear(x, weight, None, "2:4", **around)
    half = drawn(1, 64, dtype=torch.float16)
    others = [
        (NotImplementedError, "expected 1 to 4 tokens", lambda: fused.decode_linear(drawn(5, 64), weight, None, "2:4")),
        (NotImplementedError, "use the separate operators", lambda: fused.decode_linear(x, weight.contiguous(), None, "2:4")),
        (NotImplementedError, "at most 16384 features", lambda: fused.rms_norm_prune(drawn(1, 32768), drawn(32768), 1e-5)),
        (TypeError, "float8_e4m3fn with x in bfloat16", lambda: fused.silu_mul_prune(half, half, "8:16", activation_dtype=E4M3)),
        (ValueError, 'expected activation "silu" or "gelu_tanh", got "relu"', lambda: fused.silu_mul_prune(x, x, activation="relu")),
        (ValueError, 'expected activation "silu" or "gelu_tanh", got "gelu"', lambda: nm_act.silu_mul_compress(x, x, activation="gelu")),
        (ValueError, 'expected activation "silu" or "gelu_tanh", got ""', lambda: fused.decode_linear(x, weight, None, "2:4", up=x, activation="")),
        (ValueError, "expected a residual with x_weight, got none", lambda: fused.rms_norm_prune(x, norm, 1e-5, None, "2:4", x_weight=norm)),
        (ValueError, r"expected x_weight of shape \[64\], got \[32\]", lambda: nm_act.rms_norm_compress(x, norm, 1e-5, x, x_weight=drawn(32))),
        (TypeError, "expected weight in torch.bfloat16, got torch.float32", lambda: fused.rms_norm_add(x, norm.float(), 1e-5, x)),
        (ValueError, "in_features divisible by 8 and at most 16384, got 12", lambda: fused.rms_norm_add(drawn(1, 12), drawn(12), 1e-5, drawn(1, 12))),
    ]  # fmt: skip
    for error, message, call in others:
        with pytest.raises(error, match=message):
            call()
