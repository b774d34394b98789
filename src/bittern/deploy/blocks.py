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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
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


def _made_of(block: nn.Module) -> tuple[tuple[nn.Module, type], ...]:
    """All modules inside, with their classes, which are exchanged where models are packed or made trainable."""
    return tuple((module, type(module)) for module in block.modules())[1:]


@dataclass(frozen=True)
class Parts:
    """Parts of a block: the modules that compute, and its attention."""

    steps: Mapping[nn.Module, str]  # the modules that compute, and their kinds
    site: attention.Site
    made_of: tuple[tuple[nn.Module, type], ...]

    @staticmethod
    def of(block: nn.Module) -> Parts | None:
        """None if the module holds other parts than those of one block, or other parameters."""
        made_of = _made_of(block)
        steps = {module: kind for module, _ in made_of if (kind := _kind(module))}
        sites = [module for module, _ in made_of if isinstance(module, attention.Site)]
        if len(sites) != 1 or sorted(steps.values()) != sorted("nnllllllf"):
            return None
        known = {id(p) for module in steps for p in module.parameters(recurse=False)}
        return Parts(steps, sites[0], made_of) if all(id(p) in known for p in block.parameters()) else None

    def hooks(self) -> list[Any]:
        return [hook for m, _ in self.made_of for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]

    def state(self) -> tuple[Any, ...]:
        """Everything that a plan takes for granted; things compare by identity."""
        watching = sum(m.training + len(m._forward_hooks) + len(m._forward_pre_hooks) for m, _ in self.made_of)
        found: list[Any] = [self.site.integer(None), watching]
        for module, kind in self.steps.items():
            if kind == "n":
                found.append(module.eps)
            if kind == "l":
                found += module._panels, kernels.input_coding(module.input_quantizer)  # type: ignore[arg-type]
            found.append(stamp(*module._parameters.values()))
        return *found, *(kernels.input_coding(self.site.quantizer(point)) for point in OPERANDS)


@dataclass(frozen=True)
class _Plan:
    """Plan by which the kernels run one block, if they can, and the state in which it holds."""

    parts: Parts
    state: tuple[Any, ...]
    block: Block | None = None
    input: Any = None  # name of the argument
    mask: Any = None


# Blocks → their plans by the ways in which they are called. Not kept on the block, since plans hold addresses and a
# copied block starts anew.
_plans: WeakKeyDictionary[nn.Module, dict[Any, _Plan]] = WeakKeyDictionary()
_making = threading.RLock()  # one thread at a time hooks the parts of a block, and makes its plan


class _Fused(nn.Module):
    """Mark of the classes that `_fused` makes."""


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """A class for blocks of this kind in packed models, of the same name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = dict(enumerate(args)) | kwargs
        found = _run(self, kind, call) if _serves(self, call) else None
        return kind.forward(self, *args, **kwargs) if found is None else found

    return type(kind.__name__, (kind, _Fused), {"forward": forward, "__module__": kind.__module__})


def _serves(block: nn.Module, call: Mapping[Any, Any]) -> bool:
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


def _run(block: nn.Module, kind: type[nn.Module], call: Mapping[Any, Any]) -> Any:
    """The block's output by its plan, or as it is written if that is still to be made; None if there is none."""
    plans = _plans.setdefault(block, {})
    way = tuple((key, "tensor" if isinstance(value, Tensor) else value) for key, value in call.items())
    plan, made_of = plans.get(way), _made_of(block)
    if plan is None or plan.parts.made_of != made_of or plan.state != plan.parts.state():
        parts = Parts.of(block)
        if parts is None:  # somebody put other modules in
            plans.clear()
            return None
        if len(plans) > 8:  # an argument that is another number each time
            plans.clear()
        with _making:
            plans[way], out = _make(block, kind, call, parts)
        return out
    mask = None if plan.mask is None else call[plan.mask]
    if plan.block is None or not plan.parts.site.integer(mask):
        return None
    return plan.block(call[plan.input].contiguous(), mask)


def _make(block: nn.Module, kind: type[nn.Module], call: Mapping[Any, Any], parts: Parts) -> tuple[_Plan, Any]:
    """A plan, and what the block gives as it is written."""
    harmless = all(attention.only_watches(hook) for hook in parts.hooks())
    ran: list[nn.Module] = []
    attended: list[tuple[Tensor, Tensor, Tensor | None, float]] = []

    def runs(module: nn.Module, *_: Any) -> None:
        if kernels.watcher.get() is attends:  # else it is another thread that runs it
            ran.append(module)

    def attends(*what: Any) -> None:
        attended.append(what)
        ran.append(parts.site)

    hooks = [module.register_forward_hook(runs) for module in parts.steps]
    token = kernels.watcher.set(attends)
    try:
        out = kind.forward(
            block,
            *(v for k, v in call.items() if isinstance(k, int)),
            **{k: v for k, v in call.items() if isinstance(k, str)},
        )
    finally:
        kernels.watcher.reset(token)
        for hook in hooks:
            hook.remove()
    none = _Plan(parts, parts.state())
    pre_norm = ORDERS.get("".join(parts.steps.get(module, "a") for module in ran))
    if pre_norm is None or not harmless or not isinstance(out, Tensor):
        return none, out
    query, key, mask, scaling = attended[0]
    names = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    mask_name = next((name for name, value in names.items() if value is mask), None)
    inputs = [name for name in names if name != mask_name]
    if len(inputs) != 1 or (mask is not None and mask_name is None):
        return none, out
    activation = next(module for module, kind in parts.steps.items() if kind == "f")
    layers = (module for module in ran if _kind(module) == "l")
    norms = [Norm(m.weight, m.bias, m.eps) for m in ran if isinstance(m, kernels.LayerNorm)]
    try:
        whole = Block(
            {part: _layer(module) for part, module in zip(PARTS, layers, strict=True)},
            (norms[0], norms[1]),
            {point: kernels.input_coding(parts.site.quantizer(point)) for point in OPERANDS},  # type: ignore[misc]
            pre_norm=pre_norm,
            activation=activation.activation,  # type: ignore[arg-type]
            heads=query.shape[1],
            key_heads=key.shape[1],
            scaling=scaling,
        )
        found = whole(names[inputs[0]].contiguous(), mask)
    except ValueError:  # parts that do not fit together so
        return none, out
    same = found is not None and found.shape == out.shape and torch.equal(found, out)
    return _Plan(parts, none.state, whole, inputs[0], mask_name) if same else none, out


def _layer(module: Any) -> Layer:
    panels, coding = module.panels(), kernels.input_coding(module.input_quantizer)
    if panels is None or coding is None:
        raise ValueError("the kernels do not serve the formats of this layer")
    return Layer(panels, module.padded_bias(panels), coding)
