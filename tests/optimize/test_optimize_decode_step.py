"""Decode steps of optimized models, their CUDA operators replaced by formulas: what each product takes along."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import fused_formulas
import pytest
import torch
from fused_formulas import activated, packed_on_a_cpu
from tiny_families import IDS, KNOWN, assert_close, logits, optimize_checked, sparse
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import nm_act
from nm_act import reference
from nm_act.ops import explain
from nm_act.optimize import attention, fused, given, operands, static
from nm_act.optimize.eligible import has_hooks
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

    def fuses(module, *_):
        return not any(has_hooks(getattr(module, name)) for name in attention.QKV)

    monkeypatch.setattr(attention, "fuses", fuses)
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
@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_between_layers_see_what_the_stock_layer_gives(hooked, in_place, calls, products):
    """As in the stock model, a hook may change what a layer returns or gets; each product is computed from that."""
    stock = sparse("gemma3")
    model = copy.deepcopy(stock)
    nm_act.optimize(model)

    def changed(x):
        shift = torch.linspace(0, 1, x.shape[-1])  # no norm undoes it
        return x.add_(shift) if in_place else x + shift

    for each in (stock, model):
        each.get_submodule(f"model.{hooked}").register_forward_pre_hook(lambda _, args: tuple(map(changed, args)))
    assert_close(logits(model), logits(stock))
    assert calls.count("added norm") == 2


def run_layers(model, between=lambda _x: None):
    """The hidden states after both layers of a loop of the caller's own, which does something between the layers."""
    x = torch.nn.functional.embedding(IDS, model.model.embed_tokens.weight)
    angles = model.model.rotary_emb(x, torch.arange(IDS.shape[1])[None], model.config.layer_types[0])
    with torch.no_grad():
        for layer in model.model.layers:
            x = layer(x, position_embeddings=angles, attention_mask=None)
            between(x)
    return x


IN_PLACE = {
    "add": lambda x: x.add_(torch.linspace(0, 1, x.shape[-1])),
    "a part": lambda x: x[:, 0].fill_(0.5),
    "data": lambda x: setattr(x, "data", x.data.flip(-1)),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_states_that_change_between_layers_are_seen(how, calls, products):
    model = sparse("gemma3")
    stock = run_layers(model, IN_PLACE[how])
    nm_act.optimize(model)
    calls.clear()
    assert_close(run_layers(model, IN_PLACE[how]), stock)
    untouched = run_layers(model)
    assert (untouched - stock).abs().max() > 0.1


@pytest.mark.parametrize("changed", ["input_layernorm.weight", "self_attn.qkv_proj.linear.weight"])
def test_weights_that_change_between_layers_are_seen(changed, calls, products):
    model, changes = sparse("gemma3"), []
    nm_act.optimize(model)

    def change(_x):
        if not changes:
            changes.append(changed)
            parameter = dict(second.named_parameters())[changed]
            parameter.mul_(torch.linspace(0.5, 2, parameter.shape[-1]))

    second = model.model.layers[1]
    changed = next(name for name, _ in second.named_parameters() if name.endswith(changed.rpartition("_proj.")[2]))
    actual = run_layers(model, change)
    assert_close(actual, run_layers(model))


def test_inference_tensors_are_linked_by_a_static_decoder_alone(calls, products):
    """They do not count their changes."""
    model = sparse("gemma3")
    nm_act.optimize(model)
    with torch.inference_mode():
        model(input_ids=IDS)
        assert calls == ["added norm"] * 2
        calls.clear()
        model(input_ids=IDS, nm_act_lengths=None)
        assert calls == ["added norm"]


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


def test_global_hooks_and_tensors_without_data_are_not_linked(calls, products):
    model = sparse("gemma3")
    nm_act.optimize(model)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        logits(model)
    assert not calls
    found = []
    torch.vmap(lambda x: found.append(given.has_state(x)) or x)(torch.zeros(2, 3))
    with FakeTensorMode():
        found.append(given.has_state(torch.zeros(3)))
    assert found == [False, False]
    assert given.has_state(torch.zeros(3))


@pytest.fixture
def links(monkeypatch):
    """The hidden states with which a product comes along."""
    found = []
    monkeypatch.setattr(fused, "give", lambda hidden, _given: found.append(hidden))
    return found


def _hook(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda *_: None)


def _replace_forward(model):
    layer = model.model.layers[1]
    layer.forward = layer.forward


UNLINKED = {
    "hooks on it": _hook("model.layers.0"),
    "hooks on the next layer or its attention": _hook("model.layers.1.self_attn"),
    "the forward of the next layer is replaced already": _replace_forward,
    "the next layer's norm has another epsilon": lambda model: setattr(
        model.model.layers[1].input_layernorm, "eps", 0.1
    ),
    "post_feedforward_layernorm: it has hooks": _hook("model.layers.0.post_feedforward_layernorm"),
    "input_layernorm of the next layer: it has hooks": _hook("model.layers.1.input_layernorm"),
    "input_layernorm of the next layer: projections that are not merged, or have hooks": _hook(
        "model.layers.1.self_attn.q_proj"
    ),
    "pre_feedforward_layernorm: projections that are not merged, or have hooks": _hook("model.layers.0.mlp"),
}


@pytest.mark.parametrize("why", UNLINKED)
def test_the_report_says_why_layers_are_not_linked(why, calls, products, links):
    model = sparse("gemma3")
    UNLINKED[why](model)
    report = nm_act.optimize(model)
    assert (report.linked, report.unlinked) == ([], [("model.layers.0", why)])
    assert f"the next layer's first, on CUDA: 0 of 1 layers\n  not: {why}  x 1\n" in f"{report}\n"
    logits(model)
    assert not links


def test_the_report_counts_the_layers_that_are_linked(calls, products, links):
    model = sparse("gemma3")
    report = nm_act.optimize(model)
    logits(model)
    assert len(links) == 1
    assert (report.linked, report.unlinked) == (["model.layers.0"], [])
    assert "last norm computed with the next layer's first, on CUDA: 1 of 1 layers\n" in str(report)
    assert "next layer" not in str(nm_act.optimize(sparse("llama")))


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (torch.bfloat16, "the next layer is in another dtype"),
        ("meta", "input_layernorm of the next layer: projections that are not merged, or have hooks"),
    ],
)
def test_the_report_knows_layers_in_other_places(place, why):
    model = sparse("gemma3")
    model.model.layers[1].to(place)
    assert nm_act.optimize(model).unlinked == [("model.layers.0", why)]


def test_the_report_knows_hooks_on_all_modules():
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert nm_act.optimize(sparse("gemma3")).unlinked == [("model.layers.0", "hooks on all modules")]
    assert nm_act.optimize(sparse("gemma3", skip_layers=[1])).unlinked == [
        ("model.layers.0", "input_layernorm of the next layer: not sparse")
    ]


def test_states_keep_nothing(calls, products):
    """What comes along is neither saved nor copied with the states, and is gone with them."""
    model = sparse("gemma3")
    nm_act.optimize(model)
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    logits(model)
    assert not vars(seen.pop())
    gc.collect()
    assert not given._given


def test_copies_compute_for_themselves_and_layers_are_not_kept(calls, products):
    model = sparse("gemma3")
    expected = logits(model)
    nm_act.optimize(model)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert_close(logits(each), expected)
        assert calls == ["added norm"] * 2
    second = weakref.ref(model.model.layers[1])
    del model.model.layers[1]
    gc.collect()
    assert second() is None
    vars(model.model.layers[0]).pop("nm_act_following")  # as a model that was pickled by 0.1 has none
    model.config.num_hidden_layers = 1
    logits(model)
    nm_act.deoptimize(model)


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
