"""Capture what a unit's layers and attention read, in one float run over all calls."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bittern.attention import Site, recording
from bittern.errors import InputError
from bittern.layers import QuantConv2d, QuantEmbedding, QuantExpertsLinear, QuantLayer, as_float
from bittern.ptq.stream import Call
from bittern.quantizers import stamp
from bittern.recipe import OPERANDS

MAX_ROWS = 1 << 13  # of a layer's input that are kept: more change no scale, and bound memory for any number of samples
MAX_MAP = 1 << 24  # entries of attention maps that are kept


@dataclass
class Inputs:
    """The tensor that some layers of a unit read: rows (N, in) of all samples, padding left out, and their samples."""

    layers: list[str]
    x: Tensor
    sample: Tensor  # (N)
    norm: str | None = None  # the norm whose output this is, if these layers are all that read it


@dataclass
class Heads:
    """Q, K, V (items, heads, tokens, head dim) and maps (items, heads, queries, keys) of one attention module. Grouped
    queries are rows of their key's head. Padded rows are zero: those that `valid_rows`, `valid_keys` leave out."""

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
    """All that layers and attention modules of a unit read. unclear: those whose rows belong to no known sample."""

    inputs: list[Inputs]
    heads: dict[str, Heads]
    unclear: list[str]


def unit_layers(name: str, module: nn.Module) -> dict[str, QuantLayer]:
    """Simulated layers of a unit that read activations and whose product is a matrix product, by full name."""
    others = QuantEmbedding | QuantExpertsLinear  # the rows of an expert are those that chose it
    found = {n: m for n, m in module.named_modules(prefix=name) if isinstance(m, QuantLayer)}
    return {n: m for n, m in found.items() if not isinstance(m, others) and getattr(m, "groups", 1) == 1}


def capture(calls: Sequence[Call], batches: Sequence[Mapping[str, Any]], sizes: Sequence[int], seed: int) -> Captured:
    """Run a unit in float on every call, keep what its layers and attention read, and set each call's output.

    sizes: samples in each batch; a unit that runs several times has a call for each run, with samples of its own. Of
    very many rows a random part is kept, the same for the same seed. What never runs here is unclear: a layer that is
    tied to one that does, or one that `calibrate` refuses.
    """
    unit, module = calls[0].unit, calls[0].module
    layers = unit_layers(unit, module)
    sites = [m for m in module.modules() if isinstance(m, Site) and m.formats]
    scaling = [(n, m) for n, m in module.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    norms = [(n, m) for n, m in scaling if "norm" in type(m).__name__.lower()]
    reads: dict[str, list[Inputs | None]] = {name: [] for name in layers}  # None: of no known sample
    heads: dict[str, list[Heads | None]] = {}

    def capture_call(call: Call, first: int) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + call.batch)
        batch, size = batches[call.batch], sizes[call.batch]
        seen: dict[tuple[Any, ...], Inputs | None] = {}  # what was read in this call
        made: dict[tuple[Any, ...], str] = {}  # tensors → the norm that made them
        keep: list[Any] = []  # so that no address is used twice

        def on_read(name: str, x: Tensor) -> None:
            keep.append(x)
            layer, key = layers[name], _address(x)
            if isinstance(layer, QuantConv2d):
                key += layer.kernel_size, layer.stride, layer.padding, layer.dilation
            if key not in seen:
                seen[key] = None
                if (found := _rows(layer, x, batch, size)) is not None:
                    kept = _part(len(found[0]), MAX_ROWS // len(calls), generator, x.device)
                    rows, sample = found[0][kept].detach().float().clone(), found[1][kept] + first
                    seen[key] = Inputs([], rows, sample, made.get(_address(x)))
            reads[name].append(seen[key])

        def on_norm(name: str, out: Any) -> None:
            if isinstance(out, Tensor):
                keep.append(out)
                made[_address(out)] = name

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(layer.register_forward_pre_hook(lambda _, args, name=name: on_read(name, args[0])))
            for name, norm in norms:
                stack.enter_context(norm.register_forward_hook(lambda _, __, out, name=name: on_norm(name, out)))
            stack.enter_context(as_float(module))
            taps = stack.enter_context(recording(sites, *OPERANDS))
            if unit in layers:
                on_read(unit, call.args[0])
            call.output = call.run()
        for name, *tensors in zip(taps.names["map"], *(taps[point] for point in OPERANDS), strict=True):
            heads.setdefault(name, []).append(_heads(tensors, batch, size, first, len(calls), generator))

    first = 0
    for call in calls:
        capture_call(call, first)
        first += sizes[call.batch]
    inputs: dict[tuple[int, ...], Inputs] = {}
    unclear = [name for name, parts in heads.items() if None in parts]
    for name, parts in reads.items():
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not any(len(part.x) for part in known):
            unclear.append(name)
            continue
        if (key := tuple(map(id, parts))) not in inputs:
            # of all calls: (rows, in), (rows)
            x, sample = (torch.cat([getattr(part, kind) for part in known]) for kind in ("x", "sample"))
            norm = known[0].norm if len({part.norm for part in known}) == 1 else None
            inputs[key] = Inputs([], x, torch.unique(sample, return_inverse=True)[1], norm)
        inputs[key].layers.append(name)
    for group in inputs.values():
        if group.norm is not None and not _alone(module, group, layers, calls[0]):
            group.norm = None
    joined = {name: _joined(*filter(None, parts)) for name, parts in heads.items() if name not in unclear}
    return Captured(list(inputs.values()), joined, unclear)


def _address(x: Tensor) -> tuple[Any, ...]:
    return *stamp(x), tuple(x.shape), tuple(x.stride())


def _part(count: int, wanted: int, generator: torch.Generator, device: torch.device) -> Tensor | slice:
    """Return a random part of so many indices, in order; all, if there are not more than wanted."""
    if count <= wanted:
        return slice(None)
    return torch.randperm(count, generator=generator)[:wanted].sort().values.to(device)


def _alone(module: nn.Module, group: Inputs, layers: Mapping[str, QuantLayer], call: Call) -> bool:
    """True if a group is all that reads its norm: half the norm's output and twice the weights change nothing then."""
    norm = module.get_submodule(group.norm or "")
    weights: set[Any] = {layers[name].weight for name in group.layers}
    if len(weights) < len(group.layers):
        return False
    scaled = [(p.detach(), 0.5) for p in norm.parameters(recurse=False)] + [(w.detach(), 2.0) for w in weights]
    try:
        for t, factor in scaled:
            t.mul_(factor)
        with as_float(module):
            out = call.run()
    finally:
        for t, factor in scaled:
            t.div_(factor)
    first, was = (tree_leaves(o)[0] for o in (out, call.output))
    return bool((first - was).norm() <= 1e-4 * was.norm())


def _rows(layer: QuantLayer, x: Tensor, batch: Mapping[str, Any], size: int) -> tuple[Tensor, Tensor] | None:
    """Return the rows (N, in) of a layer's matrix product that are not padding, and the sample in the batch of each;
    None if the samples cannot be told apart."""
    if x.dim() < (4 if isinstance(layer, QuantConv2d) else 2) or x.shape[0] % size:
        return None
    if isinstance(layer, QuantConv2d):
        x = F.pad(x, layer._reversed_padding_repeated_twice)  # (items, channels, height, width)
        x = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).mT  # (items, places, in)
    sample = _samples(x.shape[0], size, x.device)  # (items)
    sample = sample.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])  # all dimensions of x but the last
    valid = padding_mask(batch, x.shape[:2]) if x.dim() == 3 else None
    if valid is not None:
        return x[valid], sample[valid]  # (rows, in), (rows)
    return x.reshape(-1, x.shape[-1]), sample.reshape(-1)  # (rows, in), (rows)


def _samples(items: int, size: int, device: torch.device) -> Tensor:
    """Return the sample of each item of the leading dimension: windows and beams of a sample lie side by side."""
    return torch.arange(items, device=device) // max(items // size, 1)


def size_of(batch: Mapping[str, Any]) -> int:
    """Return how many samples a batch has. Raises InputError for one without tensors."""
    if (tensor := next((v for v in batch.values() if isinstance(v, Tensor) and v.dim()), None)) is None:
        raise InputError(f"a batch holds no tensors, only {', '.join(batch) or 'nothing'}")
    return len(tensor)


def padding_mask(batch: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """Return the padding mask of these tokens (samples, tokens), if the batch has one. Where a source and a target are
    equally long, and it may be either, the tokens that are real in both."""
    masks = (batch.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    fitting = [mask.bool() for mask in masks if isinstance(mask, Tensor) and mask.shape == torch.Size(shape)]
    return torch.stack(fitting).all(0) if fitting else None


def _heads(
    tensors: list[Tensor], batch: Mapping[str, Any], size: int, first: int, calls: int, generator: torch.Generator
) -> Heads | None:
    """Return what one call reads; None if there is nothing, or samples cannot be told apart."""
    query, key, _, map_ = tensors
    items, device = len(query), query.device
    if items % size or not map_.numel():
        return None
    kept = _part(items, max(1, MAX_MAP // (calls * map_[0].numel())), generator, device)
    valid = []
    for x in (query, key):
        mask = padding_mask(batch, (items, x.shape[2]))
        valid.append(torch.ones(items, x.shape[2], dtype=torch.bool, device=device) if mask is None else mask)
    groups = query.shape[1] // key.shape[1]
    valid_rows, valid_keys = valid[0].repeat(1, groups), valid[1]  # (items, groups · queries), (items, keys)

    def chosen(x: Tensor, valid: Tensor) -> Tensor:
        x = x.reshape(items, key.shape[1], -1, x.shape[-1])  # (items, key heads, rows, ·): grouped queries become rows
        return (x * valid[:, None, :, None])[kept].detach().float()  # (kept items, key heads, rows, ·)

    read = map(chosen, tensors, (valid_rows, valid_keys, valid_keys, valid_rows))
    parts = [*read, _samples(items, size, device)[kept] + first, valid_rows[kept], valid_keys[kept]]
    return Heads(*parts, groups=groups)


def _joined(*parts: Heads) -> Heads:
    """Join batches of different lengths along the items; what is added is zero, and so not valid."""
    joined = []
    for field_ in fields(Heads)[:-1]:
        tensors = [getattr(part, field_.name) for part in parts]  # (items, …) of each batch
        longest = map(max, zip(*(t.shape[1:] for t in tensors), strict=True))
        whole = tensors[0].new_zeros(sum(map(len, tensors)), *longest)  # (all items, …)
        for own, t in zip(whole.split([*map(len, tensors)]), tensors, strict=True):
            own[tuple(map(slice, t.shape))] = t
        joined.append(whole)
    return Heads(*joined, groups=parts[0].groups)
