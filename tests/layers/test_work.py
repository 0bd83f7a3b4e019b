"""The description of a layer's work: when it is made anew, and what it does with the layer's own parameters."""

import sys
import threading

import pytest
import torch
from torch import nn

import nm_act
from nm_act.layers.work import compiled_operator


def _layer(spec, **options):
    return nm_act.NMLinear.from_linear(nn.Linear(64, 32, **options).requires_grad_(False), nm_act.LinearSpec(spec))


def test_is_made_once_for_many_calls():
    layer, x = _layer("8:16"), torch.randn(2, 64)
    work = layer.work(layer.weight)
    layer(x)
    assert layer.work(layer.weight) is work
    layer.refresh()
    assert layer.work(layer.weight) is not work


def test_follows_the_spec():
    layer, x = _layer("8:16", bias=False), torch.randn(2, 64)
    layer(x)
    layer.spec = nm_act.LinearSpec("2:4")
    torch.testing.assert_close(layer(x), nm_act.prune(x, "2:4") @ layer.weight.t())


def test_of_calibration_is_not_kept_for_inference():
    spec = nm_act.LinearSpec("8:16", mitigation=["spts"])
    layer = nm_act.NMLinear.from_linear(nn.Linear(64, 32).requires_grad_(False), spec)
    layer.differentiable = True
    layer.set_data(shift=torch.zeros(64))
    assert layer.work(layer.weight).operator is not compiled_operator
    layer.differentiable = False
    assert layer.work(layer.weight).operator is compiled_operator


@pytest.mark.parametrize("autocast", [False, True])
def test_takes_a_bias_in_another_dtype(autocast):
    layer = _layer("8:16", dtype=torch.bfloat16)
    layer.bias = nn.Parameter(torch.randn(32), requires_grad=False)
    x = torch.randn(2, 64).bfloat16()
    expected = nm_act.sparse_linear(x, layer.weight, layer.bias.bfloat16(), "8:16")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x.float() if autocast else x), expected)


def test_another_spec_derives_again_or_is_refused():
    x = torch.randn(2, 64)
    layer = nm_act.NMLinear.from_linear(nn.Linear(64, 32).requires_grad_(False), nm_act.LinearSpec("2:4+1"), lift=True)
    wina = nm_act.LinearSpec("8:16", criterion="wina")
    layer.spec = wina
    expected = nm_act.NMLinear.from_linear(layer.to_linear(), wina)(x)
    torch.testing.assert_close(layer(x), expected)
    layer.weight.data.mul_(torch.arange(64) % 7)  # wina reads the weight: noticed
    torch.testing.assert_close(layer(x), nm_act.NMLinear.from_linear(layer.to_linear(), wina)(x))
    for refused in (
        nm_act.LinearSpec("8:16", mitigation=["spts"]),
        nm_act.LinearSpec("8:16", mitigation=["rsparse-4"]),
    ):
        with pytest.raises(ValueError, match="expected a spec with the calibrated data of 8:16 wina"):
            layer.spec = refused


def test_survives_a_refresh_in_another_thread():
    layer, x, stop, errors = _layer("8:16"), torch.randn(2, 64), threading.Event(), []
    expected = layer(x)

    def call():
        while not stop.is_set():
            try:
                assert torch.equal(layer(x), expected)
            except Exception as error:
                errors.append(error)
                return

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        layer.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert errors == []


def test_a_layer_pickled_by_the_version_before_works():
    layer, x = _layer("8:16"), torch.randn(2, 64)
    state = layer.__getstate__()
    state["spec"] = state.pop("_spec")  # an attribute then, and no work stored
    del state["_stored"]
    old = nm_act.NMLinear.__new__(nm_act.NMLinear)
    old.__setstate__(state)
    assert torch.equal(old(x), layer(x))
    assert old.spec == layer.spec
