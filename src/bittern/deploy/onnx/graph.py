"""Packed models as ONNX graphs of integer arithmetic.

While torch.export traces the model, each packed layer computes with the operators that the file shall have, on its own
codes and scales. So no pattern is searched for afterwards, and no float weight is ever exported.
"""

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes import common
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.attention import use_attention
from bittern.deploy.onnx.forms import LayerForm, integer_codes, may_saturate, pack_blocks, scales, zero_point
from bittern.deploy.packed import PackedLayer

OPSET, OPSET_INT2 = 21, 25  # INT4 weights came with 21, INT2 with 25
MICROSOFT = "com.microsoft"
LARGEST = 1_900_000_000  # bytes of weights in one file, which protobuf limits to 2 GiB
COMPUTES = ("MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "Gelu", "Erf", "Tanh", "Attention")
INTEGERS = {2: ir.DataType.INT2, 4: ir.DataType.INT4, 8: ir.DataType.INT8}


# ---- the operators of a layer


def use_operators(layers: Mapping[str, PackedLayer], forms: Mapping[str, LayerForm], safe: bool) -> None:
    """Let packed layers compute with the operators of their forms when they are traced, in place.

    What the operators read becomes buffers, so that it has the layer's name in the file. safe: weights that may
    saturate as signed bytes are stored unsigned.
    """
    for name, layer in layers.items():
        known = forms[name]
        for part, tensor in _stored(layer, known, safe).items():
            layer.register_buffer(part, tensor)
        layer.weight = nn.Parameter(torch.zeros(1, dtype=layer.weight.dtype), False)  # no value that a trace may keep
        # on the instance: other models of this process keep their methods
        vars(layer)["unpacked"] = partial(_rows if known.kind == "rows" else _weight, layer, known)
        if known.input is not None:
            vars(layer)["integer_product"] = partial(_product, layer, known)


def _stored(layer: PackedLayer, known: LayerForm, safe: bool) -> dict[str, Tensor | None]:
    """Tensors that the operators of a layer read beside its input and bias."""
    if known.kind == "float":
        return {"values": layer.unpacked()}
    codes = integer_codes(layer)
    blocks = -(-layer.weight_shape[1] // known.block) if known.block else 1
    if known.kind == "rows":
        return {"codes": pack_blocks(codes, known.bits, known.block), "scale": scales(layer)}
    if known.kind == "nbits":
        return {"codes": pack_blocks(codes, known.bits, known.block), "scales": scales(layer, blocks)}
    if known.kind == "portable":
        return {"codes": codes.to(torch.int8).t().contiguous(), "scales": scales(layer, blocks).t().contiguous()}
    scale = scales(layer)[:, 0].contiguous()
    if known.kind == "stored":
        return {"codes": codes.to(torch.int8), "scale": scale}
    found = {"codes": codes.to(torch.int8).t().contiguous(), "scale": scale, "zero": None}
    if safe and may_saturate(codes):  # unsigned codes take a kernel that adds in 32 bits
        unsigned = (codes + 128).to(torch.uint8).t().contiguous()
        found |= {"codes": unsigned, "zero": torch.full((len(codes),), 128, dtype=torch.uint8)}
    if known.kind == "static":
        assert known.input is not None
        assert known.input.scale is not None
        assert known.input.offset is not None
        zero = zero_point(known.input.scale, known.input.offset).to(torch.uint8)
        found |= {"input_scale": known.input.scale.detach().reshape(()), "input_zero": zero.reshape(())}
    return found


def _op(
    kind: str, inputs: Sequence[Tensor | None], shape: Sequence[Any], dtype: torch.dtype = torch.float32, **given: Any
) -> Tensor:
    """A node of the file: its operator, inputs, attributes, and the shape and type of its output."""
    version = 1 if kind.startswith(MICROSOFT) else None
    return torch.onnx.ops.symbolic(kind, inputs, given, dtype=dtype, shape=shape, version=version)


def _product(layer: Any, known: LayerForm, x: Tensor) -> Tensor:
    """The layer's output for x (…, columns): (…, rows)."""
    (rows, columns), shape = layer.weight_shape, (*x.shape[:-1], layer.weight_shape[0])
    x = x if known.clip is None else known.clip(x)
    if known.kind == "nbits":
        blocks = (x, layer.codes, layer.scales, None, None, layer.bias)
        sizes = {"K": columns, "N": rows, "bits": known.bits, "block_size": known.block}
        return _op(f"{MICROSOFT}::MatMulNBits", blocks, shape, **sizes, accuracy_level=4)
    if known.kind == "portable":
        coded = (layer.codes, layer.scales)
        weight = _op("DequantizeLinear", coded, layer.codes.shape, axis=0, block_size=known.block)
        out = _op("MatMul", (x, weight), shape)
        return out if layer.bias is None else out + layer.bias
    if known.kind == "static":
        scale, zero = layer.input_scale, layer.input_zero
        byte = _op("QuantizeLinear", (x, scale, zero), x.shape, torch.uint8)
    else:
        types, shapes = (torch.uint8, torch.float32, torch.uint8), (x.shape, (), ())
        byte, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear", (x,), dtypes=types, shapes=shapes
        )
    inputs = (byte, layer.codes, scale, layer.scale, zero, layer.zero, layer.bias)
    return _op(f"{MICROSOFT}::MatMulIntegerToFloat", inputs, shape)


def _weight(layer: Any, known: LayerForm, ids: Tensor | None = None) -> Tensor:
    """A weight (rows, columns) that is computed with in float, or the given rows of an embedding (…, columns)."""
    coded = known.kind != "float"
    weight = _op("DequantizeLinear", (layer.codes, layer.scale), layer.weight_shape, axis=0) if coded else layer.values
    return weight if ids is None else F.embedding(ids, weight)


def _rows(layer: Any, known: LayerForm, ids: Tensor) -> Tensor:
    """The rows `ids` of an embedding (…, columns): the bytes that are read, split into codes."""
    columns, per_byte, same = layer.weight_shape[1], 8 // known.bits, [0] * ids.dim()
    whole, parts = (*ids.shape, columns), (*ids.shape, columns // per_byte, per_byte)
    byte = partial(torch.tensor, dtype=torch.uint8)
    codes = _op("Gather", (layer.codes, ids), (*ids.shape, *layer.codes.shape[1:]), torch.uint8, axis=0)
    if per_byte > 1:
        codes = _op("Reshape", (codes, torch.tensor([*same, -1, 1])), (*parts[:-1], 1), torch.uint8)
        shifts = byte(list(range(0, 8, known.bits)))
        codes = _op("BitShift", (codes, shifts), parts, torch.uint8, direction="RIGHT")
        codes = _op("BitwiseAnd", (codes, byte(2**known.bits - 1)), parts, torch.uint8)
    codes = _op("Reshape", (codes, torch.tensor([*same, columns])), whole, torch.uint8)
    centred: Tensor = codes.float() - 2 ** (known.bits - 1)
    return centred * F.embedding(ids, layer.scale)


# ---- the trace


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
def trace_graph(model: PreTrainedModel, batch: Mapping[str, Tensor], outputs: Sequence[str]) -> ir.Model:
    """Turn a model into an ONNX graph with these outputs, whose batch and lengths may vary."""
    use_attention(model)
    sizes: dict[str, tuple[str | None, ...]]
    sizes = {"pixel_mask": ("height", "width"), "decoder_input_ids": ("decoder_length",)}
    if "pixel_mask" in batch:
        sizes["pixel_values"] = (None, "height", "width")
    dynamic = tuple(
        {i: size for i, size in enumerate(("batch", *sizes.get(name, ("length",) * (values.dim() == 2)))) if size}
        for name, values in batch.items()
    )
    with warnings.catch_warnings(action="ignore"), ExitStack() as quiet:  # the exporter warns of much that is no fault
        quiet.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
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
    assert program is not None
    return program.model


def finish(model: ir.Model, forms: Mapping[str, LayerForm]) -> None:
    """Make a traced graph what onnxruntime runs fastest, in place."""
    graph, ternary = model.graph, any(known.kind == "portable" and known.bits == 2 for known in forms.values())
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        value.name = name.removeprefix("model.")
        graph.initializers.pop(name, None)  # older versions of onnx_ir keep the old key
        value.metadata_props.clear()
        known, kind = forms.get(value.name.removesuffix(".codes")), value.const_value.dtype
        if known and known.kind == "portable":
            kind = INTEGERS[known.bits]  # which PyTorch lacks
        array = np.asarray(value.const_value.numpy().astype(kind.numpy(), copy=False), order="C")
        value.const_value, value.dtype = ir.Tensor(array, kind, name=value.name), kind
        graph.initializers[value.name] = value
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateHashedInitializersPass(size_limit=LARGEST)(model)  # tied codes and scales of equal inputs once
    common.CommonSubexpressionEliminationPass()(model)  # inputs that layers share are clipped and quantized once
    used = {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in graph) else {}
    graph.opset_imports.clear()
    graph.opset_imports.update({"": OPSET_INT2 if ternary else OPSET} | used)
    for node in graph:
        # The sum before a norm is a Sum: of Add and LayerNormalization onnxruntime makes a SkipLayerNormalization, six
        # times slower than both.
        before = node.inputs[0].producer() if node.op_type == "LayerNormalization" and node.inputs[0] else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"
        # Where onnxruntime knows from the file that two values between inputs and outputs are equally large it shares
        # their memory in another way, and the same operators take 7 to 10 % longer.
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.ir_version = "bittern", 13 if ternary else 10


# ---- the file


def float_nodes(model: ir.Model) -> dict[str, int]:
    """Count the operators that still compute in float, of those that take time."""
    return dict(Counter(node.op_type for node in model.graph.all_nodes() if node.op_type in COMPUTES).most_common())


def save_graph(model: ir.Model, file: Path) -> None:
    """Write the graph, with its weights in a file beside if they are more than one file can hold."""
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) > LARGEST
    ir.save(model, file, external_data=f"{file.name}.data" if large else None)


def shapes(values: Sequence[ir.Value]) -> dict[str, list[int | str]]:
    """Inputs or outputs: each dimension is a number, or the name of one that may vary."""
    return {str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape or ()] for v in values}
