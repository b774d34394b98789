"""Classes made at run time from a model's own: its name, another forward."""

from collections.abc import Callable
from typing import Any

from torch import nn

Kind = type[nn.Module]


def derive(make: Callable[..., Kind], kind: Kind, **own: Any) -> Kind:
    """Return a class derived from a model's own, with these attributes.

    make: the function that makes it of its kind, the same one each time. Copies and other processes call it, since the
    class stands in no module. They get a copy of the state, since another thread may add to the module's own.
    """

    def reduce(self: nn.Module, _protocol: Any) -> Any:
        return _new, (make, kind), dict(self.__getstate__())

    return type(kind.__name__, (kind,), own | {"__module__": kind.__module__, "__reduce_ex__": reduce})


def _new(make: Callable[..., Kind], kind: Kind) -> nn.Module:
    return make(kind).__new__(make(kind))
