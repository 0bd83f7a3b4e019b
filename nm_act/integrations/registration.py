"""What ``import nm_act`` registers with torch and Transformers, whichever of them the program imports first.

Importing torch or Transformers' quantizers takes longer than a second, so ``import nm_act`` must not do it. Yet
``torch.ops.nm_act`` has to exist, and a checkpoint saved sparse must load sparse: Transformers skips a method that it
does not know with a warning, and the model would be dense. So the operators are loaded and the method is registered now
if torch and the quantizers are imported, otherwise right after their first import.
"""

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Load the operators into torch and make Transformers know the method "nm_act", without importing either."""
    _after_import("torch", _load_operators)
    _after_import("transformers.quantizers.auto", _register_with_transformers)


def _load_operators() -> None:
    with contextlib.suppress(ImportError):  # not built: using an operator raises the error; torch itself has to work
        importlib.import_module("nm_act.ops")


def _register_with_transformers() -> None:
    try:
        importlib.import_module("nm_act.integrations.transformers")
    except Exception as error:  # whatever is wrong with this installation, Transformers itself has to work
        warnings.warn(f"nm_act checkpoints will load dense: nm_act cannot be imported ({error})", stacklevel=2)


def _after_import(name: str, action: Callable[[], None]) -> None:
    if name in sys.modules:
        action()
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(MetaPathFinder):
    """Import finder that leaves finding to other finders and runs an action after one module is executed.

    It stays until that module has been executed; looking the module up, or failing to import it, changes nothing.
    """

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self._action, self._asking = name, action, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of the one module, found by the other finders; None for every other name."""
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
