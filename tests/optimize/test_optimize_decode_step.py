"""Decode steps of optimized models, their CUDA operators replaced by formulas: what each product takes along."""

import copy
import pickle
from types import SimpleNamespace

import fused_formulas
import pytest
import torch
from fused_formulas import activated, packed_on_a_cpu
from tiny_families import KNOWN, assert_close, logits, optimize_checked, sparse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import nm_act
from nm_act import reference
from nm_act.ops import explain
from nm_act.optimize import attention, fused, operands, static
from nm_act.optimize.fp8 import FP8Linear


@pytest.fixture
def calls(monkeypatch):
    """What was packed, pruned or added, in words and in order."""
    return packed_on_a_cpu(monkeypatch)


@pytest.fixture
def products(monkeypatch):
    """What stands around the product in each kernel of a decode step, of which the formula takes the place."""
    products = []

    def decode_linear(x, weight, bias, pattern, *, channel_scale, up=None, residual=None, activation=None, **norm):
        products.append([key for key, value in {"up": up, "residual": residual, **norm}.items() if value is not None])
        if norm:
            x = fused_formulas.norm(x, norm["norm_weight"], norm["eps"], norm["unit_offset"])
        if up is not None:
            x = up * activated(x, activation)
        y = F.linear(reference.prune(x, pattern, channel_scale=channel_scale), weight, bias)
        return y if residual is None else y + residual

    def sandwich_linear(x, x_weight, residual, norm_weight, eps, *layer, unit_offset, **options):
        hidden = fused_formulas.norm(x, x_weight, eps, unit_offset) + residual
        norm = {"norm_weight": norm_weight, "eps": eps, "unit_offset": unit_offset}
        return decode_linear(hidden, *layer, **norm, **options), hidden

    monkeypatch.setattr(operands, "decode_linear", decode_linear)
    monkeypatch.setattr(operands, "sandwich_linear", sandwich_linear)
    monkeypatch.setattr(operands, "way_of", lambda *_: "decode")
    monkeypatch.setattr(attention, "rotary", fused_formulas.rotary)
    monkeypatch.setattr(attention, "fuses", lambda *_: True)
    return products


@pytest.mark.parametrize("name", KNOWN)
def test_residuals_go_into_the_products_of_a_decode_step(name, calls, products):
    """An addition after a product would be one too many, or none at all."""
    optimize_checked(sparse(name))
    norm = ["norm_weight", "eps", "unit_offset"]
    # q/k/v, output projection, gate/up, down; norms stand between Gemma's products and their residuals, and the one
    # after attention is computed with gate and up.
    ends = [["up"]] if name == "gemma3" else [["residual"], ["up", "residual"]]
    expected = [norm, *ends[:-1], norm, ends[-1]]
    assert products == expected * 2
    # The product of the next layer's q/k/v computes the norm after down; the last layer has no next one.
    assert calls == (["added norm"] if name == "gemma3" else [])


@pytest.mark.parametrize("hooked", ["layers.0", "layers.1", "layers.1.self_attn", "layers.1.self_attn.q_proj"])
def test_hooks_between_layers_see_what_the_stock_layer_gives(hooked, calls, products):
    """As in the stock model, a hook may change what a layer returns or gets; each product is computed from that."""
    stock = sparse("gemma3")
    model = copy.deepcopy(stock)
    nm_act.optimize(model)
    for each in (stock, model):
        each.get_submodule(f"model.{hooked}").register_forward_pre_hook(lambda _, args: tuple(1.5 * x for x in args))
    assert_close(logits(model), logits(stock))
    assert calls.count("added norm") == 2


def test_views_of_a_model_compute_each_product_once(calls, products):
    """StaticDecoder calls copies of the layers, which share their parts."""
    model = sparse("gemma3")
    expected = logits(model)
    nm_act.optimize(model)
    once = logits(model)
    number = len(products)
    view = static._with_config(model, model.config, copy.copy(model.config))
    assert view.model.layers[1] is not model.model.layers[1]
    assert_close(logits(view), expected)
    assert_close(once, expected)
    assert len(products) == 2 * number
    assert calls == ["added norm"] * 2


def test_a_product_is_not_used_for_other_states(calls, products):
    model = sparse("gemma3")
    nm_act.optimize(model)
    first, second = model.model.layers
    linear = attention.merged_qkv(second.self_attn).linear
    for given in ((linear, "packed"), (first.mlp.down_proj, "decode")):
        x = torch.zeros(1, 1, 4)
        x.nm_act_given = *given, torch.full((1,), torch.nan)
        assert fused._taken(x, linear, "decode") is None
        assert not vars(x)
    stock = logits(sparse("gemma3"))
    first.register_forward_hook(lambda _module, _args, y: y.clone())
    assert_close(logits(model), stock)
    assert calls == ["added norm"] * 2


def test_linked_layers_are_copied_and_restored():
    model = sparse("gemma3")
    nm_act.optimize(model)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own, place = each.model.layers[1].nm_act_place
        assert own[place] is each.model.layers[1]
        assert own[0] is each.model.layers[0]
    nm_act.deoptimize(model)
    assert not any("nm_act_place" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize(
    ("pattern", "decode_pattern", "layout", "ways"),
    [
        ("2:4", "8:16", "both", {1: "decode", 2: "decode", 3: "pruned", 8: "pruned", 16: "pruned"}),
        ("2:4", None, "both", {1: "decode", 2: "decode", 3: "packed", 8: "packed"}),
        ("8:16", None, "prefill", {1: "pruned", 8: "pruned"}),
        ("8:16", None, "decode", {1: "decode", 4: "decode", 8: ""}),
        ("2:4", "8:16", None, {1: "decode", 4: "decode", 5: "pruned", 8: "pruned"}),
    ],
)
def test_ways_of_decode_steps_of_several_sequences(pattern, decode_pattern, layout, ways, monkeypatch):
    """Rows are skipped while that pays; then the K-major copy serves the step, with the pattern of the recipe."""
    facts = SimpleNamespace(major=9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: facts)
    monkeypatch.setattr(explain, "_GATHERS", {})
    spec = nm_act.LinearSpec(pattern, decode_pattern=decode_pattern)
    layer = nm_act.NMLinear(64, 96, spec=spec, dtype=torch.bfloat16).requires_grad_(False)
    linear = layer if layout is None else FP8Linear(layer, layout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = {tokens: torch.empty(tokens, 1, 64, dtype=torch.bfloat16, device="cuda") for tokens in ways}
        assert {tokens: operands.way_of(linear, x) for tokens, x in inputs.items()} == ways


def test_nothing_comes_along_in_a_trace(calls, products, monkeypatch):
    """A compiled model is not to depend on the attributes of its tensors."""
    model = sparse("gemma3")
    expected = logits(model)
    nm_act.optimize(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(logits(model), expected)
    assert calls == ["added norm"] * 2
    linear = attention.merged_qkv(model.model.layers[1].self_attn).linear
    x = torch.zeros(1, 1, 4)
    x.nm_act_given = linear, "decode", x
    assert fused._taken(x, linear, "decode") is None
