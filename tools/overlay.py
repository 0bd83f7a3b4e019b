"""Runs a command in an environment on top of this one: overlay.py FOLDER PACKAGE... -- COMMAND...

The overlay has the oldest version of each package's tested range (nm_act/supported.py); everything else, torch and
nm_act included, comes from this environment. COMMAND is a program of the overlay, such as `python`. The overlay is made
once, and again when a range moves. If it cannot be made (offline), one line says that the command did not run.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nm_act.supported import supported


def oldest(package: str) -> str:
    """The lower end of a package's tested range."""
    (found,) = supported(package)
    return min((each.version for each in SpecifierSet(found.versions) if each.operator == ">="), key=Version)


def is_complete(python: Path, wanted: dict[str, str]) -> bool:
    """Whether the overlay has those versions."""
    if not python.exists():
        return False
    probe = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    run = subprocess.run([python, "-c", probe, *wanted], capture_output=True, text=True)
    return [Version(text) for text in run.stdout.split()] == [Version(text) for text in wanted.values()]


def make(folder: Path, wanted: dict[str, str]) -> bool:
    """Create the overlay; False if pip fails."""
    venv.create(folder, with_pip=True, clear=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder.resolve())}))
    # addsitedir instead of a plain path, so that the environment's .pth files work (an editable nm_act has one).
    (site / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    return subprocess.run([*pip, *(f"{name}=={version}" for name, version in wanted.items())]).returncode == 0


def main(arguments: list[str]) -> int:
    split = arguments.index("--")
    folder, packages, command = Path(arguments[0]), arguments[1:split], arguments[split + 1 :]
    wanted = {package: oldest(package) for package in packages}
    names = ", ".join(f"{name} {version}" for name, version in wanted.items())
    if not is_complete(folder / "bin" / "python", wanted) and not make(folder, wanted):
        print(f"{names} could not be installed: not run on the oldest versions: {' '.join(command)}", file=sys.stderr)
        return 0
    print(f"on {names}: {' '.join(command)}", flush=True)
    return subprocess.run([folder / "bin" / command[0], *command[1:]]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
