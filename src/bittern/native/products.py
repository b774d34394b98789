"""Products of quantized activations and packed weights, attention, and what stands between them."""

import ctypes
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bittern.native import structures as c
from bittern.native.codes import ALIGN, MOST_INPUTS, PANEL, Coding, Quantized
from bittern.native.library import address, buffer, pointer, required, run
from bittern.recipe import OPERANDS

Activation = Literal["none", "gelu", "gelu_tanh", "silu", "relu"]
ACTIVATIONS: tuple[Activation, ...] = Activation.__args__  # type: ignore[attr-defined]


class Panels:
    """Weights as the kernels read them: codes of 2, 4 or 8 bits in panels of 16 outputs, and scales of each output.
    codes: (outputs, inputs) whole numbers; scale: one, or one for each output."""

    def __init__(self, codes: Tensor, scale: Tensor, bits: int, zero: int):
        library = required()
        self.outputs, self.inputs = codes.shape
        if bits not in (2, 4, 8) or not 0 < self.inputs <= MOST_INPUTS:
            raise ValueError(f"{bits} bits and {self.inputs} inputs; expected 2, 4 or 8 and 1 to {MOST_INPUTS}")
        unsigned = codes.to(torch.int16) + zero
        top = int(unsigned.max()) if codes.numel() else 0
        if codes.numel() and (int(unsigned.min()) < 0 or top >= 2**bits):
            found = f"codes from {int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"{found} do not fit {bits} bits with zero {zero}")
        if scale.numel() not in (1, self.outputs):
            raise ValueError(f"{scale.numel()} scales for {self.outputs} outputs")
        self.bits, self.zero, self.top = bits, zero, max(top, 1)
        single = unsigned.to(torch.uint8).contiguous()  # a byte each
        padded = -(-self.outputs // PANEL) * PANEL
        self.data = buffer(padded * (-(-self.inputs // ALIGN) * ALIGN) * bits // 8, dtype=torch.uint8)
        self.scale, self.sums = buffer(padded).zero_(), buffer(padded, dtype=torch.int32).zero_()
        self.scale[: self.outputs] = scale.float().flatten()
        self.sums[: self.outputs] = codes.sum(1, dtype=torch.int32)
        library.bittern_pack(single.data_ptr(), self.outputs, self.inputs, bits, self.data.data_ptr())

    def codes(self) -> Tensor:
        """Unpack the codes (outputs, inputs) as int16, also while the kernels are switched off."""
        single = buffer(self.outputs, self.inputs, dtype=torch.uint8)
        library = required(even_disabled=True)  # nothing is multiplied
        library.bittern_unpack(self.data.data_ptr(), self.outputs, self.inputs, self.bits, single.data_ptr())
        return single.to(torch.int16) - self.zero

    def structure(self, bias: Tensor, coding: Coding) -> c.Layer:
        """A linear layer of these weights. bias: see `padded_bias`; coding: of its input."""
        return c.Layer(
            self.data.data_ptr(),
            self.scale.data_ptr(),
            address(bias, "bias", tuple(self.scale.shape)),
            self.sums.data_ptr(),
            *(self.inputs, self.outputs, self.bits, self.top, self.zero),
            coding.structure,
        )

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.sums.nbytes


def padded_bias(bias: Tensor | None, panels: Panels) -> Tensor:
    """A bias (outputs) as `linear` takes it: zeros up to a whole panel."""
    if bias is None:
        return torch.zeros_like(panels.scale)
    more = len(panels.scale) - panels.outputs
    return torch.nn.functional.pad(bias.detach(), (0, more)) if more else bias.detach().contiguous()


def linear(x: Quantized, panels: Panels, bias: Tensor, activation: Activation = "none") -> Tensor:
    """x · weightᵀ + bias, then the activation: float32 (rows, outputs). bias: see `padded_bias`."""
    if x.columns != panels.inputs:
        raise ValueError(f"x has {x.columns} columns; the weights take {panels.inputs}")
    out, layer = buffer(x.rows, panels.outputs), panels.structure(bias, x.coding)
    run("linear", x.structure(), layer, ACTIVATIONS.index(activation), torch.get_num_threads(), out.data_ptr())
    return out


def convolve(x: Tensor, panels: Panels, bias: Tensor, coding: Coding, kernel: Any) -> Tensor | None:
    """Convolve images x (batch, height, width, channels): float32 (batch, height, width, outputs).

    panels: of inputs (kernel height, kernel width, channels). kernel: its sizes, strides, dilations, and zeros before
    and behind, by height and width. None if nothing comes out, x is too large or not finite, or zero has no code.
    """
    size, stride, dilation, pads = kernel
    if x.shape[3] * math.prod(size) != panels.inputs or coding.by_row:
        raise ValueError(f"the kernels do not convolve images of shape {tuple(x.shape)} by {kernel}, {coding}")
    around = [n + sum(zeros) for n, zeros in zip(x.shape[1:3], pads, strict=True)]
    made = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(around, size, stride, dilation, strict=True)]
    if min(x.numel(), *made) < 1 or len(x) * x.shape[3] * math.prod(around) >= 2**31:
        return None
    call = c.Convolution(*x.shape, pads[0][0], pads[1][0], *around, *made, *size, *stride, *dilation)
    out, layer = buffer(len(x), *made, panels.outputs), panels.structure(bias, coding)
    data, threads = address(x, "x", tuple(x.shape)), torch.get_num_threads()
    return out if run("convolve", data, call, layer, threads, out.data_ptr()) else None


class Table:
    """Packed weights as a file holds them, for rows of them and for products with floats.

    codes: uint8 (rows, bytes), `columns` codes of `bits` bits in each. numbers: the least code, and the step to the
    next. scale, offset: one, or one for each row.
    """

    def __init__(
        self, codes: Tensor, columns: int, bits: int, numbers: tuple[int, int], scale: Tensor, offset: Tensor | None
    ):
        self.held, units = (codes, scale, offset), tuple(scale.shape)
        self.structure = c.Lookup(
            address(codes, "codes", (len(codes), -(-columns * bits // 8)), torch.uint8),
            address(scale, "scale", units),
            None if offset is None else address(offset, "offset", units),
            *codes.shape,
            *(columns, bits, *numbers, scale.numel() > 1),
        )

    def rows(self, ids: Tensor) -> Tensor | None:
        """Rows by their numbers, as float32 (…, columns). None if one of them does not exist."""
        out, ids = buffer(*ids.shape, self.structure.columns), ids.to(torch.int64).contiguous()
        return out if run("rows", self.structure, ids.data_ptr(), ids.numel(), out.data_ptr()) else None

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (count, columns) · tableᵀ + bias: float32 (count, rows). Nothing is rounded."""
        count, rows = len(x), self.structure.rows
        out, threads = buffer(count, rows), torch.get_num_threads()
        data = address(x, "x", (count, self.structure.columns))
        added = None if bias is None else address(bias, "bias", (rows,))
        run("multiply_floats", self.structure, data, count, added, threads, out.data_ptr())
        return out


def norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Layer normalization over the last dimension."""
    x, columns = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // columns if columns else 0
    parameters = address(weight, "weight", (columns,)), address(bias, "bias", (columns,))
    run("norm", address(x, "x", x.shape), rows, columns, *parameters, epsilon, torch.get_num_threads(), out.data_ptr())
    return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of each value. Images whose channels lie last in memory stay so."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return activate(x.permute(0, 2, 3, 1), activation).permute(0, 3, 1, 2)
    x = x.contiguous()
    out = torch.empty_like(x)
    data, kind = address(x, "x", x.shape), ACTIVATIONS.index(activation)
    run("activate", data, x.numel(), kind, torch.get_num_threads(), out.data_ptr())
    return out


# Schemes that the kernels know of each operand of attention.
SCHEMES: dict[str, tuple[str, ...]] = {
    operand: ("symmetric", "unsigned") if operand == "map" else ("symmetric",) for operand in OPERANDS
}


def check_codings(codings: Mapping[str, Coding]) -> None:
    """Raises ValueError for what the kernels cannot do with an operand of attention."""
    for name, coding in codings.items():
        if coding.scheme not in SCHEMES[name] or coding.by_row:
            raise ValueError(f"the kernels have no {coding.scheme} {name}")


def _check_type(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected torch.float32 on cpu")


def strided_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """An additive mask for maps (batch, heads, queries, keys), of which the kernels read each row in one go."""
    if mask is None:
        return None
    _check_type(mask, "mask")
    mask = mask.expand(shape)
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
    probabilities = buffer(batch, heads, queries, -(-keys // PANEL) * PANEL)
    context = buffer(batch, queries, heads, value_dim)
    call = c.Attention(
        *map(pointer, (query, key, value, mask, probabilities, context)),
        *map(strides, (query, key, value, mask)),
        *(batch, heads, key_heads, queries, keys, dim, value_dim, scaling),
        *(codings[name].structure for name in OPERANDS),
    )
    return (context, probabilities[..., :keys]) if run("attention", call, torch.get_num_threads()) else None
