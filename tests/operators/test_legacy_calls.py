"""Calls with n and m in place of the pattern, as before 0.2: they work and name the new way."""

import pytest
import torch

import nm_act
from nm_act import reference

X, W = torch.randn(3, 32), torch.randn(8, 32)
CALLS = [
    (nm_act.prune, (X,), (4, 8), {}, "4:8"),
    (nm_act.prune, (X,), (4,), {"m": 8}, "4:8"),
    (nm_act.prune, (X,), (), {"n": 1, "m": 4}, "1:4"),
    (nm_act.prune, (X,), (2, 4), {"extra_columns": [1]}, "2:4+1@1"),
    (nm_act.sparse_linear, (X, W, None), (8, 16), {}, "8:16"),
    (nm_act.sparse_linear, (X, W), (), {"n": 8, "m": 16}, "8:16"),
    (nm_act.sparse_linear, (X, W), (), {"extra_columns": [0, 1]}, "2:4+2"),
    (nm_act.explain, (X, W), (8, 16), {}, "8:16"),
    (reference.prune, (X,), (4, 8), {}, "4:8"),
    (reference.sparse_linear, (X, W), (), {"n": 8, "m": 16}, "8:16"),
]


@pytest.mark.parametrize(("function", "tensors", "numbers", "named", "pattern"), CALLS)
def test_n_and_m_work_with_a_sentence(function, tensors, numbers, named, pattern):
    with pytest.warns(DeprecationWarning, match=f'{function.__name__} takes one pattern since 0.2: write "') as seen:
        result = function(*tensors, *numbers, **named)
    assert f'"{pattern}"' in str(seen[0].message)
    assert seen[0].filename == __file__
    expected = function(*tensors, pattern=pattern)
    assert torch.equal(result, expected) if isinstance(result, torch.Tensor) else result == expected


def test_a_pattern_that_is_none_is_one_sentence():
    with pytest.raises(ValueError, match='expected a pattern written "N:M"'):
        nm_act.prune(X, "half")


def test_n_and_m_compile_to_one_graph():
    compiled = torch.compile(lambda x: nm_act.prune(x, 8, 16), fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), nm_act.prune(X, "8:16"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: nm_act.prune(X, "8:16", n=2, m=4),
        lambda: nm_act.prune(X, "8:16", extra_columns=[0]),
        lambda: nm_act.sparse_linear(X, W, pattern="8:16", n=8),
    ],
)
def test_n_and_m_beside_a_pattern_are_refused(call):
    with pytest.raises(TypeError, match="expected a pattern alone, got n, m or extra_columns beside it; write them"):
        call()


def test_what_follows_n_and_m_is_not_dropped():
    with pytest.warns(DeprecationWarning, match="one pattern"), pytest.raises(TypeError, match="positional argument"):
        nm_act.sparse_linear(X, W, None, 8, 16, torch.ones(32))


def test_one_number_alone_is_refused():
    for call in (lambda: nm_act.prune(X, 2), lambda: nm_act.sparse_linear(X, W, n=8)):
        with pytest.raises(TypeError, match='expected one pattern such as "8:16", got 1 of n and m; write the pattern'):
            call()
