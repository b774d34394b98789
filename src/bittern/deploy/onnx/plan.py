"""How each packed layer is written to ONNX, and what that rounds: plans, integer codes, models to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bittern.attention import Site
from bittern.deploy.packed import PackedConv2d, PackedEmbedding, PackedLayer, unpack_codes
from bittern.layers import QuantLayer
from bittern.quantizers import FakeQuant, code_range
from bittern.recipe import Format

BLOCKS = {2: 64, 4: 128, 8: 128}  # bits → inputs that share a scale, where onnxruntime is fastest

Form = Literal["int8", "nbits", "portable"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Plan:
    """How a layer is written.

    kind: `static` and `dynamic` multiply 8-bit integers; `nbits` is MatMulNBits, which rounds inputs to 8 bits block by
    block (without that it unpacks all weights in each call); `portable` is DequantizeLinear and MatMul; `rows` an
    embedding that unpacks the rows it reads; `stored` are integer weights computed in float (of convolutions); `float`
    are float weights, for the reason `why`.
    bits, block: of the stored codes, and how many inputs share a scale. input: what rounds the input, if anything.
    """

    kind: Literal["static", "dynamic", "nbits", "portable", "rows", "stored", "float"]
    bits: int = 8
    block: int = 0
    input: FakeQuant | None = None
    why: str = ""

    @property
    def multiplies(self) -> bool:
        return self.kind in ("static", "dynamic", "nbits", "portable")

    def clips(self, own: FakeQuant) -> bool:
        """Whether the file clips the input of a multiplying layer to its static range, beyond what bytes do."""
        return self.kind == "static" and own.format.bits < 8


def plan(layer: PackedLayer, form: Form, dynamic: bool) -> Plan:
    """The form of one packed layer. dynamic: find the range of inputs at run time even if a static scale is known."""
    fmt, own = layer.weight_format, layer.input_quantizer
    grouped = fmt.granularity == "group"
    symmetric = fmt.kind in ("ternary", "binary") or (fmt.kind == "uniform" and fmt.scheme == "symmetric")
    if not symmetric or fmt.bits > 8:
        return Plan("float", why=f"weights {fmt} are not 8-bit integers times a scale")
    if isinstance(layer, PackedConv2d):
        return Plan("float", why="groups of weights in a convolution") if grouped else Plan("stored")
    bits = next(b for b in BLOCKS if fmt.bits <= b)
    columns = fmt.group_size or layer.weight_shape[1]
    fast = (128, 64, 32) if bits == 2 and not grouped else (128, 64, 32, 16)  # 2 bits in blocks of 16 run in float
    block = next((b for b in fast if b <= BLOCKS[bits] and columns % b == 0), BLOCKS[bits])
    if grouped and columns % block:
        return Plan("float", why=f"groups of {columns} are no multiple of 16")
    if isinstance(layer, PackedEmbedding):
        if grouped:
            return Plan("float", why="groups of weights in an embedding")
        bits = bits if columns * bits % 8 == 0 else 8
        return Plan("rows", bits, columns if columns % block else block)
    rounds = own is not None and own.format.kind == "uniform" and own.format.bits <= 8
    tied = bool(layer.owner)  # bytes would be a second copy
    if own is not None and rounds and not grouped and not tied and (form == "int8" or bits == 8):
        static = own.format.range == "static" and not dynamic
        return Plan("static" if static else "dynamic", input=_file_input(own, static))
    by_block = Format(granularity="token") if columns % block else Format(granularity="group", group_size=block)
    return Plan("portable" if form == "portable" else "nbits", bits, block, FakeQuant(by_block))


def _file_input(own: FakeQuant, static: bool) -> FakeQuant:
    """The quantizer of unsigned bytes that integer runtimes have, with the range of our own."""
    if not static:
        return FakeQuant(Format(scheme="asymmetric"))
    assert own.scale is not None
    low = code_range(own.format)[0] * own.scale if own.offset is None else own.offset
    quantizer = FakeQuant(Format(bits=own.format.bits, scheme="asymmetric", range="static"))
    quantizer.set_scale(own.scale, -zero_point(own.scale, low) * own.scale)
    return quantizer


def zero_point(scale: Tensor, low: Tensor) -> Tensor:
    """The unsigned byte that stands for zero."""
    return (-low / scale).round().clamp(0, 255)


def clamp(x: Tensor, quantizer: FakeQuant, ranged: bool = True) -> Tensor:
    """x within its format's clip and, if `ranged`, its static range: what is left of a quantizer without rounding."""
    fmt = quantizer.format
    if fmt.clip is not None:
        x = x.clamp(-fmt.clip, fmt.clip)
    if ranged and quantizer.scale is not None and fmt.kind == "uniform" and fmt.granularity == "tensor":
        scale, base = quantizer.scale.item(), 0.0 if quantizer.offset is None else quantizer.offset.item()
        low, high = code_range(fmt)
        x = x.clamp(base + low * scale, base + high * scale)
    return x


def owner_of(layer: PackedLayer) -> PackedLayer:
    """The layer that holds the codes: another one, if this one is tied to it."""
    return layer.owner[0] if layer.owner else layer


def integer_codes(layer: PackedLayer) -> Array:
    """int16 codes (rows, columns)."""
    codes = unpack_codes(owner_of(layer).weight_codes, layer.weight_shape[1], layer.weight_format)
    return codes.to(torch.int16).cpu().numpy()


def scales(layer: PackedLayer, blocks: int = 1) -> Array:
    """float32 scales (rows, blocks)."""
    rows, scale = layer.weight_shape[0], owner_of(layer).weight_scale.float().cpu()
    if layer.weight_format.granularity == "group":
        return np.repeat(scale.flatten(1).numpy(), blocks // scale.shape[1], 1)
    found: Array = scale.reshape(-1, 1).expand(rows, blocks).contiguous().numpy()
    return found


def may_saturate(codes: Array) -> bool:
    """Whether two neighbouring products of unsigned bytes with these codes can leave 16 bits, where x86 processors
    without VNNI add them: 255 (|w1| + |w2|) > 32767."""
    padded = np.pad(codes.astype(np.int32), ((0, 0), (0, codes.shape[1] % 2)))
    pairs = padded.reshape(len(codes), -1, 2)
    high, low = 255 * pairs.clip(0).sum(2), 255 * pairs.clip(None, 0).sum(2)
    return bool((high > 32767).any() or (low < -32768).any())


def pack_blocks(codes: Array, bits: int, block: int) -> Array:
    """Codes (rows, columns) → bytes (rows, blocks, bytes of a block), the first code in the low bits.

    Zero is the middle of the range; it also fills the last block.
    """
    unsigned = np.pad(codes, ((0, 0), (0, -codes.shape[1] % block))) + 2 ** (bits - 1)
    digits = unsigned.reshape(len(codes), -1, block * bits // 8, 8 // bits)
    packed: Array = (digits << (bits * np.arange(8 // bits))).sum(-1).astype(np.uint8)
    return packed


@contextmanager
def swapped(methods: Mapping[tuple[type, str], Callable[..., Any]]) -> Iterator[None]:
    """Classes with other methods inside the block."""
    was = {(cls, name): cls.__dict__[name] for cls, name in methods}
    try:
        for (cls, name), method in methods.items():
            setattr(cls, name, method)
        yield
    finally:
        for (cls, name), method in was.items():
            setattr(cls, name, method)


@contextmanager
def rounding(model: nn.Module, plans: Mapping[str, Plan], exact: bool = False) -> Iterator[None]:
    """Inside, a packed model rounds activations where and as its file does, or nowhere (`exact`); clips stay.

    Static ranges are clips too, where the file has them.
    """
    names = {module: name for name, module in model.named_modules()}

    def quantized_input(self: PackedLayer | QuantLayer, x: Tensor) -> Tensor:
        known, own = plans.get(names[self]), self.input_quantizer
        multiplies = known is not None and known.multiplies and not exact
        if own is not None:
            x = clamp(x, own, ranged=known.clips(own) if known and multiplies else True)
        return known.input(x) if known and multiplies and known.input else x

    def quantize(self: Site, point: str, x: Tensor) -> Tensor:
        quantizer = self.quantizer(point)
        within = point == "map" and quantizer is not None and (quantizer.format.clip or 1) >= 1  # probabilities
        return x if quantizer is None or within else clamp(x, quantizer, ranged=False)

    with swapped(
        {
            (PackedLayer, "quantized_input"): quantized_input,
            (QuantLayer, "quantized_input"): quantized_input,
            (Site, "quantize"): quantize,
        }
    ):
        yield
