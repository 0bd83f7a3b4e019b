"""N:M activation sparsity for LLM inference in PyTorch: prune activations on the fly, without retraining."""

import importlib.util
import sys
import types
from typing import Any

from .integrations import register
from .moved import MOVED, register_old_names
from .version import __version__ as __version__

_MODULES = {
    "conversion.calibration": ("load_calibration",),
    "conversion.sparsify": ("SparsifyReport", "sparsify"),
    "integrations.transformers": ("NMActConfig",),
    "layers.linear": ("NMLinear",),
    "ops": (
        *("build_info", "compress", "decompress", "gather_linear", "pack_metadata", "prune"),
        *("sparse_linear", "sparse_linear_fp8", "support_table", "unpack_metadata"),
    ),
    "ops.calls": ("explain_calls",),
    "ops.explain": ("Explanation", "explain"),
    "ops.lifting": ("lift_weight", "unlift"),
    "ops.packed": (
        *("Packed", "compress_packed", "rms_norm_compress", "silu_mul_compress"),
        *("sparse_gemm", "sparse_gemm_silu_mul"),
    ),
    "optimize": ("FP8Linear", "OptimizeReport", "StaticDecoder", "deoptimize", "optimize"),
    "patterns": ("NMPattern",),
    "recipe": ("Recipe", "Rule"),
    "spec": ("LinearSpec",),
}
"""Module -> its public names, imported at first use: torch and Transformers take seconds to import, and
``nm-act --help`` and Ctrl-C should not wait for that."""

_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_HOME, "__version__", "reference"])


class _Package(types.ModuleType):
    """This package: loads a public name at first use, and lets a function hide the submodule of the same name."""

    def __getattr__(self, name: str) -> Any:
        if name in _HOME:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        elif name in MOVED:
            value = sys.modules[f"{__name__}.{name}"]
        elif not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule to its package once it is imported: nm_act.sparsify has to stay the function.
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

register()
register_old_names(__name__)
