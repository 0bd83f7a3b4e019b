"""Restores a model if changing its layers fails half-way, without keeping a second copy of the model."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .adapters import is_plain_linear

_TORCH_STATE = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
"""A module's own containers (children, parameters, hooks). Hook handles refer to them, so they are never replaced."""


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the modules, hooks, attributes and config of ``model`` if the block raises.

    Weights of linear layers are not kept. A replaced layer that no longer exists is restored with its attributes, its
    hooks and bitwise equal values, copied from its replacement; a layer or weight that is referenced elsewhere (a tied
    one) is restored as the same object. If the block succeeds, nothing is copied.
    """
    # With PEFT, the entry for checkpoints is in the config of the inner model, which the wrapper exposes as its own.
    config = getattr(model, "config", None)
    fields = dict(vars(config)) if hasattr(config, "__dict__") else None
    layers = _linears(model)
    modules = [_Module(module, layers) for module in model.modules() if not is_plain_linear(module)]
    try:
        yield
    except BaseException:
        _put_back(model, layers, modules)
        if fields is not None:
            vars(config).clear()
            vars(config).update(fields)
        raise


def _linears(model: nn.Module) -> dict[int, "_Linear"]:
    layers: dict[int, _Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_plain_linear(module):
            layers.setdefault(id(module), _Linear(module)).names.append(name)
    return layers


def _put_back(model: nn.Module, layers: dict[int, "_Linear"], modules: list["_Module"]) -> None:
    weights: dict[int, Any] = {}
    linears = {}
    for key, layer in layers.items():
        linears[key] = layer.restored(model, weights)
        for name in layer.names:  # immediately, so that the replacement is freed before the next weight is copied
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = linears[key]
    for saved in modules:
        saved.restore(linears)


class _Module:
    """Everything in a module's dictionary, and the contents of its containers."""

    def __init__(self, module: nn.Module, layers: dict[int, "_Linear"]):
        self.module, self.kind = module, type(module)
        self.attributes = dict(vars(module))
        self.contents = {key: value.copy() for key, value in vars(module).items() if key in _TORCH_STATE}
        # Linear layers among the children are replaced by keys.
        self.contents["_modules"] = {
            name: id(child) if id(child) in layers else child for name, child in module._modules.items()
        }

    def restore(self, linears: dict[int, nn.Linear]) -> None:
        self.module.__class__ = self.kind
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        children = self.contents["_modules"]
        contents = {
            **self.contents,
            "_modules": {name: linears[child] if isinstance(child, int) else child for name, child in children.items()},
        }
        _fill(self.attributes, contents)


def _fill(containers: dict[str, Any], contents: dict[str, Any]) -> None:
    for key, value in contents.items():
        containers[key].clear()
        containers[key].update(value)


class _Linear:
    """A dense layer without its weight."""

    def __init__(self, module: nn.Linear):
        self.names: list[str] = []
        self.module, self.kind = weakref.ref(module), type(module)
        # accelerate's forward references the layer and so its weight; its hook can create the forward again.
        self.attributes = {key: value for key, value in vars(module).items() if key not in ("forward", "_old_forward")}
        self.attributes["_parameters"] = {}
        self.contents = {key: value.copy() for key, value in vars(module).items() if key in _TORCH_STATE}
        # A tensor subclass is never replaced.
        plain = type(module._parameters.get("weight")) is nn.Parameter
        self.weight = _Weight(self.contents["_parameters"].pop("weight")) if plain else None

    def restored(self, model: nn.Module, weights: dict[int, Any]) -> nn.Linear:
        """The restored layer: the same object if it is referenced elsewhere."""
        module = self.module()
        if module is None:
            module = self.kind.__new__(self.kind)
            vars(module).update(self.attributes)
            _fill(self.attributes, self.contents)
        module.__class__ = self.kind  # optimize changes the class of dense layers
        parameters = dict(self.contents["_parameters"])
        if self.weight is not None:
            parameters = {"weight": self.weight.restored(lambda: model.get_submodule(self.names[0]).weight, weights)}
            parameters |= self.contents["_parameters"]
        module._parameters.clear()
        module._parameters.update(parameters)
        if "_hf_hook" in self.attributes and "forward" not in vars(module):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(module, self.attributes["_hf_hook"])
        return module


class _Weight:
    """Everything about a weight except its values."""

    def __init__(self, weight: torch.Tensor):
        self.key, self.reference = id(weight), weakref.ref(weight)
        self.stride, self.requires_grad = weight.stride(), weight.requires_grad
        self.grad, self.attributes = weight.grad, dict(vars(weight))

    def restored(self, current: Callable[[], Any], weights: dict[int, Any]) -> Any:
        """The same object if it still exists, else one with the values of ``current()``; tied weights stay tied."""
        weight = self.reference()
        if weight is None:
            weight = weights.get(self.key)
        if weight is None:
            values = current().detach()
            stored = torch.empty_strided(values.shape, self.stride, dtype=values.dtype, device=values.device)
            weight = nn.Parameter(stored.copy_(values), self.requires_grad)
            weight.grad = self.grad
            vars(weight).update(self.attributes)
        weights[self.key] = weight
        return weight
