"""Whole Transformer blocks of a packed model in one call of the kernels.

A block is found by what it holds and how it runs, never by its name: one attention, six packed linear layers, two norms
and an activation. The first two times that it is called in some way, with other lengths, it runs as it is written, and
its parts say in which order. What kernels then give must be the same, bit for bit, or the block stays as it is. It also
runs as it is written whenever something watches or changes its inside: hooks, recorded or replaced signals, attention
maps that are asked for, gradients. A decoder's block takes two calls: in between its cache, of any kind, is given the
new keys and values. Blocks that follow each other become one call where a whole model runs from a tape.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedConfig, StaticCache

from bittern import attention, kernels, native
from bittern.deploy.packed import PackedLayer
from bittern.deploy.weight import PackedWeight
from bittern.derived import derive
from bittern.native.block import LAYER_NAMES, KernelBlock, KernelNorm, run_blocks
from bittern.quantizers import FakeQuant
from bittern.recipe import OPERANDS

CACHES = (DynamicCache, StaticCache)
POSITION_TYPES = (torch.int64, torch.int32)  # which a block may be given and not read

# Whether norms come first, by the order of norms (n), linear layers (l), attention (a) and activation (f). Queries,
# keys and values come from three layers, or from one.
ORDERS: dict[str, bool] = {"nlllalnlfl": True, "lllalnlfln": False, "nlalnlfl": True, "lalnlfln": False}


def use_kernels(model: nn.Module) -> None:
    """Let norms, activations, attention and whole blocks of a packed model run on the kernels where they can.

    Warns if there are none: packed layers then unpack their weights in each forward.
    """
    name, why = native.engine()
    if not name and why != native.SWITCHED_OFF:
        warnings.warn(f"packed models are slow here, slower than float ones: {why}", stacklevel=2)
    for module in model.modules():
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.bias is not None:
            module.__class__ = kernels.LayerNorm
        elif type(module) in kernels.SERVED and getattr(module, "approximate", "none") == "none":
            module.__class__ = kernels.SERVED[type(module)]
        elif isinstance(module, attention.Site):
            module.on_kernels = True
            while module.hooks:  # each call would pass by them; `attach` hooks again
                module.hooks.popitem()[1].remove()
    for module in list(model.modules()):
        if "_plans" not in vars(module) and Parts.of(module):
            module.__class__ = _fused(type(module))  # type: ignore[arg-type]
            vars(module)["_plans"] = Plans()


def _kind(module: nn.Module) -> str:
    if isinstance(module, kernels.LayerNorm):
        return "n"
    if isinstance(module, PackedLayer):
        return "l"
    return "f" if type(module) in kernels.SERVED.values() else ""


@dataclass(frozen=True)
class Parts:
    """Parts of a block: the modules that compute with their kinds, and its attention."""

    steps: Mapping[nn.Module, str]
    site: attention.Site
    layer: int  # of a cache that it keeps

    @staticmethod
    def of(block: nn.Module) -> Parts | None:
        """None if the module holds other parts than those of one block, or other parameters, or only wraps a block."""
        steps = {module: kind for module in block.modules() if (kind := _kind(module))}
        sites = [module for module in block.modules() if isinstance(module, attention.Site)]
        if len(sites) != 1 or sorted(["a", *steps.values()]) not in map(sorted, ORDERS):
            return None
        if any("forward" in vars(module) for module in block.modules()):  # of the instance, as accelerate puts it there
            return None
        if any(map(Parts.of, block.children())):
            return None
        known = {id(p) for module in steps for p in module.parameters(recurse=False)}
        layers = [vars(module)["layer_idx"] for module in block.modules() if "layer_idx" in vars(module)]
        return Parts(steps, sites[0], *layers[:1] or [0]) if all(id(p) in known for p in block.parameters()) else None


# Attributes that decide how our modules run; of others it is all that they have.
ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    FakeQuant: ("format", "bypass", "observed"),
    PackedLayer: ("_panels",),
    kernels.LayerNorm: ("eps",),
    attention.Site: ("on_kernels", "taps", "replacements"),
}


class Guard:
    """Everything that a plan takes for granted: modules, their classes (exchanged where models are packed or made
    trainable), all that they hold, their hooks, and changes of tensors."""

    def __init__(self, block: nn.Module):
        self.modules, attributes, own = list(block.modules()), list[tuple[dict[str, Any], str]](), [vars(block)]
        inner = self.modules[1:]
        for module in inner:
            names = next((names for kind, names in ATTRIBUTES.items() if isinstance(module, kind)), None)
            if names is None:
                own.append(vars(module))
            else:
                attributes += [(vars(module), name) for name in ("forward", *names)]
        tables = [(m._modules, m._parameters, m._buffers) for m in self.modules]
        hooks = [table for m in inner for table in (m._forward_hooks, m._forward_pre_hooks)]
        # of hooks their numbers, of which none comes twice
        seen = {*map(id, own)}
        for table in own:  # which grow by the configurations and dictionaries that they hold
            found = [vars(value) if isinstance(value, PreTrainedConfig) else value for value in table.values()]
            own += (new := {id(d): d for d in found if type(d) is dict and id(d) not in seen}).values()
            seen |= new.keys()
        self.lists = [value for table in own for value in table.values() if type(value) is list]
        every: list[Any] = list({id(table): table for table in chain(*tables, hooks, own)}.values())
        filled, empty = [table for table in every if table], [table for table in every if not table]
        self.objects = native.Objects(filled, hooks + empty, attributes, inner)
        held = [t for t in self.objects.held if isinstance(t, Tensor) and not isinstance(t, PackedWeight)]
        self.tensors = [tensor for tensor in held if not tensor.is_inference()]  # PyTorch counts no changes of those
        self.parameters = [t for t in held if isinstance(t, nn.Parameter)]
        self.placed = [t for t in self.tensors if t.layout is torch.strided and not is_functorch_wrapped_tensor(t)]
        self.changes = self._changes()
        watching = chain.from_iterable(table.values() for table in hooks)
        sites = [module for module in self.modules if isinstance(module, attention.Site)]
        patched = any("forward" in vars(m) or vars(m).get("_compiled_call_impl") for m in inner)
        self.watched = (
            patched or any(map(attention.Site.watched, sites)) or not all(map(attention.only_watches, watching))
        )

    def _changes(self) -> list[Any]:
        lists = [(*map(id, held),) for held in self.lists]
        return [*map(attrgetter("_version"), self.tensors), *map(Tensor.data_ptr, self.placed), *lists]

    def holds(self) -> bool:
        return self.objects.unchanged() and self._changes() == self.changes


@dataclass(frozen=True)
class FusedCall:
    """The plan of a block called in one way. `x`, `masks` and `cache` name arguments."""

    whole: KernelBlock
    x: Any
    masks: tuple[Any, ...]
    cache: Any = None
    layer: int = 0  # of the cache
    in_tuple: bool = False  # what the module returns

    def given(self, call: Arguments) -> tuple[Tensor, ...]:
        """The input, and what is added to scores."""
        return call[self.x], *[call[name] for name in self.masks]

    def run(self, call: Arguments, written: Callable[[], Any]) -> Any:
        """What the module returns; None where the kernels do not serve."""
        x, *masks = self.given(call)
        if self.cache is None:
            out = run_whole((self.whole,), x, *masks)
        else:
            out = self._run_with_cache(x, masks, call[self.cache], written) if native.serves(x, *masks) else None
        return (out,) if self.in_tuple and isinstance(out, Tensor) else out

    def _run_with_cache(self, x: Tensor, masks: list[Tensor], cache: Any, written: Callable[[], Any]) -> Any:
        made = self.whole.project(x := x.contiguous()) if x.dim() == 3 and x.numel() else None
        if made is None:
            return None
        query, key, value = made
        kept = key, value = cache.update(key, value, self.layer)
        out = self.whole.finish(x, query, key, value, kernels.added(masks)) if native.serves(key, value) else None
        if out is None:  # as where earlier keys are infinite: by the parts, which must not change the cache again
            cache.update = lambda *_: kept
            try:
                out = written()
            finally:
                del cache.update
        return out


def run_whole(whole: tuple[KernelBlock, ...], x: Tensor, *masks: Tensor) -> Tensor | None:
    """The output of blocks that follow each other; None where the kernels do not serve."""
    served = native.serves(x, *masks) and x.dim() == 3
    return run_blocks(whole, x.contiguous(), kernels.added(masks)) if served else None


class _Reads(TorchFunctionMode):
    """Tells whether an operation reads one of some tensors."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.tensors, self.found = tensors, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= any(leaf is tensor for leaf in tree_leaves((args, kwargs)) for tensor in self.tensors)
        return func(*args, **(kwargs or {}))


_making = threading.RLock()  # one thread at a time hooks the parts of a block, and makes its plan
Arguments = Mapping[Any, Any]  # of a call of a block, by place or name


class Plans(dict[Any, Any]):
    """The plans of a module by the way it is called, each with when it holds, and the lengths at which alone it was
    tried till now, if so. Copies are empty: plans hold addresses."""

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return type(self), ()


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """A class for blocks of this kind in packed models, of the same name."""

    @kernels.outside_graphs
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call, written = dict(enumerate(args)) | kwargs, partial(kind.forward, self, *args, **kwargs)
        found = None if watched(self, "attentions") else _run(self, call, written)
        return written() if found is None else found

    return derive(_fused, kind, forward=forward)


def watched(module: nn.Module, part: str) -> bool:
    """True if a module trains, or somebody looks into it; part: as in `attention.collects`."""
    return module.training or _has_any_global_hook() or attention.collects(part)


def _run(block: nn.Module, call: Arguments, written: partial[Any]) -> Any:
    """The block's output by its plan, or as it is written if that is still to be made; None if there is none."""
    plans: Plans = vars(block).setdefault("_plans", Plans())
    way = tuple([(key, _way_of(value)) for key, value in call.items()])
    guard, plan, first = plans.get(way, (None, None, None))
    if guard is not None and not guard.holds():
        guard = first = None
    if first and first != _lengths(call):  # how it runs may depend on them: a plan must serve two kinds
        guard = None
    if torch.is_grad_enabled() and any(p.requires_grad for p in (guard.parameters if guard else block.parameters())):
        return None
    if guard:
        out = plan and plan.run(call, written)
    else:
        kinds = [kind for _, kind in way]
        tensors = [value for value, kind in zip(call.values(), kinds, strict=True) if kind is Tensor]
        usual = len(tensors) in (1, 2, 3) and sum(map(kinds.count, CACHES)) < 2 and object not in kinds
        if not usual or not native.serves(*tensors):
            return None
        parts = Parts.of(block)
        if parts is None or len(plans) > 8:  # somebody put other modules in; an argument is another number each time
            plans.clear()
        if parts is None:
            return None
        with _making:
            out, made = _try(block, parts, call, written, plan if first else None)
            done = made is None or (first and made is not plan)
            plans[way], plan = (Guard(block), made, None if done else first or _lengths(call)), made
    if plan and (watch := kernels.watcher.get()) is not None:
        watch(plan, call, out)
    return out


def _lengths(call: Arguments) -> list[torch.Size]:
    """Shapes of what a block is given, but for how many samples there are."""
    return [value.shape[1:] for value in call.values() if isinstance(value, Tensor)]


def _way_of(value: Any) -> Any:
    """The value itself, where it may decide how a block runs, or what kind of argument it is: `int` for a tensor of
    positions, `Tensor` for another, a cache's class, `object` for all else, which could matter."""
    if isinstance(value, Tensor):
        return int if value.dtype in POSITION_TYPES else Tensor
    if type(value) in CACHES and not (value.offloading or "update" in vars(value)):
        return type(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else object


def _twin(cache: Any) -> Any:
    twin = copy(cache)
    twin.layers = [copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        layer.__dict__ |= {name: v.detach().clone() for name, v in vars(layer).items() if isinstance(v, Tensor)}
    return twin


def _try(
    block: nn.Module, parts: Parts, call: Arguments, written: partial[Any], known: FusedCall | None
) -> tuple[Any, FusedCall | None]:
    """Run the block as it is written; return its output, and how the kernels may run it instead, to the same bits: as
    `known` if they do not serve this call."""
    hooked = [table for m in list(block.modules())[1:] for table in (m._forward_hooks, m._forward_pre_hooks)]
    hooks = list(chain.from_iterable(table.values() for table in hooked))
    ran: list[tuple[str, Any]] = []  # kind and module, or what attention was given
    before = {name: _twin(value) if type(value) in CACHES else value for name, value in call.items()}
    reads = _Reads([value for value in call.values() if _way_of(value) is int])

    def told(*given: Any) -> None:
        if len(given) > 1:
            ran.append(("a", given))
        elif given[0] in parts.steps:
            ran.append((parts.steps[given[0]], given[0]))

    token = kernels.watcher.set(told)
    try:
        with reads:
            out = written()
    finally:
        kernels.watcher.reset(token)
    made = out[0] if (in_tuple := type(out) is tuple and len(out) == 1) else out
    if not all(map(attention.only_watches, hooks)) or not isinstance(made, Tensor) or reads.found:
        return out, None
    try:
        plan = _plan(parts, ran, call, in_tuple)
        found = plan.run(before, lambda: None)
    except (ValueError, LookupError):  # parts that do not fit together so, or a cache that is not used
        return out, None
    if found is None:
        return out, known
    pairs = [(found[0] if in_tuple else found, made)]
    if plan.masks and plan.cache is None:  # where masks hide nothing, another use of them may do nothing
        other = before | {name: _hiding(before[name]) for name in plan.masks}
        others = [other.pop(place) for place in range(len(written.args) - 1)]
        again = plan.run(other | dict(enumerate(others)), lambda: None), written.func(block, *others, **other)
        pairs.append(tuple(out[0] if isinstance(out, tuple) else out for out in again))
    if plan.cache is not None:  # what both keep
        own, other = (cache.layers[plan.layer] for cache in (before[plan.cache], call[plan.cache]))
        pairs += [(own.keys, other.keys), (own.values, other.values)]
    same = all(isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    return out, plan if same else None


def _hiding(mask: Tensor) -> Tensor:
    """The mask, or bias, that hides every other key besides."""
    return mask.masked_fill(torch.arange(mask.shape[-1]) % 2 > 0, torch.finfo(mask.dtype).min)


def _arguments(call: Arguments, masks: tuple[Tensor, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The names of the input and of masks. Raises ValueError or KeyError if there are other tensors, or not these."""
    tensors = [name for name, value in call.items() if _way_of(value) is Tensor]
    names = {id(call[name]): name for name in tensors}
    if len(names) != len(masks) + 1 or len(names) != len(tensors):
        raise ValueError("an argument is neither input nor mask")
    added = tuple(names.pop(id(mask)) for mask in masks)
    return *names.values(), added  # one name is left


def _plan(parts: Parts, ran: list[tuple[str, Any]], call: Arguments, in_tuple: bool) -> FusedCall:
    """The block in one piece, by what ran in parts. Raises ValueError if the kernels have no such block."""
    order = "".join(kind for kind, _ in ran)
    if order not in ORDERS:
        raise ValueError(f"no block runs as {order}")
    norms, modules, activation, attended = ([what for kind, what in ran if kind == wanted] for wanted in "nlfa")
    query, key, value, masks, scaling = attended[0]
    cache, layer = next((name for name, value in call.items() if type(value) in CACHES), None), parts.layer
    names = _arguments(call, masks)
    layers = [module.kernel_layer() for module in modules]
    if None in layers:
        raise ValueError("the kernels do not serve the formats of a layer")
    if len(layers) < len(LAYER_NAMES):  # (batch, heads, tokens, dim)
        sizes = [tensor.shape[1] * tensor.shape[3] for tensor in (query, key, value)]
        layers[:1] = [layers[0].part(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    block = KernelBlock(
        dict(zip(LAYER_NAMES, layers, strict=True)),
        tuple(KernelNorm(norm.weight, norm.bias, norm.eps) for norm in norms),  # type: ignore[arg-type]
        {operand: kernels.input_coding(parts.site.quantizer(operand)) for operand in OPERANDS},  # type: ignore[misc]
        pre_norm=ORDERS[order],
        activation=activation[0].activation,
        heads=query.shape[1],
        key_heads=key.shape[1],
        scaling=scaling,
    )
    if cache is not None:
        kept = call[cache].layers[layer]
        if kept.keys is not key or kept.values is not value:
            raise ValueError("attention reads other keys and values than the cache keeps")
    return FusedCall(block, *names, cache, layer, in_tuple)
