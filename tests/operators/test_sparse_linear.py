"""sparse_linear and gather_linear: against the float64 oracle, over layouts, shapes, options; opcheck; compile; errors."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, PATTERNS, hard_activations, one_and_two_threads
from linear_cases import linear_options, relative_error, stored

import nm_act
from nm_act import reference

LAYOUTS = ("out_in", "in_out")
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 33])
def test_error_at_most_twice_torchs_own(dtype, layout, tokens):
    in_features, out_features = 1024, 330
    x, weight = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    for n, m in PATTERNS:
        pruned = reference.prune(x, f"{n}:{m}")
        exact = reference.sparse_linear(x, weight, bias, f"{n}:{m}")
        torchs = relative_error(F.linear(pruned, weight, bias), exact)
        ours = relative_error(nm_act.sparse_linear(x, stored(weight, layout), bias, f"{n}:{m}"), exact)
        assert ours <= 2 * torchs, (n, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 4, 6, 9])
def test_every_option_against_the_oracle(dtype, layout, tokens):
    in_features, out_features = 256, 96
    x = (torch.randn(tokens, in_features) + 0.5).to(dtype)
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    for name, options in linear_options(in_features, out_features, "cpu").items():
        exact = reference.sparse_linear(x, weight, bias, "8:16", **options)
        y = nm_act.sparse_linear(x, stored(weight, layout), bias, "8:16", **options)
        assert y.dtype == dtype
        assert relative_error(y, exact) < LIMITS[dtype], name


# 32 survivors of 64, each 250 times 10: the product is 80 000, beyond float16's 65 504; the scaled result is not.
OVERFLOWING = {
    "column_scale": ({"column_scale": torch.full((16,), 0.25)}, 20_000.0),
    "scale and shift": ({"column_scale": torch.full((16,), 0.25), "shift": torch.zeros(64)}, 20_000.0),
    "shift": ({"shift": torch.full((64,), 100.0), "shift_out": torch.full((16,), -40_000.0)}, 8_000.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 4, 5, 9, 600])
@pytest.mark.parametrize("case", OVERFLOWING)
def test_a_float16_product_beyond_the_range_is_scaled_before_it_is_rounded(case, tokens, layout):
    options, expected = OVERFLOWING[case]
    x, weight = torch.full((tokens, 64), 250.0).half(), stored(torch.full((16, 64), 10.0).half(), layout)
    y = nm_act.sparse_linear(x, weight, pattern="8:16", **options)
    assert (y == expected).all(), y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [4, 5])
def test_a_float16_row_scale_comes_before_the_rounding(tokens, layout):
    x = torch.zeros(tokens, 64)
    x[:, ::2], x[:, 1::2] = 250.0, -249.0  # 8:16 keeps the even ones: Var 249.5^2, of what is kept 125^2
    weight = torch.zeros(16, 64)
    weight[:, ::2] = 10.0
    y = nm_act.sparse_linear(x.half(), stored(weight.half(), layout), pattern="8:16", variance_correction=True)
    assert y.isinf().all()  # 1.996 x 80 000: infinite however it is computed, and never NaN
    options = {"variance_correction": True, "column_scale": torch.full((16,), 0.25)}
    small = nm_act.sparse_linear(x.half(), stored(weight.half(), layout), pattern="8:16", **options)
    torch.testing.assert_close(small, torch.full((tokens, 16), 39_920.0).half(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("tokens", [1, 7])
def test_given_shift_out_replaces_the_computed_one(tokens):
    x, weight, shift = torch.randn(tokens, 64), stored(torch.randn(32, 64), "in_out"), torch.randn(64)
    for options, image in (({"shift": shift}, weight @ shift), ({"token_shift": "mean"}, weight.sum(1))):
        computed = nm_act.sparse_linear(x, weight, pattern="4:8", **options)
        given = nm_act.sparse_linear(x, weight, pattern="4:8", shift_out=image, **options)
        torch.testing.assert_close(given, computed, rtol=1e-5, atol=1e-5)
        doubled = nm_act.sparse_linear(x, weight, pattern="4:8", shift_out=2 * image, **options)
        assert not torch.allclose(doubled, computed)


class TestIdentities:
    """Algebra of the mitigations (arXiv 2509.22166), on outputs."""

    def setup_method(self):
        self.x, self.weight = torch.randn(6, 64) + 1, torch.randn(48, 64)

    def test_putting_the_shift_back_equals_the_dense_definition(self):
        eta = self.x.median(dim=-1, keepdim=True).values
        direct = (reference.prune(self.x - eta, "2:4") + eta) @ self.weight.t()
        y = nm_act.sparse_linear(self.x, self.weight, token_shift="median")
        torch.testing.assert_close(y, direct, rtol=1e-4, atol=1e-4)

    def test_variance_correction_restores_the_variance(self):
        identity = torch.eye(64)
        corrected = nm_act.sparse_linear(self.x, identity, pattern="2:4", variance_correction=True)
        variances = [values.var(-1, correction=0) for values in (corrected, self.x)]
        torch.testing.assert_close(*variances, rtol=1e-5, atol=1e-5)

    def test_any_2_4_mask_is_an_8_16_mask(self):
        energy = lambda p: p.unflatten(-1, (-1, 16)).square().sum(-1)  # noqa: E731
        assert (energy(nm_act.prune(self.x, "8:16")) >= energy(nm_act.prune(self.x, "2:4"))).all()

    def test_constant_token_has_variance_factor_one(self):
        y = nm_act.sparse_linear(torch.zeros(1, 64), self.weight, variance_correction=True)
        assert (y == 0).all()


# Tokens whose squares leave float32, and tokens whose mean is far above their spread, down to one unit in the last place.
EXTREME_TOKENS = {
    "squares overflow float32": lambda noise: noise * 1e19,
    "squares underflow float32": lambda noise: noise * 1e-23,
    "mean of 1e6 spreads": lambda noise: noise + 1e6,
    "one unit in the last place": lambda noise: 1 + (noise > 0) * 2.0**-23,
    "one feature differs": lambda noise: F.pad(torch.full_like(noise[:, 1:], 0.1), (0, 1), value=0.1000001),
}


@pytest.mark.parametrize("in_features", [256, 36])
@pytest.mark.parametrize("case", EXTREME_TOKENS)
def test_variance_factor_of_extreme_tokens(case, in_features):
    x = EXTREME_TOKENS[case](torch.randn(4, in_features))
    pruned = reference.prune(x, "2:4")
    y = nm_act.sparse_linear(x, torch.eye(in_features), variance_correction=True)
    torch.testing.assert_close(y.double(), reference.variance_ratio(x, pruned) * pruned.double(), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 5), (1, 1, 1)])
def test_leading_dimensions(layout, leading):
    x, weight, bias = torch.randn(*leading, 32), stored(torch.randn(8, 32), layout), torch.randn(8)
    y = nm_act.sparse_linear(x, weight, bias, "2:4")
    assert y.shape == (*leading, 8)
    torch.testing.assert_close(y.double(), reference.sparse_linear(x, weight, bias, "2:4"), rtol=1e-5, atol=1e-5)


def test_odd_column_counts_and_out_of_bounds_writes():
    for out_features, tokens in itertools.product([1, 7, 31, 33, 65, 4097], [1, 4]):
        x, weight = torch.randn(tokens, 64), stored(torch.randn(out_features, 64), "in_out")
        y = nm_act.sparse_linear(x, weight, pattern="2:4")
        torch.testing.assert_close(y.double(), reference.sparse_linear(x, weight, pattern="2:4"), rtol=1e-5, atol=1e-5)


def quantised(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1) / (127 if dtype == torch.int8 else 448)
    values = weight / scale[:, None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.int8])
def test_eight_bit_weights(dtype, layout, weight_dtype):
    values, scale = quantised(torch.randn(96, 256), weight_dtype)
    weight, bias = stored(values, layout), torch.randn(96).to(dtype)
    for tokens in (1, 3, 9):
        x = (torch.randn(tokens, 256) + 0.5).to(dtype)
        for name, options in linear_options(256, 96, "cpu").items():
            exact = reference.sparse_linear(x, values, bias, "8:16", weight_scale=scale, **options)
            y = nm_act.sparse_linear(x, weight, bias, "8:16", weight_scale=scale, **options)
            assert y.dtype == dtype
            assert relative_error(y, exact) < LIMITS[dtype], name
    assert nm_act.sparse_linear(x[:0], weight, weight_scale=scale).shape == (0, 96)


def test_weight_rows_may_be_padded():
    wide = torch.randn(64, 100)
    weight = wide[:, :40].t()  # stored [in, out] with a row stride of 100
    x = torch.randn(1, 64)
    y = nm_act.sparse_linear(x, weight)
    torch.testing.assert_close(y.double(), reference.sparse_linear(x, weight), rtol=1e-5, atol=1e-5)


def test_pruned_rows_are_not_read():
    x, weight = torch.randn(1, 64), torch.randn(32, 64)
    dropped = (nm_act.prune(x, "8:16") == 0)[0]
    poisoned = weight.clone()
    poisoned[:, dropped] = float("nan")
    expected = nm_act.sparse_linear(x, stored(weight, "in_out"), pattern="8:16")
    assert torch.equal(nm_act.sparse_linear(x, stored(poisoned, "in_out"), pattern="8:16"), expected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_the_threads(tokens, dtype):
    x, weight = torch.randn(tokens, 512).to(dtype), stored(torch.randn(4001, 512).to(dtype), "in_out")
    assert torch.equal(*one_and_two_threads(lambda: nm_act.sparse_linear(x, weight, pattern="8:16")))


@pytest.mark.parametrize("tokens", [1, 2, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_inputs_come_out_as_dense_shows_them(tokens, layout, dtype):
    weight = stored(torch.randn(16, 64).to(dtype), layout)
    x = torch.randn(tokens, 64).to(dtype)
    x[0, 3], x[0, 20] = float("inf"), -float("inf")
    dense = F.linear(x, weight)
    y = nm_act.sparse_linear(x, weight, pattern="2:4")
    assert torch.equal(y.isnan(), dense.isnan())
    assert torch.equal(y.isinf(), dense.isinf())
    assert torch.equal(y[y.isinf()], dense[dense.isinf()])
    x[-1, 7] = float("nan")
    assert nm_act.sparse_linear(x, weight, pattern="2:4")[-1].isnan().all()
    crowded = hard_activations(6, 64, dtype)[4:5]
    assert not nm_act.sparse_linear(crowded, weight, pattern="2:4").isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features"), [(9, 1, 16), (16, 47, 144), (19, 100, 2080), (300, 50, 1040)]
)
def test_many_tokens_over_a_weight_stored_in_out(dtype, tokens, out_features, in_features):
    """Whole and narrow panels of columns, tiles of tokens, several passes over the rows; NaN around the weight is not read."""
    room = torch.full((in_features, out_features + 9), float("nan"), dtype=dtype)
    weight = room[:, :out_features].copy_(torch.randn(in_features, out_features)).t()
    x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
    y = nm_act.sparse_linear(x, weight, bias, "8:16")
    exact = F.linear(nm_act.prune(x, "8:16").double(), weight.double(), bias.double())
    assert relative_error(y, exact) < {torch.float32: 1e-6}.get(dtype, 4e-3)
    few = torch.cat([nm_act.sparse_linear(rows, weight, bias, "8:16") for rows in x.split(9)])
    assert relative_error(few, exact) < {torch.float32: 1e-6}.get(dtype, 4e-3)


def test_gather_linear():
    x, weight, bias = torch.relu(torch.randn(3, 128)), stored(torch.randn(40, 128), "in_out"), torch.randn(40)
    torch.testing.assert_close(nm_act.gather_linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(nm_act.gather_linear(torch.zeros(1, 128), weight, bias), bias[None])
    assert nm_act.gather_linear(torch.empty(0, 128), weight).shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_gather_linear_of_8_bits(dtype):
    weight = torch.randn(40, 128)
    scale = weight.abs().amax(1) / 100
    codes = stored((weight / scale[:, None]).to(dtype), "in_out")
    x, bias = torch.randn(3, 128), torch.randn(40)
    expected = F.linear(x, codes.float() * scale[:, None], bias)
    torch.testing.assert_close(nm_act.gather_linear(x, codes, bias, weight_scale=scale), expected, rtol=1e-5, atol=1e-4)
    if dtype == torch.int8:  # opcheck's own comparison has no e4m3
        torch.library.opcheck(OPS.gather_linear.default, (x, codes, bias), {"weight_scale": scale})
    with pytest.raises(TypeError, match="gather_linear expected weight_scale along with a weight in"):
        nm_act.gather_linear(x, codes, bias)
    with pytest.raises(
        TypeError, match=r"expected weight in float8_e4m3fn or int8 along with weight_scale, got torch\.float32"
    ):
        nm_act.gather_linear(x, stored(weight, "in_out"), bias, weight_scale=scale)
    with pytest.raises(RuntimeError, match="no gradient through nm_act::gather_linear with a weight_scale"):
        nm_act.gather_linear(x.requires_grad_(), codes, bias, weight_scale=scale).sum().backward()


OPS = torch.ops.nm_act


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (7, 31), (40, 128), (65, 1000)])
def test_dense_linear(dtype, out_features, in_features):
    """Any number of rows and features, rows apart from each other, against float64; NaN around the weight is not read."""
    room = torch.full((out_features + 16, in_features + 5), float("nan"), dtype=dtype)
    weight = room[:out_features, :in_features].copy_(torch.randn(out_features, in_features))
    bias = torch.randn(out_features).to(dtype)
    for tokens in (0, 1, 2, 3, 4, 7, 8):
        x = torch.randn(tokens, 1, in_features).to(dtype)
        for added in (None, bias):
            y = OPS.dense_linear(x, weight, added)
            exact = F.linear(x.double(), weight.double(), None if added is None else bias.double())
            torch.testing.assert_close(y.double(), exact, rtol={torch.float32: 1e-5}.get(dtype, 1e-2), atol=1e-3)
        if tokens:
            assert torch.equal(y[-1:], OPS.dense_linear(x[-1:], weight, bias))  # a token does not depend on the others


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, weight = torch.randn(3, 32).to(dtype), stored(torch.randn(16, 32).to(dtype), "in_out")
    vector, out = torch.rand(32), torch.rand(16)
    values, metadata = nm_act.compress(x)
    calls = [
        (OPS.prune, (x, 2, 4), {"channel_scale": vector}),
        (OPS.prune, (x, 8, 16), {"token_shift": "median"}),
        (OPS.compress, (x,), {"shift": vector}),
        (OPS.decompress, (values, metadata), {}),
        (OPS.sparse_linear, (x, weight, out.to(dtype), 8, 16), {"column_scale": out, "variance_correction": True}),
        (OPS.sparse_linear, (x, weight), {"token_shift": "mean"}),
        (OPS.sparse_linear, (x, weight.to(torch.int8)), {"weight_scale": out}),
        (OPS.gather_linear, (x, weight), {}),
        (OPS.dense_linear, (x, weight.contiguous(), out.to(dtype)), {}),
    ]
    for op, arguments, options in calls:
        torch.library.opcheck(op.default, arguments, options)


def test_compile_fullgraph_one_graph_for_any_batch(graphs):
    weight = stored(torch.randn(16, 32), "in_out")

    @torch.compile(fullgraph=True, dynamic=True, backend=graphs.backend)
    def block(x):
        decompressed = nm_act.decompress(*nm_act.compress(x))
        return nm_act.sparse_linear(x, weight, pattern="8:16"), nm_act.prune(x, "2:4"), decompressed

    for tokens in (2, 3, 5, 17, 64):
        x = torch.randn(tokens, 32)
        y, pruned, decompressed = block(x)
        assert torch.equal(y, nm_act.sparse_linear(x, weight, pattern="8:16"))
        assert torch.equal(pruned, decompressed)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compile_with_inductor():
    weight = stored(torch.randn(16, 32), "in_out")
    function = lambda x: nm_act.sparse_linear(torch.relu(x), weight, pattern="8:16") * 2  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for tokens in (2, 9):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), function(x))


X, W, B = torch.zeros(2, 32), torch.zeros(8, 32), torch.zeros(8)
sparse_linear = nm_act.sparse_linear


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (TypeError, "expected x in float32, bfloat16 or float16, got torch.float64", lambda: sparse_linear(X.double(), W)),
        (TypeError, "expected weight in the dtype of x, torch.float32, got torch.float16", lambda: sparse_linear(X, W.half())),
        (TypeError, "expected bias in the dtype of x, torch.float32, got torch.bfloat16", lambda: sparse_linear(X, W, B.bfloat16())),
        (ValueError, "expected weight of shape [out_features, in_features], got [32]", lambda: sparse_linear(X, W[0])),
        (ValueError, "expected weight of shape [out_features, 32] for x of shape [2, 32], got [8, 16]", lambda: sparse_linear(X, W[:, :16])),
        (ValueError, "expected bias of shape [8], got [7]", lambda: sparse_linear(X, W, B[:7])),
        (ValueError, "expected bias of shape [8], got [1, 8]", lambda: sparse_linear(X, W, B[None])),
        (ValueError, "expected at least one feature", lambda: sparse_linear(torch.empty(3, 0), torch.empty(5, 0))),
        (ValueError, "expected a group size M", lambda: sparse_linear(X, W, pattern="3:6")),
        (ValueError, "expected 1 <= N < M, got pattern 5:4", lambda: sparse_linear(X, W, pattern="5:4")),
        (ValueError, "expected in_features divisible by m, got in_features 24", lambda: sparse_linear(X[:, :24], W[:, :24], pattern="8:16")),
        (ValueError, "expected column_scale of shape [8], got [32]", lambda: sparse_linear(X, W, column_scale=X[0])),
        (ValueError, "expected shift_out of shape [8], got [32]", lambda: sparse_linear(X, W, shift=X[0], shift_out=X[0])),
        (ValueError, "expected shift or token_shift along with shift_out", lambda: sparse_linear(X, W, shift_out=B)),
        (ValueError, "expected weight on the device of x, cpu, got meta", lambda: sparse_linear(X, W.to("meta"))),
        (TypeError, "expected weight_scale along with a weight in torch.int8, got none", lambda: sparse_linear(X, W.to(torch.int8))),
        (TypeError, "expected weight in float8_e4m3fn or int8 along with weight_scale, got torch.float32", lambda: sparse_linear(X, W, weight_scale=B)),
        (TypeError, "expected weight_scale in float32, got torch.float16", lambda: sparse_linear(X, W.to(torch.int8), weight_scale=B.half())),
        (ValueError, "expected weight_scale of shape [8], got [7]", lambda: sparse_linear(X, W.to(torch.int8), weight_scale=B[:7])),
        (ValueError, "gather_linear expected a weight stored [in_features, out_features], got strides [32, 1]", lambda: nm_act.gather_linear(X, W)),
        (ValueError, "gather_linear expected at most 8 tokens, got 9", lambda: nm_act.gather_linear(torch.zeros(9, 32), stored(W, "in_out"))),
        (ValueError, "dense_linear expected at most 8 tokens, got 9", lambda: OPS.dense_linear(torch.zeros(9, 32), W)),
        (ValueError, "dense_linear expected a weight stored [out_features, in_features], got strides [1, 8]", lambda: OPS.dense_linear(X, stored(W, "in_out"))),
    ],
)  # fmt: skip
def test_error_sentences(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


def test_a_pattern_in_the_place_of_the_bias_is_one_sentence():
    with pytest.raises(TypeError, match="expected bias as a Tensor or None, got a str; give a pattern as pattern="):
        nm_act.sparse_linear(torch.randn(2, 32), torch.randn(8, 32), "2:4")
