"""A packed model's forward without its own code: what it computes is recorded once, and run again from the record.

Between the kernels a forward is mostly Python that finds the same for each batch of one shape: masks, positions, which
module comes next. A tape has the calls alone: operations of PyTorch, calls of the kernels, whole blocks.
Blocks that follow each other are one call, what the outputs do not need is left out, and of what depends on no
argument the result is kept.

A tape serves arguments of the same shapes, strides and types, while the model holds what it held (`blocks.Guard`).
Each tensor in it is an argument, part of the model, or made by a step before. What the model's code reads of a tensor,
as whether a mask hides anything, must be read again, and shapes of results must come again; else the model runs as it
is written. So it does always if modules of other packages than transformers and PyTorch are in it, or if it draws
random numbers, changes itself or an argument, is watched inside, or handles what is not known here. A tape must first
repeat, to the bit, what it was made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import Cache, PreTrainedModel

from bittern import kernels, native, products
from bittern.deploy import blocks
from bittern.deploy.packed import PackedLayer
from bittern.derived import derive
from bittern.native.block import KernelBlock, KernelLayer

MOST_WAYS, MOST_TAPES = 256, 3  # ways to call a model, and tapes of each; to forget the oldest would record for ever
MOST_MISSED = 8  # times in a row that a tape is tried in vain
KNOWN = {"transformers", "torch", "bittern"}  # packages whose forwards are known to do no more than compute
MOST_KEPT = 2**14  # numbers of a result that is kept; a larger one is made again

SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
CONSTANT = (*SIMPLE, torch.Size, type(...), KernelBlock, KernelLayer, native.Coding, native.Table)
# What tells something of a tensor, but of its numbers nothing (`__get__`: an attribute), or may give the tensor itself.
DESCRIBES = {"__get__", "__len__", "dim", "size", "stride", "numel", "is_contiguous", "is_floating_point", "is_complex"}
GIVES_BACK = {"to", "type", "type_as", "float", "half", "long", "int", "bool", "contiguous", "flatten", "dropout"}


class Slot(int):
    """A place among the tensors of a run."""


def _parts(value: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """All parts of a type, in order."""
    return [part for part in tree_leaves(value) if isinstance(part, kind)]


def _pattern(value: Any, places: Mapping[int, Any]) -> Any:
    """The value with what `places` has, by id, for tensors and modules. Raises ValueError for what no tape may hold."""
    if isinstance(value, (Tensor, nn.Module)) and id(value) in places:
        return places[id(value)]
    if isinstance(value, CONSTANT):
        return value
    if isinstance(value, slice) and not _parts([value.start, value.stop, value.step], Tensor):
        return value
    if type(value) is dict:
        return {name: _pattern(part, places) for name, part in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)([_pattern(part, places) for part in value])
    raise ValueError(f"a {type(value).__name__} that came from elsewhere")


def _fill(pattern: Any, values: Sequence[Tensor | None]) -> Any:
    """The pattern with tensors in its slots."""
    kind = type(pattern)
    if kind is Slot:
        return values[pattern]
    if kind is tuple or kind is list:
        return kind([_fill(part, values) for part in pattern])
    if kind is dict:
        return {name: _fill(part, values) for name, part in pattern.items()}
    return pattern


@dataclass(eq=False)
class Step:
    """One call. made: slots of what it gives, in these shapes, and what was read, which must come again."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    made: Any
    shapes: dict[Slot, torch.Size]
    done: list[Slot] = field(default_factory=list)  # what no later step needs

    def takes(self) -> set[Slot]:
        return {*_parts((self.args, self.kwargs), Slot)}

    def run(self, values: list[Tensor | None]) -> bool:
        """Put what it makes in its place; False if that is not what it was."""
        found = self.function(*_fill(self.args, values), **_fill(self.kwargs, values))
        right = self._keep(self.made, found, values)
        for slot in self.done:
            values[slot] = None
        return right

    def _keep(self, made: Any, found: Any, values: list[Tensor | None]) -> bool:
        if type(made) is Slot:
            values[made] = found
            return type(found) is Tensor and found.shape == self.shapes[made]
        if isinstance(made, (tuple, list)) and isinstance(found, (tuple, list)):
            return len(made) == len(found) and all(self._keep(*both, values) for both in zip(made, found, strict=True))
        return isinstance(made, Tensor) or (type(made) is type(found) and made == found)


class Recorder(TorchFunctionMode):
    """Makes steps of operations on tensors, and of calls of what is one step. failed: something ran that may not."""

    def __init__(self, inputs: Sequence[Tensor], guard: blocks.Guard):
        super().__init__()
        self.inputs, self.steps, self.described = inputs, list[Step](), set[Slot]()
        self.inside = self.in_order = False
        self.places: dict[int, Any] = {id(part): part for part in (*guard.modules, *guard.tensors)}
        self.failed = any(id(tensor) in self.places for tensor in inputs)
        self.places |= {id(tensor): Slot(i) for i, tensor in enumerate(inputs)}
        self.locked = {*map(_storage, (*guard.placed, *inputs))}  # memory that no step may write
        self.count, self.alive = len(inputs), list[Any]()  # so that no id comes twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            made = func(*args, **(kwargs or {}))
        except Exception:  # which the model may expect
            self.failed |= not self.inside
            raise
        return self._kept(func, args, kwargs or {}, made)

    def whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function that is one step, whatever it does inside; of a block or a lone layer it is the kernels'."""
        if self.inside:
            return function(*args, **kwargs)
        told: list[Any] = []
        token, self.inside = kernels.watcher.set(lambda *given: told.append(given)), True
        try:
            made = function(*args, **kwargs)
            lone = len(args) == 2 and not kwargs and isinstance(args[0], (PackedLayer, kernels.LayerNorm))
            direct = args[0].direct(args[1]) if lone else None
        finally:
            kernels.watcher.reset(token)
            self.inside = False
        if len(told) == 1 and isinstance(told[0][0], blocks.FusedCall) and told[0][0].cache is None:
            plan, call, _ = told[0]
            self.failed |= id(args[0]) not in self.places
            self._kept(blocks.run_whole, ((plan.whole,), *plan.given(call)), {}, made[0] if plan.in_tuple else made)
            return made
        if direct is not None:
            (function, args), kwargs = direct, {}
        return self._kept(function, args, kwargs, made)

    def _kept(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> Any:
        if not (self.inside or self.failed):
            self.alive.append((args, kwargs, made))
            try:
                with torch._C.DisableTorchFunction():
                    self._add(function, args, kwargs, made)
            except (ValueError, NotImplementedError):  # of tensors that have no memory of their own
                self.failed = True
        return made

    def _add(self, function: Callable[..., Any], args: Any, kwargs: Any, made: Any) -> None:
        """Add the step of a call, unless it depends on no argument or made nothing new; its tensors get places."""
        name, tensors = getattr(function, "__name__", ""), _parts(made, Tensor)
        made = (*made,) if isinstance(made, tuple) else made  # PyTorch has kinds of its own
        new = [tensor for tensor in tensors if id(tensor) not in self.places]
        if name in DESCRIBES and not tensors:  # a shape may depend on numbers, too
            self.described |= {slot for t in _parts(args, Tensor) if type(slot := self.places.get(id(t))) is Slot}
            return
        target = next(iter(_parts((args, kwargs), Tensor)), None)
        args, kwargs = _pattern(args, self.places), _pattern(kwargs, self.places)
        fixed = not _parts((args, kwargs), Slot)
        writes = products.writes(function, kwargs) or (bool(tensors) and not new and name not in GIVES_BACK)
        if "empty" in name or "foreach" in name or kwargs.get("out") is not None:
            raise ValueError(f"{name} gives memory that is written later, or writes in several places")
        if writes and target is not None:
            self.in_order |= not fixed
            if _storage(target) in self.locked or not (fixed or type(self.places[id(target)]) is Slot):
                raise ValueError(f"{name} writes what a tape does not make anew")
        if not writes and tensors and not new:
            return
        parts = _parts((args, kwargs), (nn.Parameter, nn.Module))  # which `.data` may change unseen, but for codes
        lasting = fixed and all(isinstance(part, PackedLayer) for part in parts)
        if lasting and sum(tensor.numel() for tensor in new) <= MOST_KEPT:
            self.places |= {id(tensor): tensor for tensor in new}
            return
        self.locked |= {*map(_storage, _parts((args, kwargs), Tensor))}
        self.places |= {id(tensor): Slot(self.count + i) for i, tensor in enumerate(new)}
        self.count += len(new)
        shapes = {slot: t.shape for t in tensors if type(slot := self.places[id(t)]) is Slot}
        self.steps.append(Step(function, args, kwargs, _pattern(made, self.places), shapes))


class Tape:
    """The steps from a forward's tensors to what it returned. Raises ValueError if no steps lead there."""

    def __init__(self, recorder: Recorder, guard: blocks.Guard, out: Any):
        self.guard, self.count, self.missed = guard, recorder.count, 0
        flat, self.form = tree_flatten(out, is_leaf=lambda part: isinstance(part, Cache))
        self.out = _pattern(flat, recorder.places)
        needed, kept = {*_parts(self.out, Slot)}, recorder.locked.difference(map(_storage, recorder.inputs))
        if _parts(self.out, Tensor) or not kept.isdisjoint(map(_storage, _parts(flat, Tensor))):
            raise ValueError("an output that no step makes, or in memory that the tape keeps")
        steps = recorder.steps
        if not recorder.in_order:  # first what decides whether the tape serves
            checks = _needed(steps, set())
            steps = checks + [s for s in _needed(steps, needed | recorder.described) if s not in checks]
        self.steps = _joined(steps, needed)
        last = {slot: step for step in self.steps for slot in (*step.takes(), *step.shapes)}
        for slot in last.keys() - needed:
            last[slot].done.append(slot)

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the forward returns for these tensors; None if it would take another way."""
        values: list[Tensor | None] = [*inputs, *[None] * (self.count - len(inputs))]
        try:
            if not all(step.run(values) for step in self.steps):
                return None
        except Exception:  # the model's own code raises it again, or expects it
            return None
        return tree_unflatten(_fill(self.out, values), self.form)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _needed(steps: Sequence[Step], slots: set[Slot]) -> list[Step]:
    """The steps that make what is in these slots, and those that read of tensors what decides the way."""
    wanted, found = {*slots}, list[Step]()
    for step in reversed(steps):
        if not step.shapes or not wanted.isdisjoint(step.shapes):
            found.append(step)
            wanted |= step.takes()
    return found[::-1]


def _joined(steps: Sequence[Step], needed: set[Slot]) -> list[Step]:
    """The same steps, but one for whole blocks of which each reads what the one before gave, and nobody else does."""
    joined: list[Step] = []
    for step in steps:
        if joined and step.function is joined[-1].function is blocks.run_whole:
            last, (before, x, *masks), (after, between, *others) = joined[-1], joined[-1].args, step.args
            alone = between not in needed and sum(between in user.takes() for user in steps) == 1
            if alone and between is last.made and [*map(id, masks)] == [*map(id, others)]:
                joined[-1] = Step(step.function, (before + after, x, *masks), {}, step.made, step.shapes)
                continue
        joined.append(step)
    return joined


class _Tapes(blocks.Plans):
    """The tapes of a model by the way it is called, and all that they take for granted."""

    guard: blocks.Guard | None = None
    unused = 0  # recordings since a tape served


def use_tapes(model: nn.Module) -> None:
    """Let packed models run from tapes where they can: the model itself, and those in it where it cannot."""
    for module in model.modules():
        packed = isinstance(module, PreTrainedModel) and any(isinstance(m, PackedLayer) for m in module.modules())
        if packed and "_tapes" not in vars(module):
            module.__class__ = _taped(type(module))  # type: ignore[arg-type]
            vars(module)["_tapes"] = _Tapes()


@cache
def _taped(kind: type[nn.Module]) -> type[nn.Module]:
    """A class for packed models of this kind, of the same name."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        written = partial(kind.forward, self, *args, **kwargs)
        if is_compiling() or native.recorder.get() is not None or blocks.watched(self, "") or not native.serves():
            return written()
        call = dict(enumerate(args)) | kwargs
        return written() if (way := _way(call)) is None else _run(self, way, call, written)

    return derive(_taped, kind, forward=forward)


def _way(call: Mapping[Any, Any]) -> tuple[Any, ...] | None:
    """All that may decide how a model runs but the numbers in tensors; None if something unknown may."""
    if torch.is_autocast_enabled("cpu") or torch._C._is_torch_function_mode_enabled():
        return None
    way: list[Any] = [torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()]
    ids = [*map(id, call.values())]  # one tensor may be given twice
    for name, value in call.items():
        plain = type(value) is Tensor and value.is_cpu and value.layout is torch.strided and not value.is_nested
        if plain and not is_functorch_wrapped_tensor(value):
            way.append((name, value.shape, value.stride(), value.dtype, ids.index(id(value))))
        elif isinstance(value, SIMPLE):
            way.append((name, type(value), repr(value) if type(value) is float else value))
        else:
            return None
    return tuple(way)


def _run(model: nn.Module, way: tuple[Any, ...], call: Mapping[Any, Any], written: Callable[[], Any]) -> Any:
    """The model's output, from a tape if one serves; makes one in the second call of a kind."""
    tapes: _Tapes = vars(model).setdefault("_tapes", _Tapes())
    known, inputs = tapes.get(way), [value for value in call.values() if isinstance(value, Tensor)]
    if known and len(known) >= MOST_TAPES and not any(known):
        return written()
    if (guard := tapes.guard) is not None and not (guard.modules[0] is model and guard.holds()):
        tapes.clear()
        guard = tapes.guard = known = None
    if known is None:  # blocks make their plans first
        if len(tapes) < MOST_WAYS:
            tapes[way] = []
        return written()
    tensors = (*inputs, *(guard.tensors if guard else model.parameters()))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return written()
    for i, tape in enumerate(known):
        if tape is None or tape.guard is not guard:
            continue
        if (out := tape.replay(inputs)) is not None:
            tape.missed = tapes.unused = 0
            return out
        tape.missed += 1
        if tape.missed > MOST_MISSED:
            known[i] = None
    if len(known) >= MOST_TAPES or tapes.unused > MOST_WAYS:
        return written()
    return _record(model, tapes, known, inputs, written)


def _record(
    model: nn.Module, tapes: _Tapes, known: list[Tape | None], inputs: list[Tensor], written: Callable[[], Any]
) -> Any:
    """The model's output as it is written; adds to the known tapes one of this run, or None if it cannot be."""
    guard = tapes.guard = tapes.guard or blocks.Guard(model)
    if guard.watched or any(type(module).__module__.partition(".")[0] not in KNOWN for module in guard.modules):
        return written()
    recorder, drawn = Recorder(inputs, guard), torch.get_rng_state()
    token = native.recorder.set(recorder)
    try:
        with recorder:
            out = written()
    finally:
        native.recorder.reset(token)
    tapes.unused += 1
    if not guard.holds():
        known.append(None)
        tapes.guard = None
        return out
    try:
        if recorder.failed or not torch.equal(drawn, torch.get_rng_state()):
            raise ValueError("no tape can hold what ran")
        tape = Tape(recorder, guard, out)
        found = [_parts(one, Tensor) for one in (tape.replay(inputs), out)]
        same = len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
        known.append(tape if same else None)
    except (ValueError, NotImplementedError):
        known.extend([None] * MOST_TAPES)
    return out
