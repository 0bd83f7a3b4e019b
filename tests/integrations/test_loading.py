"""Checkpoints whose weights are not the model's are refused: none is filled up with random numbers."""

import os

import pytest
import tiny_model
import torch
from commands import ok
from conftest import failing
from safetensors.torch import load_file, save_file
from tiny_families import sparse_layers
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from nm_act import NMActConfig, NMLinear, Recipe, sparsify
from nm_act.cli.application import app
from nm_act.integrations.checkpoints import check_device, load_config, load_model, load_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


def _changed(folder, target, change):
    """A copy of the checkpoint with other tensors; everything else is linked."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            os.symlink(path, target / path.name)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), target / "model.safetensors", {"format": "pt"})
    return target


def _without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def _prefixed(tensors):
    return {f"foo.{name}": value for name, value in tensors.items()}


def _with(name, like=UP, rows=None):
    return lambda tensors: {**tensors, name: tensors[like][:rows].clone()}


# The tiny Llama has 21 tensors: embedding, final norm, head, and 9 for each of its 2 layers.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(UP), f"expected every weight of LlamaForCausalLM in {{place!r}}, but it lacks {UP}; download"),
        (_without(UP, "model.layers.0.self_attn.q_proj.weight"), "lacks model.layers.0.self_attn.q_proj.weight (and 1 more);"),
        (_prefixed, "lacks model.embed_tokens.weight (and 20 more) and has foo.lm_head.weight (and 20 more) instead;"),
        (_with("model.layers.2.mlp.up_proj.weight"), "but the model has no model.layers.2.mlp.up_proj.weight;"),
        (_with(UP, rows=50), f"expected {UP} of shape [96, 64] for this LlamaForCausalLM in {{place!r}}, got [50, 64];"),
    ],
    ids=["missing", "two missing", "prefix", "unexpected", "shape"],
)  # fmt: skip
def test_weights_that_are_not_the_models(folder, tmp_path, change, message):
    place = str(_changed(folder, tmp_path / "model", change))
    with pytest.raises(ValueError, match="expected") as refused:
        load_model(place)
    assert message.format(place=place) in str(refused.value)


def test_a_tied_head_is_no_missing_weight(tmp_path):
    model, tokenizer = tiny_model.build()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, _ = load_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_calibrated_data_are_no_unexpected_weights_and_missing_ones_are_named(folder, tmp_path):
    def with_data(model):
        for layer in sparse_layers(sparsify(model, Recipe(pattern="2:4", mitigation=["lpts"])).model):
            layer.set_data(**{name: torch.full_like(value, 0.5) for name, value in layer.data().items()})

    loaded, _ = load_model(tiny_model.save(tmp_path / "whole", with_data))
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, NMLinear)}
    name, data = next((f"{name}.{key}", data) for name, layer in layers.items() for key, data in layer.data().items())
    assert torch.equal(data, torch.full_like(data, 0.5))
    with pytest.raises(ValueError, match="but it lacks") as refused:
        load_model(_changed(tmp_path / "whole", tmp_path / "part", _without(name)))
    assert name in str(refused.value)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_from_pretrained_with_a_recipe_refuses_a_missing_weight(folder, tmp_path, options):
    from transformers import AutoModelForCausalLM

    config = NMActConfig(pattern="2:4")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)
    place = _changed(folder, tmp_path / "model", _without(UP))
    with pytest.raises(ValueError, match=f"but it lacks {UP}"):
        AutoModelForCausalLM.from_pretrained(place, quantization_config=config, **options)


# ---- GGUF


def _gguf(path, monkeypatch, keep, split=()):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    tensors, header = tiny_model._gguf_tensors, gguf.GGUFWriter.write_header_to_file

    def with_split(writer, *args):
        for key, value in split:
            writer.add_uint16(key, value)
        return header(writer, *args)

    monkeypatch.setattr(tiny_model, "_gguf_tensors", lambda model: [each for each in tensors(model) if keep(each[0])])
    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_split)
    return tiny_model.save_gguf(path)


def test_gguf_without_a_tensor(monkeypatch, tmp_path):
    path = _gguf(tmp_path / "lacks.gguf", monkeypatch, lambda name: name != "blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=f"but it lacks {UP}; download"):
        load_model(path)


def test_one_part_of_a_gguf_file(monkeypatch, tmp_path):
    parts = ("split.no", 0), ("split.count", 3)
    path = _gguf(tmp_path / "part.gguf", monkeypatch, lambda name: not name.startswith("blk.1"), parts)
    with pytest.raises(ValueError, match="got part 1 of a GGUF file split in 3; merge the parts"):
        load_model(path)


def test_a_gguf_file_split_into_one(monkeypatch, tmp_path):
    path = _gguf(tmp_path / "whole.gguf", monkeypatch, lambda name: True, [("split.no", 0), ("split.count", 1)])
    model, _ = load_model(path)
    assert torch.equal(model.get_parameter(UP), tiny_model.build()[0].get_parameter(UP))


# ---- every command


@pytest.mark.parametrize("command", ["ppl", "generate", "calibrate", "search", "eval", "demo"])
def test_every_command_refuses_it(folder, text, tmp_path, command):
    place = _changed(folder, tmp_path / "model", _without(UP))
    (tmp_path / "wikitext2.txt").write_text(tiny_model.TEXT)
    (tmp_path / "recipe.yaml").write_text("pattern: 2:4\nmitigation: [lpts]\n")
    out = ["--output", tmp_path / "out"]
    arguments = {
        "ppl": [place, "--text", text],
        "generate": [place, "The quick", "--max-new-tokens", 8],
        "calibrate": [place, "--recipe", tmp_path / "recipe.yaml", "--data", text, "--length", 32, *out],
        "search": [place, "--text", text, "--window", 32, "--target-speedup", 1.1, *out],
        "eval": [place, "--tasks", "wikitext2", "--data", tmp_path, "--pattern", "2:4", *out],
        "demo": ["--model", place, "--text", text, "--out", tmp_path / "demo"],
    }
    if command == "demo":
        pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, [command, *map(str, arguments[command])])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("nm-act: expected every weight of LlamaForCausalLM in")
    assert f"it lacks {UP}; download" in result.stderr
    assert not (tmp_path / "out").exists()


# ---- before the weights


def test_load_config(folder, tmp_path):
    assert load_config(folder).max_position_embeddings == 128
    (tmp_path / "config.json").write_text("{")
    assert load_config(tmp_path) is None
    pytest.importorskip("gguf")
    assert load_config(tiny_model.save_gguf(tmp_path / "m.gguf")).max_position_embeddings == 128


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("kind", ["folder", "sparse", "gguf"])
def test_what_was_read_early_makes_the_same_model(folder, tmp_path, monkeypatch, kind, dtype):
    place = folder
    if kind == "sparse":
        place = tiny_model.save(tmp_path, lambda model: sparsify(model, Recipe("8:16")))
    elif kind == "gguf":
        pytest.importorskip("gguf")
        place = tiny_model.save_gguf(tmp_path / "m.gguf")
    expected, words = load_model(place, dtype=dtype)
    config, tokenizer = load_config(place), load_tokenizer(place)
    before = config.to_dict()
    for auto in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", failing(AssertionError("read again")))
    model, own = load_model(place, dtype=dtype, config=config, tokenizer=tokenizer)
    assert (config.to_dict(), own) == (before, tokenizer)
    assert own.get_vocab() == words.get_vocab()
    assert (model.dtype, repr(model)) == (expected.dtype, repr(expected))
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_the_command_line_parses_a_gguf_file_once_for_its_configuration(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    place = tiny_model.save_gguf(tmp_path / "m.gguf")
    convert = ["convert", place, "--pattern", "8:16", "--output", tmp_path / "out"]
    reads = []
    read = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: reads.append(a) or read(*a, **k))
    for arguments in (["generate", place, "The", "--max-new-tokens", 1], convert):
        ok(*arguments)
        assert len(reads) == 1
        reads.clear()


@pytest.mark.parametrize(
    ("device", "message"), [("meta", "holds no numbers"), ("lazy", "can use here"), ("nonsense", "such as cpu")]
)
def test_devices_that_cannot_compute(device, message):
    with pytest.raises(ValueError, match=message):
        check_device(device)
