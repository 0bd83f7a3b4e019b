"""``nm-act run``: scripts, modules and installed commands, with nm_act's checkpoints known to Transformers."""

import subprocess
import sys

import pytest
import tiny_model
from commands import environment

import nm_act


def start(*arguments, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment(cwd), capture_output=True, text=True, timeout=300, cwd=cwd)


def test_a_saved_model_loads_sparse_in_a_program_that_does_not_import_nm_act(tmp_path):
    model, _ = tiny_model.build()
    nm_act.sparsify(model, nm_act.Recipe("2:4"))
    model.save_pretrained(tmp_path / "sparse")
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "print(type(A.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)\n"
    )
    for prefix, expected in ((["-m", "nm_act", "run"], "NMLinear"), ([], "Linear")):
        done = start(*prefix, "program.py", "sparse", cwd=tmp_path)
        assert done.stdout.strip() == expected, done.stderr


PROGRAM = """
import os, sys
import neighbour
assert __name__ == "__main__" and "nm_act" in sys.modules
print(os.path.basename(sys.argv[0]), sys.argv[1:])
sys.exit(7)
"""


@pytest.mark.parametrize("program", [["program.py"], ["-m", "program"]], ids=" ".join)
def test_arguments_options_and_the_exit_code_are_the_programs(tmp_path, program):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("")
    done = start("-m", "nm_act", "run", *program, "a", "--help", "-m", "--", "b", cwd=tmp_path)
    assert done.stdout.strip() == "program.py ['a', '--help', '-m', '--', 'b']", done.stderr
    assert done.returncode == 7


def test_a_command_that_a_package_installed(tmp_path):
    done = start("-m", "nm_act", "run", "pytest", "--version", cwd=tmp_path)
    assert (done.returncode, (done.stdout + done.stderr).split()) == (0, ["pytest", pytest.__version__])


def test_an_error_of_the_program_is_its_own(tmp_path):
    (tmp_path / "program.py").write_text("raise ValueError('its own')")
    done = start("-m", "nm_act", "run", "program.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.rstrip().endswith("ValueError: its own")


@pytest.mark.parametrize("module", ["nosuchmod", "nosuchmod.part", "package"])
def test_a_module_that_cannot_be_started_is_the_sentence_of_python(tmp_path, module):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    ours = start("-m", "nm_act", "run", "-m", module, cwd=tmp_path)
    pythons = start("-m", module, cwd=tmp_path)
    assert (ours.returncode, ours.stdout) == (pythons.returncode, "") == (1, "")
    assert ours.stderr.removeprefix("nm-act: ") == pythons.stderr.removeprefix(f"{sys.executable}: ")
    assert len(ours.stderr.splitlines()) == 1


@pytest.mark.parametrize("code", ["import nosuchmod", "import runpy; runpy.run_module('nosuchmod')"])
def test_a_missing_import_of_a_module_is_its_own(tmp_path, code):
    (tmp_path / "program.py").write_text(code)
    done = start("-m", "nm_act", "run", "-m", "program", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such-program"], "expected a Python script, -m MODULE or a command that a Python package installed, got"),
        (["-m"], "expected a module after -m, got none"),
        ([], "missing argument"),
    ],
)
def test_what_cannot_be_started_is_one_sentence(tmp_path, arguments, told):
    done = start("-m", "nm_act", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
