"""Modules whose forward optimize() replaces, by changing their class, so that they still pickle, copy and replicate."""

import functools

from torch import nn


class Changed:
    """Mixed in before a module's own class, which remains accessible as ``nm_act_stock``.

    A forward set on the instance would be bound to that instance, so neither pickle nor a shallow copy (such as
    DataParallel's replicas) would carry it over.
    """

    nm_act_stock: type[nn.Module]

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        change = next(base for base in type(self).__bases__ if issubclass(base, Changed))
        return (_new, (self.nm_act_stock, change), *state)


def change(module: nn.Module, how: type[Changed]) -> None:
    """Change the class of ``module`` to its own with ``how`` mixed in, replacing an earlier change."""
    module.__class__ = _class(getattr(module, "nm_act_stock", type(module)), how)


def restore(module: nn.Module) -> None:
    """Restore a module's own class."""
    if isinstance(module, Changed):
        module.__class__ = module.nm_act_stock


@functools.cache
def _class(stock: type[nn.Module], how: type[Changed]) -> type[nn.Module]:
    # The stock name, which Transformers, accelerate and FSDP look for.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (how, stock), names | {"nm_act_stock": stock})


def _new(stock: type[nn.Module], how: type[Changed]) -> nn.Module:
    """An empty instance that pickle and copy fill."""
    cls = _class(stock, how)
    return cls.__new__(cls)
