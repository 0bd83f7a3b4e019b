"""prune: bit-exact against the oracle, the contract case by case, and every error sentence."""

import re

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from conftest import DTYPES, PATTERNS, assert_same_bits, hard_activations, one_and_two_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import selections

import nm_act
from nm_act import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("in_features", [32, 96, 544, 4096])
def test_equals_oracle_bit_for_bit(dtype, n, m, in_features):
    x = hard_activations(7, in_features, dtype)
    cases = selections(in_features)
    odd = torch.tensor([0.0, float("inf"), float("nan"), -1.0]).repeat(in_features // 4)
    scale = torch.rand(in_features)
    cases |= {"scale": {"channel_scale": scale}, "odd scale": {"channel_scale": odd}}
    cases |= {"scale and median": {"channel_scale": scale, "token_shift": "median"}}
    for name, options in cases.items():
        actual = nm_act.prune(x, f"{n}:{m}", **options)
        # A shift computes new values, so there a NaN's payload is not defined.
        shifts = "shift" in options or "token_shift" in options
        assert_same_bits(actual, reference.prune(x, f"{n}:{m}", **options), any_nan=shifts, what=name)


@given(
    values=hnp.arrays(np.float32, (3, 64), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_property_any_values(values, pattern, dtype):
    x = torch.from_numpy(values).to(dtype)
    n, m = pattern
    pruned = nm_act.prune(x, f"{n}:{m}")
    assert_same_bits(pruned, reference.prune(x, f"{n}:{m}"), any_nan=True)
    assert ((pruned != 0).unflatten(-1, (-1, m)).sum(-1) <= n).all()


def test_keeps_exactly_n_and_the_largest():
    x = torch.randn(11, 256)
    pruned = nm_act.prune(x, "8:16")
    groups, kept = x.abs().unflatten(-1, (-1, 16)), (pruned != 0).unflatten(-1, (-1, 16))
    assert (kept.sum(-1) == 8).all()
    smallest_kept = groups.masked_fill(~kept, float("inf")).amin(-1)
    assert (smallest_kept >= groups.masked_fill(kept, 0).amax(-1)).all()


def test_ties_keep_the_lowest_index():
    assert nm_act.prune(torch.tensor([[1.0, -1.0, 1.0, 1.0]]), "2:4").tolist() == [[1.0, -1.0, 0.0, 0.0]]


def test_negative_zero_ties_with_zero_and_keeps_its_sign():
    pruned = nm_act.prune(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), "1:4")
    assert torch.signbit(pruned).tolist() == [[True, False, False, False]]


def test_nan_outranks_inf_outranks_finite_whatever_the_scale():
    x = torch.tensor([[3e38, float("inf"), float("nan"), -3e38]])
    scale = torch.tensor([1e30, 0.0, 0.0, 1e30])
    assert nm_act.prune(x, "1:4", channel_scale=scale)[0, 2].isnan()
    kept = nm_act.prune(x, "2:4", channel_scale=scale)
    assert kept[0, 1].isinf()
    assert kept[0, 0] == 0


def test_nan_row_stays_nan_through_the_linear():
    x, weight = torch.randn(3, 64), torch.randn(16, 64)
    x[1] = float("nan")
    y = nm_act.sparse_linear(x, weight, pattern="8:16")
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


def test_shift_equals_pruning_the_shifted_tensor():
    x, shift = torch.randn(5, 64), torch.randn(64)
    assert_same_bits(nm_act.prune(x, "4:8", shift=shift), nm_act.prune(x - shift, "4:8"))
    median = x.median(dim=-1, keepdim=True).values
    assert_same_bits(nm_act.prune(x, "4:8", token_shift="median"), nm_act.prune(x - median, "4:8"))


def test_strided_and_nested_inputs():
    x = torch.randn(6, 4, 128)
    expected = reference.prune(x, "2:4")
    assert_same_bits(nm_act.prune(x, "2:4"), expected)
    assert_same_bits(nm_act.prune(x.transpose(0, 1), "2:4"), expected.transpose(0, 1).contiguous())
    assert_same_bits(nm_act.prune(x[..., ::2], "2:4"), reference.prune(x[..., ::2].contiguous(), "2:4"))
    assert nm_act.prune(x[0, 0], "2:4").shape == (128,)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_empty(shape):
    assert nm_act.prune(torch.empty(shape), "2:4").shape == shape


def test_threads_do_not_change_the_bits():
    x = hard_activations(301, 512, torch.bfloat16)
    assert_same_bits(*one_and_two_threads(lambda: nm_act.prune(x, "8:16", token_shift="mean")), any_nan=True)


X = torch.zeros(2, 32)


@pytest.mark.parametrize(
    ("error", "sentence", "call"),
    [
        (TypeError, "expected x in float32, bfloat16 or float16, got torch.float64", lambda: nm_act.prune(X.double(), "2:4")),
        (TypeError, "got torch.int32; convert it first", lambda: nm_act.prune(X.int(), "2:4")),
        (ValueError, "expected x of shape [..., in_features]", lambda: nm_act.prune(torch.tensor(1.0), "2:4")),
        (ValueError, "expected at least one feature, got x of shape [3, 0]", lambda: nm_act.prune(torch.empty(3, 0), "2:4")),
        (ValueError, "expected a group size m in {2, 4, 8, 16, 32}, got 2:5", lambda: torch.ops.nm_act.prune(X, 2, 5)),
        (ValueError, "expected a group size m in {2, 4, 8, 16, 32}, got 2:64", lambda: torch.ops.nm_act.prune(X, 2, 64)),
        (ValueError, "expected 1 <= n < m, got 4:4", lambda: torch.ops.nm_act.prune(X, 4, 4)),
        (ValueError, "expected 1 <= n < m, got 0:4", lambda: torch.ops.nm_act.prune(X, 0, 4)),
        (ValueError, "got in_features 30 and pattern 8:16", lambda: nm_act.prune(X[:, :30], "8:16")),
        (ValueError, "expected channel_scale of shape [32], got [31]", lambda: nm_act.prune(X, "2:4", channel_scale=X[0, :31])),
        (ValueError, "expected shift of shape [32], got [2, 32]", lambda: nm_act.prune(X, "2:4", shift=X)),
        (TypeError, "expected channel_scale in float32 or the dtype of x", lambda: nm_act.prune(X, "2:4", channel_scale=X[0].double())),
        (ValueError, 'expected token_shift to be "none", "mean" or "median", got "mode"', lambda: nm_act.prune(X, "2:4", token_shift="mode")),
        (ValueError, "expected either shift or token_shift, got both", lambda: nm_act.prune(X, "2:4", shift=X[0], token_shift="mean")),
        (ValueError, "expected shift on the device of x, cpu, got meta", lambda: nm_act.prune(X, "2:4", shift=X[0].to("meta"))),
    ],
)  # fmt: skip
def test_error_sentences(error, sentence, call):
    with pytest.raises(error, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize(
    ("operator", "name", "expected", "got", "call"),
    [
        ("prune", "x", "torch.Tensor", "ndarray", lambda x: nm_act.prune(x.numpy(), "2:4")),
        ("prune", "token_shift", "str", "int", lambda x: nm_act.prune(x, "2:4", token_shift=3)),
        ("compress", "x", "torch.Tensor", "list", lambda x: nm_act.compress([[1.0] * 4])),
        ("sparse_linear", "channel_scale", "torch.Tensor", "list", lambda x: nm_act.sparse_linear(x, x, channel_scale=[1.0])),
        ("sparse_linear", "weight", "torch.Tensor", "ndarray", lambda x: nm_act.sparse_linear(x, x.numpy())),
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_our_sentence(operator, name, expected, got, call):
    with pytest.raises(TypeError) as caught:
        call(torch.randn(4, 16))
    sentence = f"nm_act::{operator} expected {name} of type {expected}, got {got}; convert it first"
    assert str(caught.value).startswith(sentence)
