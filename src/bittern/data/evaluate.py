"""Task metrics: accuracy, F1 and MCC of classifiers, correlation of regressions, mAP of detectors, F1 of tags and
answers, perplexity of language models, similarity of embeddings, and how far two models agree."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from bittern.data import Data, task_of
from bittern.data.detection import Matches, match_boxes, mean_average_precision
from bittern.data.labels import class_names
from bittern.data.pooling import embed
from bittern.data.tasks import check_served, share_padding
from bittern.data.tokens import TARGETS, answer_scores, best_spans, tag_scores
from bittern.dry_run import evaluating
from bittern.errors import InputError, first_line, need, one_line
from bittern.options import find_own

HEADLINES = {"cola": "mcc", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}  # of GLUE; accuracy of the other tasks
OUTPUTS = {  # of tasks that give other than logits
    "boxes": ("logits", "pred_boxes"),
    "answers": ("start_logits", "end_logits"),
    "embedding": ("last_hidden_state",),
}
MAP = ("AP", "AP50", "AP75")
LOWER_IS_BETTER = ("perplexity", "logits_error", "boxes_error", "max_difference", "loss")


@torch.no_grad()
def predict(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Return what a model tells, of all samples, by its task.

    Of a classifier or regression logits (samples, outputs); of a detector logits and then boxes of its queries,
    relative center and size: (samples, queries, logits + 4). Of token classification logits of all real tokens, one
    text after the other: (tokens, classes); of question answering of start and end: (tokens, 2). Of a language model
    for each token but the first its negative log likelihood, and the token that was likeliest in its place:
    (samples, tokens - 1, 2), for blocks of one length; of a masked one the same for each masked token: (masked, 2). Of
    an encoder embeddings (samples, width), pooled as its own folder says.
    """
    check_served(model)
    device = next(model.parameters()).device
    with evaluating(model):
        outputs = [_output(model, {k: v.to(device) for k, v in batch.items()}) for batch in batches]
    if not outputs:
        raise InputError("there is nothing to predict: the data is empty")
    return torch.cat(outputs)


def _output(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    task = task_of(model)
    with one_line(InputError, f"{type(model).__name__} cannot run on this data"):
        out = model(**{name: value for name, value in batch.items() if name not in TARGETS})
    names = OUTPUTS.get(str(task), ("logits",))
    if any(out.get(name) is None for name in names) or (task == "embedding" and out[names[0]].dim() != 3):
        raise InputError(f"{type(model).__name__} gives no {' and '.join(names)} that can be evaluated")
    first, *more = (out[name] for name in names)
    if task == "next":
        found = _likelihoods(first[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        return found.unflatten(0, (len(first), -1))  # type: ignore[no-any-return]  # (samples, tokens - 1, 2)
    if task == "masked":
        masked = batch["labels"] != -100
        return _likelihoods(first[masked], batch["labels"][masked])
    real = batch.get("attention_mask", torch.ones(first.shape[:2], device=first.device))
    if task == "embedding":
        found = embed(model, first, real)
    elif task == "tags":
        found = first[real.bool()]  # (samples, tokens, classes) → (real tokens, classes)
    elif task == "answers":
        found = torch.stack([first, *more], -1)[real.bool()]  # 2 of (samples, tokens) → (real tokens, 2)
    else:
        found = torch.cat([first, *more], -1)
    return found.float().cpu()


def by_sample(model: PreTrainedModel, data: Data, output: Tensor) -> tuple[Tensor, ...]:
    """Split what `predict` gave for `data` into the part of each sample: one row, or those of its tokens."""
    task, sizes = task_of(model), [1] * len(data)
    if task in ("tags", "answers", "masked"):
        sizes = [sum(n != -100 for n in row["labels" if task == "masked" else "input_ids"]) for row in data.rows]
    return tuple(output.split(sizes))


def _likelihoods(logits: Tensor, right: Tensor) -> Tensor:
    """Return the negative log likelihood of each right token, and the likeliest token: (tokens, 2)."""
    loss = F.cross_entropy(logits.float(), right, reduction="none")
    return torch.stack([loss, logits.argmax(-1).float()], -1).cpu()


def check_comparable(
    model: PreTrainedModel, path: str | Path, other: PreTrainedModel, other_path: str | Path, data: Data
) -> None:
    """Raise InputError unless both models give outputs of one kind and shape for the first samples."""
    share_padding(model, other)
    sample_batch = next(iter(replace(data, batch_size=min(2, len(data)))))
    try:
        shapes = [tuple(predict(m, [sample_batch]).shape[1:]) for m in (model, other)]
    except Exception as error:  # a model raises whatever its code meets in inputs of another
        raise InputError(f"{other_path} cannot read {data.name} as {path} does: {first_line(error)}") from error
    if task_of(model) != task_of(other) or shapes[0] != shapes[1]:
        theirs = f"{other_path}, a {type(other).__name__}, gives outputs {shapes[1]} for each sample"
        raise InputError(f"{theirs}, {path}, a {type(model).__name__}, {shapes[0]}; give a model of the same task")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def similarity_agreement(embeddings: Tensor, reference: Tensor) -> float:
    """Return Spearman's correlation of the cosine similarities of all pairs of samples, of two encoders. Where all
    pairs are alike to one of them it is 0, to both 1."""
    return resampled_agreement(embeddings, reference)(range(len(embeddings)))


def resampled_agreement(embeddings: Tensor, reference: Tensor) -> Callable[[Sequence[int]], float]:
    """Return a function that gives `similarity_agreement` on rows, some of them several times.

    Pairs are sorted once: among drawn rows a pair of samples stands as often as both were drawn together, and a sample
    that was drawn several times makes pairs with itself.
    """
    if len(embeddings) < 3:
        raise InputError(f"the agreement of similarities needs 3 samples or more, got {len(embeddings)}")
    first, second = np.triu_indices(len(embeddings))  # (pairs,) both
    values = [(e @ e.T).numpy()[first, second] for e in (embeddings, reference)]
    if not all(np.isfinite(value).all() for value in values):
        return lambda rows: math.nan
    levels = [np.unique(value, return_inverse=True)[1] for value in values]

    def measure(rows: Sequence[int]) -> float:
        drawn = np.bincount(rows, minlength=len(embeddings))
        pairs = drawn[first] * (drawn[second] - (first == second)) / (1.0 + (first == second))
        counts = [np.bincount(level, pairs) for level in levels]
        ranks = [(count.cumsum() - count / 2)[level] for count, level in zip(counts, levels, strict=True)]
        a, b = (rank - np.average(rank, weights=pairs) for rank in ranks)
        norms = pairs @ a**2, pairs @ b**2
        return float(pairs @ (a * b) / math.sqrt(norms[0] * norms[1])) if all(norms) else float(not any(norms))

    return measure


def of_labels(output: Tensor, labels: Tensor, regression: bool = False) -> dict[str, float]:
    """Return accuracy, top-5 of more than five classes, F1 of class 1 and Matthews correlation of two. Of a regression
    Pearson's and Spearman's correlation; a constant prediction correlates with nothing: 0."""
    if regression:
        predicted, right = output.flatten().double().numpy(), labels.flatten().double().numpy()
        if len(right) < 2 or predicted.std() == 0 or right.std() == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        stats = need("scipy.stats")
        correlations = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}
        return {name: float(f(predicted, right).statistic) for name, f in correlations.items()}
    found = {"accuracy": accuracy(output, labels)}
    if output.shape[-1] > 5:
        found["top5"] = (output.topk(5).indices == labels.unsqueeze(-1)).any(-1).float().mean().item()
    if output.shape[-1] == 2:
        chosen = output.argmax(-1)
        found["f1"] = float(need("sklearn.metrics").f1_score(labels.numpy(), chosen.numpy(), zero_division=0))
        found["mcc"] = of_labels(chosen, labels, regression=True)["pearson"]
    return found


def of_several(output: Tensor, labels: Tensor) -> dict[str, float]:
    """Return F1 of labels that are on or off, over all (micro) and their mean (macro), and the share of exact rows."""
    f1_score = need("sklearn.metrics").f1_score
    chosen, right = (output > 0).numpy(), labels.bool().numpy()
    scores = {"f1": "micro", "f1_macro": "macro"}
    found = {name: float(f1_score(right, chosen, average=kind, zero_division=0)) for name, kind in scores.items()}
    return found | {"accuracy": float((chosen == right).all(1).mean())}


def measurable(model: PreTrainedModel, data: Data) -> bool:
    """True if data tells how good a model is without another to compare with."""
    task = task_of(model)
    return task in ("boxes", "next", "masked") or (data.has_labels and task not in ("embedding", None))


def metrics(model: PreTrainedModel, data: Data, output: Tensor, reference: Tensor | None = None) -> dict[str, Any]:
    """Measure `output`, which `predict` gave for `model` and `data`, and how far it is from a reference.

    Of detectors COCO's AP, AP50 and AP75; of language models the perplexity, of masked words the accuracy too; of tags
    F1 of entities and accuracy; of answers SQuAD's F1 and exact match; else what `of_labels` or `of_several` gives, if
    the data has labels. With a reference the agreement of classes, tokens, answers or similarities, of regressions
    Pearson's correlation with it, of detectors the errors of logits and boxes relative to its norm, and the largest
    difference. Nothing, if there are neither labels nor a reference, nor a metric of one's own in `data.metric`.
    """
    result: dict[str, Any] = _of_truth(model, data, output) if measurable(model, data) else {}
    if data.metric and ":" in data.metric:
        result[data.metric] = float(find_own(data.metric)(output, data))
    if reference is None:
        return result
    if (task := task_of(model)) == "boxes":
        for name, part in (("logits_error", slice(None, -4)), ("boxes_error", slice(-4, None))):
            wrong, right = output[..., part] - reference[..., part], reference[..., part]
            result[name] = (wrong.norm() / right.norm()).item()
    elif task in ("next", "masked"):
        result["agreement"] = (output[..., 1] == reference[..., 1]).float().mean().item()
        output, reference = output[..., 0], reference[..., 0]
    elif task in ("classes", "tags"):
        result["agreement"] = accuracy(output, reference.argmax(-1))
    elif task == "number":
        result["agreement"] = of_labels(output, reference, regression=True)["pearson"]
    elif task == "labels":
        result["agreement"] = ((output > 0) == (reference > 0)).float().mean().item()
    elif task == "answers":
        pairs = zip(best_spans(data.rows, output), best_spans(data.rows, reference), strict=True)
        result["agreement"] = sum(a == b for a, b in pairs) / len(data)
    elif task == "embedding":
        result["similarity"] = similarity_agreement(output, reference)
    return result | {"max_difference": (output - reference).abs().max().item()}


def resampled(
    metric: str, model: PreTrainedModel, data: Data, output: Tensor, reference: Tensor | None = None
) -> Callable[[Sequence[int]], float]:
    """Return a function that measures one metric of `metrics` on rows of `data`, some of them several times. Boxes are
    matched and similarities sorted once, however often it is asked for."""
    if task_of(model) == "boxes" and metric in MAP:
        matches = _matches(data, output)
        return lambda rows: mean_average_precision(matches, np.bincount(rows, minlength=len(data)))[metric]
    if task_of(model) == "embedding" and metric == "similarity" and reference is not None:
        return resampled_agreement(output, reference)
    outputs = [by_sample(model, data, o) for o in (output, reference) if o is not None]

    def measure(rows: Sequence[int]) -> float:
        drawn, parts = data.take(list(rows)), [torch.cat([part[i] for i in rows]) for part in outputs]
        return float(find_own(metric)(parts[0], drawn) if ":" in metric else metrics(model, drawn, *parts)[metric])

    return measure


def _matches(data: Data, output: Tensor) -> list[Matches]:
    sizes = torch.tensor([[scene.height, scene.width] for scene in data.rows])
    raw = SimpleNamespace(logits=output[..., :-4], pred_boxes=output[..., -4:])
    found = data.processor.post_process_object_detection(raw, threshold=0.0, target_sizes=sizes)
    return match_boxes(data.rows, found)


def _of_truth(model: PreTrainedModel, data: Data, output: Tensor) -> dict[str, float]:
    if (task := task_of(model)) == "boxes":
        return mean_average_precision(_matches(data, output))
    if task in ("next", "masked"):
        perplexity = {"perplexity": math.exp(min(output[..., 0].double().mean().item(), 700.0))}
        if task == "next":
            return perplexity
        labels = torch.cat([torch.tensor(row["labels"]) for row in data.rows])
        return perplexity | {"accuracy": (output[:, 1] == labels[labels != -100]).float().mean().item()}
    if task == "tags":
        return tag_scores(data.rows, output, class_names(model))
    if task == "answers":
        return answer_scores(data.rows, output)
    assert data.labels is not None
    return of_several(output, data.labels) if task == "labels" else of_labels(output, data.labels, task == "number")


def check_metric(model: PreTrainedModel, data: Data, more: Iterable[str] = (), *, compared: bool = True) -> None:
    """Raise InputError for a metric of `data` that it does not give, by a few samples, before long work. more: other
    names that may be asked for. compared: metrics against another model may be."""
    if data.metric and ":" in data.metric:
        find_own(data.metric)
    elif data.metric not in (None, *more):
        output = predict(model, few := data.subset(8))
        headline(data.name, metrics(model, few, output, output if compared else None), data.metric)


def check_classes(model: PreTrainedModel, data: Data, output: Tensor) -> None:
    """Warn if the labels of a classifier's data fit its `output` far better by other numbers: they were mixed up."""
    count = output.shape[-1]
    if task_of(model) != "classes" or data.labels is None or len(data) < 10 * count:
        return
    pairs = torch.bincount(data.labels * count + output.argmax(-1), minlength=count**2).view(count, count)
    labels, classes = need("scipy.optimize").linear_sum_assignment(-pairs.numpy())
    found, best = pairs.trace().item() / len(data), pairs[labels, classes].sum().item() / len(data)
    if best > found + 0.2 and best > (1 + 1 / count) / 2:
        which = ",".join(f"{label}={own}" for label, own in zip(labels, classes, strict=True) if label != own)
        warnings.warn(
            f"{data.name}: {found:.0%} of the labels are what the model says; {best:.0%} would be if they had other "
            f"numbers: look at them, and say which is which with --labels, such as {which}",
            stacklevel=2,
        )


def headline(source: str, found: Mapping[str, float], asked: str | None = None) -> str:
    """Return the metric that decides between checkpoints: the one asked for, GLUE's own for its tasks, known by the
    last name of the source, else the first one found. Raises InputError if what is asked for was not found."""
    if asked is not None and asked not in found:
        raise InputError(f"no metric {asked!r} to choose by; there are {', '.join(found)}")
    own = asked or HEADLINES.get(Path(source).stem.lower().replace("-", ""), "")
    return own if own in found else next(iter(found))
