"""The name of the KV cache in Transformers' calls and outputs: `cache` from 5.24 on, `past_key_values` before."""

import inspect
from typing import Any

from torch import nn


def cache_argument(model: nn.Module) -> str:
    """Name of the KV cache argument of ``model.forward``; TypeError if the model has no such argument."""
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if name is None:
        raise TypeError(
            f"expected a model that takes a KV cache, got {type(model).__name__}, whose forward has neither cache nor "
            "past_key_values; use a decoder-only Transformers model"
        )
    return name


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
