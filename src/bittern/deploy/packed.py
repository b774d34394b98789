"""Packed layers: integer codes in bytes and their scales instead of a float weight.

Where the kernels of `native` serve, a layer multiplies in integers; elsewhere it unpacks its codes and multiplies in
float, bit for bit as the simulated layer does.

Codes are in memory once. The kernels read them in an order of their own, in panels, that are made when a layer first
multiplies and take the place of the codes; whatever then reads, copies, moves, saves or loads the codes gets them
back, and the panels are dropped until the next product. Only a layer that is tied to another's weight has panels
beside the other's codes. One lock holds off other threads while the two change places.

A packed layer holds `weight_codes` (uint8, rows × bytes), `weight_scale` and, if asymmetric, `weight_offset` (float32).
Whoever reads its `weight` gets a `PackedWeight`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bittern import kernels, layers, native
from bittern.deploy.bits import bytes_per_row, pack_codes, unpack_codes
from bittern.deploy.weight import PackedWeight
from bittern.errors import ModelError
from bittern.experts import ExpertsLinear
from bittern.kernels import convolves, has_kernel, input_coding, outside_graphs, tell_of, warn_if_slow
from bittern.layers import QuantizedLayer, QuantLayer, ScaledEmbedding, fake_quants, weight_matrix
from bittern.native.block import KernelLayer
from bittern.native.products import convolve
from bittern.quantizers import FakeQuant, code_range, decode, encode, find_scale, quantize_once, stamp
from bittern.recipe import Format

_exchange = threading.RLock()  # held while codes and panels change places


class PackedLayer(QuantizedLayer):
    """Base of packed layers. `owner` is another packed layer if this one is tied to its weight."""

    weight_format: Format
    weight_shape: tuple[int, int]  # rows, columns
    places: int  # of a convolution's kernel: panels hold the channels of each side by side
    weight_codes: Tensor
    weight_scale: Tensor
    weight_offset: Tensor | None
    owner: list[PackedLayer]  # a list, so that it is no submodule
    _panels: native.Panels | None = None
    _made_of: tuple[Any, ...] = ()  # the scale of the panels
    _bias: tuple[tuple[Any, ...], Tensor] | None = None
    _rows: tuple[tuple[Any, ...], native.Table] | None = None

    @property
    def source(self) -> PackedLayer:
        """The layer that holds the codes of this one."""
        return self.owner[0] if self.owner else self

    @outside_graphs
    def forward(self, input: Tensor) -> Tensor:
        """Multiply as a linear layer, of whatever class; convolutions and embeddings have their own forward."""
        tell_of(self)
        if (out := self.integer_product(input)) is not None:
            return out
        out = self.float_product(input := self.quantized_input(input))
        return F.linear(input, self.unpacked(), self.bias) if out is None else out

    def direct(self, x: Tensor) -> kernels.DirectCall | None:
        """The call that makes the output for x, once all is known of the layer; None if there is no such."""
        plain = type(self).forward is PackedLayer.forward and x.dtype is torch.float32 and x.numel() < 2**16
        layer = self.layer_for(x) if plain else None
        return None if layer is None else (KernelLayer.product, (layer, x))

    def integer_product(self, x: Tensor) -> Tensor | None:
        """The product of x (…, inputs) and the weight by the integer kernels; None where they do not serve."""
        if (layer := self.layer_for(x)) is None or x.shape[-1:] != (layer.panels.inputs,):
            return None
        if x.numel() < 2**16:  # to remember their codes for another layer would take longer
            out = layer.product(x.float())
        else:
            rows, coding = x.float().reshape(-1, x.shape[-1]).contiguous(), layer.coding
            codes = quantize_once(x, coding, lambda _: native.quantize_rows(rows, coding))
            out = None if codes is None else native.linear(codes, layer.panels, layer.bias).view(*x.shape[:-1], -1)
        return out if out is None or out.dtype is x.dtype else out.to(x.dtype)

    def layer_for(self, x: Tensor) -> KernelLayer | None:
        """`kernel_layer`, if the kernels serve x; warns if it is for what x is that they do not."""
        if native.serves(x.float() if x.dtype in kernels.SIXTEEN_BITS else x, bias := self._float_bias()):
            return self.kernel_layer()
        if has_kernel(weight=self.weight_format):
            warn_if_slow(x, bias)
        return None

    def kernel_layer(self) -> KernelLayer | None:
        """The layer as kernels read it, with the bias kept until that changes; None if they do not serve it."""
        if (coding := input_coding(self.input_quantizer)) is None or (panels := self.panels()) is None:
            return None
        state = stamp(self._parameters.get("bias"))
        if self._bias is None or self._bias[0] != state:
            self._bias = state, native.padded_bias(self._float_bias(), panels)
        return KernelLayer(panels, self._bias[1], coding)

    def _float_bias(self) -> Tensor | None:
        bias = self._parameters.get("bias")  # the attribute takes a long way
        return bias if bias is None or bias.dtype is torch.float32 else bias.float()

    def float_product(self, x: Tensor) -> Tensor | None:
        """The product of x (…, inputs), which stays float, and the weight; None where kernels do not serve."""
        bias = self._float_bias()
        floats = x.float() if x.dtype in kernels.SIXTEEN_BITS else x
        fits = native.serves(floats, bias) and x.shape[-1:] == self.weight_shape[1:]
        if (table := self._table() if fits else None) is None:
            return None
        return table.multiply(floats.reshape(-1, x.shape[-1]).contiguous(), bias).view(*x.shape[:-1], -1).to(x.dtype)

    def panels(self) -> native.Panels | None:
        """The weight as kernels read it, in place of the codes; None if they have no such format or size."""
        state, columns = stamp(self.source.weight_scale), self.weight_shape[1]
        if self._panels is not None and self._made_of != state:
            self.drop_panels()
        panels = self._panels
        if panels is not None or not has_kernel(weight=self.weight_format) or not 0 < columns <= native.MOST_INPUTS:
            return panels
        with _exchange:
            if self._panels is None:
                codes, fmt = unpack_codes(self.source.weight_codes, columns, self.weight_format), self.weight_format
                codes = codes.unflatten(1, (-1, self.places)).mT.flatten(1)  # (rows, places · channels)
                bits = next(width for width in (2, 4, 8) if width >= fmt.bits)
                scale, zero = self.source.weight_scale, -code_range(fmt)[0]
                self._panels, self._rows = native.Panels(codes.to(torch.int16), scale, bits, zero), None
                self._made_of = state
                if not self.owner:
                    del self._buffers["weight_codes"]
            return self._panels

    def drop_panels(self) -> None:
        """Hold the codes as they are in a file again, for whatever reads, writes or moves them."""
        with _exchange:
            if self._panels is not None and not self.owner:
                codes = self._panels.codes().unflatten(1, (self.places, -1)).mT  # (rows, channels, places)
                self._buffers["weight_codes"] = pack_codes(codes.flatten(1), self.weight_format)
            self._panels = self._rows = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight_codes":
            with _exchange:
                if name not in self._buffers:
                    self.drop_panels()
                return super().__getattr__(name)
        return super().__getattr__(name)

    def hold_weight(self, like: Tensor) -> None:
        """Show a weight with the shape, type and device of a tensor; a tied layer shows that of its owner."""
        own = nn.Parameter(like, False) if like.is_meta else PackedWeight.of(self, like)  # meta: while it is loaded
        self._parameters["weight"] = self.owner[0].weight if self.owner else own

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the layer; codes, scales and offsets keep their types."""
        self.drop_panels()
        weight, bias = self.weight, self._parameters.get("bias")
        del self._parameters["weight"]

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        like = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
        self._parameters = {"weight": weight, **self._parameters}  # the first parameter again
        self.hold_weight(like.new_empty(1).expand(weight.shape))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _exchange:
            self.drop_panels()
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}weight")

    def _load_from_state_dict(self, *args: Any) -> None:
        self.drop_panels()
        super()._load_from_state_dict(*args)
        prefix, missing = args[1], args[4]
        missing.remove(f"{prefix}weight")

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and other processes, which make panels of their own."""
        with _exchange:
            self.drop_panels()
            own = dict.fromkeys(("_bias", "_rows")) | {"_buffers": dict(self._buffers)}  # another thread makes panels
            state = self.__dict__ | own
        like = torch.empty(self.weight.shape, dtype=self.weight.dtype, device="meta")
        return state | {"_parameters": {**self._parameters, "weight": like}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        like = self._parameters["weight"]
        assert like is not None
        self.hold_weight(torch.empty(1, dtype=like.dtype, device=self.source.weight_codes.device).expand(like.shape))

    def unpacked(self, rows: Tensor | None = None) -> Tensor:
        """The weight's values (rows, columns), or those of the given rows (…, columns), in the model's type."""
        if torch.compiler.is_exporting() or torch._C._get_tracing_state():
            raise ModelError(kernels.NO_GRAPH)
        layer = self.source
        wanted = torch.arange(layer.weight_shape[0], device=layer.weight_codes.device) if rows is None else rows
        known = wanted.is_cpu and type(wanted) is Tensor and not wanted.is_floating_point()
        values = table.rows(wanted) if known and (table := self._table()) is not None else None
        if values is None:  # index_select refuses rows below zero, as a float embedding does
            scale, offset, flat = layer.weight_scale, layer.weight_offset, wanted.flatten()
            codes, scale = layer.weight_codes.index_select(0, flat), scale[flat] if scale.dim() else scale
            offset = offset[flat] if offset is not None and offset.dim() else offset
            fmt = layer.weight_format
            values = decode(unpack_codes(codes, layer.weight_shape[1], fmt), fmt, scale, offset)
        return values.view(*wanted.shape, layer.weight_shape[1]).to(self.weight.dtype)

    def _table(self) -> native.Table | None:
        """The weight as kernels read it from its codes, where these are; None where they do not serve."""
        layer = self.source
        fmt, (count, columns) = layer.weight_format, layer.weight_shape
        codes, scale, offset = layer.weight_codes, layer.weight_scale, layer._buffers["weight_offset"]
        usual = native.serves(scale, offset) and codes.is_cpu and scale.numel() in (1, count)
        if not usual or fmt.bits > 8 or fmt.storage == "base3":
            return None
        state, kept = stamp(codes, scale, offset), layer._rows
        if kept is None or kept[0] != state:
            numbers = code_range(fmt)[0], 2 if fmt.kind == "binary" else 1
            kept = layer._rows = state, native.Table(codes, columns, fmt.bits, numbers, scale, offset)
        return kept[1]

    def weight_bytes(self) -> int:
        """Bytes of codes, scales and offsets in a file; 0 for a tied layer."""
        if self.owner:
            return 0
        rows, columns = self.weight_shape
        numbers = sum(tensor.nbytes for tensor in (self.weight_scale, self.weight_offset) if tensor is not None)
        return rows * bytes_per_row(columns, self.weight_format) + numbers


def weight_bytes(model: nn.Module, return_buffers: bool = True) -> int:
    """Bytes of all weights, scales and codes in memory, in whatever order the kernels keep them."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not isinstance(t, PackedWeight)]
    panels = (m._panels for m in model.modules() if isinstance(m, PackedLayer))
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values()) + sum(p.nbytes for p in panels if p is not None)


class PackedLinear(PackedLayer, nn.Linear):
    pass


class PackedConv1D(PackedLayer, Conv1D):
    bias: Tensor


class PackedConv2d(PackedLayer, nn.Conv2d):
    @outside_graphs
    def forward(self, input: Tensor) -> Tensor:
        if (out := self.integer_convolution(input)) is not None:
            return out
        weight: Tensor = self.unpacked().view(self.out_channels, -1, *self.kernel_size)
        return self._conv_forward(self.quantized_input(input), weight, self.bias)  # type: ignore[no-any-return]

    def integer_convolution(self, x: Tensor) -> Tensor | None:
        """Convolve by the integer kernels, which read and give channels last; None where they do not serve."""
        quantizer, fits = self.input_quantizer, x.dim() == 4 and x.shape[1] == self.in_channels
        served = quantizer is not None and fits and convolves(self, quantizer.format)
        if not served or (layer := self.layer_for(x)) is None:
            return None
        left, right, top, bottom = self._reversed_padding_repeated_twice
        kernel = self.kernel_size, self.stride, self.dilation, ((top, bottom), (left, right))
        out = convolve(x.float().permute(0, 2, 3, 1).contiguous(), layer.panels, layer.bias, layer.coding, kernel)
        return None if out is None else out.permute(0, 3, 1, 2).to(x.dtype)


class PackedExpertsLinear(PackedLayer, ExpertsLinear):
    def expert_weight(self, expert: int | None) -> Tensor:
        rows = torch.arange(self.weight_shape[0], device=self.source.weight_codes.device).view(self.layout.experts, -1)
        return self.unpacked(rows if expert is None else rows[expert])

    forward = outside_graphs(ExpertsLinear.forward)  # type: ignore[assignment]


class PackedEmbedding(PackedLayer, nn.Embedding):
    @outside_graphs
    def forward(self, input: Tensor) -> Tensor:
        return self.unpacked(input)

    def direct(self, x: Tensor) -> kernels.DirectCall | None:
        own = not self.owner and self.weight.dtype is torch.float32  # what an owner holds may change unseen
        table = self._table() if own else None
        return None if table is None else (native.Table.rows, (table, x))


class PackedScaledEmbedding(ScaledEmbedding, PackedEmbedding):
    pass


PACKED: dict[type[QuantLayer], type[PackedLayer]] = {
    layers.QuantLinear: PackedLinear,
    layers.QuantConv1D: PackedConv1D,
    layers.QuantConv2d: PackedConv2d,
    layers.QuantEmbedding: PackedEmbedding,
    layers.QuantScaledEmbedding: PackedScaledEmbedding,
    layers.QuantExpertsLinear: PackedExpertsLinear,
}


def make_packed(layer: QuantLayer, tensors: Mapping[str, Tensor], owner: PackedLayer | None = None) -> PackedLayer:
    """Turn a simulated layer into a packed one, in place, with these codes, scale and offset, or those of `owner`."""
    assert layer.weight_quantizer is not None
    fmt, (rows, columns) = layer.weight_quantizer.format, weight_matrix(layer).shape
    weight: Tensor = layer.weight  # type: ignore[assignment]
    del layer.weight_quantizer, layer.weight
    for state in ("_kept", "_float_type"):
        layer.__dict__.pop(state, None)
    layer.__class__ = PACKED[type(layer)]  # type: ignore[assignment]
    packed: PackedLayer = layer  # type: ignore[assignment]
    packed.weight_format, packed.weight_shape, packed.owner = fmt, (rows, columns), [] if owner is None else [owner]
    packed.places = weight.shape[2:].numel() if isinstance(layer, nn.Conv2d) else 1
    packed._parameters = {"weight": None, **packed._parameters}
    packed.hold_weight(weight)
    for name in ("weight_codes", "weight_scale", "weight_offset"):
        packed.register_buffer(name, tensors.get(name))
    return packed.requires_grad_(False)


@torch.no_grad()
def pack_layers(model: PreTrainedModel) -> None:
    """Pack every simulated layer that has a weight format, in place; activations stay simulated.

    Raises ModelError if a static scale was never found, before it changes anything.
    """
    for _, quantizer in fake_quants(model):
        quantizer.check_scale()
    owners: dict[nn.Parameter, PackedLayer] = {}
    for layer in list(model.modules()):
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None:
            weight: nn.Parameter = layer.weight  # type: ignore[assignment]
            matrix = weight_matrix(layer).contiguous()
            tensors, owner = _codes_and_scale(layer.weight_quantizer, matrix), owners.get(weight)
            if owner and not all(torch.equal(t, getattr(owner, name)) for name, t in tensors.items()):
                owner = None  # their scales were found apart
            owners.setdefault(weight, make_packed(layer, {} if owner else tensors, owner))


def _codes_and_scale(quantizer: FakeQuant, matrix: Tensor) -> dict[str, Tensor]:
    fmt, scale, offset = quantizer.format, quantizer.scale, quantizer.offset
    if scale is None:
        scale, offset = find_scale(matrix, fmt)
    codes = pack_codes(encode(matrix, fmt, scale, offset), fmt)
    tensors = {"weight_codes": codes, "weight_scale": scale.detach().clone()}
    return tensors if offset is None else tensors | {"weight_offset": offset.detach().clone()}
