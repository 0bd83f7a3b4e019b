"""The command line as tests run it: in this process, or as a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from nm_act.cli.application import app

ROOT = Path(__file__).resolve().parents[1]


def environment(folder: Path) -> dict[str, str]:
    """Environment of a process in which the package is found, and no model on the hub."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}


def run(*arguments):
    """The result of a command."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def ok(*arguments) -> str:
    """Run a command that has to succeed; its output."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments) -> str:
    """Run a command that has to end with exit code 2 and one sentence after its progress notes; that sentence."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    [complaint] = [line for line in result.stderr.splitlines() if line.startswith("nm-act: ")]
    assert result.stderr.rstrip().endswith(complaint)
    return complaint


def interrupted(arguments, wait, number=signal.SIGINT):
    """Exit code, stdout and stderr of a process that gets Ctrl-C, or another signal, after `wait(process)`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nm_act", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its grandchildren.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait(process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, stdout, stderr


def python(code: str) -> list[str]:
    """Words that a Python process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
