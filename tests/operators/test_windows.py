"""Patterns with windows: names, the oracle against a matching, CPU kernels, lifting, dispatch, and every error sentence."""

import itertools
import re

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from conftest import DTYPES, assert_same_bits, hard_activations
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import selections, stored

import nm_act
from nm_act import NMPattern, reference
from nm_act.ops.lifting import lifted_columns, lifted_features

EXTRAS = [(e,) for e in range(4)] + list(itertools.combinations(range(4), 2))
LIFTED = ("2:4+1", "2:4+1@1", "2:4+1@2", "2:4+1@3")
NOT_LIFTED = ("2:4", "2:4+2", "2:4+2@1,3", "4:8", "5:8", "6:8", "8:16")


# ---- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "canonical", "columns", "kept"),
    [
        ("2:4+1", "2:4+1", (0,), 10 / 16),
        ("2:4+1@0", "2:4+1", (0,), 10 / 16),
        (" 2:4 + 1 @ 3 ", "2:4+1@3", (3,), 10 / 16),
        ("2:4+2", "2:4+2", (0, 1), 12 / 16),
        ("2:4+2@1,0", "2:4+2", (0, 1), 12 / 16),
        ("2:4+2@3,1", "2:4+2@1,3", (1, 3), 12 / 16),
    ],
)
def test_names(text, canonical, columns, kept):
    pattern = NMPattern(text)
    assert (str(pattern), pattern.extra_columns, pattern.kept_fraction) == (canonical, columns, kept)
    assert pattern == NMPattern(canonical) == NMPattern(pattern) == NMPattern(2, 4, columns)
    assert (pattern.keep, pattern.group, pattern.span) == (2, 4, 16)


def test_plain_patterns_are_what_they_were():
    assert NMPattern("8:16").extra_columns == ()
    assert (NMPattern("8:16").span, NMPattern("2:4").span) == (16, 4)


def windows(pattern: NMPattern | str) -> list[list[int]]:
    """The features, of every sixteen, that each window of 2:4+r covers; empty for any other pattern."""
    columns = NMPattern(pattern).extra_columns
    quads = [[*range(first, first + 4)] for first in range(0, 16, 4)]
    return [*quads, *([*range(column, 16, 4)] for column in columns)] if columns else []


# ---- the oracle --------------------------------------------------------------------------------------------------------
def fits(features: set[int], table: list[list[int]]) -> bool:
    """Whether windows of two places hold all features: a bipartite matching by augmenting paths."""
    places = [window for window in table for _ in range(2)]
    holder: dict[int, int] = {}

    def place(feature: int, visited: set[int]) -> bool:
        for at, window in enumerate(places):
            if feature in window and at not in visited:
                visited.add(at)
                if at not in holder or place(holder[at], visited):
                    holder[at] = feature
                    return True
        return False

    return all(place(feature, set()) for feature in features)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_oracle_is_the_greedy_set_of_a_matching(extra, values):
    x = torch.randint(-values, values + 1, (12, 16)).float()
    table = windows(NMPattern(2, 4, extra))
    mask = reference.selection_mask(x, NMPattern(2, 4, extra))
    for row, kept in zip(x.abs().tolist(), mask.tolist(), strict=True):
        taken: set[int] = set()
        for feature in sorted(range(16), key=lambda i: (-row[i], i)):
            if fits(taken | {feature}, table):
                taken.add(feature)
        assert {i for i in range(16) if kept[i]} == taken


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_other_set_that_fits_has_more_energy(extra):
    """The greedy set is the best of all: of every set of that size that the windows hold."""
    x = torch.randn(3, 16)
    table, size = windows(NMPattern(2, 4, extra)), 8 + 2 * len(extra)
    legal = [
        c for c in itertools.combinations(range(16), size) if all(sum(i // 4 == q for i in c) >= 2 for q in range(4))
    ]
    legal = [c for c in legal if fits(set(c), table)]
    best = torch.stack([x.square()[:, list(c)].sum(dim=1) for c in legal]).amax(dim=0)
    kept = nm_act.prune(x, NMPattern(2, 4, extra)).square().sum(dim=1)
    torch.testing.assert_close(kept, best)


def test_more_windows_keep_more():
    x = torch.randn(50, 256)
    energy = [nm_act.prune(x, NMPattern(2, 4, extra)).square().sum(dim=1) for extra in ((), (0,), (0, 1))]
    assert (energy[0] < energy[1]).all()
    assert (energy[1] < energy[2]).all()


# ---- prune -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("in_features", [16, 48, 544, 1024])
def test_prune_equals_oracle_bit_for_bit(dtype, extra, in_features):
    x = hard_activations(7, in_features, dtype)
    for options in selections(in_features).values():
        actual = nm_act.prune(x, NMPattern(2, 4, extra), **options)
        expected = reference.prune(x, NMPattern(2, 4, extra), **options)
        assert_same_bits(actual, expected, any_nan="shift" in options or "token_shift" in options)


@given(
    values=hnp.arrays(np.float32, (2, 48), elements=st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.5, np.inf, np.nan])),
    extra=st.sampled_from(EXTRAS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_property_ties_and_special_values(values, extra, dtype):
    x = torch.from_numpy(values).to(dtype)
    pruned = nm_act.prune(x, NMPattern(2, 4, extra))
    assert_same_bits(pruned, reference.prune(x, NMPattern(2, 4, extra)), any_nan=True)
    kept = reference.selection_mask(x, NMPattern(2, 4, extra)).unflatten(-1, (-1, 16)).sum(-1)
    assert (kept == 8 + 2 * len(extra)).all()


# ---- sparse_linear -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("extra", [(1,), (0, 3)])
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_sparse_linear_equals_oracle(dtype, tokens, extra, layout):
    x, weight, bias = torch.randn(tokens, 96).to(dtype), torch.randn(40, 96).to(dtype), torch.randn(40).to(dtype)
    weight = stored(weight, layout)
    for options in ({}, {"token_shift": "mean", "variance_correction": True}):
        y = nm_act.sparse_linear(x, weight, bias, pattern=NMPattern(2, 4, extra), **options)
        exact = reference.sparse_linear(x, weight, bias, pattern=NMPattern(2, 4, extra), **options)
        limit = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(y.double(), exact, rtol=limit, atol=limit * 10)


@pytest.mark.parametrize("text", LIFTED)
def test_a_lifted_weight_changes_nothing_on_a_cpu(text):
    pattern, x, weight = NMPattern(text), torch.randn(5, 64), torch.randn(24, 64)
    lifted = nm_act.lift_weight(weight, pattern)
    y = nm_act.sparse_linear(x, weight, pattern=pattern, lifted_weight=lifted)
    assert torch.equal(y, nm_act.sparse_linear(x, weight, pattern=pattern))


def test_operators_pass_opcheck_and_compile_to_one_graph():
    x, weight = torch.randn(3, 64), torch.randn(24, 64)
    lifted = nm_act.lift_weight(weight, "2:4+1")
    torch.library.opcheck(torch.ops.nm_act.prune.default, (x, 2, 4), {"extra_columns": [1]})
    options = {"extra_columns": [0], "lifted_weight": lifted}
    torch.library.opcheck(torch.ops.nm_act.sparse_linear.default, (x, weight), options)
    function = lambda x: nm_act.sparse_linear(x, weight, pattern="2:4+1", lifted_weight=lifted)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


# ---- lifting -------------------------------------------------------------------------------------------------------------
def test_window_tables():
    quads = [[4 * q + i for i in range(4)] for q in range(4)]
    assert windows("2:4+1@2") == [*quads, [2, 6, 10, 14]]
    assert windows("2:4+2@1,3") == [*quads, [1, 5, 9, 13], [3, 7, 11, 15]]
    assert windows("2:4") == windows("6:8") == windows("16:32") == []


@pytest.mark.parametrize("text", NOT_LIFTED)
def test_no_other_pattern_is_lifted(text):
    pattern = NMPattern(text)
    assert lifted_features(pattern, 64) == 64
    with pytest.raises(ValueError, match=re.escape(f"expected 2:4+1, got {pattern}")):
        nm_act.lift_weight(W, pattern)
    for call in (nm_act.sparse_linear, nm_act.explain):
        sentence = f"expected lifted_weight with 2:4+1 only, got it with {text[:5]}"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(X, W, pattern=pattern, lifted_weight=W)


@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_lift_weight_repeats_columns_and_keeps_the_storage(text, layout, dtype):
    weight = stored(torch.randn(24, 64).to(dtype), layout)
    lifted = nm_act.lift_weight(weight, text)
    assert lifted.dtype == dtype
    assert lifted.shape == (24, lifted_features(text, 64)) == (24, 80)
    assert (lifted.t() if layout == "in_out" else lifted).is_contiguous()
    assert torch.equal(lifted.float(), weight.float()[:, lifted_columns(text, 64)])
    assert torch.equal(lifted[:, :64].float(), weight.float())


@pytest.mark.parametrize("text", LIFTED)
def test_every_column_of_a_window_belongs_to_its_unit(text):
    columns, table = lifted_columns(text, 48), windows(text)
    quads = [columns[i : i + 4].tolist() for i in range(0, len(columns), 4)]
    first = [[16 * unit + i for i in window] for unit in range(3) for window in table[:4]]
    others = [[16 * unit + i for i in window] for unit in range(3) for window in table[4:]]
    assert quads == first + others


@pytest.mark.parametrize("text", LIFTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unlift_scatters_back(text, dtype):
    x = torch.randn(3, 32).to(dtype)
    x[0, 5], x[1, 3], x[2, 1] = -0.0, float("nan"), -float("inf")
    columns = lifted_columns(text, 32)
    operand = x[:, columns].clone()
    seen = torch.zeros(32, dtype=torch.bool)
    for at, column in enumerate(columns.tolist()):  # a survivor is held once
        if seen[column]:
            operand[:, at] = 0.0
        seen[column] = True
    assert_same_bits(nm_act.unlift(operand, text, 32), x)


@pytest.mark.parametrize("text", LIFTED)
def test_the_product_over_a_lifted_weight_is_that_of_the_pruned_activation(text):
    """Any 2:4 operand that unlifts to P(X) gives P(X) W^T over the lifted weight; here one found by the matching."""
    pattern = NMPattern(text)
    x, weight = torch.randn(4, 32), torch.randn(8, 32)
    pruned = nm_act.prune(x, pattern)
    columns = lifted_columns(text, 32)
    operand = torch.zeros(4, len(columns))
    for token in range(4):
        for feature in pruned[token].nonzero().flatten().tolist():
            operand[token, (columns == feature).nonzero()[0]] = pruned[token, feature]
    assert torch.equal(nm_act.unlift(operand, text, 32), pruned)
    torch.testing.assert_close(operand @ nm_act.lift_weight(weight, text).t(), pruned @ weight.t())


@pytest.mark.parametrize(
    ("tokens", "storage", "dtype", "path", "why"),
    [
        (1, "in_out", torch.bfloat16, "gather", "only the rows of surviving inputs"),
        (4, "in_out", torch.int8, "gather", "only the rows of surviving inputs"),
        (1, "out_in", torch.bfloat16, "dense", "stored [out, in]"),
        (5, "in_out", torch.bfloat16, "dense", "no sparse tensor-core path"),
        (0, "in_out", torch.bfloat16, "dense", "no tokens"),
    ],
)
def test_explain_decode_on_cuda(tokens, storage, dtype, path, why):
    x = torch.empty(tokens, 512, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(512, 1024, dtype=dtype, device="meta").t()
    weight = weight if storage == "in_out" else weight.contiguous()
    found = nm_act.explain(x, weight, "8:32", device="cuda")
    assert (found.path, found.device) == (path, "cuda")
    assert why in found.why


def test_explain_rows_that_the_decode_kernel_does_not_take():
    weight = torch.empty(512, 1028, dtype=torch.bfloat16, device="meta").t()
    found = nm_act.explain(torch.empty(1, 512, dtype=torch.bfloat16, device="meta"), weight, "8:16", device="cuda")
    assert found.path == "dense"
    assert "out_features divisible by 8 (16 in 8 bits)" in found.why


@pytest.mark.parametrize(("offset", "path"), [(0, "sparse"), (1, "dense"), (8, "sparse")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_explain_reads_the_alignment(device, offset, path):
    weight = torch.zeros(64 * 64 + 8, dtype=torch.bfloat16, device=device)[offset:][: 64 * 64].view(64, 64)
    found = nm_act.explain(torch.zeros(1024, 64, dtype=torch.bfloat16, device=device), weight, device="cuda")
    assert found.path == path
    assert path == "sparse" or "alignment" in found.why


# ---- errors ----------------------------------------------------------------------------------------------------------------
X, W = torch.zeros(2, 64), torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("sentence", "call"),
    [
        ("expected 2:4+1 or 2:4+2", lambda: NMPattern("2:4+3")),
        ("expected 2:4+1 or 2:4+2", lambda: NMPattern("2:4+0")),
        ("with as many columns after an @", lambda: NMPattern("2:4+2@1")),
        ("expected one or two distinct extra columns in 0 to 3, got (4,)", lambda: NMPattern("2:4+1@4")),
        ("expected one or two distinct extra columns in 0 to 3, got (1, 1)", lambda: NMPattern("2:4+2@1,1")),
        ("expected one or two distinct extra columns in 0 to 3, got (0, 1, 2)", lambda: NMPattern(2, 4, [0, 1, 2])),
        ("expected extra windows with 2:4 only, got 4:8+1", lambda: NMPattern("4:8+1")),
        ('or "2:4+1", got \'2:4+\'', lambda: NMPattern("2:4+")),
        ("expected extra_columns with the pattern 2:4 only, got [0] with 4:8", lambda: torch.ops.nm_act.prune(X, 4, 8, extra_columns=[0])),
        ("expected one or two distinct extra_columns in 0 to 3, got [4]", lambda: torch.ops.nm_act.prune(X, 2, 4, extra_columns=[4])),
        ("expected one or two distinct extra_columns in 0 to 3, got [-1]", lambda: torch.ops.nm_act.prune(X, 2, 4, extra_columns=[-1])),
        ("expected one or two distinct extra_columns in 0 to 3, got [1, 1]", lambda: torch.ops.nm_act.prune(X, 2, 4, extra_columns=[1, 1])),
        ("expected one or two distinct extra_columns in 0 to 3, got [0, 1, 2]", lambda: torch.ops.nm_act.prune(X, 2, 4, extra_columns=[0, 1, 2])),
        ("expected in_features divisible by 16 for 2:4+1, got in_features 24", lambda: nm_act.prune(X[:, :24], NMPattern(2, 4, [0]))),
        ("expected lifted_weight of shape [8, 80] for this pattern, got [8, 64]", lambda: nm_act.sparse_linear(X, W, pattern=NMPattern(2, 4, [0]), lifted_weight=W)),
        ("expected lifted_weight of shape [8, 80] for this pattern, got [7, 80]", lambda: nm_act.sparse_linear(X, W, pattern=NMPattern(2, 4, [0]), lifted_weight=nm_act.lift_weight(W, "2:4+1")[:7])),
        ("expected in_features divisible by 16, got 24", lambda: nm_act.lift_weight(W[:, :24], "2:4+1")),
        ("expected weight of shape [out_features, in_features], got [8]", lambda: nm_act.lift_weight(W[:, 0], "2:4+1")),
        ("expected lifted_weight of shape [8, 80] for 2:4+1, got [8, 64]", lambda: nm_act.explain(X, W, pattern=NMPattern(2, 4, [0]), lifted_weight=W)),
        ("expected in_features divisible by 16 for 2:4+1, got 24", lambda: nm_act.explain(X[:, :24], W[:, :24], pattern=NMPattern(2, 4, [0]))),
        ("expected x [..., in_features] and weight [out_features, in_features], got [2, 64] and [64, 8]", lambda: nm_act.explain(X, W.t())),
        ("expected the device cpu or cuda, got 'tpu'", lambda: nm_act.explain(X, W, device="tpu")),
    ],
)  # fmt: skip
def test_error_sentences(sentence, call):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_a_lifted_weight_of_another_dtype():
    with pytest.raises(
        TypeError, match=r"expected lifted_weight in the dtype of x, torch\.float32, got torch\.float16"
    ):
        nm_act.sparse_linear(X, W, pattern=NMPattern(2, 4, [0]), lifted_weight=nm_act.lift_weight(W.half(), "2:4+1"))
