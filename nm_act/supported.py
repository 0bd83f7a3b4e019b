"""The tested version ranges of other packages, which stand only in this package's own requirements."""

import importlib
import tomllib
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Supported:
    """A package, its tested range, and what is installed."""

    package: str
    versions: str  # tested range, as in requirements: ">=5.17,<5.25"
    installed: str | None  # None where the package is not installed

    @property
    def tested(self) -> bool:
        """Whether the installed version is inside the range; a local build ("2.13.0+cpu") counts as its release."""
        specifiers = require("packaging.specifiers", "transformers").SpecifierSet(self.versions)
        return self.installed is not None and specifiers.contains(self.installed, prereleases=True)


def require(module: str, extra: str, purpose: str = "") -> ModuleType:
    """Import a module that an extra installs; if it is missing, the ImportError names the extra and its purpose."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:  # the module exists, but lacks a dependency
            raise
        raise ModuleNotFoundError(
            f"expected the package {package + (purpose and f' for {purpose}')}, found none; install it with: "
            + installing(extra),
            name=error.name,
        ) from error


def installing(extra: str) -> str:
    """The command that installs an extra: nm_act is built from its sources, and on no index.

    Examples
    --------
    >>> installing("eval")
    "pip install -e '.[eval]' in a checkout of nm_act"
    """
    return f"pip install -e '.[{extra}]' in a checkout of nm_act"


def supported(package: str | None = None) -> list[Supported]:
    """Every package with a tested range, in the order of the requirements; with ``package``, only that one."""
    found = {}
    requirements = require("packaging.requirements", "transformers")
    for text in _requirements():
        requirement = requirements.Requirement(text)
        if len(requirement.specifier) == 2 and package in (None, requirement.name):  # a range has two ends
            versions = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            found[requirement.name] = Supported(requirement.name, versions, _installed(requirement.name))
    return list(found.values())


def warn_if_untested(package: str) -> None:
    """Warn in one sentence if the installed version of a package is outside its tested range."""
    for each in supported(package):
        if each.installed is not None and not each.tested:
            warnings.warn(
                f"expected {package}{each.versions}, the versions that nm_act is tested with, got {each.installed}; "
                "install one of those, or check that results agree",
                stacklevel=3,
            )


def _requirements() -> list[str]:
    """This package's requirements: from its sources if it runs from them, else from the installed metadata."""
    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():  # an editable install's metadata is as old as its last `pip install`
        tables = tomllib.loads(project.read_text()).get("project", {})
        if tables.get("name") == "nm_act":  # site-packages may hold the file of another project
            extras = tables["optional-dependencies"].values()
            return [*tables["dependencies"], *(text for texts in extras for text in texts)]
    return metadata.requires("nm_act") or []


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
