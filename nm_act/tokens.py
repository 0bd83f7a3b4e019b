"""Which tokens of a call are the first of their sequence or padding, for recipes that treat those apart."""

import inspect

import torch
from torch.utils._pytree import tree_leaves


class TokenContext:
    """Tells every :class:`~nm_act.NMLinear` of a model what the tokens of the running call are.

    That is: which are computed dense, and for criteria that read a whole sequence (clact) where each one is and which
    of its tokens are padding.

    The first tokens of a sequence act as attention sinks; pruning their activations costs more accuracy
    than their share of the work saves (TEAL and WINA leave them dense). Two hooks on the decoder stack fill
    and clear the context around every call; layers read it.

    A token's position in its sequence comes from ``position_ids``, else from the 2-D ``attention_mask``,
    else from the length of the KV cache. Padding is never a first token. Where there is no padding the
    first tokens of a call are a slice; otherwise their rows are gathered. The hook reads one flag back from
    the device per call that brings positions or a mask, and is not traced by ``torch.compile`` (the graph
    breaks in front of the decoder stack).

    Parameters
    ----------
    first_tokens : int
        Tokens per sequence that are computed dense; may be 0.
    """

    def __init__(self, first_tokens: int):
        self.first_tokens = first_tokens
        self._shape = (0, 0)  # (batch, tokens) of the running call
        self._rows: slice | torch.Tensor | None = None  # along the tokens, or [batch * tokens] indices
        self._valid: torch.Tensor | None = None  # [batch, tokens] bool, False for padding

    def attach(self, stack: torch.nn.Module) -> None:
        """Install the hooks on the module that owns the decoder layers."""
        stack.register_forward_pre_hook(self._begin, with_kwargs=True)
        # Cleared even after an exception: a layer called on its own later must not see these rows.
        stack.register_forward_hook(self._end, always_call=True)

    def overwrite_dense(self, y: torch.Tensor, x: torch.Tensor, dense) -> torch.Tensor:
        """Replace the rows of the call's first tokens in ``y [..., out]`` by ``dense(x rows)``.

        ``x`` holds the call's tokens as [batch, tokens, in] or flattened to [batch * tokens, in]. A layer
        that sees other tokens (an expert of a mixture) cannot tell which are first and stays as it is.
        """
        if self._rows is None or x.shape[:-1].numel() != self._shape[0] * self._shape[1]:
            return y
        if isinstance(self._rows, slice):
            tokens, rows = x.reshape(*self._shape, x.shape[-1]), (slice(None), self._rows)
        else:
            tokens, rows = x.reshape(-1, x.shape[-1]), self._rows
        flat = y.reshape(*tokens.shape[:-1], y.shape[-1])
        flat[rows] = dense(tokens[rows])
        return flat.reshape(y.shape)

    def sequences(self, x: torch.Tensor, default: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x [..., in]`` as sequences [batch, tokens, in] and which tokens are no padding (None: all).

        ``default`` is returned for a layer that sees other tokens than the running call's.
        """
        if x.shape[:-1].numel() != self._shape[0] * self._shape[1]:
            return default, None
        return x.reshape(*self._shape, x.shape[-1]), self._valid

    @torch.compiler.disable
    def _begin(self, module, args, kwargs) -> None:
        call = {**inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments, **kwargs}
        inputs = (call.get("input_ids"), call.get("inputs_embeds"), *args)
        tokens = next((tensor for tensor in inputs if isinstance(tensor, torch.Tensor)), None)
        if tokens is None:  # the stack itself will say that its input is missing
            return
        leading = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
        self._shape = (leading[:-1].numel(), leading[-1])
        mask = call.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            self._valid = mask[:, -self._shape[1] :].bool().expand(self._shape)
        if self.first_tokens:
            self._rows = self._first_rows(call.get("position_ids"), mask, call.get("past_key_values"))

    def begin_whole_sequences(self, batch: int, tokens: int) -> None:
        """A call of blocks without their stack begins: whole sequences, no padding."""
        self._shape = (batch, tokens)
        self._rows = slice(0, min(self.first_tokens, tokens)) if self.first_tokens else None

    def end(self) -> None:
        """The running call is over."""
        self._rows = self._valid = None
        self._shape = (0, 0)

    def _end(self, module, args, output) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._resume_in_backward(output)
        self.end()

    def _resume_in_backward(self, output) -> None:
        """Gradient checkpointing runs layers again inside the backward pass, where the stack is not called.

        The gradient of what the stack returns comes before those of its layers: with it the call is running again, to
        the end of the backward pass.
        """
        state = self._shape, self._rows, self._valid

        def resume(_gradient) -> None:
            self._shape, self._rows, self._valid = state
            torch.autograd.Variable._execution_engine.queue_callback(self.end)

        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(resume)

    def _first_rows(self, positions, mask, cache) -> slice | torch.Tensor | None:
        batch, tokens = self._shape
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        positions = positions if positions is not None and positions.ndim == 2 else None
        if positions is None and mask is None:
            left = self.first_tokens - (0 if cache is None else int(cache.get_seq_length()))
            return slice(0, min(left, tokens)) if left > 0 else None
        if positions is None:
            positions = (mask.long().cumsum(dim=-1) - 1)[:, -tokens:]
        first = (positions < self.first_tokens).expand(batch, tokens)
        if mask is not None:
            first = first & mask[:, -tokens:].bool()
        rows = first.flatten().nonzero().squeeze(-1)
        if rows.numel() == 0:
            return None
        # Equal to the slice of a batch without padding?
        leading = int(first[0].sum())
        if rows.numel() == leading * batch and bool(first[:, :leading].all()):
            return slice(0, leading)
        return rows
