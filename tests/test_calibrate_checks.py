"""Calibration: what it refuses, whose result a folder holds, and how a run that stopped goes on."""

import json

import pytest
import tiny_model
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import nm_act
from nm_act import composed
from nm_act.calibrate import CalibrationSettings, calibrate, calibration_windows, save_calibration
from nm_act.calibrate.static import InputStatistics
from nm_act.cli import app
from nm_act.cli import calibrate as command
from nm_act.linear import NMLinear
from nm_act.mitigations import fitted_low_rank_of
from nm_act.recipe import LinearSpec, Recipe

FAST = CalibrationSettings(learning_rate=1e-2, loss="relative")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_model.TEXT)
    return path


@pytest.fixture(scope="module")
def windows(text):
    return calibration_windows(tiny_model.build()[1], text, windows=4, length=16)


def _sparse(model) -> bool:
    return any(isinstance(module, NMLinear) for module in model.modules())


def _command(*arguments):
    return CliRunner().invoke(app, ["calibrate", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("mitigation", ["spts", "permute"])
def test_a_calibration_of_other_weights_is_refused(windows, tmp_path, mitigation):
    calibrated = calibrate(tiny_model.build()[0], Recipe("2:4", mitigation=[mitigation]), windows)[0].model
    save_calibration(calibrated, tmp_path)
    other = tiny_model.build()[0]
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(ValueError, match=r"expected the model that .* was calibrated on, got other weights of the same"):
        nm_act.load_calibration(other, tmp_path)
    assert not _sparse(other)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        nm_act.load_calibration(tiny_model.build()[0].to(dtype), tmp_path)


def test_a_calibration_made_in_half_precision_serves_the_original(windows, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_model.build()[0].to(dtype)
        save_calibration(calibrate(model, Recipe("2:4", mitigation=["spts"]), windows)[0].model, tmp_path)
        nm_act.load_calibration(tiny_model.build()[0], tmp_path)


def test_reordered_weights_are_refused_by_name(windows, tmp_path):
    calibrated = calibrate(tiny_model.build()[0], Recipe("2:4", mitigation=["permute"]), windows)[0].model
    save_calibration(calibrated, tmp_path)
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
    from safetensors.torch import save

    calibrated = calibrate(tiny_model.build()[0], Recipe("2:4", mitigation=["spts"]), windows)[0].model
    save_calibration(calibrated, tmp_path)
    data = tmp_path / "calibration.safetensors"
    with safe_open(data, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = {key: value for key, value in file.metadata().items() if not key.startswith("weights")}
    data.write_bytes(save(tensors, header))
    assert _sparse(nm_act.load_calibration(tiny_model.build()[0], tmp_path).model)


def _options(tmp_path, text, output, *more, mitigation=("spts",)):
    recipe = tmp_path / "recipe.yaml"
    Recipe("2:4", mitigation=list(mitigation)).save(recipe)
    return ["--recipe", recipe, "--data", text, "--output", output, "--windows", "3", "--length", "16", *more]


@pytest.mark.parametrize("kind", ["model", "inside the model", "a folder of files", "a file"])
def test_an_output_that_holds_files_is_refused(text, tmp_path, kind):
    model = tiny_model.save(tmp_path / "model")
    output = {"model": tmp_path / "x" / ".." / "model", "inside the model": model / "new"}.get(kind, tmp_path / "out")
    sentence = "expected an output apart from the model"
    if kind == "a folder of files":
        output.mkdir()
        (output / "thesis.tex").write_text("years")
        sentence = "holds 'thesis.tex'"
    elif kind == "a file":
        output.write_text("years")
        sentence = "is a file"
    (tmp_path / "x").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = _command(model, *_options(tmp_path, text, output))
    assert result.exit_code == 2
    assert sentence in result.stderr
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
    assert _command(*arguments).exit_code == 0
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
    monkeypatch.setattr(layer, "_operator", lambda rows, w, b, scale, o: run.append(scale) or w.new_zeros(len(rows), 12))
    with torch.no_grad():
        for sequence in x:
            layer(sequence)
    for kept, tokens, scale in zip(fitted, z, run, strict=True):
        assert torch.equal(kept != 0, select(tokens, layer.spec.pattern, scale) != 0)
