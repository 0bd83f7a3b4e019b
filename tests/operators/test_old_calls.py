"""Calls as before 0.2, with n and m in place of a pattern: they run, warn, and are refused beside a pattern."""

import pytest
import torch

import nm_act
from nm_act import reference

X, W, B = torch.randn(2, 64), torch.randn(32, 64), torch.randn(32)

OLD_AND_NEW = {
    "prune": (lambda: nm_act.prune(X, 8, 16), lambda: nm_act.prune(X, "8:16")),
    "prune, by name": (lambda: nm_act.prune(X, n=8, m=16), lambda: nm_act.prune(X, nm_act.NMPattern(8, 16))),
    "prune, half by name": (lambda: nm_act.prune(X, 8, m=16), lambda: nm_act.prune(X, "8:16")),
    "prune, windows": (lambda: nm_act.prune(X, 2, 4, extra_columns=[0]), lambda: nm_act.prune(X, "2:4+1")),
    "linear": (lambda: nm_act.sparse_linear(X, W, B, 8, 16), lambda: nm_act.sparse_linear(X, W, B, "8:16")),
    "linear, by name": (
        lambda: nm_act.sparse_linear(X, W, n=4, m=8),
        lambda: nm_act.sparse_linear(X, W, pattern="4:8"),
    ),
    "linear, windows": (
        lambda: nm_act.sparse_linear(X, W, extra_columns=[0, 1]),
        lambda: nm_act.sparse_linear(X, W, pattern="2:4+2"),
    ),
    "oracle": (lambda: reference.sparse_linear(X, W, n=8, m=16), lambda: reference.sparse_linear(X, W, pattern="8:16")),
    "explain": (lambda: nm_act.explain(X, W, 8, 16), lambda: nm_act.explain(X, W, "8:16")),
}


@pytest.mark.parametrize("name", OLD_AND_NEW)
def test_an_old_call_warns_and_gives_the_same(name):
    old, new = OLD_AND_NEW[name]
    with pytest.warns(DeprecationWarning, match=r'takes one pattern since 0.2: write "\d:\d+') as caught:
        found = old()
    assert caught[0].filename == __file__
    assert torch.equal(found, new()) if isinstance(found, torch.Tensor) else found == new()


def test_an_old_call_compiles_whole():
    compiled = torch.compile(lambda x: nm_act.prune(x, 8, 16), fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), nm_act.prune(X, "8:16"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: nm_act.prune(X, "8:16", n=2, m=4),
        lambda: nm_act.prune(X, "2:4", extra_columns=[0]),
        lambda: nm_act.sparse_linear(X, W, pattern="8:16", n=8),
    ],
)
def test_both_at_once_are_refused(call):
    with pytest.raises(TypeError, match=r"expected a pattern alone, got n, m or extra_columns beside it; write them"):
        call()


def test_what_follows_an_old_pattern_is_not_dropped():
    with pytest.warns(DeprecationWarning, match="one pattern"), pytest.raises(TypeError, match="positional argument"):
        nm_act.sparse_linear(X, W, B, 8, 16, torch.ones(64))
