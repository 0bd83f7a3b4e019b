"""The report is made from result files alone, and names what is wrong with them."""

from pathlib import Path

import evaluation_report as tool
import pytest
from conftest import csv_rows

from nm_act.lab.cost import Rates, places_of, predictions
from nm_act.lab.evaluate import folder as run_folder
from nm_act.lab.evaluate import results, study
from nm_act.lab.measured import Measured, shapes_of
from nm_act.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


def _write(folder, variant, value):
    result = {"metric": "ppl", "value": value, "stderr": 0.5, "samples": 20, "scores": [1.0, 2.0]}
    folder.write(variant, "wikitext2", {**result, "layers": 2, "width": 64})


def _predicted(recipe):
    """Of the prefill of two layers with Llama-3-8B's shapes, as every report says it."""
    cost = Measured("h100", shapes_of("llama-3-8b"), "llama-3-8b")
    return f"{predictions(cost, places_of('llama-3-8b', 2), recipe)['prefill']:.2f}x"


def test_report(tmp_path):
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    variants = [Recipe("2:4"), Recipe("8:16", criterion="wina"), Recipe("2:4", mitigation=["var"])]
    variants += [Recipe("2:4", projections=["k_proj", "v_proj", "gate_proj", "down_proj"])]
    _write(folder, study.DENSE_VARIANT, 20.0)
    for index, recipe in enumerate(variants):
        _write(folder, study.from_recipe(recipe), 30.0 + index)
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "evaluation.md").read_text()
    for title in ("Criteria by pattern", "Mitigations by pattern", "Layer subsets", "Every row"):
        assert f"### {title}" in text
    assert "### Weights against activations" not in text
    subsets = text.partition("### Layer subsets")[2].partition("###")[0]
    assert "| dense | all | dense | dense | 1.000x | 20.00 ± 0.50 |" in subsets
    assert "Samples: wikitext2 20." in subsets
    rows = csv_rows(tmp_path / "evaluation" / "results.csv")
    assert len(rows) == 5
    assert {row["layers"] for row in rows} == {"all", "alanova"}
    assert {row["dense_value"] for row in rows} == {"20.0"}
    assert float(rows[0]["predicted_speedup"]) == 1
    assert f"| act+var | 32.00 ± 0.50; {_predicted(variants[2])} |" in text
    assert (tmp_path / "evaluation" / "run1-perplexity.png").is_file()


def test_calibrated_rows_say_on_what_and_with_which_seed(tmp_path):
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    recipe = Recipe("2:4", mitigation=["ls"])
    _write(folder, study.DENSE_VARIANT, 20.0)
    for seed in (0, 1):
        made = {"calibrated": True, "seed": seed, "calibrated_on": "c4.jsonl, 8 windows of 512 tokens"}
        _write(folder, study.from_recipe(recipe, f"seed-{seed}", **made), 30.0 + seed)
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "evaluation.md").read_text()
    for seed in (0, 1):
        assert f"| act+ls, seed {seed} | {30 + seed:.2f} ± 0.50; {_predicted(recipe)} |" in text
        assert f"| seed-{seed} | c4.jsonl, 8 windows of 512 tokens | {seed} |" in text


def test_only_one_run_is_compared(tmp_path, capsys):
    identity = {"model": "tiny", "weights": "a", "dtype": "float32", "window": 64}
    others = [{"weights": "b"}, {"data": {"wikitext2": "c"}}, {"window": 32}]
    for index, change in enumerate([{}, *others]):
        folder = run_folder.RunFolder.open(tmp_path / str(index), {**identity, **change})
        _write(folder, study.DENSE_VARIANT, 20.0 + index)
        _write(folder, study.from_recipe(Recipe("2:4")), 30.0)
    runs = [str(tmp_path / str(index)) for index in range(4)]
    assert tool.main([*runs, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "evaluation.md").read_text().count("## tiny") == 4
    more = run_folder.RunFolder.open(tmp_path / "more", identity)
    _write(more, study.DENSE_VARIANT, 20.0)
    _write(more, study.from_recipe(Recipe("8:16")), 25.0)
    assert [row.name for row in results.collect([runs[0], more.path])] == ["dense", "act 2:4", "act 8:16"]
    assert tool.main([*runs, runs[1], "--out", str(tmp_path)]) == 2
    assert "expected every row once, got 'act 2:4' on wikitext2 of tiny again in" in capsys.readouterr().err
    _write(more, study.DENSE_VARIANT, 20.5)
    with pytest.raises(ValueError, match="expected every row once, got 'dense' on wikitext2"):
        results.collect([runs[0], more.path])


def test_results_that_do_not_say_how_many_layers_are_read(tmp_path):
    """As those of 0.2.0: they are predicted for all layers of the predicted model."""
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    result = {"metric": "ppl", "value": 20.0, "stderr": 0.5, "samples": 20, "scores": [1.0, 2.0], "macs": {"dense": 4}}
    recipe = Recipe("2:4")
    for variant in (study.DENSE_VARIANT, study.from_recipe(recipe)):
        folder.write(variant, "wikitext2", result)
    dense, sparse = results.collect([tmp_path / "run"])
    assert dense.fields["predicted_speedup"] == 1
    assert f"{sparse.fields['predicted_speedup']:.2f}x" == _predicted(recipe)


def test_error_bars(monkeypatch, tmp_path):
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny"})
    _write(folder, study.DENSE_VARIANT, 20.0)
    drawn = []
    monkeypatch.setattr(
        results, "_bars", lambda bars, *rest: drawn.append([error for _, error in bars.values()]) or b""
    )
    results.draw(results.collect([tmp_path / "run"]))
    assert drawn == [[0.5]]


def test_no_run(tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    assert "expected the folder of an evaluation" in capsys.readouterr().err


def test_committed_studies_multiply_out():
    folder = ROOT / "docs" / "evaluation"
    rows = [row for name in ("study", "calibrated") for row in study.load_study(folder / f"{name}.yaml")]
    names = [study.row_variant(row).name for row in rows]
    assert len(set(names)) == len(names) > 50


def test_committed_tables_are_those_of_the_committed_rows_and_of_todays_predictions():
    """`python tools/evaluation_report.py` writes them; otherwise the README's speed-ups are those of older tables."""
    folder = ROOT / "docs" / "evaluation"
    runs = [(str(folder), *run) for run in tool.read_rows_file(folder / "rows.jsonl")]
    columns = "name", "task", "dtype", "value", "predicted_speedup", "predicted_decode"

    def facts(row):
        return tuple(str(row[column]) for column in columns)

    found = sorted(facts({**row.fields, "name": row.name}) for row in results.collect_runs(runs))
    assert found == sorted(map(facts, csv_rows(folder / "results.csv")))


def test_speed_is_predicted_from_measured_products_and_by_phase(tmp_path):
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    measured = {"metric": "ppl", "value": 20.0, "stderr": 0.5, "samples": 20, "scores": [1.0, 2.0]}
    measured |= {"layers": 30, "width": 576}
    recipes = {
        "prefill": Recipe("2:4"),
        "decode": Recipe("8:16", phase="decode"),
        "half": Recipe("2:4", phase="prefill"),
    }
    folder.write(study.DENSE_VARIANT, "wikitext2", measured)
    for name, recipe in recipes.items():
        folder.write(study.from_recipe(recipe, name), "wikitext2", measured)
    rows = {row.name: row.fields for row in results.collect([tmp_path / "run"])}
    found = {name: (row["predicted_speedup"], row["predicted_decode"]) for name, row in rows.items()}
    assert found["dense"] == (1, 1)
    assert found["prefill"] == (pytest.approx(1.434, rel=0.03), pytest.approx(1.776, rel=0.03))  # as whole models
    assert found["decode"] == (1, pytest.approx(1.768, rel=0.03))
    assert found["half"] == (found["prefill"][0], 1)
    rated = {row.name: row.fields for row in results.collect([tmp_path / "run"], Rates({"2:4": (1.5, "")}))}
    assert [rated[name]["predicted_speedup"] for name in ("dense", *recipes)] == [1, 1.5, 1, 1.5]
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert "Of llama-3-8b on the H100" in (tmp_path / "evaluation.md").read_text()


def test_no_rank_within_the_error_or_the_noise(tmp_path):
    """Windows differ by nats, pairs by hundredths: pairs tell rows apart, unless rounding moves them as much."""
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    windows = [2.0, 3.0, 4.0, 5.0]
    changes = {
        "dense": [0.0] * 4,
        "a": [0.1, 0.11, 0.1, 0.11],
        "b": [0.12, 0.13, 0.12, 0.13],
        "c": [0.5, -0.2, 0.4, -0.1],
    }
    for name, change in changes.items():
        scores = [loss + more for loss, more in zip(windows, change, strict=True)]
        result = {"metric": "ppl", "value": 30 + sum(change), "stderr": 9.0, "samples": 4, "scores": scores}
        variant = study.DENSE_VARIANT if name == "dense" else study.from_recipe(Recipe("2:4"), name)
        folder.write(variant, "wikitext2", result | {"layers": 2, "width": 64})
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0

    def ranks():
        table = (tmp_path / "evaluation.md").read_text().partition("### Ranking")[2].partition("\n\nDiff")[0]
        return {line.split(" | ")[1]: line.split(" | ")[0].strip("| ") for line in table.splitlines() if "x |" in line}

    assert ranks() == {"dense": "1", "a": "2", "b": "3", "c": "3"}
    (tmp_path / "evaluation" / "noise.csv").write_text("variant,deviation\na,0.001\nb,0.02\n")
    assert tool.main(["--out", str(tmp_path)]) == 0  # from the rows that are there
    assert ranks() == {"dense": "1", "a": "2", "b": "2", "c": "2"}


def test_rows_are_kept_and_replaced(tmp_path, capsys):
    rows = tmp_path / "evaluation" / "rows.jsonl"
    assert tool.main(["--out", str(tmp_path)]) == 2
    assert "got none; run nm-act eval" in capsys.readouterr().err
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    _write(folder, study.DENSE_VARIANT, 20.0)
    _write(folder, study.from_recipe(Recipe("2:4")), 30.0)
    answers = {"metric": "acc", "value": 0.5, "stderr": 0.3, "samples": 2, "layers": 2, "width": 64}
    folder.write(study.DENSE_VARIANT, "piqa", answers | {"scores": [1.0, 0.0]})
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert '"scores": "10"' in rows.read_text()
    first = (tmp_path / "evaluation.md").read_text()
    assert tool.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "evaluation.md").read_text() == first
    _write(folder, study.from_recipe(Recipe("2:4")), 31.0)
    assert tool.main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    [(_, found)] = tool.read_rows_file(rows)
    assert sorted(each["value"] for each in found) == [0.5, 20.0, 31.0]
    rows.write_text('{"variant": 1}\n')
    assert tool.main(["--out", str(tmp_path)]) == 2
    assert "expected the identity of a run in the first line" in capsys.readouterr().err


def test_a_file_of_rows_is_a_run_too(tmp_path):
    folder = run_folder.RunFolder.open(tmp_path / "run", {"model": "tiny", "dtype": "float32"})
    _write(folder, study.DENSE_VARIANT, 20.0)
    _write(folder, study.from_recipe(Recipe("2:4")), 30.0)
    identity, rows = run_folder.RunFolder.read(tmp_path / "run")
    # As benchmarks/quality_gpu.py writes: a run's rows in several parts, another device's in between.
    other = {**identity, "device": "another"}
    tool.write_rows_file(tmp_path / "rows.jsonl", [(identity, rows[:1]), (other, rows), (identity, rows[1:])])
    assert tool.main([str(tmp_path / "rows.jsonl"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "evaluation.md").read_text()
    assert text.count("## tiny") == 2
    assert "device another" in text
    assert text.count("| act 2:4 | 30.00 ± 0.50") == 2
