"""Task metrics: accuracy of classifiers, similarity of embeddings, and how far two models agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.errors import InputError


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Logits (samples, classes) of a classifier; for an encoder without head its sentence embeddings (samples, hidden).

    Embeddings are the mean of the last hidden states over what the mask does not cover, normalised to length 1.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        outputs = [_output(model, {k: v.to(device) for k, v in batch.items()}) for batch in batches]
    finally:
        model.train(training)
    if not outputs:
        raise InputError("there is nothing to predict: the data is empty")
    return torch.cat(outputs)


def _output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    logits = out.get("logits")
    if logits is not None and logits.dim() == 2:
        return logits.float().cpu()  # type: ignore[no-any-return]
    hidden = out.get("last_hidden_state") if logits is None else None  # a detector has both
    if hidden is None or hidden.dim() != 3:
        raise InputError(
            f"{type(model).__name__} gives neither class logits nor hidden states of tokens; evaluation serves "
            "sequence and image classifiers and encoders without a head"
        )
    mask = batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).float().cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Share of samples for which two classifiers choose the same class."""
    return accuracy(logits, reference.argmax(-1))


def similarity_agreement(embeddings: Tensor, reference: Tensor) -> float:
    """Spearman correlation of the cosine similarities of all pairs of samples, one encoder against another."""
    from scipy.stats import spearmanr

    if len(embeddings) < 3:
        raise InputError(f"the agreement of similarities needs 3 samples or more, got {len(embeddings)}")
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), 1)
    pairs = [(e @ e.T)[rows, columns].numpy() for e in (embeddings, reference)]
    return float(spearmanr(*pairs).statistic)


def compare(output: Tensor, reference: Tensor, labels: Tensor | None, classes: bool) -> dict[str, Any]:
    """The metrics that fit: accuracy with labels, agreement with the reference, largest absolute difference."""
    result: dict[str, Any] = {}
    if classes:
        if labels is not None:
            result["accuracy"] = accuracy(output, labels)
        result["agreement"] = agreement(output, reference)
    else:
        result["similarity"] = similarity_agreement(output, reference)
    return result | {"max_difference": (output - reference).abs().max().item()}
