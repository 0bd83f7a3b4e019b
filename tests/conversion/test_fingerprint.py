"""Fingerprints: equal for one model however it is held, different for another."""

import copy

import pytest
import torch
from torch import nn

from nm_act.conversion.fingerprint import weights_fingerprint


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))


def test_of_equal_weights():
    model = _model()
    assert weights_fingerprint(model) == weights_fingerprint(_model())
    assert weights_fingerprint(model) == weights_fingerprint(copy.deepcopy(model).bfloat16())
    half = copy.deepcopy(model).half()
    assert weights_fingerprint(model, torch.float16) == weights_fingerprint(half, torch.float16)


def test_tells_values_orders_and_names_apart():
    model = _model()
    changed, reordered = copy.deepcopy(model), copy.deepcopy(model)
    changed[1].weight.data[2, 1] *= 1.5
    reordered[0].weight.data = reordered[0].weight.data.flip(0)  # the sum is the same
    renamed = nn.Sequential()
    renamed.add_module("0", model[0])
    renamed.add_module("one", model[1])
    assert len({weights_fingerprint(each) for each in (model, changed, reordered, renamed)}) == 4


def test_refuses_weights_without_values():
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="expected loaded weights, got bias on the meta device"):
        weights_fingerprint(model)
