"""Makes Transformers know nm_act's checkpoints in a program that imports nm_act, before or after Transformers.

Importing Transformers' quantizers takes longer than a second, so ``import nm_act`` must not do it. Yet a checkpoint
saved sparse must load sparse: a method that Transformers does not know is skipped with a warning, and the model would
come out dense. So the registration happens now if the quantizers are loaded, otherwise right after their first import.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Make Transformers know the quantisation method "nm_act", without importing Transformers."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    try:
        importlib.import_module("nm_act.integrations.transformers")
    except Exception as error:  # whatever is wrong with this installation, Transformers itself has to work
        warnings.warn(f"nm_act checkpoints will load dense: nm_act cannot be imported ({error})", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Import finder that leaves finding to the others and adds the registration to one module's execution.

    It stays until that module has been executed: to look the module up, or to import it in vain, changes nothing.
    """

    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of the one module, found by the other finders; None for every other name."""
        if fullname != _TRIGGER or self._asking:
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
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
