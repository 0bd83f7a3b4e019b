"""What a sparse call of a layer needs besides its input, computed when the weight, the data or the spec change."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..methods import criteria
from ..ops.autograd import needs_derivative, unrecorded
from ..patterns import NMPattern, TopKPattern
from ..recipe import LinearSpec
from .tokens import TokenContext


@dataclass(frozen=True, eq=False)
class LinearWork:
    """What a layer multiplies, how its input is selected, and what is added."""

    operator: Callable[..., Tensor]  # ``(x, weight, bias, pattern, **options) -> y``: one of those below
    pattern: NMPattern | TopKPattern
    # Options of the operator: channel scale, shifts and their image, variance correction, column scale, copies of the
    # weight.
    options: Mapping[str, Any]
    decode_pattern: NMPattern | None = None  # in place of ``pattern`` for one token per sequence
    weight: Tensor | None = None  # in place of the layer's own
    bias: Tensor | None = None
    rotation: Tensor | None = None  # [in, in], basis of the selection, in the dtype of the weight
    low_rank: tuple[Tensor, Tensor] | None = None  # [rank, in] and [out, rank], added for the dense input
    by_sequence: bool = False  # every sequence gets its own channel scale, from this call's tokens (CLACT)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, context: TokenContext | None = None) -> Tensor:
        """``x [..., in] -> [..., out]``, given the layer's own parameters and its token context (or None)."""
        weight = weight if self.weight is None else self.weight
        bias = bias if self.bias is None else self.bias
        pattern, options = self.pattern, self.options
        if self.decode_pattern is not None and is_decode(x):
            pattern = self.decode_pattern
            # The lifted weight belongs to the prefill pattern.
            options = {name: value for name, value in options.items() if name != "lifted_weight"}
        if weight.dtype != x.dtype:  # under autocast, as F.linear does; the operator itself takes one dtype only
            weight = weight.to(x.dtype)
            options = {name: value for name, value in options.items() if name != "prepacked_weight"}
            if "lifted_weight" in options:
                options["lifted_weight"] = options["lifted_weight"].to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:  # also in a layer that keeps its bias in float32
            bias = bias.to(x.dtype)
        z = x if self.rotation is None else x @ self.rotation.to(x.dtype)
        if self.by_sequence and x.ndim > 1:
            y = self._by_sequence(z, weight, bias, pattern, options, context)
        elif self.by_sequence:
            y = self._by_sequence(z.unsqueeze(0), weight, bias, pattern, options, None).squeeze(0)
        else:
            y = self.operator(z, weight, bias, pattern, **options)
        if self.low_rank is None:
            return y
        inner, outer = (part.to(x.dtype) for part in self.low_rank)
        rows = F.linear(x.reshape(-1, x.shape[-1]), inner)
        return torch.addmm(y.view(-1, y.shape[-1]), rows, outer.t()).view(y.shape)

    def _by_sequence(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: NMPattern | TopKPattern,
        options: Mapping[str, Any],
        context: TokenContext | None,
    ) -> Tensor:
        # The number of sequences is spelt out: it could not be inferred from a call without tokens.
        sequences, valid = x.reshape(x.shape[:-2].numel(), *x.shape[-2:]), None
        if context is not None:
            sequences, valid = context.sequences(x, sequences)
        shifted = not options.keys().isdisjoint(("shift", "token_shift"))
        if sequences.shape[1] == 1 and not shifted:  # |x| |x| ranks like |x|: act
            return self.operator(x, weight, bias, pattern, **options)
        static, rows = options.get("channel_scale"), []
        for index, tokens in enumerate(sequences):
            seen = tokens if static is None else tokens * static.to(x.dtype)
            scale = criteria.call_scale(seen, None if valid is None else valid[index])
            scale = scale if static is None else scale * static
            rows.append(self.operator(tokens, weight, bias, pattern, **{**options, "channel_scale": scale}))
        # Not out_features: in a layer that is split over ranks, this weight is only a part.
        y = torch.stack(rows) if rows else x.new_empty((0, weight.shape[0]))
        return y.view(*x.shape[:-1], weight.shape[0])


def is_decode(x: Tensor) -> bool:
    """Whether a layer's input has one token per sequence."""
    return x.ndim == 1 or x.shape[-2] == 1


def work_of(
    spec: LinearSpec,
    data: Mapping[str, Tensor],
    operator: Callable[..., Tensor],
    derived: Mapping[str, Tensor | None],
    **copies: Tensor | None,
) -> LinearWork:
    """The work of a :class:`~nm_act.LinearSpec`, from its calibrated data and the tensors derived from the weight.

    `copies` are the weight in other layouts: ``lifted_weight``, ``prepacked_weight``.
    """
    vectors = {
        "channel_scale": derived.get("channel_scale"),
        "shift": data.get("shift"),
        "shift_out": derived.get("shift_out"),
        "column_scale": data.get("column_scale"),
        **copies,
    }
    options: dict[str, Any] = {name: value for name, value in vectors.items() if value is not None}
    if spec.token_shift != "none":
        options["token_shift"] = spec.token_shift
    if spec.variance_correction:
        options["variance_correction"] = True
    return LinearWork(
        operator,
        spec.pattern,
        options,
        decode_pattern=spec.decode_pattern,
        weight=derived.get("operand_weight"),
        bias=derived.get("operand_bias"),
        rotation=data.get("rotation"),
        low_rank=(data["low_rank_in"], data["low_rank_out"]) if "low_rank_in" in data else None,
        by_sequence=spec.scoring.by_sequence,
    )


def dense_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: NMPattern | TopKPattern, **options: Any
) -> Tensor:
    """The operator of the baselines that prune the weight: the operand weight is sparse, the activation dense."""
    return F.linear(x, weight, bias)


def compiled_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: NMPattern,
    *,
    prepacked_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``torch.ops.nm_act.sparse_linear``, without the checks that the layer has made."""
    if pattern.extra_columns:
        options["extra_columns"] = pattern.extra_columns
    if prepacked_weight is None or needs_derivative(x, bias):  # the prepacked operator has no derivative
        return unrecorded(torch.ops.nm_act.sparse_linear, x, weight, bias, pattern.keep, pattern.group, **options)
    options.pop("lifted_weight", None)
    prepacked = (x, weight, prepacked_weight, bias, pattern.keep, pattern.group)
    return unrecorded(torch.ops.nm_act.sparse_linear_prepacked, *prepacked, **options)
