"""The rooms of the package and the one direction of imports between them (docs/architecture.md draws it)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nm_act"
ROOMS = (
    ("files", "moved", "patterns", "roles", "supported", "version", "yaml_text", "_C"),
    *(("ops",), ("methods",), ("recipe", "spec"), ("parallel",), ("layers",), ("optimize",), ("conversion",)),
    *(("integrations",), ("lab",), ("cli", "__main__")),
)
"""From the ground up: a module imports from its own room and from those before it."""

LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms} | {"reference": 1}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, in functions too."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.removeprefix("nm_act.") for alias in node.names if alias.name.startswith("nm_act.")]
            found.update(names)
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "nm_act":
            base, node.module = [], node.module.removeprefix("nm_act").removeprefix(".")
        else:
            continue
        source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            name = f"{source}.{alias.name}".strip(".")
            found.add(name if name in MODULES else source or name)
    return found - {"", "_C"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    room = module.split(".")[0]
    upward = {name for name in imported(module) if LEVEL[name.split(".")[0]] > LEVEL[room]}
    assert not upward, f"{module} imports {', '.join(sorted(upward))} from a room above its own"


def test_no_module_imports_in_a_circle():
    try:
        TopologicalSorter({module: imported(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_oracle_is_for_tests_and_readers():
    assert [module for module in MODULES if "reference" in imported(module)] == []


def test_the_drawing_names_every_room():
    root = PACKAGE.parent
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    folders = {path.name for path in (root / "csrc").glob("**/") if path.parent != root}
    names = (rooms - {"__init__.py", "__main__.py"}) | folders | {"benchmarks", "examples", "tests", "tools"}
    assert [name for name in sorted(names) if name not in text] == []
