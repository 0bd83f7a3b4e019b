"""Finds the first tokens of each sequence and the padding in a call; some recipes treat them differently."""

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, eq=False)
class _Call:
    """What layers need to know about the tokens of a running call of the decoder stack."""

    stack: torch.nn.Module | None
    shape: tuple[int, int]  # (batch, tokens)
    rows: slice | torch.Tensor | None = None  # the first tokens: along the tokens, or [batch * tokens] indices
    valid: torch.Tensor | None = None  # [batch, tokens] bool, False for padding
    positions: torch.Tensor | None = None  # [batch or 1, tokens]
    packed: str = ""  # name of the argument that marks rows of several requests
    outer: "_Call | None" = None  # the enclosing call
    backward: int | None = None  # id of the backward pass in which checkpointed layers of this call run again

    @cached_property
    def mixed(self) -> str:
        """Why a row of the call holds several sequences; empty if it holds one. Synchronises with the device once."""
        if self.packed:
            return f"requests packed into one ({self.packed}, as generate_batch passes it)"
        positions, tokens = self.positions, self.shape[1]
        if positions is None or tokens == 1 or positions.shape[-1] != tokens:
            return ""
        if positions.is_cuda and torch.cuda.is_current_stream_capturing():  # values cannot be read during a capture
            return ""
        back = positions[:, 1:] < positions[:, :-1]
        if self.valid is not None:  # padding may have any position
            valid = self.valid.to(back.device)
            back = back & valid[:, 1:] & valid[:, :-1]
        return "position_ids that start again within a row" if bool(back.any()) else ""


class TokenContext:
    """Tells every :class:`~nm_act.NMLinear` of a model what the tokens of the running call are.

    It says which tokens are computed dense and, for criteria that read a whole sequence (clact), where each sequence is
    and which of its tokens are padding.

    The first tokens of a sequence act as attention sinks; pruning their activations costs more accuracy than their
    share of the work saves (TEAL and WINA leave them dense). Two hooks on the decoder stack begin and end a call around
    every forward, and the layers read that call. Running calls are kept per thread, so that several threads may run one
    model.

    A token's position in its sequence comes from ``position_ids``, else from the 2-D ``attention_mask``, else from the
    length of the KV cache (any argument with a ``get_seq_length``). Padding is never a first token. Without padding the
    first tokens of a call are a slice; with padding their rows are gathered. In a call with positions or a mask, the
    hook reads one or two flags back from the device. ``torch.compile`` does not trace the hook: the graph breaks before
    the decoder stack.

    Parameters
    ----------
    first_tokens : int
        Tokens per sequence that are computed dense; may be 0.

    Notes
    -----
    A call of the stack raises a ValueError if the positions of its tokens are unknown (a state other than a KV cache
    and no positions; a mask that does not cover the cache), or if clact gets several sequences in one row. Gradient
    checkpointing runs blocks again in the backward pass: the call is active again from the gradient of the stack's
    outputs on, and a RuntimeError is raised if blocks run again without it.
    """

    def __init__(self, first_tokens: int):
        self.first_tokens = first_tokens
        # Thread-local rather than a context variable, because torch.compile traces only reads of the former.
        self._here = threading.local()

    def __getstate__(self) -> dict[str, int]:
        return {"first_tokens": self.first_tokens}  # running calls are not copied

    def __setstate__(self, state: dict[str, int]) -> None:
        TokenContext.__init__(self, **state)

    def attach(self, stack: torch.nn.Module) -> None:
        """Install the hooks on the module that owns the decoder layers."""
        stack.register_forward_pre_hook(self._begin, with_kwargs=True)
        # always_call ends the call after an exception too: a layer called on its own later must not see these rows.
        stack.register_forward_hook(self._end, always_call=True)

    def overwrite_dense(
        self, y: torch.Tensor, x: torch.Tensor, dense: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Replace the rows of the call's first tokens in ``y [..., out]`` by ``dense(x rows)``.

        ``x`` holds the call's tokens as [batch, tokens, in] or flattened to [batch * tokens, in]. A layer
        that sees other tokens (an expert of a mixture) cannot tell which are first: its ``y`` is returned unchanged.
        """
        call = self._call_of(x)
        if call is None or call.rows is None:
            return y
        rows: Any
        if isinstance(call.rows, slice):
            tokens, rows = x.reshape(*call.shape, x.shape[-1]), (slice(None), call.rows)
        else:
            tokens, rows = x.reshape(-1, x.shape[-1]), call.rows.to(x.device)
        flat = y.reshape(*tokens.shape[:-1], y.shape[-1])
        flat[rows] = dense(tokens[rows])
        return flat.reshape(y.shape)

    def sequences(self, x: torch.Tensor, default: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x [..., in]`` as sequences [batch, tokens, in], and a mask that is False for padding (None: no padding).

        ``default`` is returned for a layer that sees other tokens than the running call's. Raises ValueError if a row
        of the running call holds tokens of several sequences.
        """
        call = self._call_of(x)
        if call is None:
            return default, None
        if call.mixed:
            raise ValueError(
                f"expected one sequence a row for clact, which ranks channels by all tokens of a sequence, got "
                f"{call.mixed}; use generate with padding, or another criterion"
            )
        return x.reshape(*call.shape, x.shape[-1]), None if call.valid is None else call.valid.to(x.device)

    def begin_whole_sequences(self, batch: int, tokens: int) -> None:
        """Begin a call of blocks without their stack, on whole sequences without padding."""
        rows = slice(0, min(self.first_tokens, tokens)) if self.first_tokens else None
        self._here.call = _Call(None, (batch, tokens), rows, outer=self._running())

    def end(self) -> None:
        """End the running call."""
        self._here.call = self._here.call.outer

    def _running(self) -> _Call | None:
        call = getattr(self._here, "call", None)
        while call is not None and call.backward is not None and call.backward != torch._C._current_graph_task_id():
            call = call.outer  # that backward pass is over
        return call

    def _call_of(self, x: torch.Tensor) -> _Call | None:
        """The running call, if ``x`` holds its tokens."""
        call = self._running()
        if call is None:
            _refuse_rerun()
            return None
        return call if x.shape[:-1].numel() == call.shape[0] * call.shape[1] else None

    @torch.compiler.disable
    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        inputs = (call.get("input_ids"), call.get("inputs_embeds"), call.get("hidden_states"), *args)
        tokens = next((tensor for tensor in inputs if isinstance(tensor, torch.Tensor)), None)
        if tokens is None:  # the stack itself reports a missing input
            return
        leading = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
        shape = (leading[:-1].numel(), leading[-1])
        mask, positions = call.get("attention_mask"), _positions(call)
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        needed = mask is not None or (positions is None and self.first_tokens)
        past = _cached_tokens(call) if needed else None
        valid = None
        if mask is not None:
            mask = _up_to_now(mask, past, shape[1])
            valid = mask[:, mask.shape[1] - shape[1] :].bool().expand(shape)
        rows = self._first_rows(shape, positions, mask, valid, past) if self.first_tokens else None
        packed = next((name for name, value in call.items() if _says_packed(name) and value is not None), "")
        self._here.call = _Call(module, shape, rows, valid, positions, packed, self._still_running(module))

    def _still_running(self, stack: torch.nn.Module) -> _Call | None:
        """The running call that encloses a new one of ``stack``."""
        outer = call = self._running()
        while call is not None:
            # A call of this stack that is not on Python's call stack was interrupted without its end hook (Ctrl-C).
            if call.stack is stack and _depth(stack) == 1:
                outer = call.outer
            call = call.outer
        return outer

    def _end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._running()
        if call is not None and call.stack is module:  # else the begin hook refused the call
            self.end()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._resume_in_backward(call, output)

    def _resume_in_backward(self, call: _Call, output: Any) -> None:
        """Make the call active again in the backward pass, where gradient checkpointing runs layers but not the stack.

        The gradient of the stack's outputs is computed before those of its layers, so hooks on the outputs do it.
        """

        def resume(_gradient: torch.Tensor) -> None:
            backward = torch._C._current_graph_task_id()
            outer = getattr(self._here, "call", None)
            while outer is not None and outer.backward is not None:
                outer = outer.outer
            self._here.call = replace(call, outer=outer, backward=backward)

        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:  # a leaf would keep the hook
                tensor.register_hook(resume)

    def _first_rows(
        self,
        shape: tuple[int, int],
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        past: int | None,
    ) -> slice | torch.Tensor | None:
        batch, tokens = shape
        if positions is None and past is None and (mask is None or mask.shape[1] == tokens):
            raise ValueError(
                "expected position_ids or a KV cache with get_seq_length to tell which tokens are first in their "
                "sequence, got a state of another kind; pass position_ids, or a recipe without dense_first_tokens"
            )
        if positions is None:
            if mask is None:
                left = self.first_tokens - (past or 0)
                return slice(0, min(left, tokens)) if left > 0 else None
            positions = (mask.long().cumsum(dim=-1) - 1)[:, -tokens:]
        first = (positions < self.first_tokens).expand(batch, tokens)
        if valid is not None:
            first = first & valid.to(first.device)
        rows = first.flatten().nonzero().squeeze(-1)
        if rows.numel() == 0:
            return None
        # Equal to the slice of a batch without padding?
        leading = int(first[0].sum())
        if rows.numel() == leading * batch and bool(first[:, :leading].all()):
            return slice(0, leading)
        return rows


def _depth(module: torch.nn.Module) -> int:
    """How many calls of a module this thread is in."""
    frame: FrameType | None = sys._getframe()
    depth = 0
    while frame is not None:
        if frame.f_code is torch.nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            depth += 1
        frame = frame.f_back
    return depth


def _positions(call: dict[str, Any]) -> torch.Tensor | None:
    """Positions of the call's tokens, ``[batch or 1, tokens]``; None if the call has none."""
    for name in ("position_ids", "cache_position"):
        positions = call.get(name)
        if isinstance(positions, torch.Tensor) and positions.ndim in (1, 2):
            return positions if positions.ndim == 2 else positions[None]
    return None


def _cached_tokens(call: dict[str, Any]) -> int | None:
    """Number of tokens in the call's state, 0 without a state; None if the state does not tell."""
    for value in call.values():
        if not callable(getattr(value, "get_seq_length", None)):
            continue
        try:
            return int(value.get_seq_length())
        except ValueError:  # a state without attention layers tells only whether it is empty
            return None if value.has_previous_state() else 0
    return None if any(_is_state(name, value) for name, value in call.items()) else 0


def _is_state(name: str, value: Any) -> bool:
    """Whether an argument is the state of earlier calls: tuples of tensors per layer, or something named a cache."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return False
    if name in ("state", "mems"):  # RWKV, Transformer-XL
        return True
    if isinstance(value, (tuple, list)):
        return any(isinstance(layer, (tuple, list)) for layer in value)
    return any(word in text.lower() for word in ("cache", "past") for text in (name, type(value).__name__))


def _up_to_now(mask: torch.Tensor, past: int | None, tokens: int) -> torch.Tensor:
    """The columns of a 2-D mask for cached tokens and those of the call; a mask of a static cache has more columns."""
    if mask.shape[1] < (past or 0) + tokens:
        raise ValueError(
            f"expected an attention_mask over {past or 0} cached and {tokens} new tokens, got {mask.shape[1]} columns; "
            "pass the whole mask, or none"
        )
    return mask if past is None else mask[:, : past + tokens]


def _says_packed(name: str) -> bool:
    return name.startswith(("cu_seq_lens", "cu_seqlens")) or name == "seq_idx"


def _refuse_rerun() -> None:
    """Refuse a layer that autograd runs again after its call has ended, when its tokens are unknown."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if torch._C._current_graph_task_id() != -1:  # a backward pass is running (torch.utils.checkpoint tests it so)
        raise RuntimeError(
            "expected a gradient that comes through what the decoder stack returns, got a layer with "
            "dense_first_tokens or clact that is run again in the backward pass without it; compute the loss from the "
            "stack's outputs, or call model.gradient_checkpointing_disable()"
        )
