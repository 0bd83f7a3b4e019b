"""Modules whose forward optimize() replaces: by a class of their own, which pickles, copies and replicates as any."""

import functools

from torch import nn


class Changed:
    """Mixed in before a module's own class, which stays reachable as ``nm_act_stock``.

    A forward set on the instance would be bound to it: neither pickle nor a shallow copy (as DataParallel's replicas
    are) can take it along.
    """

    nm_act_stock: type[nn.Module]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        change = next(base for base in type(self).__bases__ if issubclass(base, Changed))
        return (_new, (self.nm_act_stock, change), *state)


def change(module: nn.Module, how: type[Changed]) -> None:
    """Let ``module`` be of its class with the methods of ``how`` in front, in place of an earlier change."""
    module.__class__ = _class(getattr(module, "nm_act_stock", type(module)), how)


def restore(module: nn.Module) -> None:
    """Give a module its own class back."""
    if isinstance(module, Changed):
        module.__class__ = module.nm_act_stock


@functools.cache
def _class(stock: type[nn.Module], how: type[Changed]) -> type[nn.Module]:
    # Under the stock name, which Transformers, accelerate and FSDP look for.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (how, stock), names | {"nm_act_stock": stock})


def _new(stock: type[nn.Module], how: type[Changed]) -> nn.Module:
    """An empty instance, for pickle and copy to fill."""
    cls = _class(stock, how)
    return cls.__new__(cls)
