"""Modules are found under the names that they had in 0.1, with a sentence that names the new one."""

import importlib
import pickle
import sys

import pytest

import nm_act
from nm_act import moved


@pytest.mark.parametrize("old", sorted(moved.MOVED))
def test_an_old_name_leads_to_the_new_module(old, monkeypatch):
    new = importlib.import_module(f"nm_act.{moved.MOVED[old]}")
    monkeypatch.setattr(new, "anything", object(), raising=False)
    with pytest.warns(DeprecationWarning, match=f"^nm_act.{old} is {new.__name__} since 0.2; import that$") as seen:
        assert importlib.import_module(f"nm_act.{old}").anything is new.anything
    assert seen[0].filename == __file__


def test_statements_as_in_0_1():
    with pytest.warns(DeprecationWarning, match=r"nm_act\.linear is nm_act\.layers\.linear"):
        from nm_act.linear import NMLinear
    assert NMLinear is nm_act.NMLinear
    from nm_act import criteria

    with pytest.warns(DeprecationWarning, match=r"nm_act\.criteria is nm_act\.methods\.criteria"):
        assert "act" in criteria.CRITERIA
    with pytest.warns(DeprecationWarning, match=r"nm_act\.linear is"):
        assert pickle.loads(b"cnm_act.linear\nNMLinear\n.") is nm_act.NMLinear  # of a layer saved whole


def test_public_names_hide_the_old_modules():
    import nm_act.explain
    import nm_act.sparsify

    assert callable(nm_act.sparsify)
    assert callable(nm_act.explain)


def test_what_is_not_there_stays_an_attribute_error():
    with (
        pytest.warns(DeprecationWarning, match="linear"),
        pytest.raises(AttributeError, match=r"nm_act\.layers\.linear.*'nothing'"),
    ):
        nm_act.linear.nothing  # noqa: B018
    assert not hasattr(sys.modules["nm_act.linear"], "__file__")
    assert not hasattr(nm_act, "nothing")
