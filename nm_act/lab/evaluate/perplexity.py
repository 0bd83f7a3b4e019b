"""Perplexity of a causal language model over a text, in non-overlapping windows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

DEFAULT_WINDOW = 2048
"""Tokens per window if the model's context allows it; published WikiText-2 figures use this value."""

_SCORED_AT_ONCE = 256  # rows of logits in one softmax: bounds the float32 copy to 256 x vocabulary


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`."""

    value: float  # exp(nll / tokens); inf if that overflows, NaN if the model gave NaN
    nll: float  # sum of the negative log-likelihoods, nats
    tokens: int  # predicted ones: one less than the window's length, for each window
    windows: int
    window: int  # tokens per window
    window_nll: tuple[float, ...] = ()  # nats, of each window

    @property
    def window_losses(self) -> list[float]:
        """Mean negative log-likelihood per token of each window."""
        return [nll * self.windows / self.tokens for nll in self.window_nll]

    @property
    def stderr(self) -> float:
        """Standard error of `value` over the windows, ``value * stderr(window_losses)``; NaN for one window."""
        return self.value * mean_and_stderr(self.window_losses)[1]


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of the count; NaN for one value)."""
    array = np.asarray(values, dtype=np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def paired_difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean difference of the losses of the same windows, in nats per token, and its standard error.

    Examples
    --------
    >>> mean, stderr = paired_difference([3.0, 4.0, 5.0], [2.9, 3.8, 4.9])
    >>> round(mean, 3), round(stderr, 3)
    (0.133, 0.033)
    """
    return mean_and_stderr([one - other for one, other in zip(ours, theirs, strict=True)])


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    token_ids: torch.Tensor,
    *,
    window: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity over consecutive windows that do not overlap.

    ``exp(-1/T * sum log p(token | earlier tokens of its window))`` over the T tokens that are not the first of their
    window. Log-probabilities are float32 whatever the model's dtype, their sum is float64. A tail shorter than a window
    is left out, so that every window has the same context; a text shorter than one window is a single, shorter window
    (``result.window``).

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers causal language model; in training mode again afterwards if it was before.
    token_ids : torch.Tensor
        int64, ``[tokens]``, as from `nm_act.lab.texts.tokenize`.
    window : int, optional
        Tokens per window. By default 2048, or the model's context if that is shorter.
    progress : callable, optional
        Called after every window with the number of finished windows, their total, and the perplexity so far.

    Raises
    ------
    ValueError
        If there are fewer than two tokens, or the window is below two or above the model's context.
    """
    window = check_window(model, window)
    if token_ids.ndim != 1 or token_ids.numel() < 2:
        raise ValueError(f"expected at least 2 tokens in one dimension, got {list(token_ids.shape)}; use a longer text")
    window = min(window, token_ids.numel())
    total = token_ids.numel() // window
    device = next(model.parameters()).device
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for index in range(total):
            ids = token_ids[index * window : (index + 1) * window].to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            losses.append(_negative_log_likelihood(logits[:-1], ids[1:]))
            if progress is not None:
                progress(index + 1, total, _exp(sum(losses) / (len(losses) * (window - 1))))
    finally:
        model.train(was_training)
    nll, tokens = sum(losses), total * (window - 1)
    return Perplexity(_exp(nll / tokens), nll, tokens, total, window, tuple(losses))


def check_finite(value: float) -> None:
    """Raise a RuntimeError if the perplexity of the dense model, the reference of all others, is not finite."""
    if not math.isfinite(value):
        raise RuntimeError(
            f"expected a finite perplexity of the dense model, got {value}; "
            "the checkpoint is damaged or its dtype overflows, try --dtype float32"
        )


def context_length(model: Any) -> int | None:
    """Largest number of positions of a model or a Transformers configuration; None if unknown."""
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None)


def check_window(model: Any, window: int | None, what: str = "a window") -> int:
    """`window`, or by default the smaller of 2048 and the model's context; ValueError if it exceeds the context."""
    context = context_length(model)
    if window is None:
        return DEFAULT_WINDOW if context is None else min(DEFAULT_WINDOW, context)
    if window < 2:
        raise ValueError(f"expected {what} of at least 2 tokens, got {window}; the first token of one is not scored")
    if context is not None and window > context:
        raise ValueError(f"expected {what} within the model's context of {context} tokens, got {window}; shorten it")
    return window


def _negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed negative log-probability of targets ``[tokens]`` under logits ``[tokens, vocabulary]``."""
    parts = zip(logits.split(_SCORED_AT_ONCE), targets.split(_SCORED_AT_ONCE), strict=True)
    losses = (nn.functional.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts)
    return sum(loss.double().sum().item() for loss in losses)


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
