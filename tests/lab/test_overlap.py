"""Evaluation on text that was calibrated on is refused, wherever its windows were cut."""

import json

import commands
import pytest
import tiny_model
import torch

from nm_act.lab.overlap import check_apart, fingerprints, known_fingerprints

IDS = torch.randint(0, 50000, (20000,), generator=torch.Generator().manual_seed(0))


def test_fingerprints_do_not_depend_on_where_windows_start():
    whole = set(fingerprints(IDS))
    assert len(whole) == pytest.approx(len(IDS) / 32, rel=0.2)
    assert set(fingerprints(IDS[37:5000])) <= whole
    windows = IDS[: 19 * 1024].view(19, 1024)
    assert set(fingerprints(windows)) <= whole
    assert not fingerprints(IDS[:10])


def test_overlap_is_measured_and_refused():
    other = torch.randint(0, 50000, (20000,), generator=torch.Generator().manual_seed(1))
    check_apart(IDS, fingerprints(other), "it")
    with pytest.raises(
        ValueError, match=r"that 'x' was not calibrated on, got one of which (7|8|9|10|11|12)% is in that text"
    ):
        check_apart(IDS, fingerprints(torch.cat([other, IDS[3001:5001]])), "'x'")
    check_apart(IDS, fingerprints(torch.cat([other, IDS[:100]])), "it")  # a phrase


def test_old_facts_have_none(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text(json.dumps({"text_hashes": ["00", "11"]}))
    assert known_fingerprints(tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json") == ["00", "11"]


@pytest.fixture
def data(tmp_path):
    """A data folder whose evaluation text holds the calibration text."""
    words = tiny_model.TEXT.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
    calibration = " ".join(words[index] for index in order)
    (tmp_path / "c4.txt").write_text(calibration)
    (tmp_path / "wikitext2.txt").write_text(f"{tiny_model.TEXT} {calibration}")
    return tmp_path


def test_commands_refuse(data, folder, tmp_path):
    (tmp_path / "r.yaml").write_text("pattern: 2:4\nmitigation: [spts]\n")
    made = (
        "--recipe",
        tmp_path / "r.yaml",
        "--data",
        data / "c4.txt",
        "--output",
        tmp_path / "made",
        "--no-checkpoint",
    )
    commands.ok("calibrate", folder, *made, "--windows", 64, "--length", 64)
    evaluation = (folder, "--tasks", "wikitext2", "--data", data, "--output", tmp_path / "run")
    refused = commands.refused("eval", *evaluation, "--calibration", tmp_path / "made")
    assert "expected text to evaluate on that 'made' was not calibrated on" in refused
    search = (
        "--windows",
        8,
        "--window",
        64,
        "--layers-together",
        2,
        "--target-speedup",
        1.02,
        "--output",
        tmp_path / "s",
    )
    commands.ok("search", folder, "--data", data, *search)
    refused = commands.refused("eval", *evaluation, "--recipe", tmp_path / "s" / "recipe.yaml")
    assert "recipe.yaml' was not calibrated on" in refused
