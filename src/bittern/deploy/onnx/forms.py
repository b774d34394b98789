"""Forms of packed layers in ONNX: the form of each, its integer codes, and what the form rounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.deploy.bits import pack_codes, unpack_codes
from bittern.deploy.packed import PackedConv2d, PackedEmbedding, PackedLayer
from bittern.layers import fake_quants
from bittern.quantizers import FakeQuant, code_range
from bittern.recipe import Format

BLOCKS = {2: 64, 4: 128, 8: 128}  # bits → inputs that share a scale, where onnxruntime is fastest

Form = Literal["int8", "nbits", "portable"]


class Clip(FakeQuant):
    """A quantizer without its rounding: what is left is its clip and, if `ranged`, its static range."""

    def __init__(self, own: FakeQuant, ranged: bool):
        super().__init__(own.format, own.name)
        fmt, clip = own.format, own.format.clip or inf
        low, high = -inf, inf
        if ranged and own.scale is not None and fmt.kind == "uniform" and fmt.granularity == "tensor":
            scale, base = own.scale.item(), 0.0 if own.offset is None else own.offset.item()
            low, high = (base + code * scale for code in code_range(fmt))
        self.low, self.high = (min(max(bound, low), high) for bound in (-clip, clip))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.high == inf else x.clamp(self.low, self.high)


@dataclass(frozen=True)
class LayerForm:
    """The form in which a layer is written.

    kind: `static` and `dynamic` multiply 8-bit integers; `nbits` is MatMulNBits, which rounds inputs to 8 bits block by
    block (without that it unpacks all weights in each call); `portable` is DequantizeLinear and MatMul; `rows` an
    embedding that unpacks the rows it reads; `stored` are integer weights computed in float (of convolutions); `float`
    are float weights, for the reason `why`.
    bits, block: of the stored codes, and how many inputs share a scale. clip, input: what bounds and then rounds the
    input of a layer that multiplies, if anything.
    """

    kind: Literal["static", "dynamic", "nbits", "portable", "rows", "stored", "float"]
    bits: int = 8
    block: int = 0
    clip: Clip | None = None
    input: FakeQuant | None = None
    why: str = ""


def choose_form(layer: PackedLayer, form: Form, dynamic: bool) -> LayerForm:
    """Choose the form of one packed layer. dynamic: find ranges of inputs at run time in place of static scales."""
    fmt, own = layer.weight_format, layer.input_quantizer
    grouped = fmt.granularity == "group"
    if fmt.scheme != "symmetric" or fmt.bits > 8:
        return LayerForm("float", why=f"weights {fmt} are not 8-bit integers times a scale")
    if isinstance(layer, PackedConv2d):
        return LayerForm("float", why="groups of weights in a convolution") if grouped else LayerForm("stored")
    bits = next(b for b in BLOCKS if fmt.bits <= b)
    columns = fmt.group_size or layer.weight_shape[1]
    fast = (128, 64, 32) if bits == 2 and not grouped else (128, 64, 32, 16)  # 2 bits in blocks of 16 run in float
    block = next((b for b in fast if b <= BLOCKS[bits] and columns % b == 0), BLOCKS[bits])
    if grouped and columns % block:
        return LayerForm("float", why=f"groups of {columns} are no multiple of 16")
    if isinstance(layer, PackedEmbedding):
        if grouped:
            return LayerForm("float", why="groups of weights in an embedding")
        bits = bits if columns * bits % 8 == 0 else 8
        return LayerForm("rows", bits, columns if columns % block else block)
    rounds = own is not None and own.format.kind == "uniform" and own.format.bits <= 8
    tied = bool(layer.owner)  # bytes would be a second copy
    if own is not None and rounds and not grouped and not tied and (form == "int8" or bits == 8):
        if own.format.range == "static" and not dynamic:
            return LayerForm("static", clip=Clip(own, ranged=own.format.bits < 8), input=_static_bytes(own))
        return LayerForm("dynamic", clip=Clip(own, ranged=False), input=FakeQuant(Format(scheme="asymmetric")))
    by_block = Format(granularity="token") if columns % block else Format(granularity="group", group_size=block)
    clip = None if own is None else Clip(own, ranged=False)
    return LayerForm("portable" if form == "portable" else "nbits", bits, block, clip, FakeQuant(by_block))


def _static_bytes(own: FakeQuant) -> FakeQuant:
    """The quantizer of unsigned bytes that integer runtimes have, with the static range of our own."""
    assert own.scale is not None
    low = code_range(own.format)[0] * own.scale if own.offset is None else own.offset
    quantizer = FakeQuant(Format(bits=own.format.bits, scheme="asymmetric", range="static"))
    quantizer.set_scale(own.scale, -zero_point(own.scale, low) * own.scale)
    return quantizer


def zero_point(scale: Tensor, low: Tensor) -> Tensor:
    """The unsigned byte that stands for zero."""
    return (-low / scale).round().clamp(0, 255)


def remove_rounding(model: nn.Module) -> None:
    """Let a packed model round no activation, in place; clips stay, and so do static ranges of the inputs of layers."""
    for name, quantizer in list(fake_quants(model)):
        probabilities = name.endswith("quantize_map") and (quantizer.format.clip or 1) >= 1  # no clip reaches them
        clip = nn.Identity() if probabilities else Clip(quantizer, ranged=name.endswith("input_quantizer"))
        model.set_submodule(name, clip)


def round_inputs(layers: Mapping[str, PackedLayer], forms: Mapping[str, LayerForm]) -> None:
    """Let layers round their inputs in PyTorch as their forms do, in place."""
    for name, known in forms.items():
        if known.input is not None:
            steps = nn.Sequential(*filter(None, (known.clip, known.input)))
            layers[name].input_quantizer = steps  # type: ignore[assignment]


def integer_codes(layer: PackedLayer) -> Tensor:
    """int16 codes (rows, columns)."""
    return unpack_codes(layer.source.weight_codes, layer.weight_shape[1], layer.weight_format).to(torch.int16)


def scales(layer: PackedLayer, blocks: int = 1) -> Tensor:
    """float32 scales (rows, blocks)."""
    scale: Tensor = layer.source.weight_scale.float()
    if layer.weight_format.granularity == "group":
        return scale.flatten(1).repeat_interleave(blocks // scale.shape[1], 1)  # (rows, groups, 1) → (rows, blocks)
    return scale.reshape(-1, 1).expand(layer.weight_shape[0], blocks).contiguous()


def may_saturate(codes: Tensor) -> bool:
    """True if two neighbouring products of unsigned bytes with these codes can leave 16 bits, where x86 processors
    without VNNI add them: 255 (|w1| + |w2|) > 32767."""
    pairs = F.pad(codes.int(), (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))  # (rows, pairs, 2)
    high, low = 255 * pairs.clamp(min=0).sum(2), 255 * pairs.clamp(max=0).sum(2)
    return bool((high > 32767).any() or (low < -32768).any())


def pack_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    """Codes (rows, columns) → bytes (rows, blocks, bytes of a block), the first code in the low bits.

    Zero is the middle of the range; it also fills the last block.
    """
    whole = F.pad(codes, (0, -codes.shape[1] % block))
    packed: Tensor = pack_codes(whole, Format(bits=bits)).unflatten(1, (-1, block * bits // 8))
    return packed
