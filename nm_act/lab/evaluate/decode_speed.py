"""Decode speed of several models, measured in turns so that all run under the same conditions."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ...layers.kv_cache import cache_argument, cache_of


@dataclass(frozen=True)
class DecodeSpeed:
    """Decode speed of one model in tokens per second, one sample per round.

    Samples of equal index of all models of one `decode_speed` call were measured next to each other, at the same cache
    length.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median tokens per second."""
        return float(np.median(self.samples))

    @property
    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile of the tokens per second."""
        low, high = np.percentile(self.samples, [20, 80])
        return float(low), float(high)

    def speedup_over(self, other: "DecodeSpeed") -> "DecodeSpeed":
        """Ratio to `other`, round by round, so that whatever slows a round of both models cancels out.

        Raises ValueError if the two have different numbers of rounds, and so were not measured together.
        """
        if len(self.samples) != len(other.samples):
            raise ValueError(
                f"expected two results of one measurement, got {len(self.samples)} and {len(other.samples)} rounds; "
                "measure both in one call"
            )
        return DecodeSpeed(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))


class _Decoder:
    """Greedy decoding of one model with a KV cache, resumable between segments."""

    def __init__(self, model: nn.Module, input_ids: torch.Tensor):
        self.model = model
        self.cache_name = cache_argument(model)
        self.device = next(model.parameters()).device
        output = model(input_ids=input_ids.to(self.device), use_cache=True)
        self.cache = cache_of(output)
        self.token = output.logits[:, -1:].argmax(dim=-1)

    def run(self, steps: int) -> float:
        """Decode `steps` tokens; returns the seconds."""
        self._synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            output = self.model(input_ids=self.token, use_cache=True, **{self.cache_name: self.cache})
            self.cache = cache_of(output)
            self.token = output.logits[:, -1:].argmax(dim=-1)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.inference_mode()
def decode_speed(
    models: Mapping[str, nn.Module],
    input_ids: torch.Tensor,
    *,
    rounds: int = 9,
    steps: int = 8,
    warmup: int = 1,
    max_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, DecodeSpeed]:
    """Tokens per second of greedy decoding with a KV cache, for several models in one interleaved run.

    Every model reads the prompt once, which is not timed. Then, round by round, each decodes the next `steps` tokens;
    the model that goes first changes with the round. A machine that slows down or is shared therefore slows all models
    alike, and models are compared at equal cache length only. End-of-sequence tokens do not stop decoding.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module
        Name -> Transformers causal language model.
    input_ids : torch.Tensor
        The prompt, int64, ``[batch, tokens]``.
    rounds, steps : int
        Number of counted rounds, and of decoded tokens in each.
    warmup : int
        Number of rounds before those.
    max_seconds : float, optional
        After this time no round starts, except that at least one is counted.
    progress : callable, optional
        Called after every round with the number of finished rounds and their total, warm-up included.

    Returns
    -------
    dict of str to DecodeSpeed
        In the order of `models`. Tokens of all sequences of the batch count.

    Raises
    ------
    ValueError
        If there is no model, the prompt is not ``[batch, tokens]`` with at least one token, or a count is out of range.
    """
    if not models:
        raise ValueError("expected at least one model to measure, got none; add one")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"expected a prompt of shape [batch, tokens], got {list(input_ids.shape)}; add a token")
    if rounds < 1 or steps < 1 or warmup < 0:
        raise ValueError(
            f"expected rounds >= 1, steps >= 1, warmup >= 0, got {rounds}, {steps}, {warmup}; correct them"
        )
    names = list(models)
    decoders = {name: _Decoder(models[name], input_ids) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for index in range(warmup + rounds):
        if max_seconds is not None and index > warmup and time.perf_counter() - start > max_seconds:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds = decoders[name].run(steps)
            if index >= warmup:
                samples[name].append(steps * input_ids.shape[0] / seconds)
        if progress is not None:
            progress(index + 1, warmup + rounds)
    return {name: DecodeSpeed(tuple(values)) for name, values in samples.items()}
