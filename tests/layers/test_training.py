"""Training sparse models: gradients of a tiny Llama against hooks on the dense one in float64, LoRA, Trainer, optimize."""

import copy

import pytest
import torch
from tiny_families import IDS, assert_close, family, sparse_layers
from torch import nn

transformers = pytest.importorskip("transformers")

import nm_act  # noqa: E402
from nm_act import parallel, reference  # noqa: E402
from nm_act.layers.linear import NMLinear  # noqa: E402
from nm_act.methods import criteria  # noqa: E402
from nm_act.recipe import LinearSpec, Recipe  # noqa: E402

RECIPES = {
    "act": Recipe("2:4"),
    "8:16": Recipe("8:16"),
    "2:4+1": Recipe("2:4+1"),
    "var": Recipe("2:4", mitigation=["var"]),
    "dpts-mean": Recipe("2:4", mitigation=["dpts-mean"]),
    "dpts-median var": Recipe("8:16", mitigation=["dpts-median", "var"]),
    "wina": Recipe("2:4", criterion="wina"),
    "clact": Recipe("2:4", criterion="clact"),
    "spts": Recipe("2:4", mitigation=["spts"]),
    "lpts ls": Recipe("8:16", mitigation=["lpts", "ls"]),
    "rsparse": Recipe("2:4", mitigation=["rsparse-4"]),
    "larosa": Recipe("2:4", mitigation=["larosa"]),
    "weight-magnitude": Recipe("2:4", criterion="weight-magnitude"),
    "top-k": Recipe("50%", mitigation=["var"]),
    **{f"first {count}": Recipe("2:4", dense_first_tokens=count) for count in (1, 4, 8)},
    "first 2 wina var": Recipe("2:4+1", criterion="wina", mitigation=["var", "dpts-mean"], dense_first_tokens=2),
    "prefill": Recipe("2:4", phase="prefill"),
}


def tiny_llama():
    return family(std=0.15, attention_bias=True).train()


def sparse_llama(recipe):
    """A tiny Llama made sparse, with random calibrated data."""
    model = tiny_llama()
    nm_act.sparsify(model, recipe)
    generator = torch.Generator().manual_seed(1)
    for layer in sparse_layers(model):
        data = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in layer.data().items()}
        if "column_scale" in data:
            data["column_scale"] += 1
        if "rotation" in data:
            data["rotation"] = torch.linalg.qr(data["rotation"]).Q
        layer.set_data(**data)
    return model


def one_layer(name) -> NMLinear:
    return sparse_layers(sparse_llama(RECIPES[name]))[0]


def formula(x, linear, layer, first_tokens):
    """Output of a sparse layer for ``x [batch, tokens, in]``, its mask from the oracle and no part of the gradient."""
    spec, data = layer.spec, {name: value.to(x.dtype) for name, value in layer.data().items()}
    weight, low, bias = linear.weight, 0.0, 0.0 if linear.bias is None else linear.bias
    dense = x @ weight.t() + bias
    if spec.scoring.prunes_weight:
        return x @ (weight * reference.selection_mask(weight.detach(), spec.pattern)).t() + bias
    if "low_rank_in" in data:
        weight = weight - data["low_rank_out"] @ data["low_rank_in"]
        low = x @ data["low_rank_in"].t() @ data["low_rank_out"].t()
    basis, weight = (x @ data["rotation"], weight @ data["rotation"]) if "rotation" in data else (x, weight)
    scale = criteria.channel_scale(spec.criterion, weight.detach())
    if spec.criterion == "clact":
        scale = basis.detach().square().sum(dim=1, keepdim=True).sqrt()
    eta = data.get("shift", x.new_zeros(()))
    if spec.token_shift != "none":
        mean, median = basis.mean(dim=-1, keepdim=True), basis.median(dim=-1, keepdim=True).values
        eta = mean if spec.token_shift == "mean" else median
    z = basis - eta
    p = z * reference.selection_mask(z.detach(), spec.pattern, scale)
    y = p @ weight.t()
    if spec.variance_correction:
        y = y * (z.var(dim=-1, correction=0, keepdim=True) / p.var(dim=-1, correction=0, keepdim=True)).sqrt()
    y = y + eta.expand_as(basis) @ weight.t()
    y = y * data.get("column_scale", 1.0) + data.get("added_bias", 0.0) + low + bias
    return torch.cat([dense[:, :first_tokens], y[:, first_tokens:]], dim=1)


def hooked(model, recipe):
    """The dense model in float64 whose linear layers give what the sparse ones of ``model`` do, through hooks."""
    dense = tiny_llama().double()
    for name, layer in model.named_modules():
        if isinstance(layer, NMLinear):
            hook = lambda linear, x, _y, layer=layer: formula(x[0], linear, layer, recipe.dense_first_tokens)  # noqa: E731
            dense.get_submodule(name).register_forward_hook(hook)
    return dense


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(model, exact):
    expected = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        assert parameter.grad is not None, name
        largest = max(each.grad.abs().max() for each in expected.values())
        # The attention scores of a single token have no gradient at all.
        scale = gradient.abs().max() if gradient.abs().max() > 1e-12 * largest else largest
        error = (parameter.grad.double() - gradient).abs().max() / scale
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_of_a_model_has_the_gradient_of_the_hooked_dense_one(name):
    recipe = RECIPES[name]
    model = sparse_llama(recipe)
    exact = hooked(model, recipe)
    loss, expected = loss_of(model), loss_of(exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, exact)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 5, 8, 12])
def test_dense_first_tokens_have_a_gradient_for_any_number_of_tokens(count, tokens):
    recipe = Recipe("2:4", dense_first_tokens=count)
    model = sparse_llama(recipe)
    exact = hooked(model, recipe)
    ids = IDS[:1, :tokens]
    model(input_ids=ids).logits.square().sum().backward()
    exact(input_ids=ids).logits.square().sum().backward()
    assert_same_gradients(model, exact)


def test_dense_first_tokens_with_padding_have_a_gradient():
    recipe = Recipe("8:16", dense_first_tokens=2)
    model, alone = sparse_llama(recipe), sparse_llama(recipe)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    model(input_ids=IDS, attention_mask=mask).logits[0, 3:].square().sum().backward()
    alone(input_ids=IDS[:1, 3:]).logits.square().sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        scale = expected.grad.abs().max()
        torch.testing.assert_close(actual.grad / scale, expected.grad / scale, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["dpts-median var", "first 2 wina var", "clact"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    expected, model = sparse_llama(RECIPES[name]).train(), sparse_llama(RECIPES[name]).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    loss_of(model).backward()
    loss_of(expected).backward()
    assert_close(gradients(model), gradients(expected), rtol=0, atol=0)


def test_checkpointing_of_two_calls_in_one_backward_pass_keeps_their_first_tokens_apart():
    """Other lengths, other padding, and a hidden state that is used in passing."""
    expected, model = (sparse_llama(RECIPES["first 4"]).train() for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    for each in (model, expected):
        hidden = each(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[1]
        other = each(input_ids=IDS[:, :7], attention_mask=mask, use_cache=False).logits[mask.bool()]
        (hidden.square().mean() + other.square().mean() + loss_of(each, IDS[:1, :9])).backward()
        assert each.model.layers[0].mlp.up_proj.token_context._running() is None
    assert_close(gradients(model), gradients(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_its_forward_computes(dtype):
    spec = LinearSpec("2:4", mitigation=("var", "dpts-mean"))
    dense, x = nn.Linear(64, 24), torch.randn(2, 10, 64, requires_grad=True)
    layer = NMLinear.from_linear(copy.deepcopy(dense), spec)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    exact, half = dense.double(), x.detach().to(dtype).double().requires_grad_()
    z = reference.shifted(half.detach().to(dtype), None, "mean")
    mask = reference.selection_mask(z, spec.pattern)
    eta = half.mean(dim=-1, keepdim=True)
    p = (half - eta) * mask
    nu = ((half - eta).var(dim=-1, correction=0, keepdim=True) / p.var(dim=-1, correction=0, keepdim=True)).sqrt()
    out = nu * (p @ exact.weight.t()) + eta * exact.weight.sum(dim=1) + exact.bias
    out.square().sum().backward()
    for actual, expected in ((x, half), (layer.weight, exact.weight), (layer.bias, exact.bias)):
        assert actual.grad.dtype == torch.float32
        assert (actual.grad - expected.grad).abs().max() < 2e-2 * expected.grad.abs().max()


def test_lora_adapters_get_the_gradient_of_the_hooked_model():
    peft = pytest.importorskip("peft")
    recipe = Recipe("2:4", mitigation=["var"])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=8, lora_dropout=0.0)
    pair, sparse = [], sparse_llama(recipe)
    for model in (sparse, hooked(sparse, recipe)):
        adapted = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
        adapted = adapted.double() if model is not sparse else adapted
        loss_of(adapted).backward()
        pair.append({name: each.grad for name, each in adapted.named_parameters() if each.requires_grad})
    assert len(pair[0]) == 12
    for name, gradient in pair[0].items():
        expected = pair[1][name]
        assert (gradient.double() - expected).abs().max() < 1e-5 * expected.abs().max(), name


def trained(model, folder, **options):
    """Transformers' Trainer, after its steps."""
    common = {"output_dir": str(folder), "learning_rate": 0.05, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments = transformers.TrainingArguments(**common, **options)
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["act", "dpts-mean", "first 4"])
def test_trainer_takes_the_steps_of_the_hooked_model(name, tmp_path):
    pytest.importorskip("accelerate")
    recipe = RECIPES[name]
    model = sparse_llama(recipe)
    exact = hooked(model, recipe).train()
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "disable_tqdm": True}
    trainer = trained(model, tmp_path, **options, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)
    optimizer, losses = torch.optim.SGD(exact.parameters(), lr=0.05), []
    for _ in range(2):
        loss = loss_of(exact)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-3)
    assert losses[1] < losses[0]
    assert_close(dict(model.double().named_parameters()), dict(exact.named_parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_trainer_takes_a_saved_sparse_checkpoint(adapter, tmp_path):
    sparse_llama(RECIPES["8:16"]).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj", "q_proj"], r=2))
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    trained(model, tmp_path, max_steps=1)
    moved = [name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))]
    for projection in ("up_proj", "q_proj"):
        assert any(projection in name for name in moved)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_trains_whole_under_compile(compiled):
    spec = LinearSpec("8:16", "wina", ("var", "dpts-mean"))
    layer, x = NMLinear(64, 24, spec=spec), torch.randn(2, 5, 64)
    layer(x).square().sum().backward()
    expected = gradients(layer)
    layer.zero_grad()
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager") if compiled else layer
    run(x).square().sum().backward()
    assert_close(gradients(layer), expected, rtol=1e-4, atol=1e-5)


# ---- parts of the parameters, split layers, optimized models ------------------------------------------------------------
@pytest.mark.parametrize("trained", [("bias",), ("weight",), ("weight", "bias"), ()])
@pytest.mark.parametrize("name", ["lpts ls", "rsparse", "dpts-mean", "weight-magnitude"])
def test_parameters_that_are_frozen_leave_the_others_their_gradient(name, trained):
    layers = []
    for frozen in (False, True):
        layer = one_layer(name)
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(not frozen or key in trained)
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        layer(x).square().sum().backward()
        layers.append((layer, x))
    (whole, x), (part, same_x) = layers
    torch.testing.assert_close(same_x.grad, x.grad)
    for key, parameter in part.named_parameters():
        assert (parameter.grad is not None) == (key in trained)
        if key in trained:
            torch.testing.assert_close(parameter.grad, dict(whole.named_parameters())[key].grad)


@pytest.mark.parametrize("name", ["lpts ls", "rsparse", "dpts-mean", "wina", "weight-magnitude", "first 4"])
def test_torch_func_over_the_parameters_of_a_layer_agrees_with_backward(name):
    layer = one_layer(name)
    x, parameters = torch.randn(2, 5, 64), dict(layer.named_parameters())
    loss = lambda values: torch.func.functional_call(layer, values, (x,)).square().sum()  # noqa: E731
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    expected = dict(zip(parameters, expected, strict=True))
    values = {key: value.detach() for key, value in parameters.items()}
    found = torch.func.grad(loss)(values)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    tangents = {key: torch.randn(value.shape) for key, value in values.items()}
    along = sum((expected[key] * tangents[key]).sum() for key in values)
    for guard in (torch.enable_grad(), torch.no_grad()):
        with guard:
            assert torch.func.jvp(loss, (values,), (tangents,))[1].item() == pytest.approx(along.item(), rel=1e-4)


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
def test_an_output_can_be_changed_in_place(layout):
    """What ``hidden = layer(x); hidden += residual`` does, with few tokens and with many."""
    for tokens in (1, 3, 20):
        layer = NMLinear(64, 24, spec=LinearSpec("2:4"), weight_layout=layout)
        x = torch.randn(tokens, 64)
        (expected,) = torch.autograd.grad((layer(x) + 1.0).square().sum(), layer.weight)
        y = layer(x)
        y += 1.0
        y.square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected)


def _alone():
    """The one rank of a row-parallel layer, which has all of the inputs."""
    return parallel.Shard("row", 0, 1, lambda tensor: tensor.detach()[None])


@pytest.mark.parametrize("options", [{"token_shift": "mean"}, {"variance_correction": True}, {}])
def test_a_layer_split_by_rows_refuses_only_what_needs_the_other_ranks(options):
    def function(x):
        return parallel.row_sparse_linear(_alone(), x, weight, None, nm_act.NMPattern(2, 4), **options)

    x, weight = torch.randn(3, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    y = function(x)
    (expected,) = torch.autograd.grad(nm_act.sparse_linear(x.detach(), weight, **options).sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(function(x.detach()).sum(), weight)[0], expected)
    if not options:
        y.sum().backward()
        torch.testing.assert_close(weight.grad, expected)
        return
    for differentiate in (y.sum().backward, lambda: torch.func.jvp(function, (x.detach(),), (x.detach(),))):
        with pytest.raises(RuntimeError, match="expected no gradient for the input of a layer split by rows"):
            differentiate()


def test_a_split_layer_refuses_to_train_what_derives_from_the_whole_weight():
    x = torch.randn(3, 64)
    layer = NMLinear(64, 24, spec=LinearSpec("2:4", mitigation=("dpts-mean",)))
    expected = layer(x).detach()
    layer.shard = _alone()
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(RuntimeError, match="expected a frozen weight in a layer that is split over ranks"):
        layer(x).sum().backward()
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.bias.grad is not None


@pytest.mark.parametrize("name", ["var", "dpts-mean", "first 4", "8:16"])
def test_an_optimized_model_has_the_same_gradients(name):
    recipe = RECIPES[name]
    model, expected = sparse_llama(recipe), sparse_llama(recipe)
    nm_act.optimize(model)
    loss_of(model).backward()
    loss_of(expected).backward()
    compared = 0
    for path, module in expected.named_modules():
        if isinstance(module, nn.Linear):
            other = model.get_submodule(path)
            merged = getattr(other, "_merged", None)
            gradient = (other if merged is None else merged.linear).weight.grad
            gradient = gradient if merged is None else gradient.split(merged.sizes)[other._index]
            assert_close(gradient, module.weight.grad, atol=1e-5)
            compared += 1
    assert compared == 15
    assert_close(model.model.embed_tokens.weight.grad, expected.model.embed_tokens.weight.grad, atol=1e-5)


def test_a_model_with_e4m3_weights_refuses_the_backward_pass():
    model = sparse_llama(Recipe("8:16")).bfloat16()
    nm_act.optimize(model, fp8="decode")
    loss = loss_of(model)
    sentence = "expected no gradient through nm_act::e4m3_linear.*deoptimize"
    with pytest.raises(RuntimeError, match=sentence):
        loss.backward()
    nm_act.deoptimize(model)
    loss_of(model).backward()
