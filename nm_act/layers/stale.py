"""Detects that a parameter has changed since something was derived from it.

An in-place operation increments the tensor's version counter, and assigning a parameter makes it another object; every
call checks both, cheaply. A write through ``.data`` (as LoRA merging does) does not touch the counter. It shows in a
fingerprint of the bits, which the layer compares only after code outside of it has read the parameter.
"""

import weakref

import torch
from torch import Tensor, nn


class Source:
    """The state of a parameter at the time when something was derived from it."""

    def __init__(self, parameter: Tensor):
        self._parameter = weakref.ref(parameter)  # so that an offloaded weight is freed after its call
        # Tensor subclasses (fake tensors) have no address; tensors made in inference mode have no version counter.
        self._has_address = is_own(parameter)
        self._is_counted = self._has_address and not parameter.is_inference()
        self._address = parameter.data_ptr() if self._has_address else 0
        self._version = parameter._version if self._is_counted else 0
        self._bits = fingerprint(parameter)

    def is_seen_in(self, parameter: Tensor | None) -> bool:
        """Whether ``parameter`` is the same object at the same address with the same version counter."""
        return (
            parameter is not None
            and self._parameter() is parameter
            and (not self._is_counted or parameter._version == self._version)
            and (not self._has_address or parameter.data_ptr() == self._address)
        )

    def is_equal_to(self, parameter: Tensor) -> bool:
        """Whether the values are equal too; reads the whole parameter and synchronises with its device."""
        bits = fingerprint(parameter)
        return self.is_seen_in(parameter) and bits.shape == self._bits.shape and torch.equal(self._bits, bits)


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter, read without making :class:`NMLinear` expect a write to it."""
    # If parametrize or torch's prune compute it, it is no parameter but an attribute, and another tensor in each call.
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def is_own(parameter: Tensor) -> bool:
    """Whether it is the module's own parameter; ``functional_call`` substitutes other tensors during one call."""
    return type(parameter) is nn.Parameter


def fingerprint(tensor: Tensor) -> Tensor:
    """Sums of the bits over each axis, int64 (modulo 2^64): the same in any order of summing."""
    tensor = tensor.detach()
    size = tensor.element_size()
    if tensor.ndim < 2:
        return tensor.view(_INTEGERS[size]).to(torch.int64, copy=True)
    if tensor.stride(0) < tensor.stride(1):
        tensor = tensor.t()
    packs = 8 // size
    starts = (tensor.shape[1], tensor.stride(0), tensor.storage_offset())
    if tensor.stride(1) == 1 and all(start % packs == 0 for start in starts):
        bits = tensor.view(torch.int64)  # narrower integers would be copied to int64 for the sum
    else:
        bits = tensor.view(_INTEGERS[size])
    return torch.cat([bits.sum(dim=axis, dtype=torch.int64) for axis in (0, 1)])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
