"""Attention over the filled part of a static cache, as one of Transformers' attention implementations.

``model.set_attn_implementation("nm_act_static")`` chooses it for a model; StaticDecoder uses it for its own steps. A
decode step then gets, in place of a mask, the number of filled tokens, which the kernel reads on the device.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

_varlen_options = frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)

logger = logging.getLogger(__name__)

ATTENTION = "nm_act_static"
"""Name of :func:`static_attention` among Transformers' attention implementations."""

_fits: dict[tuple[Any, ...], bool] = {}
"""(heads, key heads, dim, windowed, dtype, device type and index) -> whether torch's flash attention works."""


def register() -> None:
    """Make :func:`static_attention` and its masks known to Transformers under the name :data:`ATTENTION`.

    Raises ImportError if Transformers has no attention or no mask interface.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"expected AttentionInterface and AttentionMaskInterface in Transformers, got: {error}; install a version "
            "that nm-act info lists as tested"
        ) from error
    AttentionInterface.register(ATTENTION, static_attention)
    AttentionMaskInterface.register(ATTENTION, static_mask)


def static_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """Attention over the filled part of a static cache, in the form of Transformers' attention interface.

    Parameters
    ----------
    query : Tensor [batch, heads, tokens, dim]
    key, value : Tensor [batch, key_heads, max_tokens, dim]
        The whole cache, new tokens included.
    attention_mask : Tensor, optional
        int32 ``[batch, 1, 1, 1]``: number of filled tokens, new ones included, the same for all sequences; several new
        tokens are a prompt at the start of the cache, as they are without a mask. bool ``[batch, 1, tokens,
        max_tokens]``: True where a token attends to a place in the cache.

    Returns
    -------
    Tensor [batch, tokens, heads, dim], and None
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        return _masked(query, key, value, attention_mask, scaling), None
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    prompt = tokens > 1 or attention_mask is None
    if prompt:
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None
    if prompt and window is None:
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        return y.transpose(1, 2).contiguous(), None
    case = _case(query.shape[1], key.shape[1], query.shape[3], window is not None, query.dtype, query.device)
    if _fits.get(case, False):
        # The window counts the keys before the query itself.
        sides = (-1, -1) if window is None else (window - 1, 0)
        if prompt or attention_mask is None:
            return _flash_prompt(query, key, value, scaling, sides), None
        return _flash_step(query, key, value, attention_mask, scaling, sides), None
    if prompt or attention_mask is None:
        last = torch.arange(tokens, device=query.device)[:, None]
    else:
        last = attention_mask - 1
    columns = torch.arange(key.shape[2], device=query.device)
    mask = columns <= last
    if window is not None:
        mask = mask & (columns > last - window)
    return _masked(query, key, value, mask, scaling), None


def static_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor | None:
    """The mask that :func:`static_attention` takes for a call, in the form of Transformers' mask interface.

    None for a prompt at the start of the cache, the number of filled tokens ``[batch, 1, 1, 1]`` for one new token per
    sequence, and Transformers' own mask ``[batch, 1, q_length, kv_length]`` for everything else.

    Raises
    ------
    ValueError
        If a prompt is padded: the steps after it would attend to the padding.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    causal = mask_function in (None, causal_mask_function)
    # Of other masks only the window of a layer reaches the attention, which applies it.
    causal = causal or (local_size is not None and local_size == getattr(config, "sliding_window", None))

    tracing = torch.compiler.is_compiling()
    if attention_mask is not None and not tracing and (q_length > 1 or not attention_mask.is_cuda):
        if not bool(attention_mask.all()):
            raise ValueError(
                f"expected prompts without padding for attention {ATTENTION}, got an attention mask with "
                f"{int((~attention_mask.bool()).sum())} padded tokens; call model.set_attn_implementation('sdpa')"
            )
        attention_mask = None
    if q_length == 1 and causal and not (tracing and attention_mask is not None):
        if config is not None and not tracing:
            try_flash(config, dtype, torch.device(device))
        filled = torch.as_tensor(q_offset + (1 - kv_offset), dtype=torch.int32, device=device)
        return filled.clamp(max=kv_length).view(-1, 1, 1, 1).expand(batch_size, 1, 1, 1)
    plain = causal and allow_is_causal_skip and attention_mask is None
    if plain and not (tracing and isinstance(q_offset, Tensor)) and int(q_offset) == 0:
        return None
    options |= {"attention_mask": attention_mask, "allow_is_causal_skip": False, "device": device}
    options |= {} if mask_function is None else {"mask_function": mask_function}
    sizes: tuple[Any, ...] = (batch_size, q_length, kv_length, q_offset, kv_offset)
    return sdpa_mask(*sizes, **options)


def try_flash(config: Any, dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether torch's flash attention supports lengths on the device, and windows; tried once on a small cache.

    If so, :func:`static_attention` uses it from then on; otherwise a logged line says so.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    windowed = bool(getattr(config, "sliding_window", None))
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    case = (config.num_attention_heads, config.num_key_value_heads, dim, windowed, dtype, device)
    if _case(*case) not in _fits:
        _try_flash(*case)
    return _fits[_case(*case)]


def _case(
    heads: int, key_heads: int, dim: int, windowed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    return heads, key_heads, dim, windowed, dtype, device.type, device.index


@torch.inference_mode()
def _try_flash(heads: int, key_heads: int, dim: int, windowed: bool, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    query, key, value = draw(2, heads, 100, dim), draw(2, key_heads, 512, dim), draw(2, key_heads, 512, dim)
    cases = [_case(heads, key_heads, dim, each, dtype, device) for each in {False, windowed}]
    try:
        for window, tokens in ((None, 1), (64, 1), (64, 100)) if windowed else ((None, 1),):
            filled = torch.full((2, 1, 1, 1), 300 if tokens == 1 else tokens, dtype=torch.int32, device=device)
            options: dict[str, Any] = {"scaling": dim**-0.5, "sliding_window": window, "attention_mask": filled}
            _fits.update(dict.fromkeys(cases, False))
            masked, _ = static_attention(None, query[:, :, :tokens], key, value, **options)
            _fits.update(dict.fromkeys(cases, True))
            flash, _ = static_attention(None, query[:, :, :tokens], key, value, **options)
            torch.testing.assert_close(flash, masked, atol=2e-2, rtol=2e-2)
    except (RuntimeError, TypeError, AssertionError) as error:  # other versions reject or ignore these arguments
        reason = str(error).strip().split("\n")[0]
        logger.warning(
            "expected flash attention with lengths on the device (torch.nn.attention.varlen), got from torch %s: %s; "
            "every step masks the whole cache",
            torch.__version__,
            reason,
        )
        _fits.update(dict.fromkeys(cases, False))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, window_size: tuple[int, int], **options: Any
) -> Tensor:
    """Attention of packed sequences ``[tokens, heads, dim]``, by torch's public function where it takes lengths."""
    if "seqused_k" in _varlen_options:
        if "enable_gqa" in _varlen_options:  # before, heads were not compared
            options["enable_gqa"] = query.shape[1] > key.shape[1]
        y: Any = varlen_attn(query, key, value, *arguments, window_size=window_size, **options)
    else:  # what the public function calls, with the lengths that torch 2.11 has here only
        options |= dict(zip(("window_size_left", "window_size_right"), window_size, strict=True))
        y = torch.ops.aten._flash_attention_forward(query, key, value, *arguments, 0.0, False, False, **options)[0]
    result: Tensor = y
    return result


def _flash_step(
    query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scaling: float | None, window: tuple[int, int]
) -> Tensor:
    """Attention of one token per sequence, with sequences of one length; ``[batch, 1, heads, dim]``.

    The sequences are treated as heads of one sequence: their caches are contiguous, and a group of heads still shares
    its keys.
    """
    batch, heads, _, dim = query.shape
    most = key.shape[2]
    starts = torch.arange(2, dtype=torch.int32, device=query.device)
    y = _flash(
        query.reshape(1, batch * heads, dim),
        key.flatten(0, 1).transpose(0, 1),
        value.flatten(0, 1).transpose(0, 1),
        starts,
        starts * most,
        1,
        most,
        scale=scaling,
        window_size=window,
        seqused_k=filled.flatten()[:1],
    )
    return y.view(batch, 1, heads, dim)


def _flash_prompt(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: tuple[int, int]) -> Tensor:
    """Attention of prompts longer than the window; ``[batch, tokens, heads, dim]``."""
    batch, _, tokens, _ = query.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * tokens
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    y = _flash(*rows, starts, starts, tokens, tokens, scale=scaling, window_size=window)
    return y.view(batch, tokens, *y.shape[1:])


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Attention with a mask ``[batch or 1, 1, tokens, max_tokens]``; ``[batch, tokens, heads, dim]``."""
    batch, heads, tokens, dim = query.shape
    groups = heads // key.shape[1]
    if tokens == 1:
        # The queries of a group share their keys, so they are rows of one product.
        query = query.reshape(batch, key.shape[1], groups, dim)
    else:
        # With a mask, only torch's slow kernel supports grouped heads.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    with _no_cudnn(query):
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return y.reshape(batch, 1, heads, dim) if tokens == 1 else y.transpose(1, 2).contiguous()


def _no_cudnn(query: Tensor) -> AbstractContextManager[Any]:
    """Masked attention by torch's own kernels, because cuDNN, which torch prefers on Hopper, may reject such masks."""
    if not query.is_cuda:
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
