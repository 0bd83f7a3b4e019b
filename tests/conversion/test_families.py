"""What sparsify replaces in the families of Transformers, and what its report says of the rest; counts by hand."""

import pytest
import torch
import transformers
from torch import nn

from nm_act.conversion.sparsify import decoder_linears, sparsify
from nm_act.layers.linear import NMLinear
from nm_act.recipe import DEFAULT_PROJECTIONS, NAMED, ROLES, Recipe, Rule

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
FFN = {"intermediate_size": 96}
GROUPED = {"num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

NEOX, LLAMA = "query_key_value dense dense_h_to_4h dense_4h_to_h", " ".join(DEFAULT_PROJECTIONS)

# Class, sizes, projections of one decoder layer. Every one is a linear layer: 100 %.
DENSE = {
    "falcon": ("Falcon", SIZES, NEOX),
    "phi": ("Phi", {**SIZES, **FFN}, "q_proj k_proj v_proj dense fc1 fc2"),
    "opt": ("OPT", {**SIZES, "word_embed_proj_dim": 64, "ffn_dim": 96}, "q_proj k_proj v_proj out_proj fc1 fc2"),
    "starcoder2": ("Starcoder2", {**SIZES, **FFN, **GROUPED}, "q_proj k_proj v_proj o_proj c_fc c_proj"),
    "gpt_neox": ("GPTNeoX", {**SIZES, **FFN}, NEOX),
    "phi3": ("Phi3", {**SIZES, **FFN, **GROUPED}, "qkv_proj o_proj gate_up_proj down_proj"),
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}, NEOX),
    "mpt": ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96}, "Wqkv out_proj up_proj down_proj"),
    "gemma": ("Gemma", {**SIZES, **FFN, **GROUPED, "head_dim": 16}, LLAMA),
    "qwen2": ("Qwen2", {**SIZES, **FFN, **GROUPED}, LLAMA),
    "mistral": ("Mistral", {**SIZES, **FFN, **GROUPED}, LLAMA),
    "olmo": ("Olmo", {**SIZES, **FFN}, LLAMA),
    "cohere": ("Cohere", {**SIZES, **FFN, **GROUPED}, LLAMA),
    "granite": ("Granite", {**SIZES, **FFN, **GROUPED}, LLAMA),
    "glm": ("Glm", {**SIZES, **FFN, **GROUPED, "head_dim": 16}, "q_proj k_proj v_proj o_proj gate_up_proj down_proj"),
}


def _model(prefix, sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **TOKENS})
    kind = getattr(transformers, f"{prefix}ForCausalLM", None) or getattr(transformers, f"{prefix}LMHeadModel")
    return kind(config).eval()


@torch.no_grad()
def _logits(model):
    return model(torch.arange(3, 15)[None]).logits


@torch.no_grad()
def _by_hooks(model, names, keep=8, group=16):
    """Logits of a dense model whose named layers get pruned inputs, by hooks."""

    def prune(module, args):
        x = args[0].unflatten(-1, (-1, group))
        rank = x.abs().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return torch.where(rank < keep, x, 0).flatten(-2), *args[1:]

    handles = [model.get_submodule(name).register_forward_pre_hook(prune) for name in names]
    logits = _logits(model)
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", DENSE)
def test_the_default_covers_the_decoder_blocks(family):
    prefix, sizes, projections = DENSE[family]
    model = _model(prefix, sizes)
    names = [name for name, (_, projection, _) in decoder_linears(model).items()]
    expected = _by_hooks(model, names)
    report = sparsify(model, Recipe("8:16"))
    assert sorted(name.rpartition(".")[2] for name, _ in report.replaced) == sorted(2 * projections.split())
    assert [reason for _, reason in report.kept] == ["outside the decoder layers"]
    assert report.mac_fraction == 1.0
    assert report.uncounted == []
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["falcon", "phi", "opt"])
def test_a_sparse_checkpoint_comes_back(family, tmp_path):
    model = _model(*DENSE[family][:2])
    report = sparsify(model, Recipe("8:16"))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    sparse = [name for name, module in again.named_modules() if isinstance(module, NMLinear)]
    assert sparse == [name for name, _ in report.replaced]
    assert torch.equal(_logits(again), _logits(model))


def test_lists_of_names_are_read_name_by_name():
    model = _model(*DENSE["phi"][:2])
    with pytest.raises(ValueError, match=r"got 'up_proj'; correct the recipe \(its up_proj is fc1\)"):
        sparsify(model, Recipe("8:16", projections=["q_proj", "up_proj"]))
    with pytest.raises(ValueError, match=r"got 'gate_proj'; correct the recipe$"):
        sparsify(model, Recipe("8:16", projections=["q_proj", "gate_proj", "down_proj"]))
    with pytest.raises(ValueError, match=r"got 'o_proj'; correct the recipe \(its o_proj is dense\)"):
        sparsify(model, Recipe("8:16", rules=[Rule(projections=["o_proj"], pattern="2:4")]))
    report = sparsify(model, Recipe("8:16", rules=[Rule(projections=["fc1"], pattern="2:4")]))
    assert {str(spec.pattern) for name, spec in report.replaced if name.endswith("fc1")} == {"2:4"}
    assert {str(spec.pattern) for name, spec in report.replaced if not name.endswith("fc1")} == {"8:16"}


def test_roles_are_those_of_a_llama_block():
    assert {role for roles in ROLES.values() for role in roles} == set(DEFAULT_PROJECTIONS)
    assert all(ROLES[name] == (name,) for name in DEFAULT_PROJECTIONS)


def test_a_llama_like_model_has_the_layers_that_it_had():
    model = _model("Llama", {**SIZES, **FFN, **GROUPED})
    report = sparsify(model, Recipe.from_dict({"pattern": "8:16", "projections": list(DEFAULT_PROJECTIONS)}))
    assert sorted(name.rpartition(".")[2] for name, _ in report.replaced) == sorted(2 * DEFAULT_PROJECTIONS)


def test_conv1d_is_refused_with_advice_that_works():
    model = _model("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96})
    expected = _logits(model)
    told = r"got none: transformer\.h\.0\.attn\.c_attn and all others stay dense \(Conv1D is not torch\.nn\.Linear\); .* linear layers"
    with pytest.raises(ValueError, match=told):
        sparsify(model, Recipe("8:16"))
    assert torch.equal(_logits(model), expected)


def test_a_conv1d_beside_linear_layers_is_counted():
    layers = nn.ModuleList(nn.ModuleDict({"c_fc": nn.Linear(32, 64)}) for _ in range(1))
    layers[0]["c_proj"] = transformers.pytorch_utils.Conv1D(32, 64)
    report = sparsify(layers, Recipe("8:16"))
    assert report.kept == [("0.c_proj", "Conv1D is not torch.nn.Linear")]
    assert report.mac_fraction == 0.5


# Attention: q 64x64, k and v 64x32 each, o 64x64; router 64x8; two of eight experts: gate_up 64x2f, down fx64.
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64


@pytest.mark.parametrize(
    ("prefix", "sizes", "router", "ffn"),
    [
        ("Mixtral", {**FFN, "num_local_experts": 8, "num_experts_per_tok": 2}, "gate", 96),
        ("GptOss", {**FFN, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2}, "router", 96),
        ("Qwen3Moe", {**FFN, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, "gate", 32),
    ],
)  # fmt: skip
def test_fused_experts_are_counted_and_listed(prefix, sizes, router, ffn):
    model = _model(prefix, {**SIZES, **GROUPED, **sizes})
    report = sparsify(model, Recipe("8:16"))
    assert sorted({name.rpartition(".")[2] for name, _ in report.replaced}) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    kept = {(name.rpartition(".")[2], reason) for name, reason in report.kept}
    assert kept == {
        ("experts", f"{prefix}Experts is not torch.nn.Linear"),
        (router, f"{prefix}TopKRouter is not torch.nn.Linear"),
        ("lm_head", "outside the decoder layers"),
    }
    total = ATTENTION + 64 * 8 + 2 * (64 * 2 * ffn + ffn * 64)
    assert report.mac_fraction == pytest.approx(ATTENTION / total, rel=1e-12)
    assert report.uncounted == []


def test_experts_in_a_list_count_as_often_as_they_run():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k = 1
            self.experts = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(32, 32)}) for _ in range(4))
            self.up_proj = nn.Linear(32, 32)

    report = sparsify(nn.ModuleList([Experts()]), Recipe("8:16", projections=["up_proj"]))
    assert report.mac_fraction == 0.5  # 32 * 32 shared, 1 of 4 experts of 32 * 32


def test_what_cannot_be_counted_is_named():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log = nn.Parameter(torch.zeros(8, 4))
            self.out_proj = nn.Linear(32, 32)

    layers = nn.ModuleList([nn.ModuleDict({"mixer": Mixer(), "up_proj": nn.Linear(32, 32)})])
    report = sparsify(layers, Recipe("8:16"))
    assert report.uncounted == ["0.mixer"]
    assert report.kept == [
        ("0.mixer", "Mixer is not torch.nn.Linear; its multiply-accumulates are not counted"),
        ("0.mixer.out_proj", "output of a state-space layer; list out_proj to have it"),
    ]
    assert report.mac_fraction == 0.5
    assert "50.0% of the decoder's counted multiply-accumulates" in str(report)


# ---- weights that are not plain ----


class QuantisedTensor(torch.Tensor):
    """As torchao's: a tensor subclass inside an nn.Linear."""


def test_a_tensor_subclass_is_left_alone():
    model = _model("Llama", {**SIZES, **FFN, **GROUPED})
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.detach().as_subclass(QuantisedTensor))
    layer.gate_proj.weight = nn.Parameter(torch.ones(96, 64, dtype=torch.int8), requires_grad=False)
    before = layer.up_proj, layer.up_proj.weight
    report = sparsify(model, Recipe("8:16"))
    reasons = dict(report.kept)
    assert reasons["model.layers.0.mlp.up_proj"] == "its weight is a QuantisedTensor, not a plain parameter"
    assert reasons["model.layers.0.mlp.gate_proj"] == "its weight is quantised (int8)"
    assert layer.up_proj is before[0]
    assert layer.up_proj.weight is before[1]
    assert len(report.replaced) == 12
    each = ATTENTION + 3 * 64 * 96
    assert report.mac_fraction == pytest.approx(1 - 2 * 64 * 96 / (2 * each))


# ---- PEFT ----


def _lora(method="LoraConfig", **options):
    peft = pytest.importorskip("peft")
    model = _model("Llama", {**SIZES, **FFN, **GROUPED})
    config = getattr(peft, method)(target_modules=["q_proj", "up_proj"], **options)
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_the_base_of_a_lora_layer_is_sparse():
    model = _lora(r=4)
    names = list(decoder_linears(model))
    assert len(names) == 14
    expected = _by_hooks(model, names)  # the adapters beside a base get its whole input
    report = sparsify(model, Recipe("8:16"))
    replaced = [name for name, _ in report.replaced]
    assert replaced == names
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in replaced
    assert {reason for name, reason in report.kept if "lora_" in name} == {"adapter of PEFT's Linear"}
    text = str(report)
    assert "  q_proj     8:16 act  x 2" in text
    assert "base_layer" not in text
    base = ATTENTION + 3 * 64 * 96
    adapters = 4 * (64 + 64) + 4 * (64 + 96)
    assert report.mac_fraction == pytest.approx(base / (base + adapters))
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(expected, _logits(model), atol=1e-3)


def test_an_idle_adapter_costs_nothing():
    model = _lora(r=4)
    model.merge_adapter()
    assert sparsify(model, Recipe("8:16")).mac_fraction == 1.0


def test_a_merged_model_remembers_its_recipe():
    model = _lora(r=4)
    sparsify(model, Recipe("8:16"))
    merged = model.merge_and_unload()
    assert merged.config.quantization_config.recipe == Recipe("8:16")
    assert isinstance(merged.model.layers[0].self_attn.q_proj, NMLinear)


@pytest.mark.parametrize(
    ("method", "options"), [("Lora", {"use_dora": True, "r": 4}), ("OFT", {"r": 4, "oft_block_size": 0})]
)
def test_methods_that_read_the_weight_stay_dense(method, options):
    report = sparsify(_lora(f"{method}Config", **options), Recipe("8:16"))
    reasons = {name.split(".")[-2]: why for name, why in report.kept if name.endswith("base_layer")}
    reason = f"PEFT's {method.lower()} method reads its weight by itself"
    assert reasons == {"q_proj": reason, "up_proj": reason}
    assert len(report.replaced) == 10


def test_vllm_covers_what_sparsify_covers():
    from nm_act.integrations.vllm_plan import specs_of

    recipe = Recipe("8:16")
    for name in ("self_attn.out_proj", "self_attn.qkv_proj", "mlp.fc1", "mlp.c_proj", "attn.Wqkv"):
        assert [str(spec) for _, spec in specs_of(recipe, f"model.layers.1.{name}", {}, 64)] == ["8:16 act"]
    for name in ("mixer.out_proj", "mixer.in_proj", "mlp.gate", "mlp.experts"):
        assert specs_of(recipe, f"model.layers.1.{name}", {}, 64) == []
    listed = Recipe("8:16", projections=["out_proj"])
    assert [str(spec) for _, spec in specs_of(listed, "model.layers.1.mixer.out_proj", {}, 64)] == ["8:16 act"]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", DENSE)
def test_recommended_recipes_fit_every_family(kind, name):
    prefix, sizes, projections = DENSE[kind]
    model = sparsify(_model(prefix, sizes), Recipe.named(name)).model
    found = {n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, NMLinear)}
    assert found == {each for each in projections.split() if Recipe.named(name).resolve(0, each) is not None}
    assert found
