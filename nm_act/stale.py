"""Noticing that a parameter changed since something was derived from it.

An in-place operation raises a tensor's version counter, and a parameter set anew is another object; both cost well under
a microsecond to see. A write through ``.data`` (as LoRA merging does) leaves the counter as it is: that takes a
fingerprint of the bits, which the layer compares where somebody had the parameter in hand.
"""

import weakref

import torch
from torch import Tensor, nn


class Source:
    """A parameter as it was when something was derived from it."""

    def __init__(self, parameter: Tensor):
        self._parameter = weakref.ref(parameter)  # an offloaded weight has to be freed after its call
        self._state = _state(parameter)
        self._bits = fingerprint(parameter)

    def is_seen_in(self, parameter: Tensor) -> bool:
        """Whether it is the same object in the same memory, untouched by any operation that torch counts."""
        return self._parameter() is parameter and self._state == _state(parameter)

    def is_equal_to(self, parameter: Tensor) -> bool:
        """Whether the values are the same too; reads the whole parameter, and waits for its device."""
        return self.is_seen_in(parameter) and torch.equal(self._bits, fingerprint(parameter))


def is_own(parameter: Tensor) -> bool:
    """Whether a module keeps this tensor; ``functional_call`` lends it plain, wrapped or fake ones for one call."""
    return type(parameter) is nn.Parameter


def fingerprint(tensor: Tensor) -> Tensor:
    """Sums of the bits over each axis, int64: exact, the same in any order of summing."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().view(integer)
    if bits.ndim < 2:
        return bits.to(torch.int64, copy=True)
    return torch.cat([bits.sum(dim=axis, dtype=torch.int64).flatten() for axis in range(bits.ndim)])


def _state(parameter: Tensor) -> tuple:
    # Subclasses (fake tensors, say) have neither; tensors made in inference mode have no counter.
    if type(parameter) is not nn.Parameter:
        return ()
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version, parameter.dtype
