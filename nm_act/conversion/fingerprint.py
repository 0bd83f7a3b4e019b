"""A fingerprint of a model's weights: one digest over the name, shape and values of every parameter."""

import hashlib

import torch
from torch import nn


def weights_fingerprint(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 of all parameters, rounded to ``dtype``, as 64 hexadecimal digits; independent of device and threads.

    Because of the rounding, a float32 checkpoint and its bfloat16 cast have the same fingerprint. So have a dense model
    and its sparse form, whose parameters are the same. Reordering a weight changes it, as does any change of a value
    beyond the rounding. ``dtype`` is bfloat16, or float16 for a model that may have been rounded to it before. Raises
    ValueError if a parameter has no values yet (meta device).

    Examples
    --------
    >>> layer = nn.Linear(4, 2)
    >>> weights_fingerprint(layer) == weights_fingerprint(layer.bfloat16())
    True
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if value.is_meta:
            raise ValueError(f"expected loaded weights, got {name} on the meta device; load the checkpoint first")
        digest.update(f"{name} {list(value.shape)}\n".encode())
        # Bit patterns as int16, because NumPy has no bfloat16.
        digest.update(value.detach().to(dtype).cpu().contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()
