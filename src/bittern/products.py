"""Attention that a model computes with its own code, seen from outside: a mode sees what its functions are given.

The product whose result reaches a softmax is QKᵀ, the product that then reads the softmax is map · V. `trace.Trace`
finds them in a dry run; a `Watch` serves them, by their numbers, in every run after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

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
    """True for what writes to a tensor that it is given."""
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
    given = [call(Tensor.permute, (), (x, [*map(p.index, s)])) for x, p, s in zip(given, parts, sides, strict=False)]
    return call(Tensor.permute, (), (call(torch.matmul, (), given), [*map(sides[2].index, out)]))


class _Later(NamedTuple):
    """Scores or a map that wait until somebody reads them, as kernels may compute them together with map · V.

    make: gives them as the model's own code has it. query, key: (batch, heads, ·, head dim).
    """

    make: Callable[[], Tensor]
    query: Tensor
    key: Tensor
    scaling: float = 1.0
    added: tuple[Tensor, ...] = ()
    normed: bool = False


class Watch(TorchFunctionMode):
    """Lets the site of an attention module record, replace and quantize inside one forward of it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.at, self.waits = module, 0, True
        self.site: Any = getattr(module, SITE)  # the `attention.Site`, which imports this
        self.plan: Plan = self.site.plan
        self.later: dict[int, tuple[Tensor, _Later]] = {}  # by the id of what stands for it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and (out := einsum(self.__torch_function__, *args)) is not None:
            return out
        kwargs, at = kwargs or {}, self.at
        call = counted(func, args, kwargs)
        self.at += call is not None
        if self.later:
            followed = self.waits and args and id(args[0]) in self.later
            if followed and (out := self._follow(func, at, call, *args, **kwargs)) is not None:
                return out
            if writes(func, kwargs):  # what those that wait may need as it is
                self.settled([x for x, _ in self.later.values()])
                self.waits = False
            args, kwargs = self.settled((args, kwargs))
            call = counted(func, args, kwargs)
        if call is None or at not in self.plan[:3]:
            return func(*args, **kwargs)
        score, softmax, context = self.plan[:3]
        wanted = (SDPA,) if score == context else SOFTMAX if at == softmax else PRODUCTS
        if call.function not in wanted:
            raise self._other_way(f"call {at} is {call.function.__name__}")
        if call.function is SDPA:
            return self._attend(**call.given)
        if at == softmax:
            return self._normalize(**call.given)
        written = partial(self._multiply, call.function, at == score, **call.given)
        left, right = call.operands
        if at == score and call.function is torch.matmul and _alike(left, right) and self.site.integer(None):
            return self._wait(_Later(cache(written), left, right.mT))
        return written()

    def _wait(self, later: _Later, x: Tensor | None = None) -> Tensor:
        """What stands for scores or a map that wait; x: what stood for them before they changed in place."""
        if x is None:
            with torch._C.DisableTorchFunction():  # no step of a tape
                shape = *later.query.shape[:3], later.key.shape[2]
                x = torch.empty(shape, dtype=later.query.dtype, device="meta")
        self.later[id(x)] = x, later
        return x

    def _follow(
        self, func: Any, at: int, call: CountedCall | None, x: Tensor, *rest: Any, **options: Any
    ) -> Tensor | None:
        """What a function makes of scores or a map that wait: they wait on, or kernels compute it; None if neither."""
        later, name, other = (
            self.later[id(x)][1],
            getattr(func, "__name__", "").rstrip("_"),
            rest[0] if len(rest) == 1 else None,
        )
        if (name == "dropout" and options.get("training") is False) or (
            name == "to" and other is x.dtype and not options
        ):
            return x
        if later.normed and at == self.plan.context and call and call.function is torch.matmul and _alike(x, other):
            found = self.site.on_integers(later.query, later.key, other, later.added, later.scaling)
            if found is None:
                return None
            context, probabilities = found
            self.later[id(x)] = x, later._replace(make=lambda: probabilities)
            return context.transpose(1, 2).contiguous()  # type: ignore[no-any-return]  # as products are
        if at == self.plan.softmax and call and call.given.get("dtype") in (None, x.dtype):
            changed: dict[str, Any] = {"normed": True}
        elif later.normed or options:
            return None
        elif name in ("mul", "div") and isinstance(other, (int, float)) and not later.added:
            changed = {"scaling": later.scaling * (other if name == "mul" else 1 / other)}
        elif name == "add" and isinstance(other, Tensor) and other.dtype is x.dtype:
            if other.shape[-1:] != x.shape[-1:] or torch.broadcast_shapes(other.shape, x.shape) != x.shape:
                return None
            changed = {"added": (*later.added, other)}
        else:
            return None
        in_place = func.__name__ != name  # of which another may still need what was there before
        function = getattr(Tensor, name) if in_place else func
        changed["make"] = cache(lambda: function(later.make(), *rest, **options))
        return self._wait(later._replace(**changed), x if in_place else None)

    def settled(self, given: Any) -> Any:
        """The same, with numbers for all that waits in it."""
        known = self.later
        return tree_map(lambda x: known[id(x)][1].make() if id(x) in known else x, given) if known else given

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)  # type: ignore[no-untyped-call]
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
        if self.site.taps is not None:
            self.site.begin((scores > -1e4).any(1, keepdim=True))  # (batch, 1, queries, keys): what may be attended
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


def _alike(left: Tensor, right: Tensor | None) -> bool:
    """True for operands (batch, heads, ·, ·) of as many heads."""
    return right is not None and left.dim() == right.dim() == 4 and left.shape[:2] == right.shape[:2]


@cache
def _watched(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of modules of this kind that run inside a Watch, of the same name."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Watch(self) as watch:
            out = kind.forward(self, *args, **kwargs)
        return watch.settled(out)

    return derive(_watched, kind, forward=forward, unwatched=kind)


def watch(module: nn.Module) -> None:
    """From now on the module's site, its child, sees and serves its products."""
    if not hasattr(module, "unwatched"):
        module.__class__ = _watched(type(module))  # type: ignore[arg-type]


def unwatch(module: nn.Module) -> None:
    if hasattr(module, "unwatched"):
        module.__class__ = module.unwatched  # type: ignore[assignment]
