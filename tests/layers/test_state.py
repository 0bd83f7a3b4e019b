"""State: calls in several threads, copies and pickles of models, and hooks that survive."""

import contextlib
import copy
import functools
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from conftest import failing
from tiny_families import assert_close, family, logits, sparse_layers
from tiny_families import sparse as _sparse
from torch import nn

import nm_act
from nm_act.optimize.static_attention import ATTENTION

pytestmark = pytest.mark.contract

THREADS, CALLS = 4, 300
RECIPES = {
    "sparse": {"pattern": "2:4", "mitigation": ["var", "dpts-mean"]},
    "first tokens": {"pattern": "8:16", "dense_first_tokens": 2},
    "clact": {"pattern": "2:4", "criterion": "clact"},
    "clact and first tokens": {"pattern": "2:4", "criterion": "clact", "dense_first_tokens": 1},
}
PROMPT = {"input_ids": torch.arange(3, 11)[None]}


def sparse(recipe: str = "sparse", optimized: bool = False, name: str = "llama"):
    model = _sparse(name, **RECIPES[recipe])
    if optimized:
        assert nm_act.optimize(model).merged
    return model


def padded_inputs(count: int) -> list[dict]:
    """Batches of different sizes and lengths, every other one with padding on the left."""
    inputs = []
    for index in range(count):
        batch, tokens = 1 + index % 3, 3 + 2 * index
        mask = torch.ones(batch, tokens, dtype=torch.long)
        if index % 2:
            mask[0, : 1 + index // 2] = 0
        inputs.append({"input_ids": torch.randint(3, 96, (batch, tokens)), "attention_mask": mask})
    return inputs


@pytest.fixture
def busy_threads():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [False, True], ids=["stock", "optimized"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_get_what_one_caller_gets(recipe, optimized, busy_threads):
    model = sparse(recipe, optimized)
    inputs = padded_inputs(8)
    expected = [logits(model, **each) for each in inputs]
    start = Barrier(THREADS)

    def run(thread: int) -> list[int]:
        start.wait()
        calls = [(thread * 3 + call) % len(inputs) for call in range(CALLS)]
        return [index for index in calls if not torch.equal(logits(model, **inputs[index]), expected[index])]

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = list(pool.map(run, range(THREADS)))
    assert wrong == [[]] * THREADS


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("recipe", ["sparse", "clact and first tokens"])
def test_a_call_inside_of_a_call_changes_nothing(recipe, name):
    """What threads do, without chance: another call of the model runs in the middle of each layer of the first."""
    model = sparse(recipe, optimized=True, name=name)
    outer, inner = padded_inputs(4)[2:]
    expected = [logits(model, **each) for each in (outer, inner)]
    seen, busy = [], []

    def interrupt(*_):
        if not busy:
            busy.append(True)
            seen.append(logits(model, **inner))
            busy.clear()

    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(interrupt)
        layer.mlp.register_forward_pre_hook(interrupt)
    assert torch.equal(logits(model, **outer), expected[0])
    assert len(seen) == 4
    assert all(torch.equal(each, expected[1]) for each in seen)


def test_nothing_of_a_call_stays():
    model = sparse("clact and first tokens", optimized=True)
    layer = model.model.layers[0].mlp.down_proj
    x, seen = torch.randn(2, 5, 96), False
    with torch.no_grad():
        alone = layer(x)
        for outcome in (contextlib.nullcontext(), pytest.raises(IndexError)):
            with outcome:  # the second call fails: it is out of the vocabulary
                model(input_ids=torch.arange(10).view(2, 5) + (1000 if seen else 0))
            seen = True
            assert layer.token_context._running() is None
            assert torch.equal(layer(x), alone)
    assert not any(isinstance(value, torch.Tensor) for module in model.modules() for value in vars(module).values())


def test_an_interrupted_call_is_forgotten_by_the_next():
    model = sparse("first tokens")
    context = model.model.layers[0].mlp.down_proj.token_context
    handle = model.model.layers[1].register_forward_pre_hook(failing(KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            logits(model, **PROMPT)
    handle.remove()
    logits(model, **PROMPT)
    assert context._running() is None


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved(model),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("fp8", [None, "decode"])
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_copies_of_optimized_models_are_whole_and_their_own(recipe, how, fp8):
    model = sparse(recipe)
    nm_act.optimize(model, fp8=fp8)
    inputs = padded_inputs(4)
    expected = [logits(model, **each) for each in inputs]
    other = how(model)
    names = [[type(module).__name__ for module in each.modules()] for each in (other, model)]
    assert names[0] == names[1]
    for _ in range(2):
        assert all(torch.equal(logits(other, **each), y) for each, y in zip(inputs, expected, strict=True))
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
    nm_act.deoptimize(other)
    assert_close(logits(other, **inputs[0]), expected[0])


def test_shallow_copies_of_modules_run_their_own_children():
    """As DataParallel's replicas do: a forward bound to the original would use the original's weights."""
    model = sparse(optimized=True)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    replica = copy.copy(mlp)
    replica._modules = dict(mlp._modules, down_proj=nn.Linear(96, 64))
    x = torch.randn(2, 3, 64)
    assert torch.equal(replica(x), replica.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
    assert type(attention).__name__ == "LlamaAttention"
    assert isinstance(attention, attention.nm_act_stock)


def test_hooks_of_users_survive_sparsify_and_optimize():
    model = family("llama")
    calls, handles = [], []
    for layer in model.model.layers:
        down = layer.mlp.down_proj
        handles.append(down.register_forward_hook(lambda *_: calls.append("forward")))
        handles.append(down.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True))
        handles.append(layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, y: 0 * y))
    for change in (lambda: nm_act.sparsify(model, nm_act.Recipe("2:4")), lambda: nm_act.optimize(model), lambda: None):
        change()
        calls.clear()
        assert logits(model, **PROMPT).isfinite().all()
        assert calls == ["pre", "forward"] * 2
    hooked = logits(model, **PROMPT)
    for handle in handles:  # the handles that the user got for the dense layers
        handle.remove()
    calls.clear()
    assert not torch.equal(logits(model, **PROMPT), hooked)
    assert calls == []


def test_a_hook_on_a_merged_projection_is_called_and_comes_along():
    model = sparse(optimized=True)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _m, _a, y: seen.append(y.shape[-1]))
    logits(model, **PROMPT)
    nm_act.deoptimize(model)
    logits(model, **PROMPT)
    assert seen == [32] * 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_stays_dense_by_name():
    model = family("llama")
    nn.utils.weight_norm(model.model.layers[1].mlp.up_proj)
    report = nm_act.sparsify(model, nm_act.Recipe("2:4"))
    assert ("model.layers.1.mlp.up_proj", "its weight is a Tensor, not a plain parameter") in report.kept
    assert len(report.replaced) == 13


@pytest.mark.parametrize(
    ("register", "what"),
    [
        (lambda layer: layer._register_state_dict_hook(lambda *_: None), "hooks of state_dict"),
        (lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None), "hooks of state_dict"),
        (lambda layer: setattr(layer, "forward", layer.forward), "a forward set on the instance"),
    ],
)
def test_what_a_sparse_layer_cannot_take_over_is_refused_by_name(register, what):
    model = family("llama")
    register(model.model.layers[1].mlp.up_proj)
    sentence = rf"hooks a sparse layer can take over, got {what}.* on .*layers\.1\.mlp\.up_proj"
    with pytest.raises(ValueError, match=sentence):
        nm_act.sparsify(model, nm_act.Recipe("2:4"))
    assert not sparse_layers(model)
    nm_act.sparsify(model, nm_act.Recipe("2:4", skip_layers=[1]))


def test_deoptimize_refuses_a_forward_that_was_replaced_since():
    model = sparse(optimized=True)
    attention = model.model.layers[1].self_attn
    attention.forward = functools.partial(attention.forward)
    with pytest.raises(ValueError, match=r"got another forward on model\.layers\.1\.self_attn; undo that first"):
        nm_act.deoptimize(model)
    del attention.forward
    nm_act.deoptimize(model)


@torch.no_grad()
def test_a_static_decoder_leaves_the_model_to_others():
    model = sparse(optimized=True)
    ids = PROMPT["input_ids"]
    expected, before = logits(model, **PROMPT), model.config._attn_implementation
    decoder = nm_act.StaticDecoder(model, max_tokens=16)
    alone = decoder.generate(ids, 4)
    seen, busy = [], []

    def meanwhile(*_):
        if not busy:
            busy.append(True)
            seen.append((torch.equal(logits(model, **PROMPT), expected), model.config._attn_implementation))
            busy.clear()

    model.model.layers[1].mlp.register_forward_pre_hook(meanwhile)
    assert torch.equal(decoder.generate(ids, 4), alone)
    assert seen == [(True, before)] * 4
    assert before != ATTENTION


@torch.no_grad()
def test_a_static_decoder_sees_layers_and_weights_that_change():
    model = sparse()
    ids = PROMPT["input_ids"]
    decoder = nm_act.StaticDecoder(model, max_tokens=16)
    decoder.generate(ids, 2)
    nm_act.optimize(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(decoder.generate(ids, 5), expected)


def test_a_static_decoder_refuses_a_forward_of_the_instance():
    model = family("llama")
    model.model.layers[1].self_attn.forward = model.model.layers[1].self_attn.forward
    sentence = r"with the forward of their class, got another one on self_attn \(LlamaAttention"
    with pytest.raises(ValueError, match=sentence):
        nm_act.StaticDecoder(model, max_tokens=16)
