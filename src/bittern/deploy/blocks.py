"""Whole Transformer blocks of a packed model in one call of the kernels.

A block is found by what it holds and how it runs, never by its name: one attention, six packed linear layers, two norms
and an activation. The first time that it is called in some way it runs as it is written, and its parts say in which
order. What the kernels then give for the same input must be the same, bit for bit, or the block stays as it is. It also
runs as it is written whenever something watches or changes its inside: hooks, recorded or replaced signals, attention
maps that are asked for, gradients.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bittern import attention, kernels, native
from bittern.deploy.packed import PackedLayer
from bittern.native.block import PARTS, Block, Layer, Norm
from bittern.quantizers import stamp
from bittern.recipe import OPERANDS

# Whether norms come first, by the order of norms (n), linear layers (l), attention (a) and activation (f).
ORDERS: dict[str, bool] = {"nlllalnlfl": True, "lllalnlfln": False}


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
    for module in list(model.modules()):
        if not isinstance(module, _Fused) and Parts.of(module) and not any(map(Parts.of, module.children())):
            module.__class__ = _fused(type(module))  # type: ignore[arg-type]


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

    @staticmethod
    def of(block: nn.Module) -> Parts | None:
        """None if the module holds other parts than those of one block, or other parameters."""
        steps = {module: kind for module in block.modules() if (kind := _kind(module))}
        sites = [module for module in block.modules() if isinstance(module, attention.Site)]
        if len(sites) != 1 or sorted(steps.values()) != sorted("nnllllllf"):
            return None
        known = {id(p) for module in steps for p in module.parameters(recurse=False)}
        return Parts(steps, sites[0]) if all(id(p) in known for p in block.parameters()) else None

    def codings(self) -> dict[str, native.Coding | None]:
        return {operand: kernels.input_coding(self.site.quantizer(operand)) for operand in OPERANDS}

    def state(self, block: nn.Module) -> tuple[Any, ...]:
        """Everything that a plan takes for granted; things compare by identity."""
        found: list[Any] = [self.site.integer(None), *self.codings().values()]
        for module in _inside(block):  # classes are exchanged where models are packed or made trainable
            watching = len(module._forward_hooks) + len(module._forward_pre_hooks)
            found += module, type(module), module.training, watching
        for module, kind in self.steps.items():
            if kind == "n":
                found.append(module.eps)
            if kind == "l":
                found += module._panels, kernels.input_coding(module.input_quantizer)  # type: ignore[arg-type]
            found.append(stamp(*module._parameters.values()))
        return tuple(found)


def _inside(block: nn.Module) -> list[nn.Module]:
    return list(block.modules())[1:]


Arguments = Mapping[Any, Any]  # of a call of a block, by place or name
Whole = Callable[[Arguments], Tensor | None]  # a block on the kernels; None where they do not serve

# Blocks → the ways in which they are called → parts, the state in which the plan holds, and what the kernels then run,
# if they can. Not kept on the block, since plans hold addresses and a copied block starts anew.
_plans: WeakKeyDictionary[nn.Module, dict[Any, tuple[Parts, tuple[Any, ...], Whole | None]]] = WeakKeyDictionary()
_making = threading.RLock()  # one thread at a time hooks the parts of a block, and makes its plan


class _Fused(nn.Module):
    """Mark of the classes that `_fused` makes."""


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """A class for blocks of this kind in packed models, of the same name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call, written = dict(enumerate(args)) | kwargs, partial(kind.forward, self, *args, **kwargs)
        found = _run(self, call, written) if _serves(self, call) else None
        return written() if found is None else found

    return type(kind.__name__, (kind, _Fused), {"forward": forward, "__module__": kind.__module__})


def _serves(block: nn.Module, call: Arguments) -> bool:
    """True if a block may run in one piece now: a float tensor, perhaps a mask, and nothing else that could matter."""
    tensors = [value for value in call.values() if isinstance(value, Tensor)]
    plain = all(value is None or isinstance(value, Tensor | bool | int | float | str) for value in call.values())
    return bool(
        plain
        and len(tensors) in (1, 2)
        and native.serves(*tensors)
        and not torch.is_grad_enabled()
        and not block.training
        and not _has_any_global_hook()
        and not attention.collects_maps()
    )


def _run(block: nn.Module, call: Arguments, written: Callable[[], Any]) -> Any:
    """The block's output by its plan, or as it is written if that is still to be made; None if there is none."""
    plans = _plans.setdefault(block, {})
    way = tuple((key, "tensor" if isinstance(value, Tensor) else value) for key, value in call.items())
    parts, state, whole = plans.get(way, (None, None, None))
    if parts is not None and parts.state(block) == state:
        return whole and whole(call)
    parts = Parts.of(block)
    if parts is None or len(plans) > 8:  # somebody put other modules in, or an argument is another number each time
        plans.clear()
    if parts is None:
        return None
    with _making:
        out, whole = _try(block, parts, call, written)
        plans[way] = parts, parts.state(block), whole
    return out


def _try(block: nn.Module, parts: Parts, call: Arguments, written: Callable[[], Any]) -> tuple[Any, Whole | None]:
    """What the block gives as it is written, and what the kernels may run instead: it gave the same bits."""
    hooks = [hook for m in _inside(block) for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ran: list[tuple[str, Any]] = []  # kind and module, or what attention was given

    def runs(module: nn.Module, *_: Any) -> None:
        if kernels.watcher.get() is attends:  # else it is another thread that runs it
            ran.append((parts.steps[module], module))

    def attends(*given: Any) -> None:
        ran.append(("a", given))

    watching = [module.register_forward_hook(runs) for module in parts.steps]
    token = kernels.watcher.set(attends)
    try:
        out = written()
    finally:
        kernels.watcher.reset(token)
        for hook in watching:
            hook.remove()
    if not all(map(attention.only_watches, hooks)) or not isinstance(out, Tensor):
        return out, None
    try:
        whole = _whole(parts, ran, call)
    except ValueError:  # parts that do not fit together so
        return out, None
    found = whole(call)
    return out, whole if found is not None and found.shape == out.shape and torch.equal(found, out) else None


def _whole(parts: Parts, ran: list[tuple[str, Any]], call: Arguments) -> Whole:
    """The block in one piece, by what ran in parts. Raises ValueError if the kernels have no such block."""
    order = "".join(kind for kind, _ in ran)
    if order not in ORDERS:
        raise ValueError(f"no block runs as {order}")
    norms, layers, activation, attended = ([what for kind, what in ran if kind == wanted] for wanted in "nlfa")
    query, key, mask, scaling = attended[0]
    tensors = [name for name, value in call.items() if isinstance(value, Tensor)]
    masks = [name for name in tensors if call[name] is mask]
    inputs = [name for name in tensors if name not in masks[:1]]
    if len(inputs) != 1 or (mask is not None and not masks):
        raise ValueError("the mask is none of the arguments, or an argument is neither input nor mask")
    block = Block(
        {part: _layer(module) for part, module in zip(PARTS, layers, strict=True)},
        tuple(Norm(norm.weight, norm.bias, norm.eps) for norm in norms),  # type: ignore[arg-type]
        parts.codings(),  # type: ignore[arg-type]
        pre_norm=ORDERS[order],
        activation=activation[0].activation,
        heads=query.shape[1],
        key_heads=key.shape[1],
        scaling=scaling,
    )
    return lambda call: block(call[inputs[0]].contiguous(), call[masks[0]] if masks else None)


def _layer(module: Any) -> Layer:
    panels, coding = module.panels(), kernels.input_coding(module.input_quantizer)
    if panels is None or coding is None:
        raise ValueError("the kernels do not serve the formats of this layer")
    return Layer(panels, module.padded_bias(panels), coding)
