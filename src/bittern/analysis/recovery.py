"""Measures of how well a student attends as its teacher does [KD], [TI]: functions of maps, values and outputs.

Maps are (samples, heads, queries, keys). `seen` (samples, 1, queries, keys) is True where a real query may
attend to a real key. Results are (samples, heads): means over the real queries of a sample, so that more padding, or
other company in the batch, changes nothing. Rows may have different lengths, as in a causal mask.
"""

import torch
from torch import Tensor

from bittern.qat.losses import TINY


def ranks(x: Tensor, seen: Tensor) -> Tensor:
    """Return the position of each key in its row from 0, the largest first; equal ones in their order, unseen last."""
    return x.masked_fill(~seen, -torch.inf).sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def cover_length_ratio(student: Tensor, teacher: Tensor, seen: Tensor, top: int = 5) -> Tensor:
    """Deepest position, from 0, of the teacher's `top` keys in the student's ranking of a row, divided by the row's
    length [KD]. A teacher against itself has (top - 1) / length, the floor."""
    count = seen.sum(-1)  # (samples, 1, queries)
    wanted = (ranks(teacher, seen) < top) & seen
    deepest = ranks(student, seen).masked_fill(~wanted, 0).amax(-1)  # (samples, heads, queries)
    return _of_rows(deepest / count.clamp(min=1), seen)


def map_ranking_loss(student: Tensor, teacher: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over rows and pairs i<j of (-(s_i - s_j)·sign(t_i - t_j))₊ [KD], and how many pairs there are.

    Exact, by sorting: (x)₊ is half of |x| + x. The sum of |s_i - s_j| depends on the order of s alone; that of
    s_i - s_j, with i before j in the teacher's order, is linear in s. Ties of the teacher add nothing where s ascends.
    """
    count = seen.sum(-1, keepdim=True)  # (samples, 1, queries, 1)
    place = torch.arange(student.shape[-1], device=student.device)
    # how often a key is the first of a pair less how often the second (samples, 1, queries, keys)
    weight = torch.where(place < count, (count - 1 - 2 * place).double(), 0.0)
    s, by_student = student.double().masked_fill(~seen, torch.inf).sort(dim=-1, stable=True)
    t = teacher.masked_fill(~seen, torch.inf).gather(-1, by_student)
    s = torch.where(place < count, s, 0.0)
    loss = (weight * (s.gather(-1, t.sort(dim=-1, stable=True).indices) - s)).sum(-1) / 2  # (samples, heads, queries)
    pairs = (count * (count - 1) // 2).squeeze(-1).expand_as(loss)
    return loss.sum(-1), pairs.sum(-1)


def ranking_ratio(maps: Tensor, seen: Tensor, token: int = 0) -> Tensor:
    """Share of a row's other keys that get less attention than key `token`, ties counted half: 1 is the most attended.

    Rows that do not see the key, or nothing else, are left out.
    """
    x, chosen = maps, maps[..., token : token + 1]  # (samples, heads, queries, 1)
    less = (((x < chosen) & seen).sum(-1) + 0.5 * (((x == chosen) & seen).sum(-1) - 1)).float()  # without the keys
    others = seen.sum(-1) - 1
    rows = seen[..., token] & (others > 0)
    return _of_rows(less / others.clamp(min=1), rows.unsqueeze(-1))


def divergence(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """KL(SA^T ‖ SA^S), in nats [KD eq. 5]."""
    s, t = student.double().clamp(min=TINY), teacher.double()
    return _of_rows((torch.where(seen, t, 0.0) * (t.clamp(min=TINY).log() - s.log())).sum(-1), seen)


def distance(student: Tensor, teacher: Tensor, seen: Tensor, classes: Tensor | None = None, kinds: int = 0) -> Tensor:
    """Mean of |student - teacher| over real queries and all keys, then keys of each class: (samples, heads, 1 + kinds).

    SA-GEN distance of attention probabilities α [TI], SA-PROP distance of ‖αf(x)‖; of ‖f(x)‖, with one query. classes
    (samples, keys): from 0; without, there is the mean over all. A class that a sample does not have gives NaN.
    """
    error, found = (student - teacher).abs().double(), []
    for kind in range(-1, kinds if classes is not None else 0):
        of_kind = seen if classes is None or kind < 0 else seen & (classes == kind)[:, None, None, :]
        count = of_kind.expand_as(error).sum((-2, -1))  # (samples, heads)
        found.append((error * of_kind).sum((-2, -1)) / count)
    return torch.stack(found, -1)  # (samples, heads, 1 + kinds)


def transformed_norms(value: Tensor, w_o: Tensor) -> Tensor:
    """‖f(x)‖ = ‖V_h W_O,h‖ of each head and key token (Kobayashi et al. 2020): (samples, heads, keys). value: (samples,
    heads, keys, head dim); w_o: (out, heads · head dim). Through the Gram matrix of each head's W_O."""
    blocks = w_o.double().unflatten(1, (value.shape[1], -1)).transpose(0, 1)  # (heads, out, head dim)
    gram = blocks.mT @ blocks  # (heads, head dim, head dim)
    v = value.double()
    return torch.einsum("bhkd,hde,bhke->bhk", v, gram, v).clamp(min=0).sqrt()


def summed_norms(maps: Tensor, value: Tensor, w_o: Tensor) -> Tensor:
    """‖Σ_h αf(x)‖ of each query and key, all heads together (Kobayashi et al. 2020): (samples, queries, keys)."""
    blocks = w_o.double().unflatten(1, (value.shape[1], -1))  # (out, heads, head dim)
    f = torch.einsum("bhkd,ohd->bhko", value.double(), blocks)  # (samples, heads, keys, out)
    products = torch.einsum("bhko,bgko->bkhg", f, f)  # (samples, keys, heads, heads)
    alpha = maps.double()
    return torch.einsum("bhqk,bkhg,bgqk->bqk", alpha, products, alpha).clamp(min=0).sqrt()


def relative_error(student: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
    """‖X^S - X^T‖² / ‖X^T‖² over the real tokens of each sample: (samples). rows: (samples, tokens)."""
    error = (student - teacher).double().square().flatten(1)  # (samples, tokens · hidden)
    size = teacher.double().square().flatten(1)
    if rows is not None:
        real = rows.repeat_interleave(error.shape[1] // rows.shape[1], 1)  # (samples, tokens · hidden)
        error, size = error * real, size * real
    return error.sum(1) / size.sum(1).clamp(min=1e-30)


def _of_rows(values: Tensor, seen: Tensor) -> Tensor:
    """Mean of (samples, heads, queries) over the queries that see anything."""
    rows = seen.any(-1).expand_as(values)
    return (values * rows).sum(-1) / rows.sum(-1).clamp(min=1)
