"""Find the numbers of one unit: scales of weights, inputs and attention operands, biases, and rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from bittern.attention import Site
from bittern.errors import ModelError
from bittern.layers import QuantLayer, weight_matrix
from bittern.ptq.capture import Heads
from bittern.ptq.methods import Method
from bittern.ptq.product import Product
from bittern.ptq.ranking import ranking_penalty
from bittern.ptq.search import Scale, Space, random_rows, scales, search_left, search_right, search_weight
from bittern.quantizers import FakeQuant, fake_quantize, find_scale
from bittern.recipe import Format

FOLD_ROWS = 1024  # on which folds are compared


@dataclass
class Solved:
    """What was found for a layer or an attention product.

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
    """Whether there is a static scale to choose; ternary and binary ones have closed forms."""
    if quantizer is None:
        return False
    return quantizer.format.range == "static" and quantizer.format.kind not in ("ternary", "binary")


def _news(side: _Operand | _Weight, *others: object) -> bool:
    """Whether a side has to be searched: not if all it depends on is as it was when it was searched last."""
    new = side.searched_for != others
    side.searched_for = others
    return new


class _Operand:
    """An element-wise operand of products: its values, present scale, and the candidates."""

    def __init__(self, x: Tensor, quantizer: FakeQuant | None, method: Method):
        self.x, self.quantizer = x, quantizer
        self.fixed = not searchable(quantizer)
        self.ends: tuple[int, int] | None = None  # the factors of both extremes, among the candidates
        self.searched_for: tuple[object, ...] = ()
        self.scale: Scale = (torch.ones(()), None)
        if not self.fixed:
            assert quantizer is not None
            # one scale per head is found head by head, where it serves a tensor
            self.format = quantizer.format.model_copy(update={"granularity": "tensor"})
            self.extremes = x.aminmax()
            self.largest = scales(*self.extremes, self.format, torch.ones(1, device=x.device))[0]
            self.scale = method.activation_clip(x, self.format)
            if method.space is not None:
                self.factors = method.space.factors(self.format).to(x.device)
            low, high = self.extremes
            self.two_ended = (
                method.space is not None and method.space.ends and self.format.scheme == "asymmetric" and low < 0 < high
            )

    def quantized(self, scale: Scale | None = None) -> Tensor:
        if self.quantizer is None:
            return self.x
        if self.fixed:
            return fake_quantize(self.x, self.quantizer.format)
        return fake_quantize(self.x, self.format, *(scale or self.scale))

    def search(self, best: Callable[[list[Scale], int | None], int]) -> bool:
        """Take the best candidates for both extremes by one factor, then for each alone; whether any is another.

        best: index of the best of some scales, given that of the present one.
        """
        before, count = self.ends, len(self.factors)
        if self.ends is None or not self.two_ended:
            index = best(scales(*self.extremes, self.format, self.factors), self.ends and self.ends[0])
            self.ends = index, index
        for end in (1, 0) if self.two_ended else ():
            pairs = self.factors[torch.tensor([self.ends] * count, device=self.factors.device)]
            pairs[:, end] = self.factors
            index = best(scales(*self.extremes, self.format, pairs), self.ends[end])
            self.ends = (index, self.ends[1]) if end == 0 else (self.ends[0], index)
        self.scale = scales(*self.extremes, self.format, self.factors[list(self.ends)][None])[0]
        return self.ends != before

    @property
    def state(self) -> tuple[float, ...]:
        return tuple(float(t) for t in self.scale if t is not None)

    @property
    def ratio(self) -> float:
        return float(self.scale[0] / self.largest[0])


class _Weight:
    """A layer's weight, what stands for it, and its product with the float inputs.

    fold: (r, t), if the layer reads (x + t)/r in place of x; its weight is then W·r and its bias b - W·t.
    """

    def __init__(self, name: str, layer: QuantLayer, tied: bool, x: Tensor, sample: Tensor, method: Method, fold: Fold):
        self.name, self.layer = name, layer
        weight = weight_matrix(layer).detach().float()
        self.float = (weight if fold is None else weight * fold[0]).contiguous()
        shift = weight @ fold[1] if fold is not None and layer.bias is not None else None
        space = method.space or Space()
        self.product = Product(x, self.float.T, sample, space.objective, shift=shift, slack=space.slack)
        self.mean = self.product.out.mean(0, dtype=torch.float64)
        self.factor: Tensor | None = None
        self.searched_for: tuple[object, ...] = ()
        self.rounded = False
        quantizer = layer.weight_quantizer
        self.fixed = tied or not searchable(quantizer)
        if quantizer is None:
            self.values = self.float
        elif self.fixed:
            self.values = fake_quantize(self.float, quantizer.format, quantizer.scale, quantizer.offset)
        else:
            self.format: Format = quantizer.format
            self.largest = find_scale(self.float, self.format, f"{name}.weight")
            self.scale = method.weight_clip(self.float, self.format)
            self.values = fake_quantize(self.float, self.format, *self.scale)

    def take(self, factor: Tensor) -> bool:
        # Of many rows a few may go to and fro for ever between candidates that are equally good.
        changed = self.factor is None or bool((factor != self.factor).float().mean() > 0.01)
        offset = self.largest[1]
        self.factor, self.scale = factor, (self.largest[0] * factor, None if offset is None else offset * factor)
        self.values = fake_quantize(self.float, self.format, *self.scale)
        return changed

    @property
    def state(self) -> tuple[float, float]:
        """What tells present scales and shift from others."""
        shift = self.product.shift
        scale = 0.0 if self.fixed else float(self.scale[0].double().sum())
        return scale, 0.0 if shift is None else float(shift.double().sum())

    @property
    def ratio(self) -> float:
        scale, largest = self.scale[0], self.largest[0]
        if largest.dim() == 3 and scale.dim() == 2:  # Bit-Split has one scale per row in place of its groups
            largest = largest.mean(1)
        return float((scale / largest).mean())

    def loss(self, inputs: Tensor, values: Tensor | None = None) -> float:
        return self.product.loss(inputs.__getitem__, (self.values if values is None else values).T)

    def correct(self, inputs: Tensor) -> None:
        """[VT eq. 16] in closed form: the mean output error, which the bias takes away, from mean inputs."""
        if self.layer.bias is not None:
            mean = inputs.mean(0, dtype=torch.float64)
            self.product.shift = (self.values.double() @ mean - self.mean).float()


Fold = tuple[Tensor, Tensor] | None  # r and t of (x + t)/r, for each channel


@dataclass
class _Group:
    """Layers that read the same input, solved with one fold."""

    fold: Fold
    weights: list[_Weight]
    operand: _Operand
    before: list[float]
    after: list[float]
    rounds: int


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
    folds: list[Fold] = [None]
    if norm is not None and tied.isdisjoint(layers):
        folds += _folds(x, norm, layers, method.folds)
    fold = folds[0] if len(folds) == 1 else _best_fold(folds, layers, x, sample, method, tied)
    best = _solve_group(layers, x, sample, method, tied, fold)
    solved = []
    for w, before, after in zip(best.weights, best.before, best.after, strict=True):
        ratios = {} if w.fixed else {"weight": w.ratio}
        ratios |= {} if best.operand.fixed else {"input": best.operand.ratio}
        solved.append(Solved(w.name, before, after, best.rounds, ratios, best.fold is not None))
        _set(w, best.operand, best.fold)
    if best.fold is not None and norm is not None:
        _fold_norm(norm, best.fold)
    return solved


def _best_fold(
    folds: Sequence[Fold],
    layers: Mapping[str, QuantLayer],
    x: Tensor,
    sample: Tensor,
    method: Method,
    tied: frozenset[str],
) -> Fold:
    """The fold that leaves the least error after one round on a part of the rows."""
    some = random_rows(len(x), FOLD_ROWS).to(x.device)
    few = torch.unique(sample[some], return_inverse=True)[1]
    trial = replace(method, rounding=None, space=method.space and replace(method.space, rounds=1))
    return min(folds, key=lambda fold: sum(_solve_group(layers, x[some], few, trial, tied, fold).after))


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
) -> _Group:
    if fold is not None:
        x = (x + fold[1]) / fold[0]
    weights = [_Weight(name, layer, name in tied, x, sample, method, fold) for name, layer in layers.items()]
    quantizers = [layer.input_quantizer for layer in layers.values()]
    operand = _Operand(x, next((q for q in quantizers if searchable(q)), quantizers[0]), method)
    inputs = operand.quantized(None if operand.fixed else operand.largest)
    before = [w.loss(inputs, w.values if w.fixed else fake_quantize(w.float, w.format, *w.largest)) for w in weights]
    inputs, rounds, seen = operand.quantized(), 0, set[tuple[object, ...]]()
    while method.space is not None and rounds < method.space.rounds:
        rounds, changed = rounds + 1, False
        for w in weights:
            if not w.fixed and _news(w, operand.state, w.state[1]):
                factors = method.space.factors(w.format).to(x.device)
                changed |= w.take(search_weight(w.format, w.largest, factors, w.product, inputs, w.factor))
        if not operand.fixed and _news(operand, *(w.state for w in weights)):
            products = [(w.product, w.values.T) for w in weights]
            changed |= operand.search(partial(search_left, x, operand.format, products))
            inputs = operand.quantized()
        if method.correct_bias:
            for w in weights:
                w.correct(inputs)
        state = (operand.state, *(w.state for w in weights))
        if not changed or state in seen:  # with corrected biases the alternation may go round in circles
            break
        seen.add(state)
    if method.rounding is not None:
        gram, cross = inputs.T @ inputs, inputs.T @ x
        for w in weights:
            if not w.fixed:
                w.values, w.format, w.scale = method.rounding(w.float, w.format, w.scale, gram, cross)
                w.rounded = True
    if method.correct_bias:
        for w in weights:
            w.correct(inputs)
    return _Group(fold, weights, operand, before, [w.loss(inputs) for w in weights], rounds)


def _set(w: _Weight, operand: _Operand, fold: Fold) -> None:
    layer = w.layer
    if not w.fixed:
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.format = w.format
        layer.weight_quantizer.set_scale(*w.scale)
    if w.rounded or fold is not None:
        _write(layer, w.values if w.rounded else w.float)
    if layer.input_quantizer is not None and not operand.fixed:
        layer.input_quantizer.set_scale(*operand.scale)
    if w.product.shift is not None:
        bias: nn.Parameter = layer.bias  # type: ignore[assignment]
        bias.detach().sub_(w.product.shift.to(bias.dtype))
    layer._kept = None


def _write(layer: QuantLayer, values: Tensor) -> None:
    """Put (out, in) values into a layer's weight, which may be stored transposed or with more dimensions."""
    weight_matrix(layer).detach().copy_(values)


def solve_attention(site: Site, heads: Heads, method: Method) -> list[Solved]:
    """Solve the two products of one attention module, Q·Kᵀ (with the ranking loss) and map·V; set what was found."""
    solved = []
    products: tuple[tuple[tuple[str, str], Tensor, Tensor], ...] = (
        (("query", "key"), heads.query, heads.key),
        (("map", "value"), heads.map, heads.value),
    )
    for names, left, right in products:
        quantizers = [site.quantizer(name) for name in names]
        searched = [q for q in quantizers if q is not None and searchable(q)]
        if not searched:
            continue
        units = {q.format.granularity for q in searched}
        if len(units) > 1:
            raise ModelError(f"{site.name}: {' and '.join(names)} must both have one scale per head, or neither")
        parts = [slice(h, h + 1) for h in range(left.shape[1])] if units == {"head"} else [slice(None)]
        found = [_solve_product(site.name, names, quantizers, left[:, p], right[:, p], heads, method) for p in parts]
        for i, quantizer in enumerate(quantizers):
            if quantizer is not None and searchable(quantizer):
                repeats = heads.groups if len(parts) > 1 and names[i] in ("query", "map") else 1
                _set_heads(quantizer, [operands[i].scale for _, operands in found for _ in range(repeats)])
        results = [result for result, _ in found]
        before, after = (sum(getattr(r, k) for r in results) / len(results) for k in ("before", "after"))
        ratios = {n: sum(r.scales[n] for r in results) / len(results) for n in results[0].scales}
        name = f"{site.name}.{'·'.join(names)}"
        solved.append(Solved(name, before, after, max(r.rounds for r in results), ratios))
    return solved


def _set_heads(quantizer: FakeQuant, found: Sequence[Scale]) -> None:
    """One scale for all, or one for each head (1, heads, 1, 1)."""
    if len(found) == 1:
        quantizer.set_scale(*found[0])
        return
    stacked = [None if part[0] is None else torch.stack(part).view(1, -1, 1, 1) for part in zip(*found, strict=True)]
    quantizer.set_scale(*stacked)  # type: ignore[arg-type]


def _solve_product(
    site: str,
    names: tuple[str, str],
    quantizers: Sequence[FakeQuant | None],
    left: Tensor,
    right: Tensor,
    heads: Heads,
    method: Method,
) -> tuple[Solved, tuple[_Operand, _Operand]]:
    """left (items, heads, rows, inner), right (items, heads, keys, ·): Q and K, or map and V."""
    scores = names[0] == "query"
    count = left.shape[1]
    a, b = (_Operand(x.flatten(0, 1), q, method) for x, q in zip((left, right), quantizers, strict=True))

    def matrix(x: Tensor) -> Tensor:
        return x.mT if scores else x

    rows = heads.valid_rows.repeat_interleave(count, 0)
    keys = heads.valid_keys.repeat_interleave(count, 0)
    columns = keys.sum(-1, keepdim=True) if scores else torch.full_like(rows[:, :1], right.shape[-1], dtype=torch.long)
    sample = torch.unique(heads.sample, return_inverse=True)[1].repeat_interleave(count)
    space = method.space or Space()
    samples = sample.unsqueeze(-1).expand_as(rows)
    product = Product(a.x, matrix(b.x), samples, space.objective, columns * rows, slack=space.slack)
    penalty = None
    if scores and method.ranking:
        penalty = ranking_penalty(product, rows, keys, method.ranking, method.margin)

    def extremes(operand: _Operand) -> Tensor:
        return operand.quantized(None if operand.fixed else operand.largest)

    before, rounds = product.loss(extremes(a).__getitem__, matrix(extremes(b))), 0
    while method.space is not None and rounds < method.space.rounds:
        rounds, changed = rounds + 1, False
        if not a.fixed and _news(a, b.state):
            sides = [(product, matrix(b.quantized()))]
            changed |= a.search(partial(search_left, a.x, a.format, sides, penalty=penalty))
        if not b.fixed and _news(b, a.state):
            left = a.quantized()
            changed |= b.search(partial(search_right, matrix(b.x), b.format, product, left, penalty=penalty))
        if not changed:
            break
    after = product.loss(a.quantized().__getitem__, matrix(b.quantized()))
    ratios = {name: x.ratio for name, x in zip(names, (a, b), strict=True) if not x.fixed}
    return Solved(site, before, after, rounds, ratios), (a, b)
