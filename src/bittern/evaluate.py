"""Task metrics: accuracy of classifiers, mAP of detectors, similarity of embeddings, and how far two models agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from bittern.data import Data, has_classes
from bittern.detection import has_boxes, mean_average_precision
from bittern.errors import InputError


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Logits (samples, classes) of a classifier; for an encoder without head its sentence embeddings (samples, hidden).

    Of a detector logits and then boxes of its queries, relative center and size: (samples, queries, logits + 4).
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
    logits, boxes = out.get("logits"), out.get("pred_boxes")
    if logits is not None and boxes is not None:
        return torch.cat([logits, boxes], -1).float().cpu()
    if logits is not None and logits.dim() == 2:
        return logits.float().cpu()  # type: ignore[no-any-return]
    hidden = out.get("last_hidden_state") if logits is None else None
    if hidden is None or hidden.dim() != 3:
        raise InputError(
            f"{type(model).__name__} gives neither class logits nor hidden states of tokens; evaluation serves "
            "sequence and image classifiers, detectors and encoders without a head"
        )
    mask = batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).float().cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def top5(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose five largest logits include the label's."""
    return (logits.topk(5).indices == labels.unsqueeze(-1)).any(-1).float().mean().item()


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
    """The metrics that fit: accuracy with labels (and top-5 of more than 5 classes), agreement, largest difference."""
    result: dict[str, Any] = {}
    if classes:
        if labels is not None:
            result["accuracy"] = accuracy(output, labels)
            if output.shape[-1] > 5:
                result["top5"] = top5(output, labels)
        result["agreement"] = agreement(output, reference)
    else:
        result["similarity"] = similarity_agreement(output, reference)
    return result | {"max_difference": (output - reference).abs().max().item()}


def metrics(model: PreTrainedModel, data: Data, output: Tensor, reference: Tensor | None = None) -> dict[str, Any]:
    """What can be told of `output`, which `predict` gave for `model` and `data`, and how far it is from a reference.

    Of detectors COCO's AP, AP50 and AP75, with a reference the errors of logits and boxes relative to its norm; else
    what `compare` gives. Without a reference only what the data itself tells: nothing, if it has no labels.
    """
    if not has_boxes(model):
        classes = has_classes(model)
        if reference is not None:
            return compare(output, reference, data.labels, classes)
        found = compare(output, output, data.labels, True) if classes else {}
        return {name: found[name] for name in ("accuracy", "top5") if name in found}
    sizes = torch.tensor([[scene.height, scene.width] for scene in data.rows])
    raw = SimpleNamespace(logits=output[..., :-4], pred_boxes=output[..., -4:])
    objects = data.processor.post_process_object_detection(raw, threshold=0.0, target_sizes=sizes)
    result: dict[str, Any] = mean_average_precision(data.rows, objects)
    if reference is not None:
        for name, part in (("logits_error", slice(None, -4)), ("boxes_error", slice(-4, None))):
            wrong, right = output[..., part] - reference[..., part], reference[..., part]
            result[name] = (wrong.norm() / right.norm()).item()
        result["max_difference"] = (output - reference).abs().max().item()
    return result
