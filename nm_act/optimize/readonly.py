"""Weights that are computed, or are parts of other weights; they refuse writes that would be lost."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

REMEDY = "call nm_act.deoptimize(model), change the weight, and optimize again"

_IN_PLACE = [f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow")]
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


class Computed(Tensor):
    """A tensor that was computed when it was read: every write to it raises a RuntimeError."""

    what = "weight"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on plain tensors, unless it writes to a tensor of this class."""
        kwargs = kwargs or {}
        for target in _targets(func.__name__, args, kwargs):
            if target._loses(func, args):
                target._refuse(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        sources = {_storage(value): value for value in _computed((args, tuple(kwargs.values())))}
        wrap = partial(_wrapped, sources=sources)
        if isinstance(result, tuple | list):
            results = [wrap(value) for value in result]
            # torch.return_types, such as max's, take one sequence; other named tuples stay as they are.
            return type(result)(results) if type(result) in (tuple, list) or hasattr(result, "n_fields") else result
        return wrap(result)

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused, because it replaces the memory; torch's only write that ``__torch_function__`` does not see."""
        self._refuse("set_")

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(f"expected no write to the {self.what} of an optimized layer, got one ({name}); {REMEDY}")

    def _loses(self, func: Any, args: Any) -> bool:
        return True


class Part(Computed):
    """A view of a merged weight or bias: writes reach the merged tensor, replacing the view does not."""

    what = "weight or bias"

    def _loses(self, func: Any, args: Any) -> bool:
        if func != _SET_DATA:
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return bool(args[0].data_ptr() != args[1].data_ptr() or args[0].stride() != args[1].stride())


def _targets(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Computed]:
    """The tensors of these classes that an operation of this name writes to."""
    yield from _computed(kwargs.get("out"))
    if name.startswith("__"):
        writes = name in ("__setitem__", "__set__", *_IN_PLACE)
    else:
        writes = (name.endswith("_") and name not in ("requires_grad_", "retain_grad_")) or bool(kwargs.get("inplace"))
    if writes:
        yield from _computed(args[0] if args else None)


def _computed(value: Any) -> Iterator[Computed]:
    if isinstance(value, Computed):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _computed(each)


def _storage(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.untyped_storage()._cdata)


def _wrapped(value: Any, sources: dict[int, Computed]) -> Any:
    """Results that share storage with one of these tensors refuse the same writes; others are plain tensors."""
    if not (isinstance(value, Computed) or type(value) is Tensor) or value.layout != torch.strided:
        return value
    source = sources.get(_storage(value))
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor if source is None else type(source))


def refuse_set(name: str) -> NoReturn:
    """Raise a RuntimeError for an assignment to an optimized layer's ``weight`` (or a part's ``bias``)."""
    raise RuntimeError(f"expected no write to the {name} of an optimized layer, got an assignment; {REMEDY}")


class DequantisedWeight(nn.Module):
    """A layer that stores its weight ``[out_features, in_features]`` in 8 bits and reads like one of 16 bits.

    Subclasses have :meth:`store`, :meth:`dequantised`, and ``like``, an empty tensor of the model's dtype and device.
    """

    float32: tuple[str, ...] = ("weight_scale",)
    """Buffers that stay float32 in a bfloat16 model."""

    in_features: int
    out_features: int
    like: Tensor
    bias: Any

    def store(self, weight: Tensor) -> None:
        """Quantise ``weight [out, in]``."""
        raise NotImplementedError

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, dequantised to the model's dtype: a new tensor at each access that refuses writes."""
        return self.dequantised(self.like.dtype).as_subclass(Computed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse_set(name)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> "DequantisedWeight":
        before = {name: self._buffers[name] for name in self.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            setattr(self, name, None if value is None else value.to(self.like.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """As torch's method: reports every missing or unexpected name."""
        stored = {"weight": [self.out_features, self.in_features]}
        if self.bias is not None:
            stored["bias"] = [self.out_features]
        for name, shape in stored.items():
            value = state_dict.get(f"{prefix}{name}")
            if value is None:
                missing.append(f"{prefix}{name}")
            elif list(value.shape) != shape:
                errors.append(f"expected {prefix}{name} of shape {shape}, got {list(value.shape)}")
            elif name == "weight":
                self.store(value.to(self.like.device, self.like.dtype))
            else:
                with torch.no_grad():
                    self.bias.copy_(value)
        if strict:
            own = {f"{prefix}{name}" for name in stored}
            unexpected += [key for key in state_dict if key.startswith(prefix) and key not in own]
