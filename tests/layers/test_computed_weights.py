"""Weights that are no plain parameters: computed by torch, swapped, fake, on the meta device, in inference mode."""

import pytest
import torch
from torch import nn
from weight_cases import SIZES, SPECS, X, check_follows, dense_layer, random_data, sparse_layer

from nm_act import NMLinear


class _Scaled(nn.Module):
    """A weight with a scale of its own for every channel: what survives depends on it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, weight):
        return weight * self.scale

    def change(self) -> torch.Tensor:
        self.scale.copy_(torch.linspace(0.1, 5, 64).roll(7))
        return dense_layer(0).weight * self.scale


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("how", ["", "float", "load_state_dict", "refresh", "eval"])
@torch.no_grad()
def test_a_parametrized_weight_is_derived_from_in_each_call(name, how):
    layer, scaled = sparse_layer(name, dense_layer(0)), _Scaled()
    nn.utils.parametrize.register_parametrization(layer, "weight", scaled)
    if how:
        arguments = (layer.state_dict(),) if how == "load_state_dict" else ()
        getattr(layer, how)(*arguments)
    layer(X)
    check_follows(layer, scaled.change(), name)


@torch.no_grad()
def test_a_compiled_layer_derives_from_a_parametrized_weight():
    layer, scaled = sparse_layer("dpts-mean", dense_layer(0)), _Scaled()
    nn.utils.parametrize.register_parametrization(layer, "weight", scaled)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(X)
    scaled.change()
    torch.testing.assert_close(compiled(X), layer(X))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["wina", "dpts-mean", "weight-magnitude", "lifted"])
@torch.no_grad()
def test_a_weight_norm_is_followed(name):
    layer = sparse_layer(name, dense_layer(0))
    nn.utils.weight_norm(layer)
    layer(X)
    layer.float()
    layer(X)
    weight = dense_layer(0).weight * torch.linspace(0.2, 6, 24)[:, None]
    layer.weight_g.copy_(weight.norm(dim=1, keepdim=True))
    check_follows(layer, weight, name)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_torch_may_swap_parameters(name, swapping):
    layer, dense = sparse_layer(name, dense_layer(0)), dense_layer(1)
    parameter = layer.weight if name != "lifted" else None
    layer.bfloat16().float()
    dense.weight.mul_(2)
    layer.load_state_dict(dense.state_dict() | layer.data())
    assert parameter is None or layer.weight is parameter
    layer.bias.copy_(dense_layer(0).bias)
    layer.set_data(**random_data(layer))
    check_follows(layer, dense.weight, name)


@pytest.mark.parametrize("name", ["wina", "weight-magnitude"])
@pytest.mark.parametrize("touch", ["eval", "weight"])
@torch.no_grad()
def test_fake_tensors_ask_for_no_values_and_leave_none_behind(name, touch):
    from torch._subclasses import FakeTensorMode

    layer, weight = sparse_layer(name, dense_layer(0)), dense_layer(1).weight.detach() * 2
    expected = layer(X)
    next(iter(layer.parameters())).data.copy_(weight)
    layer.eval() if touch == "eval" else layer.weight
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(X)).shape == expected.shape
    assert all(type(value) is torch.Tensor for value in layer.buffers())
    check_follows(layer, weight, name)


@pytest.mark.parametrize("name", ["act", "wina", "weight-magnitude", "dpts-mean"])
def test_a_layer_without_a_weight_gives_shapes(name):
    layer = NMLinear(*SIZES, spec=SPECS[name], device="meta")
    assert layer(X.to("meta")).shape == (3, 5, 24)
    layer.load_state_dict(dense_layer(0).state_dict(), assign=True)
    torch.testing.assert_close(layer(X), sparse_layer(name, dense_layer(0))(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("how", ["first call", "refresh", "set_data"])
def test_what_inference_mode_derived_serves_training(name, how):
    layer = sparse_layer(name, dense_layer(0))
    if how == "first call":
        layer = NMLinear(*SIZES, spec=SPECS[name], device="meta", lift=name == "lifted").eval()
        layer.weight, layer.bias = dense_layer(0).weight, dense_layer(0).bias
        for key, value in random_data(sparse_layer(name, dense_layer(0))).items():
            setattr(layer, key, value)
    layer.requires_grad_(False)
    with torch.inference_mode():
        if how == "refresh":
            layer.refresh()
        if how == "set_data":
            layer.set_data(**random_data(layer))
        layer(X)
    assert not any(value.is_inference() for value in layer.buffers())
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_state_dict_has_only_what_torch_puts_there():
    layer = sparse_layer("wina", dense_layer(0))
    nn.utils.parametrize.register_parametrization(layer, "weight", _Scaled())
    expected = dense_layer(0)
    nn.utils.parametrize.register_parametrization(expected, "weight", _Scaled())
    assert sorted(layer.state_dict()) == sorted(expected.state_dict())


@torch.no_grad()
def test_printing_a_layer_touches_nothing():
    layer = sparse_layer("wina", dense_layer(0))
    assert repr(layer) == "NMLinear(in_features=64, out_features=24, bias=True, 8:16 wina)"
    assert not layer._handed_out


@pytest.mark.parametrize("name", ["act", "wina", "dpts-mean", "lifted", "lpts"])
def test_a_training_step_derives_once(name, monkeypatch):
    layer = sparse_layer(name, dense_layer(0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    made, derive = [], NMLinear._derive
    monkeypatch.setattr(NMLinear, "_derive", lambda self: made.append(1) or derive(self))
    for _ in range(3):
        optimizer.zero_grad()
        layer(X).sum().backward()
        optimizer.step()
    assert len(made) == (0 if name == "act" else 3)
