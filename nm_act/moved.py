"""Modules under their names before 0.2; reading from one warns and returns what the new module has."""

import importlib
import sys
import types
import warnings
from typing import Any

_SAME_NAME = {
    "layers": "linear derived hooks stale tokens",
    "methods": "criteria mitigations",
    "ops": "autograd composed explain lifting packed",
    "conversion": "sparsify undo adapters fingerprint macs",
    "lab": "calibrate evaluate search cost policies texts",
    "lab.calibrate": "blocks data run state static training",
    "lab.evaluate": "calibrated decode_speed folder perplexity results run study tasks variants",
    "lab.search": "options sensitivity solve",
}
MOVED = {
    "calibrate.store": "conversion.calibration",
    "calibrate.permute": "conversion.permutation",
    "search.plan": "lab.search.run",
    "integrations.kv_cache": "layers.kv_cache",
} | {
    f"{room}.{name}".removeprefix("lab.") if "." in room else name: f"{room}.{name}"
    for room, names in _SAME_NAME.items()
    for name in names.split()
}
"""Name in 0.1 -> name since 0.2, both without the package."""


class _Moved(types.ModuleType):
    """Takes the place of a module in ``sys.modules`` under its old name, so that no file or finder is needed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # tools that scan sys.modules look these up
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        package, _, old = self.__name__.partition(".")
        place = f"{package}.{MOVED[old]}"
        warnings.warn(f"{self.__name__} is {place} since 0.2; import that", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), name)


def register_old_names(package: str) -> None:
    """Let every module of :data:`MOVED` be imported under its old name."""
    for old in MOVED:
        sys.modules.setdefault(f"{package}.{old}", _Moved(f"{package}.{old}"))
