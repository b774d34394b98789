"""Find the numbers of one unit: scales of weights, inputs and attention operands, biases, and rounded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bittern.attention import Site
from bittern.errors import ModelError
from bittern.layers import QuantLayer, weight_matrix
from bittern.ptq.capture import Heads
from bittern.ptq.clips import Scale
from bittern.ptq.methods import Method
from bittern.ptq.operands import Fold, Operand, Weight, needs_search, searchable
from bittern.ptq.product import Product
from bittern.ptq.ranking import ranking_penalty
from bittern.ptq.search import Space, random_rows, search_left, search_right, search_weight
from bittern.quantizers import FakeQuant, fake_quantize

FOLD_ROWS = 1024  # on which folds are compared


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


@dataclass
class _Group:
    """Layers that read the same input, solved with one fold."""

    fold: Fold
    weights: list[Weight]
    operand: Operand
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
    subset = random_rows(len(x), FOLD_ROWS).to(x.device)
    samples = torch.unique(sample[subset], return_inverse=True)[1]
    trial = replace(method, rounding=None, space=method.space and replace(method.space, rounds=1))
    return min(folds, key=lambda fold: sum(_solve_group(layers, x[subset], samples, trial, tied, fold).after))


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
    weights = [Weight(name, layer, name in tied, x, sample, method, fold) for name, layer in layers.items()]
    quantizers = [layer.input_quantizer for layer in layers.values()]
    operand = Operand(x, next((q for q in quantizers if searchable(q)), quantizers[0]), method)
    inputs = operand.quantized(None if operand.fixed else operand.largest)
    before = [w.loss(inputs, w.values if w.fixed else fake_quantize(w.float, w.format, *w.largest)) for w in weights]
    inputs, rounds, seen = operand.quantized(), 0, set[tuple[object, ...]]()
    while method.space is not None and rounds < method.space.rounds:
        rounds, changed = rounds + 1, False
        for w in weights:
            if not w.fixed and needs_search(w, operand.state, w.state[1]):
                factors = method.space.factors(w.format).to(x.device)
                changed |= w.take(search_weight(w.format, w.largest, factors, w.product, inputs, w.factor))
        if not operand.fixed and needs_search(operand, *(w.state for w in weights)):
            products = [(w.product, w.values.T) for w in weights]
            changed |= operand.search(search_left(x, operand.format, products))
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


def _set(w: Weight, operand: Operand, fold: Fold) -> None:
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
) -> tuple[Solved, tuple[Operand, Operand]]:
    """left (items, heads, rows, inner), right (items, heads, keys, ·): Q and K, or map and V."""
    scores = names[0] == "query"
    count = left.shape[1]
    a, b = (Operand(x.flatten(0, 1), q, method) for x, q in zip((left, right), quantizers, strict=True))

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

    def extremes(operand: Operand) -> Tensor:
        return operand.quantized(None if operand.fixed else operand.largest)

    before, rounds = product.loss(extremes(a).__getitem__, matrix(extremes(b))), 0
    while method.space is not None and rounds < method.space.rounds:
        rounds, changed = rounds + 1, False
        if not b.fixed and needs_search(b, a.state):
            left = a.quantized()
            changed |= b.search(search_right(matrix(b.x), b.format, product, left, penalty))
        if not a.fixed and needs_search(a, b.state):
            sides = [(product, matrix(b.quantized()))]
            changed |= a.search(search_left(a.x, a.format, sides, penalty))
        if not changed:
            break
    after = product.loss(a.quantized().__getitem__, matrix(b.quantized()))
    ratios = {name: x.ratio for name, x in zip(names, (a, b), strict=True) if not x.fixed}
    return Solved(site, before, after, rounds, ratios), (a, b)
