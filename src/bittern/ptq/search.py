"""Scales by search: the candidates that keep a product's output closest to the float one [VT eq. 9-13].

A product O = A·B becomes Ô = Â·B̂. The error of one side enters linearly, δ = D + E·B̂ with E = Â - A, so a candidate is
scored without its matrix product. With p = ⟨O,δ⟩, q = ‖δ‖², σ² = ‖O‖² (O and δ centred for Pearson) the loss is
1 - Γ = r/(1 + √(1-r)), r = (qσ² - p²)/(σ²(σ² + 2p + q)). Pooled over samples with weights 1/σ², q is

* for an element-wise side (activations) a sum over elements of a function of their value, but for the cross terms of
  ‖E·B̂‖²: so one weighted histogram serves all candidates, and cross terms are estimated on a few rows,
  along the leading directions of B̂;
* for weights the same with the diagonal of the inputs' pooled Gram matrix G, and tr(E·G·Eᵀ) for those that come near.

The best few are then scored exactly, until no other can be better by what the exact scores say of the estimate's error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bittern import native
from bittern.native import rounding
from bittern.ptq.product import Objective, Product
from bittern.quantizers import code_range, fake_quantize, find_scale
from bittern.recipe import Format

Scale = tuple[Tensor, Tensor | None]  # and offset
Search = Callable[[Sequence[Scale], int | None], int]  # index of the best of some scales, given that of the present
CrossTerms = Callable[[Sequence[Scale]], Tensor]  # of each of some scales

BINS = 1 << 14  # 32 or more to a step of 8 bits
CROSS_ROWS = 160  # rows on which cross terms are estimated
ESTIMATE_ROWS = 2048  # with slack: rows from which first-order terms and Gram matrices of estimates come
CROSS_STEP = 4  # with slack: cross terms are estimated for every so-many-th candidate
GRAM_CANDIDATES = 12  # candidates of a weight that are scored through the Gram matrix
RANK = 16  # directions in which errors of rows add up, in estimates
ROW_CANDIDATES = 8  # the same for scales per row, where each row has its own best
ROUGH_SCORES = 5  # candidates that are scored at once if an estimate leaves out a part of the loss
TOLERANCE = 1e-7  # of the loss, by which another candidate may be better than the one that is chosen


@dataclass(frozen=True)
class Space:
    """What is searched: `candidates` factors from `low` to `high` times the scale of the extremes [VT 3.2].

    slack: what a choice may lose, relative to the loss, for the time it saves; 0 finds the best candidate.
    ends: both ends of an asymmetric range are searched, not only their common factor.
    """

    objective: Objective = "pearson"
    low: float = 0.5
    high: float = 1.2
    candidates: int = 100
    rounds: int = 20
    slack: float = 0.0
    ends: bool = False

    def factors(self, fmt: Format) -> Tensor:
        """At 4 bits and fewer 0.5 would be a binding bound."""
        return torch.linspace(min(self.low, 0.1) if fmt.bits <= 4 else self.low, self.high, self.candidates)


def scales(low: Tensor, high: Tensor, fmt: Format, factors: Tensor) -> list[Scale]:
    """Scales and offsets of a format for its extremes times each factor, or times each pair of factors (n, 2)."""
    extremes = torch.stack([low.reshape(()), high.reshape(())]) * factors.view(len(factors), -1)
    scale, offset = find_scale(extremes, fmt.model_copy(update={"granularity": "row"}))
    return list(zip(scale[:, 0], [None] * len(scale) if offset is None else offset[:, 0], strict=True))


def error_of(x: Tensor, fmt: Format, scale: Scale) -> Tensor:
    return fake_quantize(x, fmt, *scale).sub_(x)


def choose(
    estimate: Tensor, exact: Callable[[int], float], start: int | None, slack: float = 0.0, rough: bool = False
) -> int:
    """The candidate of least exact loss, of those that the estimate and its error, as far as it is known, call best.

    The error is smooth but for a rest: it is interpolated between the candidates that were scored, and scoring goes on
    while another candidate could be the best if that missed by more than it did lately, the more the less is known.
    start: the present candidate; if the estimate would keep it, nothing is scored. slack: what may be lost, relative to
    the loss, for fewer scores. rough: the estimate leaves out a part of the loss.
    """
    estimates = estimate.double().cpu().numpy()
    count, best_one = len(estimates), int(estimates.argmin())
    if best_one == start:
        return start
    spread = np.linspace(0, count - 1, ROUGH_SCORES).astype(int).tolist() if rough else []
    wanted = dict.fromkeys([best_one, *spread, *([] if start is None else [start])])
    tried: dict[int, float] = {c: exact(c) for c in wanted}
    missed: list[float] = []
    while len(tried) < count:
        at = sorted(tried)
        errors = [tried[c] - estimates[c] for c in at]
        likely = estimates + np.interp(np.arange(count), at, errors)
        likely[at] = np.inf
        candidate, best = int(likely.argmin()), min(tried.values())
        if missed:
            doubt = 1.5 * max(missed[-8:])
            if len(missed) < 4:
                doubt = max(8 / len(missed) * max(missed), 2 * max(map(abs, errors)))
            if likely[candidate] - doubt > best - max(TOLERANCE, slack * best):
                break
        tried[candidate] = exact(candidate)
        missed.append(abs(tried[candidate] - likely[candidate]))
    while True:  # what lies beside the best is nearly as good
        best_one = min(tried, key=tried.__getitem__)
        beside = {best_one - 1, best_one + 1} & set(range(count)) - tried.keys()
        found = {candidate: exact(candidate) for candidate in beside}
        best = tried[best_one]
        tried |= found
        if best - min(tried.values()) <= max(TOLERANCE, slack * best):
            return min(tried, key=tried.__getitem__)


def search_left(
    x: Tensor, fmt: Format, products: Sequence[tuple[Product, Tensor]], penalty: Callable[[Tensor], float] | None = None
) -> Search:
    """Searches for the scale of x, the left side of every product, whose right sides B̂ are given.

    penalty: of an output error, added to the exact loss (the ranking loss).
    """
    slack = products[0][0].slack
    wanted = ESTIMATE_ROWS if x.dim() == 2 else ESTIMATE_ROWS // x.shape[1] + 1
    order = random_rows(len(x), wanted if slack else len(x)).to(x.device)
    some, (few, times) = _which(order, len(x)), _cross_rows(x, order)
    lines = slice(None) if x.dim() == 2 else slice(0, None, max(1, x.shape[1] * len(few) // CROSS_ROWS))
    scale_up, part = len(x) / len(order), x[few]
    part = part if x.dim() == 2 else part[:, lines]
    square, linear, gain = torch.zeros(1, device=x.device), torch.zeros_like(x[some]), torch.zeros_like(x[some])
    crosses: list[CrossTerms] = []
    p = q = torch.zeros((), device=x.device)
    for product, right in products:
        weighted, centred, p0, q0 = product.first_order(x[some], right, some)
        near = right if right.dim() == 2 else right[some]
        linear, gain = linear + torch.matmul(weighted, near.mT), gain + torch.matmul(centred, near.mT)
        p, q = p + p0 * scale_up, q + q0 * scale_up
        columns = torch.linalg.vector_norm(right, dim=-1).square().unsqueeze(-2)
        square = square + product.row_weight * columns
        weight = product.row_weight[few] * times
        weight = weight if x.dim() == 2 else weight[:, lines] * (x.shape[1] / part.shape[1])
        if right.dim() == 2:
            crosses.append(_cross(part, fmt, _leading(right.T), weight[:, 0]))
        else:
            groups = zip(part, right[few], weight, strict=True)
            crosses += [_cross(rows, fmt, _leading(r.T), w[:, 0]) for rows, r, w in groups]

    elements = _elements(x, fmt, x[some], square, linear, gain, scale_up)

    def search(options: Sequence[Scale], start: int | None) -> int:
        def exact(candidate: int) -> float:
            def left(part: slice) -> Tensor:
                return fake_quantize(x[part], fmt, *options[candidate])

            return sum(product.loss(left, right, penalty) for product, right in products) / len(products)

        cross = _interpolated(crosses, options, slack)
        p1, q1 = elements(options)
        estimate = products[0][0].pooled(p + p1, q + q1 + cross, len(products))
        return choose(estimate, exact, start, slack, penalty is not None)

    return search


def search_right(
    x: Tensor, fmt: Format, product: Product, left: Tensor, penalty: Callable[[Tensor], float] | None = None
) -> Search:
    """Searches for the scale of x (groups, inner, columns), the right side of a product; its left side is Â."""
    order = random_rows(len(x), ESTIMATE_ROWS // left.shape[1] + 1 if product.slack else len(x)).to(x.device)
    some, few = _which(order, len(x)), order[:8]
    weighted, centred, p0, q0 = product.first_order(left[some], x, some)
    near = left[some].mT
    square = torch.matmul(left.square().mT, product.row_weight)
    scale_up, each = len(x) / len(order), torch.full(x.shape[-1:], len(x) / len(few), device=x.device)
    weighted_left = left[few] * product.row_weight[few].sqrt()
    crosses = [_cross(p.T.contiguous(), fmt, _leading(w), each) for p, w in zip(x[few], weighted_left, strict=True)]
    elements = _elements(x, fmt, x[some], square, torch.matmul(near, weighted), torch.matmul(near, centred), scale_up)

    def search(options: Sequence[Scale], start: int | None) -> int:
        def exact(candidate: int) -> float:
            return product.loss(left.__getitem__, fake_quantize(x, fmt, *options[candidate]), penalty)

        cross = _interpolated(crosses, options, product.slack)
        p, q = elements(options)
        estimate = product.pooled(p + p0 * scale_up, q + q0 * scale_up + cross)
        return choose(estimate, exact, start, product.slack, penalty is not None)

    return search


def _cross_rows(x: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (or groups) of x on which cross terms are estimated, and how many rows each stands for.

    Half are those of the largest values: what a small scale clips sits in few rows, and there it is all that counts.
    """
    if x.dim() == 3:
        few = some[:8]
        return few, torch.full((len(few), 1, 1), len(x) / len(few), device=x.device)
    largest = x.abs().amax(-1).topk(min(CROSS_ROWS // 2, len(x))).indices
    others = some[~torch.isin(some, largest)][: CROSS_ROWS // 2]
    times = torch.ones(len(largest) + len(others), 1, device=x.device)
    times[len(largest) :] = (len(x) - len(largest)) / max(len(others), 1)
    return torch.cat([largest, others]), times


def random_rows(count: int, wanted: int) -> Tensor:
    """The same random part of `count` indices in every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]


def _which(order: Tensor, count: int) -> Tensor | slice:
    """Indices, or a slice, which copies nothing, if these are all there are."""
    return slice(None) if len(order) == count else order


def _elements(
    x: Tensor, fmt: Format, part: Tensor, square: Tensor, linear: Tensor, gain: Tensor, scale_up: float
) -> Callable[[Sequence[Scale]], tuple[Tensor, Tensor]]:
    """Σ gain·e and Σ square·e² + 2·linear·e for the errors e of candidates, through histograms of x.

    square broadcasts against x; linear and gain belong to a part of it, and are scaled up.
    """
    low, high = x.aminmax()
    width = (high - low).clamp(min=1e-30) / BINS

    def histogram(values: Tensor, weights: Tensor) -> Tensor:
        index = values.sub(low).div_(width).int().clamp_(0, BINS - 1).flatten()
        return torch.bincount(index, weights.expand_as(values).flatten(), BINS)

    centres = (low + (torch.arange(BINS, device=x.device) + 0.5) * width).unsqueeze(0)
    first, along = (histogram(part, t).unsqueeze(0) * scale_up for t in (linear, gain))
    second, none = histogram(x, square), centres.new_zeros(BINS, 0)

    def sums(options: Sequence[Scale]) -> tuple[Tensor, Tensor]:
        p = _row_losses(centres, fmt, options, none, torch.zeros_like(second), along)
        q = _row_losses(centres, fmt, options, none, second, 2 * first)
        return p[:, 0], q[:, 0]

    return sums


def _cross(rows: Tensor, fmt: Format, leading: Tensor, weight: Tensor) -> CrossTerms:
    """The weighted eᵀGe of rows e less its diagonal, nearly."""
    diagonal = -leading.square().sum(-1)
    return lambda options: _row_losses(rows, fmt, options, leading, diagonal) @ weight


def _interpolated(crosses: Sequence[CrossTerms], options: Sequence[Scale], slack: float) -> Tensor:
    """Sums of the cross terms of all candidates; with slack, straight lines between every `CROSS_STEP`-th one."""
    knots = [*range(0, len(options) - 1, CROSS_STEP if slack else 1), len(options) - 1]
    some = [options[i] for i in knots]
    y = torch.stack([cross_terms(some) for cross_terms in crosses]).sum(0)
    at, position = torch.tensor(knots, device=y.device), torch.arange(len(options), device=y.device)
    right = torch.searchsorted(at, position).clamp(min=1)
    between: Tensor = (position - at[right - 1]) / (at[right] - at[right - 1])
    return y[right - 1].lerp(y[right], between)


def search_weight(
    fmt: Format, largest: Scale, factors: Tensor, product: Product, inputs: Tensor, start: Tensor | None
) -> Tensor:
    """Factors (of `largest`, in its shape) of the best scales of a weight, the right side, for inputs X̂ (rows, in).

    Scales per row of the weight (out, in): each row minimises its part of the pooled loss. start: the present factors.
    """
    weight = product.right.T.contiguous()
    whole = fmt.granularity == "tensor"
    wanted = ESTIMATE_ROWS if whole else 2 * ESTIMATE_ROWS
    order = random_rows(len(inputs), wanted if product.slack else len(inputs)).to(inputs.device)
    scale_up, some = len(inputs) / len(order), _which(order, len(inputs))
    part = inputs[some]
    weighted, centred, p0, q0 = product.first_order(part, product.right, some)
    linear = weighted.T @ part * scale_up
    gain = torch.zeros_like(linear) if product.objective == "mse" else centred.T @ part * scale_up
    part = part * (product.row_weight[some] * scale_up).sqrt()
    leading = _leading(part)

    def scale(factor: Tensor) -> Scale:
        return largest[0] * factor, None if largest[1] is None else largest[1] * factor

    def error(factor: Tensor) -> Tensor:
        return error_of(weight, fmt, scale(factor))

    if whole:
        options = [scale(factor) for factor in factors]
        p, q = _elements(weight, fmt, weight, part.square().sum(0), linear, gain, 1.0)(options)
        p, q = p + p0 * scale_up, q + q0 * scale_up
        # On all rows: what a small scale clips sits in few of them, and there p² is nearly q.
        few, times = _cross_rows(weight, random_rows(len(weight), len(weight)).to(weight.device))
        cross = _interpolated([_cross(weight[few], fmt, leading, times[:, 0])], options, product.slack)
        q += cross
        if len(inputs) > 2 * part.shape[1]:  # else exact scores cost as little
            gram = part.T @ part
            at = product.pooled(p, q).argsort()[:GRAM_CANDIDATES].sort().values
            missing = []  # of the cross terms; of candidates between these, about as much
            for i in at:
                e = error(factors[i])
                missing.append(((e @ gram).add_(linear, alpha=2).mul_(e)).sum() + q0 * scale_up - q[i])
            rest = np.interp(np.arange(len(q)), at.cpu(), torch.stack(missing).cpu())
            q += torch.from_numpy(rest).to(q)
        estimate = product.pooled(p, q)

        def exact(candidate: int) -> float:
            return product.loss(inputs.__getitem__, fake_quantize(weight, fmt, *options[candidate]).T)

        was = None if start is None else int((factors - start).abs().argmin())
        return factors[choose(estimate, exact, was, product.slack)]
    present = torch.ones_like(largest[0]) if start is None else start
    slope = 0.0
    if product.objective != "mse":  # a row's share of -p², to first order around the present scales
        samples = max(int(product.live.sum()), 1)
        slope = 2 * float(p0 * scale_up + (gain * error(present)).sum()) / samples
    linear = 2 * linear - slope * gain
    gram = part.T @ part
    if present.dim() == 3:
        return _best_groups(weight, fmt, largest, factors, present, gram, linear)
    diagonal = (gram.diagonal() - leading.square().sum(-1)).clamp(min=0)
    rough = _row_losses(weight, fmt, [scale(factor) for factor in factors], leading, diagonal, linear)
    return _best_rows(error, factors, present, rough, gram, linear)


def _leading(x: Tensor) -> Tensor:
    """F (columns, rank) with FFᵀ near to xᵀx of x (rows, columns): what the clipped has in common lies along these."""
    size = x.abs().amax().clamp(min=1e-30)  # the fourth power of large values would overflow
    x = x / size
    basis = torch.randn(x.shape[1], min(RANK, *x.shape), generator=torch.Generator().manual_seed(0)).to(x.device)
    for _ in range(2):
        basis = torch.linalg.qr(x.T @ (x @ basis))[0]
    factor: Tensor = basis @ torch.linalg.qr(x @ basis)[1].T * size
    return factor


def _row_losses(
    x: Tensor, fmt: Format, options: Sequence[Scale], factor: Tensor, rest: Tensor, linear: Tensor | None = None
) -> Tensor:
    """‖e·factor‖² + Σ (linear + rest·e)·e for the errors e of x's rows by each candidate: (candidates, rows)."""
    if fmt.kind == "uniform" and fmt.clip is None and native.serves(x):
        scales = torch.stack([scale.expand(len(x), 1)[:, 0] for scale, _ in options])
        offsets = [offset.expand(len(x), 1)[:, 0] for _, offset in options if offset is not None]
        shifts = torch.stack(offsets) if offsets else None
        return rounding.losses(x, code_range(fmt), scales, shifts, factor, rest, linear)
    losses = []
    for scale in options:
        error = error_of(x, fmt, scale)
        slope = error * rest if linear is None else torch.addcmul(linear, error, rest)
        losses.append((error @ factor).square_().sum(-1) + slope.mul_(error).sum(-1))
    return torch.stack(losses)


def _best_rows(
    error: Callable[[Tensor], Tensor], factors: Tensor, present: Tensor, rough: Tensor, gram: Tensor, linear: Tensor
) -> Tensor:
    """The factor of each scale that minimises eᵀGe + ⟨linear, e⟩ over its row; rough: that of each factor, nearly."""
    ranked = rough.topk(min(ROW_CANDIDATES, len(factors)), 0, largest=False).indices
    tried = [factors[index].unsqueeze(-1) for index in ranked] + [present]
    exact = torch.stack([(e @ gram).add_(linear).mul_(e).sum(-1) for e in map(error, tried)])
    return torch.stack(tried).gather(0, exact.argmin(0)[None, :, None])[0]


def _best_groups(
    weight: Tensor, fmt: Format, largest: Scale, factors: Tensor, present: Tensor, gram: Tensor, linear: Tensor
) -> Tensor:
    """Group after group, the factor that minimises eᵀGe + ⟨linear, e⟩ over the row, the other groups as they are."""
    size, chosen = weight.shape[1] // present.shape[1], present.clone()
    single = fmt.model_copy(update={"granularity": "row", "group_size": None})
    offset = largest[1]
    e = error_of(weight, fmt, (largest[0] * present, None if offset is None else offset * present))
    for group in range(present.shape[1]):
        own = slice(group * size, (group + 1) * size)
        part, block, was = weight[:, own].contiguous(), gram[own, own], e[:, own].clone()
        rest = 2 * (e @ gram[:, own] - was @ block) + linear[:, own]
        best, error = torch.full_like(chosen[:, group], torch.inf), was.clone()
        for factor in (present[:, group], *factors):
            scale = largest[0][:, group] * factor, None if offset is None else offset[:, group] * factor
            tried = error_of(part, single, scale)
            value = (tried @ block).add_(rest).mul_(tried).sum(-1, keepdim=True)
            better = value < best
            best, error = torch.where(better, value, best), torch.where(better, tried, error)
            chosen[:, group] = torch.where(better, factor, chosen[:, group])
        e[:, own] = error
    return chosen
