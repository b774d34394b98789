"""Task metrics: accuracy, F1 and MCC of classifiers, correlation of regressions, mAP of detectors, perplexity of
language models, similarity of embeddings, and how far two models agree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data import Data, has_boxes, has_classes, is_language_model, is_regression
from bittern.data.detection import mean_average_precision
from bittern.errors import InputError, first_line

HEADLINES = {"cola": "mcc", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}  # of GLUE; accuracy of the other tasks
LOWER_IS_BETTER = ("perplexity", "max_difference", "loss")


@torch.no_grad()
def predict(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Return logits (samples, classes) of a classifier; of an encoder without head embeddings (samples, hidden).

    Of a detector logits and then boxes of its queries, relative center and size: (samples, queries, logits + 4). Of a
    language model for each token but the first its negative log likelihood, and the token that was likeliest in its
    place: (samples, tokens - 1, 2); blocks of tokens must be of one length.
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


def _output(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    logits, boxes = out.get("logits"), out.get("pred_boxes")
    if logits is not None and boxes is not None:
        return torch.cat([logits, boxes], -1).float().cpu()
    if logits is not None and logits.dim() == 3 and is_language_model(model):
        loss = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        likeliest = logits[:, :-1].argmax(-1)
        return torch.stack([loss.view_as(likeliest), likeliest.float()], -1).cpu()
    if logits is not None and logits.dim() == 2:
        return logits.float().cpu()  # type: ignore[no-any-return]
    hidden = out.get("last_hidden_state") if logits is None else None
    if hidden is None or hidden.dim() != 3:
        raise InputError(
            f"{type(model).__name__} gives neither class logits nor hidden states of tokens; evaluation serves "
            "classifiers of texts and images, regressions, detectors, language models and encoders without a head"
        )
    mask = batch.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).float().cpu()


def check_comparable(
    model: PreTrainedModel, path: str | Path, other: PreTrainedModel, other_path: str | Path, data: Data
) -> None:
    """Raise InputError unless both models give outputs of one kind and shape for the first samples."""
    tasks = (has_boxes, is_language_model, has_classes, is_regression)
    kinds = [[is_task(m) for is_task in tasks] for m in (model, other)]
    few = next(iter(replace(data, batch_size=min(2, len(data)))))
    try:
        shapes = [tuple(predict(m, [few]).shape[1:]) for m in (model, other)]
    except Exception as error:  # a model raises whatever its code meets in inputs of another
        raise InputError(f"{other_path} cannot read {data.name} as {path} does: {first_line(error)}") from error
    if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
        raise InputError(
            f"{other_path}, a {type(other).__name__}, gives outputs {shapes[1]} for each sample, {path}, a "
            f"{type(model).__name__}, {shapes[0]}; give a model of the same task"
        )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def top5(logits: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose five largest logits include the label's."""
    return (logits.topk(5).indices == labels.unsqueeze(-1)).any(-1).float().mean().item()


def agreement(logits: Tensor, reference: Tensor) -> float:
    """Return the share of samples for which two classifiers choose the same class."""
    return accuracy(logits, reference.argmax(-1))


def similarity_agreement(embeddings: Tensor, reference: Tensor) -> float:
    """Return Spearman's correlation of the cosine similarities of all pairs of samples, of two encoders."""
    from scipy.stats import spearmanr

    if len(embeddings) < 3:
        raise InputError(f"the agreement of similarities needs 3 samples or more, got {len(embeddings)}")
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), 1)
    pairs = [(e @ e.T)[rows, columns].numpy() for e in (embeddings, reference)]
    return float(spearmanr(*pairs).statistic)


def of_labels(output: Tensor, labels: Tensor, regression: bool = False) -> dict[str, float]:
    """Return accuracy, top-5 of more than five classes, F1 of class 1 and Matthews correlation of two.

    Of a regression Pearson's and Spearman's correlation; a constant prediction correlates with nothing: 0.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef

    if regression:
        predicted, right = output.flatten().double().numpy(), labels.double().numpy()
        if len(right) < 2 or predicted.std() == 0 or right.std() == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        correlations = {"pearson": pearsonr, "spearman": spearmanr}
        return {name: float(f(predicted, right).statistic) for name, f in correlations.items()}
    found = {"accuracy": accuracy(output, labels)}
    if output.shape[-1] > 5:
        found["top5"] = top5(output, labels)
    if output.shape[-1] == 2:
        chosen, right = output.argmax(-1).numpy(), labels.numpy()
        found |= {"f1": float(f1_score(right, chosen)), "mcc": float(matthews_corrcoef(right, chosen))}
    return found


def is_measurable(model: PreTrainedModel, data: Data) -> bool:
    """True if data tells how good a model is without another to compare with."""
    if has_boxes(model) or is_language_model(model):
        return True
    return data.labels is not None and (has_classes(model) or is_regression(model))


def metrics(model: PreTrainedModel, data: Data, output: Tensor, reference: Tensor | None = None) -> dict[str, Any]:
    """Measure `output`, which `predict` gave for `model` and `data`, and how far it is from a reference.

    Of detectors COCO's AP, AP50 and AP75; of language models the perplexity; else what `of_labels` gives, if the data
    has labels. With a reference the agreement of classes, tokens or similarities, of detectors the errors of logits and
    boxes relative to its norm, and the largest difference. Nothing, if there are neither labels nor a reference.
    """
    result: dict[str, Any] = {}
    if has_boxes(model):
        result |= _of_boxes(data, output)
    elif is_language_model(model):
        result["perplexity"] = math.exp(min(output[..., 0].double().mean().item(), 700.0))
    elif data.labels is not None and is_measurable(model, data):
        result |= of_labels(output, data.labels, is_regression(model))
    if reference is None:
        return result
    if has_boxes(model):
        for name, part in (("logits_error", slice(None, -4)), ("boxes_error", slice(-4, None))):
            wrong, right = output[..., part] - reference[..., part], reference[..., part]
            result[name] = (wrong.norm() / right.norm()).item()
    elif is_language_model(model):
        result["agreement"] = (output[..., 1] == reference[..., 1]).float().mean().item()
        output, reference = output[..., 0], reference[..., 0]
    elif has_classes(model):
        result["agreement"] = agreement(output, reference)
    elif not is_regression(model):
        result["similarity"] = similarity_agreement(output, reference)
    return result | {"max_difference": (output - reference).abs().max().item()}


def _of_boxes(data: Data, output: Tensor) -> dict[str, float]:
    sizes = torch.tensor([[scene.height, scene.width] for scene in data.rows])
    raw = SimpleNamespace(logits=output[..., :-4], pred_boxes=output[..., -4:])
    return mean_average_precision(
        data.rows, data.processor.post_process_object_detection(raw, threshold=0.0, target_sizes=sizes)
    )


def headline(source: str, found: Mapping[str, float]) -> str:
    """Return the metric that decides between checkpoints: GLUE's own for its tasks, known by the last name of the
    source, else the first one found."""
    own = HEADLINES.get(Path(source).stem.lower().replace("-", ""), "")
    return own if own in found else next(iter(found))
