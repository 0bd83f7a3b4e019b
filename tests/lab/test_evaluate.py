"""Evaluation: data folders, studies, resumable runs, drops, and the command line; the harness where it is installed."""

import dataclasses
import json
import math
import shutil

import commands
import pytest
import tiny_model
from conftest import failing

from nm_act.conversion.sparsify import sparsify
from nm_act.lab.evaluate import results, run, study, tasks
from nm_act.recipe import Recipe, Rule

ROWS = [
    {"query": f"Question: Is {i} even?", "choices": ["yes", "no", "maybe"][: 2 + i % 2], "gold": i % 2}
    for i in range(8)
]


@pytest.fixture
def data(tmp_path):
    """A data folder with a text and one small task."""
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "arc").mkdir()
    rows = [{"text": line} for line in tiny_model.TEXT.split("\n")]
    (tmp_path / "wikitext2" / "test_rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "arc" / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def _eval(*arguments):
    return commands.run("eval", *arguments)


def _refused(*arguments) -> str:
    return commands.refused("eval", *arguments)


# ---- studies


def test_study_multiplies_lists_out(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(
        "rows:\n  - {pattern: [2:4, 8:16], criterion: [act, wina], mitigation: [[], [var]]}\n"
        "  - {pattern: 2:4, layers: alanova}\n  - {pattern: 2:4, dense_first_tokens: [1, 4]}\n"
    )
    variants = [study.row_variant(row) for row in study.load_study(path)]
    assert len(variants) == 11
    assert [v.name for v in variants[:3]] == ["act 2:4", "act+var 2:4", "wina 2:4"]
    assert [v.name for v in variants[-3:]] == ["act 2:4 alanova", "act+first-1 2:4", "act+first-4 2:4"]
    assert set(variants[-3].recipe.projections) == {"k_proj", "v_proj", "gate_proj", "down_proj"}
    assert variants[-1].recipe.dense_first_tokens == 4
    assert len({v.slug for v in variants}) == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: []", "expected a study with the one key rows"),
        ("rows: [{criterion: act}]", "to be a mapping with a pattern or a recipe"),
        ("rows: [{pattern: 2:4, patern: 1}]", "expected the keys of a row among .*, got 'patern'"),
        ("rows: [", "expected a study in YAML"),
        ("rows: [{recipe: r.yaml, criterion: act}]", "beside recipe only layers, calibrated, seed, got 'criterion' in"),
        ("rows: [{recipe: r.yaml, layers: most}]", "layers of a recipe's row among all, amber, alanova, search, got 'mo"),
        ("rows: [{pattern: 2:4, seed: one}]", "expected an integer seed and calibrated true or false, got seed 'one'"),
        ("rows: [{pattern: 2:4, calibrated: 1}]", "expected an integer seed and calibrated true or false, got calibr"),
    ],
)  # fmt: skip
def test_bad_study(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        study.load_study(tmp_path / "s.yaml")


def test_unknown_layers():
    with pytest.raises(ValueError, match="expected layers among all, amber, alanova, got 'most'"):
        study.row_variant({"pattern": "2:4", "layers": "most"})


def test_method_of_what_layers_get():
    wina = {"pattern": "2:4", "criterion": "wina", "mitigation": ["var"]}
    found = Recipe("dense", rules=[Rule(layers=[0], projections=["q_proj"], **wina)])
    assert (study.from_recipe(found).method, study.from_recipe(found).pattern) == ("wina+var", "2:4")
    both = dataclasses.replace(found, rules=[*found.rules, Rule(layers=[1], projections=["q_proj"], pattern="8:16")])
    assert (study.from_recipe(both).method, study.from_recipe(both).pattern) == ("mixed", "mixed")
    assert study.from_recipe(Recipe("2:4", skip_layers=[0])).method == "act"


# ---- numbers


def _record(folder, variant, task, metric, value, scores):
    result = {"metric": metric, "value": value, "stderr": 0.1, "samples": len(scores), "scores": scores}
    folder.write(variant, task, {**result, "layers": 2, "width": 64, "seconds": 0})


def test_drops_are_paired(tmp_path):
    folder = run.RunFolder.open(tmp_path / "r", {"model": "m"})
    sparse = study.from_recipe(Recipe("2:4"))
    _record(folder, study.DENSE_VARIANT, "arc_easy", "acc", 0.75, [1, 1, 1, 0])
    _record(folder, sparse, "arc_easy", "acc", 0.5, [1, 1, 0, 0])
    _record(folder, study.DENSE_VARIANT, "wikitext2", "ppl", math.e, [1.0, 1.0])
    _record(folder, sparse, "wikitext2", "ppl", math.e**2, [1.5, 2.5])
    rows = {(row.name, row.fields["task"]): row for row in results.collect([tmp_path / "r"])}
    accuracy = rows["act 2:4", "arc_easy"]
    assert accuracy.drop == pytest.approx(100 / 3)
    # Differences 0, 0, -1, 0: sample deviation 0.5, standard error 0.25, of 0.75.
    assert accuracy.drop_stderr == pytest.approx(100 / 3)
    assert rows["act 2:4", "wikitext2"].drop == pytest.approx(100 * (math.e - 1))
    assert rows["act 2:4", "wikitext2"].fields["dense_value"] == math.e
    assert math.isnan(rows["dense", "arc_easy"].drop)
    average = results.average_drops(list(rows.values()))["act 2:4"]
    assert average == (pytest.approx(100 / 3), pytest.approx(100 / 3), 1)
    header = results.to_csv(list(rows.values())).splitlines()[0]
    assert header == (
        "model,name,method,pattern,layers,predicted_speedup,predicted_decode,task,metric,value,stderr,samples,dense_value,"
        "seed,calibrated_on,dtype,device,commit,date"
    )


def test_averages_are_over_the_papers_tasks(monkeypatch, tmp_path):
    folder = run.RunFolder.open(tmp_path / "r", {"model": "m"})
    sparse = study.from_recipe(Recipe("2:4"))
    for task, correct in (("arc_easy", 1), ("boolq", 0), ("hellaswag", 2), ("arc_challenge", 2)):
        _record(folder, study.DENSE_VARIANT, task, "acc", 1.0, [1, 1])
        _record(folder, sparse, task, "acc", correct / 2, [1] * correct + [0] * (2 - correct))
    rows = results.collect([tmp_path / "r"])
    mean, _, count = results.average_drops(rows)["act 2:4"]
    assert (mean, count) == (75, 2)
    assert "%, n = 2 |" in results.to_markdown(rows)
    _record(folder, study.from_recipe(Recipe("8:16")), "boolq", "acc", 1.0, [1, 1])
    drawn = []
    monkeypatch.setattr(results, "_bars", lambda bars, *rest: drawn.append(list(bars)) or b"")
    results.draw(results.collect([tmp_path / "r"]))
    assert drawn == [["act 2:4"]]  # an average over one task is no bar beside those over two


def test_mean_and_stderr():
    assert tasks.mean_and_stderr([1, 0, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 12)))
    assert math.isnan(tasks.mean_and_stderr([1.0])[1])


# ---- runs


def test_a_folder_holds_one_run(tmp_path):
    run.RunFolder.open(tmp_path / "r", {"model": "m", "limit": 5})
    run.RunFolder.open(tmp_path / "r", {"model": "m", "limit": 5})
    with pytest.raises(ValueError, match="a run with limit 6, got one with 5; choose another --output"):
        run.RunFolder.open(tmp_path / "r", {"model": "m", "limit": 6})


@pytest.mark.parametrize("content", ['{"version": "0.1", "recipe": {}}', '{"format": 1, "identity": {}}', "[]"])
def test_a_folder_of_something_else(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"expected a run of format 2 in .*state of nm-act calibrate\); choose"):
        run.RunFolder.open(tmp_path, {"model": "m"})
    with pytest.raises(ValueError, match="expected a run of format 2 in"):
        results.collect([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_same_name_with_another_recipe(tmp_path):
    folder = run.RunFolder.open(tmp_path / "r", {})
    _record(folder, study.from_recipe(Recipe("2:4"), "mine"), "arc_easy", "acc", 1.0, [1])
    with pytest.raises(ValueError, match="got one of another with the name 'mine'"):
        folder.has(study.from_recipe(Recipe("8:16"), "mine"), "arc_easy")


def test_another_model_of_the_same_name(data, tmp_path):
    first = tmp_path / "checkpoint"
    first.mkdir()
    arguments = ("--pattern", "2:4", "--tasks", "wikitext2", "--data", data, "--output", tmp_path / "out")
    commands.ok("eval", tiny_model.save(first), *arguments)
    other = tiny_model.save(tmp_path / "other" / "checkpoint", tiny_model.another_value)
    assert "a run with weights '" in _refused(other, *arguments)


def test_eval_perplexity_resumes(folder, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = (folder, "--pattern", "2:4", "--tasks", "wikitext2", "--data", data, "--output", out)
    measured = []
    real = run.perplexity_result
    monkeypatch.setattr(run, "perplexity_result", lambda *a: measured.append(1) or real(*a))
    first = _eval(*arguments)
    assert first.exit_code == 0, first.stderr
    assert "estimated time: " in first.stderr
    assert len(measured) == 2
    assert {p.name for p in out.iterdir()} == {
        *("run.json", "rows", "results.json", "results.csv", "results.md", "perplexity.png")
    }
    before = (out / "results.csv").read_text()
    (out / "rows" / "act-2x4.wikitext2.json").unlink()  # as if the run had been killed before this one
    commands.ok("eval", *arguments)
    assert len(measured) == 3
    assert (out / "results.csv").read_text() == before
    more = _eval(*arguments, "--pattern", "8:16", "--json")
    assert len(measured) == 4
    names = [row["name"] for row in json.loads(more.stdout)["rows"]]
    assert names == ["dense", "act 2:4", "act 8:16"]
    identity = json.loads(more.stdout)["identity"]
    assert identity["window"] == 128
    assert identity["tokens"] % 128 == 0
    assert "choose another --output or the same settings" in _refused(*arguments, "--window", 64)
    commands.ok("eval", *arguments, "--max-tokens", 10**9)  # all of the text, as before
    assert "a run with tokens 128, got one with" in _refused(*arguments, "--max-tokens", 130)
    assert "at least one window of 128 tokens, got 100; use --window or more --max-tokens" in _refused(
        *arguments, "--max-tokens", 100
    )


def test_a_run_gains_tasks(folder, data, tmp_path):
    pytest.importorskip("lm_eval")
    out, base = tmp_path / "out", (folder, "--pattern", "2:4", "--data", data, "--output", tmp_path / "out")
    commands.ok("eval", *base, "--tasks", "wikitext2", "--max-tokens", 256)
    both = json.loads(commands.ok("eval", *base, "--tasks", "arc_easy", "--limit", 4, "--json"))
    rows = {(row["name"], row["task"]): row for row in both["rows"]}
    assert [task for _, task in rows] == ["wikitext2", "arc_easy"] * 2  # the perplexity first
    assert json.loads((out / "run.json").read_text())["identity"]["tokens"] == 256
    assert "with limit 5, got one with 4" in _refused(*base, "--tasks", "arc_easy", "--limit", 5)
    assert "with tokens 128, got one with 256" in _refused(*base, "--tasks", "wikitext2", "--max-tokens", 128)
    commands.ok("eval", *base, "--tasks", "wikitext2", "--max-tokens", 256)  # the limit is of no concern
    (data / "arc" / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])))
    assert "a run with data of arc_easy" in _refused(*base, "--tasks", "arc_easy", "--limit", 4)


def test_sequences_are_not_padded_for_criteria_that_read_them(folder, data, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    sizes, real = [], run.harness_model
    monkeypatch.setattr(run, "harness_model", lambda *a: sizes.append(a[-1]) or real(*a))
    (tmp_path / "study.yaml").write_text("rows: [{pattern: 2:4, criterion: [act, clact]}]")
    options = ("--study", tmp_path / "study.yaml", "--tasks", "arc_easy", "--data", data, "--batch-size", 4)
    commands.ok("eval", folder, *options, "--output", tmp_path / "out")
    assert sizes == [4, 4, 1]  # dense, act, clact


def test_a_batch_of_one_for_clact(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not run._reads_sequences(loaded)
    assert not run._reads_sequences(sparsify(loaded, Recipe("2:4")).model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rules = [Rule(layers=[1], criterion="clact")]
    assert run._reads_sequences(sparsify(loaded, Recipe("2:4", rules=rules)).model)


def test_results_do_not_go_into_folders_of_something_else(folder, data, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    base = (folder, "--pattern", "2:4", "--tasks", "wikitext2", "--data", data, "--output", out)
    assert f"expected a new folder or that of an earlier run, got {str(out)!r} with model.safetensors" in _refused(
        *base
    )
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "nonsense"])
def test_damaged_results(folder, data, tmp_path, content):
    base = (folder, "--pattern", "2:4", "--tasks", "wikitext2", "--data", data, "--output", tmp_path / "out")
    commands.ok("eval", *base)
    (tmp_path / "out" / "rows" / "act-2x4.wikitext2.json").write_text(content)
    assert "remove the file" in _refused(*base)


def test_a_task_that_writes_more_than_the_context_is_refused(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)  # a context of 128

    class Task:
        OUTPUT_TYPE = "generate_until"
        config = type("Config", (), {"generation_kwargs": {"max_gen_toks": 128}})

    with pytest.raises(ValueError, match="more than the 128 tokens that ifeval writes, got 128; leave ifeval out"):
        run.check_context("ifeval", Task, loaded)
    Task.config.generation_kwargs = {"max_gen_toks": 127}
    run.check_context("ifeval", Task, loaded)


def test_estimate_of_a_short_context(folder):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=48, word_embed_proj_dim=32)
    assert run.estimate(transformers.OPTForCausalLM(config), 100) > 0


def test_calibrations(folder, data, tmp_path):
    (tmp_path / "r.yaml").write_text("pattern: 2:4\nmitigation: [spts]\n")
    (tmp_path / "study.yaml").write_text("rows: [{pattern: 2:4, mitigation: [spts], calibrated: true}]")
    (tmp_path / "text.txt").write_text(tiny_model.TEXT)
    rows = ("--study", tmp_path / "study.yaml", "--calibrated", tmp_path / "made")
    base = (folder, "--tasks", "wikitext2", "--data", data, "--output", tmp_path / "out", *rows)
    place = tmp_path / "made" / "act+spts-2x4"

    def calibrated(seed):
        options = ("--recipe", tmp_path / "r.yaml", "--data", tmp_path / "text.txt", "--output", place, "--seed", seed)
        arguments = ["calibrate", folder, *map(str, options), *["--windows", "1", "--length", "32", "--no-checkpoint"]]
        commands.ok(*arguments)

    calibrated(3)
    first = json.loads(commands.ok("eval", *base, "--json"))
    record = json.loads((tmp_path / "out" / "rows" / "act+spts-2x4.wikitext2.json").read_text())
    assert record["variant"]["calibrated_on"].startswith("text.txt, 1 windows of 32 tokens")
    assert [(row["name"], row["seed"]) for row in first["rows"]] == [("dense", 0), ("act+spts 2:4", 3)]
    (tmp_path / "study.yaml").write_text("rows: [{pattern: 2:4, mitigation: [spts], calibrated: true, seed: 4}]")
    assert "a calibration with the seed 4 of 'act+spts 2:4', got 3; calibrate again or name that seed" in _refused(
        *base
    )
    shutil.rmtree(place)
    calibrated(4)
    assert "a result of this recipe and calibration, got one of another with the name 'act+spts 2:4'" in _refused(*base)
    other = (folder, "--tasks", "wikitext2", "--data", data, "--output", tmp_path / "new")
    single = json.loads(commands.ok("eval", *other, "--calibration", place, "--json"))
    assert [row["name"] for row in single["rows"]] == ["dense", "act+spts-2x4"]


def test_harness_missing(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"need the package lm_eval, which is not installed; install it with: pip install -e"
    ):
        tasks.check_available(["arc_easy"])


# ---- the harness itself


def test_task_against_direct_scores(data):
    pytest.importorskip("lm_eval")
    import torch

    network, tokenizer = tiny_model.build()
    task, source = tasks.build_task("arc_easy", data)
    assert source["file"] == "arc_easy.jsonl"
    found = tasks.run_task(task, tasks.harness_model(network, tokenizer, 4), limit=6)
    expected = []
    for row in ROWS[:6]:
        scores = []
        for choice in row["choices"]:
            context = tokenizer(row["query"] + "\nAnswer:")["input_ids"]
            ids = torch.tensor([tokenizer(row["query"] + "\nAnswer: " + choice)["input_ids"]])
            with torch.no_grad():
                logs = network(ids).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1])))
        expected.append(float(scores.index(max(scores)) == row["gold"]))
    assert list(found.scores) == expected
    assert (found.metric, found.value) == ("acc", sum(expected) / 6)
    assert found.stderr == pytest.approx(tasks.mean_and_stderr(expected)[1])


def test_unknown_layout(data):
    pytest.importorskip("lm_eval")
    (data / "piqa.jsonl").write_text('{"question": "x"}')
    with pytest.raises(ValueError, match=r"expected rows \{goal, sol1, sol2, label\} in .*, got \{question\}; convert"):
        tasks.build_task("piqa", data)


def test_ifeval_without_its_resource(monkeypatch):
    pytest.importorskip("nltk")
    import nltk

    monkeypatch.setattr(nltk.data, "find", failing(LookupError))
    with pytest.raises(FileNotFoundError, match="needs nltk's resource punkt_tab, which is not installed; run"):
        tasks._check_punkt()
