"""Finds attention in a model's own code: follows results from call to call in a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bittern.experts import VIEWS, Layout, layout_of
from bittern.products import SDPA, SOFTMAX, CountedCall, Plan, counted, einsum


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
        if func is torch.einsum and (out := einsum(self.__torch_function__, *args)) is not None:
            return out
        kwargs = kwargs or {}
        marks = self._marks([*args, *kwargs.values()])
        call = counted(func, args, kwargs)
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

    def _follow(self, call: CountedCall, out: Tensor, marks: frozenset[Any]) -> frozenset[Any]:
        """Return the marks of a counted call's result."""
        shapes = [x.shape for x in call.operands]
        known = {len(s) for s in shapes} <= ({4} if call.function is SDPA else {3, 4, 5})
        seen = _Seen({frame: frame.calls for frame in self.running}, shapes, known)
        for frame in self.running:
            frame.calls += 1
        of_operands = [self._marks(x) for x in call.operands]
        if all(_ACTIVATION in m for m in of_operands):
            self.on_product()
        if call.function is SDPA:
            self._report(seen, seen, seen, out)
        elif call.function in SOFTMAX:
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
