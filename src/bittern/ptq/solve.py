"""Find the numbers of one unit: scales of weights, inputs and attention operands, biases, and rounded weights.

A product has two sides. `_alternate` searches each for the others as they are [VT 3.2]; layers that read the same input
share their left side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bittern.attention import Site
from bittern.errors import ModelError
from bittern.layers import QuantLayer, weight_matrix
from bittern.ptq import search
from bittern.ptq.capture import Heads
from bittern.ptq.clips import Scale
from bittern.ptq.methods import Method
from bittern.ptq.product import Penalty, Product, random_rows, ranking_penalty
from bittern.ptq.search import Space, candidate_scales
from bittern.quantizers import FakeQuant, fake_quantize, find_scale

FOLD_ROWS = 1024  # on which folds are compared
Layers = Mapping[str, QuantLayer]
Fold = tuple[Tensor, Tensor] | None  # r and t of (x + t)/r, for each channel


@dataclass
class Solved:
    """The solution of a layer or an attention product.

    before, after: 1 - similarity to the float output (by the method's objective) with the scales of the extremes, and
    with what was found. scales: found scale / scale of the extremes, mean over rows.
    """

    name: str
    before: float
    after: float
    rounds: int
    scales: dict[str, float] = field(default_factory=dict)
    folded: bool = False  # whether ranges of channels moved from the input into the weight


def searchable(quantizer: FakeQuant | None) -> bool:
    """True if there is a static scale to choose; ternary and binary ones have closed forms."""
    return quantizer is not None and quantizer.format.range == "static" and quantizer.format.kind == "uniform"


# Sides of products


class Side:
    """One side of a product: its float values x, its format and scale, and the values that stand for x.

    layer: whose weight (out, in) x is, a right side with the scales of its format; activations have one scale.
    product: the one whose right side it is. fixed: there is nothing to search, or the weight is tied to another's.
    """

    product: Product

    def __init__(
        self,
        x: Tensor,
        quantizer: FakeQuant | None,
        method: Method,
        layer: QuantLayer | None = None,
        tied: bool = False,
    ):
        self.x, self.layer, self.quantized = x, layer, x
        self.space, self.fixed = method.space or Space(), tied or not searchable(quantizer)
        self.shift = 0.0  # sum of what is taken from the outputs
        self.factor: Tensor | None = None  # of a weight's candidate_scales
        self.ends: tuple[int, int] | None = None  # the factors of both extremes of activations, among the candidates
        self.scale: Scale = (torch.zeros(()), None)
        if quantizer is not None and self.fixed:
            self.quantized = fake_quantize(x, quantizer.format, quantizer.scale, quantizer.offset)
        elif quantizer is not None:
            self.format = quantizer.format
            if layer is None:  # one scale per head is found head by head, where it serves a tensor
                self.format = self.format.model_copy(update={"granularity": "tensor"})
            self.largest = find_scale(x, self.format, quantizer.name)
            clip = method.activation_clip if layer is None else method.weight_clip
            self.set(clip(x, self.format))

    def set(self, scale: Scale) -> None:
        self.scale, self.quantized = scale, fake_quantize(self.x, self.format, *scale)

    @property
    def values(self) -> Tensor:
        return self.quantized if self.layer is None else self.quantized.T  # (out, in) → (in, out)

    @property
    def by_extremes(self) -> Tensor:
        """The values with the scales of the extremes."""
        if self.fixed:
            return self.values
        quantized = fake_quantize(self.x, self.format, *self.largest)
        return quantized if self.layer is None else quantized.T

    @property
    def state(self) -> tuple[float, ...]:
        """Return what tells present scales and shift from others."""
        return self.shift, *(float(t.double().sum()) for t in self.scale if t is not None)

    @property
    def ratio(self) -> float:
        """Scale / scale of the extremes, mean over rows."""
        scale, largest = self.scale[0], self.largest[0]
        if largest.dim() == 3 and scale.dim() == 2:  # Bit-Split has one scale per row in place of its groups
            largest = largest.mean(1)
        return float((scale / largest).mean())

    def search(self, best: search.Search) -> bool:
        """Take the best scale of activations: for both extremes by one factor, then for each; True if it is another."""
        factors, before, extremes = self.space.factors(self.format).to(self.x.device), self.ends, self.x.aminmax()
        two_ended = self.space.ends and self.format.scheme == "asymmetric" and bool(extremes[0] < 0 < extremes[1])
        if self.ends is None or not two_ended:
            index = best(candidate_scales(*extremes, self.format, factors), self.ends and self.ends[0])
            self.ends = index, index
        for end in (1, 0) if two_ended else ():
            pairs = factors[torch.tensor([self.ends] * len(factors), device=factors.device)]  # (candidates, 2)
            pairs[:, end] = factors
            index = best(candidate_scales(*extremes, self.format, pairs), self.ends[end])
            self.ends = (index, self.ends[1]) if end == 0 else (self.ends[0], index)
        self.set(candidate_scales(*extremes, self.format, factors[list(self.ends)][None])[0])
        return self.ends != before

    def search_for(self, left: Side, penalty: Penalty | None) -> bool:
        """Search as the right side of its product; True if the scales are others."""
        if self.layer is None:
            return self.search(search.search_right(self.x, self.format, self.product, left.values, penalty))
        factors, before = self.space.factors(self.format).to(self.x.device), self.factor
        self.factor = search.search_weight(self.format, self.largest, factors, self.product, left.values, before)
        self.set(search.times(self.largest, self.factor))
        # Of many rows a few may go to and fro for ever between candidates that are equally good.
        return before is None or bool((self.factor != before).float().mean() > 0.01)

    def correct(self, left: Side) -> None:
        """Find the mean output error, which the bias takes away, from mean inputs, in closed form [VT eq. 16]."""
        if self.layer is not None and self.layer.bias is not None:
            mean, out = (x.mean(0, dtype=torch.float64) for x in (left.values, self.product.out))
            self.product.shift = (self.quantized.double() @ mean - out).float()
            self.shift = float(self.product.shift.double().sum())


def _alternate(left: Side, rights: Sequence[Side], method: Method, penalty: Penalty | None = None) -> int:
    """Search each side for the others as they are, in turn, until nothing changes; return the rounds."""
    rounds, seen = 0, set[tuple[object, ...]]()
    searched_for: dict[int, tuple[object, ...]] = {}  # a side is searched again if what it depends on is another

    def needs_search(side: Side, *others: object) -> bool:
        was, searched_for[id(side)] = searched_for.get(id(side)), others
        return not side.fixed and was != others

    while method.space is not None and rounds < method.space.rounds:
        rounds, changed = rounds + 1, False
        for right in rights:
            if needs_search(right, left.state, right.shift):
                changed |= right.search_for(left, penalty)
        if needs_search(left, *(right.state for right in rights)):
            products = [(right.product, right.values) for right in rights]
            changed |= left.search(search.search_left(left.x, left.format, products, penalty))
        if method.correct_bias:
            for right in rights:
                right.correct(left)
        state = (left.state, *(right.state for right in rights))
        if not changed or state in seen:  # with corrected biases the alternation may go round in circles
            break
        seen.add(state)
    return rounds


# Layers


def solve_layers(
    layers: Layers, x: Tensor, sample: Tensor, method: Method, tied: Collection[str] = (), norm: nn.Module | None = None
) -> list[Solved]:
    """Solve the layers that read x (rows, in), each its weight and all of them one input scale; set what was found.

    sample: of each row. tied: layers whose weight another module shares, so that it keeps its values and scale.
    norm: what x is the output of, if these layers alone read it: then ranges of channels may be folded into it.
    """
    fold = None
    if norm is not None and not any(name in tied for name in layers):
        # the one that leaves the least error after one round on a part of the rows
        subset = random_rows(len(x), FOLD_ROWS).to(x.device)
        samples = torch.unique(sample[subset], return_inverse=True)[1]
        trial = replace(method, rounding=None, space=method.space and replace(method.space, rounds=1))
        folds: list[Fold] = [None, *_folds(x, norm, layers, method.folds)]

        def loss(fold: Fold) -> float:
            return sum(solved.after for solved in _solve_group(layers, x[subset], samples, trial, tied, fold)[0])

        fold = min(folds, key=loss) if len(folds) > 1 else None
    solved, weights, inputs = _solve_group(layers, x, sample, method, tied, fold)
    for weight in weights:
        _set(weight, inputs, rounded=method.rounding is not None and not weight.fixed, folded=fold is not None)
    if fold is not None and norm is not None:
        for name, parameter in norm.named_parameters(recurse=False):  # it gives (x + t)/r in place of x
            parameter.detach().add_(fold[1] if name == "bias" else 0).div_(fold[0])
    return solved


def _folds(x: Tensor, norm: nn.Module, layers: Layers, exponents: Sequence[float]) -> list[Fold]:
    """Channels of the same range (at exponent 1), and of the same centre where norm and layers have biases (RepQ-ViT).
    Only for static inputs of one scale; channels that are constant stay as they are."""
    quantizers = [layer.input_quantizer for layer in layers.values()]
    if not all(map(searchable, quantizers)):
        return []
    low, high = x.aminmax(dim=0)
    symmetric = quantizers[0].format.scheme == "symmetric"  # type: ignore[union-attr]
    size = torch.maximum(high.abs(), low.abs()) if symmetric else high - low
    live = size > 1e-6 * size.mean()
    biased = getattr(norm, "bias", None) is not None and all(layer.bias is not None for layer in layers.values())
    t = -(high + low) / 2 * live if biased else torch.zeros_like(size)
    relative = (size / size.mean()).clamp(min=1e-4)
    return [(torch.where(live, relative**exponent, 1.0), t) for exponent in exponents]


def _solve_group(
    layers: Layers, x: Tensor, sample: Tensor, method: Method, tied: Collection[str], fold: Fold
) -> tuple[list[Solved], list[Side], Side]:
    """Solve layers that read x, or (x + t)/r; return what to report, their weights, and their input. With a fold a
    layer's weight is W·r and its bias b - W·t."""
    weights, x = [], x if fold is None else (x + fold[1]) / fold[0]
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach().float()
        shift = weight @ fold[1] if fold is not None and layer.bias is not None else None
        weight = (weight if fold is None else weight * fold[0]).contiguous()
        side = Side(weight, layer.weight_quantizer, method, layer, name in tied)
        side.product = Product(x, side.x.T, sample, side.space.objective, shift=shift, slack=side.space.slack)
        weights.append(side)
    quantizers = [layer.input_quantizer for layer in layers.values()]
    inputs = Side(x, next((q for q in quantizers if searchable(q)), quantizers[0]), method)
    before = [w.product.loss(inputs.by_extremes.__getitem__, w.by_extremes) for w in weights]
    rounds = _alternate(inputs, weights, method)
    if method.rounding is not None:
        gram, cross = inputs.values.T @ inputs.values, inputs.values.T @ x
        for w in weights:
            if not w.fixed:
                w.quantized, w.format, w.scale = method.rounding(w.x, w.format, w.scale, gram, cross)
    solved = []
    for name, w, loss in zip(layers, weights, before, strict=True):
        if method.correct_bias:
            w.correct(inputs)
        after = w.product.loss(inputs.values.__getitem__, w.values)
        solved.append(Solved(name, loss, after, rounds, _ratios(weight=w, input=inputs), fold is not None))
    return solved, weights, inputs


def _ratios(**sides: Side) -> dict[str, float]:
    return {name: side.ratio for name, side in sides.items() if not side.fixed}


def _set(weight: Side, inputs: Side, rounded: bool, folded: bool) -> None:
    """Give a layer what was found for it."""
    layer = weight.layer
    assert layer is not None
    if layer.weight_quantizer is not None and not weight.fixed:
        layer.weight_quantizer.format = weight.format
        layer.weight_quantizer.set_scale(*weight.scale)
    if rounded or folded:
        weight_matrix(layer).detach().copy_(weight.quantized if rounded else weight.x)
    if layer.input_quantizer is not None and not inputs.fixed:
        layer.input_quantizer.set_scale(*inputs.scale)
    if weight.product.shift is not None:
        bias: nn.Parameter = layer.bias  # type: ignore[assignment]
        bias.detach().sub_(weight.product.shift.to(bias.dtype))
    layer._kept = None


# Attention


def solve_attention(site: Site, heads: Heads, method: Method) -> list[Solved]:
    """Solve the two products of one attention module, Q·Kᵀ (with the ranking loss) and map·V; set what was found.
    Raises ModelError if one side of a product has scales per head and the other has not."""
    solved = []
    for names in (("query", "key"), ("map", "value")):
        chosen = {name: q for name in names if (q := site.quantizer(name)) is not None and searchable(q)}
        if not chosen:
            continue
        if len(units := {q.format.granularity for q in chosen.values()}) > 1:
            raise ModelError(f"{site.name}: {' and '.join(names)} must both have one scale per head, or neither")
        by_head = units == {"head"}
        parts = [slice(h, h + 1) for h in range(heads.key.shape[1])] if by_head else [slice(None)]
        found = [_solve_product(site, names, part, heads, method) for part in parts]
        for name, quantizer in chosen.items():
            repeats = heads.groups if by_head and name in ("query", "map") else 1
            shape = (1, -1, 1, 1) if by_head else ()  # one for each head, or one for all
            both = zip(*(sides[name].scale for _, sides in found for _ in range(repeats)), strict=True)
            scale, offset = (None if t[0] is None else torch.stack(t).view(shape) for t in both)
            quantizer.set_scale(scale, offset)  # type: ignore[arg-type]
        results = [result for result, _ in found]
        before, after = (sum(getattr(r, k) for r in results) / len(results) for k in ("before", "after"))
        ratios = {n: sum(r.scales[n] for r in results) / len(results) for n in results[0].scales}
        solved.append(Solved(results[0].name, before, after, max(r.rounds for r in results), ratios))
    return solved


def _solve_product(
    site: Site, names: tuple[str, str], part: slice, heads: Heads, method: Method
) -> tuple[Solved, dict[str, Side]]:
    """Solve a part of the heads of Q·Kᵀ or of map·V; return what to report, and both sides by name."""
    scores = names[0] == "query"
    # (items, heads, rows, inner), (items, heads, keys, ·)
    left, right = (getattr(heads, name)[:, part] for name in names)
    count, right = left.shape[1], right.mT if scores else right  # K (…, keys, head dim) → (…, head dim, keys)
    a, b = (Side(x.flatten(0, 1), site.quantizer(n), method) for x, n in zip((left, right), names, strict=True))
    rows = heads.valid_rows.repeat_interleave(count, 0)  # (items · heads, rows)
    keys = heads.valid_keys.repeat_interleave(count, 0)  # (items · heads, keys)
    columns = keys.sum(-1, keepdim=True) if scores else torch.full_like(rows[:, :1], right.shape[-1], dtype=torch.long)
    sample = torch.unique(heads.sample, return_inverse=True)[1].repeat_interleave(count)
    sample = sample.unsqueeze(-1).expand_as(rows)  # (items · heads, rows)
    b.product = product = Product(a.x, b.x, sample, b.space.objective, columns * rows, slack=b.space.slack)
    ranked = scores and method.ranking
    penalty = ranking_penalty(product, rows, keys, method.ranking, method.margin) if ranked else None
    before = product.loss(a.by_extremes.__getitem__, b.by_extremes)
    rounds = _alternate(a, [b], method, penalty)
    after = product.loss(a.values.__getitem__, b.values)
    sides = dict(zip(names, (a, b), strict=True))
    return Solved(f"{site.name}.{'·'.join(names)}", before, after, rounds, _ratios(**sides)), sides
