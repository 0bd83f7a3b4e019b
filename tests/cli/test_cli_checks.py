"""What the command line refuses before it loads a model, and what it says when it is interrupted."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_model
import torch
from typer.testing import CliRunner

from nm_act.cli import app
from nm_act.recipe import Recipe


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path):
    """Files that the refused commands name, by the names that stand in braces in their arguments."""
    (tmp_path / "null.yaml").write_text("pattern: null\n")
    (tmp_path / "spts.yaml").write_text("pattern: 2:4\nmitigation: [spts]\n")
    (tmp_path / "plain.yaml").write_text("pattern: 2:4\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 100)
    (tmp_path / "wikitext2.txt").write_text(tiny_model.TEXT)
    return {path.stem: path for path in tmp_path.iterdir()} | {"here": tmp_path, "out": tmp_path / "out"}


EVAL = ["eval", "{model}", "--tasks", "wikitext2", "--data", "{here}", "--output", "{out}"]
PPL = ["ppl", "{model}", "--text", "{wikitext2}"]
SEARCH = ["search", "{model}", "--text", "{wikitext2}", "--output", "{out}", "--target-speedup", "1.1"]
CALIBRATE = ["calibrate", "{model}", "--output", "{out}"]
NEEDS = "expected recipes that need no calibration, got '2:4 act spts'"
CONTEXT = "within the model's context of 128 tokens"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PPL, "--pattern", "2:4", "--mitigation", "spts"], NEEDS),
        ([*PPL, "--recipe", "{spts}"], NEEDS),
        ([*PPL, "--recipe", "{null}"], "expected a value for pattern of a recipe, got none (null)"),
        ([*PPL, "--window", "129"], CONTEXT),
        ([*PPL, "--calibration", "{here}"], "no finished calibration at"),
        ([*PPL, "--threads", "99999999999"], "1024"),
        ([*PPL, "--device", "meta"], "which holds no numbers"),
        ([*EVAL, "--pattern", "2:4", "--mitigation", "spts"], NEEDS),
        ([*EVAL, "--recipe", "{null}"], "expected a value for pattern"),
        ([*EVAL, "--pattern", "2:4", "--window", "129"], CONTEXT),
        ([*EVAL, "--calibration", "{here}"], "no finished calibration at"),
        (["generate", "{model}", "x", "--pattern", "2:4", "--mitigation", "spts"], NEEDS),
        (["generate", "{model}", "x", "--pattern", ""], "expected a pattern"),
        ([*SEARCH, "--window", "129"], CONTEXT),
        ([*SEARCH, "--window", "32", "--option", "2:4 spts", "--calibrated", "{here}"], "expected a calibration for"),
        ([*CALIBRATE, "--recipe", "{spts}", "--data", "{wikitext2}", "--length", "129"], CONTEXT),
        ([*CALIBRATE, "--recipe", "{spts}", "--data", "{latin}"], "expected UTF-8 text in"),
        ([*CALIBRATE, "--recipe", "{spts}", "--data", "missing.txt"], "cannot read 'missing.txt'"),
        ([*CALIBRATE, "--recipe", "{plain}", "--data", "{wikitext2}"], "expected a recipe with something to calibrate"),
        (["demo", "--model", "{model}", "--tokens", "0"], "'--tokens'"),
    ],
)
def test_refused_before_a_model_is_loaded(folder, files, monkeypatch, arguments, message):
    from nm_act.integrations import checkpoints

    def load_model(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(checkpoints, "load_model", load_model)
    result = _run(*(argument.format(model=folder, **files) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "loading" not in result.stderr
    complaint = result.stderr.splitlines()[-1]
    assert complaint.startswith("nm-act: ")
    assert message in complaint


def test_no_arguments_is_help_and_version():
    assert "Commands:" in _run().stdout
    from nm_act.version import __version__

    result = _run("--version")
    assert (result.exit_code, result.stdout) == (0, f"nm-act {__version__}\n")


# ---- the package's names


def _python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


def test_importing_the_package_leaves_torch_alone_and_finds_every_name():
    code = """
import sys, nm_act
print("torch" in sys.modules)
for name in nm_act.__all__:
    getattr(nm_act, name)
print(nm_act.NMActConfig.__name__, nm_act.methods.mitigations.__name__, hasattr(nm_act, "nonsense"))
"""
    assert _python(code) == ["False", "NMActConfig", "nm_act.methods.mitigations", "False"]


def test_a_function_hides_the_module_of_its_name_whatever_was_imported_first():
    code = """
import nm_act.conversion.sparsify, nm_act.ops.explain, nm_act.optimize.model
import nm_act
print(*(type(getattr(nm_act, name)).__name__ for name in ("sparsify", "explain", "optimize")))
"""
    assert _python(code) == ["function"] * 3


def test_operators_are_there_after_torch_and_the_package_are_imported():
    code = "import torch, nm_act; print(torch.ops.nm_act.prune)"
    assert _python(code) == ["nm_act.prune"]


# ---- Ctrl-C


def _interrupted(arguments, seconds):
    process = subprocess.Popen(
        [sys.executable, "-m", "nm_act", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its grandchildren.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, stdout, stderr


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0])
def test_interrupted_during_imports(folder, text, seconds):
    code, stdout, stderr = _interrupted(["ppl", folder, "--text", text], seconds)
    assert "Traceback" not in stderr
    assert code in (130, -signal.SIGINT)  # a shell shows both as 130
    assert stdout == ""
    assert stderr.endswith("interrupted; no result was written\n")


@pytest.mark.parametrize("command", ["eval", "search", "calibrate"])
def test_what_wrote_nothing_does_not_promise_to_go_on(folder, files, monkeypatch, command):
    """Interrupted while the model is loaded; the second time there is a result of an earlier run."""
    common = importlib.import_module("nm_act.cli.common")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load", interrupt)
    arguments, kept = {
        "eval": ([*EVAL, "--pattern", "2:4"], "rows/dense.wikitext2.json"),
        "search": ([*SEARCH, "--window", "32"], "sensitivities.jsonl"),
        "calibrate": (
            [*CALIBRATE, "--recipe", "{spts}", "--data", "{wikitext2}", "--length", "32"],
            "state/block-0000.safetensors",
        ),
    }[command]
    arguments = [argument.format(model=folder, **files) for argument in arguments]
    result = _run(*arguments)
    assert result.exit_code == 130
    assert result.stderr.endswith(common.INTERRUPTED + "\n")
    (files["out"] / kept).parent.mkdir(parents=True)
    (files["out"] / kept).touch()
    for name in {"eval": ["run.json"], "search": ["run.json"], "calibrate": ["state/run.json"]}[command]:
        (files["out"] / name).touch()
    result = _run(*arguments)
    assert result.exit_code == 130
    assert result.stderr.endswith(common.INTERRUPTED_BUT_KEPT + "\n")


# ---- output


def test_a_pattern_given_twice_is_one_row_with_a_note(folder, text):
    options = ["--pattern", "2:4", "--pattern", "8:16", "--pattern", "2:4", "--max-tokens", 64, "--json"]
    result = _run("ppl", folder, "--text", text, *options)
    assert [row["name"] for row in json.loads(result.stdout)["rows"]] == ["dense", "2:4", "8:16"]
    assert "--pattern names 2:4 twice: one row\n" in result.stderr


def test_ppl_refuses_a_dense_model_that_gives_nan(text, tmp_path):
    model, tokenizer = tiny_model.build()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = _run("ppl", tmp_path, "--text", text, "--pattern", "2:4", "--max-tokens", 64)
    assert result.exit_code == 2
    assert "expected a finite perplexity of the dense model, got nan" in result.stderr
    assert "perplexity, 2:4" not in result.stderr


def test_generate_is_greedy_whatever_the_generation_config_says(text):
    """Each new token is the most probable one after those before it, worked out here step by step."""
    from nm_act.cli.generate import continue_text

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
    from nm_act.cli.common import print_table

    monkeypatch.setenv("COLUMNS", "80")
    columns = ["", "perplexity", "change", "decode tokens/s", "p20 - p80", "speed-up"]
    print_table("Title", columns, [["dense", "12.34", "", "10.1", "9.9 - 10.3", "1.00x"], [name, *"12345"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert set(name.split()) <= set(words)
    assert "perplexity" in words


def test_info_fits_80_columns(monkeypatch):
    from nm_act.ops import support_table

    monkeypatch.setenv("COLUMNS", "80")
    out = _run("info").stdout
    assert max(map(len, out.splitlines())) <= 80
    assert {row["op"] for row in support_table()} <= set(out.split())


def test_null_is_refused_in_every_field_of_a_recipe():
    for field in ("pattern", "projections", "criterion", "mitigation", "skip_layers", "rules"):
        with pytest.raises(ValueError, match=f"expected a value for {field} of a recipe, got none"):
            Recipe.from_dict({"pattern": "2:4", field: None})


@pytest.mark.parametrize("facts", ["{", "[]", "{}", '{"seed": 0, "windows": 4}'])
def test_damaged_facts_of_a_calibration(tmp_path, monkeypatch, facts):
    from nm_act.conversion.calibration import DATA_FILE, FACTS_FILE
    from nm_act.lab.evaluate import calibrated

    monkeypatch.setattr(calibrated, "read_calibration", lambda folder: (Recipe(pattern="2:4"), {}, {}))
    (tmp_path / DATA_FILE).touch()
    (tmp_path / FACTS_FILE).write_text(facts)
    with pytest.raises(ValueError, match=r"expected (seed|data) of a calibration in"):
        calibrated.of_calibration(tmp_path)
