"""Calibration: what it refuses, whose result a folder holds, and how a run that stopped goes on."""

import dataclasses
import json

import pytest
import tiny_model
import torch
from commands import ok, refused, run
from conftest import failing, fails_after
from safetensors import safe_open
from safetensors.torch import save

import nm_act
from nm_act.cli.calibrate import calibrate as command
from nm_act.conversion.sparsify import check_recipe
from nm_act.lab.calibrate import CalibrationSettings, calibrate, calibration_windows, save_calibration
from nm_act.lab.calibrate import run as run_module
from nm_act.lab.calibrate.static import InputStatistics
from nm_act.layers.linear import NMLinear
from nm_act.methods.mitigations import fitted_low_rank_of
from nm_act.ops import composed
from nm_act.recipe import LinearSpec, Recipe, Rule

FAST = CalibrationSettings(learning_rate=1e-2, loss="relative")


@pytest.fixture(scope="module")
def windows(text):
    return calibration_windows(tiny_model.build()[1], text, windows=4, length=16)


def _sparse(model) -> bool:
    return any(isinstance(module, NMLinear) for module in model.modules())


def _command(*arguments):
    return run("calibrate", *arguments)


def _calibrated(windows, mitigation, folder, dtype=torch.float32):
    """The tiny model, calibrated; its calibration is saved in the folder."""
    recipe = Recipe("2:4", mitigation=mitigation)
    model = calibrate(tiny_model.build()[0].to(dtype), recipe, windows)[0].model
    save_calibration(model, folder)
    return model


def _changed(folder, change) -> None:
    """Write a calibration's tensors and header again after `change(tensors, header)`."""
    data = folder / "calibration.safetensors"
    with safe_open(data, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, header)
    data.write_bytes(save(tensors, header))


@pytest.mark.parametrize("mitigation", ["spts", "permute"])
def test_a_calibration_of_other_weights_is_refused(windows, tmp_path, mitigation):
    _calibrated(windows, [mitigation], tmp_path)
    other = tiny_model.build()[0]
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(ValueError, match=r"expected the model that .* was calibrated on, got other weights"):
        nm_act.load_calibration(other, tmp_path)
    assert not _sparse(other)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        nm_act.load_calibration(tiny_model.build()[0].to(dtype), tmp_path)


def test_a_calibration_made_in_half_precision_serves_the_original(windows, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        _calibrated(windows, ["spts"], tmp_path, dtype)
        nm_act.load_calibration(tiny_model.build()[0], tmp_path)


def test_reordered_weights_are_refused_by_name(windows, tmp_path):
    calibrated = _calibrated(windows, ["permute"], tmp_path)
    reordered = tiny_model.build()[0]
    reordered.load_state_dict(dict(calibrated.named_parameters()), strict=False)
    with pytest.raises(ValueError, match="calibrated on, got its weights after permute has reordered them; name the"):
        nm_act.load_calibration(reordered, tmp_path)
    # Written again from what was loaded, it still knows the original.
    again = tmp_path / "again"
    again.mkdir()
    save_calibration(nm_act.load_calibration(tiny_model.build()[0], tmp_path).model, again)
    nm_act.load_calibration(tiny_model.build()[0], again)


def test_a_calibration_without_fingerprints_is_taken(windows, tmp_path):
    _calibrated(windows, ["spts"], tmp_path)

    def strip(tensors, header):
        for key in [key for key in header if key.startswith("weights")]:
            del header[key]

    _changed(tmp_path, strip)
    assert _sparse(nm_act.load_calibration(tiny_model.build()[0], tmp_path).model)


def _options(tmp_path, text, output, *more, mitigation=("spts",)):
    recipe = tmp_path / "recipe.yaml"
    Recipe("2:4", mitigation=list(mitigation)).save(recipe)
    return ["--recipe", recipe, "--data", text, "--output", output, "--windows", "3", "--length", "16", *more]


@pytest.mark.parametrize("kind", ["model", "inside the model", "a folder of files", "a file", "inside a file"])
def test_an_output_that_holds_files_is_refused(text, tmp_path, kind):
    model = tiny_model.save(tmp_path / "model")
    output = {"model": tmp_path / "x" / ".." / "model", "inside the model": model / "new"}.get(kind, tmp_path / "out")
    sentence = "expected an output apart from the model"
    if kind == "a folder of files":
        output.mkdir()
        (output / "thesis.tex").write_text("years")
        sentence = "with thesis.tex and without state/run.json"
    elif kind in ("a file", "inside a file"):
        output.write_text("years")
        output = output if kind == "a file" else output / "new"
        sentence = "is a file"
    (tmp_path / "x").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sentence in refused("calibrate", model, *_options(tmp_path, text, output))
    assert {path: path.read_bytes() for path in before} == before


def test_an_unfinished_output_is_taken_up(folder, text, tmp_path, monkeypatch):
    output = tmp_path / "out"
    arguments = [folder, *_options(tmp_path, text, output)]

    def killed(model, tokenizer, place):
        (place / "model.safetensors").write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(command.__globals__, "_save_checkpoint", killed)
        assert _command(*arguments).exit_code == 130
    ok("calibrate", *arguments)
    facts = json.loads((output / "calibration.json").read_text())
    with safe_open(output / "calibration.safetensors", framework="pt") as file:
        assert file.metadata()["weights"] == facts["weights"]


@pytest.mark.parametrize("criterion", ["wina", "amber", "clact"])
@pytest.mark.parametrize("shift", [[], ["dpts-mean"]])
def test_what_is_fitted_is_what_the_layer_drops(monkeypatch, criterion, shift):
    """The selection in the fitted layer's forward, against the one whose error the pair was fitted to."""
    torch.manual_seed(1)
    layer = NMLinear(32, 12, spec=LinearSpec("2:4", criterion, ["rsparse-8-fit", *shift]))
    x = torch.randn(2, 20, 32) + 2 * torch.randn(2, 20, 1)
    statistics = InputStatistics(32, "cpu", lost=True)
    fitted, run = [], []
    select = composed.select

    def seen(kept):
        return lambda z, pattern, scale: kept.append(select(z, pattern, scale)) or kept[-1]

    monkeypatch.setattr(composed, "select", seen(fitted))
    statistics.add_lost(layer, x)
    monkeypatch.setattr(composed, "select", select)
    pair = fitted_low_rank_of(layer.weight.detach(), statistics.lost, 8)
    layer.set_data(low_rank_in=pair[0], low_rank_out=pair[1])
    z = x - x.mean(dim=-1, keepdim=True) if shift else x

    def operator(x, weight, bias, pattern, channel_scale=None, **_):
        run.append(channel_scale)
        return weight.new_zeros(len(x), 12)

    work = dataclasses.replace(layer.work(layer.weight.detach()), operator=operator)
    monkeypatch.setattr(layer, "work", lambda weight: work)
    with torch.no_grad():
        for sequence in x:
            layer(sequence)
    for kept, tokens, scale in zip(fitted, z, run, strict=True):
        assert torch.equal(kept != 0, select(tokens, layer.spec.pattern, scale) != 0)


@pytest.mark.parametrize(
    ("recipe", "got"),
    [
        (Recipe("2:4", mitigation=["var"]), "nothing to calibrate in any layer"),
        (Recipe("2:4", mitigation=["lpts"], rules=[Rule(mitigation=[])]), "nothing to calibrate in any layer"),
        (Recipe("2:4", mitigation=["lpts"], skip_layers=[0, 1]), "a recipe that leaves all layers dense"),
    ],
)
def test_rules_that_leave_nothing_to_calibrate(windows, tmp_path, recipe, got):
    model = tiny_model.build()[0]
    with pytest.raises(ValueError, match=f"expected a recipe with something to calibrate .*, got {got};"):
        calibrate(model, recipe, windows, state=tmp_path / "state")
    assert not _sparse(model)
    assert not (tmp_path / "state").exists()


def test_a_small_part_of_an_epoch_is_one_step(windows):
    recipe = Recipe("2:4", mitigation=["lpts"])
    settings = CalibrationSettings(learning_rate=1e-2, epochs=0.01)
    report, history = calibrate(tiny_model.build()[0], recipe, windows, settings=settings)
    assert all(entry["first"] == entry["last"] for entry in history)
    assert report.model.model.layers[0].mlp.up_proj.shift.any()


def test_a_bfloat16_pair_is_trained_in_float32(windows):
    """Steps of 1e-6 are lost in bfloat16: the pair would not move at all."""
    recipe = Recipe("2:4", projections=["up_proj"], mitigation=["rsparse-4-trained"])
    pairs = []
    for rate in (1e-30, 2e-5):
        settings = CalibrationSettings(learning_rate=rate, epochs=40)
        model = calibrate(tiny_model.build()[0].bfloat16(), recipe, windows, settings=settings)[0].model
        pairs.append(model.model.layers[0].mlp.up_proj.low_rank_in)
    assert pairs[0].dtype == torch.bfloat16
    assert (pairs[0] != pairs[1]).float().mean() > 0.5


@pytest.mark.parametrize("change", ["missing", "shape", "extra", "order", "fold", "nan"])
def test_damaged_data_leave_the_model_dense(windows, tmp_path, change):
    _calibrated(windows, ["spts", "permute"], tmp_path)
    mlp = "model.layers.1.mlp."
    name, value = {
        "missing": (f"{mlp}up_proj.shift", None),
        "shape": (f"{mlp}up_proj.shift", torch.zeros(3)),
        "extra": (f"{mlp}up_proj.smoothing", torch.ones(64)),
        "order": (f"{mlp}down_proj.input_order", torch.zeros(96)),
        "fold": (f"{mlp}up_proj.input_order", torch.arange(64.0).flip(0)),
        "nan": (f"{mlp}up_proj.shift", torch.full((64,), torch.nan)),
    }[change]
    _changed(tmp_path, lambda tensors, _: tensors.pop(name) if value is None else tensors.update({name: value}))
    model = tiny_model.build()[0]
    with pytest.raises(ValueError, match=r"^expected (in|every|gate_proj|finite) .*(up|down)_proj"):
        nm_act.load_calibration(model, tmp_path)
    assert not _sparse(model)


def test_a_rank_above_the_weight_s_is_one_sentence():
    model = tiny_model.build()[0]
    for recipe in (
        Recipe("2:4", mitigation=["rsparse-65"]),
        Recipe("2:4", rules=[Rule(projections=["k_proj"], mitigation=["rsparse-33-fit"])]),
    ):
        with pytest.raises(ValueError, match=r"pair of at most rank \d+ for model\.layers\.0\..*_proj, got rank \d+;"):
            check_recipe(model, recipe)
    check_recipe(model, Recipe("2:4", mitigation=["rsparse-32"]))


def test_too_little_text_for_a_rank_is_one_sentence(windows):
    with pytest.raises(ValueError, match=r"expected at least 30 tokens .* of rank 30 in .*q_proj, got 8; give more"):
        calibrate(tiny_model.build()[0], Recipe("2:4", mitigation=["rsparse-30-fit"]), windows[:1, :8])
    calibrate(tiny_model.build()[0], Recipe("2:4", mitigation=["rsparse-30"]), windows[:1, :8])  # needs no text


def _stopped_after_block_0(monkeypatch, text, tmp_path, folder):
    """Arguments of a command that was interrupted in block 1, and its result."""
    arguments = [folder, *_options(tmp_path, text, tmp_path / "out", mitigation=["lpts"])]
    with monkeypatch.context() as patch:
        fails_after(patch, run_module, "_calibrate_block", 1, KeyboardInterrupt)
        return arguments, _command(*arguments)


def test_after_a_stop_the_record_is_whole(monkeypatch, folder, text, tmp_path):
    arguments, stopped = _stopped_after_block_0(monkeypatch, text, tmp_path, folder)
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("interrupted; run the same command to go on\n")
    with safe_open(tmp_path / "out" / "state" / "block-0000.safetensors", framework="pt") as file:
        first = json.loads(file.metadata()["facts"])
    ok("calibrate", *arguments)
    facts = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert facts["blocks"][0] == {"block": 0, **first}
    assert all({"block", "first", "last", "seconds"} == set(block) for block in facts["blocks"])
    assert facts["seconds"] == pytest.approx(sum(block["seconds"] for block in facts["blocks"]), abs=0.06)


def test_a_truncated_block_is_calibrated_again(monkeypatch, folder, text, tmp_path):
    arguments, _ = _stopped_after_block_0(monkeypatch, text, tmp_path, folder)
    block = tmp_path / "out" / "state" / "block-0000.safetensors"
    whole = block.read_bytes()
    for part in (whole[:100], b""):
        block.write_bytes(part)
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "_calibrate_block", failing(KeyboardInterrupt))
            assert _command(*arguments).exit_code == 130
    ok("calibrate", *arguments)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe"])
def test_a_damaged_run_file_is_named(monkeypatch, folder, text, tmp_path, content):
    arguments, _ = _stopped_after_block_0(monkeypatch, text, tmp_path, folder)
    (tmp_path / "out" / "state" / "run.json").write_bytes(content)
    result = _command(*arguments)
    assert result.exit_code == 2
    assert "run.json' what the unfinished run was started with, got a damaged file; remove its folder" in result.stderr
    assert result.stderr.count("\n") == 2  # "loading ..." and the sentence


def test_a_run_that_failed_at_once_can_be_changed(windows, tmp_path):
    recipe = Recipe("2:4", mitigation=["ls"])
    wild = CalibrationSettings(learning_rate=1e30, epochs=3)
    with pytest.raises(ValueError, match=r"expected (a finite loss|finite hidden states), got .* lower --lr"):
        calibrate(tiny_model.build()[0], recipe, windows, settings=wild, state=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    calibrate(tiny_model.build()[0], recipe, windows, settings=FAST, state=tmp_path)
    other = CalibrationSettings(learning_rate=2e-2, loss="relative")
    told = r"got another learning_rate \(0\.01 then, 0\.02 now\); finish that run, remove"
    with pytest.raises(ValueError, match=told):
        calibrate(tiny_model.build()[0], recipe, windows, settings=other, state=tmp_path)


@pytest.mark.parametrize(("projection", "noted"), [("up_proj", True), ("down_proj", False)])
def test_permute_where_nothing_folds_is_noted(folder, text, tmp_path, projection, noted):
    recipe = tmp_path / "permute.yaml"
    Recipe("2:4", projections=[projection], mitigation=["permute"]).save(recipe)
    result = _command(folder, *_options(tmp_path, text, tmp_path / "out", "--recipe", recipe))
    assert result.exit_code == 0, result.stderr
    assert ("permute reorders nothing here" in result.stderr) is noted


@pytest.mark.parametrize(
    ("projection", "value", "recipe", "message"),
    [
        ("up_proj", torch.nan, {"mitigation": ["lpts"]}, "a finite loss, got nan in block 1 at step 1 of 4; lower --lr"),
        ("down_proj", torch.inf, {"mitigation": ["spts"], "skip_layers": [1]}, "finite hidden states, .* NaN after block 1;"),
        *(("gate_proj", torch.nan, {"mitigation": [name]}, "a finite weight and finite inputs of .*gate_proj, got inf")
          for name in ("rsparse-4", "rsparse-4-fit", "larosa")),
    ],
)  # fmt: skip
def test_a_block_that_is_not_finite_is_one_sentence_and_not_kept(windows, tmp_path, projection, value, recipe, message):
    model = tiny_model.build()[0]
    with torch.no_grad():
        model.model.layers[1].mlp.get_submodule(projection).weight[3, 3] = value
    with pytest.raises(ValueError, match=f"expected {message}"):
        calibrate(model, Recipe("2:4", **recipe), windows, state=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-0000.safetensors", "run.json"]
