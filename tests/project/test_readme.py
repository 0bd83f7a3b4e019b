"""The documentation is true: examples run, commands exist, generated blocks equal their data, names on `__all__` resolve."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nm_act
from nm_act.methods import criteria
from nm_act.methods.criteria import CRITERIA
from nm_act.ops import fused
from nm_act.optimize.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FOLDERS = ("nm_act", "csrc", "tests", "benchmarks", "tools", "docs")


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)


def test_example_runs():
    example = re.search(r"a test runs this block -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    result = run("-c", example)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "torch.Size([1, 11008])"


def test_generated_blocks_are_up_to_date():
    result = run("tools/readme.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_command_named_exists():
    commands = set(re.findall(r"^nm-act (\w+)", README, re.MULTILINE))
    assert commands == {"calibrate", "convert", "demo", "eval", "generate", "info", "ppl", "run", "search"}
    for command in sorted(commands):
        result = run("-m", "nm_act", command, "--help")
        assert result.returncode == 0, result.stderr
        options = re.findall(rf"^nm-act {command}.*?(--[a-z-]+)", README, re.MULTILINE)
        assert all(option in result.stdout for option in options)


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_contributing_names_what_exists():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    known = {
        word
        for path in [*files, ROOT / "Makefile", ROOT / "CMakeLists.txt"]
        for word in re.findall(r"\w+", path.read_text())
    }
    spans = re.findall(r"`([^`]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    parts = {part for span in spans for part in span.split()}
    assert {span for span in spans if span.isidentifier()} <= known
    paths = {part for part in parts if part.partition("/")[0] in FOLDERS and not set(part) & set("<*")}
    assert len(paths) > 50
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_lists_written_by_hand_are_complete():
    recipes = (ROOT / "docs/recipes.md").read_text()
    row = re.search(r"^\| `criterion` \|(.*?)\|", recipes, re.MULTILINE)[1]
    assert set(re.findall("`(.*?)`", row)) == set(CRITERIA)
    for name in CRITERIA:
        assert re.search(rf"^{name} ", criteria.__doc__, re.MULTILINE), name
    lists = {
        "README.md": r"nm_act\.optimize\(model\)\)  # (.*?);",
        "docs/inference.md": r"q/k/v and gate/up of (.*?) are merged",
        "nm_act/optimize/model.py": r"with the addition\. (.*?) of\s+Transformers",
    }
    for document, place in lists.items():
        listed = re.search(place, (ROOT / document).read_text(), re.DOTALL)[1]
        names = [name.replace(" ", "").lower() for name in re.split(r",\s+|\s+and\s+", listed)]
        assert names == list(FAMILIES), document


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_all_names_resolve():
    for name in nm_act.__all__:
        assert getattr(nm_act, name) is not None


MODULES = [
    module.name
    for module in pkgutil.walk_packages(nm_act.__path__, "nm_act.")
    if not module.name.endswith(("._C", ".__main__", ".libnm_act_kernels"))
    and (importlib.util.find_spec("vllm") or not module.name.endswith((".vllm_linear", ".vllm_reload")))  # import vLLM
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0


def test_public_functions_have_docstrings():
    for name in nm_act.__all__:
        value = getattr(nm_act, name)
        assert not callable(value) or value.__doc__, name


PUBLIC = {
    f"{place.__name__}.{name}": value
    for place, names in ((nm_act, {*nm_act.__all__} - {"sparse_linear_fp8"}), (fused, [*vars(fused)]))  # deprecated
    for name in sorted(names)
    if inspect.isfunction(value := getattr(place, name)) and value.__module__.startswith("nm_act") and name[0] != "_"
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_named_and_documented(name):
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert inspect.Parameter.VAR_KEYWORD not in {each.kind for each in parameters.values()}
    section = re.search(r"Parameters\n    -+\n(.*?)(?:\n\n    \w|\Z)", PUBLIC[name].__doc__, re.DOTALL)
    if section:
        listed = re.findall(r"^    (\w[\w, ]*?)(?: :|$)", section[1], re.MULTILINE)
        assert {name for line in listed for name in line.split(", ")} == {*parameters}


def test_the_api_page_has_every_public_name():
    pages = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(page.rpartition(".")[2] for page in pages) == sorted({*nm_act.__all__} - {"__version__", "reference"})
    for page in pages:
        module, _, name = page.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(nm_act, name)


def test_the_api_page_has_every_environment_variable():
    files = [*ROOT.glob("nm_act/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("cmake/*.cmake")]
    texts = [path.read_text() for path in [*files, ROOT / "setup.py", ROOT / "CMakeLists.txt"]]
    read = {
        name for text in texts for name in re.findall(r'(?:environ(?:\.get)?[\[(]|getenv\(|ENV\{)"?([A-Z_]+)', text)
    }
    listed = re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(read - {"PATH", "VIRTUAL_ENV"})


def test_the_site_has_every_page():
    listed = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages), "expected nav of mkdocs.yml to list the files of docs/"
