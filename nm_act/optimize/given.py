"""What a fused layer computes for the next one: the product of q, k and v that belongs to the hidden states it returns.

It is kept beside the tensor, not on the next layer: that may be called through a view (StaticDecoder's) that does not
share what is set on a module, and states that were replaced on their way have no product.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


class Following:
    """A weak reference to the next layer; copies and pickles of the layer that holds it refer to none."""

    def __init__(self, layer: nn.Module | None = None):
        self._layer = None if layer is None else weakref.ref(layer)

    def __call__(self) -> nn.Module | None:
        return None if self._layer is None else self._layer()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Following":
        return Following()

    def __reduce__(self) -> tuple[Any, ...]:
        return Following, ()


class Given:
    """The product of a layer's q, k and v for hidden states, and the state of what it was computed from."""

    def __init__(self, layer: Any, linear: nn.Module, way: str, hidden: Tensor, product: Tensor):
        self._linear, self._way, self._product = weakref.ref(linear), way, product
        # The states themselves are the key that this belongs to, and the layer may be gone before them.
        self._hidden = _state(hidden)
        self._weights = [*map(_state, _weights(layer, linear))]

    def product_of(self, layer: Any, linear: nn.Module, way: str, hidden: Tensor) -> Tensor | None:
        """The product, if it is this layer's and neither the states nor the weights have changed since."""
        if linear is not self._linear() or way != self._way or _state(hidden) != self._hidden:
            return None
        return self._product if [*map(_state, _weights(layer, linear))] == self._weights else None


def has_state(tensor: Tensor) -> bool:
    """Whether changes of a tensor can be noticed; those of traced and vmapped ones, which have no data, cannot."""
    try:
        return type(tensor) is Tensor and tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _weights(layer: Any, linear: nn.Module) -> Iterator[Tensor]:
    yield layer.input_layernorm.weight
    for own in (linear._parameters, linear._buffers):
        yield from (tensor for tensor in own.values() if tensor is not None)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's data are, and how often torch changed them; inference tensors do not count."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


_given = WeakIdKeyDictionary()


def give(hidden: Tensor, given: Given) -> None:
    """Keep a product until the next layer takes it, or the hidden states are gone."""
    _given[hidden] = given


def take(hidden: Tensor) -> Given | None:
    """What came along with hidden states; only once, so it is freed after its use."""
    if torch.compiler.is_compiling():
        return None
    found: Given | None = _given.pop(hidden, None)
    return found
