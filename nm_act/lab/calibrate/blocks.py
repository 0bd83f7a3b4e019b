"""Running a decoder one block at a time."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from ...layers.linear import NMLinear


class _Reached(Exception):
    """The call of the model has come to its first block; nothing after it is needed."""


class BlockRunner:
    """The decoder blocks of a sparse model, and what they are called with.

    Parameters
    ----------
    model : nn.Module
        A decoder-only Transformers model with at least one :class:`~nm_act.NMLinear`.
    window : Tensor [length], int64
        One window; all others are as long, so that masks and positions are the same for each.

    Raises
    ------
    ValueError
        If the model has no sparse layer, or its blocks are not in one list.
    """

    def __init__(self, model: nn.Module, window: torch.Tensor):
        self.model = model
        self.length = window.numel()
        self.names = block_names(model)
        self._arguments: dict[str, tuple[tuple, dict]] = {}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._recorder(name), with_kwargs=True)
            for name in self.names
        ]
        try:
            with torch.no_grad():
                model(input_ids=window[None].to(_device(model)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, name: str):
        def record(module, args, kwargs):
            # The hidden states come first, or by name; the rest is the same for every window.
            self._arguments[name] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

        return record

    @torch.no_grad()
    def first_inputs(self, windows: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[windows, length, hidden]`` that enter the first block."""
        inputs = []

        def record(module, args, kwargs):
            inputs.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _Reached

        hook = self.model.get_submodule(self.names[0]).register_forward_pre_hook(record, with_kwargs=True)
        try:
            for window in windows:
                with suppress(_Reached):
                    self.model(input_ids=window[None].to(_device(self.model)), use_cache=False)
        finally:
            hook.remove()
        return torch.cat(inputs)

    def block(self, index: int) -> nn.Module:
        """The block itself."""
        return self.model.get_submodule(self.names[index])

    def layers(self, index: int) -> dict[str, NMLinear]:
        """Sparse layers of a block by their full names."""
        prefix = self.names[index]
        return {f"{prefix}.{n}": m for n, m in self.block(index).named_modules() if isinstance(m, NMLinear)}

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output ``[1, length, hidden]`` of a block for one window's ``hidden``."""
        args, kwargs = self._arguments[self.names[index]]
        args, kwargs = _to((args, kwargs), hidden.device)
        contexts = {id(layer.token_context): layer.token_context for layer in self.layers(index).values()}
        with _running([context for context in contexts.values() if context is not None], hidden):
            output = self.block(index)(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run_all(self, index: int, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Outputs of a block for all windows, ``[windows, length, hidden]``, on the device of ``hidden``."""
        return torch.cat([self.run(index, h.to(device)).to(hidden.device) for h in hidden.split(1)])


@contextmanager
def dense(layers) -> Iterator[None]:
    """The layers compute their dense product inside."""
    with _attribute(layers, "bypass"):
        yield


@contextmanager
def differentiable(layers) -> Iterator[None]:
    """The layers are sparse in every phase and have a gradient inside."""
    with _attribute(layers, "differentiable"):
        yield


@contextmanager
def _attribute(layers, name: str) -> Iterator[None]:
    layers = list(layers)
    for layer in layers:
        setattr(layer, name, True)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, name, False)


@contextmanager
def _running(contexts, hidden: torch.Tensor) -> Iterator[None]:
    """The decoder stack, whose hooks tell layers where sequences start, is not called: tell them here."""
    for context in contexts:
        context.begin_whole_sequences(*hidden.shape[:-1])
    try:
        yield
    finally:
        for context in contexts:
            context.end()


def block_names(model: nn.Module) -> list[str]:
    """Names of all blocks of the list that holds the sparse layers."""
    sparse = [name for name, module in model.named_modules() if isinstance(module, NMLinear)]
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


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _to(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
