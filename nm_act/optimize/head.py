"""An output head in 8 bits: one byte per weight and one scale per word of the vocabulary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops.e4m3 import E4M3, quantise_rows
from . import readonly
from .changed import Changed
from .eligible import why_stays

HEAD_DTYPES = {"e4m3": E4M3, "int8": torch.int8}
"""Name -> dtype in which the weight of an output head can be stored."""

MOST_TOKENS = 8
"""Most tokens that :func:`nm_act.gather_linear` takes; their activations stay in 16 bits."""

ROWS_AT_ONCE = 8192
"""Number of words that are quantised or dequantised at once, which determines the peak memory."""


class QuantisedHead(readonly.DequantisedWeight):
    """The output head of a model with its weight in 8 bits, ``W ~ weight_scale[:, None] * codes``.

    Parameters
    ----------
    head : nn.Linear
        Quantised per row, rounded to nearest.
    kind : {"e4m3", "int8"}
        ``weight_scale`` is ``max|W| / 448`` or ``max|W| / 127``. A row's values are close to normally distributed, so
        int8 rounds them less: by half as much of the weight's norm in SmolLM2-135M.
    tied : nn.Embedding, optional
        The embedding that shares the head's weight. It keeps the weight before rounding, which stays in ``state_dict``.

    Notes
    -----
    The weight is stored [in, out]. On CUDA, the kernel of :func:`nm_act.gather_linear` multiplies up to eight tokens;
    for more tokens, and on a CPU, the weight is dequantised in slices at every call. Without a tied embedding,
    ``state_dict`` contains the dequantised weight under the stock name.
    """

    rows: Tensor
    weight_scale: Tensor
    like: Tensor

    def __init__(self, head: nn.Linear, kind: str, tied: nn.Module | None = None):
        super().__init__()
        check_kind(kind)
        why = why_not_8_bits(head)
        if why:
            raise ValueError(f"expected an output head whose weight can be {kind}, got one of which {why}; keep it")
        self.kind = kind
        self.in_features, self.out_features = head.in_features, head.out_features
        # Not a submodule here: the model has it already.
        object.__setattr__(self, "_tied", tied)
        self.register_buffer("rows", None, persistent=False)  # [in, out], as bytes: .to(dtype) would convert e4m3
        self.register_buffer("weight_scale", None, persistent=False)
        self.register_buffer("like", head.weight.new_empty(0), persistent=False)  # has the model's dtype
        self.bias = head.bias
        self.register_state_dict_post_hook(_stock_state)  # type: ignore[no-untyped-call]
        self.store(head.weight)
        self.train(head.training)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantise ``weight [out, in]``."""
        self.rows = torch.empty(self.in_features, self.out_features, dtype=torch.uint8, device=weight.device)
        scales = []
        for part, target in zip(weight.split(ROWS_AT_ONCE), self.rows.split(ROWS_AT_ONCE, dim=1), strict=True):
            codes, scale = quantise_rows(part, HEAD_DTYPES[self.kind])
            target.copy_(codes.view(torch.uint8).t())
            scales.append(scale)
        self.weight_scale = torch.cat(scales)

    @property
    def tied(self) -> nn.Module | None:
        """The embedding that keeps the weight before rounding."""
        return self._tied  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.rows.nbytes + self.weight_scale.nbytes

    @property
    def saved(self) -> int:
        """Bytes saved compared with the replaced layer; negative if a tied embedding keeps the weight."""
        return (0 if self.tied is not None else self.rows.numel() * self.like.element_size()) - self.nbytes

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]``, contiguous."""
        return torch.cat([self._slice(start, dtype) for start in range(0, self.out_features, ROWS_AT_ONCE)])

    def _slice(self, start: int, dtype: torch.dtype) -> Tensor:
        codes = self.rows[:, start : start + ROWS_AT_ONCE].t().contiguous().view(HEAD_DTYPES[self.kind])
        return codes.float().mul_(self.weight_scale[start : start + ROWS_AT_ONCE, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> [..., out]``."""
        if x.is_cuda and x.dtype == self.like.dtype and 0 < x.shape[:-1].numel() <= MOST_TOKENS:
            codes = self.rows.view(HEAD_DTYPES[self.kind]).t()
            return ops.gather_linear(x, codes, self.bias, weight_scale=self.weight_scale)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, ROWS_AT_ONCE):
            y[..., start : start + ROWS_AT_ONCE] = F.linear(x, self._slice(start, x.dtype))
        return y if self.bias is None else y + self.bias

    def to_linear(self) -> nn.Linear:
        """A stock layer with the tied embedding's weight, or the dequantised one."""
        tied = self.tied
        head = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        own = nn.Parameter(self.dequantised(self.like.dtype), False) if tied is None else tied.weight
        head.weight = own  # type: ignore[assignment]
        head.bias = self.bias
        return head.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and storage, for printing."""
        beside = "" if self.tied is None else ", beside the embedding"
        return f"{self.in_features}, {self.out_features}, {self.kind}{beside}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        if f"{prefix}weight" not in state_dict and self.tied is not None:  # the embedding was loaded before
            embedding: Any = self.tied.weight
            self.store(embedding.detach().to(self.rows.device, self.like.dtype))


def head_of(model: nn.Module) -> Any:
    """The output head of a Transformers model; None if there is none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def check_kind(kind: object) -> None:
    """Raise a ValueError for an unknown kind of output head."""
    if kind not in HEAD_DTYPES:
        raise ValueError(f"expected head among {', '.join(HEAD_DTYPES)}, got {kind!r}; choose one of those")


def store_head(model: Any, kind: str) -> tuple[str, QuantisedHead | None, str]:
    """Replace a model's output head by a QuantisedHead; returns its name, and the new head or why there is none."""
    head = head_of(model)
    name = next(name for name, module in model.named_modules() if module is head)
    why = why_not_8_bits(head)
    if why:
        return name, None, why
    embedding = model.get_input_embeddings()
    stored = QuantisedHead(head, kind, embedding if getattr(embedding, "weight", None) is head.weight else None)
    model.set_submodule(name, stored)
    return name, stored, ""


def why_not_8_bits(head: nn.Module) -> str:
    """Why the weight of an output head cannot be stored in 8 bits; empty if it can."""
    if isinstance(head, Changed) or type(head) is not nn.Linear:
        return f"it is {type(head).__name__}, not torch.nn.Linear"
    why = why_stays(head)
    if why:
        return why
    if not head.weight.is_floating_point() or head.weight.dtype == torch.float64:
        return f"its weight is {head.weight.dtype}"
    return "" if head.out_features % 16 == 0 else f"its {head.out_features} outputs are not divisible by 16"


def _stock_state(head: QuantisedHead, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    tied = head.tied
    state[f"{prefix}weight"] = head.dequantised(head.like.dtype) if tied is None else tied.weight.detach()  # type: ignore[operator]
