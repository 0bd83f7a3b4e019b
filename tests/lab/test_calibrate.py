"""Calibration: data, statistics, training, orders of channels, the run and its state, files."""

import itertools
import json
import shutil

import pytest
import tiny_model
import torch
from commands import ok, refused
from conftest import fails_after
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import nm_act
from nm_act.conversion.calibration import set_layers
from nm_act.integrations.checkpoints import load_model
from nm_act.lab.calibrate import CalibrationSettings, calibrate, calibration_windows, save_calibration
from nm_act.lab.calibrate import run as run_module
from nm_act.lab.calibrate.blocks import BlockRunner
from nm_act.lab.calibrate.static import InputStatistics
from nm_act.lab.calibrate.training import block_loss, linear_schedule
from nm_act.lab.evaluate import calibrated_copy
from nm_act.layers.linear import NMLinear
from nm_act.recipe import LinearSpec, Recipe, Rule

EVERYTHING = Recipe(
    "2:4",
    criterion="clact",
    mitigation=["lpts", "ls", "var", "rsparse-4-fit-trained", "permute"],
    dense_first_tokens=1,
    rules=[
        Rule(projections=["q_proj"], criterion="wina", mitigation=["spts", "larosa", "rsparse-4"]),
        Rule(projections=["k_proj"], criterion="wanda", mitigation=[]),
        Rule(projections=["v_proj"], criterion="amber", mitigation=["spts-scalar", "pcs"]),
        Rule(layers=[1], projections=["up_proj"], pattern="dense"),
    ],
)
FAST = CalibrationSettings(learning_rate=1e-2, loss="relative")


@pytest.fixture(scope="module")
def windows(text):
    return calibration_windows(tiny_model.build()[1], text, windows=6, length=24)


@pytest.fixture(scope="module")
def calibrated(windows):
    return calibrate(tiny_model.build()[0], EVERYTHING, windows, settings=FAST)[0].model


@torch.no_grad()
def _logits(model, windows):
    return model(windows[:2]).logits


def test_windows_are_pieces_of_the_text_without_repetition(text):
    tokenizer = tiny_model.build()[1]
    ids = tokenizer(text.read_text())["input_ids"]
    windows = calibration_windows(tokenizer, text, windows=5, length=16, seed=1)
    starts = {next(i for i in range(0, len(ids), 16) if ids[i : i + 16] == row.tolist()) for row in windows}
    assert windows.shape == (5, 16)
    assert starts
    assert torch.equal(windows, calibration_windows(tokenizer, text, windows=5, length=16, seed=1))
    assert not torch.equal(windows, calibration_windows(tokenizer, text, windows=5, length=16, seed=2))
    assert len(calibration_windows(tokenizer, text, windows=10**6, length=16)) == len(ids) // 16


def test_a_folder_of_text(text, tmp_path):
    tokenizer = tiny_model.build()[1]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "second " * 20}) + "\n")
    (tmp_path / "a.txt").write_text("first " * 20)
    (tmp_path / "README.md").write_text("not this " * 100)
    (tmp_path / "c.bin").write_bytes(b"\xff")
    count = len(tokenizer("first " * 20)["input_ids"]) + len(tokenizer("second " * 20)["input_ids"])
    assert calibration_windows(tokenizer, tmp_path, windows=10**6, length=2).numel() == count // 2 * 2


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ("short", {"windows": 1, "length": 64}, "expected calibration text of at least one window of 64 tokens, got"),
        ("short", {"windows": 0, "length": 64}, "expected at least 1 window of at least 2 tokens, got 0 of 64"),
        (None, {"windows": 1, "length": 64}, r"expected text files \(.txt, .jsonl, .md\) or c4 in"),
    ],
)
def test_bad_text(tmp_path, content, options, sentence):
    path = tmp_path
    if content is not None:
        path = tmp_path / "text.txt"
        path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        calibration_windows(tiny_model.build()[1], path, **options)


def test_statistics():
    x = torch.randn(2, 50, 8) + 0.5
    statistics = InputStatistics(8, "cpu", covariance=True)
    statistics.add(x[:1])
    statistics.add(x[1:])
    flat = x.flatten(0, 1)
    torch.testing.assert_close(statistics.mean, flat.mean(0))
    torch.testing.assert_close(statistics.norm, flat.norm(dim=0))
    torch.testing.assert_close(statistics.largest, flat.abs().amax(0))
    torch.testing.assert_close(statistics.covariance, flat.T @ flat)


@pytest.mark.parametrize("criterion", ["act", "wina", "clact"])
def test_what_a_selection_drops(criterion):
    layer = NMLinear(32, 8, spec=LinearSpec("2:4", criterion, ("rsparse-2-fit", "dpts-mean")))
    x = torch.randn(1, 50, 32) + torch.randn(50, 1)  # means that move the norms of what is left
    statistics = InputStatistics(32, "cpu", lost=True)
    statistics.add_lost(layer, x)
    z = (x - x.mean(-1, keepdim=True))[0]
    scale = {"act": torch.ones(32), "wina": layer.weight.norm(dim=0), "clact": x[0].norm(dim=0)}[criterion]
    order = (z.abs() * scale).view(50, 8, 4).argsort(dim=-1)
    kept = torch.zeros(50, 8, 4).scatter(-1, order[..., 2:], 1.0).view(50, 32)
    dropped = z * (1 - kept) / x[0].square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(statistics.lost, (dropped.T @ dropped).detach(), rtol=1e-4, atol=1e-4)


def test_the_static_data_are_the_statistics_of_the_sparse_prefix(calibrated, windows):
    """Block 1's first layer: its data against the inputs that the finished model itself gives it."""
    seen = []
    layer = calibrated.model.layers[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for window in windows:
            calibrated(window[None])
    hook.remove()
    x = torch.cat(seen)
    attention = calibrated.model.layers[1].self_attn
    torch.testing.assert_close(attention.k_proj.input_norm, x.norm(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attention.v_proj.shift, x.mean().expand(64), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.shift, x.mean(0) @ layer.rotation, rtol=1e-3, atol=1e-5)
    smoothing = (x.abs().amax(0) / attention.v_proj.weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(attention.v_proj.smoothing, smoothing, rtol=1e-4, atol=1e-5)
    rotated = (x - x.mean(0)) @ layer.rotation
    off = rotated.T @ rotated / len(x)
    assert (off - off.diag().diag()).abs().max() < 1e-3 * off.diag().max()


def test_training_lowers_the_loss(windows):
    recipe = Recipe("2:4", mitigation=["lpts", "ls", "rsparse-4-trained"])
    settings = CalibrationSettings(learning_rate=1e-2, epochs=5, loss="relative")
    report, history = calibrate(tiny_model.build()[0], recipe, windows, settings=settings)
    assert all(entry["last"] < 0.9 * entry["first"] for entry in history)
    assert not any(value.requires_grad for value in report.model.buffers())


def test_losses():
    target = torch.tensor([[[1000.0, 1000.0], [1.0, 1.0], [0.0, 0.0]]])
    output = target * 1.1
    torch.testing.assert_close(block_loss(output, target, "relative"), torch.tensor(2 * 0.01 / 3), rtol=1e-4, atol=0)
    torch.testing.assert_close(block_loss(output, target, "mse"), torch.tensor((1e4 + 0.01) / 3), rtol=1e-4, atol=0)


def test_schedule_warms_up_and_falls_to_nothing():
    rates = [linear_schedule(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 3)
    assert rates[2] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert rates[100] == 0.0
    assert linear_schedule(0, 1) > 0


def test_blocks_run_as_the_model_runs_them(windows):
    model = tiny_model.build()[0]
    nm_act.sparsify(model, Recipe("2:4", dense_first_tokens=2, criterion="clact"))
    runner = BlockRunner(model, windows[0])
    hidden = runner.first_inputs(windows[:2])
    for index in range(2):
        hidden = runner.run_all(index, hidden, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model.model.norm(hidden)), _logits(model, windows))


def test_saved_and_loaded_in_every_way(calibrated, windows, folder, tmp_path):
    expected = _logits(calibrated, windows)
    save_calibration(calibrated, tmp_path)
    loaded = nm_act.load_calibration(load_model(folder)[0], tmp_path).model
    torch.testing.assert_close(_logits(loaded, windows), expected, rtol=1e-5, atol=1e-6)
    half = nm_act.load_calibration(load_model(folder, dtype="bfloat16")[0], tmp_path).model
    assert half.model.layers[0].mlp.up_proj.shift.dtype == torch.float32
    calibrated.save_pretrained(tmp_path / "checkpoint")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert again.nm_act_recipe == EVERYTHING
    torch.testing.assert_close(_logits(again, windows), expected, rtol=1e-5, atol=1e-6)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype="bfloat16")
    layer, exact = half.model.layers[0].mlp.down_proj, calibrated.model.layers[0].mlp.down_proj
    assert torch.equal(layer.shift, exact.shift)
    assert torch.equal(layer.input_order, exact.input_order)
    assert layer.low_rank_in.dtype == layer.weight.dtype == torch.bfloat16


def test_a_recipe_on_an_uncalibrated_checkpoint_says_so(folder, windows):
    config = nm_act.NMActConfig(Recipe("2:4", mitigation=["lpts"]))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(RuntimeError, match="expected calibrated data for 2:4 act lpts, got no shift; make it with"):
        _logits(model, windows)
    with pytest.raises(ValueError, match=r"expected calibrated layers, got no shift in model\.layers\.0"):
        save_calibration(model, folder)


def test_the_dense_original_of_a_calibrated_copy_is_left_alone(calibrated, windows, tmp_path):
    save_calibration(calibrated, tmp_path)
    model = tiny_model.build()[0]
    before = _logits(model, windows)
    calibrated_copy(model, tmp_path)
    assert torch.equal(_logits(model, windows), before)


def test_a_killed_run_goes_on_and_gives_the_same(windows, tmp_path, monkeypatch):
    recipe = Recipe("2:4", mitigation=["lpts", "ls", "permute"])
    whole, _ = calibrate(tiny_model.build()[0], recipe, windows, settings=FAST, state=tmp_path / "whole")
    finish = run_module._calibrate_block
    done = []
    fails_after(monkeypatch, run_module, "_calibrate_block", 1, KeyboardInterrupt)
    arguments = {"settings": FAST, "state": tmp_path / "state"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model.build()[0], recipe, windows, **arguments)
    monkeypatch.setattr(run_module, "_calibrate_block", lambda *a: done.append(a[1]) or finish(*a))
    resumed, _ = calibrate(tiny_model.build()[0], recipe, windows, **arguments)
    assert done == [1]
    for (name, left), (_, right) in zip(whole.model.named_buffers(), resumed.model.named_buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, msg=name)
    assert torch.equal(_logits(whole.model, windows), _logits(resumed.model, windows))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"recipe": Recipe("4:8", mitigation=["lpts"])}, "recipe"),
        ({"settings": CalibrationSettings(seed=1)}, r"seed \(0 then, 1 now\)"),
        ({"windows": torch.zeros(2, 8, dtype=torch.int64)}, "windows"),
        ({"scale": 2.0}, "model"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, what):
    start = {
        "recipe": Recipe("2:4", mitigation=["lpts"]),
        "settings": CalibrationSettings(),
        "windows": torch.ones(2, 8, dtype=torch.int64),
        "scale": 1.0,
    }
    for options in (start, {**start, **change}):
        model = tiny_model.build()[0]
        with torch.no_grad():
            model.model.norm.weight.mul_(options["scale"])
        call = (model, options["recipe"], options["windows"])
        if options is start:
            calibrate(*call, settings=options["settings"], state=tmp_path)
            continue
        with pytest.raises(ValueError, match=f"expected the unfinished run in .* to be this one, got another {what};"):
            calibrate(*call, settings=options["settings"], state=tmp_path)


def test_optimized_models_are_refused(calibrated, tmp_path):
    save_calibration(calibrated, tmp_path)
    model = tiny_model.build()[0]
    nm_act.optimize(model)
    state = tmp_path / "state"
    sentence = r"^expected a model that is not optimized, got one that is; call nm_act\.deoptimize\(model\) first"
    with pytest.raises(ValueError, match=sentence):
        calibrate(model, Recipe("2:4", mitigation=["spts"]), torch.zeros(1, 8, dtype=torch.int64), state=state)
    assert not state.exists()
    with pytest.raises(ValueError, match=sentence):
        nm_act.load_calibration(model, tmp_path)


@pytest.mark.parametrize("options", [{"learning_rate": 0.0}, {"epochs": float("nan")}, {"loss": "l1"}])
def test_bad_settings(options):
    with pytest.raises(ValueError, match=r"^expected a (positive, finite learning rate|loss among)"):
        CalibrationSettings(**options)


def test_a_calibration_of_another_model(calibrated, tmp_path):
    save_calibration(calibrated, tmp_path)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=50, **{**tiny_model.SIZES, "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"calibrated for, LlamaForCausalLM with .* parameters, got LlamaForCausalLM"):
        nm_act.load_calibration(other, tmp_path)
    assert not any(isinstance(module, NMLinear) for module in other.modules())


def test_folders_that_are_no_calibration(calibrated, tmp_path):
    model = tiny_model.build()[0]
    with pytest.raises(FileNotFoundError, match=r"no finished calibration at .*: there is no calibration\.safetensors"):
        nm_act.load_calibration(model, tmp_path)
    save_calibration(calibrated, tmp_path)
    data = tmp_path / "calibration.safetensors"
    whole = data.read_bytes()
    data.write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"expected safetensors in .*, got a damaged file"):
        nm_act.load_calibration(model, tmp_path)


def test_data_of_a_layer_is_missing(calibrated):
    with pytest.raises(KeyError):
        set_layers(calibrated, {"model.layers.0.mlp.up_proj": calibrated.model.layers[0].mlp.up_proj}, {})


def test_command(folder, text, tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    Recipe("2:4", mitigation=["lpts", "var"]).save(recipe)
    arguments = [folder, "--recipe", recipe, "--data", text, "--output", output, "--windows", "4", "--length", "16"]
    ok("calibrate", *arguments)
    assert not (output / "state").exists()
    assert json.loads((output / "calibration.json").read_text())["windows"] == 4
    model, _ = load_model(output)
    assert model.model.layers[0].mlp.down_proj.shift.abs().max() > 0
    twin = shutil.copytree(output, tmp_path / "twin" / "out")
    ppl = ok("ppl", folder, "--text", text, "--calibration", output, "--calibration", twin, "--window", 32, "--json")
    assert [row["name"] for row in json.loads(ppl)["rows"]] == ["dense", "out", str(twin)]
    assert "expected a folder without a finished calibration" in refused("calibrate", *arguments)


def test_an_infinite_loss_in_the_command_leaves_no_result(text, tmp_path):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    Recipe("2:4", mitigation=["lpts"]).save(recipe)
    infinite = lambda model: model.model.layers[1].mlp.up_proj.weight.data[0, 0].fill_(torch.inf)  # noqa: E731
    broken = tiny_model.save(tmp_path / "broken", infinite)
    options = ("--recipe", recipe, "--data", text, "--output", output, "--length", "16")
    assert "expected a finite loss" in refused("calibrate", broken, *options)
    assert [path.name for path in output.iterdir()] == ["state"]
