"""sparsify on plain modules and on skeletons of Transformers models: replaced, kept, refused."""

import copy
import weakref

import pytest
import torch
from tiny_families import sparse_layers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from nm_act.conversion.sparsify import sparsify
from nm_act.layers.linear import NMLinear
from nm_act.optimize import model as optimizing
from nm_act.recipe import DEFAULT_PROJECTIONS, LinearSpec, Recipe, Rule


class Block(nn.Module):
    def __init__(self, features=64, hidden=96):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up_proj = nn.Linear(features, hidden)
        self.down_proj = nn.Linear(hidden, features)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, layers=3, features=64, hidden=96):
        super().__init__()
        self.layers = nn.ModuleList(Block(features, hidden) for _ in range(layers))

    def forward(self, x, attention_mask=None, position_ids=None):
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 64)
        self.model = Stack(**sizes)
        self.lm_head = nn.Linear(64, 32)

    def forward(self, ids, **arguments):
        return self.lm_head(self.model(self.embed(ids), **arguments))


MLP = ["up_proj", "down_proj"]


def test_report_lists_every_linear_layer_once():
    model = Model()
    recipe = Recipe("8:16", projections=MLP, skip_layers=[0], rules=[Rule([2], ["up_proj"], pattern="2:4")])
    report = sparsify(model, recipe)
    assert report.model is model
    assert report.recipe is recipe
    assert model.nm_act_recipe is recipe
    assert report.replaced == [
        ("model.layers.1.up_proj", LinearSpec("8:16")),
        ("model.layers.1.down_proj", LinearSpec("8:16")),
        ("model.layers.2.up_proj", LinearSpec("2:4")),
        ("model.layers.2.down_proj", LinearSpec("8:16")),
    ]
    assert report.kept == [
        ("model.layers.0.up_proj", "dense by the recipe"),
        ("model.layers.0.down_proj", "dense by the recipe"),
        ("lm_head", "outside the decoder layers"),
    ]
    assert report.mac_fraction == pytest.approx(2 / 3)
    sparse = {name for name, module in model.named_modules() if isinstance(module, NMLinear)}
    assert sparse == {name for name, _ in report.replaced}
    assert report.note == ""


def test_report_as_text():
    recipe = Recipe("8:16", projections=["up_proj"], mitigation=["var"], skip_layers=[0])
    assert str(sparsify(Model(), recipe)) == "\n".join(
        [
            "sparse: 2 of 7 linear layers, 33.3% of the decoder's multiply-accumulates",
            "  up_proj  8:16 act var  x 2",
            "dense:",
            "  up_proj    dense by the recipe  x 1",
            "  down_proj  not among the recipe's projections  x 3",
            "  lm_head    outside the decoder layers  x 1",
        ]
    )


def test_mac_fraction_of_the_shapes_of_smollm2():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        models = [LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)) for _ in range(2)]
    report = sparsify(models[0], Recipe("2:4", projections=["q_proj", "gate_proj", "down_proj"]))
    assert report.mac_fraction == pytest.approx(0.59, abs=0.005)
    assert sparsify(models[1], Recipe("2:4")).mac_fraction == 1.0


def test_a_copy_leaves_the_model_alone():
    model = Model()
    report = sparsify(model, Recipe("8:16", projections=MLP), inplace=False)
    assert report.model is not model
    assert not hasattr(model, "nm_act_recipe")
    assert not sparse_layers(model)
    assert isinstance(report.model.model.layers[0].up_proj, NMLinear)
    assert model.model.layers[0].up_proj.weight.is_contiguous()


def test_dense_recipe_is_a_baseline():
    report = sparsify(Model(), Recipe("dense", projections=MLP))
    assert report.replaced == []
    assert report.mac_fraction == 0.0
    assert str(report).startswith("sparse: 0 of 7 linear layers, 0.0%")


@pytest.mark.parametrize("pattern", ["8:16", "2:4+1"])
def test_layers_that_a_group_or_a_unit_of_windows_does_not_divide_are_kept(pattern):
    report = sparsify(Model(hidden=72), Recipe(pattern, projections=MLP))
    assert [(name, str(spec.pattern)) for name, spec in report.replaced] == [
        (f"model.layers.{i}.up_proj", pattern) for i in range(3)
    ]
    assert ("model.layers.0.down_proj", "in_features 72 is not a multiple of the group 16") in report.kept


def test_other_kinds_of_linear_layer_are_kept():
    class QuantisedLinear(nn.Linear):
        pass

    model = Model()
    model.model.layers[0].up_proj = QuantisedLinear(64, 96)
    model.model.layers[1].up_proj = nn.Conv1d(64, 96, 1)
    report = sparsify(model, Recipe("8:16", projections=MLP))
    assert ("model.layers.0.up_proj", "QuantisedLinear is not torch.nn.Linear") in report.kept
    assert ("model.layers.1.up_proj", "Conv1d is not torch.nn.Linear") in report.kept
    assert len(report.replaced) == 4


def test_a_shared_layer_is_replaced_everywhere():
    model = Model()
    model.model.layers[1].up_proj = model.model.layers[0].up_proj
    sparsify(model, Recipe("8:16", projections=MLP))
    first, second = (model.model.layers[i].up_proj for i in (0, 1))
    assert isinstance(first, NMLinear)
    assert isinstance(second, NMLinear)
    assert first.weight is second.weight


@pytest.mark.parametrize("convert", ["sparsify", "quantise"])
def test_replaced_weights_are_freed_one_by_one(convert, monkeypatch):
    """A model is not held twice: when a layer is converted, those before it are gone."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 32)}) for _ in range(6))
    owner, name = (NMLinear, "from_linear") if convert == "sparsify" else (optimizing, "FP8Linear")
    if convert == "quantise":
        sparsify(model, Recipe("8:16", projections=["up_proj"]))
    before = [weakref.ref(layer["up_proj"]) for layer in model.layers]
    original, alive = getattr(owner, name), []

    def converted(layer, *arguments):
        alive.append(sum(reference() is not None for reference in before))
        return original(layer, *arguments)

    monkeypatch.setattr(owner, name, converted)
    if convert == "sparsify":
        sparsify(model, Recipe("8:16", projections=["up_proj"]))
    else:
        optimizing._quantise(optimizing.OptimizeReport(model), "decode")
    assert alive == [6, 5, 4, 3, 2, 1]


def test_only_the_text_decoder_is_touched():
    class Composite(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = Stack(layers=5)
            self.language_model = Stack()

        def get_decoder(self):
            return self.language_model

    report = sparsify(Composite(), Recipe("8:16", projections=MLP))
    assert len(report.replaced) == 6
    assert all(name.startswith("language_model.") for name, _ in report.replaced)
    assert ("vision_tower.layers.4.up_proj", "outside the decoder layers") in report.kept
    assert report.mac_fraction == 1.0


def test_numbered_modules_inside_a_layer_belong_to_that_layer():
    experts = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(Block() for _ in range(4))}) for _ in range(2))
    report = sparsify(experts, Recipe("8:16", projections=MLP, skip_layers=[1]))
    assert [name for name, _ in report.replaced][:2] == ["0.experts.0.up_proj", "0.experts.0.down_proj"]
    assert len(report.replaced) == 8


PROJECTIONS, LAYERS = (
    r"expected projections that the model has \(down_proj, up_proj\), got ",
    r"\(layers 0 to 2\), got ",
)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, PROJECTIONS.replace("down_proj, up_proj", "mix1, mix2") + "'q_proj'; correct"),
        ({"projections": [*MLP, "dwon_proj"]}, "got 'dwon_proj'; correct the recipe"),
        ({"projections": ["lm_head"]}, PROJECTIONS + "'lm_head'"),
        ({"projections": MLP, "skip_layers": [3]}, "expected layers that the model has " + LAYERS + "3"),
        ({"projections": MLP, "rules": [Rule(layers=[1, 9], pattern="2:4")]}, LAYERS + "9; correct the recipe"),
    ],
)
def test_a_recipe_that_names_nothing_is_refused(fields, sentence):
    model, recipe = Model(), Recipe("2:4", **fields)
    if recipe.projections == DEFAULT_PROJECTIONS:
        for block in model.model.layers:  # names of no known family
            block.mix1, block.mix2 = block.up_proj, block.down_proj
            del block.up_proj, block.down_proj
    with pytest.raises(ValueError, match=sentence):
        sparsify(model, recipe)
    assert not sparse_layers(model)
    assert not hasattr(model, "nm_act_recipe")


def test_the_default_projections_need_not_all_exist_but_a_rule_s_do():
    assert len(sparsify(Model(), Recipe("8:16")).replaced) == 6
    with pytest.raises(ValueError, match="got 'q_proj'"):
        sparsify(Model(), Recipe("8:16", rules=[Rule(projections=["q_proj"], pattern="2:4")]))


def test_a_model_without_numbered_layers_is_refused():
    model = nn.ModuleDict({"up_proj": nn.Linear(64, 64)})
    with pytest.raises(ValueError, match=r"expected projections that the model has \(none\), got 'up_proj'"):
        sparsify(model, Recipe("8:16", projections=["up_proj"]))
    with pytest.raises(ValueError, match=r"expected layers that the model has \(no numbered layers\), got 0"):
        sparsify(model, Recipe("8:16", skip_layers=[0]))


def test_a_sparse_model_is_refused():
    model = Model()
    recipe = Recipe("8:16", projections=MLP)
    sparsify(model, recipe)
    with pytest.raises(ValueError, match=r"expected a dense model, got one where model\.layers\.0\.up_proj is sparse"):
        sparsify(model, recipe)


def test_an_encoder_decoder_is_refused():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match="expected a decoder-only model, got the encoder-decoder T5For"):
        sparsify(model, Recipe("8:16", projections=["q"]))


def test_a_mapping_is_not_a_recipe():
    with pytest.raises(
        TypeError, match=r"expected a Recipe, got dict; use Recipe\(\.\.\.\), Recipe\.named\(\.\.\.\) or"
    ):
        sparsify(Model(), {"pattern": "8:16"})


# ---- first tokens of a sequence kept dense ----


PACKED, LATER = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.arange(5, 11).expand(2, 6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dense", "count", "inputs"),
    [
        ([1, 1, 0, 0, 0, 0], 2, {}),
        ([1, 1, 1, 1, 1, 1], 9, {}),
        # Padding is counted out through the mask, on either side; one of four dimensions says nothing about it.
        ([[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], 2, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}),
        ([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], 2, {"attention_mask": torch.tensor([[1, 0, 0, 0, 0, 0], [1] * 5 + [0]])}),
        ([1, 1, 0, 0, 0, 0], 2, {"attention_mask": torch.zeros(2, 1, 6, 6)}),
        # Positions say where a sequence starts.
        ([1, 1, 0, 1, 1, 0], 2, {"position_ids": PACKED}),
        ([0, 0, 0, 0, 0, 0], 2, {"position_ids": LATER, "attention_mask": torch.ones(2, 11)}),
    ],
)  # fmt: skip
def test_first_tokens_are_dense(dense, count, inputs):
    """Each token of a mixed model is that of the dense model or that of the all-sparse one."""
    ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(0))
    cases = ("2:4", count), ("2:4", 0), ("dense", 0)
    recipes = [Recipe(pattern, projections=MLP, dense_first_tokens=first) for pattern, first in cases]
    mixed, from_sparse, from_dense = (sparsify(Model(), recipe).model(ids, **inputs) for recipe in recipes)
    expected = torch.tensor(dense, dtype=torch.bool).expand(2, 6)
    assert torch.equal((mixed - from_dense).abs().amax(-1) < 1e-5, expected)
    assert torch.equal((mixed - from_sparse).abs().amax(-1) < 1e-5, ~expected)


def test_layers_that_flatten_their_tokens_or_see_others():
    model = sparsify(Model(), Recipe("2:4", projections=MLP, dense_first_tokens=2)).model
    layer = model.model.layers[0].up_proj
    x = torch.randn(2, 6, 64)
    seen = {}

    def forward(tokens):
        flat = x.flatten(0, 1)
        seen.update(batched=layer(x), flat=layer(flat), some=layer(flat[:5]))
        return tokens

    model.model.forward = forward
    with torch.no_grad():
        model.model(torch.zeros(2, 6, 64))
        assert torch.equal(seen["batched"].flatten(0, 1), seen["flat"])
        outside = layer(x)  # no call of the stack is running: nothing is first
    assert not torch.equal(outside[:, :2], seen["batched"][:, :2])
    assert torch.equal(outside[:, 2:], seen["batched"][:, 2:])
    torch.testing.assert_close(outside.flatten(0, 1)[:5], seen["some"], rtol=1e-4, atol=1e-5)


def test_first_tokens_are_forgotten_after_an_error():
    model = sparsify(Model(), Recipe("2:4", projections=MLP, dense_first_tokens=2)).model
    layer = model.model.layers[0].up_proj
    x = torch.randn(2, 6, 64)
    with torch.no_grad():
        expected = layer(x)
        with pytest.raises(RuntimeError):
            model.model(torch.zeros(2, 6, 65))
        assert torch.equal(layer(x), expected)


def test_a_copied_model_has_a_context_of_its_own():
    model = sparsify(Model(), Recipe("2:4", projections=MLP, dense_first_tokens=2)).model
    twin = copy.deepcopy(model)
    contexts = {id(layer.token_context) for layer in sparse_layers(twin)}
    assert len(contexts) == 1
    assert id(model.model.layers[0].up_proj.token_context) not in contexts
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(twin(ids), model(ids))


@pytest.mark.parametrize("call", [lambda model: sparsify(model, Recipe("8:16")), optimizing.optimize])
def test_a_path_is_no_model(call):
    with pytest.raises(TypeError, match=r"expected a model in memory \(a torch\.nn\.Module\), got str; load it first"):
        call("some/model")


def test_layers_in_float64_stay_dense():
    """The operators do not take them: the first forward would fail."""
    layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 64)}) for _ in range(2))
    layers[1].double()
    report = sparsify(layers, Recipe("8:16", projections=["up_proj"]))
    assert [name for name, _ in report.replaced] == ["0.up_proj"]
    assert report.kept == [("1.up_proj", "its weight is in float64; the operators take float32, bfloat16 and float16")]


def test_a_report_says_that_calibrated_data_are_missing():
    layers = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(32, 64)}) for _ in range(2))
    report = sparsify(layers, Recipe("8:16", projections=["up_proj"], mitigation=["spts"]))
    assert "calibrated data are missing: run nm-act calibrate, and load_calibration" in str(report)
    for layer in sparse_layers(layers):
        layer.set_data(shift=torch.zeros(32))
    assert "missing" not in str(report)
