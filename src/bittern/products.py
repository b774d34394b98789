"""Attention that a model computes with its own code, seen from outside: a mode sees what its functions are given.

The product whose result reaches a softmax is QKᵀ, the product that then reads the softmax is map · V. `Trace` finds
them in a dry run by following results from call to call; a `Watch` serves them, by their numbers, in every run after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bittern.derived import derive
from bittern.errors import ModelError
from bittern.experts import VIEWS, Layout, layout_of

SITE = "bittern"  # the name of what serves an attention module, as its child
_SDPA = F.scaled_dot_product_attention
_SIGNATURES: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.matmul: ("input", "other"),
    torch.bmm: ("input", "other"),
    torch.baddbmm: ("added", "input", "other"),
    torch.softmax: ("input", "dim", "dtype"),
    F.softmax: ("input", "dim", "_stacklevel", "dtype"),
    _SDPA: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
}
_METHODS: dict[Any, Callable[..., Any]] = {
    Tensor.matmul: torch.matmul,
    Tensor.__matmul__: torch.matmul,
    Tensor.bmm: torch.bmm,
    Tensor.baddbmm: torch.baddbmm,
    Tensor.softmax: torch.softmax,
}
_ALSO_KNOWN = {"batch1": "input", "batch2": "other", "mat2": "other"}  # of baddbmm, whose own `input` is added; of bmm
_SOFTMAX, _PRODUCTS = (torch.softmax, F.softmax), (torch.matmul, torch.bmm, torch.baddbmm)


class Plan(NamedTuple):
    """Numbers, from 0, of calls in one forward of an attention module, all of which count: products of two tensors
    with three dimensions or more, and softmaxes of such. heads: those in tensors of (batch · heads, …).
    """

    score: int
    softmax: int
    context: int
    calls: int
    heads: int


class _Call(NamedTuple):
    function: Callable[..., Any]
    given: dict[str, Any]

    @property
    def operands(self) -> list[Any]:
        return [self.given[key] for key in ("input", "other", "query", "key") if key in self.given]


def _counted(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
    """The call if it counts, with all that it was given by name."""
    function = _METHODS.get(func, func)
    names = _SIGNATURES.get(function)
    if names is None:
        return None
    if function is torch.baddbmm:
        args, kwargs = args or (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    named = {_ALSO_KNOWN.get(k, k): v for k, v in kwargs.items()}
    call = _Call(function, dict(zip(names, args, strict=False)) | named)
    return call if all(len(x.shape) >= 3 for x in call.operands) else None


def _einsum(call: Callable[..., Any], equation: str, *operands: Any) -> Any:
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


# Serving


class Watch(TorchFunctionMode):
    """Lets the site of an attention module record, replace and quantize inside one forward of it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.at = module, 0
        self.site: Any = getattr(module, SITE)  # the `attention.Site`, which imports this
        self.plan: Plan = self.site.plan

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and (out := _einsum(self.__torch_function__, *args)) is not None:
            return out
        kwargs, at = kwargs or {}, self.at
        call = _counted(func, args, kwargs)
        self.at += call is not None
        if call is None or at not in self.plan[:3]:
            return func(*args, **kwargs)
        score, softmax, context = self.plan[:3]
        wanted = (_SDPA,) if score == context else _SOFTMAX if at == softmax else _PRODUCTS
        if call.function not in wanted:
            raise self._other_way(f"call {at} is {call.function.__name__}")
        if call.function is _SDPA:
            return self._attend(**call.given)
        if at == softmax:
            return self._normalize(**call.given)
        return self._multiply(call.function, at == score, **call.given)

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


# Finding


@dataclass(eq=False)
class Frame:
    """One run of a module, and how many calls in it count."""

    name: str
    is_layer: bool = False
    calls: int = 0


@dataclass(eq=False)
class _Seen:
    """A call that counts. at: its number in each module that runs, outermost first. shapes: of its operands. served:
    whether a Watch can take its place. feeds: the products whose results reach a softmax; None for products."""

    at: dict[Frame, int]
    shapes: list[torch.Size]
    served: bool
    feeds: list[_Seen] | None = None

    @property
    def order(self) -> int:
        return next(iter(self.at.values()))

    @property
    def size(self) -> int:
        """Entries of a product's result."""
        return self.shapes[0][:-1].numel() * self.shapes[1][-1]


@dataclass(frozen=True)
class Found:
    """Attention in the own code of a module. context: its result, from which the number of heads is read."""

    plan: Plan
    frame: Frame
    context: Tensor
    cross: bool


_ACTIVATION = object()  # the mark of what depends on a layer's output, unlike positions and their rotations
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.embedding)
_OTHER_PRODUCTS = (torch.einsum, F.multi_head_attention_forward)


class Trace(TorchFunctionMode):
    """Follows results from call to call in a dry run. running: the modules that run, innermost last; on_product: told
    when one of them multiplies activations, or weighs them by a softmax; on_attention: of attention that is complete.
    read: parameters that code outside of layers read → the layouts that they were multiplied in, None for other uses.
    """

    def __init__(self, running: list[Frame], on_product: Callable[[], None], on_attention: Callable[[Found], None]):
        super().__init__()
        self.running, self.on_product, self.on_attention = running, on_product, on_attention
        self.read: dict[nn.Parameter, set[Layout | None]] = {}
        self.views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of parameters
        self.marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor → the calls that it came from

    def _marks(self, x: Any) -> frozenset[Any]:
        tensors = (leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
        return frozenset().union(*(self.marks.get(tensor, frozenset()) for tensor in tensors))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and (out := _einsum(self.__torch_function__, *args)) is not None:
            return out
        kwargs = kwargs or {}
        marks = self._marks([*args, *kwargs.values()])
        call = _counted(func, args, kwargs)
        out = func(*args, **kwargs)
        if self.running and not self.running[-1].is_layer and any(isinstance(x, Tensor) for x in tree_leaves(out)):
            self._read(func, args, kwargs, out)
        if func in _LAYERS:
            marks = frozenset({_ACTIVATION})
        elif call is not None:
            marks = self._follow(call, out, marks)
        elif func in _OTHER_PRODUCTS and sum(_ACTIVATION in self._marks(x) for x in tree_leaves(args)) > 1:
            self.on_product()
        if marks:
            self.marks.update((leaf, marks) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def _read(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Keep which parameters a call reads, and in which layout."""
        for x in tree_leaves([args, kwargs]):
            weight = self.views.get(x, x) if isinstance(x, Tensor) else x
            if isinstance(weight, nn.Parameter):
                uses = self.read.setdefault(weight, set())
                if func in VIEWS or (func is Tensor.__getitem__ and x.dim() == 3 and out.dim() == 2):
                    self.views[out] = weight
                else:
                    uses.add(layout_of(weight, x, func, args))

    def _follow(self, call: _Call, out: Tensor, marks: frozenset[Any]) -> frozenset[Any]:
        """Return the marks of a counted call's result."""
        shapes = [x.shape for x in call.operands]
        known = {len(s) for s in shapes} <= ({4} if call.function is _SDPA else {3, 4, 5})
        seen = _Seen({frame: frame.calls for frame in self.running}, shapes, known)
        for frame in self.running:
            frame.calls += 1
        of_operands = [self._marks(x) for x in call.operands]
        if all(_ACTIVATION in m for m in of_operands):
            self.on_product()
        if call.function is _SDPA:
            self._report(seen, seen, seen, out)
        elif call.function in _SOFTMAX:
            seen.served &= call.given.get("dim", -1) in (-1, len(shapes[0]) - 1)
            seen.feeds = [s for s in marks if isinstance(s, _Seen) and s.feeds is None]
        elif reads := [s for s in of_operands[0] - of_operands[1] if isinstance(s, _Seen) and s.feeds]:
            softmax = max(reads, key=lambda s: (len(_shared(s, seen)), s.order))
            # Of several products in a sum, as of contents and of positions, the first is of contents.
            feeds = [s for s in softmax.feeds or () if s.size == softmax.shapes[0].numel() == shapes[0].numel()]
            if feeds:
                score = min(feeds, key=lambda s: (-len(_shared(s, softmax, seen)), s.order))
                self._report(score, softmax, seen, out)
        return marks & {_ACTIVATION} | {seen}

    def _report(self, score: _Seen, softmax: _Seen, context: _Seen, out: Tensor) -> None:
        if not (score.served and softmax.served and context.served):
            return
        frame = _shared(score, softmax, context)[-1]
        plan = Plan(score.at[frame], softmax.at[frame], context.at[frame], 0, 0)
        queries, keys = (shape[-2] for shape in context.shapes)
        self.on_attention(Found(plan, frame, out, cross=queries != keys))


def _shared(*calls: _Seen) -> list[Frame]:
    """The runs of modules that all of these calls are in, outermost first."""
    return [frame for frame in calls[0].at if all(frame in call.at for call in calls)]
