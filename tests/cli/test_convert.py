"""``nm-act convert``: the checkpoint is whole, loads sparse everywhere, and computes what sparsify makes of the model."""

import json
import os
import socket

import pytest
import tiny_model
import torch
from commands import ok, refused, run
from conftest import failing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import nm_act
from nm_act.conversion.calibration import DATA_FILE, RECIPE_FILE
from nm_act.integrations import checkpoints

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
CHAT = [{"role": "user", "content": "The quick"}]


def _logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]).logits


def _sources(tmp_path):
    model, tokenizer = tiny_model.build()
    tokenizer.chat_template = TEMPLATE
    checkpoints.save_model(model, tokenizer, tmp_path / "folder")
    return model, tokenizer


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_checkpoint_that_loads_sparse(tmp_path, kind):
    dense, tokenizer = _sources(tmp_path)
    source = tmp_path / "folder"
    if kind == "gguf":
        pytest.importorskip("gguf")
        source = tiny_model.save_gguf(tmp_path / "tiny.gguf")
        dense, tokenizer = checkpoints.load_model(source)
    out = tmp_path / "new" / "a sparse one"
    told = ok("convert", source, "--pattern", "8:16", "--output", out)
    assert "sparse: 14 of 15 linear layers" in told
    assert f"written to {out}; " in told
    assert f"vllm.entrypoints.openai.api_server --model '{out}'\n" in told
    assert f"nm-act generate '{out}' PROMPT\n" in told
    expected = _logits(nm_act.sparsify(dense, nm_act.Recipe("8:16")).model, tokenizer)
    model, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert isinstance(model.model.layers[0].mlp.down_proj, nm_act.NMLinear)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(_logits(model, words), expected)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "nm_act"
    assert (out / "generation_config.json").is_file()
    if kind == "folder":
        assert words.apply_chat_template(CHAT, tokenize=False) == "<s>The quick</s>"
    assert ok("generate", out, "The quick", "--max-new-tokens", 2).startswith("The quick")


def test_json_dtype_and_the_file_modes(folder, tmp_path):
    out = tmp_path / "sparse"
    out.mkdir()  # an empty folder is as good as none
    options = ["--pattern", "2:4", "--criterion", "wina", "--mitigation", "var", "--dtype", "bfloat16"]
    data = json.loads(ok("convert", folder, "--output", out, *options, "--json"))
    assert data["recipe"] == nm_act.Recipe("2:4", criterion="wina", mitigation=["var"]).to_dict()
    assert (data["dtype"], data["sparse_layers"], data["mac_fraction"]) == ("bfloat16", 14, 1.0)
    assert data["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_calibration_becomes_a_checkpoint(folder, text, tmp_path):
    """By its folder or its recipe file; the result is the checkpoint that calibrate itself writes."""
    nm_act.Recipe("2:4", mitigation=["spts"]).save(tmp_path / "spts.yaml")
    sizes = ["--windows", 2, "--length", 16, "--data", text]
    ok("calibrate", folder, "--recipe", tmp_path / "spts.yaml", "--output", tmp_path / "calibrated", *sizes)
    _, tokenizer = tiny_model.build()
    expected = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "calibrated"), tokenizer)
    named = {"--calibration": tmp_path / "calibrated", "--recipe": tmp_path / "calibrated" / RECIPE_FILE}
    for option, value in named.items():
        out = tmp_path / option.strip("-")
        data = json.loads(ok("convert", folder, option, value, "--output", out, "--json"))
        assert data["calibration"] == str(tmp_path / "calibrated")
        assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(out), tokenizer), expected)
    (tmp_path / "calibrated" / DATA_FILE).unlink()
    sentence = refused("convert", folder, "--recipe", named["--recipe"], "--output", tmp_path / "lacks")
    assert "make its data with nm-act calibrate and name its folder with --calibration" in sentence


@pytest.mark.parametrize("method", ["nm_act", "awq"])
def test_a_model_that_is_not_dense(folder, tmp_path, monkeypatch, method):
    first = tmp_path / "first"
    ok("convert", folder, "--pattern", "2:4", "--output", first)
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (first / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(checkpoints, "load_model", None)  # before the weights are read
    sentence = refused("convert", first, "--pattern", "8:16", "--output", tmp_path / "second")
    assert "name the checkpoint it was made from" in sentence
    assert {"nm_act": "is a sparse checkpoint", "awq": "is quantised with awq"}[method] in sentence


def test_a_recipe_that_vllm_refuses_is_noted(folder, tmp_path):
    nm_act.Recipe("2:4", phase="decode").save(tmp_path / "decode.yaml")
    result = run("convert", folder, "--recipe", tmp_path / "decode.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert "vLLM will not serve this checkpoint: expected a recipe with phase both" in result.stderr
    assert "nm-act generate" in result.stdout
    assert "api_server" not in result.stdout


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_whole_or_nothing(folder, tmp_path, monkeypatch, error):
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", failing(error))
    result = run("convert", folder, "--pattern", "2:4", "--output", tmp_path / "out")
    interrupted = isinstance(error, KeyboardInterrupt)
    assert result.exit_code == (130 if interrupted else 2)
    told = "interrupted; no result was written" if interrupted else "no space left on device; choose a path that can be"
    assert told in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_disk_that_is_full_at_the_weights(folder, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        sentence = refused("convert", folder, "--pattern", "2:4", "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in sentence
    assert "file too large" in sentence
    assert os.listdir(tmp_path) == []


def test_offline(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", failing(AssertionError("the network was asked")))
    ok("convert", folder, "--pattern", "2:4", "--output", tmp_path / "out")
