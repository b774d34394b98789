"""Distillation losses [KD], [TI]: functions of a student's tensor, a teacher's, and what of them is not padding.

Each is a mean over what is valid of a sample, then over samples: more padding, or other company in the batch, changes
nothing. rows: (batch, tokens), True where a token is real; None if all are. Everything is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-8  # probabilities are clamped here, as in the published code of [KD]


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, rows: Tensor | None = None) -> Tensor:
    """Soft cross-entropy -Σ p_T log p_S of logits (batch, classes), or (batch, tokens, classes) of real tokens.

    temperature: of both softmaxes; the result is multiplied by its square, which keeps the size of the gradients.
    """
    soft, hard = F.log_softmax(student.float() / temperature, -1), F.softmax(teacher.float() / temperature, -1)
    entropy = -(hard * soft).sum(-1)  # (batch) or (batch, tokens)
    return _mean_of_samples(entropy, rows) * temperature**2


def labels_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft cross-entropy -Σ p_T log p_S over on and off of each label, mean over labels, of logits (batch, labels)."""
    hard = torch.sigmoid(teacher.float() / temperature)
    return F.binary_cross_entropy_with_logits(student.float() / temperature, hard) * temperature**2


def squared_loss(student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean squared error of (batch, tokens, …), over real tokens; of logits (batch, outputs) for regression."""
    error = (student.float() - teacher.float()).square()
    if error.dim() > 2:
        error = error.flatten(2).mean(-1)  # (batch, tokens)
    return _mean_of_samples(error, rows)


def score_loss(student: Tensor, teacher: Tensor, rows: Tensor | None = None, padded: int = 0) -> Tensor:
    """TernaryBERT's: squared error of attention scores (batch, heads, queries, keys), masked entries left out.

    rows: real queries. Where a score of either is -100 or less, the mask has put it there; Swin's adds -100 to them.
    padded: if given, to how many tokens the published code pads: the mean over all queries and over so many keys, of
    which masked ones count as zeros, so that a sample weighs by its share of real keys.
    """
    seen = (student > -1e2) & (teacher > -1e2)
    error = torch.where(seen, student.float() - teacher.float(), 0.0)
    if padded:
        return error.square().sum(-1).mean() / padded
    if rows is not None:
        real = rows[:, None, :, None].float()  # (batch, 1, queries, 1)
        seen, error = seen * real, error * real
    error, count = error.flatten(1), seen.flatten(1).sum(1)  # (batch, heads · queries · keys), (batch)
    return (torch.linalg.vecdot(error, error) / count.clamp(min=1)).mean()  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    """Σ_j T log(T/S) over the last dimension; with its gradient by hand, in fewer passes.

    The value is the sum of T log(T/S) - (T - S), which is the same where T and S each sum to 1, and does not drown in
    their rounding where they are nearly equal.
    """

    @staticmethod
    def forward(ctx, student, teacher):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(student, teacher)
        low, high = student.clamp(min=TINY), teacher.clamp(min=TINY)
        ratio = (high - low).div_(low).clamp_(min=2**-24 - 1).log1p_()  # log(T/S), and finite
        return ratio.mul_(teacher).sub_(teacher - student).sum(-1)  # (…, queries)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        student, teacher = ctx.saved_tensors
        slope = (teacher / student.clamp(min=TINY)).mul_(grad.neg().unsqueeze(-1))  # (…, queries, keys)
        return torch.ops.aten.threshold_backward(slope, student, TINY), None  # none where it was clamped


def map_loss(student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> Tensor:
    """KL(SA^T ‖ SA^S) of attention maps (batch, heads, queries, keys), mean over heads and real queries [KD eq. 5]."""
    divergence: Tensor = _Divergence.apply(student.float(), teacher.float())  # type: ignore[no-untyped-call]
    return _mean_of_samples(divergence.mean(1), rows)  # (batch, heads, queries) → (batch, queries)


def map_loss_of_scores(student: Tensor, teacher: Tensor, temperature: float, rows: Tensor | None = None) -> Tensor:
    """τ² · `map_loss` of softmax(AS/τ); for large τ half the variance over keys of what scores differ [KD, table 1]."""
    student, teacher = (F.softmax(x.float().clamp(min=-1e4) / temperature, -1) for x in (student, teacher))
    return map_loss(student, teacher, rows) * temperature**2


def relation_loss(student: Tensor, teacher: Tensor, rows: Tensor | None = None, relations: int | None = None) -> Tensor:
    """KL of softmax(VVᵀ/√d) between tokens, of values, queries or keys (batch, heads, tokens, head dim) (MiniLMv2).

    relations: into how many the concatenated heads are split, the student's heads by default; the teacher may have
    other numbers of heads and other widths.
    """
    relations = relations or student.shape[1]

    def relation(x: Tensor) -> Tensor:
        x = x.float().transpose(1, 2).flatten(2)  # (batch, tokens, heads · head dim)
        x = x.unflatten(-1, (relations, -1)).transpose(1, 2)  # (batch, relations, tokens, width)
        scores = x @ x.mT * x.shape[-1] ** -0.5  # (batch, relations, tokens, tokens)
        if rows is not None:
            scores = scores.masked_fill(~rows[:, None, None, :], torch.finfo(scores.dtype).min)
        return F.softmax(scores, -1)

    return map_loss(relation(student), relation(teacher), rows)


def _mean_of_samples(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return the mean of (batch, tokens) or (batch): over real tokens of each sample, then over samples."""
    if rows is None or values.dim() == 1:
        return values.mean()
    valid = rows.to(values.dtype)
    return ((values * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()  # (batch) → ()
