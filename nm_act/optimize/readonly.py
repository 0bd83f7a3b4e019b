"""A layer's weight that is computed or part of another one: writes that would be lost are refused."""

import torch
from torch import Tensor

REMEDY = "call nm_act.deoptimize(model), change the weight, and optimize again"

_VIEWS = ("__get__", "detach", "__getitem__", "t", "transpose", "view", "split")
_IN_PLACE = [f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow")]
_SET_DATA = Tensor.data.__set__


class Computed(Tensor):
    """A tensor that was computed for its reader: whatever writes to it raises a RuntimeError."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Run the operation on plain tensors, unless it writes to one of these."""
        target = args[0] if args else None
        if isinstance(target, Computed) and target._loses(func, args):
            raise RuntimeError(
                f"expected no write to the weight of an optimized layer, got one ({func.__name__}); {REMEDY}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        views = func.__name__ in _VIEWS
        wrap = lambda value: value.as_subclass(type(target) if views else Tensor)  # noqa: E731
        if isinstance(result, tuple | list):
            return type(result)(wrap(r) if type(r) in (Tensor, cls) else r for r in result)
        return wrap(result) if type(result) in (Tensor, cls) else result

    def _loses(self, func, args) -> bool:
        name = func.__name__
        if name.startswith("__"):
            return name in ("__setitem__", "__set__", *_IN_PLACE)
        return name.endswith("_") and name not in ("requires_grad_", "retain_grad_")


class Part(Computed):
    """A view of a merged weight: writes reach it, another tensor in its place does not."""

    def _loses(self, func, args) -> bool:
        if func != _SET_DATA:
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].data_ptr() != args[1].data_ptr() or args[0].stride() != args[1].stride()


def refuse_set(name: str) -> None:
    """Raise a RuntimeError for an assignment to an optimized layer's ``weight`` (or, of a part, ``bias``)."""
    raise RuntimeError(f"expected no write to the {name} of an optimized layer, got an assignment; {REMEDY}")
