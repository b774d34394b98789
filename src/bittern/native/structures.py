"""The kernels' C structures, field by field."""

import ctypes
from typing import Any

from bittern.recipe import OPERANDS

p, i, n, f = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """Fields in order, from types and the names of those that have each."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Format(ctypes.Structure):
    _fields_ = _fields((f, "scale offset clip"), (i, "low high shift scheme mode"))


_FORMATS = Format, " ".join(f"{name}_format" for name in OPERANDS)


class Losses(ctypes.Structure):
    _fields_ = _fields(
        (p, "x scales offsets factors rest linear out"), (i, "rows columns candidates rank"), (f, "low high")
    )


class Attention(ctypes.Structure):
    _fields_ = _fields(
        (p, "query key value mask map context"),
        (n * 3, "query_strides key_strides value_strides mask_strides"),
        (i, "batch heads key_heads queries keys dim value_dim"),
        *((f, "scaling"), _FORMATS),
    )


class Codes(ctypes.Structure):
    _fields_ = _fields((p, "codes scale offset sums"), (i, "rows"))


class Layer(ctypes.Structure):
    _fields_ = _fields((p, "panels scale bias sums"), (i, "inputs outputs bits top zero"), (Format, "input"))


class Convolution(ctypes.Structure):
    _fields_ = _fields(
        (i, "batch height width channels top left high wide out_height out_width"),
        (i, "kernel_height kernel_width stride_y stride_x dilation_y dilation_x"),
    )


class Norm(ctypes.Structure):
    _fields_ = _fields((p, "weight bias"), (f, "epsilon"))


class Block(ctypes.Structure):
    _fields_ = _fields(
        *((Layer, "query key value output up down"), (Norm * 2, "norms")),
        (i, "pre_norm activation heads key_heads dim value_dim"),
        *((f, "scaling"), _FORMATS),
    )


class Lookup(ctypes.Structure):
    _fields_ = _fields((p, "codes scale offset"), (n, "rows row_bytes"), (i, "columns bits low step by_row"))


class Objects(ctypes.Structure):
    _fields_ = _fields(
        *((p * 5, "python"), (p, "tables values sized named keys found objects classes sizes")),
        (i, "table_count value_count sized_count named_count object_count"),
    )
