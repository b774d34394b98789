"""What Python objects hold, to be looked at again in one call."""

import ctypes
from collections.abc import Sequence
from typing import Any

from bittern.native import structures as c
from bittern.native.library import required

_CALLS = ("PyDict_Next", "PyDict_GetItemWithError", "PyDict_Size", "PyObject_Type", "Py_DecRef")
_PYTHON = [ctypes.cast(ctypes.pythonapi[name], ctypes.c_void_p).value for name in _CALLS]


def _array(addresses: Sequence[int | None]) -> Any:
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Objects:
    """A record of what tables (dictionaries) hold, how long others are, what each of `named` (a dictionary and a key)
    gives, and of which classes objects are."""

    def __init__(
        self,
        tables: Sequence[dict[Any, Any]],
        sized: Sequence[dict[Any, Any]],
        named: Sequence[tuple[dict[str, Any], str]],
        objects: Sequence[object],
    ):
        self.held = [value for table in tables for value in table.values()]
        dicts, keys, classes = [d for d, _ in named], [key for _, key in named], [type(thing) for thing in objects]
        found = [table.get(key) for table, key in named]
        lists: list[Sequence[object]] = [tables, self.held, sized, dicts, keys, found, objects, classes]
        arrays = [_array([id(thing) for thing in things]) for things in lists]
        arrays[5] = _array([id(value) if key in d else None for (d, key), value in zip(named, found, strict=True)])
        arrays.append((ctypes.c_int64 * len(sized))(*map(len, sized)))
        counts = map(len, (tables, self.held, sized, named, objects))
        self._structure = c.Objects(_array(_PYTHON), *map(ctypes.addressof, arrays), *counts)
        self._kept = lists, arrays  # so that addresses stay theirs
        self._address = ctypes.byref(self._structure)

    def unchanged(self) -> bool:
        return bool(required(even_disabled=True).bittern_unchanged(self._address))
