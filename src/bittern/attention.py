"""The one attention function: quantizes, records and replaces what happens inside attention, for every family.

transformers calls it through `AttentionInterface` under the name `bittern`, with Q, K, V and the mask of each layer.
A `Site`, a child of each attention module, owns the quantizers of its two matmuls and says what to record or replace.
Where a family computes attention in its own code, the site gets at the two matmuls by a `products.Watch`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from bittern import kernels
from bittern.anatomy import Anatomy, Attention, holding, record_of
from bittern.compat import active_collector, eager_mask
from bittern.errors import ModelError
from bittern.products import SITE, Plan, unwatch, watch
from bittern.quantizers import FakeQuant, forget_input
from bittern.recipe import OPERANDS, Format

NAME = SITE

Point = Literal[
    "query",
    "key",
    "value",  # (batch, heads, tokens, head dim), before quantization; key and value heads may be fewer
    "score",  # AS = QKᵀ·scaling + bias + mask (batch, heads, queries, keys); masked places hold the type's minimum
    "map",  # SA = softmax(AS), before dropout and quantization
    "context",  # AC = SA·V (batch, heads, queries, head dim)
    "output",  # AO = concat(AC)·W_O, before dropout and residual (batch, queries, hidden)
    "residual",  # Y before its norm: X + AO; only where the block has such a sum before a norm
    "norm",  # the norm of that sum: Y of post-norm models [KD]
    "ffn",  # output of the second FFN linear
    "hidden",  # output of the block
    "embedding",  # what the first block of a stack reads
]
POINTS: tuple[Point, ...] = Point.__args__  # type: ignore[attr-defined]


class Taps(dict[Point, list[Tensor]]):
    """Recorded tensors by point, in order of execution; `names[point]` holds the attention module of each.

    masks: what each attention call was given as its mask, with the name of its module.
    """

    def __init__(self, points: tuple[Point, ...]):
        super().__init__({p: [] for p in points})
        self.names: dict[Point, list[str]] = {p: [] for p in points}
        self.masks: list[tuple[str, Tensor | None]] = []


def stand_in(own: Tensor, given: Tensor, share: float) -> Tensor:
    """Return `own` with a share of `given` in its place, whose share of the gradient is lost: bypassed weights get
    zeros and stay in the graph, since DDP waits for the gradients of every weight."""
    return own.clone().copy_(given) if share == 1 else own.lerp(given.to(own.dtype).expand_as(own), share)


class Site(nn.Module):
    """Belongs to one attention module: its quantizers, and what is recorded and replaced there.

    plan: where the module's own code has the two matmuls; None if it calls transformers' AttentionInterface.
    """

    def __init__(self, name: str, formats: Mapping[str, Format], plan: Plan | None = None):
        super().__init__()
        self.name, self.plan = name, plan
        # Names that no renaming pattern of a transformers checkpoint conversion touches.
        for point, fmt in formats.items():
            self.add_module(f"quantize_{point}", FakeQuant(fmt, f"{name}.{point}"))
        self.taps: Taps | None = None
        self.replacements: dict[str, Sequence[Tensor]] = {}  # for each run of the module in a forward
        self.runs: Counter[str] = Counter()
        self.share = 1.0  # of the replacements in what goes on
        self.hooks: dict[Point, Any] = {}
        self.on_kernels = False  # set in packed models

    @property
    def formats(self) -> dict[str, Format]:
        """Formats of the operands that are quantized here."""
        return {operand: q.format for operand in OPERANDS if (q := self.quantizer(operand)) is not None}

    @property
    def points(self) -> tuple[Point, ...]:
        """Points to record and replace here: blocks differ in their norms, and FFN and output have one site."""
        return tuple(p for p in POINTS if p in ("query", "key", "value", "score", "map", "context") or p in self.hooks)

    def begin(self, mask: Tensor | None) -> None:
        """One attention is computed, with this mask."""
        forget_input()
        if self.taps is not None:
            self.taps.masks.append((self.name, mask))

    def attend(self, *given: Any) -> Tensor:
        """Context (batch, heads, queries, head dim) of attention that a module's own code gives to one function."""
        context, _ = attention_forward(*given)  # (batch, queries, heads, head dim)
        return context.transpose(1, 2)

    def tap(self, point: Point, x: Tensor) -> Tensor:
        """Record x if asked to, and give back what stands for it."""
        if self.taps is not None and point in self.taps:
            self.taps[point].append(x)
            self.taps.names[point].append(self.name)
        if point in self.replacements:
            all_given = self.replacements[point]
            given = all_given[self.runs[point] % len(all_given)]
            self.runs[point] += 1
            if given.shape[1:] != x.shape[1:] or given.shape[0] not in (1, x.shape[0]):
                shapes = f"has shape {tuple(x.shape)}, its replacement {tuple(given.shape)}"
                raise ModelError(f"{self.name}.{point} {shapes}")
            x = stand_in(x, given, self.share)
        return x

    def integer(self, mask: Tensor | None) -> bool:
        """True if kernels may compute this attention, of which nothing is recorded or replaced."""
        return self.on_kernels and not self.watched() and (mask is None or mask.dtype != torch.bool)

    def on_integers(self, *given: Any) -> tuple[Tensor, Tensor] | None:
        """What kernels give for query, key, value, masks and scaling: context (batch, queries, heads, dim) and map."""
        forget_input()
        quantizers: dict[str, FakeQuant | None] = {operand: self.quantizer(operand) for operand in OPERANDS}
        return kernels.attend(quantizers, *given)

    def watched(self) -> bool:
        """True if something is recorded or replaced here."""
        return self.taps is not None or bool(self.replacements)

    def quantizer(self, point: str) -> FakeQuant | None:
        return self._modules.get(f"quantize_{point}")  # type: ignore[return-value]

    def quantize(self, point: str, x: Tensor) -> Tensor:
        quantizer = self.quantizer(point)
        return x if quantizer is None else quantizer(x)

    # Bound methods, so that a deep copy of the model hooks its own sites.
    def on_output(self, point: Point, module: nn.Module, args: Any, out: Any) -> Any:
        return (self.tap(point, out[0]), *out[1:]) if isinstance(out, tuple) else self.tap(point, out)

    def on_input(self, point: Point, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (self.tap(point, args[0]), *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, kwargs | {name: self.tap(point, kwargs[name])}


_NO_SITE = Site("", {})  # of modules where nothing is quantized, recorded or replaced


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Explicit attention with the meaning of each family's own eager function.

    query (batch, heads, queries, head dim); key, value with as many or, grouped, fewer heads; the mask is additive or
    boolean (True: attend). Returns the context (batch, queries, heads, head dim) and the map.
    """
    site: Site = module._modules.get(NAME, _NO_SITE)  # type: ignore[assignment]
    sinks = next((x for x in (s_aux, sinks) if x is not None), getattr(module, "sinks", None))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    site.begin(attention_mask)
    if softcap is None and sinks is None and site.integer(attention_mask) and not (dropout and module.training):
        masks = tuple(x for x in (position_bias, attention_mask) if x is not None)  # (batch or 1, heads or 1, …, keys)
        if (found := site.on_integers(query, key, value, masks, scaling)) is not None:
            return found[0], found[1].contiguous()  # rows of the kernels' maps are whole panels
    query, key, value = site.tap("query", query), site.tap("key", key), site.tap("value", value)
    query, key, value = site.quantize("query", query), site.quantize("key", key), site.quantize("value", value)
    if (groups := query.shape[1] // key.shape[1]) > 1:  # (batch, key heads, keys, dim) → (batch, heads, keys, dim)
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (batch, heads, queries, keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    scores = site.tap("score", scores)
    if sinks is not None:  # an extra key that takes probability and gives no value, of each head or of each query too
        sinks = sinks if sinks.dim() == 4 else sinks.reshape(1, -1, 1, 1)
        sink_scores = sinks.expand(*scores.shape[:-1], 1)  # (batch, heads, queries, 1)
        scores = torch.cat([scores, sink_scores], -1)  # (batch, heads, queries, keys + 1)
    probabilities = F.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        probabilities = probabilities[..., :-1]  # (batch, heads, queries, keys)
    probabilities = site.tap("map", probabilities)
    dropped = site.quantize("map", F.dropout(probabilities, dropout, module.training))
    context = site.tap("context", torch.matmul(dropped, value))  # (batch, heads, queries, dim)
    return context.transpose(1, 2).contiguous(), probabilities  # (batch, queries, heads, dim)


def collects(part: str) -> bool:
    """True if transformers collects in this forward what has this in its name: `attentions`, or any for no name."""
    return any(part in key for key in active_collector.get() or ())


def only_watches(hook: Any) -> bool:
    """True if a forward hook does nothing but when `Site.integer` or `collects` says so."""
    owner = getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)
    return isinstance(owner, Site) or getattr(hook, "__name__", "") == "output_capturing_hook"


AttentionInterface.register(NAME, attention_forward)
# Without a mask function under the same name, transformers passes no mask at all and says nothing.
AttentionMaskInterface.register(NAME, eager_mask)


def attach(model: PreTrainedModel, anatomy: Anatomy, formats: Mapping[str, Mapping[str, Format]] | None = None) -> None:
    """Give each attention module a Site and let the model use our attention; `detach` undoes it.

    formats: attention module → formats of `query`, `key`, `value`, `map` to quantize. Attaching again is harmless
    and keeps the quantizers that are there.
    """
    modules = dict(model.named_modules())
    hooked: set[str] = set()
    for part in anatomy.attentions:
        site = modules[part.name]._modules.get(NAME)
        if not isinstance(site, Site):
            site = add_site(modules[part.name], Site(part.name, (formats or {}).get(part.name, {}), part.plan))
        for name in part.inputs:
            modules[name].shares_input = True
        if not site.hooks:
            site.hooks = dict(_hook(site, part, modules, anatomy, hooked))
    if anatomy.attentions:  # others may be what Bittern does not compute
        use_attention(model)


def add_site(module: nn.Module, site: Site) -> Site:
    module.add_module(NAME, site)
    if site.plan is not None:
        watch(module)
    return site


def _hook(
    site: Site, part: Attention, modules: Mapping[str, nn.Module], anatomy: Anatomy, hooked: set[str]
) -> Iterator[tuple[Point, Any]]:
    def outputs(point: Point, name: str) -> tuple[Point, Any]:
        return point, modules[name].register_forward_hook(partial(site.on_output, point))

    def inputs(point: Point, name: str) -> tuple[Point, Any]:
        return point, modules[name].register_forward_pre_hook(partial(site.on_input, point), with_kwargs=True)

    if part.output:
        yield outputs("output", part.output)
    if part.norm and part.norm_reads_residual:
        yield inputs("residual", part.norm)
        yield outputs("norm", part.norm)
    block = anatomy.block_of(part)
    if block.name not in hooked:
        hooked.add(block.name)
        if block.ffn_out:
            yield outputs("ffn", block.ffn_out)
        yield outputs("hidden", block.name)
        if block is next(b for b in anatomy.blocks if b.stack == block.stack):
            yield inputs("embedding", block.name)


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that decide which attention function each part of the model calls."""
    configs = (getattr(module, "config", None) for module in model.modules())  # plain modules may have their own
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def use_attention(model: PreTrainedModel) -> None:
    """Switch the model to our attention, remembering what it had."""
    record = record_of(model)
    if record.attention_was is None:
        record.attention_was = [config._attn_implementation for config in attention_configs(model)]
    for config in attention_configs(model):
        config._attn_implementation_internal = NAME


def detach(model: PreTrainedModel) -> None:
    """Remove all sites and give the model its own attention back."""
    for module in list(model.modules()):
        module.__dict__.pop("shares_input", None)
        site = module._modules.get(NAME)
        if isinstance(site, Site):
            while site.hooks:
                site.hooks.popitem()[1].remove()
            unwatch(module)
            del module._modules[NAME]
    record = record_of(model)
    if record.attention_was is not None:
        for config, name in zip(attention_configs(model), record.attention_was, strict=True):
            config._attn_implementation_internal = name
        record.attention_was = None


def sites(model: nn.Module) -> list[Site]:
    """Return all sites of a model, in the order of its modules. Raises ModelError if it has none."""
    if not (found := [m for m in model.modules() if isinstance(m, Site)]):
        raise ModelError(
            f"{type(model).__name__} has no attention sites: call attention.attach(model, anatomy) first; if the "
            "anatomy has no attention, since Bittern cannot reach into the model's own code, there is none to record"
        )
    return found


@contextmanager
def recording(where: nn.Module | Sequence[Site], *points: Point) -> Iterator[Taps]:
    """Record the named points of every attention module of a model, or of the given sites, in each forward inside the
    block. A block inside of another one records alone.

    The tensors keep their graph, so losses can be built on them; run the backward after the block, since activation
    checkpointing runs the forward again and would record it twice. Raises ModelError for an unknown point.
    """
    if unknown := [p for p in points if p not in POINTS]:
        raise ModelError(f"cannot record {unknown[0]!r}; the points are {', '.join(POINTS)}")
    taps = Taps(points)
    chosen = where if isinstance(where, Sequence) else sites(where) if points else []
    with holding(chosen, "taps", taps):
        yield taps


def replace(model: nn.Module, given: Mapping[tuple[str, Point], Tensor | Sequence[Tensor]], share: float = 1.0) -> None:
    """From now on put the given tensors in place of what (attention module, point) computes; `{}` stops it.

    Several tensors stand for the runs of a module that runs more than once in a forward (ALBERT). share: how much of
    them; the rest is the model's own.
    Replacements stay until the next call, since activation checkpointing runs the forward again in the backward.
    """
    by_name = {site.name: site for site in sites(model)}
    for name, point in given:
        if name not in by_name:
            raise ModelError(f"cannot replace at {name!r}; attention modules are {', '.join(list(by_name)[:3])}, …")
        if point not in by_name[name].points:
            raise ModelError(f"cannot replace {point!r} at {name}; its points are {', '.join(by_name[name].points)}")
    for site in by_name.values():
        site.replacements, site.runs, site.share = {}, Counter(), share
    for (name, point), value in given.items():
        by_name[name].replacements[point] = [value] if isinstance(value, Tensor) else value
