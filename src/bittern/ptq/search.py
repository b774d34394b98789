"""Scales by search: the candidates that keep a product's output closest to the float one [VT eq. 9-13].

A product O = A·B becomes Ô = Â·B̂. The error of one side enters linearly, δ = D + E·B̂ with E = Â - A, so a candidate is
estimated without its matrix product. With p = ⟨O,δ⟩, q = ‖δ‖², σ² = ‖O‖² (O and δ centred for Pearson) the loss is
1 - Γ = r/(1 + √(1-r)), r = (qσ² - p²)/(σ²(σ² + 2p + q)). Pooled over samples with weights 1/σ², p and q are sums over
the elements of one side of a function of their value, so one weighted histogram serves all candidates; but for the
cross terms of ‖E·B̂‖², which a few rows tell, along the leading directions of B̂. For scales of a weight's rows these
choose the candidates that are scored through the inputs' Gram matrix G, as tr(E·G·Eᵀ). The best few scales of a whole
tensor are scored exactly, until no other can be better by what the scores say of the estimate's error.

Tried and dropped: 10 coarse and 5 fine exact scores without estimates (three of five choices were not the best to
1e-6, the worst lost 2 %); no estimate of cross terms (15 scores in place of 9); losses on 64 rows and those of the
largest values as estimates (a sixth less code, 13 scores in place of 9, and some choices at 4 bits lose 4 %).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bittern import native
from bittern.native import rounding
from bittern.ptq.clips import Scale
from bittern.ptq.product import Objective, Penalty, Product, random_rows
from bittern.quantizers import code_range, fake_quantize, find_scale
from bittern.recipe import Format

CrossTerms = Callable[[Sequence[Scale]], Tensor]  # of each of some scales
Search = Callable[[Sequence[Scale], int | None], int]  # index of the best of some scales, given that of the present

BINS = 1 << 14  # 32 or more to a step of 8 bits
ESTIMATE_ROWS = 2048  # with slack: rows from which first-order terms and Gram matrices of estimates come
CROSS_ROWS = 160  # rows on which cross terms are estimated
SPREAD = 5  # candidates that are scored at once if an estimate leaves out a part of the loss
RANK = 16  # directions in which errors of rows add up, in estimates
ROW_CANDIDATES = 8  # for scales per row: those whose estimates come near are scored, for each row its own
TIE = 1e-7  # of the loss, by which another candidate may be better than the one that is chosen


@dataclass(frozen=True)
class Space:
    """The space that is searched: `candidates` factors from `low` to `high` times the scale of the extremes [VT 3.2].

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
        """Return the candidates as factors. At 4 bits and fewer a lower end of 0.5 would be a binding bound."""
        return torch.linspace(min(self.low, 0.1) if fmt.bits <= 4 else self.low, self.high, self.candidates)


def candidate_scales(low: Tensor, high: Tensor, fmt: Format, factors: Tensor) -> list[Scale]:
    """Scales and offsets of a format for its extremes times each factor, or times each pair of factors (n, 2)."""
    extremes = torch.stack([low.reshape(()), high.reshape(())]) * factors.view(len(factors), -1)
    scale, offset = find_scale(extremes, fmt.model_copy(update={"granularity": "row"}))
    return list(zip(scale[:, 0], [None] * len(scale) if offset is None else offset[:, 0], strict=True))


def times(scale: Scale, factor: Tensor) -> Scale:
    """Return a scale and its offset, both times a factor."""
    return scale[0] * factor, None if scale[1] is None else scale[1] * factor


def error_of(x: Tensor, fmt: Format, scale: Scale) -> Tensor:
    """Return x̂ - x."""
    return fake_quantize(x, fmt, *scale).sub_(x)


def choose(
    estimate: Tensor, exact: Callable[[int], float], start: int | None, slack: float = 0.0, rough: bool = False
) -> int:
    """Return the candidate of least exact loss, of those that the estimate and its error, as far as known, call best.

    The error is smooth but for a rest: it is interpolated between the candidates that were scored, and scoring goes on
    while another candidate could be the best if that missed by more than it did lately, the more the less is known.
    start: the present candidate, which is scored too. slack: what may be lost, relative to the loss, for fewer scores:
    one that the estimate keeps is then left only for better ones beside it.
    rough: the estimate leaves out a part of the loss.

    >>> losses = [0.30, 0.10, 0.25]
    >>> choose(torch.tensor([0.2, 0.1, 0.0]), losses.__getitem__, start=2)  # the estimate is for 2, its scores for 1
    1
    """
    estimates = estimate.double().cpu().numpy()
    count = len(estimates)
    spread = np.linspace(0, count - 1, SPREAD).astype(int).tolist() if rough else []
    wanted = dict.fromkeys([int(estimates.argmin()), *spread, *([] if start is None else [start])])
    tried: dict[int, float] = {c: exact(c) for c in wanted}
    missed: list[float] = []
    kept = slack > 0 and [*wanted] == [start]
    while len(tried) < count and not kept:
        at = sorted(tried)
        errors = [tried[c] - estimates[c] for c in at]
        likely = estimates + np.interp(np.arange(count), at, errors)
        likely[at] = np.inf
        candidate, best = int(likely.argmin()), min(tried.values())
        if missed:
            doubt = 1.5 * max(missed[-8:])
            if len(missed) < 4:
                doubt = max(8 / len(missed) * max(missed), 2 * max(map(abs, errors)))
            if likely[candidate] - doubt > best - max(TIE, slack * best):
                break
        tried[candidate] = exact(candidate)
        missed.append(abs(tried[candidate] - likely[candidate]))
    while True:  # what lies beside the best is nearly as good
        best_one, best = min(tried.items(), key=lambda pair: pair[1])
        beside = {best_one - 1, best_one + 1} & set(range(count)) - tried.keys()
        tried |= {candidate: exact(candidate) for candidate in beside}
        if best - min(tried.values()) <= max(TIE, slack * best):
            return min(tried, key=tried.__getitem__)


def search_left(
    x: Tensor, fmt: Format, products: Sequence[tuple[Product, Tensor]], penalty: Penalty | None = None
) -> Search:
    """Return a search for the scale of x, the left side of every product, whose right sides B̂ are given.

    x: (rows, inner) with right sides (inner, columns), or (groups, rows, inner) with one (groups, inner, columns).

    A row 1, 0.4, 0.4 in the codes -2 to 1, times ones: O is 1.8. The scale of the extremes, 1, gives 1, 0, 0, so that
    Ô is 1. Half of it clips the largest value, but Ô of 0.5, 0.5, 0.5 is 1.5, which is nearer.

    >>> x, right, fmt = torch.tensor([[1.0, 0.4, 0.4]]), torch.ones(3, 1), Format(bits=2, range="static")
    >>> product = Product(x, right, torch.zeros(1, dtype=torch.long), "mse")
    >>> search = search_left(x, fmt, [(product, right)])
    >>> search(candidate_scales(*x.aminmax(), fmt, torch.tensor([1.0, 0.5])), None)
    1
    """
    slack = products[0][0].slack
    subset, scale_up = _part(x, slack)
    linear, gain = torch.zeros_like(x[subset]), torch.zeros_like(x[subset])
    square = p = q = torch.zeros((), device=x.device)
    crosses: list[CrossTerms] = []
    for product, right in products:
        weighted, centred, p0, q0 = product.first_order(x[subset], right, subset)  # (…, rows, columns) twice, sums
        near = right if right.dim() == 2 else right[subset]
        linear, gain = linear + weighted @ near.mT, gain + centred @ near.mT  # (…, rows, inner)
        square = square + product.row_weight * right.square().sum(-1).unsqueeze(-2)  # (…, rows, inner)
        p, q = p + p0 * scale_up, q + q0 * scale_up
        crosses += _cross_terms(x, fmt, right.mT, product.row_weight)
    sums = _sums(x, fmt, square, x[subset], linear * scale_up, gain * scale_up, crosses)

    def exact(scale: Scale) -> float:
        def left(rows: slice) -> Tensor:
            return fake_quantize(x[rows], fmt, *scale)

        return sum(product.loss(left, right, penalty) for product, right in products) / len(products)

    def search(options: Sequence[Scale], start: int | None) -> int:
        p1, q1 = sums(options)
        estimate = products[0][0].pooled(p + p1, q + q1, len(products))
        return choose(estimate, lambda i: exact(options[i]), start, slack, penalty is not None)

    return search


def search_right(x: Tensor, fmt: Format, product: Product, left: Tensor, penalty: Penalty | None = None) -> Search:
    """Return a search for the scale of x, the right side of a product, whose left side Â is given. x: (inner, columns)
    with left (rows, inner), or (groups, inner, columns) with left (groups, rows, inner)."""
    subset, scale_up = _part(left, product.slack)
    weighted, centred, p, q = product.first_order(left[subset], x, subset)  # (…, rows, columns) twice, and sums
    near = left[subset].mT
    linear, gain = near @ weighted * scale_up, near @ centred * scale_up  # (…, inner, columns)
    square = left.square().mT @ product.row_weight  # (…, inner, 1)
    each = torch.ones_like(x.mT[..., :1])
    crosses = _cross_terms(x.mT, fmt, left * product.row_weight.sqrt(), each)  # x.mT (…, columns, inner)
    sums = _sums(x, fmt, square, x if x.dim() == 2 else x[subset], linear, gain, crosses)

    def exact(scale: Scale) -> float:
        return product.loss(left.__getitem__, fake_quantize(x, fmt, *scale), penalty)

    def search(options: Sequence[Scale], start: int | None) -> int:
        p1, q1 = sums(options)
        estimate = product.pooled(p * scale_up + p1, q * scale_up + q1)
        return choose(estimate, lambda i: exact(options[i]), start, product.slack, penalty is not None)

    return search


def _part(x: Tensor, slack: float, rows: int = 0) -> tuple[Tensor | slice, float]:
    """Return rows or groups of x from which estimates come, with slack not all, and how many each stands for."""
    wanted = rows or ESTIMATE_ROWS if x.dim() == 2 else ESTIMATE_ROWS // x.shape[1] + 1
    if not slack or wanted >= len(x):
        return slice(None), 1.0  # a slice copies nothing
    return random_rows(len(x), wanted).to(x.device), len(x) / wanted


def _cross_terms(x: Tensor, fmt: Format, other: Tensor, weight: Tensor) -> list[CrossTerms]:
    """Return estimates of the weighted ‖e·otherᵀ‖² of x's rows less the part of its diagonal, from a few rows.

    x (rows, inner) with other (·, inner) and weight (rows, 1); or groups of these. Half the rows are those of the
    largest values: what a small scale clips sits in few rows, and there it is all that counts.
    """

    def terms(rows: Tensor, leading: Tensor, weight: Tensor) -> CrossTerms:
        diagonal = -leading.square().sum(-1)
        return lambda options: _row_losses(rows, fmt, options, leading, diagonal) @ weight

    if x.dim() == 3:
        groups = random_rows(len(x), 8).tolist()
        step = max(1, x.shape[1] * len(groups) // CROSS_ROWS)
        scale_up = len(x) / len(groups) * step
        return [terms(x[g, ::step], _leading(other[g]), weight[g, ::step, 0] * scale_up) for g in groups]
    largest = x.abs().amax(-1).topk(min(CROSS_ROWS // 2, len(x))).indices
    rest = random_rows(len(x), len(x)).to(x.device)
    rest = rest[~torch.isin(rest, largest)][: CROSS_ROWS // 2]
    scale_up = (len(x) - len(largest)) / max(len(rest), 1)
    weights = torch.cat([weight[largest, 0], weight[rest, 0] * scale_up])
    return [terms(x[torch.cat([largest, rest])], _leading(other), weights)]


def _sums(
    x: Tensor, fmt: Format, square: Tensor, part: Tensor, linear: Tensor, gain: Tensor, crosses: Sequence[CrossTerms]
) -> Callable[[Sequence[Scale]], tuple[Tensor, Tensor]]:
    """Return Σ gain·e and Σ square·e² + 2·linear·e + cross terms for the errors e of candidates, by histograms of x.
    square broadcasts against x; linear and gain belong to a part of it."""
    low, high = x.aminmax()
    width = (high - low).clamp(min=1e-30) / BINS

    def histogram(values: Tensor, weights: Tensor) -> Tensor:
        index = values.sub(low).div_(width).int().clamp_(0, BINS - 1).flatten()
        return torch.bincount(index, weights.expand_as(values).flatten(), BINS).unsqueeze(0)  # (1, bins)

    centres = (low + (torch.arange(BINS, device=x.device) + 0.5) * width).unsqueeze(0)  # (1, bins)
    first, along = 2 * histogram(part, linear), histogram(part, gain)
    second, none = histogram(x, square)[0], centres.new_zeros(BINS, 0)

    def sums(options: Sequence[Scale]) -> tuple[Tensor, Tensor]:
        p = _row_losses(centres, fmt, options, none, torch.zeros_like(second), along)
        q = _row_losses(centres, fmt, options, none, second, first)
        return p[:, 0], q[:, 0] + sum(cross(options) for cross in crosses)

    return sums


def search_weight(
    fmt: Format, largest: Scale, factors: Tensor, product: Product, inputs: Tensor, start: Tensor | None
) -> Tensor:
    """Return factors (of `largest`, in its shape) of the best scales of a weight, the right side.

    inputs: X̂ (rows, in). Scales per row of the weight (out, in): each row minimises its part of the pooled loss.
    start: the present factors.
    """
    if fmt.granularity == "tensor":
        present = None if start is None else int((factors - start).abs().argmin())
        search = search_right(product.right, fmt, product, inputs)
        return factors[search([times(largest, factor) for factor in factors], present)]
    weight = product.right.T.contiguous()
    factor = torch.ones_like(largest[0]) if start is None else start
    subset, scale_up = _part(inputs, product.slack, 2 * ESTIMATE_ROWS)
    part = inputs[subset]
    weighted, centred, p, _ = product.first_order(part, product.right, subset)  # (rows, out) twice, and sums
    linear = 2 * scale_up * (weighted.T @ part)  # (out, in)
    if product.objective != "mse":  # a row's share of -p², to first order around the present scales
        gain, samples = scale_up * (centred.T @ part), max(int(product.live.sum()), 1)  # (out, in)
        p = p * scale_up + (gain * error_of(weight, fmt, times(largest, factor))).sum()
        linear -= 2 * p / samples * gain
    part = part * (product.row_weight[subset] * scale_up).sqrt()
    gram = part.T @ part  # (in, in)
    if factor.dim() == 3:
        return _best_groups(weight, fmt, largest, factors, factor, gram, linear)
    leading = _leading(part)
    diagonal = (gram.diagonal() - leading.square().sum(-1)).clamp(min=0)
    rough = _row_losses(weight, fmt, [times(largest, factor) for factor in factors], leading, diagonal, linear)
    ranked = rough.topk(min(ROW_CANDIDATES, len(factors)), 0, largest=False).indices  # (candidates, out)
    tried = torch.stack([*factors[ranked].unsqueeze(-1), factor])  # (candidates, out, 1)
    errors = (error_of(weight, fmt, times(largest, factor)) for factor in tried)
    exact = torch.stack([(e @ gram).add_(linear).mul_(e).sum(-1) for e in errors])  # (candidates, out)
    return tried.gather(0, exact.argmin(0)[None, :, None])[0]


def _leading(x: Tensor) -> Tensor:
    """Return F (columns, rank) with FFᵀ near to xᵀx of x (rows, columns): the clipped has these in common."""
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
    """Return ‖e·factor‖² + Σ (linear + rest·e)·e for the errors e of x's rows by each candidate: (candidates, rows)."""
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


def _best_groups(
    weight: Tensor, fmt: Format, largest: Scale, factors: Tensor, present: Tensor, gram: Tensor, linear: Tensor
) -> Tensor:
    """Return, group after group, the factor of least eᵀGe + ⟨linear, e⟩ over the row, other groups as they are."""
    size, chosen = weight.shape[1] // present.shape[1], present.clone()
    single = fmt.model_copy(update={"granularity": "row", "group_size": None})
    e = error_of(weight, fmt, times(largest, present))
    for group in range(present.shape[1]):
        own = slice(group * size, (group + 1) * size)
        part, block, was = weight[:, own].contiguous(), gram[own, own], e[:, own].clone()
        own_largest = largest[0][:, group], None if largest[1] is None else largest[1][:, group]
        rest = 2 * (e @ gram[:, own] - was @ block) + linear[:, own]
        best, error = torch.full_like(chosen[:, group], torch.inf), was.clone()
        for factor in (present[:, group], *factors):
            tried = error_of(part, single, times(own_largest, factor))
            value = (tried @ block).add_(rest).mul_(tried).sum(-1, keepdim=True)
            better = value < best
            best, error = torch.where(better, value, best), torch.where(better, tried, error)
            chosen[:, group] = torch.where(better, factor, chosen[:, group])
        e[:, own] = error
    return chosen
