"""The end-to-end benchmark on a tiny model and a CPU: its rows, its baselines, and that an interruption keeps them."""

from pathlib import Path

import bench_cpu_generate
import bench_inference
import inference_models
import plot_steps
import pytest
import tiny_model
import torch
from conftest import csv_rows
from inference_profile import COLUMNS as STEP_COLUMNS
from inference_profile import alone, kind_of, layer_of, short, step_layer

TINY = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--decode", "4", "--seconds", "0"]


def case_of(row: dict) -> list[str]:
    return [row[key] for key in ("batch", "prompt", "metric")]


def test_rows_and_baselines(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("pattern: 8:16\nskip_layers: [0]\n")
    out, plot = tmp_path / "inference.csv", tmp_path / "inference.png"
    arguments = ["--prompt", "5", "8", "--batch", "1", "2", "--mode", "nm-2:4", str(recipe)]
    bench_inference.main([*TINY, *arguments, "--csv", str(out), "--plot", str(plot)])
    rows = csv_rows(out)
    assert tuple(rows[0]) == bench_inference.COLUMNS
    assert [row["mode"] for row in rows[::12]] == ["dense_bf16", "nm-2:4", "mixed"]
    assert {row["metric"] for row in rows} == {"ttft_ms", "ttft_busy_ms", "decode_tok_s"}
    assert {row["model"] for row in rows} == {"tiny (random weights)"}
    for row in rows:
        [dense] = [r for r in rows if r["mode"] == "dense_bf16" and case_of(r) == case_of(row)]
        assert row["baseline_p50"] == dense["p50"]
        ratio = float(row["p50"]) / float(dense["p50"])
        faster = ratio if row["metric"] == "decode_tok_s" else 1 / ratio
        assert float(row["speedup"]) == pytest.approx(faster, rel=2e-2, abs=6e-4)  # three decimals
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    assert plot.stat().st_size > 1000


def test_an_interruption_keeps_the_rows(tmp_path, monkeypatch):
    out = tmp_path / "inference.csv"
    build = bench_inference.build

    def interrupted(name, mode, *rest):
        if mode.name != "dense_bf16":
            raise KeyboardInterrupt
        return build(name, mode, *rest)

    monkeypatch.setattr(bench_inference, "build", interrupted)
    with pytest.raises(SystemExit, match="interrupted; 3 rows are kept"):
        bench_inference.main([*TINY, "--prompt", "5", "--batch", "1", "--mode", "nm-2:4", "--csv", str(out)])
    assert len(csv_rows(out)) == 3


def test_a_failure_costs_its_own_cell(tmp_path, monkeypatch, capsys):
    out = tmp_path / "inference.csv"
    build, measure = bench_inference.build, bench_inference.measure

    def failing_build(name, mode, *rest):
        if mode.name == "nm-4:8":
            raise NotImplementedError("no such weights\nand more")
        return build(name, mode, *rest)

    def failing_measure(report, mode, model, device, batch, prompt, arguments):
        if (mode.name, prompt) == ("nm-2:4", 5):
            raise RuntimeError("No valid execution plans built.")
        measure(report, mode, model, device, batch, prompt, arguments)

    monkeypatch.setattr(bench_inference, "build", failing_build)
    monkeypatch.setattr(bench_inference, "measure", failing_measure)
    modes = ["--prompt", "5", "8", "--batch", "1", "--mode", "nm-4:8", "nm-2:4", "nm-8:16"]
    with pytest.raises(SystemExit, match="2 measurements failed, see above; 15 rows are kept"):
        bench_inference.main([*TINY, *modes, "--csv", str(out)])
    assert len(csv_rows(out)) == 15  # dense and 8:16 of both prompts, 2:4 of one
    printed = capsys.readouterr().out
    assert "nm-4:8: not built (NotImplementedError: no such weights)" in printed
    assert "nm-2:4 1 x 5: left out (RuntimeError: No valid execution plans built.)" in printed


def test_modes():
    names = ["nm-2:4-fp8-prefill", "dense", "nm-2:4/8:16-fp8", "nm-8:16-fp8-decode", "nm-8:16"]
    modes = inference_models.parse_modes(names)
    assert [(mode.name, mode.fp8) for mode in modes] == [
        ("dense_bf16", None),
        ("dense_fp8", "prefill"),
        ("dense_fp8_gather", "both"),
        ("nm-2:4-fp8-prefill", "prefill"),
        ("nm-2:4/8:16-fp8", "both"),
        ("nm-8:16-fp8-decode", "decode"),
        ("nm-8:16", None),
    ]
    assert (modes[4].recipe.pattern, modes[4].recipe.decode_pattern) == ("2:4", "8:16")


def test_a_second_copy_serves_few_tokens_of_the_dense_e4m3_baseline():
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = inference_models.DenseFP8(linear, "both")
    x = torch.randn(2, 1, 64, dtype=torch.bfloat16)
    expected = linear(x)
    assert (layer(x) - expected).norm() / expected.norm() < 0.05
    assert (layer.rows.t() == layer.codes).all()
    assert inference_models.DenseFP8(linear, "prefill").rows is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mode", "sparse"], "expected a mode such as dense, nm-2:4"),
        (["--mode", "nm-2:5"], "2:5"),
        (["--mode", "nm-2:4-fp8"], "expected a CUDA device for fp8 modes, got cpu"),
        (["--prompt", "0"], "expected prompts, batches and decoded tokens of at least 1"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        bench_inference.main([*TINY, *arguments])
    assert sentence in capsys.readouterr().err


def test_fp8_modes_are_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(bench_inference.torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        bench_inference.parse(["--mode", "nm-2:4-fp8", "--dtype", "float16"])
    assert "expected bfloat16 for fp8 modes, whose baseline gives that, got float16" in capsys.readouterr().err


def test_kernels_have_kinds():
    names = {
        "void nm_act::(anonymous namespace)::compress_row_kernel<RmsNorm>": "compress",
        "void pytorch_flash::flash_fwd_splitkv_kernel<...>": "attention",
        "void cutlass::device_kernel<GemmUniversal<SparseTensorOp>>": "linear",
        "nvjet_sm90_tst_128x256": "linear",
        "triton_per_fused__to_copy_mean_mul_rsqrt_0": "norm",
        "triton_poi_fused_cat_mul_neg_1": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def test_generate_on_a_cpu(tmp_path):
    model, out = tiny_model.save(tmp_path / "tiny"), tmp_path / "generate.csv"
    options = ["--tokens", "3", "--rounds", "1", "--prefill", "9", "--dtype", "float32", "bfloat16"]
    bench_cpu_generate.main([str(model), *options, "--csv", str(out)])
    rows = csv_rows(out)
    assert [row["mode"] for row in rows] == ["dense", "nm-8:16", "nm-8:16 optimized", "dense optimized"] * 4
    assert [row["metric"] for row in rows[::4]] == ["generate_tok_s", "prefill_ms"] * 2
    assert {row["model"] for row in rows} == {"tiny"}
    for index, row in enumerate(rows):
        dense, mine = (float(each["p50"]) for each in (rows[index - index % 4], row))
        faster = mine / dense if row["metric"] == "generate_tok_s" else dense / mine
        assert float(row["speedup"]) == pytest.approx(faster, rel=5e-2)


def test_a_layer_is_found_in_the_kernels_of_a_step():
    layer = [("product", 5.0), ("attention", 2.0), ("product", 3.0)]
    step = [("embedding", 9.0), *layer, *layer, ("norm", 1.0), ("product", 30.0)]
    assert layer_of(step, 2) == layer
    doubled = [(name, 3 * us) for name, us in layer]
    assert layer_of([("embedding", 9.0), *layer, *doubled], 2) == [(name, 2 * us) for name, us in layer]
    assert layer_of(step, 3) == []
    assert layer_of([("a", 1.0), ("b", 1.0), ("b", 1.0), ("a", 1.0)], 2) == []
    assert layer_of([], 2) == []
    assert step_layer(step * 8, 2) == layer
    assert step_layer(step * 7, 2) == []
    assert short("void nm_act::gather_kernel<nm_act::BFloat16, 1>(nm_act::GatherParams)") == "decode_linear"


def test_overlapping_kernels_are_counted_once():
    kernels = [("first", 0.0, 10.0), ("overlapping", 6.0, 15.0), ("within", 12.0, 14.0), ("later", 20.0, 21.0)]
    assert alone(kernels) == [("first", 10.0), ("within", 2.0), ("overlapping", 1.0), ("later", 1.0)]


def test_profiles_are_written_and_drawn(tmp_path):
    steps, plot = tmp_path / "steps.csv", tmp_path / "steps.png"
    bench_inference.main([*TINY, "--prompt", "5", "--batch", "1", "--mode", "nm-2:4", "--profile", str(steps)])
    rows = csv_rows(steps)
    assert tuple(rows[0]) == STEP_COLUMNS
    assert {row["mode"] for row in rows} == {"dense_bf16", "nm-2:4"}
    for mode in ("dense_bf16", "nm-2:4"):
        prefill = {row["part"]: float(row["us"]) for row in rows if (row["mode"], row["phase"]) == (mode, "prefill")}
        assert prefill["wall"] > 0
        assert "linear" in prefill
    plot_steps.draw(rows, plot)
    assert plot.stat().st_size > 1000


def test_the_committed_steps_add_up():
    results = Path(__file__).parents[2] / "benchmarks/results/h100"
    before, rows = (csv_rows(results / f"{name}.csv") for name in ("inference_steps_before", "inference_steps"))
    bars = {name.partition("\n")[0]: sum(us for _, us in parts) for name, parts in plot_steps.stacks(rows).items()}
    assert bars["dense_bf16"] > bars["nm-8:16"] > bars["nm-8:16-fp8"]
    [first] = plot_steps.stacks(before).values()
    assert sum(us for _, us in first) > bars["nm-8:16"]
    layers = {mode: parts for (mode, _), parts in plot_steps.groups(rows, "decode layer").items()}
    assert plot_steps.named([part for part, _ in layers["nm-8:16"]])[1] == "rope, cache, attention"
