"""Packed models as ONNX graphs of integer arithmetic: the trace, and the form that each layer gets.

torch.export sees each packed layer as one opaque node that bears its name; afterwards the node is replaced by integer
arithmetic with the layer's own codes and scales. So no pattern is searched for, and no float weight is ever exported.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.attention import use_attention
from bittern.deploy.onnx.plan import (
    Array,
    Plan,
    clamp,
    integer_codes,
    may_saturate,
    owner_of,
    pack_blocks,
    rounding,
    scales,
    swapped,
    zero_point,
)
from bittern.deploy.packed import PackedConv1D, PackedEmbedding, PackedLayer, PackedLinear

OPSET, OPSET_INT2 = 21, 25  # INT4 weights came with 21, INT2 with 25
DOMAIN, MICROSOFT = "bittern", "com.microsoft"
LARGEST = 1_900_000_000  # bytes of weights in one file, which protobuf limits to 2 GiB
COMPUTES = ("MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "Gelu", "Erf", "Tanh", "Attention")


# ---- the trace


def _opaque(kind: str, inputs: Sequence[Tensor], layer: str, shape: Sequence[Any]) -> Tensor:
    """A node of ours with the layer's name."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"layer": layer}, dtype=torch.float32, shape=shape, version=1
    )


@contextmanager
def _opaque_layers(model: nn.Module, plans: Mapping[str, Plan]) -> Iterator[None]:
    """Packed layers compute nothing and are one node each; quantizers only clip."""
    names = {module: name for name, module in model.named_modules()}
    linear = PackedLinear.forward

    def unpacked(self: PackedLayer) -> Tensor:
        return _opaque("weight", (self.weight,), names[self], self.weight_shape)

    def multiply(self: Any, x: Tensor) -> Tensor:
        known, own = plans[names[self]], self.input_quantizer
        if not known.multiplies:
            return linear(self, x)
        if own is not None:
            x = clamp(x, own, ranged=known.clips(own))
        inputs = (x,) if self.bias is None else (x, self.bias)
        return _opaque("linear", inputs, names[self], (*x.shape[:-1], self.weight_shape[0]))

    def look_up(self: Any, input: Tensor) -> Tensor:
        if plans[names[self]].kind != "rows":
            return nn.functional.embedding(input, self.unpacked())
        return _opaque("embedding", (input,), names[self], (*input.shape, self.weight_shape[1]))

    with (
        rounding(model, plans, exact=True),
        swapped(
            {
                (PackedLayer, "unpacked"): unpacked,
                (PackedLinear, "forward"): multiply,
                (PackedConv1D, "forward"): multiply,
                (PackedEmbedding, "forward"): look_up,
            }
        ),
    ):
        yield


class _Positional(nn.Module):
    """A model whose inputs and outputs are in order, as ONNX has them."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, values, strict=True))
        out = self.model(**given, **self.extra, return_dict=True)
        return tuple(out[name] for name in self.outputs)


@torch.no_grad()
def trace(
    model: PreTrainedModel, batch: Mapping[str, Tensor], outputs: Sequence[str], plans: Mapping[str, Plan]
) -> ir.Model:
    """The model as an ONNX graph with one node `bittern::…` for each packed layer; batch and length are dynamic."""
    use_attention(model)
    sizes: dict[str, tuple[str | None, ...]]
    sizes = {"pixel_mask": ("height", "width"), "decoder_input_ids": ("decoder_length",)}
    if "pixel_mask" in batch:
        sizes["pixel_values"] = (None, "height", "width")
    dynamic = tuple(
        {i: size for i, size in enumerate(("batch", *sizes.get(name, ("length",) * (values.dim() == 2)))) if size}
        for name, values in batch.items()
    )
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    with warnings.catch_warnings(), _opaque_layers(model, plans):
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                _Positional(model, list(batch), outputs).eval(),
                tuple(batch.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(batch),
                output_names=list(outputs),
                dynamic_shapes=(dynamic,),
            )
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
    assert program is not None
    return program.model


# ---- the forms


class Lowering:
    """Replaces the opaque nodes of a graph; what layers share (a quantized input, tied codes) is written once."""

    def __init__(self, graph: ir.Graph, layers: Mapping[str, PackedLayer], plans: Mapping[str, Plan], safe: bool):
        self.graph, self.layers, self.plans, self.safe = graph, layers, plans, safe
        self.constants: dict[object, ir.Value] = {}
        self.quantized: dict[object, tuple[ir.Value, ...]] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if node.domain == DOMAIN:
                name = node.attributes["layer"].as_string()
                self.tape = ir.tape.Tape()
                old = node.outputs[0]
                new = getattr(self, f"_{node.op_type}")(node, name, self.layers[name], self.plans[name])
                new.shape, new.dtype = old.shape, ir.DataType.FLOAT
                ir.convenience.replace_nodes_and_values(self.graph, node, [node], self.tape.nodes, [old], [new])

    def _op(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def _constant(self, name: str, values: Array | ir.TensorProtocol, key: object = None) -> ir.Value:
        """An initializer, written once for each key."""
        key = name if key is None else key
        if key not in self.constants:
            tensor = ir.tensor(values, name=name) if isinstance(values, np.ndarray) else values
            value = ir.Value(
                name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype)
            )
            self.graph.initializers[name] = self.constants[key] = value
        return self.constants[key]

    def _packed(self, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        """Codes in blocks of bytes, which tied layers share."""
        key = (owner_of(layer), known.bits, known.block)
        if key in self.constants:
            return self.constants[key]
        return self._constant(f"{name}.codes", pack_blocks(integer_codes(layer), known.bits, known.block), key)

    def _embedding(self, node: ir.Node, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        """The bytes of the rows that are read, split into codes."""
        ids, columns = node.inputs[0], layer.weight_shape[1]
        assert ids is not None
        rank = len(ids.shape or ())
        kept, per_byte = [0] * rank, 8 // known.bits
        codes = self._op("Gather", [self._packed(name, layer, known), ids], axis=0)
        if per_byte > 1:
            shape = self._constant(f"bytes.{rank}", np.array([*kept, -1, 1]))
            shifts = self._constant(f"shifts.{known.bits}", (known.bits * np.arange(per_byte)).astype(np.uint8))
            mask = self._constant(f"mask.{known.bits}", np.array(2**known.bits - 1, np.uint8))
            codes = self._op("BitShift", [self._op("Reshape", [codes, shape]), shifts], direction="RIGHT")
            codes = self._op("BitwiseAnd", [codes, mask])
        flat = self._op("Reshape", [codes, self._constant(f"columns.{rank}.{columns}", np.array([*kept, columns]))])
        zero = self._constant(f"zero.{known.bits}", np.array(2 ** (known.bits - 1), np.float32))
        centred = self._op("Sub", [self._op("Cast", [flat], to=ir.DataType.FLOAT), zero])
        factors = self._constant(f"{name}.scale", scales(layer))
        return self._op("Mul", [centred, self._op("Gather", [factors, ids], axis=0)])

    def _weight(self, node: ir.Node, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        """A weight (rows, columns) that is computed with in float."""
        if known.kind == "float":
            values = self._constant(f"{name}.values", layer.unpacked().numpy(), (owner_of(layer), "values"))
            return self._op("Identity", [values])
        codes = self._constant(f"{name}.codes", integer_codes(layer).astype(np.int8))
        return self._op("DequantizeLinear", [codes, self._constant(f"{name}.scale", scales(layer)[:, 0])], axis=0)

    def _linear(self, node: ir.Node, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        x, bias = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        assert x is not None
        form = {"nbits": self._blocks, "portable": self._standard}.get(known.kind, self._integers)
        return form(x, bias, name, layer, known)

    def _integers(self, x: ir.Value, bias: ir.Value | None, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        codes, zero = integer_codes(layer).astype(np.int8), None
        if self.safe and may_saturate(codes):  # unsigned codes take a kernel that adds in 32 bits
            codes = (codes.astype(np.int16) + 128).astype(np.uint8)
            zero = self._constant(f"{name}.zero", np.full(len(codes), 128, np.uint8))
        byte, scale, offset = self._bytes(x, known)
        weight = self._constant(f"{name}.codes", np.ascontiguousarray(codes.T))
        factors = self._constant(f"{name}.scale", scales(layer)[:, 0])
        return self._op("MatMulIntegerToFloat", [byte, weight, scale, factors, offset, zero, bias], MICROSOFT)

    def _blocks(self, x: ir.Value, bias: ir.Value | None, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        rows, columns = layer.weight_shape
        factors = self._constant(f"{name}.scales", scales(layer, -(-columns // known.block)))
        return self._op(
            "MatMulNBits",
            [x, self._packed(name, layer, known), factors, None, None, bias],
            MICROSOFT,
            K=columns,
            N=rows,
            bits=known.bits,
            block_size=known.block,
            accuracy_level=4,
        )

    def _standard(self, x: ir.Value, bias: ir.Value | None, name: str, layer: PackedLayer, known: Plan) -> ir.Value:
        kind = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}[known.bits]
        codes = np.ascontiguousarray(integer_codes(layer).T).astype(kind.numpy())
        factors = np.ascontiguousarray(scales(layer, -(-layer.weight_shape[1] // known.block)).T)
        inputs = [
            self._constant(f"{name}.codes", ir.Tensor(codes, kind, name=f"{name}.codes")),
            self._constant(f"{name}.scales", factors),
        ]
        out = self._op("MatMul", [x, self._op("DequantizeLinear", inputs, axis=0, block_size=known.block)])
        return out if bias is None else self._op("Add", [out, bias])

    def _bytes(self, x: ir.Value, known: Plan) -> tuple[ir.Value, ...]:
        """x as unsigned bytes, their scale and their zero point."""
        if known.kind == "dynamic":
            if (x, None) not in self.quantized:
                self.quantized[x, None] = tuple(self.tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3))
            return self.quantized[x, None]
        assert known.input is not None
        assert known.input.scale is not None
        assert known.input.offset is not None
        step, zero = known.input.scale.item(), int(zero_point(known.input.scale, known.input.offset).item())
        if (x, step, zero) not in self.quantized:
            scale = self._constant(f"step.{step!r}", np.array(step, np.float32))
            offset = self._constant(f"zero.u8.{zero}", np.array(zero, np.uint8))
            self.quantized[x, step, zero] = self._op("QuantizeLinear", [x, scale, offset]), scale, offset
        return self.quantized[x, step, zero]


def lower(model: ir.Model, layers: Mapping[str, PackedLayer], plans: Mapping[str, Plan], safe: bool) -> None:
    """Replace every opaque node, in place. safe: unsigned weights where signed ones may saturate."""
    common.CommonSubexpressionEliminationPass()(model)  # equal clips of one tensor, so that its bytes are shared
    Lowering(model.graph, layers, plans, safe).run()
    used = {MICROSOFT: 1} if any(n.domain == MICROSOFT for n in model.graph) else {}
    ternary = any(known.kind == "portable" and known.bits == 2 for known in plans.values())
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update({"": OPSET_INT2 if ternary else OPSET} | used)
    _keep_norms_apart(model.graph)
    _forget_shapes(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.ir_version = "bittern", 13 if ternary else 10


def _keep_norms_apart(graph: ir.Graph) -> None:
    """Write the sum before a norm as Sum, not Add.

    onnxruntime fuses Add and LayerNormalization to a SkipLayerNormalization that is six times slower than both.
    """
    for node in graph:
        before = node.inputs[0].producer() if node.op_type == "LayerNormalization" and node.inputs[0] else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"


def _forget_shapes(graph: ir.Graph) -> None:
    """Drop the shapes of all values between inputs and outputs.

    Where onnxruntime knows from the file that two values are equally large it shares their memory in another way, and
    the same operators take 7 to 10 % longer.
    """
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def float_nodes(model: ir.Model) -> dict[str, int]:
    """How many operators still compute in float, of those that take time."""
    counts = Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in COMPUTES)
    return dict(counts.most_common())


def save(model: ir.Model, file: Path) -> None:
    """Write the graph, with its weights in a file beside if they are more than one file can hold."""
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) > LARGEST
    ir.save(model, file, external_data=f"{file.name}.data" if large else None)


def shapes(values: Sequence[ir.Value]) -> dict[str, list[int | str]]:
    """Inputs or outputs: each dimension is a number, or the name of one that may vary."""
    return {str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()] for v in values}
