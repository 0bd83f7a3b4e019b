"""Modules whose forward optimize() replaces by changing their class, so that they can be pickled and copied."""

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

# A mix-in: for the type checker a module, at run time a class that adds no bases.
if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class Changed(_Base):
    """Mixed in before a module's own class, which remains accessible as ``nm_act_stock``.

    A forward set on the instance would be bound to that instance, so neither pickle nor a shallow copy (such as
    DataParallel's replicas) would carry it over.
    """

    nm_act_stock: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *state = reduced
        change = next(base for base in type(self).__bases__ if issubclass(base, Changed))
        return (_new, (self.nm_act_stock, change), *state)


def change(module: Any, how: Any) -> None:
    """Change the class of ``module`` to its own with ``how`` mixed in, replacing an earlier change."""
    own: Any = type(module)
    module.__class__ = _class(getattr(own, "nm_act_stock", own), how)


def restore(module: nn.Module) -> None:
    """Restore a module's own class."""
    if isinstance(module, Changed):
        module.__class__ = module.nm_act_stock  # type: ignore[assignment]


@functools.cache
def _class(stock: Any, how: Any) -> Any:  # classes of modules are not Hashable to mypy
    # The stock name, which Transformers, accelerate and FSDP look for.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (how, stock), names | {"nm_act_stock": stock})


def _new(stock: Any, how: Any) -> Any:
    """An empty instance that pickle and copy fill."""
    cls = _class(stock, how)
    return cls.__new__(cls)
