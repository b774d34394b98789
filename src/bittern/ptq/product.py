"""A product O = left·right, and what a quantized one loses of it: likeness and, of scores, order [VT eq. 10-13]."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["pearson", "cosine", "mse"]
Penalty = Callable[[Tensor], float]  # of an output error, added to the exact loss (the ranking loss)
RANKED_ROWS = 1024  # on which the search looks at the order
CHUNK_ENTRIES = 1 << 19  # entries of an error that are looked at at once: they stay in the cache


def random_rows(count: int, wanted: int) -> Tensor:
    """Return the same random part of `count` indices in every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]


def loss(p: Tensor, q: Tensor, power: Tensor, objective: Objective) -> Tensor:
    """Return 1 - similarity of O and O + δ, without cancellation; for `mse` the relative squared error ‖δ‖²/‖O‖²."""
    if objective == "mse":
        return q / power
    total = (power + 2 * p + q).clamp(min=1e-30)
    r = ((q * power - p * p) / (power * total)).clamp(0, 1)
    return torch.where(power + p > 0, r / (1 + (1 - r).sqrt()), 1 + (1 - r).sqrt())


class Product:
    """O = left·right, float, and its sums by sample.

    left: (rows, inner) with right (inner, columns), or (groups, rows, inner) with right (groups, inner, columns).
    sample: the sample that each row belongs to, (rows) or (groups, rows). columns: how many entries of each row count
    (padded ones are zero in O and Ô); all, if not given. shift: what is taken from O and from Ô, for each column.
    slack: what a choice may lose, relative to the loss.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        sample: Tensor,
        objective: Objective,
        columns: Tensor | None = None,
        shift: Tensor | None = None,
        slack: float = 0.0,
    ):
        self.right, self.out = right, torch.matmul(left, right)  # (…, rows, columns)
        self.sample, self.objective, self.shift, self.slack = sample, objective, shift, slack
        self.samples = int(sample.max()) + 1
        if shift is not None:
            self.out -= shift
        columns = torch.full(sample.shape, self.out.shape[-1], device=left.device) if columns is None else columns
        self.count = self._by_sample(columns).clamp(min=1)  # (samples), and so what follows
        total = self._by_sample(self.out.sum(-1))
        squares = self._by_sample(torch.linalg.vector_norm(self.out, dim=-1).square())
        self.mean = total / self.count if objective == "pearson" else torch.zeros_like(total)
        power = squares - self.count * self.mean**2
        self.live = power > 1e-5 * squares.clamp(min=1e-30)  # a constant, as sums of float32 tell, has nothing to lose
        self.power = torch.where(self.live, power, 1.0)
        # 1/σ² and mean of the row's sample: (…, rows, 1)
        self.row_weight = (self.live / self.power)[sample].float().unsqueeze(-1)
        self.row_mean = self.mean[sample].float().unsqueeze(-1)

    def _by_sample(self, rows: Tensor) -> Tensor:
        """Sum values of rows, in the shape of `sample`, over each sample: (samples)."""
        sums = torch.zeros(self.samples, dtype=torch.float64, device=rows.device)
        return sums.index_add_(0, self.sample.flatten(), rows.double().flatten())

    def chunks(self) -> Iterator[slice]:
        size = max(1, CHUNK_ENTRIES // self.out[0].numel())
        return (slice(i, i + size) for i in range(0, len(self.out), size))

    def error(self, left: Tensor, right: Tensor, part: slice | Tensor = slice(None)) -> Tensor:
        """Ô - O of a part of the leading dimension, from that part of Â and the whole of B̂."""
        out = torch.matmul(left, right if right.dim() == 2 else right[part]).sub_(self.out[part])
        return out if self.shift is None else out.sub_(self.shift)

    def loss(self, left: Callable[[slice], Tensor], right: Tensor, penalty: Penalty | None = None) -> float:
        """Return the mean over samples of the loss of left·right, plus a penalty of its error, if there is one."""
        p, q, total = (torch.empty(self.sample.shape, device=self.out.device) for _ in range(3))
        errors = []
        for part in self.chunks():
            error = self.error(left(part), right, part)  # (…, rows, columns)
            q[part] = torch.linalg.vector_norm(error, dim=-1).square()  # (…, rows), as total and p
            total[part] = error.sum(-1)
            if penalty is not None:
                errors.append(error.clone())
            p[part] = error.mul_(self.out[part]).sum(-1)
        ps, qs = self._by_sample(p), self._by_sample(q)  # (samples)
        if self.objective == "pearson":
            totals = self._by_sample(total)
            ps, qs = ps - self.mean * totals, qs - totals * totals / self.count
        value = loss(ps, qs, self.power, self.objective)[self.live].mean().nan_to_num().item()
        return value + (penalty(torch.cat(errors)) if penalty is not None else 0.0)

    def pooled(self, p: Tensor, q: Tensor, products: int = 1) -> Tensor:
        """The loss of an average sample, from p and q summed with weights 1/σ²."""
        samples = max(int(self.live.sum()), 1) * products
        return loss(p / samples, q.clamp(min=0) / samples, torch.ones_like(q), self.objective)

    def first_order(self, left: Tensor, right: Tensor, subset: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, of rows or groups `subset`, D and centred O, both weighted by 1/σ², and the sums p and q of D."""
        error, weight = self.error(left, right, subset), self.row_weight[subset]  # (…, rows, columns), (…, rows, 1)
        centred = (self.out[subset] - self.row_mean[subset]).mul_(weight)
        weighted = error * weight
        return weighted, centred, (centred * error).sum(), (weighted * error).sum()


def ranking_loss(scores: Tensor, changed: Tensor, margin: float, valid: Tensor | None = None) -> Tensor:
    """Return how far scores lost their order [VT eq. 13]: the mean over pairs i<j of a row, ties in A left out, of
    (θ - (Â_i - Â_j)·sign(A_i - A_j))₊.

    scores A and changed Â: (rows, columns); valid: False where there is padding, whose pairs do not count. The paper's
    sum over pairs would swamp a similarity of at most 1; this is its mean. Exact: rows are sorted once, and pairs
    further apart than any error can bridge are not looked at.
    """
    absent: Tensor | int = 0
    if valid is not None:  # as far away as can be: no order to lose
        scores, changed = scores.masked_fill(~valid, 1e30), changed.masked_fill(~valid, 1e30)
        count = valid.sum(-1)
        absent = (count * (scores.shape[-1] - count)).sum()
    ordered, order = scores.sort(-1)
    moved = changed.gather(-1, order)
    columns = scores.shape[-1]
    reach = margin + 2 * (moved - ordered).abs().max()
    total = torch.zeros((), dtype=torch.float64, device=scores.device)
    for offset in range(1, columns):
        gap = ordered[:, offset:] - ordered[:, :-offset]
        if not gap.min() < reach:
            break
        short = (margin - (moved[:, offset:] - moved[:, :-offset])).clamp_(min=0)
        total += (short * (gap > 0)).sum()
    place = torch.arange(columns, device=scores.device)
    is_first = ordered != ordered.roll(1, -1)  # of equal ones; a row's first place is 0 anyway
    ties = (place - torch.where(is_first, place, 0).cummax(-1).values).sum()
    return total / (len(scores) * columns * (columns - 1) // 2 - ties - absent).clamp(min=1)


def ranking_penalty(product: Product, rows: Tensor, keys: Tensor, weight: float, margin: float) -> Penalty:
    """γ·L_rank of an error of the scores, on at most `RANKED_ROWS` of their rows. rows, keys: (groups, rows) and
    (groups, columns), False where there is padding."""
    group, row = rows.nonzero(as_tuple=True)
    subset = random_rows(len(group), RANKED_ROWS).to(group.device)
    group, row = group[subset], row[subset]
    scores, valid = product.out[group, row], keys[group]

    def penalty(error: Tensor) -> float:
        return weight * ranking_loss(scores, scores + error[group, row], margin, valid).item()

    return penalty
