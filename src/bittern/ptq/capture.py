"""Capture what a unit's layers and attention read, in one float run over all batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.attention import Site, recording
from bittern.errors import ModelError
from bittern.layers import QuantConv2d, QuantEmbedding, QuantLayer, as_float
from bittern.ptq.stream import Call
from bittern.quantizers import stamp
from bittern.recipe import OPERANDS

MAX_ROWS = 1 << 13  # of a layer's input that are kept: more change no scale, and bound memory for any number of samples
MAX_MAP = 1 << 24  # entries of attention maps that are kept


@dataclass
class Inputs:
    """The tensor that some layers of a unit read: rows (N, in) of all samples, padding left out."""

    layers: list[str] = field(default_factory=list)
    norm: str | None = None  # the norm whose output this is, if these layers are all that read it
    parts: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        return torch.cat(self.parts)

    @property
    def sample(self) -> Tensor:
        found: Tensor = torch.unique(torch.cat(self.samples), return_inverse=True)[1]
        return found


@dataclass
class Heads:
    """Q, K, V (items, heads, tokens, head dim) and maps (items, heads, queries, keys) of one attention module.

    Grouped queries are rows of their key's head. Padded rows are zero; `rows` and `keys` tell how many are not.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    map: Tensor
    sample: Tensor  # (items)
    valid_rows: Tensor  # (items, queries), bool
    valid_keys: Tensor  # (items, keys), bool
    groups: int = field(kw_only=True)  # query heads to a key head


@dataclass
class Captured:
    inputs: list[Inputs]
    heads: dict[str, Heads]


def unit_layers(name: str, module: nn.Module) -> dict[str, QuantLayer]:
    """Simulated layers of a unit that read activations and whose product is a matrix product, by full name."""
    found = ((f"{name}.{n}" if n else name, m) for n, m in module.named_modules())
    return {n: m for n, m in found if isinstance(m, QuantLayer) and not isinstance(m, QuantEmbedding) and _dense(m)}


def _dense(layer: QuantLayer) -> bool:
    return not isinstance(layer, QuantConv2d) or layer.groups == 1


def capture(calls: Sequence[Call], batches: Sequence[Mapping[str, Any]], sizes: Sequence[int], seed: int) -> Captured:
    """Run a unit in float on every call, keep what its layers and attention read, and set each call's output.

    sizes: samples in each batch. Of very many rows a random part is kept, the same for the same seed.
    """
    unit, module = calls[0].unit, calls[0].module
    layers = unit_layers(unit, module)
    sites = [m for m in module.modules() if isinstance(m, Site) and m.formats]
    groups: dict[str, Inputs] = {}
    heads: dict[str, list[tuple[Tensor, ...]]] = {site.name: [] for site in sites}
    grouped: dict[str, int] = {}

    def capture_call(call: Call, first: int) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + call.batch)
        batch, size = batches[call.batch], sizes[call.batch]
        seen: dict[tuple[Any, ...], str] = {}  # tensors of this call → the first layer that read it
        norms: dict[tuple[Any, ...], str] = {}  # → the norm that made it
        keep: list[Tensor] = []  # so that no address is used twice

        def read(name: str, x: Tensor) -> None:
            owner = seen.setdefault((*_address(x), _unfolding(layers[name])), name)
            keep.append(x)
            if owner == name:
                rows, sample = _rows(layers[name], x, batch, size)  # (rows, in), (rows)
                if (wanted := MAX_ROWS // len(calls)) < len(rows):
                    some = torch.randperm(len(rows), generator=generator)[:wanted].sort().values.to(rows.device)
                    rows, sample = rows[some], sample[some]
                group = groups.setdefault(name, Inputs(norm=norms.get(_address(x))))
                group.parts.append(rows.detach().float().clone())
                group.samples.append(sample + first)
            if name not in groups[owner].layers:
                groups[owner].layers.append(name)

        def made(name: str, out: Any) -> None:
            if isinstance(out, Tensor):
                norms[_address(out)] = name
                keep.append(out)

        with ExitStack() as stack:
            for name, layer in layers.items():
                hook = layer.register_forward_pre_hook(lambda m, args, name=name: read(name, args[0]))
                stack.callback(hook.remove)
            for name, norm in _norms(module):
                stack.callback(norm.register_forward_hook(lambda m, args, out, name=name: made(name, out)).remove)
            stack.enter_context(as_float(module))
            taps = stack.enter_context(recording(sites, *OPERANDS))
            if unit in layers:
                read(unit, call.args[0])
            call.output = call.run()
        for name, *tensors in zip(taps.names["map"], *(taps[point] for point in OPERANDS), strict=True):
            grouped[name] = tensors[0].shape[1] // tensors[1].shape[1]
            heads[name].append(_heads(tensors, batch, size, first, len(calls), generator))

    first = 0
    for call in calls:
        capture_call(call, first)
        first += sizes[call.batch]
    for name in set(layers) - {n for g in groups.values() for n in g.layers}:
        raise ModelError(f"{name} never ran during calibration; use batches that reach it, or keep it float")
    for group in groups.values():
        if group.norm is not None and not _alone(module, group, layers, calls[0]):
            group.norm = None
    joined = {
        n: Heads(*map(_pad_and_join, zip(*parts, strict=True)), groups=grouped[n])
        for n, parts in heads.items()
        if parts
    }
    return Captured(list(groups.values()), joined)


def _address(x: Tensor) -> tuple[Any, ...]:
    return *stamp(x), tuple(x.shape), tuple(x.stride())


def _alone(module: nn.Module, group: Inputs, layers: Mapping[str, QuantLayer], call: Call) -> bool:
    """True if a group is all that reads its norm: half the norm's output and twice the weights change nothing then."""
    norm = module.get_submodule(group.norm or "")
    halved = [p.detach() for p in norm.parameters(recurse=False)]
    doubled = [p.detach() for p in {id(w): w for w in (layers[name].weight for name in group.layers)}.values()]  # type: ignore[operator]
    if len(doubled) < len(group.layers):
        return False
    try:
        for t in halved:
            t.div_(2)
        for t in doubled:
            t.mul_(2)
        with as_float(module):
            out = call.run()
    finally:
        for t in halved:
            t.mul_(2)
        for t in doubled:
            t.div_(2)
    first, was = (o[0] if isinstance(o, tuple) else o for o in (out, call.output))
    return bool((first - was).norm() <= 1e-4 * was.norm())


def _norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the norms that scale their channels."""
    for name, m in module.named_modules():
        if "norm" in type(m).__name__.lower() and isinstance(getattr(m, "weight", None), nn.Parameter):
            yield name, m


def _unfolding(layer: QuantLayer) -> tuple[Any, ...]:
    if not isinstance(layer, QuantConv2d):
        return ()
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation


def _rows(layer: QuantLayer, x: Tensor, batch: Mapping[str, Any], size: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a layer's matrix product that are not padding, and the sample in the batch of each."""
    if isinstance(layer, QuantConv2d):
        x = F.pad(x, layer._reversed_padding_repeated_twice)  # (batch, channels, height, width)
        x = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).mT  # (batch, places, in)
    sample = _samples(x.shape[0], size, layer.weight.device)  # type: ignore[arg-type]
    sample = sample.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])  # all dimensions of x but the last
    valid = _valid(batch, x.shape[:2]) if x.dim() == 3 else None
    if valid is not None:
        return x[valid], sample[valid]  # (rows, in), (rows)
    return x.reshape(-1, x.shape[-1]), sample.reshape(-1)


def _samples(items: int, size: int, device: torch.device) -> Tensor:
    """Return the sample of each item of the leading dimension: windows and beams of a sample lie side by side."""
    if items % size:
        raise ModelError(f"a layer reads {items} items from {size} samples; their samples cannot be told apart")
    return torch.arange(items, device=device) // (items // size)


def _valid(batch: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """Return the padding mask of these tokens (samples, tokens), if the batch has one."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.shape == torch.Size(shape):
            return mask.bool()
    return None


def _heads(
    tensors: list[Tensor], batch: Mapping[str, Any], size: int, first: int, calls: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    query, key, value, map_ = tensors
    items, device = len(query), query.device
    wanted = max(1, MAX_MAP // (calls * map_[0].numel()))
    some = torch.randperm(items, generator=generator)[:wanted].sort().values.to(device)
    rows, keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    valid_rows, valid_keys = (
        torch.ones(items, n, dtype=torch.bool, device=device) if (mask := _valid(batch, (items, n))) is None else mask
        for n in (rows, keys)
    )
    valid_rows = valid_rows.repeat(1, groups)  # (items, groups · queries)

    def chosen(x: Tensor, valid: Tensor) -> Tensor:
        x = x.reshape(items, key.shape[1], -1, x.shape[-1])  # (items, key heads, rows, ·): grouped queries become rows
        return (x * valid[:, None, :, None])[some].detach().float()

    return (
        chosen(query, valid_rows),
        chosen(key, valid_keys),
        chosen(value, valid_keys),
        chosen(map_, valid_rows),
        _samples(items, size, device)[some] + first,
        valid_rows[some],
        valid_keys[some],
    )


def _pad_and_join(parts: tuple[Tensor, ...]) -> Tensor:
    """Join batches of different lengths along the items; what is added is zero, and so not valid."""
    shape = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    padded = [
        F.pad(p, [n for a, b in zip(reversed(p.shape[1:]), reversed(shape), strict=True) for n in (0, b - a)])
        for p in parts
    ]
    return torch.cat(padded)
