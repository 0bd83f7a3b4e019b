"""Packages of the extras of this one, which only some commands need."""

import importlib
from types import ModuleType


def import_extra(name: str, purpose: str, extra: str = "eval") -> ModuleType:
    """A module of another package; an ImportError names the purpose and the extra that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}); run "
            f"`pip install nm_act[{extra}]`"
        ) from error
