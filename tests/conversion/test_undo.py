"""After any error in sparsify the model is as before: modules, weights, ties, hooks, attributes and config."""

import gc
import importlib
import weakref

import pytest
import torch
import transformers
from conftest import fails_after
from tiny_families import family
from torch import nn

from nm_act.conversion.sparsify import sparsify
from nm_act.integrations import transformers as integration
from nm_act.layers.linear import NMLinear
from nm_act.layers.tokens import TokenContext
from nm_act.recipe import Recipe

# As attributes of packages they are the functions.
conversion, optimizing = map(importlib.import_module, ("nm_act.conversion.sparsify", "nm_act.optimize"))
RECIPE = Recipe("8:16", dense_first_tokens=2)


def _raises_after(monkeypatch, owner, name):
    """Let a function raise when it has done its work."""
    original = getattr(owner, name)

    def function(*arguments):
        original(*arguments)
        raise RuntimeError("no more")

    monkeypatch.setattr(owner, name, function)


def _in_the_record(monkeypatch):
    _raises_after(monkeypatch, integration, "record_recipe")
    monkeypatch.setattr(conversion, "RECORDERS", [integration.record_recipe])


FAILURES = {
    "in from_linear": lambda patch: fails_after(patch, NMLinear, "from_linear", 9, torch.OutOfMemoryError),
    "in the context": lambda patch: _raises_after(patch, TokenContext, "attach"),
    "in the record": _in_the_record,
    "in merging": lambda patch: fails_after(patch, optimizing.model, "merge", 1),
    "interrupted": lambda patch: fails_after(patch, NMLinear, "from_linear", 1, KeyboardInterrupt),
    "after optimize": lambda patch: _raises_after(patch, conversion, "merge_and_fuse"),
}


def _facts(model):
    """Everything but the identity of modules and weights that nobody else holds."""
    state = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    modules = {}
    for name, module in model.named_modules():
        hooks = {key: list(value.values()) for key, value in vars(module).items() if "hooks" in key}
        others = {key for key in vars(module) if not key.startswith("_")}
        modules[name] = (type(module), list(module._modules), list(module._parameters), hooks, others, module.training)
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return state, modules, grads, dict(vars(model.config))


def _check_same(before, after):
    assert before[1:] == after[1:]
    assert list(before[0]) == list(after[0])
    for name, (value, stride) in before[0].items():
        assert torch.equal(value, after[0][name][0])
        assert stride == after[0][name][1]


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_model_is_as_before_after_an_error(fail, monkeypatch):
    model = family("llama", attention_bias=True)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # tied, held by nobody else
    layers[1].mlp.gate_proj = layers[0].mlp.gate_proj  # one layer in two places
    held, held_weight = layers[0].self_attn.q_proj, layers[0].self_attn.k_proj.weight
    held_bias = layers[0].self_attn.k_proj.bias
    calls = []
    handle = layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    layers[0].mlp.down_proj.tag = "mine"
    layers[1].self_attn.v_proj.weight.requires_grad_(False)
    layers[1].self_attn.v_proj.weight.mark = "kept"
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(ids).logits
    before = _facts(model)
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises((RuntimeError, KeyboardInterrupt), match="no more"):
            sparsify(model, RECIPE, optimize=True)
    gc.collect()
    _check_same(before, _facts(model))
    assert not any(isinstance(module, NMLinear) for module in model.modules())
    assert not hasattr(model, "nm_act_recipe")
    assert layers[0].self_attn.q_proj is held
    assert layers[0].self_attn.k_proj.weight is held_weight
    assert layers[0].self_attn.k_proj.bias is held_bias
    assert layers[1].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    assert layers[1].mlp.gate_proj is layers[0].mlp.gate_proj
    assert layers[1].self_attn.v_proj.weight.mark == "kept"
    calls.clear()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert calls == [1]
    handle.remove()  # a handle that the user has still removes its hook
    assert not layers[0].mlp.down_proj._forward_hooks
    again = sparsify(model, RECIPE)  # the model is none the worse
    assert len(again.replaced) == 14


def test_falcon_s_own_linear_layers_come_back(monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).eval()
    before = _facts(model)
    fails_after(monkeypatch, NMLinear, "from_linear", 5)
    with pytest.raises(RuntimeError, match="no more"):
        sparsify(model, Recipe("8:16"))
    _check_same(before, _facts(model))


def test_undoing_frees_one_layer_before_it_copies_the_next(monkeypatch):
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 32)}) for _ in range(5))
    original, sparse = NMLinear.from_linear, []

    def from_linear(linear, spec):
        if len(sparse) == 4:
            monkeypatch.setattr(torch, "empty_strided", counted)
            raise RuntimeError("no more")
        layer = original(linear, spec)
        sparse.append(weakref.ref(layer))
        return layer

    alive = []
    empty = torch.empty_strided

    def counted(*arguments, **options):
        alive.append(sum(reference() is not None for reference in sparse))
        return empty(*arguments, **options)

    monkeypatch.setattr(NMLinear, "from_linear", from_linear)
    with pytest.raises(RuntimeError, match="no more"):
        sparsify(model, Recipe("8:16", projections=["up_proj"]))
    # The fourth is a local variable of the frame that raised.
    assert alive == [4, 3, 2, 1]


def test_accelerate_s_hooks_come_back(monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 32)}) for _ in range(3))
    first = model.layers[0]["up_proj"]
    hook = hooks.add_hook_to_module(first, hooks.AlignDevicesHook(execution_device="cpu"))._hf_hook
    x = torch.randn(4, 32)
    expected = first(x).detach()
    held = weakref.ref(first)
    del first
    original = NMLinear.from_linear

    def from_linear(linear, spec):
        gc.collect()  # a hooked layer and its forward hold each other
        if held() is None:
            raise RuntimeError("no more")
        return original(linear, spec)

    monkeypatch.setattr(NMLinear, "from_linear", from_linear)
    with pytest.raises(RuntimeError, match="no more"):
        sparsify(model, Recipe("8:16", projections=["up_proj"]))
    again = model.layers[0]["up_proj"]
    assert type(again) is nn.Linear
    assert again._hf_hook is hook
    assert "forward" in vars(again)
    assert torch.equal(again(x), expected)
