"""The ranking loss: how far quantization changes the order of attention scores within a row [VT eq. 13]."""

from collections.abc import Callable

import torch
from torch import Tensor

from bittern.ptq.product import Product, random_rows

ROWS = 1024  # on which the search looks at the order


def ranking_loss(scores: Tensor, changed: Tensor, margin: float, valid: Tensor | None = None) -> Tensor:
    """Return the mean over pairs i<j of a row of (θ - (Â_i - Â_j)·sign(A_i - A_j))₊, ties in A left out.

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


def ranking_penalty(
    product: Product, rows: Tensor, keys: Tensor, weight: float, margin: float
) -> Callable[[Tensor], float]:
    """γ·L_rank of an error of the scores, on at most `ROWS` of their rows.

    rows, keys: (groups, rows) and (groups, columns), False where there is padding.
    """
    group, row = rows.nonzero(as_tuple=True)
    subset = random_rows(len(group), ROWS).to(group.device)
    group, row = group[subset], row[subset]
    scores, valid = product.out[group, row], keys[group]

    def penalty(error: Tensor) -> float:
        return weight * ranking_loss(scores, scores + error[group, row], margin, valid).item()

    return penalty
