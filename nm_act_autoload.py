"""Makes Transformers know nm_act checkpoints in every program, also in one that never imports nm_act.

torch runs `register_with_transformers` at the end of its own import (entry point "torch.backends"), ``import nm_act``
runs it too. A module of its own, because importing the package would load its operators into programs that have no use
for them. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` leaves it out.
"""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder

_TRIGGER = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Make Transformers know the quantisation method "nm_act", without importing Transformers.

    Importing Transformers' quantizers takes longer than a second, so a program that never uses them must
    not pay for it. Yet a checkpoint saved sparse must load sparse: a method that Transformers does not know
    is skipped with a warning, and the model would come out dense. So the registration happens now if the
    quantizers are loaded already, otherwise right after their first import; if that import is what
    imports torch now, at the next import of any module.

    A program that imported nm_act before torch gets ``torch.ops.nm_act`` now.
    """
    _load_operators()
    if _is_loaded():
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _load_operators() -> None:
    package = [name for name in sys.modules if name == "nm_act" or name.startswith("nm_act.")]
    # Where one of its modules is what imports torch, that one brings what it needs.
    if package and "torch" in sys.modules and all(map(_is_loaded, package)):
        importlib.import_module("nm_act.ops")


def _is_loaded(name: str = _TRIGGER) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register() -> None:
    try:
        importlib.import_module("nm_act.integrations.transformers")
    except Exception as error:  # whatever is wrong with this installation, Transformers itself has to work
        warnings.warn(f"nm_act checkpoints will load dense: nm_act cannot be imported ({error})", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Import finder that leaves finding to the others and adds the registration to one module's execution.

    It stays until that module has been executed: whoever only looks the module up, or imports it in vain, changes
    nothing.
    """

    def find_spec(self, fullname, path=None, target=None):
        if _is_loaded():
            self._finish()
            return self._found_by_others(fullname, path, target)
        if fullname != _TRIGGER:
            return None
        spec = self._found_by_others(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self._finish()

            spec.loader.exec_module = exec_module
        return spec

    def _finish(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()

    def _found_by_others(self, fullname, path, target):
        # Not left to Python, which iterates over sys.meta_path and skips the next finder where this one goes.
        for finder in list(sys.meta_path):
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                return spec
        return None
