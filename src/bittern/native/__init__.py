"""Kernels for CPUs: packed weights times quantized activations, attention, what stands between them, and rounding.

The C++ beside this file is compiled when the package is built, once for each kind of x86-64 CPU; the library that suits
the machine is loaded on first use. `engine()` names it, or says why there is none: then packed layers unpack their
weights and multiply in float, which is right but slow. Functions check type, shape and contiguity of all they pass on,
and raise ValueError; tensors stay referenced while a call runs.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from bittern.native import structures as c
from bittern.native.library import SWITCHED_OFF as SWITCHED_OFF
from bittern.native.library import _loaded, address, required
from bittern.native.library import available as available
from bittern.native.library import disabled as disabled
from bittern.native.library import engine as engine
from bittern.native.library import kinds as kinds
from bittern.native.library import serves as serves
from bittern.native.library import use as use

PANEL, ALIGN = 16, 64  # outputs of a panel; rows of inputs are padded to a multiple of ALIGN
MOST_INPUTS = 32768  # of one output, so that sums of products of bytes stay in 32 bits

Activation = Literal["none", "gelu", "gelu_tanh", "silu", "relu"]
_ACTIVATIONS: tuple[Activation, ...] = Activation.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Coding:
    """How values become codes of at most 8 bits: what `quantizers.encode` does for a uniform format.

    scale: None for a dynamic one, found for the tensor or, if `by_row`, for each row.
    """

    low: int
    high: int
    scheme: Literal["symmetric", "unsigned", "asymmetric"] = "symmetric"
    scale: float | None = None
    offset: float = 0.0
    clip: float | None = None
    by_row: bool = False

    def __post_init__(self) -> None:
        if not -128 <= self.low <= 0 < self.high <= 255 or self.high - self.low > 255:
            raise ValueError(f"codes from {self.low} to {self.high} do not fit a byte")
        if self.scale is not None and not self.scale >= torch.finfo(torch.float32).tiny:
            raise ValueError(f"a scale must be a positive normal number, got {self.scale}")

    @property
    def shift(self) -> int:
        return 128 if self.high > 127 else 0

    @cached_property
    def structure(self) -> c.Format:
        return c.Format(
            self.scale or 1.0,
            self.offset,
            torch.finfo(torch.float32).max if self.clip is None else self.clip,
            self.low,
            self.high,
            self.shift,
            ("symmetric", "unsigned", "asymmetric").index(self.scheme),
            0 if self.scale is not None else 2 if self.by_row else 1,
        )


@dataclass(frozen=True)
class Quantized:
    """Rows of codes, padded, less `shift`, and the scales, offsets and sums of rows, 4 bytes each; from `quantize`."""

    codes: Tensor
    numbers: Tensor
    rows: int
    columns: int
    coding: Coding

    @property
    def scale(self) -> Tensor:
        return self.numbers[0].view(torch.float32)

    @property
    def offset(self) -> Tensor:
        return self.numbers[1].view(torch.float32)

    def addresses(self) -> tuple[int, int, int, int]:
        start, size = self.numbers.data_ptr(), 4 * self.numbers.shape[1]
        return self.codes.data_ptr(), start, start + size, start + 2 * size


def quantize(x: Tensor, coding: Coding) -> Quantized | None:
    """Codes of x (rows, columns). None if x holds NaN or infinity, or its scale would be infinite."""
    library = required()
    if x.dim() != 2 or x.numel() >= 2**31:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected rows and columns, fewer than 2**31 values")
    rows, columns = x.shape
    if columns > MOST_INPUTS:
        raise ValueError(f"rows of {columns} values; the kernels take up to {MOST_INPUTS}")
    data, padded = address(x, "x", (rows, columns)), -(-rows // PANEL) * PANEL
    codes = torch.empty(padded, -(-columns // ALIGN) * ALIGN, dtype=torch.int8)
    made = Quantized(codes, torch.empty(3, padded, dtype=torch.int32), rows, columns, coding)
    call = (data, rows, columns, coding.structure, torch.get_num_threads())
    return None if library.bittern_quantize(*call, *made.addresses()) else made


_last: tuple[weakref.ref[Tensor], int, Coding, Quantized] | None = None


def quantize_shared(x: Tensor, coding: Coding) -> Quantized | None:
    """`quantize` of x seen as rows, done once while the same unchanged tensor is given again, as Q, K and V do."""
    global _last  # noqa: PLW0603
    last, known = _last, not x.is_inference()  # PyTorch does not count changes of inference tensors
    if known and last is not None and last[0]() is x and last[1] == x._version and last[2] == coding:
        return last[3]
    rows = x.reshape(-1, x.shape[-1])
    found = quantize(rows if rows.is_contiguous() else rows.contiguous(), coding)
    _last = (weakref.ref(x), x._version, coding, found) if known and found is not None else None
    return found


class Panels:
    """Weights as the kernels read them: codes of 2, 4 or 8 bits in panels of 16 outputs, and scales of each output.

    codes: (outputs, inputs) whole numbers; scale: one, or one for each output.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, zero: int):
        library = required()
        self.outputs, self.inputs = codes.shape
        if bits not in (2, 4, 8) or not 0 < self.inputs <= MOST_INPUTS:
            raise ValueError(
                f"weights of {bits} bits and {self.inputs} inputs; expected 2, 4 or 8 and 1 to {MOST_INPUTS}"
            )
        unsigned = codes.to(torch.int16) + zero
        top = int(unsigned.max()) if codes.numel() else 0
        if codes.numel() and (int(unsigned.min()) < 0 or top >= 2**bits):
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits with zero {zero}"
            )
        if scale.numel() not in (1, self.outputs):
            raise ValueError(f"{scale.numel()} scales for {self.outputs} outputs")
        self.bits, self.zero, self.top = bits, zero, max(top, 1)
        plain = unsigned.to(torch.uint8).contiguous()
        padded = -(-self.outputs // PANEL) * PANEL
        self.data = torch.empty(padded * (-(-self.inputs // ALIGN) * ALIGN) * bits // 8, dtype=torch.uint8)
        self.scale, self.sums = torch.zeros(padded), torch.zeros(padded, dtype=torch.int32)
        self.scale[: self.outputs] = scale.float().flatten()
        self.sums[: self.outputs] = codes.sum(1, dtype=torch.int32)
        self.no_bias = torch.zeros(padded)
        library.bittern_pack(plain.data_ptr(), self.outputs, self.inputs, bits, self.data.data_ptr())

    def codes(self) -> Tensor:
        """The codes (outputs, inputs) as int16."""
        plain = torch.empty(self.outputs, self.inputs, dtype=torch.uint8)
        library = _loaded().library  # it made the panels, and is not asked to multiply
        assert library is not None
        library.bittern_unpack(self.data.data_ptr(), self.outputs, self.inputs, self.bits, plain.data_ptr())
        return plain.to(torch.int16) - self.zero

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.sums.nbytes


def padded_bias(bias: Tensor | None, panels: Panels) -> Tensor:
    """A bias as `linear` takes it: zeros up to a whole panel."""
    if bias is None:
        return panels.no_bias
    if len(panels.no_bias) == panels.outputs:
        return bias.detach().contiguous()
    return torch.nn.functional.pad(bias.detach(), (0, len(panels.no_bias) - panels.outputs))


def linear(x: Quantized, panels: Panels, bias: Tensor, activation: Activation = "none") -> Tensor:
    """x · weightᵀ + bias, then the activation: float32 (rows, outputs). bias: see `padded_bias`."""
    library = required()
    if x.columns != panels.inputs:
        raise ValueError(f"x has {x.columns} columns; the weights take {panels.inputs}")
    out = torch.empty(x.rows, panels.outputs)
    failed = library.bittern_linear(
        *x.addresses(),
        x.rows,
        x.columns,
        panels.data.data_ptr(),
        panels.scale.data_ptr(),
        address(bias, "bias", tuple(panels.no_bias.shape)),
        panels.sums.data_ptr(),
        panels.outputs,
        panels.bits,
        panels.top,
        panels.zero,
        x.coding.shift,
        int(x.coding.scheme == "asymmetric" or x.coding.shift > 0),
        _ACTIVATIONS.index(activation),
        torch.get_num_threads(),
        out.data_ptr(),
    )
    if failed:
        raise MemoryError("no memory for the kernels' buffers")
    return out


def norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer normalization over the last dimension."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns).contiguous()
    out = torch.empty_like(rows)
    required().bittern_norm(
        address(rows, "x", tuple(rows.shape)),
        len(rows),
        columns,
        address(weight, "weight", (columns,)),
        address(bias, "bias", (columns,)),
        epsilon,
        torch.get_num_threads(),
        out.data_ptr(),
    )
    return out.view(x.shape)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of each value."""
    x = x.contiguous()
    out = torch.empty_like(x)
    data, kind = address(x, "x", tuple(x.shape)), _ACTIVATIONS.index(activation)
    required().bittern_activate(data, x.numel(), kind, torch.get_num_threads(), out.data_ptr())
    return out


def check_codings(codings: Mapping[str, Coding]) -> None:
    """Raises ValueError for what the kernels cannot do with an operand of attention."""
    for name, coding in codings.items():
        if coding.scheme == "asymmetric" or (name != "map" and coding.scheme != "symmetric") or coding.by_row:
            raise ValueError(f"the kernels have no {coding.scheme} {name}")


def _check_type(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected torch.float32 on cpu")


def strided_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """An additive mask for maps (batch, heads, queries, keys), of which the kernels read each row in one go."""
    if mask is None:
        return None
    _check_type(mask, "mask")
    mask = mask.expand(*shape[:3], mask.shape[-1])[..., : shape[3]]
    if mask.shape[-1] != shape[3]:
        raise ValueError(f"the mask has {mask.shape[-1]} keys; expected {shape[3]}")
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def strides(tensor: Tensor | None) -> Any:
    return (ctypes.c_int64 * 3)(*(tensor.stride()[:3] if tensor is not None else (0, 0, 0)))


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, codings: dict[str, Coding]
) -> tuple[Tensor, Tensor] | None:
    """Context (batch, queries, heads, dim) and map (batch, heads, queries, keys) of quantized attention.

    query (batch, heads, queries, dim), key and value (batch, key heads, keys, dim), mask additive. codings: of `query`,
    `key`, `value` (symmetric) and `map` (symmetric or unsigned). None if a tensor is not finite.
    """
    library = required()
    batch, heads, queries, dim = query.shape
    key_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    if key.shape != (batch, key_heads, keys, dim) or value.shape[:3] != (batch, key_heads, keys) or heads % key_heads:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"query, key and value of shapes {shapes} do not belong together")
    check_codings(codings)
    if max(keys, dim) > MOST_INPUTS or query.numel() >= 2**31 or batch * heads * queries * keys >= 2**40:
        raise ValueError(f"{keys} keys of {dim} values are too many for the kernels")
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    mask = strided_mask(mask, (batch, heads, queries, keys))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_type(tensor, name)
    probabilities = torch.empty(batch, heads, queries, -(-keys // PANEL) * PANEL)
    context = torch.empty(batch, queries, heads, value_dim)

    call = c.Attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if mask is None else mask.data_ptr(),
        probabilities.data_ptr(),
        context.data_ptr(),
        *(strides(t) for t in (query, key, value, mask)),
        batch,
        heads,
        key_heads,
        queries,
        keys,
        dim,
        value_dim,
        scaling,
        *(codings[name].structure for name in ("query", "key", "value", "map")),
    )
    failed = library.bittern_attention(call, torch.get_num_threads())
    if failed == 2:
        raise MemoryError("no memory for the kernels' buffers")
    return None if failed else (context, probabilities[..., :keys])
