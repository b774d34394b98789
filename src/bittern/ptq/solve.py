"""Find the numbers of one unit: scales of weights, inputs and attention operands, biases, and rounded weights.

A product has two sides: `Operand` is one of activations, `Weight` a layer's weight and what it needs of the product.
`_alternate` searches each for the others as they are [VT 3.2]; layers that read the same input share their left side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from bittern.ptq.product import Product
from bittern.ptq.ranking import ranking_penalty
from bittern.ptq.search import Penalty, Space, scales
from bittern.quantizers import FakeQuant, fake_quantize, find_scale
from bittern.recipe import Format

FOLD_ROWS = 1024  # on which folds are compared
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
    if quantizer is None:
        return False
    return quantizer.format.range == "static" and quantizer.format.kind not in ("ternary", "binary")


# Sides of products


class Operand:
    """An element-wise operand of products: its float values x, what stands for them, and its scale.

    product: of which it is the right side, if it is one.
    """

    product: Product
    shift = 0.0

    def __init__(self, x: Tensor, quantizer: FakeQuant | None, method: Method):
        self.x, self.method, self.fixed = x, method, not searchable(quantizer)
        self.ends: tuple[int, int] | None = None  # the factors of both extremes, among the candidates
        self.scale: Scale = (torch.ones(()), None)
        self.values = x
        if quantizer is not None and self.fixed:
            self.values = fake_quantize(x, quantizer.format)
        elif quantizer is not None:
            # one scale per head is found head by head, where it serves a tensor
            self.format = quantizer.format.model_copy(update={"granularity": "tensor"})
            self.extremes = x.aminmax()
            self.largest = scales(*self.extremes, self.format, torch.ones(1, device=x.device))[0]
            self.set(method.activation_clip(x, self.format))

    def set(self, scale: Scale) -> None:
        self.scale, self.values = scale, fake_quantize(self.x, self.format, *scale)

    def by_extremes(self) -> Tensor:
        return self.values if self.fixed else fake_quantize(self.x, self.format, *self.largest)

    def search(self, best: search.Search) -> bool:
        """Take the best candidates for both extremes by one factor, then for each alone; True if any is another."""
        space = self.method.space or Space()
        factors, before = space.factors(self.format).to(self.x.device), self.ends
        two_ended = space.ends and self.format.scheme == "asymmetric" and bool(self.extremes[0] < 0 < self.extremes[1])
        if self.ends is None or not two_ended:
            index = best(scales(*self.extremes, self.format, factors), self.ends and self.ends[0])
            self.ends = index, index
        for end in (1, 0) if two_ended else ():
            pairs = factors[torch.tensor([self.ends] * len(factors), device=factors.device)]
            pairs[:, end] = factors
            index = best(scales(*self.extremes, self.format, pairs), self.ends[end])
            self.ends = (index, self.ends[1]) if end == 0 else (self.ends[0], index)
        self.set(scales(*self.extremes, self.format, factors[list(self.ends)][None])[0])
        return self.ends != before

    def search_for(self, left: Operand, penalty: Penalty | None) -> bool:
        """Search as the right side of a product."""
        return self.search(search.search_right(self.x, self.format, self.product, left.values, penalty))

    def correct(self, left: Operand) -> None:
        """Leave the mean output error as it is: there is no bias."""

    @property
    def state(self) -> tuple[float, ...]:
        return tuple(float(t) for t in self.scale if t is not None)

    @property
    def ratio(self) -> float:
        return float(self.scale[0] / self.largest[0])


class Weight:
    """A layer's weight, the right side of its product with the float inputs, and what stands for it.

    fold: (r, t), if the layer reads (x + t)/r in place of x; its weight is then W·r and its bias b - W·t.
    """

    def __init__(self, name: str, layer: QuantLayer, tied: bool, x: Tensor, sample: Tensor, method: Method, fold: Fold):
        self.name, self.layer, self.space = name, layer, method.space or Space()
        weight = weight_matrix(layer).detach().float()
        self.float = (weight if fold is None else weight * fold[0]).contiguous()
        shift = weight @ fold[1] if fold is not None and layer.bias is not None else None
        self.product = Product(x, self.float.T, sample, self.space.objective, shift=shift, slack=self.space.slack)
        self.mean = self.product.out.mean(0, dtype=torch.float64)
        self.factor: Tensor | None = None
        self.rounded: Tensor | None = None
        self.before = self.after = 0.0  # losses
        quantizer = layer.weight_quantizer
        self.fixed = tied or not searchable(quantizer)
        if quantizer is None or self.fixed:
            self.quantized = self.float
            if quantizer is not None:
                self.quantized = fake_quantize(self.float, quantizer.format, quantizer.scale, quantizer.offset)
        else:
            self.format: Format = quantizer.format
            self.largest = find_scale(self.float, self.format, f"{name}.weight")
            self.set(method.weight_clip(self.float, self.format))

    def set(self, scale: Scale) -> None:
        self.scale, self.quantized = scale, fake_quantize(self.float, self.format, *scale)

    @property
    def values(self) -> Tensor:
        return self.quantized.T  # (out, in) → (in, out)

    def by_extremes(self) -> Tensor:
        return self.values if self.fixed else fake_quantize(self.float, self.format, *self.largest).T

    def search_for(self, left: Operand, penalty: Penalty | None) -> bool:
        """Search for the present inputs; True if the scales are others."""
        factors, before = self.space.factors(self.format).to(self.float.device), self.factor
        self.factor = search.search_weight(self.format, self.largest, factors, self.product, left.values, before)
        self.set(search.times(self.largest, self.factor))
        # Of many rows a few may go to and fro for ever between candidates that are equally good.
        return before is None or bool((self.factor != before).float().mean() > 0.01)

    def correct(self, left: Operand) -> None:
        """Find the mean output error, which the bias takes away, from mean inputs, in closed form [VT eq. 16]."""
        if self.layer.bias is not None:
            mean = left.values.mean(0, dtype=torch.float64)
            self.product.shift = (self.quantized.double() @ mean - self.mean).float()

    @property
    def shift(self) -> float:
        return 0.0 if self.product.shift is None else float(self.product.shift.double().sum())

    @property
    def state(self) -> tuple[float, float]:
        """Return what tells present scales and shift from others."""
        return 0.0 if self.fixed else float(self.scale[0].double().sum()), self.shift

    @property
    def ratio(self) -> float:
        scale, largest = self.scale[0], self.largest[0]
        if largest.dim() == 3 and scale.dim() == 2:  # Bit-Split has one scale per row in place of its groups
            largest = largest.mean(1)
        return float((scale / largest).mean())


def _alternate(
    left: Operand, rights: Sequence[Operand | Weight], method: Method, penalty: Penalty | None = None
) -> int:
    """Search each side for the others as they are, in turn, until nothing changes; return the rounds."""
    rounds, seen = 0, set[tuple[object, ...]]()
    searched_for: dict[int, tuple[object, ...]] = {}  # a side is searched again if what it depends on is another

    def is_new(side: Operand | Weight, *others: object) -> bool:
        was, searched_for[id(side)] = searched_for.get(id(side)), others
        return not side.fixed and was != others

    while method.space is not None and rounds < method.space.rounds:
        rounds, changed = rounds + 1, False
        for right in rights:
            if is_new(right, left.state, right.shift):
                changed |= right.search_for(left, penalty)
        if is_new(left, *(right.state for right in rights)):
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
    layers: Mapping[str, QuantLayer],
    x: Tensor,
    sample: Tensor,
    method: Method,
    tied: frozenset[str] = frozenset(),
    norm: nn.Module | None = None,
) -> list[Solved]:
    """Solve the layers that read x (rows, in), each its weight and all of them one input scale; set what was found.

    sample: of each row. tied: layers whose weight another module shares, so that it keeps its values and scale.
    norm: what x is the output of, if these layers alone read it: then ranges of channels may be folded into it.
    """
    fold, folds = None, _folds(x, norm, layers, method.folds) if norm is not None and tied.isdisjoint(layers) else []
    if folds:  # the one that leaves the least error after one round on a part of the rows
        subset = search.random_rows(len(x), FOLD_ROWS).to(x.device)
        samples = torch.unique(sample[subset], return_inverse=True)[1]
        trial = replace(method, rounding=None, space=method.space and replace(method.space, rounds=1))

        def loss(fold: Fold) -> float:
            return sum(w.after for w in _solve_group(layers, x[subset], samples, trial, tied, fold)[0])

        fold = min([None, *folds], key=loss)
    weights, operand, rounds = _solve_group(layers, x, sample, method, tied, fold)
    solved = []
    for w in weights:
        ratios = {name: side.ratio for name, side in (("weight", w), ("input", operand)) if not side.fixed}
        solved.append(Solved(w.name, w.before, w.after, rounds, ratios, fold is not None))
        _set(w, operand, fold)
    if fold is not None and norm is not None:
        _fold_norm(norm, fold)
    return solved


def _folds(x: Tensor, norm: nn.Module, layers: Mapping[str, QuantLayer], exponents: Sequence[float]) -> list[Fold]:
    """Channels of the same range (at exponent 1), and of the same centre where norm and layers have biases (RepQ-ViT).

    Only for static inputs of one scale; channels that are constant stay as they are.
    """
    quantizers = [layer.input_quantizer for layer in layers.values()]
    if not all(searchable(q) and q is not None and q.format.kind == "uniform" for q in quantizers):
        return []
    low, high = x.aminmax(dim=0)
    symmetric = quantizers[0].format.scheme == "symmetric"  # type: ignore[union-attr]
    size = torch.maximum(high.abs(), low.abs()) if symmetric else high - low
    live = size > 1e-6 * size.mean()
    found: list[Fold] = []
    biased = getattr(norm, "bias", None) is not None and all(layer.bias is not None for layer in layers.values())
    for exponent in exponents:
        r = torch.where(live, (size / size.mean()).clamp(min=1e-4) ** exponent, 1.0)
        t = -(high + low) / 2 * live if biased else torch.zeros_like(r)
        found.append((r, t))
    return found


def _fold_norm(norm: nn.Module, fold: tuple[Tensor, Tensor]) -> None:
    """Let a norm give (x + t)/r in place of x."""
    r, t = fold
    affine = dict(norm.named_parameters(recurse=False))
    affine["weight"].detach().div_(r)
    if "bias" in affine:
        affine["bias"].detach().add_(t).div_(r)


def _solve_group(
    layers: Mapping[str, QuantLayer], x: Tensor, sample: Tensor, method: Method, tied: frozenset[str], fold: Fold
) -> tuple[list[Weight], Operand, int]:
    """Solve layers that read x with one fold; return their weights, their input and the rounds."""
    if fold is not None:
        x = (x + fold[1]) / fold[0]
    weights = [Weight(name, layer, name in tied, x, sample, method, fold) for name, layer in layers.items()]
    quantizers = [layer.input_quantizer for layer in layers.values()]
    operand = Operand(x, next((q for q in quantizers if searchable(q)), quantizers[0]), method)
    extremes = operand.by_extremes()
    for w in weights:
        w.before = w.product.loss(extremes.__getitem__, w.by_extremes())
    rounds = _alternate(operand, weights, method)
    inputs = operand.values
    if method.rounding is not None:
        gram, cross = inputs.T @ inputs, inputs.T @ x
        for w in weights:
            if not w.fixed:
                w.rounded, w.format, w.scale = method.rounding(w.float, w.format, w.scale, gram, cross)
                w.quantized = w.rounded
    for w in weights:
        if method.correct_bias:
            w.correct(operand)
        w.after = w.product.loss(inputs.__getitem__, w.values)
    return weights, operand, rounds


def _set(w: Weight, operand: Operand, fold: Fold) -> None:
    layer = w.layer
    if not w.fixed:
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.format = w.format
        layer.weight_quantizer.set_scale(*w.scale)
    if w.rounded is not None or fold is not None:
        weight_matrix(layer).detach().copy_(w.float if w.rounded is None else w.rounded)
    if layer.input_quantizer is not None and not operand.fixed:
        layer.input_quantizer.set_scale(*operand.scale)
    if w.product.shift is not None:
        bias: nn.Parameter = layer.bias  # type: ignore[assignment]
        bias.detach().sub_(w.product.shift.to(bias.dtype))
    layer._kept = None


# Attention


def solve_attention(site: Site, heads: Heads, method: Method) -> list[Solved]:
    """Solve the two products of one attention module, Q·Kᵀ (with the ranking loss) and map·V; set what was found.

    Raises ModelError if one side of a product has scales per head and the other has not.
    """
    solved = []
    for names in (("query", "key"), ("map", "value")):
        chosen = {name: q for name in names if (q := site.quantizer(name)) is not None and searchable(q)}
        if not chosen:
            continue
        units = {q.format.granularity for q in chosen.values()}
        if len(units) > 1:
            raise ModelError(f"{site.name}: {' and '.join(names)} must both have one scale per head, or neither")
        by_head = units == {"head"}
        parts = [slice(h, h + 1) for h in range(heads.key.shape[1])] if by_head else [slice(None)]
        found = [_solve_product(site, names, part, heads, method) for part in parts]
        for name, quantizer in chosen.items():
            repeats = heads.groups if by_head and name in ("query", "map") else 1
            _set_heads(quantizer, [sides[name].scale for _, sides in found for _ in range(repeats)])
        results = [result for result, _ in found]
        before, after = (sum(getattr(r, k) for r in results) / len(results) for k in ("before", "after"))
        ratios = {n: sum(r.scales[n] for r in results) / len(results) for n in results[0].scales}
        solved.append(Solved(results[0].name, before, after, max(r.rounds for r in results), ratios))
    return solved


def _set_heads(quantizer: FakeQuant, found: Sequence[Scale]) -> None:
    """One scale for all, or one for each head (1, heads, 1, 1)."""
    if len(found) == 1:
        quantizer.set_scale(*found[0])
        return
    stacked = [None if part[0] is None else torch.stack(part).view(1, -1, 1, 1) for part in zip(*found, strict=True)]
    quantizer.set_scale(*stacked)  # type: ignore[arg-type]


def _solve_product(
    site: Site, names: tuple[str, str], part: slice, heads: Heads, method: Method
) -> tuple[Solved, dict[str, Operand]]:
    """Solve a part of the heads of Q·Kᵀ or of map·V; return what to report, and both sides by name."""
    scores = names[0] == "query"
    left, right = (
        getattr(heads, name)[:, part] for name in names
    )  # (items, heads, rows, inner), (items, heads, keys, ·)
    count, right = left.shape[1], right.mT if scores else right  # K (…, keys, head dim) → (…, head dim, keys)
    a, b = (Operand(x.flatten(0, 1), site.quantizer(n), method) for x, n in zip((left, right), names, strict=True))
    rows = heads.valid_rows.repeat_interleave(count, 0)  # (items · heads, rows)
    keys = heads.valid_keys.repeat_interleave(count, 0)  # (items · heads, keys)
    columns = keys.sum(-1, keepdim=True) if scores else torch.full_like(rows[:, :1], right.shape[-1], dtype=torch.long)
    sample = torch.unique(heads.sample, return_inverse=True)[1].repeat_interleave(count)
    sample = sample.unsqueeze(-1).expand_as(rows)  # (items · heads, rows)
    space = method.space or Space()
    b.product = product = Product(a.x, b.x, sample, space.objective, columns * rows, slack=space.slack)
    penalty = None
    if scores and method.ranking:
        penalty = ranking_penalty(product, rows, keys, method.ranking, method.margin)
    before = product.loss(a.by_extremes().__getitem__, b.by_extremes())
    rounds = _alternate(a, [b], method, penalty)
    after = product.loss(a.values.__getitem__, b.values)
    sides = dict(zip(names, (a, b), strict=True))
    ratios = {name: side.ratio for name, side in sides.items() if not side.fixed}
    return Solved(f"{site.name}.{'·'.join(names)}", before, after, rounds, ratios), sides
