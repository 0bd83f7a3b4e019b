"""Ctrl-C and SIGTERM: exit codes 130 and 143, one line, nothing half-written, and work that a command can go on with."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_model
from commands import interrupted, run
from conftest import failing

from nm_act.cli import common
from nm_act.lab import output


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_ppl_writes_nothing(folder, tmp_path, number):
    long, out = tmp_path / "long.txt", tmp_path / "out"
    long.write_text(tiny_model.TEXT * 100)
    out.mkdir()

    def measured(process):
        assert [process.stderr.readline(), process.stderr.readline()][1] == "perplexity, dense\n"

    arguments = ["ppl", folder, "--text", long, "--window", "4", "--out", out / "r.json"]
    assert interrupted(arguments, measured, number) == (128 + number, "", "interrupted; no result was written\n")
    assert list(out.iterdir()) == []


def test_interrupt_between_measuring_and_writing(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "to_json", failing(KeyboardInterrupt))
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


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_sigterm_ends_forked_workers_quietly(tmp_path):
    """A pool stops its workers by SIGTERM, which a program of `nm-act run` has as by itself."""
    program = tmp_path / "program.py"
    program.write_text("import signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)")
    forks = (
        "import multiprocessing, time; from nm_act.cli.common import remember_interrupts; remember_interrupts()\n"
        "receive, send = multiprocessing.Pipe()\n"
        "work = lambda: (send.send(1), time.sleep(60))\n"
        "worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "worker.start(); receive.recv(); worker.terminate(); worker.join(); print(worker.exitcode)\n"
    )
    for arguments, told in ((["-m", "nm_act", "run", program], "True\n"), (["-c", forks], "-15\n")):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
        assert (done.stdout, done.stderr) == (told, "")


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
    monkeypatch.setattr(common, "load", failing(KeyboardInterrupt))
    for told in (common.INTERRUPTED, common.INTERRUPTED_BUT_KEPT):
        result = run(command, folder, *source, "--output", "out", *options)
        assert result.exit_code == 130
        assert result.stderr.endswith(told + "\n")
        for path in map((tmp_path / "out").joinpath, state):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
