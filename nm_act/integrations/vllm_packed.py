"""Products over the prepacked weights of a served layer, by an operator that gets an address; needs no vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..patterns import NMPattern


@dataclass(eq=False)
class Prepacked:
    """A weight in oneDNN's layout."""

    copy: torch.Tensor  # of `prepack_weight`, or the handler tensor of the product of vLLM's dense layers
    handler: Any = None  # vLLM's; it frees the copy that a handler tensor names

    def take(self, other: "Prepacked") -> None:
        """Multiply by the copy of ``other`` from now on; ``other`` gets this one's, and may be dropped."""
        if self.handler is None:
            self.copy, other.copy = other.copy, self.copy  # opaque: it cannot be written to
            return
        mine = self.copy.clone()
        self.copy.copy_(other.copy)
        other.copy.copy_(mine)


@dataclass(frozen=True, eq=False)
class PackedPart:
    """One segment for :class:`PackedCall`: sparse where it has a weight."""

    copy: Prepacked
    out_features: int
    # [out, in], stored [in, out]. The call reads this storage: new values belong there, as a reload writes them.
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None  # [out], beside the layer's
    pattern: NMPattern | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of :func:`nm_act.sparse_linear`


class PackedCall:
    """The products of segments over one input, by one call of an operator that is given an address.

    A compiled graph pays for every call, argument and input, and passes neither weights nor options so.
    """

    def __init__(self, parts: Sequence[PackedPart], like: torch.Tensor):
        """``like [0, in]`` has the dtype of the inputs."""
        self._held = torch.classes.nm_act.PackedLayer(like)
        self.parts = parts
        self._outputs = sum(part.out_features for part in parts)
        for part in parts:
            keep, group = (part.pattern.keep, part.pattern.group) if part.pattern is not None else (0, 0)
            vectors = [part.options.get(name) for name in ("channel_scale", "shift", "shift_out", "column_scale")]
            shift, variance = part.options.get("token_shift", "none"), part.options.get("variance_correction", False)
            extra = [] if part.pattern is None else list(part.pattern.extra_columns)
            weights = (part.copy.copy, part.out_features, part.weight, part.bias)
            self._held.add(*weights, keep, group, *vectors, shift, variance, extra)
        self._like = like
        self._address = torch.tensor([self._held.address()], device="cpu")

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [tokens, in] -> [tokens, out]``; the weight is not read."""
        y: torch.Tensor = torch.ops.nm_act._packed_layer(x, self._address, self._outputs, bias)
        return y

    def operator(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pattern: NMPattern, **options: Any
    ) -> torch.Tensor:
        """Runs in place of the operator whose pattern and options the part has."""
        return self(x, weight, bias)

    def joined(self, others: Sequence["PackedCall"], biases: Sequence[torch.Tensor | None]) -> "PackedCall":
        """One call for the single part of this call and those of others, with a bias for each."""
        parts = [part for call in (self, *others) for part in call.parts]
        return PackedCall([replace(part, bias=bias) for part, bias in zip(parts, biases, strict=True)], self._like)

    def renew(self) -> None:
        """Read the copies of the parts anew, after :meth:`Prepacked.take`."""
        for index, part in enumerate(self.parts):
            self._held.set_copy(index, part.copy.copy)
