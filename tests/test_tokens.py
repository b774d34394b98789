"""Heads that tell something of tokens: rows and metrics by hand, and whole jobs on small tables."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from torch import Tensor

from bittern import jobs
from bittern.data import Data, load_data
from bittern.data.evaluate import measurable, metrics, predict
from bittern.data.texts import load_tokenizer
from bittern.data.tokens import answer_scores, best_spans, entities, tag_scores
from bittern.errors import InputError
from bittern.options import Training, parse_distill
from families import SUPPORTED
from helpers import refused
from material import WORDS, save_text_model

TAGS = ("O", "B-BIRD", "I-BIRD")
HEADS = {
    "tags": hf.BertForTokenClassification,
    "answers": hf.BertForQuestionAnswering,
    "masked": hf.BertForMaskedLM,
    "labels": hf.BertForSequenceClassification,
}
SENTENCES = ["a bittern booms at dawn", "still water hides day", "reeds", "in the reeds of still water"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that has a token to mask with."""
    folder = save_text_model(tmp_path_factory.mktemp("text"))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    return folder


def head(task: str) -> hf.PreTrainedModel:
    """A small BERT with the head of a task."""
    config = SUPPORTED["bert"]()[0].config
    if task == "answers":
        return hf.BertForQuestionAnswering(config.from_dict(config.to_dict() | {"num_labels": 2})).eval()
    config.id2label, config.label2id = dict(enumerate(TAGS)), {tag: i for i, tag in enumerate(TAGS)}
    config.problem_type = "multi_label_classification" if task == "labels" else None
    torch.manual_seed(0)
    return HEADS[task](config).eval()


def rows_of(task: str) -> list[dict[str, Any]]:
    """Labelled samples of a task."""
    words = [sentence.split() for sentence in SENTENCES]
    if task == "tags":
        return [{"tokens": w, "ner_tags": [TAGS[(i + j) % 3] for j in range(len(w))]} for i, w in enumerate(words)]
    if task == "answers":
        starts = [(s, s.index(w[-1])) for s, w in zip(SENTENCES, words, strict=True)]
        answers = [{"text": [s[at:]], "answer_start": [at]} for s, at in starts]
        return [{"question": "at dawn", "context": s, "answers": a} for s, a in zip(SENTENCES, answers, strict=True)]
    if task == "labels":
        return [{"text": s, "label": [i % 2, 1, 0]} for i, s in enumerate(SENTENCES)]
    return [{"text": s} for s in SENTENCES]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(task: str, folder: Path, text: Path, **options: Any) -> tuple[hf.PreTrainedModel, Data]:
    model = head(task)
    data = load_data(str(folder), model, text, split="test", **options)
    assert data is not None
    return model, data


# Rows


def test_tags_of_words(text: Path, tmp_path: Path) -> None:
    """The first token of each word has its tag, matched by name; the others and the special ones have none."""
    kind = {
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=["I-BIRD", "O", "B-BIRD"])),
    }
    rows = {"tokens": [["a", "bittern-dawn", "reeds"], ["day"]], "ner_tags": [[1, 2, 0], [1]]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kind)).to_parquet(tmp_path / "test.parquet")
    with pytest.warns(UserWarning, match="matched by name"):
        _, data = load("tags", tmp_path, text)
    (batch,) = data
    assert [load_tokenizer(text).decode(i) for i in batch["input_ids"][0, 2:5]] == ["bittern", "[UNK]", "dawn"]
    assert batch["labels"].tolist() == [[-100, 0, 1, -100, -100, 2, -100], [-100, 0, -100, -100, -100, -100, -100]]
    assert batch["attention_mask"].sum(1).tolist() == [7, 3]


def test_place_of_an_answer(text: Path, tmp_path: Path) -> None:
    """An answer is told by its first and last token in the context; without an answer, or cut off, it is at (0, 0)."""
    where = [("still water", 8), ("bittern", 56), (None, 0)]
    context = "bittern still water " + "day " * 9 + "bittern"
    answers = [{"text": [t] if t else [], "answer_start": [at] if t else []} for t, at in where]
    rows = [{"question": "a bittern", "context": context, "answers": answer} for answer in answers]
    with pytest.warns(UserWarning, match="3 of 3 texts were cut at 12 tokens"):
        _, data = load("answers", write(tmp_path / "data", rows), text, max_length=12)
    (batch,) = data  # [CLS] a bittern [SEP] bittern still water …
    assert batch["start_positions"].tolist() == [5, 0, 0]
    assert batch["end_positions"].tolist() == [6, 0, 0]


def test_masked_words(text: Path, tmp_path: Path) -> None:
    """About 15 % of the words, at least one of each text, are masked, the same ones each time; nothing else is."""
    folder = write(tmp_path / "data", [{"text": "dawn"}, {"text": ""}, {"text": " ".join(["day"] * 20)}])
    (batch,), (again,) = load("masked", folder, text)[1], load("masked", folder, text)[1]
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    mask, masked = load_tokenizer(text).mask_token_id, batch["labels"] != -100
    assert masked.sum(1).tolist() == [1, 3]  # the empty text has no word to mask
    assert torch.equal(masked, batch["input_ids"] == mask)
    assert set(batch["labels"][masked].tolist()) == {WORDS.index("dawn"), WORDS.index("day")}


# Metrics


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O B-B", {(1, 3, "A"), (4, 5, "B")}),
        ("B-A B-A I-A", {(0, 1, "A"), (1, 3, "A")}),
        ("I-A I-A I-B O", {(0, 2, "A"), (2, 3, "B")}),
        ("S-A B-B I-B E-B I-B", {(0, 1, "A"), (1, 4, "B"), (4, 5, "B")}),
        ("O O", set()),
    ],
)
def test_entities(tags: str, expected: set[tuple[int, int, str]]) -> None:
    """Entities are read as conlleval reads them."""
    assert entities(tags.split()) == expected


def logits_of(*classes: int) -> Tensor:
    return torch.eye(3)[list(classes)]


def test_tag_scores() -> None:
    """F1 of entities by hand: 2 right, 2 found, one of them right; tokens without a label do not count."""
    rows = [{"labels": [-100, 1, 2, 0, -100]}, {"labels": [-100, 1, 0]}]
    found = tag_scores(rows, logits_of(1, 1, 2, 0, 1, 1, 0, 1), dict(enumerate(TAGS)))
    assert found == pytest.approx({"f1": 2 * 1 / (2 + 2), "accuracy": 3 / 5})
    assert tag_scores(rows, logits_of(0, 1, 2, 0, 0, 0, 1, 0), {0: "A", 1: "B", 2: "C"}) == {"accuracy": 1.0}


def question(context: str, answers: list[str]) -> dict[str, Any]:
    """A question of one token, as rows of answers are: [CLS] q [SEP] and the words of the context."""
    ends = [len(" ".join(context.split()[: i + 1])) for i in range(len(context.split()))]
    spans = [(end - len(word), end) for end, word in zip(ends, context.split(), strict=True)]
    return {
        "input_ids": [0] * (3 + len(spans)),
        "spans": [None, None, None, *spans],
        "context": context,
        "answers": answers,
    }


def at(row: dict[str, Any], first: int, last: int) -> Tensor:
    """Logits for an answer from one token to another."""
    scores = torch.zeros(len(row["input_ids"]), 2)
    scores[first, 0] = scores[last, 1] = 5.0
    return scores


def test_answer_scores() -> None:
    """Exact match and F1 of words are SQuAD's: case, punctuation and articles do not count, the best answer does."""
    rows = [question("the Bittern, at dawn", ["bittern"]), question("in still water", ["old reeds", "still day"])]
    found = answer_scores(rows, torch.cat([at(rows[0], 3, 4), at(rows[1], 4, 5)]))
    assert found == pytest.approx({"f1": (1 + 2 * 1 / 4) / 2, "exact_match": 0.5})


def test_best_spans() -> None:
    """An answer lies in the context and does not end before it begins; none at all counts if the data has such."""
    row = question("a b c", ["b"])
    assert best_spans([row], at(row, 1, 2)) == [(3, 3)]
    backwards = at(row, 5, 3)
    backwards[4] = torch.tensor([4.0, 4.5])
    assert best_spans([row], backwards) == [(4, 4)]
    nothing = question("a b c", [])
    assert best_spans([row, nothing], torch.cat([at(row, 0, 0)] * 2)) == [(0, 0)] * 2


@pytest.mark.parametrize("task", ["tags", "answers", "masked"])
def test_right_outputs(task: str, text: Path, tmp_path: Path) -> None:
    """Outputs that say what the labels say have the best of all metrics, however samples are batched."""
    model, data = load(task, write(tmp_path / "data", rows_of(task)), text, batch_size=3)
    output = predict(model, data)
    alone = predict(model, load(task, tmp_path / "data", text, batch_size=1)[1])
    torch.testing.assert_close(output, alone)
    assert measurable(model, data)
    if task == "tags":
        labels = torch.cat([torch.tensor(row["labels"]) for row in data.rows])
        right, best = torch.eye(3)[labels.clamp(min=0)], {"f1": 1.0, "accuracy": 1.0}
    elif task == "answers":
        right = torch.cat([at(row, row["start_positions"], row["end_positions"]) for row in data.rows])
        best = {"f1": 1.0, "exact_match": 1.0}
    else:
        labels = torch.cat([torch.tensor(row["labels"]) for row in data.rows])
        right, best = (
            torch.stack([torch.zeros(int((labels != -100).sum())), labels[labels != -100]], -1),
            {"perplexity": 1.0, "accuracy": 1.0},
        )
    assert right.shape == output.shape
    assert metrics(model, data, right) == pytest.approx(best)
    found = metrics(model, data, output, output.clone())
    assert found.keys() == best.keys() | {"agreement", "max_difference"}
    assert (found["agreement"], found["max_difference"]) == (1.0, 0.0)
    assert found["agreement"] > metrics(model, data, right, -right)["agreement"]


def test_losses_are_the_model_s(text: Path, tmp_path: Path) -> None:
    """Perplexity of masked words is that of the model's own loss."""
    model, data = load("masked", write(tmp_path / "data", rows_of("masked")), text)
    (batch,) = data
    with torch.no_grad():
        expected = model(**batch).loss
    assert metrics(model, data, predict(model, data))["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-5)


# Jobs


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "texts"])
@pytest.mark.parametrize("task", HEADS)
def test_jobs(task: str, labelled: bool, text: Path, tmp_path: Path) -> None:
    """Each head is quantized, trained and measured by its usual metric; without labels, by how it agrees."""
    head(task).save_pretrained(tmp_path / "model")
    load_tokenizer(text).save_pretrained(tmp_path / "model")
    data = str(write(tmp_path / "data", rows_of(task) if labelled else rows_of("")))
    usual = {"tags": "f1", "answers": "f1", "masked": "perplexity", "labels": "f1"}[task]
    found = jobs.quantize(tmp_path / "model", "w8a8", tmp_path / "packed", data=data)
    assert {"agreement", "max_difference"} <= found["packed"].keys()
    assert (usual in found["packed"]) == (labelled or task == "masked")
    assert found["max_error_simulated_packed"] == 0
    alone = jobs.evaluate(tmp_path / "packed", data, against=tmp_path / "model", kernels=False)
    assert 0.5 < alone["agreement"] <= 1
    terms = parse_distill("truth,prediction" if labelled or task == "masked" else "prediction")
    training = Training(steps=2, batch_size=2, evaluations=1)
    trained = jobs.qat(tmp_path / "model", "w8a8", tmp_path / "taught", data=data, distill=terms, training=training)
    assert trained["qat"]["metric"] == (usual if labelled or task == "masked" else "agreement")
    if not labelled and task != "masked":
        with refused(InputError, "has no labels", "--against"):
            jobs.evaluate(tmp_path / "packed", data)


def test_answers_that_are_none(text: Path, tmp_path: Path) -> None:
    """Answers of another form than SQuAD's are refused."""
    rows: list[dict[str, Any]] = [{"question": "at dawn", "context": "a bittern", "answers": "bittern"}]
    with refused(InputError, "row 0 of answers is 'bittern'", "as in SQuAD"):
        load("answers", write(tmp_path / "data", rows), text)
    rows[0]["answers"] = {"text": ["bittern"], "answer_start": []}
    with refused(InputError, "row 0 of answers is {", "as in SQuAD"):
        load("answers", write(tmp_path / "other", rows), text)


@pytest.mark.parametrize("tags", [["O"], None, "O"], ids=str)
def test_tags_that_are_none(tags: Any, text: Path, tmp_path: Path) -> None:
    """A word without a tag is refused by its row."""
    rows = [{"tokens": ["dawn"], "ner_tags": ["O"]}, {"tokens": ["a", "bittern"], "ner_tags": tags}]
    rows = rows if not isinstance(tags, str) else [rows[1] | {"ner_tags": tags}]
    with refused(InputError, "of ner_tags is", "expected a tag for each of 2 words"):
        load("tags", write(tmp_path / "data", rows), text)


def test_nothing_to_mask_with(tmp_path: Path) -> None:
    """A tokenizer without a mask token is refused."""
    with refused(InputError, "no token to mask with"):
        load("masked", write(tmp_path / "data", rows_of("masked")), save_text_model(tmp_path / "text"))
