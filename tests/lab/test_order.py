"""Orders of input channels: how they are found, and that folding one in keeps the dense function."""

import copy

import pytest
import tiny_model
import torch
from torch import nn

import nm_act
from nm_act.conversion.permutation import fold_order
from nm_act.lab.calibrate.blocks import switched
from nm_act.lab.calibrate.order import channel_order, find_order
from nm_act.layers.linear import NMLinear
from nm_act.recipe import Recipe


def test_channel_order_deals_the_strong_out():
    energy = torch.rand(32)
    order = channel_order(energy, 4)
    assert sorted(order.tolist()) == list(range(32))
    rank = energy.argsort(descending=True).argsort()[order].view(8, 4)
    assert torch.equal(rank // 8, torch.arange(4).expand(8, 4))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_folding_an_order_keeps_the_dense_function(bias, sparse):
    model, ids = tiny_model.build()[0], torch.arange(48).view(2, 24)
    block = model.model.layers[0]
    for module in (block.self_attn.v_proj, block.mlp.gate_proj, block.mlp.up_proj):
        module.bias = nn.Parameter(torch.randn(module.out_features)) if bias else None
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    nm_act.sparsify(twin, Recipe("2:4", mitigation=["permute"]))
    orders = {}
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        width = block.get_submodule(name).in_features
        orders[name] = find_order(twin.model.layers[0], name, torch.rand(width))
        assert sorted(orders[name].tolist()) == list(range(width))
        assert orders[name].tolist() != list(range(width))
        fold_order(twin.model.layers[0] if sparse else block, name, orders[name])
    shared = orders["self_attn.o_proj"].view(2, 2, 16) % 16  # value heads, query heads of each, head_dim
    assert torch.equal(shared[:, 0], shared[:, 1])
    if sparse:
        with switched((module for module in twin.modules() if isinstance(module, NMLinear)), "bypass"):
            actual = twin(ids).logits
    else:
        actual = model(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_orders_that_cannot_be_folded():
    model = tiny_model.build()[0]
    nm_act.sparsify(model, Recipe("2:4", mitigation=["permute"]))
    block = model.model.layers[0]
    assert torch.equal(find_order(block, "mlp.up_proj", torch.rand(64)), torch.arange(64))
    with pytest.raises(ValueError, match=r"expected gate_proj and up_proj, or v_proj, in front of mlp.up_proj"):
        fold_order(block, "mlp.up_proj", torch.arange(64).flip(0))
