"""A whole Transformer block in one call of the kernels: nothing is handed back in between."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from bittern.native import structures as c
from bittern.native.codes import MOST_INPUTS, PANEL, Coding
from bittern.native.library import address, buffer, pointer, run
from bittern.native.products import ACTIVATIONS, Activation, Panels, check_codings, strided_mask, strides
from bittern.recipe import OPERANDS

LayerName = Literal["query", "key", "value", "output", "up", "down"]
LAYER_NAMES: tuple[LayerName, ...] = LayerName.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class KernelLayer:
    """A linear layer: packed weights, a bias as `padded_bias` gives it, and how its input is quantized."""

    panels: Panels
    bias: Tensor
    coding: Coding

    @cached_property
    def structure(self) -> c.Layer:
        return self.panels.structure(self.bias, self.coding)

    def product(self, x: Tensor) -> Tensor | None:
        """The outputs (…, outputs) for floats x (…, inputs). None if a value is not finite."""
        x, rows = x.contiguous(), x.numel() // self.panels.inputs
        data = address(x, "x", (*x.shape[:-1], self.panels.inputs))
        out = buffer(*x.shape[:-1], self.panels.outputs)
        return out if run("product", self.structure, data, rows, torch.get_num_threads(), pointer(out)) else None

    def part(self, first: int, outputs: int) -> KernelLayer:
        """Some of the outputs, in the same memory. Raises ValueError if they are no whole panels of this layer."""
        if first % PANEL or outputs % PANEL or first + outputs > self.panels.outputs:
            raise ValueError(f"outputs {first} to {first + outputs} are no panels of {self.panels.outputs} outputs")
        panels, rows = copy(self.panels), slice(first, first + outputs)
        panels.data = panels.data.view(len(panels.scale), -1)[rows].view(-1)
        panels.scale, panels.sums, panels.outputs = panels.scale[rows], panels.sums[rows], outputs
        return KernelLayer(panels, self.bias[rows], self.coding)


@dataclass(frozen=True)
class KernelNorm:
    weight: Tensor
    bias: Tensor
    epsilon: float

    def structure(self, columns: int) -> c.Norm:
        weight, bias = address(self.weight, "weight", (columns,)), address(self.bias, "bias", (columns,))
        return c.Norm(weight, bias, self.epsilon)


class KernelBlock:
    """Attention and FFN with their norms and residual sums.

    pre_norm: attention and FFN each read a norm, and are added to what that read; else each sum is normed. codings: of
    `query`, `key`, `value` and `map`, as in `attention`. Raises ValueError for parts that do not belong together.
    """

    def __init__(
        self,
        layers: Mapping[LayerName, KernelLayer],
        norms: tuple[KernelNorm, KernelNorm],
        codings: Mapping[str, Coding],
        *,
        pre_norm: bool,
        activation: Activation,
        heads: int,
        key_heads: int,
        scaling: float,
    ):
        self.codings, self.activation = codings, activation
        self.layers, self.norms, hidden = layers, norms, layers["query"].panels.inputs
        self.shape = hidden, heads
        sizes = {part: (layers[part].panels.inputs, layers[part].panels.outputs) for part in LAYER_NAMES}
        if heads < 1 or key_heads < 1 or heads % key_heads:
            raise ValueError(f"{heads} heads cannot share {key_heads} of keys")
        dim, value_dim = sizes["query"][1] // heads, sizes["value"][1] // key_heads
        self.widest = max(max(size) for size in sizes.values())
        expected = {
            "query": (hidden, heads * dim),
            "key": (hidden, key_heads * dim),
            "value": (hidden, key_heads * value_dim),
            "output": (heads * value_dim, hidden),
            "up": (hidden, sizes["up"][1]),
            "down": (sizes["up"][1], hidden),
        }
        if sizes != expected:
            raise ValueError(f"layers of sizes {sizes} do not make a block")
        self.heads = (heads, dim), (key_heads, dim), (key_heads, value_dim)  # of queries, keys and values
        check_codings(codings)
        self._structure = c.Block(
            *(layers[part].structure for part in LAYER_NAMES),
            (c.Norm * 2)(*(n.structure(hidden) for n in norms)),
            *(pre_norm, ACTIVATIONS.index(activation), heads, key_heads, dim, value_dim, scaling),
            *(codings[name].structure for name in OPERANDS),
        )
        self.address = ctypes.addressof(self._structure)

    def project(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Queries, keys and values (batch, heads, tokens, dim) of x (batch, tokens, hidden). None if a value is not
        finite."""
        made = [buffer(*x.shape[:2], *heads) for heads in self.heads]
        data = address(x, "x", (*x.shape[:2], self.shape[0])), *x.shape[:2], torch.get_num_threads()
        done = run("project", self.address, *data, *map(pointer, made))
        return tuple(t.transpose(1, 2) for t in made) if done else None  # (batch, heads, tokens, dim)

    def finish(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
        """The output for x, whose queries, of `project`, read keys and values (batch, key heads, keys, dim). None as in
        `run_blocks`."""
        (batch, tokens, hidden), keys, heads = x.shape, key.shape[2], self.shape[1]
        if keys > MOST_INPUTS or batch * tokens * max(heads * keys, self.widest) >= 2**31:
            return None
        mask, out = strided_mask(mask, (batch, heads, tokens, keys)), buffer(batch, tokens, hidden)
        query = query.transpose(1, 2)  # (batch, tokens, heads, dim)
        key, value = key.contiguous(), value.contiguous()
        shapes = [(batch, tokens, *self.heads[0]), *((batch, h, keys, dim) for h, dim in self.heads[1:])]
        names = "queries", "keys", "values"
        read = [address(*of) for of in zip((query, key, value), names, shapes, strict=True)]
        given = address(x, "x", (batch, tokens, self.shape[0])), batch, tokens, *read, keys
        rest = pointer(mask), strides(mask), torch.get_num_threads(), pointer(out)
        return out if run("finish", self.address, *given, *rest) else None


def run_blocks(blocks: Sequence[KernelBlock], x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Run blocks one after the other on x (batch, tokens, hidden), with an additive mask: the output of the last. None
    if a value is not finite, or x so large that the parts of a block should run one by one."""
    hidden, heads = blocks[0].shape
    if x.dim() != 3 or x.shape[2] != hidden or any(block.shape != (hidden, heads) for block in blocks):
        shapes = [block.shape for block in blocks]
        raise ValueError(f"x of shape {tuple(x.shape)} does not suit blocks of (hidden, heads) {shapes}")
    batch, tokens, _ = x.shape
    if batch * tokens * max(heads * tokens, *(block.widest for block in blocks)) >= 2**31 or tokens > 2**15:
        return None
    mask = strided_mask(mask, (batch, heads, tokens, tokens))
    made = [torch.empty_like(x) for _ in blocks[:3]]  # the last output, and two in turn for those before
    outs = [pointer(made[1 + i % 2]) for i in range(len(blocks) - 1)] + [pointer(made[0])]
    addresses = ctypes.c_void_p * len(blocks)
    done = run(
        *("blocks", addresses(*(block.address for block in blocks)), len(blocks)),
        *(address(x, "x", (batch, tokens, hidden)), batch, tokens),
        *(pointer(mask), strides(mask), torch.get_num_threads(), addresses(*outs)),
    )
    return made[0] if done else None
