"""Ctrl-C: exit code 130, one line, nothing half-written, and work that a command can go on with."""

import os
import signal
import time

import pytest
import tiny_model
from commands import interrupted, run

from nm_act.cli import common
from nm_act.lab import output


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted_ppl_writes_nothing(folder, tmp_path):
    long, out = tmp_path / "long.txt", tmp_path / "out"
    long.write_text(tiny_model.TEXT * 100)
    out.mkdir()

    def measured(process):
        assert [process.stderr.readline(), process.stderr.readline()][1] == "perplexity, dense\n"

    arguments = ["ppl", folder, "--text", long, "--window", "4", "--out", out / "r.json"]
    assert interrupted(arguments, measured) == (130, "", "interrupted; no result was written\n")
    assert list(out.iterdir()) == []


def test_interrupt_between_measuring_and_writing(folder, text, tmp_path, monkeypatch):
    def interrupt(data):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "to_json", interrupt)
    result = run("ppl", folder, "--text", text, "--max-tokens", 64, "--out", tmp_path / "r.json")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; no result was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0])
def test_interrupted_during_imports(folder, text, seconds):
    code, stdout, stderr = interrupted(["ppl", folder, "--text", text], lambda process: time.sleep(seconds))
    assert "Traceback" not in stderr
    assert code in (130, -signal.SIGINT)  # a shell shows both as 130
    assert stdout == ""
    assert stderr.endswith("interrupted; no result was written\n")


@pytest.mark.parametrize(
    ("command", "options", "state"),
    [
        ("eval", ["--pattern", "2:4", "--tasks", "wikitext2"], ["run.json", "rows/dense.wikitext2.json"]),
        ("search", ["--window", 32, "--target-speedup", 1.1], ["run.json", "sensitivities.jsonl"]),
        ("calibrate", ["--length", 32, "--recipe", "spts.yaml"], ["state/run.json", "state/block-0000.safetensors"]),
    ],
)
def test_what_wrote_nothing_does_not_promise_to_go_on(folder, tmp_path, monkeypatch, command, options, state):
    """Interrupted while the model is loaded; the second time there is a result of an earlier run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spts.yaml").write_text("pattern: 2:4\nmitigation: [spts]\n")
    (tmp_path / "wikitext2.txt").write_text(tiny_model.TEXT)
    source = (
        ["--text", "wikitext2.txt"] if command == "search" else ["--data", {"eval": "."}.get(command, "wikitext2.txt")]
    )

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load", interrupt)
    for told in (common.INTERRUPTED, common.INTERRUPTED_BUT_KEPT):
        result = run(command, folder, *source, "--output", "out", *options)
        assert result.exit_code == 130
        assert result.stderr.endswith(told + "\n")
        for path in map((tmp_path / "out").joinpath, state):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
