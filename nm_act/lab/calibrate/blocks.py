"""Running a decoder one block at a time."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ...layers.linear import NMLinear, sparse_layers


def at_once(device: torch.device) -> int:
    """Number of windows in one call of a block: one keeps a CPU busy, but a GPU needs more."""
    return 1 if device.type == "cpu" else 8


class _ReachedError(Exception):
    """The model's forward has reached its first block; the rest is not needed."""


class BlockRunner:
    """The decoder blocks of a sparse, decoder-only Transformers model, called with one window at a time.

    The arguments besides the hidden states are recorded with one `window` (``[length]``, int64). All other windows have
    the same length, and therefore the same masks and positions. Raises ValueError if the model has no sparse layer, or
    its blocks are not in one list.
    """

    def __init__(self, model: nn.Module, window: torch.Tensor):
        self.model = model
        self.names = block_names(model)
        self._arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        with torch.no_grad(), ExitStack() as hooks:
            for name in self.names:

                def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                    kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                    self._arguments[name] = args[1:], kwargs

                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True))
            self._call(window)

    def _call(self, window: torch.Tensor) -> None:
        self.model(input_ids=window[None].to(next(self.model.parameters()).device), use_cache=False)

    @torch.no_grad()
    def first_inputs(self, windows: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[windows, length, hidden]`` that enter the first block."""
        inputs = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _ReachedError

        with self.block(0).register_forward_pre_hook(record, with_kwargs=True):
            for window in windows:
                with suppress(_ReachedError):
                    self._call(window)
        return torch.cat(inputs)

    def block(self, index: int) -> nn.Module:
        """The block itself."""
        return self.model.get_submodule(self.names[index])

    def layers(self, index: int) -> dict[str, NMLinear]:
        """Sparse layers of a block by their full names."""
        prefix = self.names[index]
        return {f"{prefix}.{name}": layer for name, layer in sparse_layers(self.block(index)).items()}

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of a block for the ``hidden [windows, length, hidden]`` of some windows."""
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(hidden.device), self._arguments[self.names[index]])
        # The decoder stack, whose hooks tell the layers where sequences start, is not called, so do this here.
        found = {id(layer.token_context): layer.token_context for layer in self.layers(index).values()}
        contexts = [context for context in found.values() if context is not None]
        for context in contexts:
            context.begin_whole_sequences(*hidden.shape[:-1])
        try:
            output = self.block(index)(hidden, *args, **kwargs)
        finally:
            for context in contexts:
                context.end()
        first: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return first

    @torch.no_grad()
    def run_all(self, index: int, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Outputs of a block for all windows, ``[windows, length, hidden]``, on the device of ``hidden``."""
        parts = hidden.split(at_once(device))
        return torch.cat([self.run(index, part.to(device)).to(hidden.device) for part in parts])


@contextmanager
def switched(layers: Iterable[NMLinear], name: str) -> Iterator[None]:
    """Layers with a switch on: "bypass" (the dense product) or "differentiable" (sparse always, with a gradient)."""
    layers = list(layers)
    try:
        for layer in layers:
            setattr(layer, name, True)
        yield
    finally:
        for layer in layers:
            setattr(layer, name, False)


def block_names(model: nn.Module) -> list[str]:
    """Names of all blocks in the list that holds the sparse layers."""
    sparse = sparse_layers(model)
    if not sparse:
        raise ValueError("expected a model with sparse layers to calibrate, got none; sparsify it first")
    stacks = {match[1] for name in sparse if (match := re.match(r"(.*?)\.?\d+\.", name))}
    if len(stacks) != 1:
        raise ValueError(
            f"expected all sparse layers in one list of decoder blocks, got {len(stacks)} lists; "
            "calibrate one decoder at a time"
        )
    stack = stacks.pop()
    return [f"{stack}.{child}" for child, _ in model.get_submodule(stack).named_children()]
