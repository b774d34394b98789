"""The kernels' C structures, field by field."""

from __future__ import annotations

import ctypes

from bittern.recipe import OPERANDS


class Format(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("scale", "offset", "clip")),
        *((name, ctypes.c_int32) for name in ("low", "high", "shift", "scheme", "mode")),
    )


class Losses(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "scales", "offsets", "factors", "rest", "linear", "out")),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "candidates", "rank")),
        *((name, ctypes.c_float) for name in ("low", "high")),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "map", "context")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("query", "key", "value", "mask")),
        *((n, ctypes.c_int32) for n in ("batch", "heads", "key_heads", "queries", "keys", "dim", "value_dim")),
        ("scaling", ctypes.c_float),
        *((f"{name}_format", Format) for name in OPERANDS),
    )


class Codes(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("codes", "scale", "offset", "sums")), ("rows", ctypes.c_int32))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("panels", "scale", "bias", "sums")),
        *((name, ctypes.c_int32) for name in ("inputs", "outputs", "bits", "top", "zero")),
        ("input", Format),
    )


class Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class Block(ctypes.Structure):
    _fields_ = (
        *((name, Layer) for name in ("query", "key", "value", "output", "up", "down")),
        ("norms", Norm * 2),
        *((n, ctypes.c_int32) for n in ("pre_norm", "activation", "heads", "key_heads", "dim", "value_dim")),
        ("scaling", ctypes.c_float),
        *((f"{name}_format", Format) for name in OPERANDS),
    )


class Lookup(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "offset")),
        *((name, ctypes.c_int64) for name in ("rows", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("columns", "bits", "low", "step", "by_row")),
    )


class Objects(ctypes.Structure):
    _fields_ = (
        ("python", ctypes.c_void_p * 5),
        *((n, ctypes.c_void_p) for n in ("tables", "values", "sized", "named", "keys", "found", "objects", "classes")),
        ("sizes", ctypes.c_void_p),
        *((f"{n}_count", ctypes.c_int32) for n in ("table", "value", "sized", "named", "object")),
    )
