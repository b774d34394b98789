"""Writes what kernels of any kind of CPU must give, in files for conformance.cpp, which runs where there is no Python.

    python tests/native/cases.py FOLDER

The integers are those of the simulated model: its codes, and numpy's 64-bit products of them. Floats stand beside
bounds of their rounding. A case is its name's number in conformance.cpp and arrays: how many, and the bytes of each.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bittern import native
from bittern.native import Coding
from bittern.native.products import ACTIVATIONS
from bittern.quantizers import TERNARY_THRESHOLD, encode, fake_quantize, find_scale, kernel_coding
from bittern.recipe import Format

QUANTIZE, LINEAR, TERNARY, ATTENTION, NORM, ACTIVATE, LOSSES, CONVOLVE = range(8)
FORMAT1 = Path(__file__).parents[1] / "data" / "format1"
WEIGHTS = {"ternary": (2, -1, 1), "2-bit": (2, -2, 1), "4-bit": (4, -8, 7), "8-bit": (8, -128, 127)}
INPUTS = {
    "dynamic": Format(),
    "clipped": Format(clip=1.5),
    "token": Format(granularity="token"),
    "asymmetric": Format(scheme="asymmetric"),
    "asymmetric token": Format(scheme="asymmetric", granularity="token", clip=1.0),
    "unsigned": Format(scheme="unsigned"),
    "static": Format(range="static"),
    "static asymmetric": Format(scheme="asymmetric", range="static"),
    "4-bit": Format(bits=4),
    "3-bit token": Format(bits=3, granularity="token"),
}
# rows, inputs, outputs: around the widths of registers, panels and blocks, and one row to many
SHAPES = [(1, 5, 7), (1, 64, 16), (2, 63, 33), (3, 130, 17), (4, 65, 16), (5, 32, 48), (7, 385, 31), (20, 900, 20)]
# batch, heads, heads of keys, queries, keys, dim, dim of values
ATTENTIONS = [(1, 1, 1, 1, 1, 1, 1), (1, 2, 2, 33, 64, 16, 16), (2, 4, 2, 5, 50, 24, 9), (1, 3, 1, 70, 97, 65, 40)]
Case = tuple[int, list[Any]]


def numbers(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


def coding_of(x: Tensor, fmt: Format) -> tuple[Coding, Tensor, Tensor | None]:
    """The kernels' coding, and the scale and offset that the quantizer finds."""
    scale, offset = find_scale(x, fmt)
    coding = kernel_coding(fmt, *((scale, offset) if fmt.range == "static" else (None, None)))
    assert coding is not None
    return coding, scale, offset


def quantize(x: Tensor, fmt: Format) -> Case:
    coding, scale, offset = coding_of(x, fmt)
    codes = encode(x, fmt, scale, offset) - coding.shift
    by_row = [torch.zeros(len(x), 1) + (0 if t is None else t) for t in (scale, offset)]
    values = fake_quantize(x, fmt, *((scale, offset) if fmt.range == "static" else (None, None)))
    return QUANTIZE, [numbers(*x.shape), coding.structure, x, codes.to(torch.int8), *by_row, values]


def linear(x: Tensor, fmt: Format, weight: Tensor, bits: int, low: int) -> Case:
    """weight: codes (outputs, inputs) of at least `low`."""
    coding, scale, offset = coding_of(x, fmt)
    codes, (outputs, inputs) = encode(x, fmt, scale, offset).numpy().astype(np.int64), weight.shape
    unit, bias = torch.rand(outputs) + 0.5, torch.randn(outputs)
    sums, totals = codes @ weight.numpy().T.astype(np.int64), weight.sum(1).numpy()
    scales, offsets = scale.double().numpy(), 0.0 if offset is None else offset.double().numpy()
    units, biases = unit.double().numpy(), bias.double().numpy()
    exact = (scales * sums + offsets * totals) * units + biases
    size = (np.abs(scales * sums) + np.abs(offsets * totals)) * units + np.abs(biases)
    unsigned = (weight - low).to(torch.uint8)
    header = numbers(len(x), inputs, outputs, bits, max(int(unsigned.max()), 1), -low)
    return LINEAR, [header, coding.structure, x, unsigned, unit, bias, sums, exact, 8 * 2.0**-24 * size + 1e-37]


def convolve(x: Tensor, fmt: Format, weight: Tensor, bits: int, low: int, stride: int, padding: int) -> Case:
    """x (batch, channels, height, width), weight: codes (outputs, channels, height, width) of at least `low`."""
    coding, scale, offset = coding_of(x, fmt)
    values = encode(x, fmt, scale, offset).double() * scale.double() + (0 if offset is None else offset.double())
    unit = torch.rand(len(weight)) + 0.5
    exact, size = (
        F.conv2d(v, w.double(), None, stride, padding) for v, w in ((values, weight), (values.abs(), weight.abs()))
    )
    unsigned = (weight - low).to(torch.uint8)
    around, kernel = [n + 2 * padding for n in x.shape[2:]], weight.shape[2:]
    image = numbers(
        len(x), *x.shape[2:], x.shape[1], padding, padding, *around, *exact.shape[2:], *kernel, stride, stride, 1, 1
    )
    header = numbers(weight[0].numel(), len(weight), bits, max(int(unsigned.max()), 1), -low)
    expected, bound = exact * unit.double()[:, None, None], 16 * 2.0**-24 * (size * unit[:, None, None]) + 1e-6
    tensors = [t.movedim(1, -1).contiguous() for t in (x, unsigned, expected, bound)]
    return CONVOLVE, [header, coding.structure, image, unit, *tensors]


def attention(shape: tuple[int, ...], static: bool, mask: Tensor | None) -> Case:
    """Its two products are seen through what follows them: one unit of a score moves the map far beyond its bound,
    and the context is compared with the integers that the map's own codes make."""
    batch, heads, key_heads, queries, keys, dim, value_dim = shape
    q = torch.randn(batch, queries, heads, dim)
    k, v = torch.randn(batch, keys, key_heads, dim), torch.randn(batch, keys, key_heads, value_dim)
    fmt = Format(range="static") if static else Format(clip=2.5)
    codings, rounded = [], []
    for x in (q, k, v):
        coding, scale, _ = coding_of(x, fmt)
        codings.append(coding)
        rounded.append((encode(x, fmt, scale), scale.double()))
    (cq, sq), (ck, sk), (cv, sv) = rounded
    scores = torch.einsum("bqhd,bkhd->bhqk", cq.double(), ck.double().repeat_interleave(heads // key_heads, 2))
    scores = scores * (sq * sk * 0.3) + (0 if mask is None else mask.double())
    top = Coding(0, 255, "unsigned", scale=1 / 255) if static else Coding(-128, 127, clip=2.5)
    flags = numbers(*shape, mask is not None, *((0, 0, 0) if mask is None else mask.stride()[:3]))
    formats = [coding.structure for coding in (*codings, top)]
    masked = torch.zeros(1) if mask is None else mask
    return ATTENTION, [
        flags,
        *formats,
        np.float32([0.3, float(sv)]),
        q,
        k,
        v,
        masked,
        cv.to(torch.int8),
        scores.softmax(-1),
    ]


def masks(shape: tuple[int, ...]) -> list[Tensor | None]:
    """None, padding, causal, one for each head, one row for all."""
    batch, heads, _, queries, keys = shape[:5]
    lowest = torch.finfo(torch.float32).min
    padding = torch.zeros(batch, 1, 1, keys)
    padding[..., keys // 2 + 1 :] = lowest
    causal = torch.zeros(queries, keys).masked_fill_(
        torch.ones(queries, keys).triu(1 + max(keys - queries, 0)) > 0, -torch.inf
    )
    full = (batch, heads, queries, keys)
    return [
        None,
        padding.expand(full),
        causal.expand(full),
        torch.randn(1, heads, queries, keys).expand(full),
        torch.randn(keys).expand(full),
    ]


def floats(name: int, header: np.ndarray[Any, Any], inputs: list[Tensor], expected: Tensor, bound: Tensor) -> Case:
    return name, [header, *inputs, expected, bound]


def cases() -> Iterator[Case]:
    for name, fmt in INPUTS.items():
        for i, (rows, inputs, outputs) in enumerate(SHAPES):
            x = torch.randn(rows, inputs)
            yield quantize(x, fmt)
            for weights, (bits, low, high) in WEIGHTS.items():
                if (i + len(name) + len(weights)) % 2 == 0 or name == "dynamic":
                    yield linear(x, fmt, torch.randint(low, high + 1, (outputs, inputs)), bits, low)
    for scale in (0.1, 1 / 3, 0.0127, 3e-5, 7.0):  # exactly between two codes, or one float beside
        halves, away = (torch.arange(-130, 130) + 0.5) * torch.tensor(scale), torch.tensor(torch.inf)
        ties = torch.cat([halves, torch.nextafter(halves, away), torch.nextafter(halves, -away)])[None]
        ties = torch.cat([ties, torch.tensor([[127 * scale]])], 1)
        yield quantize(ties.clamp(-127 * scale, 127 * scale), Format(range="static"))
    for file in sorted(FORMAT1.glob("packed-*.safetensors")):  # weights that users have
        for key, codes in load_file(file).items():
            low, high = int(codes.min()), int(codes.max())
            if key.startswith("codes.") and codes.dim() == 2 and high - low < 256:
                bits = next(bits for bits in (2, 4, 8) if high - low < 2**bits)
                yield linear(torch.randn(9, codes.shape[1]), Format(), codes, bits, low)
    for channels, side, kernel, stride, zeros in (
        (3, 17, 7, 2, 3),
        (20, 9, 3, 1, 1),
        (64, 7, 1, 1, 0),
        (5, 12, 4, 4, 0),
    ):
        for name in ("dynamic", "unsigned", "static asymmetric"):
            for bits, low, high in WEIGHTS.values():
                weight = torch.randint(low, high + 1, (18, channels, kernel, kernel))
                yield convolve(torch.randn(2, channels, side, side + 1), INPUTS[name], weight, bits, low, stride, zeros)
    for shape in ATTENTIONS:
        for static in (False, True):
            for mask in masks(shape):
                yield attention(shape, static, mask)
    for rows, columns in ((1, 1), (3, 7), (5, 130)):
        x, weight, bias = torch.randn(rows, columns) * 3 + 1, torch.randn(columns), torch.randn(columns)
        normed = F.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
        yield floats(NORM, numbers(rows, columns), [x, weight, bias], normed, 1e-5 * normed.abs() + 1e-5)
    x = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([0.0, -0.0, 1e-30, -80.0, 300.0])])
    references = (F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.relu)
    for activation, reference in zip(ACTIVATIONS[1:], references, strict=True):
        bound = 4e-7 * x.abs().clamp(min=1)
        yield floats(ACTIVATE, numbers(ACTIVATIONS.index(activation)), [x], reference(x.double()), bound)
    for clip in (None, 0.5):
        for granularity in ("tensor", "row"):
            x = torch.randn(40, 77)
            rounded = fake_quantize(x, Format(kind="ternary", granularity=granularity, clip=clip))
            header = np.float32([TERNARY_THRESHOLD, torch.inf if clip is None else clip])
            yield TERNARY, [numbers(x.numel(), x.numel() if granularity == "tensor" else 77), header, x, rounded]
    x, scales, offsets = torch.randn(6, 50), torch.rand(5, 6) + 0.1, torch.randn(5, 6)
    factor, rest, first = torch.randn(50, 8), torch.rand(50), torch.randn(6, 50)
    unit, shift = scales[:, :, None], offsets[:, :, None]
    errors = (((x - shift) / unit).round().clamp(-8, 7) * unit + shift - x).double()
    loss = (errors @ factor.double()).square().sum(-1) + ((first + rest * errors) * errors).sum(-1)
    size = (errors.abs() @ factor.double().abs()).square().sum(-1) + (
        (first.abs() + rest * errors.abs()) * errors.abs()
    ).sum(-1)
    tensors = [x, scales, offsets, factor.T.contiguous(), rest, first]
    yield floats(LOSSES, numbers(6, 50, 5, 8), tensors, loss, 1e-5 * size)


def data(part: Any) -> bytes:
    """An array's bytes: floats as float32, other numbers as they are but for int64, which becomes int32."""
    if isinstance(part, (Tensor, np.ndarray)):
        array = np.asarray(part)
        small = {"float64": np.float32, "int64": np.int32}.get(array.dtype.name)
        return np.ascontiguousarray(array if small is None else array.astype(small)).tobytes()
    return bytes(part)


def write(folder: Path) -> int:
    """Write folder/cases; returns how many there are."""
    torch.manual_seed(0)
    with native.disabled(), torch.no_grad(), (folder / "cases").open("wb") as file:
        count = 0
        for name, parts in cases():
            file.write(struct.pack("<ii", name, len(parts)))
            for raw in map(data, parts):
                file.write(struct.pack("<q", len(raw)) + raw)
            count += 1
    return count


if __name__ == "__main__":
    print(write(Path(sys.argv[1])), "cases")
