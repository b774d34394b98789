"""Data from every kind of source, and each bad one refused in one line before any work starts."""

import gzip
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import processors
from transformers.image_utils import load_image

import bittern
from bittern.data import Data, digits, load_any_split, load_data, load_splits, tables, task_of
from bittern.data.detection import Scene
from bittern.data.evaluate import predict
from bittern.data.images import read_image
from bittern.data.splits import visible_files
from bittern.data.texts import load_tokenizer, sentences
from bittern.errors import BitternError, InputError
from families import SUPPORTED
from helpers import refused
from material import WORDS, save_text_model, write_tables


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text` holds a tokenizer and `images` an image processor; `bare` holds neither, nor does `gpt2`."""
    root = tmp_path_factory.mktemp("folders")
    save_text_model(root / "text")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "images")
    for name, folder in (("bert", "bare"), ("gpt2", "gpt2"), ("vit", "images")):
        SUPPORTED[name]()[0].config.save_pretrained(root / folder)
    return root


@pytest.fixture(scope="module")
def bert() -> hf.PreTrainedModel:
    return SUPPORTED["bert"]()[0]


@pytest.fixture(scope="module")
def vit() -> hf.PreTrainedModel:
    return SUPPORTED["vit"]()[0]


def digits_vit(**config: Any) -> hf.PreTrainedModel:
    """A classifier of the digits."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    given = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10} | config
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, **given))


ROWS = [{"text": "a bittern booms", "label": 1}, {"text": "dawn", "label": 0}, {"text": "the still reeds", "label": 2}]
TEXTS = [(row["text"],) for row in ROWS]


def csv(rows: list[dict[str, Any]]) -> str:
    lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(source: object, model: hf.PreTrainedModel, folders: Path, **options: Any) -> Data | None:
    return load_data(str(source), model, folders / "text", split=options.pop("split", "train"), **options)


def table(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(jsonl(rows))
    return path


# Built in


def test_digits() -> None:
    """The digits are those of scikit-learn, whole, in two parts with all classes, the same each time."""
    images = {part: digits(part) for part in ("train", "test")}
    assert {part: (x.shape, len(y)) for part, (x, y) in images.items()} == {
        "train": ((1437, 1, 8, 8), 1437),
        "test": ((360, 1, 8, 8), 360),
    }
    original, labels = load_digits(return_X_y=True)
    rows = {(*row, label) for row, label in zip(original.tolist(), labels.tolist(), strict=True)}
    parts = [{(*(x.flatten() * 16).tolist(), y.item()) for x, y in zip(*part, strict=True)} for part in images.values()]
    assert parts[0] | parts[1] == rows
    assert not parts[0] & parts[1]
    assert all(len(y.bincount()) == 10 and y.bincount().min() >= 30 for _, y in images.values())
    digits.cache_clear()
    assert all(torch.equal(a, b) for part in images for a, b in zip(digits(part), images[part], strict=True))


def test_digits_as_data(tmp_path: Path) -> None:
    """The digits come in batches, in order, with labels, and need no image processor."""
    data = load_data("digits", digits_vit(), tmp_path, split="test", batch_size=100)
    batches = list(data)
    assert [len(batch["pixel_values"]) for batch in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), digits("test")[0])
    assert torch.equal(data.labels, digits("test")[1])


@pytest.mark.parametrize("size", [8, [8, 8], (8, 8)], ids=repr)
def test_digits_fit(size: Any, tmp_path: Path) -> None:
    """A model of 8 × 8 images fits the digits, however its configuration says so."""
    assert load_data("digits", digits_vit(image_size=size), tmp_path, split="train") is not None


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (lambda: digits_vit(image_size=16), ("expects images of 1 channel and 16 pixels",)),
        (lambda: digits_vit(num_channels=3), ("expects images of 3 channels and 8 pixels",)),
        (lambda: digits_vit(num_labels=9), ("the classes 0, 1, 2", "LABEL_7, LABEL_8, none of which is '9'")),
        (lambda: SUPPORTED["bert"]()[0], ("8×8 images", "BertForSequenceClassification expects texts")),
        (
            lambda: hf.ResNetModel(hf.ResNetConfig(num_channels=1, hidden_sizes=[8], depths=[1], embedding_size=8)),
            ("ResNetModel expects images of 1 channel",),
        ),
    ],
    ids=["size", "channels", "classes", "text", "no size"],
)
def test_digits_do_not_fit(model: Callable[[], hf.PreTrainedModel], parts: tuple[str, ...], tmp_path: Path) -> None:
    """A model of other inputs or fewer classes is refused, with what it expects."""
    with refused(InputError, "digits", *parts):
        load_data("digits", model(), tmp_path, split="train")


def test_sentences(bert: hf.PreTrainedModel, folders: Path) -> None:
    """The sentences are English ones, each once, and are split in two halves without labels."""
    found = sentences()
    assert len(found) == len(set(found)) > 80
    assert all(s[0].isupper() and s.endswith(".") and 40 <= len(s) <= 265 and "\n" not in s for s in found)
    train, test = (texts("sentences", bert, folders, split=split) for split in ("train", "test"))
    assert sorted(train.rows + test.rows) == sorted((s,) for s in found)
    assert abs(len(train) - len(test)) <= 1
    assert train.labels is test.labels is None


def test_sentences_are_texts(vit: hf.PreTrainedModel, folders: Path) -> None:
    """A model of images is refused for the sentences, with what it expects."""
    with refused(InputError, "sentences are texts", "expects images of 3 channels and 32 pixels"):
        load_data("sentences", vit, folders / "images", split="train")


def test_model_of_other_inputs(folders: Path) -> None:
    """A model of neither texts nor images is refused by what it takes."""
    with refused(InputError, "WhisperForConditionalGeneration takes input_features", "texts or images"):
        texts("sentences", SUPPORTED["whisper"]()[0], folders)


# Tables


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "parquet": write_parquet,
    "csv": lambda path: path.write_text(csv(ROWS)),
    "jsonl": lambda path: path.write_text(jsonl(ROWS)),
    "json": lambda path: path.write_text(json.dumps(ROWS)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_file(kind: str, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A file of any kind is its own train split, with texts, labels and batches that the model takes."""
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path)
    data = texts(path, bert, folders, batch_size=2)
    assert (list(data.rows), data.labels.tolist(), len(data)) == (TEXTS, [1, 0, 2], 3)
    first, second = data
    word = WORDS.index
    assert first["input_ids"].tolist() == [
        [word("[CLS]"), word("a"), word("bittern"), word("booms"), word("[SEP]")],
        [word("[CLS]"), word("dawn"), word("[SEP]"), 0, 0],
    ]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert second["input_ids"].shape == (1, 5)
    assert bert(**first).logits.shape == (2, 3)
    assert texts(path, bert, folders, split="test") is None


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train.csv",), ("train.csv", None)),
        (("test.csv",), (None, "test.csv")),
        (("train.jsonl", "validation.csv", "test.csv"), ("train.jsonl", "validation.csv")),
        (("Train-00000.csv", "DEV.jsonl"), ("Train-00000.csv", "DEV.jsonl")),
        (("notes.txt", "train.csv", "valid.jsonl", "other.csv"), ("train.csv", "valid.jsonl")),
    ],
    ids=str,
)
def test_folder_of_splits(
    names: tuple[str, ...],
    found: tuple[str | None, str | None],
    bert: hf.PreTrainedModel,
    folders: Path,
    tmp_path: Path,
) -> None:
    """Files of a folder are its splits by their names; validation counts before test, and None says there is none."""
    folder = tmp_path / "splits"
    folder.mkdir()
    for name in names:
        rows = [{"text": name, "label": 1}]
        (folder / name).write_text(csv(rows) if name.endswith("csv") else jsonl(rows))
    for split, name in zip(("train", "test"), found, strict=True):
        data = texts(folder, bert, folders, split=split)
        assert (data and data.rows) == (name and [(name,)])


@pytest.mark.parametrize(
    ("names", "any_split"), [(("train", "test"), "test"), (("train",), "train"), (("test",), "test")]
)
def test_parts_of_a_source(
    names: tuple[str, ...], any_split: str, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path
) -> None:
    """Both parts of a source come from one call, None where there is none, and from another the one to measure on."""
    (tmp_path / "splits").mkdir()
    for name in names:
        (tmp_path / "splits" / f"{name}.csv").write_text(f"text\n{name}\n")
    source = str(tmp_path / "splits"), bert, folders / "text"
    parts = dict(zip(("train", "test"), load_splits(*source, batch_size=7), strict=True))
    assert {name: part.rows for name, part in parts.items() if part} == {name: [(name,)] for name in names}
    assert {part.batch_size for part in parts.values() if part} == {7}
    assert load_any_split(*source).rows == [(any_split,)]


@pytest.mark.parametrize(
    ("available", "split", "chosen"),
    [
        (["train", "validation", "test"], "train", "train"),
        (["train", "validation", "test"], "test", "validation"),
        (["train", "test"], "test", "test"),
        (["train", "validation_matched", "validation_mismatched"], "test", "validation_matched"),
        (["train"], "test", None),
        (["test"], "train", None),
    ],
)
def test_name_of_a_data_set(
    available: list[str],
    split: str,
    chosen: str | None,
    bert: hf.PreTrainedModel,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other source is a name for `datasets`, whose splits are chosen by name."""

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"text": f"{name} {split}", "label": 0}])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: available)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = texts("some/data", bert, folders, split=split)
    assert (data and data.rows) == (chosen and [(f"some/data {chosen}",)])


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        (["idx", "sentence1", "sentence2"], (), ["sentence1", "sentence2"]),
        (["question1", "question2"], (), ["question1", "question2"]),
        (["hypothesis", "premise"], (), ["premise", "hypothesis"]),
        (["sentence", "question"], (), ["question", "sentence"]),
        (["sentence", "other"], (), ["sentence"]),
        (["text", "sentence"], (), ["sentence"]),
        (["text", "title"], (), ["text"]),
        (["text", "title"], ("title",), ["title"]),
        (["text", "title"], "title", ["title"]),
        (["text", "title"], ("title", "text"), ["title", "text"]),
    ],
    ids=str,
)
def test_columns(
    columns: list[str],
    asked: Sequence[str],
    expected: list[str],
    bert: hf.PreTrainedModel,
    folders: Path,
    tmp_path: Path,
) -> None:
    """Columns are the ones asked for, or those of GLUE's tasks and of plain texts, in the order that the models use."""
    data = texts(table(tmp_path, [dict(zip(columns, columns, strict=True))]), bert, folders, columns=asked)
    assert data.rows == [tuple(expected)]
    ids = next(iter(data))["input_ids"][0].tolist()
    assert ids.count(WORDS.index("[SEP]")) == len(expected)


def test_long_texts_are_cut(bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Texts are cut at the length asked for and at the model's positions."""
    path = table(tmp_path, [{"text": "dawn " * 500}])
    for length, expected in ((16, 16), (500, bert.config.max_position_embeddings)):
        batch = next(iter(texts(path, bert, folders, max_length=length)))
        assert batch["input_ids"].shape == (1, expected)
        bert(**batch)


def test_tokenizer_without_padding(bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A tokenizer without a token to pad with pads with the end of text, and is refused if it has none either."""
    tokenizer = load_tokenizer(folders / "text")
    tokenizer.pad_token = None
    path = table(tmp_path, ROWS)
    for eos in (None, "[SEP]"):
        tokenizer.eos_token = eos
        tokenizer.save_pretrained(tmp_path / f"eos {eos}")
    batch = next(iter(load_data(str(path), bert, tmp_path / "eos [SEP]", split="train")))
    assert batch["input_ids"][1].tolist() == [2, WORDS.index("dawn"), 3, 3, 3]
    with refused(InputError, "no token to pad with"):
        load_data(str(path), bert, tmp_path / "eos None", split="train")


# Labels


def named() -> hf.PreTrainedModel:
    """A classifier whose classes have names."""
    model, _ = SUPPORTED["bert"]()
    model.config.label2id = {"Heron": 0, "Bittern": 1, "Egret": 2}
    return model


@pytest.mark.parametrize(
    ("label", "expected"), [("bittern", 1), ("Egret", 2), ("HERON", 0), (1, 1), (True, 1)], ids=repr
)
def test_labels_by_name_or_number(label: Any, expected: int, folders: Path, tmp_path: Path) -> None:
    """Labels are the model's classes, by number or by name in upper or lower case."""
    data = texts(table(tmp_path, [{"text": "dawn", "label": label}]), named(), folders)
    assert data.labels.tolist() == [expected]


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"labels": 2}, None, [2]),
        ({"label": 1, "labels": 2}, None, [1]),
        ({"label": 1, "species": "egret"}, "species", [2]),
        ({"species": 1}, None, None),
    ],
    ids=str,
)
def test_label_column(row: dict[str, Any], asked: str | None, expected: Any, folders: Path, tmp_path: Path) -> None:
    """Labels come from the column asked for, or from `label` or `labels`, or there are none."""
    data = texts(table(tmp_path, [{"text": "dawn"} | row]), named(), folders, label_column=asked)
    assert (data.labels if expected is None else data.labels.tolist()) == expected


def test_numbers_in_order(folders: Path, tmp_path: Path) -> None:
    """Labels that are numbers are in the order of the model's classes, if that is asked for."""
    data = texts(table(tmp_path, ROWS), named(), folders, labels="order")
    assert data.labels.tolist() == [1, 0, 2]


def test_both_texts_of_a_pair(folders: Path, tmp_path: Path) -> None:
    """Columns that are named like the tokenizer's own parameters, text and text_pair, are a pair."""
    data = texts(table(tmp_path, [{"text": "dawn", "text_pair": "still reeds", "label": 1}]), named(), folders)
    assert data.rows == [("dawn", "still reeds")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_table_of_a_header(kind: str, folders: Path, tmp_path: Path) -> None:
    """A table with no rows is said to have none."""
    (tmp_path / f"train.{kind}").write_text("text,label\n" if kind == "csv" else "")
    with refused(InputError, "has no rows; expected at least one sample in train."):
        texts(tmp_path, named(), folders)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([0, 3], ("the classes 0, 3", "Heron, Bittern, Egret, none of which is '3'")),
        ([-1, 1], ("the classes -1, 1", "Heron, Bittern, Egret, none of which is '-1'")),
        ([0.5, 1.0], ("row 0 of label is 0.5", "expected a class", "Heron, Bittern, Egret")),
        ([1, None], ("row 1 of label is None", "expected a class", "Heron, Bittern, Egret")),
        ([None, None], ("row 0 of label is None", "expected a class")),
        (["heron", "swan"], ("the classes heron, swan", "Heron, Bittern, Egret, none of which is 'swan'", "--labels")),
        (["heron", None], ("row 1 of label is None", "Heron, Bittern, Egret")),
        ([[0], [1, 2]], ("row 0 of label is [0]", "expected a class")),
        ([{"class": 1}] * 2, ("row 0 of label is {'class': 1}", "expected a class")),
    ],
    ids=str,
)
def test_labels_that_do_not_fit(labels: list[Any], parts: tuple[str, ...], folders: Path, tmp_path: Path) -> None:
    """Labels that are no classes of the model are refused, with what they are and what the classes are."""
    path = table(tmp_path, [{"text": "dawn", "label": label} for label in labels])
    with refused(InputError, str(path), *parts):
        texts(path, named(), folders)


def test_missing_numbers_in_csv(folders: Path, tmp_path: Path) -> None:
    """A number that is missing in a .csv file is no label."""
    path = tmp_path / "data.csv"
    path.write_text("text,label\ndawn,1\nday,\n")
    with refused(InputError, "row 1 of label is", "expected a class"):
        texts(path, named(), folders)


@pytest.mark.parametrize("labels", [[0.5, 2.5], [7, 9], ["x", "y"], [None, 1]], ids=str)
def test_labels_without_classes(labels: list[Any], folders: Path, tmp_path: Path) -> None:
    """A model without classes has no use for labels, whatever they are."""
    model = SUPPORTED["bert"]()[0].base_model
    assert task_of(model) != "classes"
    data = texts(table(tmp_path, [{"text": "dawn", "label": label} for label in labels]), model, folders)
    assert data.labels is None


# Tables that are refused

BAD_FILES: dict[str, tuple[str, str | bytes, dict[str, Any], tuple[str, ...]]] = {
    "unknown type": ("data.docx", "text\ndawn\n", {}, (".docx file", ".parquet, .csv, .tsv, .json, .jsonl")),
    "no type": ("data", "text\ndawn\n", {}, ("nameless file", ".parquet, .csv, .tsv, .json, .jsonl")),
    "no bytes": ("data.csv", "", {}, ("cannot read data", "expected", "file with rows")),
    "no lines": ("data.jsonl", "", {}, ("has no rows; expected at least one sample",)),
    "header only": ("data.csv", "text,label\n", {}, ("has no rows; expected at least one sample",)),
    "no parquet": ("data.parquet", "text\ndawn\n", {}, ("cannot read data", "expected")),
    "no JSON": ("data.jsonl", "text\ndawn\n", {}, ("cannot read data", "expected")),
    "binary": ("data.csv", b"\x80\xff\x00\x9f\n\x80", {}, ("cannot read data", "expected")),
    "no column": ("data.csv", "words,label\ndawn,1\n", {}, ("words, label", "expected sentence1+sentence2", "or text")),
    "column asked": ("data.csv", "text\ndawn\n", {"columns": ("words",)}, ("has the columns text; expected words",)),
    "three columns": (
        "data.csv",
        "a,b,c\nx,y,z\n",
        {"columns": ("a", "b", "c")},
        ("at most 2 columns of inputs, got a, b, c",),
    ),
    "label column": ("data.csv", "text\ndawn\n", {"label_column": "class"}, ("no column 'class'; it has text",)),
    "numbers": ("data.csv", "text,label\n12,1\n13,1\n", {}, ("row 0 of text is (12,); expected text",)),
    "no text": (
        "data.csv",
        "text,label\ndawn,1\n,1\n",
        {},
        ("row 1 of text is (None,); expected text",),
    ),
    "more fields": ("data.csv", "text,label\na,b,0\n", {}, ("row 0 (line 2) has 3 fields, the header 2", "quote")),
    "more fields later": (
        "data.csv",
        'text,label\n"dawn,\ndusk",1\n\ndawn, or dusk,0\n',
        {},
        ("row 1 (line 5) has 3 fields, the header 2",),
    ),
    "more fields in one column": ("data.csv", "text\nhello, world\n", {}, ("row 0 (line 2) has 2 fields",)),
    "more fields of tabs": ("data.tsv", "text\tlabel\na\tb\t1\n", {}, ("row 0 (line 2) has 3 fields",)),
    "half a pair": (
        "data.jsonl",
        jsonl([{"sentence1": "a", "sentence2": "b"}, {"sentence1": "a", "sentence2": None}]),
        {},
        ("row 1 of sentence1, sentence2 is ('a', None); expected text",),
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_file_that_does_not_fit(case: str, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A file that cannot be used is refused by its name, with what was expected."""
    name, content, options, parts = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(InputError, str(path), *parts):
        texts(path, bert, folders, **options)


def test_linked_folders(folders: Path, tmp_path: Path) -> None:
    """Folders may be links, of splits or of classes, as to save room; one that leads back to itself is not followed."""
    for n, kind in enumerate(("heron", "bittern")):
        for split in ("train", "test"):
            (tmp_path / "own" / split / kind).mkdir(parents=True)
            Image.new("RGB", (8, 8), (90 * n, 0, 0)).save(tmp_path / "own" / split / kind / "0.png")
    (tmp_path / "own" / "train" / "again").symlink_to(tmp_path / "own")
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    (linked / "test").symlink_to(tmp_path / "own" / "test")
    for kind in ("heron", "bittern"):
        (linked / "train" / kind).symlink_to(tmp_path / "own" / "train" / kind)
    found = [Path(f"{split}/{kind}/0.png") for split in ("test", "train") for kind in ("bittern", "heron")]
    assert visible_files(linked, [".png"]) == found
    assert visible_files(tmp_path / "own", [".png"]) == found


def test_fields_without_a_name(bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Empty fields beyond the header lose nothing, and a long text is one field; compressed files are read so too."""
    (tmp_path / "train.csv").write_text("text,label\ndawn,1,\n" + f'"{"dusk, " * 40_000}",0,\n')
    data = texts(tmp_path / "train.csv", bert, folders, split="train")
    assert data is not None
    assert [len(text) for (text,) in data.rows] == [4, 240_000]
    with gzip.open(tmp_path / "data.csv.gz", "wt") as file:
        file.write("text,label\ndawn,dusk,1\n")
    with refused(InputError, "row 0 (line 2) has 3 fields"):
        texts(tmp_path / "data.csv.gz", bert, folders)


@pytest.mark.parametrize("source", ["", "nowhere", "no/where", "nowhere.txt", "x" * 300, "a\x00b"])
def test_source_that_is_none(
    source: str, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is neither a path nor the name of a data set is refused, with all that would do."""
    monkeypatch.chdir(tmp_path)
    with refused(InputError, f"cannot read data from {source!r}", "digits, sentences, a folder", "dataset name"):
        texts(source, bert, folders)


@pytest.mark.parametrize("kind", WRITERS)
def test_missing_file(kind: str, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A file that is missing is told as such, not looked for on the hub."""
    path = tmp_path / f"nowhere.{kind}"
    with refused(InputError, f"cannot read data from '{path}': no such file; expected"):
        texts(path, bert, folders)


def test_data_set_without_rows(bert: hf.PreTrainedModel, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that has no rows is refused."""
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"text": []}))
    with refused(InputError, "some/data has no rows", "at least one sample"):
        texts("some/data", bert, folders)


@pytest.mark.parametrize("processor", ["bare", "gpt2", "images", "nowhere"])
def test_no_tokenizer(processor: str, folders: Path, tmp_path: Path) -> None:
    """A folder without a tokenizer is refused, even where transformers would make one up without a vocabulary."""
    model = SUPPORTED["gpt2" if processor == "gpt2" else "bert"]()[0]
    with refused(InputError, f"{folders / processor} has no tokenizer"):
        load_data(str(table(tmp_path, ROWS)), model, folders / processor, split="train")


# Images


def draw(path: Path, size: tuple[int, int] = (10, 12), mode: str = "RGB", seed: int = 0) -> Path:
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def pictures(source: object, model: hf.PreTrainedModel, folders: Path, **options: Any) -> Data | None:
    return load_data(str(source), model, folders / "images", split=options.pop("split", "train"), **options)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("LABEL_2", "label_0"), [2, 0]),
        (("ant", "bee", "cow"), [0, 1, 2]),
        (("ant", "label_1"), [0, 1]),
        ((".", "ant"), None),
        ((".",), None),
    ],
    ids=str,
)
def test_folder_of_images(
    names: tuple[str, ...], expected: list[int] | None, vit: hf.PreTrainedModel, folders: Path, tmp_path: Path
) -> None:
    """Labels of images are the names of their folders, if they are the model's classes, or else their order."""
    files = [draw(tmp_path / "images" / name / f"{i}.png", seed=i) for i, name in enumerate(names)]
    data = pictures(tmp_path / "images", vit, folders)
    assert sorted(data.rows) == sorted(files)
    assert (data.labels is None) == (expected is None)
    if expected is not None:
        assert [data.labels[data.rows.index(file)] for file in files] == expected
    batch = next(iter(data))
    assert batch["pixel_values"].shape == (len(names), 3, 32, 32)
    assert vit(**batch).logits.shape == (len(names), 3)
    assert pictures(tmp_path / "images", vit, folders, split="test") is None


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "I;16"])
def test_images_of_any_mode(mode: str, vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Images of any mode come as three channels."""
    draw(tmp_path / "images" / "a.png", mode=mode)
    (batch,) = pictures(tmp_path / "images", vit, folders)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_images_of_one_channel(tmp_path: Path) -> None:
    """Images come as one channel for a model of one, which the processor must know."""
    draw(tmp_path / "images" / "a.png")
    size = {"size": {"height": 8, "width": 8}}
    hf.ViTImageProcessorPil(**size, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "one")
    hf.ViTImageProcessorPil(**size).save_pretrained(tmp_path / "three")
    model = digits_vit()
    (batch,) = load_data(str(tmp_path / "images"), model, tmp_path / "one", split="train")
    assert batch["pixel_values"].shape == (1, 1, 8, 8)
    with refused(InputError, "the image processor of", "refuses the images"):
        list(load_data(str(tmp_path / "images"), model, tmp_path / "three", split="train"))


def test_table_of_images(vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A table with a column of images gives what a folder of the same images gives."""
    files = [draw(tmp_path / "images" / f"{i}.png", seed=i) for i in range(3)]
    columns = {"img": [str(f) for f in files], "label": [2, 0, 1]}
    rows = datasets.Dataset.from_dict(columns).cast_column("img", datasets.Image())
    rows.to_parquet(tmp_path / "data.parquet")
    data = pictures(tmp_path / "data.parquet", vit, folders)
    assert data.labels.tolist() == [2, 0, 1]
    (batch,), (expected,) = data, pictures(tmp_path / "images", vit, folders)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    (part,) = data.subset(2, seed=1)
    assert len(part["pixel_values"]) == 2


def broken(path: Path) -> None:
    draw(path)
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "spoil",
    [broken, lambda p: p.write_bytes(b""), lambda p: p.write_text("text"), lambda p: p.write_bytes(SHORT_IHDR)],
    ids=["truncated", "empty", "text", "short header"],
)
def test_broken_image(spoil: Callable[[Path], Any], vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """An image that cannot be read is refused by its name, in a folder as in a table."""
    folder = tmp_path / "images"
    draw(folder / "a.png")
    spoil(folder / "b.png")
    with refused(InputError, "b.png is not a readable image"):
        list(pictures(folder, vit, folders))
    cells = [{"bytes": (folder / name).read_bytes(), "path": name} for name in ("a.png", "b.png")]
    kind = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=kind).to_parquet(tmp_path / "data.parquet")
    with refused(InputError, "is not a readable image"):
        list(pictures(tmp_path / "data.parquet", vit, folders))


SHORT_IHDR: bytes = b"\x89PNG\r\n\x1a\n" + bytes([0, 0, 0, 4]) + b"IHDR" + bytes(4) + bytes.fromhex("a9f1b8b1")


@pytest.mark.parametrize(
    ("columns", "options", "parts"),
    [
        ({"image": [3, 4]}, {}, ("column image holds", "expected images")),
        ({"picture": [3]}, {}, ("has the columns picture; expected image or img",)),
        ({"image": [3], "img": [4]}, {"columns": ("image", "img")}, ("at most 1 columns of inputs",)),
        ({"image": ["nowhere.png"]}, {}, ("nowhere.png is not a readable image",)),
    ],
    ids=["numbers", "no column", "two columns", "missing file"],
)
def test_table_without_images(
    columns: dict[str, Any], options: dict[str, Any], parts: tuple[str, ...], folders: Path, tmp_path: Path
) -> None:
    """A table without a column of images is refused, with what was expected."""
    write_tables(tmp_path / "tables", **columns)
    with refused(InputError, *parts):
        list(pictures(tmp_path / "tables", SUPPORTED["vit"]()[0], folders, **options))


@pytest.mark.parametrize("content", [(), ("notes.txt",), ("table.csv",), ("a/table.csv", "b/readme.md")], ids=str)
def test_folder_of_neither(content: tuple[str, ...], folders: Path, tmp_path: Path) -> None:
    """A folder with neither images nor tables named after splits is refused, with what was expected."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in content:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text\ndawn\n")
    with refused(InputError, f"{folder} holds no table named train, validation or test", "needs texts in one of"):
        texts(folder, SUPPORTED["bert"]()[0], folders)
    with refused(InputError, f"{folder} holds no images (.png", "a folder per class"):
        pictures(folder, SUPPORTED["vit"]()[0], folders)


def test_too_many_folders_of_images(vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """More folders of images than the model has classes are refused."""
    for i in range(4):
        draw(tmp_path / "images" / str(i) / "a.png")
    with refused(InputError, "the classes 0, 1, 2, 3", "LABEL_2, none of which is '3'"):
        pictures(tmp_path / "images", vit, folders)


@pytest.mark.parametrize("processor", ["text", "bare", "nowhere"])
def test_no_image_processor(processor: str, vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A folder without an image processor is refused."""
    draw(tmp_path / "images" / "a.png")
    with refused(InputError, f"{folders / processor} has no image processor"):
        load_data(str(tmp_path / "images"), vit, folders / processor, split="train")


@pytest.mark.parametrize(
    "size", [{"height": 80_000, "width": 224}, {"height": 8, "width": 2**31}, {"shortest_edge": 10**9}]
)
def test_images_of_any_size(size: dict[str, int], vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A processor that makes images of any size is refused before it makes one."""
    shutil.copytree(folders / "images", tmp_path / "vit")
    draw(tmp_path / "images" / "a.png")
    file = tmp_path / "vit" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    with refused(InputError, f"{tmp_path / 'vit'}: its image processor makes images of", "4096"):
        load_data(str(tmp_path / "images"), vit, tmp_path / "vit", split="train")


# Data


@pytest.fixture
def numbers() -> Data:
    """Rows 0 to 9 as one input, and their negatives as labels."""
    rows = list(range(10))
    return Data("numbers", rows, -torch.arange(10), lambda part: {"x": torch.tensor(part)}, 4)


def test_batches(numbers: Data) -> None:
    """Batches hold all rows once, in order, and can be run through again."""
    for _ in range(2):
        assert [batch["x"].tolist() for batch in numbers] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(numbers) == 10


def test_subset(numbers: Data) -> None:
    """A subset holds distinct rows with their labels, the same for a seed and others for another."""
    parts = [numbers.subset(5, seed) for seed in (0, 0, 1)]
    assert all(len(part) == len(set(part.rows)) == 5 for part in parts)
    assert all(part.labels.tolist() == [-row for row in part.rows] for part in parts)
    assert parts[0].rows == parts[1].rows != parts[2].rows
    assert sorted(numbers.subset(99).rows) == numbers.rows
    assert numbers.subset(5).batch_size == numbers.batch_size


def every_change(data: Data) -> Iterator[Data]:
    """The same data with something changed in each."""
    fields = vars(data)
    yield Data(**fields | {"rows": [*data.rows[:-1], 99]})
    yield Data(**fields | {"rows": data.rows[::-1]})
    yield Data(**fields | {"rows": data.rows[:-1], "labels": data.labels[:-1]})
    yield Data(**fields | {"labels": data.labels + 1})
    yield Data(**fields | {"labels": None})
    yield Data(**fields | {"collate": lambda part: {"y": torch.tensor(part)}})


def test_fingerprint(numbers: Data, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """The fingerprint is that of inputs and labels: it changes with any of them, and not with name or batch size."""
    prints = {numbers.fingerprint(), *(changed.fingerprint() for changed in every_change(numbers))}
    assert len(prints) == 7
    assert Data(**vars(numbers) | {"name": "other", "batch_size": 3}).fingerprint() == numbers.fingerprint()
    path = table(tmp_path, ROWS)
    one, three = (texts(path, bert, folders, batch_size=size).fingerprint() for size in (1, 3))
    assert one == three
    assert len(one) == 64
    shutil.rmtree(tmp_path / "cache")
    path.write_text(jsonl([*ROWS[:2], ROWS[2] | {"text": "the still water"}]))
    assert texts(path, bert, folders).fingerprint() != one


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: SUPPORTED["bert"]()[0], True),
        (digits_vit, True),
        (lambda: digits_vit(num_labels=1), False),
        (lambda: SUPPORTED["bert"]()[0].base_model, False),
        (lambda: SUPPORTED["gpt2"]()[0], False),
        (lambda: SUPPORTED["detr"]()[0], False),
    ],
    ids=["text", "images", "regression", "base", "language", "boxes"],
)
def test_classes(model: Callable[[], hf.PreTrainedModel], expected: bool) -> None:
    """A classifier is a model with a classification head of more than one class."""
    assert (task_of(model()) == "classes") == expected


def test_errors_are_known() -> None:
    """What is refused here is one of the errors that the command line prints in one line."""
    assert issubclass(InputError, BitternError)


# Classes


def classifier(*names: str, **config: Any) -> hf.PreTrainedModel:
    """A classifier of texts whose classes have these names."""
    model, _ = SUPPORTED["bert"]()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.config.update(config)
    return model


def classed(path: Path, names: list[str], labels: list[Any]) -> Path:
    """A table whose labels are numbers of classes with these names."""
    inner: Any = datasets.ClassLabel(names=names)
    kind = datasets.List(inner) if labels and isinstance(labels[0], list) else inner
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"text": ["dawn"] * len(labels), "label": labels}, features=features).to_parquet(path)
    return path


def test_classes_by_name(folders: Path, tmp_path: Path) -> None:
    """Where data and model name their classes, these are matched by name, whatever their numbers, and it is said."""
    path = classed(tmp_path / "data.parquet", ["day break", "Still-Water", "REED"], [0, 1, 2, 0])
    with pytest.warns(UserWarning, match="matched by name"):
        data = texts(path, classifier("reed", "Day_Break", "still water"), folders)
    assert data.labels.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["a", "b", "c"], "order", [0, 2]),
        (["a", "b", "c"], {"a": "egret", "c": "0"}, [2, 0]),
        (["heron", "b", "egret"], {"heron": "Egret", "egret": "heron"}, [2, 0]),
    ],
    ids=str,
)
def test_labels_are_mapped(names: list[str], labels: Any, expected: list[int], folders: Path, tmp_path: Path) -> None:
    """Classes of other names are matched as asked: one by one, or in their order."""
    path = classed(tmp_path / "data.parquet", names, [0, 2])
    assert texts(path, named(), folders, labels=labels).labels.tolist() == expected


@pytest.mark.parametrize("labels", [None, {"a": "heron"}], ids=["none", "not all"])
def test_classes_of_other_names(labels: Any, folders: Path, tmp_path: Path) -> None:
    """Where the names disagree, both lists are shown, and how to say which is which."""
    path = classed(tmp_path / "data.parquet", ["a", "b"], [0, 1])
    with refused(InputError, "the classes a, b;", "Heron, Bittern, Egret", "--labels DATA=MODEL"):
        texts(path, named(), folders, labels=labels)


def test_classes_without_names_of_the_model(folders: Path, tmp_path: Path) -> None:
    """A model whose classes have no names of their own takes the numbers of the data, if they are its own."""
    bert = SUPPORTED["bert"]()[0]
    assert texts(classed(tmp_path / "a.parquet", ["x", "y", "z"], [2, 0]), bert, folders).labels.tolist() == [2, 0]
    with refused(InputError, "the classes x, y, z, w", "none of which is 'w'"):
        texts(classed(tmp_path / "b.parquet", ["x", "y", "z", "w"], [0, 3]), bert, folders)


def test_numbers_as_names(folders: Path, tmp_path: Path) -> None:
    """Stars 1 to 3 as names of the classes 0 to 2 are matched as names; 0, which is none of them, is refused."""
    stars = classifier("1", "2", "3")
    assert texts(table(tmp_path, [{"text": "dawn", "label": 2}]), stars, folders).labels.tolist() == [1]
    (tmp_path / "zero").mkdir()
    with refused(InputError, "the classes 0;", "the model has 1, 2, 3"):
        texts(table(tmp_path / "zero", [{"text": "dawn", "label": 0}]), stars, folders)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("1\n0\n", [1, 0]),
        ("1.0\n0.0\n", [1, 0]),
        ('"1"\n"0"\n', [1, 0]),
        ("true\nfalse\n", [1, 0]),
        ("1.0\nheron\n", [1, 0]),
    ],
    ids=repr,
)
def test_numbers_as_people_write_them(content: str, expected: list[int], folders: Path, tmp_path: Path) -> None:
    """Labels 1, 1.0, "1" and true are the same."""
    rows = [f"dawn,{label}" for label in content.split()]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    assert texts(tmp_path / "data.csv", named(), folders).labels.tolist() == expected


def test_words_for_nothing_are_words(folders: Path, tmp_path: Path) -> None:
    """Texts such as null, None and N/A are texts, with a byte order mark and Windows' line ends too."""
    words = ["dawn", "null", "None", "N/A", "nan"]
    lines = "\r\n".join(["text,label", *(f"{word},1" for word in words), ""])
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(words).encode())
    for name in ("data.csv", "data.txt"):
        assert texts(tmp_path / name, named(), folders).rows == [(word,) for word in words]


def test_signs_in_tables(folders: Path, tmp_path: Path) -> None:
    """A quotation mark in a .tsv joins no rows, and a comma that is not quoted in a .csv shifts no columns."""
    (tmp_path / "data.tsv").write_text('text\tlabel\n"dawn\t1\nday" is\t0\n')
    data = texts(tmp_path / "data.tsv", named(), folders)
    assert (data.rows, data.labels.tolist()) == ([('"dawn',), ('day" is',)], [1, 0])
    (tmp_path / "data.csv").write_text("text,label\nstill,water,1\n")
    with refused(InputError, "row 0 (line 2) has 3 fields, the header 2"):
        texts(tmp_path / "data.csv", named(), folders)


def test_only_column_with_classes(folders: Path, tmp_path: Path) -> None:
    """Labels of another column's name are found if they alone have named classes."""
    path = classed(tmp_path / "data.parquet", ["heron", "bittern", "egret"], [2, 0])
    renamed = datasets.Dataset.from_parquet(str(path)).rename_column("label", "species").add_column("idx", [0, 1])
    renamed.to_parquet(tmp_path / "other.parquet")
    assert texts(tmp_path / "other.parquet", named(), folders).labels.tolist() == [2, 0]


MANY = {"problem_type": "multi_label_classification"}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]]),
        ([[1.0, 0.0, 1.0]], [[1, 0, 1]]),
        ([["heron"], ["Egret", "bittern"], []], [[1, 0, 0], [0, 1, 1], [0, 0, 0]]),
        ([[2], [0, 1, 2]], [[0, 0, 1], [1, 1, 1]]),
    ],
    ids=str,
)
def test_several_labels(labels: list[Any], expected: list[Any], folders: Path, tmp_path: Path) -> None:
    """Several labels of a text are 0 and 1 for each class, or the names or numbers of those that are on."""
    path = table(tmp_path, [{"text": "dawn", "label": label} for label in labels])
    data = texts(path, classifier("Heron", "Bittern", "Egret", **MANY), folders)
    assert (data.labels.tolist(), data.labels.dtype) == (expected, torch.float32)


def test_several_labels_by_name(folders: Path, tmp_path: Path) -> None:
    """Lists of named classes are matched by name, even where they look like 0 and 1 for each class."""
    path = classed(tmp_path / "data.parquet", ["b", "a"], [[0, 1], [0]])
    data = texts(path, classifier("a", "b", **MANY, num_labels=2), folders)
    assert data.labels.tolist() == [[1.0, 1.0], [0.0, 1.0]]
    with refused(InputError, "row 0 of label is 1; expected a list of labels"):
        texts(table(tmp_path, [{"text": "dawn", "label": 1}]), classifier("a", "b", **MANY), folders)


def test_numbers_to_predict(folders: Path, tmp_path: Path) -> None:
    """A regression takes numbers, also as texts; what is none is refused."""
    model = classifier("LABEL_0", problem_type="regression")
    rows = [{"text": "dawn", "label": label} for label in ("0.5", "2")]
    assert texts(table(tmp_path, rows), model, folders).labels.tolist() == [0.5, 2.0]
    with refused(InputError, "label holds", "expected numbers"):
        texts(table(tmp_path, [{"text": "dawn", "label": "high"}]), model, folders)


# Splits


def split_rows(folder: Path, model: hf.PreTrainedModel, folders: Path) -> list[int | None]:
    """How many rows the train and the test part have."""
    parts = (texts(folder, model, folders, split=split) for split in ("train", "test"))
    return [None if part is None else len(part) for part in parts]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data/train-00000-of-00002": 2, "data/train-00001-of-00002": 3, "data/validation-00000-of-00001": 1}, [5, 1]),
        ({"train-00000-of-00002": 2, "train-00001-of-00002": 3, "test-0": 1, "test-1": 1}, [5, 2]),
        ({"train": 5, "train-old": 2, "dev": 3, "developers_notes": 1}, [5, 3]),
        ({"my_train": 2, "my_validation-00": 1, "my_validation-01": 2}, [2, 3]),
        ({"train/a": 2, "train/b": 1, "val/test": 3}, [3, 3]),
        ({"train": 2, ".train-1": 1, "__old/train": 1, "strain": 1, "trained": 1}, [2, None]),
        ({"validation_matched": 2, "validation_mismatched": 1}, [None, 2]),
    ],
    ids=str,
)
def test_names_of_splits(
    files: dict[str, int], expected: list[int | None], bert: hf.PreTrainedModel, folders: Path, tmp_path: Path
) -> None:
    """A split is what is called so, in one file, in shards or in a folder; other names that begin alike are not."""
    for name, count in files.items():
        (tmp_path / "data set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data set" / f"{name}.jsonl").write_text(jsonl([{"text": "dawn"}] * count))
    assert split_rows(tmp_path / "data set", bert, folders) == expected


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (("train.csv", "train.jsonl"), ("several train parts: train.csv, train.jsonl",)),
        (("dev.csv", "validation.csv"), ("several test parts: dev.csv, validation.csv",)),
        (("a/train.csv", "b/train.csv"), ("several train parts: a/train.csv, b/train.csv",)),
        (("train_a.csv", "train_b.csv"), ("several train parts: train_a.csv, train_b.csv",)),
        (("train.csv", "train.csv.gz"), ("several train parts",)),
        (("train-00000-of-00002.csv",), ("has 1 of 2 files train-#.csv; some are missing",)),
    ],
    ids=str,
)
def test_splits_in_doubt(
    files: tuple[str, ...], parts: tuple[str, ...], bert: hf.PreTrainedModel, folders: Path, tmp_path: Path
) -> None:
    """Where several files could be meant, or a shard is missing, nothing is read."""
    for name in files:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text("text\ndawn\n")
    with refused(InputError, f"{tmp_path / 'folder'} has", *parts):
        split_rows(tmp_path / "folder", bert, folders)


@pytest.mark.parametrize("kind", ["tsv", "csv.gz", "JSONL", "arrow"])
def test_more_kinds_of_files(kind: str, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Tables may be separated by tabs, compressed, Arrow's own, and of upper case, in a path of any signs."""
    path = tmp_path / "Möwe [1] 🪶 #?*" / f"train.{kind}"
    path.parent.mkdir()
    if kind == "arrow":
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        shutil.copy(next((tmp_path / "saved").glob("*.arrow")), path)
    else:
        lines = jsonl(ROWS) if kind == "JSONL" else csv(ROWS).replace(",", "\t" if kind == "tsv" else ",")
        path.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    for source in (path, path.parent):
        data = texts(source, bert, folders)
        assert (data.rows, data.labels.tolist()) == (TEXTS, [1, 0, 2])


def test_saved_by_datasets(bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """What `datasets` saved to disk is read, with its splits, or whole."""
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "parts")
    rows.save_to_disk(tmp_path / "whole")
    assert split_rows(tmp_path / "parts", bert, folders) == [3, 1]
    assert split_rows(tmp_path / "whole", bert, folders) == [3, None]


def labelled(data: Data | None) -> dict[str, int]:
    """The label of each image of a folder, by that of its class."""
    assert data is not None
    assert data.labels is not None
    return {row.parent.name: int(label) for row, label in zip(data.rows, data.labels, strict=True)}


def test_folders_of_classes(vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A class keeps its number in a part that lacks another; hidden folders are none; all usual types are read."""
    for name in ("train/ant/a.TIF", "train/bee/a.JpEg", "train/cow/a.png", "val/ant/a.png", "val/cow/a.gif"):
        draw(tmp_path / name)
    for name in ("train/.ipynb_checkpoints/a.png", "val/.cache/a.png", "val/__MACOSX/a.png"):
        draw(tmp_path / name)
    assert labelled(pictures(tmp_path, vit, folders)) == {"ant": 0, "bee": 1, "cow": 2}
    assert labelled(pictures(tmp_path, vit, folders, split="test")) == {"ant": 0, "cow": 2}


def test_folders_of_numbers(vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Folders 0 and 2 are the classes of these numbers; folders 1 to 3 are classes in their order."""
    for folder, names in (("holes", "02"), ("shifted", "123")):
        for name in names:
            draw(tmp_path / folder / name / "a.png")
    assert labelled(pictures(tmp_path / "holes", vit, folders)) == {"0": 0, "2": 2}
    assert labelled(pictures(tmp_path / "shifted", vit, folders)) == {"1": 0, "2": 1, "3": 2}


def test_folders_by_name(folders: Path, tmp_path: Path) -> None:
    """Folders are the model's classes of that name; of other names they are refused, or taken in order if asked."""
    model, _ = SUPPORTED["vit"]()
    model.config.id2label = {0: "bee", 1: "cow", 2: "Ant_"}
    for name in ("ant", "bee"):
        draw(tmp_path / "known" / name / "a.png")
        draw(tmp_path / "other" / f"{name}s" / "a.png")
    assert labelled(pictures(tmp_path / "known", model, folders)) == {"ant": 2, "bee": 0}
    with refused(InputError, "the classes ants, bees; the model has bee, cow, Ant_"):
        pictures(tmp_path / "other", model, folders)
    assert labelled(pictures(tmp_path / "other", model, folders, labels="order")) == {"ants": 0, "bees": 1}


def test_folders_of_both_kinds(vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """A folder named after a split beside folders of classes is refused: it may be either."""
    for name in ("train", "bus"):
        draw(tmp_path / name / "a.png")
    with refused(InputError, "folders named after splits and others, bus"):
        pictures(tmp_path, vit, folders)


# What cannot be used, and what is cut


def test_skip_bad(vit: hf.PreTrainedModel, bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """If asked, images and texts that cannot be used are left out, with their labels, and named."""
    for name in ("ant/a.png", "ant/b.png", "bee/a.png"):
        draw(tmp_path / "images" / name)
    broken(tmp_path / "images" / "ant" / "b.png")
    with pytest.warns(UserWarning, match="skipped 1 of 3: .*b.png is not a readable image"):
        data = pictures(tmp_path / "images", vit, folders, skip_bad=True)
    assert (len(list(data)), data.labels.tolist()) == (1, [0, 1])
    path = table(tmp_path, [{"text": "dawn", "label": 1}, {"text": None, "label": 0}, {"text": "reeds", "label": 2}])
    with pytest.warns(UserWarning, match="skipped 1 of 3: row 1 of text is"):
        data = texts(path, bert, folders, skip_bad=True)
    assert (data.rows, data.labels.tolist()) == ([("dawn",), ("reeds",)], [1, 2])
    path.write_text(jsonl([{"text": 3}]))
    with refused(InputError, "row 0 of text is (3,)"):
        texts(path, bert, folders, skip_bad=True)


def test_cuts_are_told(bert: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Texts are cut at what tokenizer and model take, not before, and how many are is said."""
    path = table(tmp_path, [{"text": "dawn " * length} for length in (10, 63, 99)])
    with pytest.warns(UserWarning, match=f"2 of 3 texts were cut at {bert.config.max_position_embeddings} tokens"):
        data = texts(path, bert, folders)
    assert next(iter(data))["input_ids"].shape == (3, bert.config.max_position_embeddings)
    path.write_text(jsonl([{"text": "dawn " * 10}]))
    with warnings.catch_warnings(action="error"):
        texts(path, bert, folders)


def test_positions_after_the_padding_token(folders: Path, tmp_path: Path) -> None:
    """RoBERTa has fewer positions than its configuration says; the longest text still fits."""
    config = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
    model = hf.RobertaModel(hf.RobertaConfig(**config, intermediate_size=8, max_position_embeddings=34)).eval()
    data = texts(table(tmp_path, [{"text": "dawn " * 99}]), model, folders)
    (batch,) = data
    assert batch["input_ids"].shape == (1, 32)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def test_texts_without_tokens(folders: Path, tmp_path: Path) -> None:
    """A text of which the tokenizer makes no token is one of padding that the model sees, alone or with others."""
    tokenizer = load_tokenizer(folders / "text")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path / "plain")
    model = SUPPORTED["llama"]()[0].base_model
    data = load_data(
        str(table(tmp_path, [{"text": ""}, {"text": "dawn day"}])), model, tmp_path / "plain", split="train"
    )
    (batch,) = data
    assert batch["attention_mask"].sum(1).tolist() == [1, 2]
    assert data.collate([("",)])["input_ids"].tolist() == [[0]]
    assert predict(model, data).isfinite().all()


def test_decoder_is_told_its_padding(folders: Path, tmp_path: Path) -> None:
    """A classifier on a decoder learns which token pads, which it needs for a batch."""
    config = hf.GPT2Config(vocab_size=99, n_positions=64, n_embd=8, n_layer=1, n_head=2, num_labels=2)
    model = hf.GPT2ForSequenceClassification(config)
    assert model.config.pad_token_id is None
    data = texts(table(tmp_path, [{"text": "dawn"}, {"text": "dawn day"}]), model, folders)
    assert model.config.pad_token_id == 0
    assert predict(model, data).shape == (2, 2)


def test_decoder_reads_the_text_too(folders: Path, tmp_path: Path) -> None:
    """Texts calibrate a model that translates: its decoder reads what its encoder reads."""
    config = hf.T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = hf.T5ForConditionalGeneration(config).eval()
    data = texts(table(tmp_path, ROWS), model, folders)
    (batch,) = data
    assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])
    bittern.simulate(model, "w8a8", batch)
    with refused(InputError, "T5ForConditionalGeneration cannot be evaluated", "without a validation or test part"):
        predict(model, data)


# Images as they are stored


def test_turned_images(tmp_path: Path) -> None:
    """An image is turned as its EXIF tag says, as `datasets` and transformers read it."""
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).save(tmp_path / "a.png", exif=tag)
    expected = load_image(str(tmp_path / "a.png"))
    assert read_image(tmp_path / "a.png", "RGB").tobytes() == expected.tobytes()
    assert expected.size == (4, 6)
    scene = Scene(tmp_path / "a.png", 4, 6, ())  # boxes drawn on the image as it is stored
    assert read_image(scene, "RGB").size == (6, 4)


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_sixteen_bits(kind: str, tmp_path: Path) -> None:
    """A grey image of 16 bits keeps its contrast."""
    ramp = np.arange(256, dtype=np.uint16) * 257
    Image.fromarray(ramp.reshape(16, 16).astype(kind)).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif", "L")).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("values", [np.arange(64.0, dtype=np.float32), np.arange(64, dtype=np.int32) * 1000], ids=str)
def test_deep_images(values: np.ndarray, tmp_path: Path) -> None:
    """Pixels of 32 bits, of which nobody knows the range, are refused."""
    Image.fromarray(values.reshape(8, 8)).save(tmp_path / "a.tif")
    with refused(InputError, "a.tif is not a readable image", "pixels of 32 bits"):
        read_image(tmp_path / "a.tif", "RGB")


def test_paths_of_images(vit: hf.PreTrainedModel, folders: Path, tmp_path: Path) -> None:
    """Paths in a table are found from the folder of the table."""
    draw(tmp_path / "tables" / "pictures" / "a.png")
    (tmp_path / "tables" / "train.csv").write_text("image,label\npictures/a.png,1\n")
    for source in (tmp_path / "tables", tmp_path / "tables" / "train.csv"):
        (batch,) = pictures(source, vit, folders)
        assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_read_only_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table is read where the cache of `datasets` cannot be written, as in many containers."""
    (tmp_path / "data.csv").write_text("text,label\ngood,1\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none")
    tables._cache_folder.cache_clear()
    found = tables.read_table(str(tmp_path / "data.csv"), "train")
    assert found is not None
    assert list(found[1]["text"]) == ["good"]
    tables._cache_folder.cache_clear()


@pytest.mark.parametrize("limit", ["long", [1]])
def test_damaged_tokenizer(tmp_path: Path, limit: object) -> None:
    """Settings of a tokenizer that are none are told in one line."""
    folder = save_text_model(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": limit}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_tables(tmp_path / "data", text=["a bittern booms"] * 4)
    with refused(InputError, str(folder), "its tokenizer"):
        load_data(str(tmp_path / "data"), bittern.load(folder), folder, split="train")
