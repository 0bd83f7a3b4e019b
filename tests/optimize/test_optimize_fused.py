"""The packed path of optimize(), its CUDA operators replaced by plain torch: which tensors go where, and the residuals."""

import copy
import weakref

import fused_formulas
import pytest
import torch
from fused_formulas import activated, compressed, packed_on_a_cpu
from tiny_families import IDS, PLAIN, assert_close, logits, optimize_checked, sparse, sparse_layers

import nm_act
from nm_act.optimize import attention, fused, operands

MITIGATION = ["var", "dpts-mean"]
WHOLE = ["norm", "norm + residual", "silu"]  # the packed operands of a layer


@pytest.fixture
def calls(monkeypatch):
    """What was packed, pruned or added, in words and in order."""
    return packed_on_a_cpu(monkeypatch)


@pytest.fixture
def residuals(calls, monkeypatch):
    """Whether each product was given a residual."""
    given, product = [], operands.sparse_gemm

    def sparse_gemm(*arguments, residual=None, **options):
        given.append(residual is not None)
        return product(*arguments, residual=residual, **options)

    monkeypatch.setattr(operands, "sparse_gemm", sparse_gemm)
    return given


def model_of(name="llama", **patterns):
    """2:4 with mitigations, but for projections with a pattern of their own."""
    rules = [nm_act.Rule(projections=[projection], pattern=pattern) for projection, pattern in patterns.items()]
    return sparse(name, mitigation=MITIGATION, rules=rules)


@pytest.mark.parametrize("name", PLAIN)
def test_norms_and_activations_feed_their_products(name, calls):
    assert len(optimize_checked(model_of(name)).fused) == 6
    assert calls == WHOLE * 2


@pytest.mark.parametrize(
    ("rules", "expected_calls"),
    [
        ({"v_proj": "8:16"}, ["norm + residual", "silu"]),
        ({"up_proj": "dense"}, ["norm"]),
        ({"down_proj": "4:8"}, ["norm", "norm + residual"]),
        ({"q_proj": "dense", "gate_proj": "dense"}, []),
    ],
)
def test_what_is_not_plain_2_4_stays_unfused(rules, expected_calls, calls):
    optimize_checked(model_of(**rules))
    assert calls == expected_calls * 2


ADDED, NORMED = "norm + residual", "norm + normed residual"
SANDWICHES = ["norm", NORMED, "gelu", NORMED, NORMED, "gelu", "added norm"]
"""Of two layers: the norm after the first MLP is computed with the norm that the second layer begins with."""


@pytest.mark.parametrize("pattern", ["2:4", "8:16"])
def test_norms_on_both_sides_and_gelu(pattern, calls):
    report = optimize_checked(sparse("gemma3", pattern))
    names = ["input", "pre_feedforward", "post_attention", "post_feedforward"]
    assert [name for name in report.fused if ".0" in name and "mlp" not in name] == [
        f"model.layers.0.{name}_layernorm" for name in names
    ]
    assert len(report.fused) == 10
    *before, last = SANDWICHES
    assert calls == [*(before if pattern == "2:4" else [f"pruned {call}" for call in before]), last]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_activation_is_part_of_the_product_of_gate_and_up(name, calls, monkeypatch):
    def sparse_gemm_silu_mul(operand, weight, *, activation):
        gate, up = (operand.values @ weight.t()).chunk(2, dim=-1)
        return compressed(activated(gate, activation) * up, calls, f"product with {activation}")

    monkeypatch.setattr(operands, "sparse_gemm_silu_mul", sparse_gemm_silu_mul)
    monkeypatch.setattr(operands, "gates_in_product", lambda way, *_: way == "packed")
    optimize_checked(sparse(name))
    expected = ["norm", "norm + residual", "product with silu"] * 2
    if name == "gemma3":
        expected = [call.replace("gelu", "product with gelu_tanh") for call in SANDWICHES]
    assert calls == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_residuals_go_into_the_product_of_the_down_layer(name, residuals):
    optimize_checked(sparse(name))
    # Of q/k/v, gate/up and down; a norm stands between Gemma's down layer and its residual.
    assert residuals == [False, False, name == "llama"] * 2


def test_the_output_projection_adds_its_residual(calls, residuals, monkeypatch):
    """So that the norm before the MLP reads one tensor and writes none."""
    monkeypatch.setattr(operands, "adds_residual", lambda *_: True)
    monkeypatch.setattr(operands, "compress_packed", lambda x, **options: compressed(x, calls, "output", **options))
    monkeypatch.setattr(attention, "rotary", fused_formulas.rotary)
    monkeypatch.setattr(attention, "fuses", lambda *_: True)
    optimize_checked(sparse("llama"))
    assert residuals == [False, True, False, True] * 2
    assert not any("residual" in call for call in calls)


def test_another_activation_is_not_taken_for_gelu(calls):
    model = model_of("gemma3")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    optimize_checked(model)
    assert calls == [call for call in SANDWICHES if call != "gelu"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_phases_are_respected(phase, calls):
    model = sparse(phase=phase)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    nm_act.optimize(model)
    calls.clear()
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
    assert calls.count("silu") == (2 if phase == "prefill" else 6)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_e4m3_products_scale_their_outputs_and_shifts(name, calls):
    model = model_of(name)
    nm_act.optimize(model, fp8="prefill")
    fast = logits(model)
    assert calls == WHOLE * 2
    nm_act.deoptimize(model)  # now with the rounded weights
    assert_close(fast, logits(model))


@pytest.mark.parametrize(
    ("hooked", "expected_calls"),
    [
        ("input_layernorm", ["norm + residual", "silu"]),
        ("post_attention_layernorm", ["norm", "silu"]),
        ("mlp", ["norm", "silu"]),
        ("mlp.act_fn", ["norm", "norm + residual"]),
        ("mlp.down_proj", ["norm", "norm + residual"]),
    ],
)
def test_what_has_hooks_is_called(hooked, expected_calls, calls):
    model = model_of()
    seen = []
    for layer in model.model.layers:
        layer.get_submodule(hooked).register_forward_hook(lambda _module, _args, y: seen.append(y))
    optimize_checked(model)
    assert calls == expected_calls * 2
    assert_close(seen[2:], seen[:2])  # of both layers, before and after
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "hooked", "expected_calls"),
    [
        ("llama", "input_layernorm", ["norm + residual", "silu"] * 2),
        ("llama", "self_attn", ["norm + residual", "silu"] * 2),
        ("llama", "self_attn.v_proj", ["norm + residual", "silu"] * 2),
        ("llama", "post_attention_layernorm", ["norm", "silu"] * 2),
        ("llama", "mlp", ["norm", "silu"] * 2),
        ("llama", "mlp.up_proj", ["norm"] * 2),
        ("gemma3", "input_layernorm", [NORMED, "gelu", "added norm"] * 2),
        ("gemma3", "post_attention_layernorm", ["norm", ADDED, "gelu", NORMED, ADDED, "gelu", "added norm"]),
        ("gemma3", "pre_feedforward_layernorm", ["norm", "added norm", "gelu", "added norm"] * 2),
        ("gemma3", "post_feedforward_layernorm", SANDWICHES[:3] * 2),
        ("gemma3", "mlp", ["norm", "added norm", "gelu", "added norm"] * 2),
    ],
)
def test_hooks_that_come_later_see_what_the_stock_layer_gets_and_gives(name, hooked, expected_calls, calls):
    model = model_of(name)
    stock, seen, outputs = copy.deepcopy(model), [], []
    nm_act.optimize(model)
    for each in (model, stock):
        for layer in each.model.layers:
            layer.get_submodule(hooked).register_forward_hook(lambda _module, args, y: seen.append((*args, y)))
        outputs.append(logits(each))
    assert calls == expected_calls  # the stock model calls none of them
    assert_close(*outputs)
    assert len(seen) == 4
    assert_close(seen[:2], seen[2:])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_hooks_on_all_modules_see_those_of_the_stock_model(name, calls):
    model = model_of(name)
    stock, seen = copy.deepcopy(model), []
    nm_act.optimize(model)
    for each in (model, stock):
        names, found = {module: name for name, module in each.named_modules()}, {}

        def hook(module, _args, y, names=names, found=found):
            if isinstance(y, torch.Tensor):
                found[names[module]] = y

        with torch.nn.modules.module.register_module_forward_hook(hook):
            logits(each)
        seen.append(found)
    assert len(seen[1]) > 20
    assert seen[0].keys() >= seen[1].keys()  # merged layers on top
    for module, y in seen[1].items():
        assert_close(seen[0][module], y)
    assert not calls  # no kernel that computes what a hook is to see
    logits(model)
    assert calls


def test_hidden_states_are_those_of_the_unfused_model(calls):
    model = model_of()
    with torch.no_grad():
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
        nm_act.optimize(model)
        actual = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    assert_close(actual, expected)


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "2:4+1"])
def test_gate_and_up_are_freed_before_the_down_layer_runs(pattern, calls, monkeypatch):
    """They are the largest tensors of a model, and a layer that prunes makes a copy of its input."""
    model = sparse(pattern=pattern)
    nm_act.optimize(model)
    down = {layer.mlp.down_proj for layer in model.model.layers}
    seen, alive = [], []

    def recording(function):
        def call(*arguments, **options):
            gate, up = arguments[:2] if made != "gated" else arguments[1:]
            seen.extend(map(weakref.ref, (gate, up, gate._base)))
            return function(*arguments, **options)

        return call

    def counting(function):
        def call(linear, *arguments):
            if linear in down:
                alive.append(sum(reference() is not None for reference in seen))
            return function(linear, *arguments)

        return call

    made, used = {
        "2:4": ("silu_mul_compress", "_packed_product"),
        "8:16": ("silu_mul_prune", "_pruned_product"),
        "2:4+1": ("gated", "forward"),
    }[pattern]
    at = fused if made == "gated" else operands
    monkeypatch.setattr(at, made, recording(getattr(at, made)))
    owner = nm_act.NMLinear if used == "forward" else operands
    monkeypatch.setattr(owner, used, counting(getattr(owner, used)))
    logits(model)
    assert len(seen) == 6
    assert alive == [0, 0]


def test_where_a_gradient_is_recorded_nothing_is_packed(calls):
    model, expected = model_of(), model_of()
    nm_act.optimize(model)
    for each in (model, expected):
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert calls == []
    for name, parameter in expected.named_parameters():
        if "norm" in name or "down_proj" in name:
            assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-5)
    model.requires_grad_(False)
    model(input_ids=IDS, use_cache=False)
    assert calls == WHOLE * 2
    calls.clear()
    model.model.layers[1].post_attention_layernorm.weight.requires_grad_(True)  # reaches no other norm's operand
    model(input_ids=IDS, use_cache=False)
    assert calls == [*WHOLE, "norm"]


def test_where_attention_alone_is_trained_the_mlp_runs_unfused(calls):
    model, expected = model_of(), model_of()
    nm_act.optimize(model)
    for each in (model, expected):
        each.requires_grad_(False)
        each.get_parameter("model.layers.1.self_attn.o_proj.weight").requires_grad_(True)
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    grads = [each.get_parameter("model.layers.1.self_attn.o_proj.weight").grad for each in (model, expected)]
    assert_close(*grads, atol=1e-5)


def test_packed_calls_read_no_fingerprint(calls, monkeypatch):
    model = model_of()
    nm_act.optimize(model)
    logits(model)
    monkeypatch.setattr(nm_act.layers.stale, "fingerprint", lambda parameter: pytest.fail("the weight was read"))
    logits(model)
    assert calls == WHOLE * 4
    assert not any(layer._handed_out for layer in sparse_layers(model))


@torch.no_grad()
def test_lent_weights_are_packed_with_what_derives_from_them(calls):
    rules = [nm_act.Rule(projections=["down_proj"], criterion="wina")]
    model, other = (sparse(mitigation=["dpts-mean"], rules=rules) for _ in range(2))
    for name, parameter in other.named_parameters():
        if "down_proj" in name:
            parameter.copy_(torch.randn(parameter.shape) * torch.linspace(0.1, 2, parameter.shape[1]).roll(5))
    other.eval()
    expected = logits(other)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    nm_act.optimize(model)
    lent = {name: p.clone() for name, p in other.named_parameters() if "down_proj" in name}
    actual = torch.func.functional_call(model, lent, kwargs={"input_ids": IDS, "use_cache": False}).logits
    assert_close(actual, expected)
    assert "silu" in calls
