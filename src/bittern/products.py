"""Attention that a model computes with its own code, seen from outside: a mode sees what its functions are given.

The product whose result reaches a softmax is QKᵀ, the product that then reads the softmax is map · V. `trace.Trace`
finds them in a dry run; a `Watch` serves them, by their numbers, in every run after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, wraps
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from bittern import native
from bittern.derived import derive
from bittern.errors import ModelError

SITE = "bittern"  # the name of what serves an attention module, as its child
SDPA = F.scaled_dot_product_attention
_SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.matmul: ("input", "other"),
    torch.bmm: ("input", "other"),
    torch.baddbmm: ("added", "input", "other"),
    torch.softmax: ("input", "dim", "dtype"),
    F.softmax: ("input", "dim", "_stacklevel", "dtype"),
    SDPA: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
}
_METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.matmul: torch.matmul,
    Tensor.__matmul__: torch.matmul,
    Tensor.bmm: torch.bmm,
    Tensor.baddbmm: torch.baddbmm,
    Tensor.softmax: torch.softmax,
}
_ALSO_KNOWN = {"batch1": "input", "batch2": "other", "mat2": "other"}  # of baddbmm, whose own `input` is added; of bmm
SOFTMAX, PRODUCTS = (torch.softmax, F.softmax), (torch.matmul, torch.bmm, torch.baddbmm)
_NO_WRITES = ("__invert__", "__int__", "__index__")  # as `__iand__` is one


class Plan(NamedTuple):
    """Numbers, from 0, of calls in one forward of an attention module, all of which count: products of two tensors
    with three dimensions or more, and softmaxes of such. heads: those in tensors of (batch · heads, …).
    """

    score: int
    softmax: int
    context: int
    calls: int
    heads: int


class CountedCall(NamedTuple):
    function: Callable[..., Any]
    given: dict[str, Any]

    @property
    def operands(self) -> list[Any]:
        return [self.given[key] for key in ("input", "other", "query", "key") if key in self.given]


def counted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CountedCall | None:
    """The call if it counts, with all that it was given by name."""
    function = _METHODS.get(func, func)
    if (names := _SIGNATURES.get(function)) is None:
        return None
    if function is torch.baddbmm:
        args, kwargs = args or (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    named = {_ALSO_KNOWN.get(k, k): v for k, v in kwargs.items()}
    call = CountedCall(function, dict(zip(names, args, strict=False)) | named)
    return call if all(len(x.shape) >= 3 for x in call.operands) else None


def writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """True for what writes to a tensor that it is given, such as `add_`, `__iadd__` and `__setitem__`."""
    name = getattr(func, "__name__", "")
    own = name in ("__setitem__", "__set__") or (name[:3] == "__i" and name not in _NO_WRITES)
    return own or name[-1:] == "_" != name[-2:-1] or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


def einsum(call: Callable[..., Any], equation: str, *operands: Any) -> Any:
    """What einsum gives, by calls of matmul and permute, if it sums one dimension and each operand has one of its own;
    None if it does otherwise."""
    if len(parts := re.split(",|->", equation.replace(" ", ""))) != 3 or "." in equation:
        return None
    left, right, out = parts
    batch = [x for x in out if x in left and x in right]
    row, inner, column = set(left) - set(right), set(left) & set(right) - set(out), set(right) - set(left)
    sides = [*batch, *row, *inner], [*batch, *inner, *column], [*batch, *row, *column]
    if (len(row), len(inner), len(column)) != (1, 1, 1) or [*map(sorted, sides)] != [*map(sorted, parts)]:
        return None
    given = operands[0] if len(operands) == 1 else operands
    names, sizes = left + right, [size for x in given for size in x.shape]
    if len(names) != len(sizes) or len({*zip(names, sizes, strict=True)}) > len({*names}):  # one is 1, or it is wrong
        return None
    given = [call(Tensor.permute, (), (x, [*map(p.index, s)])) for x, p, s in zip(given, parts, sides, strict=False)]
    return call(Tensor.permute, (), (call(torch.matmul, (), given), [*map(sides[2].index, out)]))


class _Later(NamedTuple):
    """Scores or a map that wait. make: gives them as the model's own code has it; query (batch, heads, queries, head
    dim), key (batch, heads, head dim, keys)."""

    make: Callable[[], Tensor]
    query: Tensor
    key: Tensor
    scaling: float = 1.0
    added: tuple[Tensor, ...] = ()
    normed: bool = False


class _Waiting:
    """Scores and maps that wait for map · V, since kernels compute all of this at once.

    A tensor without numbers stands for each. Once anything else reads one of them, or writes to any tensor, all are
    made as the model's own code has it, and nothing waits any more. What is still held when the attention ends gets its
    numbers then. Unseen is what writes to memory past PyTorch, as through `numpy()`.
    """

    def __init__(self, site: Any):
        self.site, self.autocast = site, torch.is_autocast_enabled("cpu")
        self.later: dict[int, tuple[Tensor, _Later]] = {}  # by the id of what stands for it
        self.made: dict[int, Tensor] = {}  # all of these, if they wait no more

    def may_wait(self, call: CountedCall) -> bool:
        """True for scores that kernels may compute together with what comes after."""
        left, right = call.operands
        plain = call.function is torch.matmul and "out" not in call.given and _alike(left, right)
        changes = self.autocast or torch.is_autocast_enabled("cpu") or left.requires_grad or right.requires_grad
        return plain and not changes and native.serves(left, right) and self.site.integer(None)

    def add(self, later: _Later, x: Tensor | None = None) -> Tensor:
        """What stands for it; x: what stood for it before it was changed in place."""
        if x is None:
            with torch._C.DisableTorchFunction():  # no step of a tape
                x = torch.empty(*later.query.shape[:3], later.key.shape[3], dtype=later.query.dtype, device="meta")
        self.later[id(x)] = x, later
        return x

    def follow(self, func: Any, place: str, call: CountedCall | None, x: Any, *rest: Any, **options: Any) -> Any:
        """What a function makes of scores or a map that wait: they wait on, or kernels compute it; None if neither."""
        if self.made or id(x) not in self.later:
            return None
        later, name = self.later[id(x)][1], getattr(func, "__name__", "")
        step = name.rstrip("_")  # `add` for `add_`
        other: Any = rest[0] if len(rest) == 1 and not options else None
        if (step == "dropout" and options.get("training") is False) or (step == "to" and other is x.dtype):
            return x
        if later.normed:
            ends = place == "context" and call and call.function is torch.matmul and _alike(x, other)
            return self._finish(x, later, other) if ends else None
        changed: dict[str, Any] = {}
        if place == "softmax" and call and call.function in SOFTMAX and "out" not in options:
            if call.given.get("dim") in (-1, 3) and call.given.get("dtype") in (None, x.dtype):
                changed["normed"] = True
        elif step in ("mul", "div") and isinstance(other, (int, float)) and other and not later.added:
            changed["scaling"] = later.scaling * (other if step == "mul" else 1 / other)
        elif step == "add" and isinstance(other, Tensor) and _adds_to(x, other):
            changed["added"] = (*later.added, other)
        if not changed:
            return None
        function = func if step == name else getattr(Tensor, step)  # what was there before may still be read
        changed["make"] = cache(lambda: function(later.make(), *rest, **options))
        return self.add(later._replace(**changed), None if step == name else x)

    def _finish(self, x: Tensor, later: _Later, value: Tensor) -> Tensor | None:
        """Map · V by the kernels; who reads the map itself then gets theirs."""
        found = self.site.on_integers(later.query, later.key.mT, value, later.added, later.scaling)
        if found is None:
            return None
        self.add(later._replace(make=cache(found[1].contiguous)), x)
        context: Tensor = found[0].transpose(1, 2)
        return context.contiguous()  # as products are

    def settle(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function is given, with numbers."""
        parts = (*args, *kwargs.values())
        if any(isinstance(part, (list, tuple, dict)) for part in parts):  # else that would take longer than all else
            parts = tuple(tree_leaves(parts))
        if writes(func, kwargs) or any(id(part) in self.later for part in parts):
            self.made = {key: later.make() for key, (_, later) in self.later.items()}
        return tree_map(lambda part: self.made.get(id(part), part), (args, kwargs)) if self.made else (args, kwargs)

    def end(self) -> None:
        """Give numbers to what is still held: by whoever called, or elsewhere."""
        waiting = [(ref(x), later) for x, later in self.later.values()]
        self.later.clear()
        for find, later in waiting:
            if (x := find()) is not None:
                torch._C._swap_tensor_impl(x, later.make().detach())  # also if something else refers to it weakly


class Watch(TorchFunctionMode):
    """Lets the site of an attention module record, replace and quantize inside one forward of it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.at = module, 0
        self.site: Any = getattr(module, SITE)  # the `attention.Site`, which imports this
        self.plan: Plan = self.site.plan
        self.waiting = _Waiting(self.site)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and (out := einsum(self.__torch_function__, *args)) is not None:
            return out
        kwargs, at = kwargs or {}, self.at
        call = counted(func, args, kwargs)
        self.at += call is not None
        score, softmax, context = self.plan[:3]
        if self.waiting.later:
            place = {softmax: "softmax", context: "context"}.get(at, "") if call else ""
            if args and (out := self.waiting.follow(func, place, call, *args, **kwargs)) is not None:
                return out
            args, kwargs = self.waiting.settle(func, args, kwargs)
            call = call and counted(func, args, kwargs)
        if call is None or at not in self.plan[:3]:
            return func(*args, **kwargs)
        wanted = (SDPA,) if score == context else SOFTMAX if at == softmax else PRODUCTS
        if call.function not in wanted:
            raise self._other_way(f"call {at} is {call.function.__name__}")
        if call.function is SDPA:
            return self._attend(**call.given)
        if at == softmax:
            return self._normalize(**call.given)
        written = partial(self._multiply, call.function, at == score, **call.given)
        if at == score and self.waiting.may_wait(call):
            return self.waiting.add(_Later(cache(written), *call.operands))
        return written()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)  # type: ignore[no-untyped-call]
        self.waiting.end()
        if kind is None and self.at != self.plan.calls:
            raise self._other_way(f"it made {self.at} calls")

    def _other_way(self, what: str) -> ModelError:
        return ModelError(
            f"{self.site.name} computes attention in another way than in the dry run, where {self.plan.calls} calls of "
            f"products and softmaxes were seen: {what}; give simulate a batch like those that come"
        )

    def _shaped(self, x: Tensor) -> Tensor:
        """Seen as (batch, heads, ·, ·); windows that are a dimension of their own are counted as heads."""
        return x.unflatten(0, (-1, self.plan.heads)) if x.dim() == 3 else x.flatten(1, -3)

    def _multiply(
        self, function: Any, of_scores: bool, input: Tensor, other: Tensor, added: Tensor | None = None, **options: Any
    ) -> Tensor:
        """QKᵀ, or map · V: left (…, queries, ·) times right (…, ·, keys or head dim)."""
        left, right = self._shaped(input), self._shaped(other)
        if of_scores:
            left, right = self.site.tap("query", left), self.site.tap("key", right.mT)  # right: (…, keys, head dim)
            left, right = self.site.quantize("query", left), self.site.quantize("key", right).mT  # (…, head dim, keys)
        else:
            left, right = self.site.quantize("map", left), self.site.quantize("value", self.site.tap("value", right))
        operands = left.reshape(input.shape), right.reshape(other.shape)
        out: Tensor = function(*(operands if added is None else (added, *operands)), **options)
        if not of_scores:
            out = self.site.tap("context", self._shaped(out)).reshape(out.shape)  # as the model has it
        return out

    def _normalize(self, input: Tensor, dim: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        scores = self._shaped(input)  # (batch, heads, queries, keys)
        may = None if self.site.taps is None else (scores > -1e4).any(1, keepdim=True)  # (batch, 1, queries, keys)
        self.site.begin(may)
        maps: Tensor = self.site.tap("map", self.site.tap("score", scores).softmax(-1, dtype))
        return maps.reshape(input.shape)  # as the model has it

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        mask: Tensor | None = options.get("attn_mask")
        if options.get("is_causal"):
            shape = query.shape[2], key.shape[2]
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()  # (queries, keys)
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]  # (batch or 1, heads or 1, queries, keys)
        rest = options.get("scale"), options.get("dropout_p", 0.0)  # groups of heads are told by the shapes
        return self.site.attend(self.module, query, key, value, mask, *rest)  # type: ignore[no-any-return]


def _adds_to(scores: Tensor, other: Tensor) -> bool:
    """True for a mask or bias that changes neither shape nor type of scores."""
    alike = other.dtype is scores.dtype and other.shape[-1:] == scores.shape[-1:]
    numbers = not (other.is_meta or other.requires_grad)
    return alike and numbers and torch.broadcast_shapes(other.shape, scores.shape) == scores.shape


def _alike(left: Tensor, right: Tensor | None) -> bool:
    """True for operands (batch, heads, ·, ·) of as many heads."""
    return right is not None and left.dim() == right.dim() == 4 and left.shape[:2] == right.shape[:2]


@cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of modules of this kind that run inside a Watch, of the same name."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Watch(self):
            return kind.forward(self, *args, **kwargs)

    return derive(_watched, kind, forward=forward, unwatched=kind)


def watch(module: nn.Module) -> None:
    """From now on the module's site, its child, sees and serves its products."""
    if not hasattr(module, "unwatched"):
        module.__class__ = _watched(type(module))  # type: ignore[arg-type]


def unwatch(module: nn.Module) -> None:
    if hasattr(module, "unwatched"):
        module.__class__ = module.unwatched  # type: ignore[assignment]
