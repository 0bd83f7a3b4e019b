"""optimize(): the same outputs from fewer layers, stock checkpoints, and sentences for what cannot be."""

import copy

import pytest
import torch
from tiny_families import IDS, KNOWN, assert_close, family, logits, optimize_checked, sparse, sparse_layers

import nm_act
from nm_act.layers.kv_cache import cache_argument
from nm_act.layers.linear import NMLinear
from nm_act.optimize.merged import MergedLinear, Product
from nm_act.parallel import Shard


def assert_same_state(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        merged = name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        assert actual[name].is_contiguous() or not merged, name


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("pattern", ["dense", "2:4", "8:16"])
def test_outputs_equal_the_unfused_model(name, pattern):
    model = family(name)
    if pattern != "dense":
        nm_act.sparsify(model, nm_act.Recipe(pattern, mitigation=["var", "dpts-mean"]))
    report = optimize_checked(model, use_cache=True)
    assert len(report.merged) == 4
    assert not any(layer.endswith("proj") for layer, _ in report.kept)


@pytest.mark.parametrize("name", KNOWN)
def test_one_product_serves_all_consumers(name, monkeypatch):
    model = sparse(name)
    nm_act.optimize(model)
    inputs = []
    forward = NMLinear.forward
    monkeypatch.setattr(NMLinear, "forward", lambda self, x: inputs.append(self.out_features) or forward(self, x))
    logits(model)
    assert len(inputs) == 4 * 2  # q/k/v, o, gate/up, down of two layers


@pytest.mark.parametrize("name", KNOWN)
def test_generate_equals_the_unfused_model(name):
    model = sparse(name, "8:16")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0  # padding on the left
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    expected = model.generate(IDS, **options)
    nm_act.optimize(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("name", KNOWN)
def test_state_dict_is_the_stock_one_and_loads(name):
    model = sparse(name)
    stock = {key: value.clone() for key, value in model.state_dict().items()}
    nm_act.optimize(model)
    assert_same_state(model.state_dict(), stock)
    expected = logits(model)
    torch.manual_seed(1)
    noise = {key: value + torch.randn_like(value) for key, value in stock.items()}
    model.load_state_dict(noise)
    assert not torch.allclose(logits(model), expected)
    model.load_state_dict(stock)
    assert torch.equal(logits(model), expected)
    model.load_state_dict(copy.deepcopy(stock), assign=True)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_an_incomplete_state_dict_loads_its_part_and_names_the_rest(assign):
    model, other = sparse(), sparse()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nm_act.optimize(model)
    attention = "model.layers.0.self_attn"
    absent = [f"{attention}.k_proj.weight", *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))]
    state = {key: value + 1 for key, value in before.items() if key not in absent}
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{attention}.k_proj.weight\", "):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == (absent, [])
    expected = {key: before[key] if key in absent else state[key] for key in before}
    assert_same_state(model.state_dict(), expected)
    other.load_state_dict(expected)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("name", KNOWN)
def test_save_pretrained_and_from_pretrained(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = sparse(name)
    expected = logits(model)
    nm_act.optimize(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(sparse_layers(again)) == 14
    assert_close(logits(again), expected)


@pytest.mark.parametrize("fp8", [None, "decode"])
def test_deoptimize_restores_the_stock_modules(fp8):
    model = sparse("qwen2")
    names = {name: type(module) for name, module in model.named_modules()}
    nm_act.optimize(model, fp8=fp8)
    expected = logits(model)
    state = model.state_dict()
    assert nm_act.deoptimize(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == names
    restored = model.state_dict()
    assert all(torch.equal(restored[key], value) for key, value in state.items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert_close(logits(model), expected)
    nm_act.optimize(model)  # and once more
    assert_close(logits(model), expected)


def test_deep_copies_and_dtypes_are_independent():
    model = sparse()
    nm_act.optimize(model)
    expected = logits(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert torch.equal(logits(other), expected)
    half = other.bfloat16()
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    assert logits(half).dtype == torch.bfloat16


def test_only_equal_specs_are_merged():
    rules = [nm_act.Rule(projections=["q_proj", "gate_proj"], pattern="2:4")]
    report = optimize_checked(sparse(pattern="dense", rules=rules))
    assert {names for _, names in report.merged} == {("k_proj", "v_proj")}
    reasons = dict(report.kept)
    assert reasons["model.layers.0.self_attn.q_proj"].startswith("the other projections")
    assert reasons["model.layers.0.mlp.up_proj"].startswith("the other projections")
    assert not report.fused


def test_scores_that_differ_by_layer_are_not_merged():
    model = sparse(criterion="wina")
    expected = logits(model)
    report = nm_act.optimize(model)
    assert report.merged == []
    assert dict(report.kept)["model.layers.1.mlp.gate_proj"].startswith("the scores of 'wina'")
    assert torch.equal(logits(model), expected)


def test_first_tokens_dense_survive_merging():
    assert optimize_checked(sparse(dense_first_tokens=2)).merged


def test_unknown_architectures_stay_as_they_are():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x + 1) + self.v_proj(x)

    model = torch.nn.ModuleList([Attention()])
    nm_act.sparsify(model, nm_act.Recipe("2:4"))
    x = torch.randn(2, 32)
    expected = model[0](x)
    report = nm_act.optimize(model)
    assert report.kept == [("0", f"Attention is not of a known family ({', '.join(KNOWN)})")]
    assert torch.equal(model[0](x), expected)
    assert "as they were" in str(report)


def test_a_part_called_on_its_own_computes_its_own_output():
    model = sparse()
    attention = model.model.layers[0].self_attn
    x = torch.randn(3, 64)
    expected = [attention.q_proj(x), attention.k_proj(x)]
    nm_act.optimize(model)
    first = attention.q_proj(x)
    assert_close(first, expected[0], atol=1e-5)
    assert_close(attention.k_proj(x), expected[1], atol=1e-5)
    x.zero_()  # nothing may be served from before
    assert attention.v_proj(x).abs().max() == 0
    assert attention.k_proj.weight.shape == (32, 64)
    assert attention.k_proj.bias is None


def test_a_filled_product_is_only_given_to_its_placeholder():
    model = sparse()
    nm_act.optimize(model)
    attention = model.model.layers[0].self_attn
    merged = next(child for child in attention.children() if isinstance(child, MergedLinear))
    x = torch.randn(3, 64)
    product = Product(merged, x, torch.ones(3, 128))
    once = r"expected {} to be called once with the tensor .*, got {}; call"
    with pytest.raises(RuntimeError, match=once.format("q_proj", "another one")):
        attention.q_proj(x + 1, product=product)
    assert attention.v_proj(x, product=product).eq(1).all()
    with pytest.raises(RuntimeError, match=once.format("v_proj", "it twice")):
        attention.v_proj(x, product=product)


def test_wrong_uses_are_one_sentence():
    model = family("llama")
    with pytest.raises(ValueError, match="expected an optimized model"):
        nm_act.deoptimize(model)
    with pytest.raises(ValueError, match="expected a sparse model for fp8, got a dense one"):
        nm_act.optimize(model, fp8="decode")
    with pytest.raises(ValueError, match="expected fp8 among prefill, decode, both, got 'e5m2'"):
        nm_act.optimize(model, fp8="e5m2")
    nm_act.optimize(model)
    for recipe in (nm_act.Recipe("2:4"), nm_act.Recipe("2:4", projections=["o_proj"])):
        with pytest.raises(ValueError, match=r"expected a model that is not optimized, got one that is"):
            nm_act.sparsify(model, recipe)
    with pytest.raises(ValueError, match=r"model that is not optimized, got one that is; call nm_act\.deoptimize"):
        nm_act.optimize(model)


def test_offloaded_layers_stay_as_they_are():
    model = sparse()
    model.model.layers[1].self_attn.to("meta")
    report = nm_act.optimize(model)
    assert dict(report.kept)["model.layers.1.self_attn.q_proj"] == "its weight is on the meta device (offloaded)"
    assert ("model.layers.0.self_attn", ("q_proj", "k_proj", "v_proj")) in report.merged


def test_hooks_forwards_and_shards_keep_a_layer_as_it_is():
    """One check for merging and e4m3: hooks still run, and no layer of a split model is replaced."""
    model = sparse()
    first, second = model.model.layers
    calls = []
    first.mlp.down_proj.register_forward_hook(lambda *_: calls.append("down"))
    first.self_attn.o_proj.forward = lambda x: calls.append("o") or NMLinear.forward(first.self_attn.o_proj, x)
    second.mlp.up_proj.register_full_backward_hook(lambda *_: None)
    second.mlp.down_proj.shard = Shard("row", 0, 2, lambda tensor: tensor)
    second.self_attn.q_proj.shard = Shard("column", 0, 2, lambda tensor: tensor)
    report = nm_act.optimize(model, fp8="decode")
    reasons = dict(report.kept)
    assert reasons["model.layers.0.mlp.down_proj"] == "stays in 16 bits: it has hooks"
    assert reasons["model.layers.0.self_attn.o_proj"] == "stays in 16 bits: its forward is replaced already"
    assert reasons["model.layers.1.mlp.up_proj"] == "stays in 16 bits: it has hooks"
    assert reasons["model.layers.1.mlp.down_proj"] == "stays in 16 bits: its weight is split over ranks"
    assert ("model.layers.1.self_attn.q_proj", "its weight is split over ranks") in report.kept
    assert ("model.layers.1.self_attn", ("k_proj", "v_proj")) in report.merged
    for layer in (second.mlp.down_proj, second.self_attn.q_proj):
        layer.shard = None  # this is no rank of a group
    logits(model)
    assert calls == ["o", "down"]


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("fp8", [None, "decode"])
def test_layout_and_lift_come_back(layout, fp8):
    model = sparse(pattern="2:4+1")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NMLinear):
            parent, _, child = name.rpartition(".")
            again = NMLinear.from_linear(layer.to_linear(), layer.spec, weight_layout=layout, lift=True)
            setattr(model.get_submodule(parent), child, again)
    expected = logits(model)
    nm_act.optimize(model, fp8=fp8)
    merged = model.model.layers[0].mlp.merged_gate_up.linear
    assert (merged.weight_layout, merged.lift) == (layout, True)
    assert fp8 or merged.lifted_weight is not None
    nm_act.deoptimize(model)
    layers = sparse_layers(model)
    assert {(layer.weight_layout, layer.lift) for layer in layers} == {(layout, True)}
    assert all(layer.lifted_weight is not None for layer in layers)
    if fp8 is None:
        assert_close(logits(model), expected)


def test_layers_that_lift_otherwise_are_not_merged():
    model = sparse(pattern="2:4+1")
    model.model.layers[0].mlp.up_proj.lift = True
    assert not any(parent == "model.layers.0.mlp" for parent, _ in nm_act.optimize(model).merged)


def test_compiles_to_one_graph_for_all_prompt_lengths(graphs):
    model = sparse()
    nm_act.optimize(model)
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 17):
        ids = IDS.view(1, -1)[:, :tokens]
        with torch.inference_mode():
            y = compiled(input_ids=ids, use_cache=False).logits
            assert_close(y, logits(model, input_ids=ids, use_cache=True), atol=1e-5)
    assert len(graphs) == 1


def test_decode_steps_with_a_static_cache_are_one_graph(graphs):
    """What generate() compiles: a step over a static cache, again and again."""
    from transformers import StaticCache

    model = sparse()
    nm_act.optimize(model)
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    cache = {cache_argument(model): StaticCache(config=model.config, max_cache_len=32)}
    ids = IDS[:1]
    with torch.inference_mode():
        model(input_ids=ids, position_ids=torch.arange(12)[None], **cache)
        for step in range(4):
            token, position = torch.tensor([[40 + step]]), torch.tensor([[12 + step]])
            y = compiled(input_ids=token, position_ids=position, **cache).logits
            ids = torch.cat([ids, token], dim=1)
            assert_close(y[:, -1], logits(model, input_ids=ids)[:, -1], atol=1e-4, rtol=1e-3)
    assert len(graphs) == 1


def test_dense_layers_decode_on_the_product_for_few_tokens(monkeypatch):
    """The output head, and layers that a recipe leaves dense: the stock layer but for one token of a few sequences."""
    calls, model = [], sparse(rules=[nm_act.Rule(projections=["down_proj"], pattern="dense")])
    report = optimize_checked(model)
    assert report.dense == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    head = model.lm_head
    product = torch.ops.nm_act.dense_linear
    monkeypatch.setattr(torch.ops.nm_act, "dense_linear", lambda *a: calls.append(a[0].shape) or product(*a))
    with torch.no_grad():
        for shape, runs in (((64,), 0), ((1, 2, 64), 0), ((1, 1, 64), 1), ((8, 1, 64), 1), ((9, 1, 64), 0)):
            x = torch.randn(shape)
            calls.clear()
            assert_close(head(x), torch.nn.functional.linear(x, head.weight))
            assert len(calls) == runs
    calls.clear()
    assert head(torch.randn(1, 1, 64)).requires_grad
    with torch.autocast("cpu"):
        assert head(torch.randn(1, 1, 64)).dtype == torch.bfloat16
    assert not calls
    assert set(model.state_dict()) == set(family().state_dict())
    nm_act.deoptimize(model)
    assert type(model.lm_head) is torch.nn.Linear


def test_sparsify_can_optimize_at_once():
    model = family("llama")
    nm_act.sparsify(model, nm_act.Recipe("2:4"), optimize=True)
    assert any(isinstance(module, MergedLinear) for module in model.modules())
