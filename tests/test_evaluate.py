"""Metrics against values worked out by hand, and what a model must give to be evaluated."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from bittern.data import Data
from bittern.data.evaluate import (
    accuracy,
    check_classes,
    headline,
    metrics,
    of_labels,
    predict,
    resampled_agreement,
    similarity_agreement,
)
from bittern.errors import InputError
from families import SUPPORTED, TEXT, VISION, Batch
from helpers import refused

LOGITS = torch.tensor([[1.0, 2.0, 0.5], [3.0, -1.0, 2.0], [-3.0, -2.0, -1.0], [0.0, 0.1, 0.0]])  # classes 1, 0, 2, 1
OTHERS = torch.tensor([[1.0, 1.5, 0.5], [3.0, -1.0, 4.0], [-3.0, -2.0, -1.0], [0.2, 0.1, 0.0]])  # classes 1, 2, 2, 0


class GivenForSequenceClassification(nn.Module):
    """A classifier that gives what its batch holds."""

    main_input_name, name_or_path = "input_ids", ""
    config = hf.PreTrainedConfig(num_labels=3)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.modes: list[bool] = []

    def forward(self, **batch: Any) -> BaseModelOutput | SequenceClassifierOutput:
        self.modes.append(self.training)
        kind = SequenceClassifierOutput if "logits" in batch else BaseModelOutput
        return kind(**{k: v for k, v in batch.items() if k in ("logits", "last_hidden_state")})

    def can_generate(self) -> bool:
        return False


class Given(GivenForSequenceClassification):
    """An encoder that gives what its batch holds."""


# Metrics


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([1, 0, 2, 1], 1.0), ([1, 0, 2, 0], 0.75), ([0, 0, 0, 0], 0.25), ([2, 2, 0, 0], 0.0), ([True] * 4, 0.5)],
    ids=str,
)
def test_accuracy(labels: list[int], expected: float) -> None:
    """Accuracy is the share of samples whose largest logit is the label's."""
    assert accuracy(LOGITS, torch.tensor(labels)) == expected


def test_agreement() -> None:
    """Agreement is the share of samples for which the largest logits are of the same class."""
    assert accuracy(LOGITS, OTHERS.argmax(-1)) == accuracy(OTHERS, LOGITS.argmax(-1)) == 0.5
    assert accuracy(LOGITS, (LOGITS * 3 + 1).argmax(-1)) == 1.0


@pytest.mark.parametrize(("label", "expected"), [(0, 0.0), (1, 1.0), (5, 1.0), (3, 1.0)])
def test_top5(label: int, expected: float) -> None:
    """A sample counts whose label is among the five largest of its logits, at any place of them."""
    found = of_labels(torch.tensor([[-3.0, 2.0, 1.0, 0.5, 7.0, -2.0]]), torch.tensor([label]))
    assert found["top5"] == expected


def on_circle(*degrees: float) -> Tensor:
    """Embeddings of length 1 at these angles."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ((0, 20, 90), 1.0),  # pairs 20, 90, 70 apart: ranks 3, 1, 2 too
        ((100, 110, 140), 1.0),  # turned
        ((0, -10, 20), 0.5),  # 10, 20, 30 apart: ranks 3, 2, 1, so 1 - 6·(0 + 1 + 1)/24
        ((0, 50, 30), -0.5),  # 50, 30, 20 apart: ranks 1, 2, 3, so 1 - 6·(4 + 1 + 1)/24
        ((0, 90, 20), -1.0),  # 90, 20, 70 apart: ranks 1, 3, 2, so 1 - 6·(4 + 4 + 0)/24
    ],
)
def test_similarity_agreement(reference: tuple[float, ...], expected: float) -> None:
    """The rank correlation of the similarities of all pairs is that worked out by hand."""
    embeddings = on_circle(0, 10, 40)  # pairs 10, 40, 30 degrees apart: ranks of similarity 3, 1, 2
    assert similarity_agreement(embeddings, on_circle(*reference)) == pytest.approx(expected)


def test_similarity_of_drawn_rows() -> None:
    """On rows that were drawn several times the agreement is the rank correlation of all of their pairs, ties among
    them; one that cannot be computed is no number."""
    generator = torch.Generator().manual_seed(0)
    embeddings, other = (torch.randint(-2, 3, (30, 4), generator=generator).float() for _ in range(2))
    reference = embeddings + 0.5 * other
    measure = resampled_agreement(embeddings, reference)
    for size in (30, 7, 3):
        rows = torch.randint(30, (size,), generator=generator)
        i, j = torch.triu_indices(size, size, 1)
        pairs = [(e[rows] @ e[rows].T)[i, j].numpy() for e in (embeddings, reference)]
        assert measure(rows.tolist()) == pytest.approx(spearmanr(*pairs).statistic, abs=1e-12)
    assert math.isnan(similarity_agreement(embeddings, reference / 0))


def test_similarity_of_all_alike() -> None:
    """Where all samples are alike to both encoders these agree, where to one alone they do not."""
    alike = on_circle(0, 0, 0)
    assert similarity_agreement(alike, on_circle(90, 90, 90)) == 1.0
    assert similarity_agreement(alike, on_circle(0, 10, 40)) == similarity_agreement(on_circle(0, 10, 40), alike) == 0.0


@pytest.mark.parametrize("count", [0, 1, 2])
def test_similarity_of_too_few(count: int) -> None:
    """Fewer than three samples have no rank correlation of pairs."""
    with refused(InputError, "3 samples or more", f"got {count}"):
        similarity_agreement(torch.eye(3)[:count], torch.eye(3)[:count])


def test_two_classes() -> None:
    """Of two classes F1 and Matthews correlation by hand: 2 true and 1 false positive, 1 false and 1 true negative."""
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    found = of_labels(logits, torch.tensor([1, 1, 0, 1, 0]))
    assert found == pytest.approx({"accuracy": 0.6, "f1": 4 / 6, "mcc": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)})


def test_many_classes() -> None:
    """Of more than five classes top-5 is told, too: here one of two samples, and both."""
    logits, labels = torch.arange(12.0).view(2, 6), torch.tensor([0, 1])
    assert of_labels(-logits, labels) == {"accuracy": 0.5, "top5": 1.0}
    assert of_labels(logits, labels) == {"accuracy": 0.0, "top5": 0.5}


def test_regression() -> None:
    """Of regressions the correlations by hand; of a constant prediction, 0."""
    labels = torch.tensor([0.0, 1.0, 2.0, 4.0])
    found = of_labels(torch.tensor([[1.0], [0.0], [2.0], [9.0]]), labels, regression=True)
    x, y = np.array([1.0, 0, 2, 9]), labels.numpy()
    assert found == pytest.approx({"pearson": np.corrcoef(x, y)[0, 1], "spearman": 1 - 6 * 2 / (4 * 15)})
    assert of_labels(torch.ones(4, 1), labels, regression=True) == {"pearson": 0.0, "spearman": 0.0}


def test_metrics() -> None:
    """Without a reference, what the labels tell; with one, also how far the outputs agree."""
    model, _ = SUPPORTED["vit"]()
    labels = torch.tensor([1, 0, 2, 0])
    for given, alone in ((labels, {"accuracy": 0.75}), (None, {})):
        data = Data("given", range(4), given, None, 4)
        assert metrics(model, data, LOGITS) == alone
        assert metrics(model, data, LOGITS, OTHERS) == alone | {"agreement": 0.5, "max_difference": 2.0}


@pytest.mark.parametrize(
    ("labels", "told"), [([0, 1, 2], None), ([1, 0, 2], "33% of the labels .* 100% .* 0=1,1=0"), ([0, 0, 0], None)]
)
def test_mixed_up_classes(labels: list[int], told: str | None) -> None:
    """Labels that would fit what the model says far better by other numbers are told of, with those numbers."""
    model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=3))
    output = torch.nn.functional.one_hot(torch.tensor([0, 1, 2] * 20), 3).float()
    data = Data("reviews", [("a",)] * 60, torch.tensor(labels * 20), lambda rows: {}, 8)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_classes(model, data, output)
    assert len(found) == (told is not None)
    assert told is None or re.search(f"^reviews: {told}$", str(found[0].message))


def test_one_class_only() -> None:
    """F1 and Matthews correlation are 0 where there is one class only, without a warning of scikit-learn's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = of_labels(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 0]))
    assert found == {"accuracy": 1.0, "f1": 0.0, "mcc": 0.0}


def test_metrics_of_regression() -> None:
    """Without labels a regression is measured by the correlation with a reference; the same outputs agree wholly."""
    model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=1))
    data, found = Data("numbers", [("a",)] * 4, None, lambda rows: {}, 8), torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    assert metrics(model, data, found, found) == {"agreement": pytest.approx(1.0), "max_difference": 0.0}
    other = torch.tensor([[1.0], [3.0], [2.0], [5.0]])
    expected = np.corrcoef(found.flatten(), other.flatten())[0, 1]
    assert metrics(model, data, other, found)["agreement"] == pytest.approx(expected)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2])], ids=["no labels", "labels"])
def test_metrics_of_embeddings(labels: Tensor | None) -> None:
    """Of encoders, the agreement of similarities and the largest difference are told, labels or not."""
    data = Data("given", range(3), labels, None, 4)
    found = metrics(SUPPORTED["bert"]()[0].base_model, data, on_circle(0, 90, 120), on_circle(0, 80, 100))
    assert found.keys() == {"similarity", "max_difference"}
    assert found["similarity"] == pytest.approx(1.0)
    assert found["max_difference"] == pytest.approx(math.cos(math.radians(100)) - math.cos(math.radians(120)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_models(family: str) -> None:
    """Perplexity is that of the model's own loss; tokens agree where the likeliest one is the same."""
    model, batch = SUPPORTED[family]()
    batch = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    with torch.no_grad():
        expected = model(**batch, labels=batch["input_ids"])
    output = predict(model, [batch])
    data = Data("given", list(batch["input_ids"]), None, None, 4)
    found = metrics(model, data, output, output.clone())
    assert found["perplexity"] == pytest.approx(math.exp(expected.loss.item()), rel=1e-5)
    assert (found["agreement"], found["max_difference"]) == (1.0, 0.0)
    assert torch.equal(output[..., 1].long(), expected.logits[:, :-1].argmax(-1))


def test_headline() -> None:
    """Checkpoints are chosen by GLUE's own metric for its tasks, else by the first one."""
    found = {"accuracy": 0.9, "f1": 0.8, "mcc": 0.7}
    assert [headline(s, found) for s in ("glue/cola", "data/CoLA", "glue/mrpc", "glue/sst2", "my.parquet")] == [
        "mcc",
        "mcc",
        "f1",
        "accuracy",
        "accuracy",
    ]
    assert headline("glue/stsb", {"pearson": 0.5, "spearman": 0.4}) == "pearson"


# Prediction


def test_logits_of_all_batches() -> None:
    """The logits of all batches come as one float32 tensor, in order."""
    batches = [{"logits": LOGITS[:3].bfloat16()}, {"logits": LOGITS[3:].bfloat16()}]
    found = predict(GivenForSequenceClassification(), batches)
    assert found.dtype == torch.float32
    assert torch.equal(found, LOGITS.bfloat16().float())


def test_embeddings_by_hand() -> None:
    """An embedding is the mean of what the mask does not cover, brought to length 1."""
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]], [[0.0, -2.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = predict(Given(), [{"last_hidden_state": hidden, "attention_mask": mask}])
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))  # means (3, 4) and (0, -2)
    whole = predict(Given(), [{"last_hidden_state": hidden[:, :2]}])
    torch.testing.assert_close(whole, torch.tensor([[0.6, 0.8], [0.7893522, 0.6139406]]))  # (3, 4), (4.5, 3.5)


def test_padding_does_not_matter() -> None:
    """A text has the same embedding alone and beside longer ones."""
    model, batch = SUPPORTED["bert"]()
    together = predict(model.base_model, [batch])
    alone = predict(model.base_model, [{key: value[1:, :9] for key, value in batch.items()}])
    torch.testing.assert_close(together[1:], alone)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))


def test_outputs_of_a_detector() -> None:
    """A detector's logits and boxes come in one tensor, boxes last."""
    model, batch = SUPPORTED["detr"]()
    with torch.no_grad():
        expected = model(**batch)
    found = predict(model, [batch])
    assert torch.equal(found[..., :-4], expected.logits)
    assert torch.equal(found[..., -4:], expected.pred_boxes)


@pytest.mark.parametrize("name", ["bert", "vit", "swin"])
def test_batches_do_not_matter(name: str) -> None:
    """A classifier's logits are those of the model itself, however the samples are batched."""
    model, batch = SUPPORTED[name]()
    with torch.no_grad():
        expected = model(**batch).logits
    assert torch.equal(predict(model, [batch]), expected)
    torch.testing.assert_close(predict(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1)]), expected)


class BrokenError(Exception):
    """Nothing that the library knows."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("fails", [True, False], ids=["fails", "works"])
def test_mode(training: bool, fails: bool) -> None:
    """The model runs in eval mode and is in its own again afterwards, without a gradient, also after an error."""
    model = GivenForSequenceClassification().train(training)

    def batches() -> Any:
        yield {"logits": LOGITS * model.weight}
        if fails:
            raise BrokenError

    if fails:
        with pytest.raises(BrokenError):
            predict(model, batches())
    else:
        assert not predict(model, batches()).requires_grad
    assert model.modes == [False]
    assert model.training is training


def test_no_batches() -> None:
    """Without data there is nothing to predict."""
    with refused(InputError, "the data is empty"):
        predict(Given(), [])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (SUPPORTED["bart"], "cannot be evaluated"),
        (SUPPORTED["clip"], "cannot be evaluated"),
        (lambda: (hf.BertForMultipleChoice(SUPPORTED["bert"]()[0].config), {}), "cannot be evaluated"),
        (lambda: (hf.ViltForQuestionAnswering(hf.ViltConfig(**VISION)), {}), "cannot be evaluated"),
        (lambda: (Given(), {"last_hidden_state": torch.zeros(2, 3)}), "gives no last_hidden_state"),
        (lambda: (GivenForSequenceClassification(), {"last_hidden_state": torch.zeros(2, 3, 4)}), "gives no logits"),
    ],
    ids=["translation", "two towers", "multiple choice", "questions on images", "no tokens", "no logits"],
)
def test_models_that_are_not_evaluated(make: Callable[[], tuple[nn.Module, Batch]], what: str) -> None:
    """A model whose head is not served, or that does not give what its name says, is refused."""
    model, batch = make()
    with refused(InputError, type(model).__name__, what):
        predict(model, [batch])


def test_whole_batch_is_given() -> None:
    """Every entry of a batch goes to the model, and nothing else."""
    seen: list[set[str]] = []
    model = GivenForSequenceClassification()
    model.register_forward_pre_hook(lambda _module, _args, batch: seen.append(set(batch)), with_kwargs=True)
    predict(model, [{"logits": LOGITS, "extra": LOGITS}])
    assert seen == [{"logits", "extra"}]


def test_inputs_that_do_not_fit() -> None:
    """Inputs that the model's own code refuses are one line."""
    model, batch = SUPPORTED["vit"]()
    with refused(InputError, "ViTForImageClassification cannot run on this data"):
        predict(model, [{"pixel_values": batch["pixel_values"][..., :5]}])
